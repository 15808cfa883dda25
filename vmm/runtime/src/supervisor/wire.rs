//! What is said between a supervisor and the commands that use it: JSON objects, one a line, over a unix socket; descriptors of stdio
//! travel beside the request that needs them. Fields are only ever added, so that an older supervisor and a newer command get along.
use std::{
    collections::VecDeque,
    io::{self, IoSlice, IoSliceMut, Write},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
};

use oci_spec::runtime::{LinuxResources, Process};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::state::{Exit, Status};

/// The longest line: an exec's process with its environment.
const MAX_LINE_BYTES: usize = 1 << 20;
/// Descriptors in one message: three of stdio.
const MAX_DESCRIPTORS: usize = 3;

/// What a command asks for.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// Run the program of a created container.
    Start,
    /// Run another process. With descriptors for its stdio, in the order stdin, stdout, stderr.
    Exec {
        /// What to run.
        process: Box<Process>,
        /// Resolve this user in the container, in place of the numbers.
        #[serde(default)]
        user: Option<String>,
        /// Which of the streams are passed: stdin, stdout, stderr.
        streams: [bool; 3],
        /// Give it a container's capabilities, or those of `process`.
        #[serde(default)]
        container_defaults: bool,
    },
    /// Join the init process's streams. With descriptors, as in Exec.
    Attach {
        /// Which of the streams are passed.
        streams: [bool; 3],
    },
    /// Send a signal.
    Signal {
        /// Which process: empty for init.
        #[serde(default)]
        process: String,
        /// Its number.
        signal: u8,
        /// To all processes of the container.
        #[serde(default)]
        all: bool,
    },
    /// End the container: a signal for its init process, after which no restart policy applies.
    Stop {
        /// Its number.
        signal: u8,
    },
    /// Set a terminal's size.
    Resize {
        /// Which process.
        #[serde(default)]
        process: String,
        /// Columns.
        width: u16,
        /// Rows.
        height: u16,
    },
    /// Freeze.
    Pause,
    /// Thaw.
    Resume,
    /// Change limits.
    Update {
        /// The values to change.
        resources: Box<LinuxResources>,
    },
    /// Read usage.
    Stats,
    /// List processes.
    Processes,
    /// How is it?
    State,
    /// Answer with Exited when the container has ended.
    Wait,
}

/// What the supervisor answers. Exec, Attach and Wait are answered twice: at once, and with Exited.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum Answer {
    /// Done.
    Done,
    /// Everything is ready for the program; it waits for Start. Unasked, to the command that made the container.
    Created,
    /// The process runs.
    Started {
        /// Its name, for Signal and Resize.
        process: String,
        /// Its PID in the container.
        pid: u32,
    },
    /// It ended.
    Exited {
        /// How.
        exit: Exit,
        /// Something in the container was killed for want of memory.
        #[serde(default)]
        oom: bool,
        /// What went wrong, if it did not end by itself.
        #[serde(default)]
        error: Option<String>,
        /// Where the time went; of an init process only.
        #[serde(default)]
        timing: Option<Box<super::timing::Timing>>,
    },
    /// It cannot be done.
    Error {
        /// Why.
        message: String,
        /// docker's exit code for it: 125, 126 or 127.
        code: u8,
    },
    /// Usage.
    Stats {
        /// The agent's figures.
        stats: caisson_agent_protocol::Stats,
    },
    /// Processes.
    Processes {
        /// The container's.
        processes: Vec<caisson_agent_protocol::ProcessInfo>,
    },
    /// The status.
    State {
        /// Now.
        status: Status,
    },
    /// Something slow is being done first. Unasked, to the command that made the container.
    Progress {
        /// What.
        what: String,
    },
}

/// Sends a line, with descriptors.
pub fn send<T: Serialize>(stream: &UnixStream, value: &T, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    if line.len() > MAX_LINE_BYTES {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("the message has {} bytes, more than {MAX_LINE_BYTES}", line.len()),
        ));
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many descriptors"));
    }
    let sent = loop {
        match sendmsg(stream, &[IoSlice::new(&line)], &mut control, SendFlags::NOSIGNAL) {
            Err(rustix::io::Errno::INTR) => {}
            result => break result?,
        }
    };
    let mut rest = stream;
    rest.write_all(&line[sent..])
}

/// Receives lines and the descriptors that came with them.
#[derive(Debug)]
pub struct Receiver {
    stream: UnixStream,
    bytes: Vec<u8>,
    descriptors: VecDeque<OwnedFd>,
}

impl Receiver {
    /// Of this stream.
    pub fn new(stream: UnixStream) -> Receiver {
        Receiver { stream, bytes: Vec::new(), descriptors: VecDeque::new() }
    }

    /// The stream.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// The next message; None at the end of the stream.
    pub fn receive<T: DeserializeOwned>(&mut self) -> io::Result<Option<T>> {
        loop {
            if let Some(end) = self.bytes.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.bytes.drain(..=end).collect();
                return Ok(Some(serde_json::from_slice(&line)?));
            }
            if self.bytes.len() > MAX_LINE_BYTES {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a message is too long"));
            }
            if self.fill()? == 0 {
                return if self.bytes.is_empty() { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
            }
        }
    }

    /// The next of the descriptors that came.
    pub fn take_descriptor(&mut self) -> Option<OwnedFd> {
        self.descriptors.pop_front()
    }

    fn fill(&mut self) -> io::Result<usize> {
        let mut buffer = [0; 8192];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            match recvmsg(
                self.stream.as_fd(),
                &mut [IoSliceMut::new(&mut buffer)],
                &mut control,
                RecvFlags::CMSG_CLOEXEC,
            ) {
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::CONNRESET) => return Ok(0),
                result => break result?,
            }
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                self.descriptors.extend(descriptors);
            }
        }
        if self.descriptors.len() > 2 * MAX_DESCRIPTORS {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "too many descriptors"));
        }
        self.bytes.extend_from_slice(&buffer[..received.bytes]);
        Ok(received.bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn messages_and_descriptors_arrive_together() {
        let (here, there) = UnixStream::pair().unwrap();
        let (mut read, write) = UnixStream::pair().unwrap();
        send(&here, &Request::Attach { streams: [false, true, false] }, &[write.as_fd()]).unwrap();
        send(&here, &Request::Wait, &[]).unwrap();
        drop((here, write));
        let mut receiver = Receiver::new(there);
        assert!(matches!(receiver.receive().unwrap(), Some(Request::Attach { streams: [false, true, false] })));
        let mut passed = UnixStream::from(receiver.take_descriptor().unwrap());
        passed.write_all(b"through").unwrap();
        drop(passed);
        let mut text = String::new();
        read.read_to_string(&mut text).unwrap();
        assert_eq!(text, "through");
        assert!(matches!(receiver.receive().unwrap(), Some(Request::Wait)));
        assert!(receiver.receive::<Request>().unwrap().is_none());
        assert!(receiver.take_descriptor().is_none());
    }

    #[test]
    fn long_messages_pass_and_broken_ones_do_not() {
        let (here, there) = UnixStream::pair().unwrap();
        let sender = std::thread::spawn(move || {
            send(&here, &Answer::Progress { what: "x".repeat(300_000) }, &[]).unwrap();
            (&here).write_all(b"{\"answer\":").unwrap();
        });
        let mut receiver = Receiver::new(there);
        assert!(matches!(receiver.receive().unwrap(), Some(Answer::Progress { what }) if what.len() == 300_000));
        sender.join().unwrap();
        assert!(receiver.receive::<Answer>().is_err());
    }
}
