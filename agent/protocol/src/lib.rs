//! The messages between the host and the agent in the guest, and their framing. No I/O.
//!
//! One vsock connection from the host to port [`CONTROL_PORT`] carries [`ToAgent`] and [`FromAgent`] messages, each in a frame
//! (see [`encode`] and [`Decoder`]). Every stdin, stdout and stderr is a vsock connection of its own to [`STREAM_PORT`] that begins
//! with the stream's [`StreamToken`] in four little-endian bytes.
#![cfg_attr(not(test), no_std)]
extern crate alloc;

mod frame;
mod message;
pub use frame::{Decoder, FrameError, MAX_MESSAGE_BYTES, encode};
pub use message::*;

/// The version of this protocol. Host and agent must agree on it exactly.
pub const VERSION: u32 = 2;
/// The guest's vsock port that the agent listens on for the host's control connection.
pub const CONTROL_PORT: u32 = 1024;
/// The guest's vsock port that the agent listens on for stdio streams.
pub const STREAM_PORT: u32 = 1025;
/// The *host's* vsock port that the agent connects to once, when it listens on the others. It sends nothing.
pub const DOORBELL_PORT: u32 = 1026;
