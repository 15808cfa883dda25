//! The process that owns a container: it starts the machine, holds the streams, serves the commands that come later, and ends as the
//! container's program did.
//!
//! ```text
//!  command --spawn--> supervisor --spawn--> caisson-vmm
//!     |   <--answers--    |   \--vsock-->   agent in the guest
//!  later commands --socket--/
//! ```
//! When it dies the monitor dies, and with it the container; what it leaves on disk is cleared away by the next command.
mod client;
mod run;
mod serve;
#[allow(unsafe_code)] // Signals and inherited descriptors.
pub mod stdio;
pub mod timing;
pub mod wire;

pub use client::{Client, ClientError, Launch, clear, launch, own_stdio};
pub use run::{Arguments, run};

/// The name of the supervisor's socket in the container's run directory.
pub(crate) const SOCKET: &str = "supervisor.sock";
