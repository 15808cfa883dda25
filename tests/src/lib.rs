//! The test harness: temporary stores, guests with deadlines, always cleaned up.
