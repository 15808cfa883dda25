//! Connections that carry standard streams, until the request comes that names them.
use crate::{
    cgroup::sleep_ms,
    error::{Result, error},
};
use alloc::{format, vec::Vec};
use caisson_agent_protocol::{ErrorKind, StreamToken};
use rustix::{
    fd::{AsFd, OwnedFd},
    net::{SocketFlags, accept_with},
};

/// The most connections that can wait; the oldest goes when there are more.
const MAX_WAITING: usize = 64;
/// How long a request waits for the streams that it names: the host connects them before it asks.
const WAIT_MS: u32 = 10_000;
/// The time between two looks.
const STEP_MS: u32 = 5;
/// Bytes of a token.
const TOKEN_BYTES: usize = size_of::<StreamToken>();

/// The waiting connections, with what has come of their tokens.
pub(crate) struct Streams {
    listener: OwnedFd,
    waiting: Vec<(OwnedFd, [u8; TOKEN_BYTES], usize)>,
}

impl Streams {
    pub(crate) const fn new(listener: OwnedFd) -> Self {
        Self { listener, waiting: Vec::new() }
    }

    /// Drops the connections that wait: their host is gone.
    pub(crate) fn clear(&mut self) {
        self.accept();
        self.waiting.clear();
    }

    /// The connection with a token. Nobody watches the listener meanwhile: connections are looked for when a request names them.
    pub(crate) fn take(&mut self, token: StreamToken) -> Result<OwnedFd> {
        for _ in 0..=WAIT_MS / STEP_MS {
            self.accept();
            self.read_tokens();
            let wanted = token.to_le_bytes();
            let found = self.waiting.iter().position(|(_, read, count)| *count == TOKEN_BYTES && *read == wanted);
            if let Some(position) = found {
                return Ok(self.waiting.remove(position).0);
            }
            sleep_ms(STEP_MS);
        }
        Err(error(ErrorKind::Invalid, format!("no stream with the token {token} was connected within {WAIT_MS} ms")))
    }

    fn accept(&mut self) {
        while let Ok(stream) = accept_with(self.listener.as_fd(), SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            if self.waiting.len() == MAX_WAITING {
                self.waiting.remove(0);
            }
            self.waiting.push((stream, [0; TOKEN_BYTES], 0));
        }
    }

    fn read_tokens(&mut self) {
        self.waiting.retain_mut(|(stream, token, count)| {
            while *count < TOKEN_BYTES {
                match rustix::io::read(&*stream, &mut token[*count..]) {
                    Ok(0) => return false,
                    Ok(more) => *count += more,
                    Err(rustix::io::Errno::AGAIN) => break,
                    Err(_) => return false,
                }
            }
            true
        });
    }
}
