//! A virtual machine on KVM: memory, vCPUs, boot, devices, snapshots. It knows nothing of OCI.
//!
//! The machine runs in a process of its own, the monitor `caisson-vmm`. Its users need three modules: [`config`] says
//! what machine to build, [`control`] what is said to and by the monitor, and [`client`] spawns and drives it.

pub mod bus;
#[allow(unsafe_code)] // The child process is prepared between fork and exec.
pub mod client;
pub mod config;
pub mod control;
pub mod virtio;
