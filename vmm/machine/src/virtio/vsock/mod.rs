//! The socket device (virtio 1.2 §5.10): streams between processes in the guest and unix sockets
//! on the host, as Firecracker maps them.
//!
//! - The monitor listens on `vsock.sock` in the device's directory. A client connects, writes
//!   `CONNECT <port>\n`, and reads `OK <port>\n` once a process in the guest has accepted on that
//!   port; then bytes flow. If none does, the client reads the end.
//! - A connection of the guest to the host's port P becomes one to the unix socket `vsock.sock_P`
//!   in the directory. If nobody listens there, it is refused.
//!
//! Either direction ends on its own (`shutdown(2)`). What was sent before the end arrives. Data
//! goes from the socket to the guest's buffers and back without a copy, other than what a slow
//! reader on the host leaves behind: at most [`connection::BUFFER_BYTES`] a connection.
//!
//! What counts on slow hosts is how often the guest is interrupted, and for how much: packets to
//! the guest are collected in one interrupt, transmitted buffers are given back along with them,
//! and the guest is asked to notify only of what is waited for.

mod connection;
mod device;
mod host;
mod mux;
mod packet;

#[cfg(test)]
mod tests;

pub use device::Vsock;
