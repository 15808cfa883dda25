//! The block device (virtio 1.2 §5.2) over a file on the host.
//!
//! Requests are served one after the other with `preadv` and `pwritev` straight to the guest's
//! memory. A device without a medium has a capacity of 0: a template is booted and saved with such
//! ones, and each machine that is restored from it has its own media behind them.

mod device;
mod request;

#[cfg(test)]
mod tests;

pub use device::Block;
