//! Finds or builds the guest kernel, and describes it.
