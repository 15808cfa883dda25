//! The connection to the server: whole requests out, whole responses in, neither ever waited for but at a stop.
use crate::share::{MAX_FRAME_BYTES, RESPONSE_HEADER_BYTES};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

const PREFIX_BYTES: usize = 4;
/// Bytes that are read at once.
const READ_BYTES: usize = 64 * 1024;

/// The server is gone, or does not keep to the protocol.
#[derive(Debug)]
pub(super) struct Broken;

/// The socket, and what is under way on it.
#[derive(Debug)]
pub(super) struct Link {
    socket: UnixStream,
    outgoing: Vec<u8>,
    /// How much of `outgoing` was sent.
    sent: usize,
    incoming: Vec<u8>,
    /// How much of `incoming` was taken.
    taken: usize,
}

impl Link {
    pub(super) fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self { socket, outgoing: Vec::new(), sent: 0, incoming: Vec::new(), taken: 0 })
    }

    /// Bytes of requests that the socket did not take yet.
    pub(super) fn unsent(&self) -> usize {
        self.outgoing.len() - self.sent
    }

    /// Makes room for a request of `len` bytes, which `fill` writes, and sends what can be sent.
    pub(super) fn request<E>(&mut self, len: usize, fill: impl FnOnce(&mut [u8]) -> Result<(), E>) -> Result<(), E> {
        let start = self.outgoing.len();
        self.outgoing.extend_from_slice(&(len as u32).to_le_bytes());
        self.outgoing.resize(start + PREFIX_BYTES + len, 0);
        let filled = fill(&mut self.outgoing[start + PREFIX_BYTES..]);
        if filled.is_err() {
            self.outgoing.truncate(start);
        }
        filled
    }

    /// Sends what the socket takes.
    pub(super) fn flush(&mut self) -> Result<(), Broken> {
        while self.sent < self.outgoing.len() {
            match send(&self.socket, &self.outgoing[self.sent..], SendFlags::NOSIGNAL) {
                Ok(len) => self.sent += len,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    self.outgoing.drain(..self.sent);
                    self.sent = 0;
                    return Ok(());
                }
                Err(_) => return Err(Broken),
            }
        }
        self.outgoing.clear();
        self.sent = 0;
        Ok(())
    }

    /// The next whole response, if it is there.
    pub(super) fn response(&mut self) -> Result<Option<&[u8]>, Broken> {
        loop {
            let have = &self.incoming[self.taken..];
            if let Some(prefix) = have.first_chunk::<PREFIX_BYTES>() {
                let len = u32::from_le_bytes(*prefix) as usize;
                if !(RESPONSE_HEADER_BYTES..=MAX_FRAME_BYTES).contains(&len) {
                    return Err(Broken);
                }
                if have.len() >= PREFIX_BYTES + len {
                    let start = self.taken + PREFIX_BYTES;
                    self.taken = start + len;
                    return Ok(Some(&self.incoming[start..start + len]));
                }
            }
            self.incoming.drain(..self.taken);
            self.taken = 0;
            let old = self.incoming.len();
            self.incoming.resize(old + READ_BYTES, 0);
            let received = recv(&self.socket, &mut self.incoming[old..], RecvFlags::empty());
            self.incoming.truncate(old + received.as_ref().map_or(0, |(len, _)| *len));
            match received {
                Ok((0, _)) => return Err(Broken),
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(_) => return Err(Broken),
            }
        }
    }

    /// Waits until something can be read, or also written if `writable`, but not beyond `deadline`.
    pub(super) fn wait(&self, writable: bool, deadline: Instant) -> Result<(), Broken> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left == Duration::ZERO {
            return Err(Broken);
        }
        let events = if writable { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
        let timeout = Timespec::try_from(left).map_err(|_| Broken)?;
        match poll(&mut [PollFd::new(&self.socket, events)], Some(&timeout)) {
            Ok(0) => Err(Broken),
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(_) => Err(Broken),
        }
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
