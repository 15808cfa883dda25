//! What is said on the control channel: JSON objects, one a line, over a stream socket between a supervisor and its
//! monitor. The supervisor sends a [`Request`] and gets one [`Reply`]; [`Event`]s come at any time, also between the two.
//! The end of the stream ends the monitor.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::path::PathBuf;

/// The longest line, the newline included.
pub const MAX_LINE_BYTES: usize = 64 * 1024;
/// Messages in replies and events are cut to this many bytes, so that a line stays within its bound.
pub const MAX_MESSAGE_BYTES: usize = 8 * 1024;

/// What the supervisor asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Stop all vCPUs and devices. Pausing a paused machine is no error.
    Pause,
    /// Let them go on. Resuming a running machine is no error.
    Resume,
    /// Write a snapshot of a paused machine into the two files whose descriptors come with the request (`SCM_RIGHTS`):
    /// `state`, `memory`. The monitor opens no files once it runs.
    Snapshot {
        /// Where they are, for messages.
        directory: PathBuf,
    },
    /// End the monitor.
    Quit,
}

/// The answer to a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Reply {
    /// It is done.
    Done,
    /// It was refused or failed.
    Error {
        /// The chain of causes.
        message: String,
    },
}

/// What happened to the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Event {
    /// The first `KVM_RUN` is about to happen.
    Running {
        /// Nanoseconds since the monitor's `main` began.
        setup_ns: u64,
    },
    /// The machine ended; the monitor exits after it.
    Ended {
        /// Why.
        reason: EndReason,
        /// For [`EndReason::Error`], the chain of causes; else empty.
        message: String,
        /// What the machine did.
        statistics: Statistics,
    },
}

/// Why a machine ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EndReason {
    /// The supervisor asked for it.
    Shutdown,
    /// The guest reset itself, which is how it ends itself too.
    Reset,
    /// It could not be set up or go on.
    Error,
}

/// What a machine did in its life.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Statistics {
    /// Exits from `KVM_RUN` by kind.
    pub exits: BTreeMap<String, u64>,
    /// Instructions supplied for software KVM, by mnemonic.
    pub assists: BTreeMap<String, u64>,
    /// Nanoseconds within `KVM_RUN`, of all vCPUs.
    pub kvm_run_ns: u64,
    /// Nanoseconds from the monitor's start until now.
    pub wall_ns: u64,
    /// Nanoseconds that the vCPU threads spent outside `KVM_RUN`, answering exits.
    pub host_ns: u64,
}

/// A line from the monitor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Message {
    /// The answer to the request before.
    Reply(Reply),
    /// Something happened.
    Event(Event),
}

impl Reply {
    /// An error reply, cut to the bound.
    pub fn error(message: &str) -> Self {
        Self::Error { message: cut(message) }
    }
}

/// Cuts a message to [`MAX_MESSAGE_BYTES`].
pub fn cut(message: &str) -> String {
    let mut end = message.len().min(MAX_MESSAGE_BYTES);
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    message[..end].to_owned()
}

/// Writes one value as a line.
///
/// # Errors
/// Writing failed, the value is not JSON, or the line is longer than [`MAX_LINE_BYTES`].
pub fn write_line<T: Serialize>(mut stream: impl Write, value: &T) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    if line.len() > MAX_LINE_BYTES {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "control line too long"));
    }
    stream.write_all(&line)
}

/// Splits a byte stream into bounded lines.
#[derive(Debug)]
pub struct LineReader<R> {
    stream: R,
    buffer: Vec<u8>,
}

impl<R: Read> LineReader<R> {
    /// Reads lines from a stream.
    pub fn new(stream: R) -> Self {
        Self { stream, buffer: Vec::new() }
    }

    /// The stream below.
    pub fn get_ref(&self) -> &R {
        &self.stream
    }

    /// The stream below.
    pub fn get_mut(&mut self) -> &mut R {
        &mut self.stream
    }

    /// The next line without its newline, or `None` at the end of the stream. What was read stays if the stream
    /// returns an error (a time-out), so that it can be called again.
    ///
    /// # Errors
    /// Reading failed, the stream ended within a line, or the line is longer than [`MAX_LINE_BYTES`].
    pub fn next_line(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            if let Some(end) = self.buffer.iter().position(|&b| b == b'\n') {
                let mut line: Vec<u8> = self.buffer.drain(..=end).collect();
                line.pop();
                return Ok(Some(line));
            }
            if self.buffer.len() >= MAX_LINE_BYTES {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "control line too long"));
            }
            let mut chunk = [0; 4096];
            let room = chunk.len().min(MAX_LINE_BYTES - self.buffer.len());
            match self.stream.read(&mut chunk[..room]) {
                Ok(0) if self.buffer.is_empty() => return Ok(None),
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => self.buffer.extend_from_slice(&chunk[..n]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_wire_format_is_as_documented() {
        let mut line = Vec::new();
        write_line(&mut line, &Request::Pause).unwrap();
        write_line(&mut line, &Request::Snapshot { directory: "/s".into() }).unwrap();
        write_line(&mut line, &Reply::Done).unwrap();
        write_line(&mut line, &Event::Running { setup_ns: 7 }).unwrap();
        assert_eq!(
            String::from_utf8(line).unwrap(),
            "{\"request\":\"pause\"}\n{\"request\":\"snapshot\",\"directory\":\"/s\"}\n{\"reply\":\"done\"}\n\
             {\"event\":\"running\",\"setup_ns\":7}\n"
        );
    }

    #[test]
    fn replies_and_events_are_told_apart() {
        let messages = [
            Message::Reply(Reply::Done),
            Message::Reply(Reply::error("no")),
            Message::Event(Event::Running { setup_ns: 1 }),
            Message::Event(Event::Ended {
                reason: EndReason::Reset,
                message: String::new(),
                statistics: Statistics { exits: [("hlt".into(), 3)].into(), ..Statistics::default() },
            }),
        ];
        let mut stream = Vec::new();
        for message in &messages {
            write_line(&mut stream, message).unwrap();
        }
        let mut reader = LineReader::new(&stream[..]);
        for message in messages {
            let line = reader.next_line().unwrap().unwrap();
            assert_eq!(serde_json::from_slice::<Message>(&line).unwrap(), message);
        }
        assert_eq!(reader.next_line().unwrap(), None);
    }

    #[test]
    fn lines_are_bounded_and_whole() {
        let long = vec![b'x'; MAX_LINE_BYTES + 1];
        assert_eq!(LineReader::new(&long[..]).next_line().unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert_eq!(LineReader::new(&b"{"[..]).next_line().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        let mut just = vec![b'x'; MAX_LINE_BYTES - 1];
        just.push(b'\n');
        assert_eq!(LineReader::new(&just[..]).next_line().unwrap().unwrap().len(), MAX_LINE_BYTES - 1);
    }

    #[test]
    fn long_messages_are_cut_at_a_character() {
        let cut = cut(&"ä".repeat(MAX_MESSAGE_BYTES));
        assert_eq!(cut.len(), MAX_MESSAGE_BYTES);
    }
}
