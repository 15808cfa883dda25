//! Frames: a message's length in four little-endian bytes, then the message in postcard's encoding.
//!
//! The other side is not trusted: lengths are bounded before anything is kept for them, and a stream that has once been
//! wrong stays wrong, because nobody knows where its next frame would begin.
use alloc::vec::Vec;
use core::fmt;
use serde::{Serialize, de::DeserializeOwned};

/// The longest message that a frame can carry, in bytes. A container's configuration with its seccomp filter and a few
/// files takes some 50 KiB; this bounds what either side must buffer for the other.
pub const MAX_MESSAGE_BYTES: usize = 1 << 20;
/// Bytes of a frame before its message.
const HEADER_BYTES: usize = 4;

/// Why a message could not be framed, or a stream not be read any further.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FrameError {
    /// A message of that many bytes is longer than [`MAX_MESSAGE_BYTES`].
    TooLong(usize),
    /// A frame's content is no message.
    Garbage(postcard::Error),
    /// A frame's content goes on for that many bytes after its message.
    Trailing(usize),
    /// An earlier frame was wrong.
    Broken,
}

impl fmt::Display for FrameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLong(bytes) => {
                write!(f, "a message of {bytes} bytes exceeds the limit of {MAX_MESSAGE_BYTES}")
            }
            Self::Garbage(_) => f.write_str("a frame holds no message that this version knows"),
            Self::Trailing(bytes) => write!(f, "a frame holds {bytes} bytes after its message"),
            Self::Broken => {
                f.write_str("an earlier frame of this connection was wrong; nothing more can be read from it")
            }
        }
    }
}

// By hand: thiserror would bring the standard library into the agent.
impl core::error::Error for FrameError {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            Self::Garbage(source) => Some(source),
            _ => None,
        }
    }
}

/// Makes the frame of a message.
///
/// # Errors
/// When the message is longer than [`MAX_MESSAGE_BYTES`].
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, FrameError> {
    let mut frame = postcard::to_extend(message, Vec::from([0; HEADER_BYTES])).map_err(FrameError::Garbage)?;
    let bytes = frame.len() - HEADER_BYTES;
    let length = u32::try_from(bytes).ok().filter(|_| bytes <= MAX_MESSAGE_BYTES).ok_or(FrameError::TooLong(bytes))?;
    frame[..HEADER_BYTES].copy_from_slice(&length.to_le_bytes());
    Ok(frame)
}

/// Takes a stream's bytes as they come and gives its messages.
///
/// It keeps the bytes that were pushed and not yet used, and nothing on the strength of an announced length; a decoded
/// message takes at most a fixed multiple of its bytes.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: Vec<u8>,
    used: usize,
    broken: bool,
}

impl Decoder {
    /// A decoder at the start of a stream.
    #[must_use]
    pub const fn new() -> Self {
        Self { bytes: Vec::new(), used: 0, broken: false }
    }

    /// Adds bytes that arrived. Call [`next`](Self::next) until it has no more before the next push, so that at most one
    /// frame and one read's bytes are kept. Does nothing once the stream was wrong.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.broken {
            return;
        }
        self.bytes.drain(..self.used);
        self.used = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole message, or None if more bytes are needed.
    ///
    /// # Errors
    /// When the stream does not hold a valid frame. Every later call fails too.
    #[allow(clippy::should_implement_trait)] // Fallible, and generic in what it gives.
    pub fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, FrameError> {
        if self.broken {
            return Err(FrameError::Broken);
        }
        let result = self.decode();
        if result.is_err() {
            *self = Self { broken: true, ..Self::new() };
        }
        result
    }

    fn decode<T: DeserializeOwned>(&mut self) -> Result<Option<T>, FrameError> {
        let Some((header, rest)) = self.bytes[self.used..].split_first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let length = u32::from_le_bytes(*header) as usize;
        if length > MAX_MESSAGE_BYTES {
            return Err(FrameError::TooLong(length));
        }
        let Some(content) = rest.get(..length) else {
            return Ok(None);
        };
        let (message, trailing) = postcard::take_from_bytes(content).map_err(FrameError::Garbage)?;
        if !trailing.is_empty() {
            return Err(FrameError::Trailing(trailing.len()));
        }
        self.used += HEADER_BYTES + length;
        if self.used == self.bytes.len() {
            // A connection is idle most of the time: do not hold a large message's buffer meanwhile.
            self.used = 0;
            self.bytes = Vec::new();
        }
        Ok(Some(message))
    }

    /// Whether the stream stands between two frames: the place where it may end.
    #[must_use]
    pub fn is_between_frames(&self) -> bool {
        !self.broken && self.used == self.bytes.len()
    }
}

#[cfg(test)]
mod arbitrary;
#[cfg(test)]
mod tests;
