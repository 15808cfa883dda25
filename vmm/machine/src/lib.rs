//! A virtual machine on KVM: memory, vCPUs, boot, devices, snapshots. It knows nothing of OCI.
//!
//! The machine runs in a process of its own, the monitor `caisson-vmm`. Its users need three modules: [`config`] says
//! what machine to build, [`control`] what is said to and by the monitor, and [`client`] spawns and drives it.

#[allow(unsafe_code)] // Atomic operations on guest memory.
pub mod assist;
pub mod boot;
pub mod bus;
#[allow(unsafe_code)] // The child process is prepared between fork and exec.
pub mod client;
pub mod config;
pub mod control;
pub mod devices;
#[allow(unsafe_code)] // Descriptors that come over the control channel.
pub mod event_loop;
#[allow(unsafe_code)] // Signals to threads, and a handler for them.
pub mod gate;
#[allow(unsafe_code)] // KVM's calls that take addresses, and the page that it shares.
pub mod kvm;
pub mod memory;
pub mod monitor;
#[allow(unsafe_code)] // A guest of its own.
pub mod probe;
pub mod share;
pub mod snapshot;
pub mod virtio;
pub mod wiring;
