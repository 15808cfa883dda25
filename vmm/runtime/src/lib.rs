//! What a container is on the host: bundle, state, sandbox, supervisor.
pub mod agent;
pub mod assets;
pub mod builtin;
pub mod clock;
pub mod console;
pub mod container;
pub mod containers;
pub mod engine;
pub mod hooks;
pub mod logs;
pub mod network;
pub mod paths;
pub mod sandbox;
pub mod seccomp;
pub mod shares;
#[allow(unsafe_code)] // Signals and inherited descriptors.
pub mod signals;
pub mod spec;
pub mod state;
pub mod step;
pub mod supervisor;
pub mod template;
pub mod volumes;
