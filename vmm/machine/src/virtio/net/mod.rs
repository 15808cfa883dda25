//! The network device (virtio 1.2 §5.1) over a tap on the host.
//!
//! Checksums and the segmentation of TCP are left to the host wherever the guest's driver can leave
//! them: in the guest they cost most. What frames a guest may send is the business of the network
//! that the tap is in. A device without a tap is a stub whose link is down: a template has such
//! ones, and each machine that is restored from it has its own taps behind them.

mod device;
#[allow(unsafe_code)] // ioctls
mod tap;

#[cfg(test)]
mod tests;

pub use device::Net;
pub use tap::Tap;
