//! The file system device (virtio 1.2 §5.11): FUSE requests of the guest's virtio-fs driver, carried to a file server.
//!
//! The server is a process of its own ([`crate::share`]), which the device reaches over a Unix socket; the device only
//! carries bytes, and bounds them. A device without a server is a stub: whoever mounts it gets errors. A template has such
//! ones, and each machine that is restored from it has its own servers behind them.

mod device;
mod link;

#[cfg(test)]
mod tests;

pub use device::Fs;
