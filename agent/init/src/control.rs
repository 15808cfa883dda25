//! The host's control connection.
use crate::error::Result;
use alloc::{collections::VecDeque, vec::Vec};
use caisson_agent_protocol::{Decoder, FromAgent, ToAgent, encode};
use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    io::Errno,
};

/// A connection, with what has been received and not decoded, and what is to be sent.
pub(crate) struct Control {
    socket: OwnedFd,
    decoder: Decoder,
    to_send: VecDeque<Vec<u8>>,
    /// Whether somebody watches for room to send.
    pub(crate) watches_room: bool,
    /// Whether the host has said hello.
    pub(crate) greeted: bool,
}

/// Why a connection is no more.
pub(crate) struct Ended;

impl Control {
    pub(crate) const fn new(socket: OwnedFd) -> Self {
        Self { socket, decoder: Decoder::new(), to_send: VecDeque::new(), watches_room: false, greeted: false }
    }

    pub(crate) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// The next request, if a whole one has come. Call it until it has none.
    pub(crate) fn receive(&mut self, buffer: &mut [u8]) -> Result<Option<ToAgent>, Ended> {
        loop {
            if let Some(request) = self.decoder.next().map_err(|_| Ended)? {
                return Ok(Some(request));
            }
            match rustix::io::read(&self.socket, &mut *buffer) {
                Ok(0) => return Err(Ended),
                Ok(count) => self.decoder.push(&buffer[..count]),
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => {}
                Err(_) => return Err(Ended),
            }
        }
    }

    /// Sends a message, now or when there is room.
    pub(crate) fn send(&mut self, message: &FromAgent) -> Result<(), Ended> {
        self.to_send.push_back(encode(message).map_err(|_| Ended)?);
        self.flush()
    }

    /// Sends what waits, as far as there is room.
    pub(crate) fn flush(&mut self) -> Result<(), Ended> {
        while let Some(frame) = self.to_send.front_mut() {
            match rustix::io::write(&self.socket, frame) {
                Ok(count) if count < frame.len() => drop(frame.drain(..count)),
                Ok(_) => drop(self.to_send.pop_front()),
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(_) => return Err(Ended),
            }
        }
        Ok(())
    }

    /// Whether something waits for room.
    pub(crate) fn is_full(&self) -> bool {
        !self.to_send.is_empty()
    }
}
