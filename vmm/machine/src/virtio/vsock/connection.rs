//! One stream: its two directions, its credit (virtio 1.2 §5.10.6.3), and what is to be told the
//! guest of it.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use rustix::event::epoll::EventFlags;
use rustix::event::{PollFd, PollFlags, poll};
use vm_memory::GuestMemoryMmap;

use super::packet::{
    Header, OP_CREDIT_UPDATE, OP_REQUEST, OP_RESPONSE, OP_SHUTDOWN, Ports, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE,
    SHUTDOWN_SEND,
};
use crate::virtio::{Buffers, QueueError, guest_io};

/// What the device keeps of the guest's data when the host's reader is slow; the credit that the
/// guest has.
pub(super) const BUFFER_BYTES: u32 = 128 << 10;
/// What is read and thrown away of a host's data that the guest will not have, so that closing the
/// socket does not look like an error to who sent it.
const MAX_DRAIN_BYTES: usize = 1 << 20;

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// A client waits for the guest's answer.
    Connecting,
    /// Bytes flow.
    Established,
    /// The guest is done with it: what it sent still has to reach the host.
    Detached,
}

/// Whether a connection has a future.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It goes on.
    Alive,
    /// Drop it; the guest knows, or is to know nothing.
    Gone,
    /// Drop it, and tell the guest.
    Reset,
}

pub(super) struct Connection {
    pub(super) ports: Ports,
    pub(super) stream: UnixStream,
    pub(super) phase: Phase,
    /// The host's side has something, or has ended: worth a read.
    pub(super) readable: bool,
    /// It is in the mux's queue.
    pub(super) queued: bool,
    /// The events that it is registered for; `None` if it is not registered.
    pub(super) armed: Option<EventFlags>,

    /// The guest's data that the host has not taken yet.
    unsent: VecDeque<u8>,
    /// The guest's bytes that were taken off its credit and gone on to the host, modulo 2³².
    forwarded: u32,
    /// `forwarded` as the guest last heard of it.
    announced: u32,
    /// What the guest shut down.
    guest_shut: u32,
    /// The host gets no more of the guest's data: it ended, or went away.
    host_deaf: bool,

    /// Bytes sent to the guest, modulo 2³².
    sent: u32,
    guest_buf_alloc: u32,
    guest_fwd_cnt: u32,
    /// The host's stream was read to its end.
    host_ended: bool,
    /// Nobody is at the host's end any more.
    hung_up: bool,

    /// Packets to be sent to the guest.
    request_pending: bool,
    response_pending: bool,
    credit_pending: bool,
    shutdown_pending: u32,
}

impl Connection {
    fn new(ports: Ports, stream: UnixStream, phase: Phase) -> Self {
        Self {
            ports,
            stream,
            phase,
            readable: false,
            queued: false,
            armed: None,
            unsent: VecDeque::new(),
            forwarded: 0,
            announced: 0,
            guest_shut: 0,
            host_deaf: false,
            sent: 0,
            guest_buf_alloc: 0,
            guest_fwd_cnt: 0,
            host_ended: false,
            hung_up: false,
            request_pending: false,
            response_pending: false,
            credit_pending: false,
            shutdown_pending: 0,
        }
    }

    /// A client on the host wants to reach the guest.
    pub(super) fn from_host(ports: Ports, stream: UnixStream) -> Self {
        Self { request_pending: true, ..Self::new(ports, stream, Phase::Connecting) }
    }

    /// The guest reached the host with `request`.
    pub(super) fn from_guest(ports: Ports, stream: UnixStream, request: &Header) -> Self {
        Self {
            response_pending: true,
            readable: true,
            guest_buf_alloc: request.buf_alloc,
            guest_fwd_cnt: request.fwd_cnt,
            ..Self::new(ports, stream, Phase::Established)
        }
    }

    // What the guest says.

    /// Every packet tells what the guest can take.
    pub(super) fn update_credit(&mut self, header: &Header) {
        self.guest_buf_alloc = header.buf_alloc;
        self.guest_fwd_cnt = header.fwd_cnt;
    }

    /// The guest accepted.
    pub(super) fn accepted(&mut self) -> Fate {
        if self.phase != Phase::Connecting || self.request_pending {
            return Fate::Reset;
        }
        let line = format!("OK {}\n", self.ports.host);
        // The first bytes fit in the socket.
        match (&self.stream).write_all(line.as_bytes()) {
            Ok(()) => {
                self.phase = Phase::Established;
                self.readable = true;
                Fate::Alive
            }
            Err(_) => Fate::Reset,
        }
    }

    /// The guest sent `data`.
    pub(super) fn receive(&mut self, memory: &GuestMemoryMmap, mut data: Buffers) -> Result<Fate, QueueError> {
        let allowed = self.phase == Phase::Established && self.guest_shut & SHUTDOWN_SEND == 0;
        let len = data.len_bytes();
        if !allowed || len + self.unsent.len() as u64 > u64::from(BUFFER_BYTES) {
            return Ok(Fate::Reset);
        }
        if self.unsent.is_empty() && !self.host_deaf {
            while !data.is_empty() {
                match guest_io::send(self.stream.as_fd(), memory, &data) {
                    Ok(sent) => {
                        data.split_front(sent as u64)?;
                        self.forward(sent);
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(_) => {
                        self.host_stopped_reading();
                        break;
                    }
                }
            }
        }
        if self.host_deaf {
            self.forward(data.len_bytes() as usize);
        } else if !data.is_empty() {
            // At most BUFFER_BYTES.
            let mut rest = vec![0; data.len_bytes() as usize];
            data.read(memory, &mut rest)?;
            self.unsent.extend(rest);
        }
        Ok(Fate::Alive)
    }

    /// The guest will receive or send no more, or both.
    pub(super) fn guest_shutdown(&mut self, flags: u32) -> Fate {
        if self.phase == Phase::Connecting {
            return Fate::Reset;
        }
        self.guest_shut |= flags & SHUTDOWN_BOTH;
        if self.guest_shut & SHUTDOWN_RECEIVE != 0 {
            let _ = self.stream.shutdown(std::net::Shutdown::Read);
            self.readable = false;
        }
        self.end_of_guest_data();
        if self.guest_shut != SHUTDOWN_BOTH {
            Fate::Alive
        } else if self.unsent.is_empty() {
            Fate::Reset
        } else {
            // The guest need not wait for the host's reader: the mux tells it that this is over.
            self.phase = Phase::Detached;
            Fate::Alive
        }
    }

    /// The guest dropped the connection.
    pub(super) fn guest_reset(&mut self) -> Fate {
        if self.phase == Phase::Established && self.guest_shut & SHUTDOWN_SEND != 0 && !self.unsent.is_empty() {
            self.guest_shut = SHUTDOWN_BOTH;
            self.phase = Phase::Detached;
            return Fate::Alive;
        }
        Fate::Gone
    }

    /// The guest asks what the device can take.
    pub(super) fn credit_requested(&mut self) {
        self.credit_pending = true;
    }

    // What the host does.

    /// The stream has events. The reader of [`Self::wants_service`] does the rest.
    pub(super) fn host_event(&mut self, events: EventFlags) -> Fate {
        if events.intersects(EventFlags::HUP | EventFlags::ERR) {
            self.hung_up = true;
            if self.phase == Phase::Connecting {
                return if self.request_pending { Fate::Gone } else { Fate::Reset };
            }
        }
        if events.contains(EventFlags::OUT) || self.hung_up && !self.unsent.is_empty() {
            self.flush();
        }
        if self.phase == Phase::Detached {
            return if self.unsent.is_empty() { Fate::Gone } else { Fate::Alive };
        }
        if events.intersects(EventFlags::IN | EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR) {
            self.readable = self.guest_shut & SHUTDOWN_RECEIVE == 0;
        }
        if self.hung_up && (self.host_ended || self.guest_shut & SHUTDOWN_RECEIVE != 0) {
            // Both directions are over.
            return Fate::Reset;
        }
        Fate::Alive
    }

    /// Sends the host what was left behind.
    fn flush(&mut self) {
        while !self.unsent.is_empty() {
            let (front, _) = self.unsent.as_slices();
            let flags = rustix::net::SendFlags::NOSIGNAL | rustix::net::SendFlags::DONTWAIT;
            match rustix::net::send(&self.stream, front, flags) {
                Ok(sent) => {
                    self.unsent.drain(..sent);
                    self.forward(sent);
                }
                Err(rustix::io::Errno::AGAIN) => return,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => {
                    self.host_stopped_reading();
                    return;
                }
            }
        }
        self.unsent.shrink_to(4096);
        self.end_of_guest_data();
    }

    /// Passes the end of the guest's data on, once all of it went before.
    fn end_of_guest_data(&mut self) {
        if self.guest_shut & SHUTDOWN_SEND != 0 && self.unsent.is_empty() {
            let _ = self.stream.shutdown(std::net::Shutdown::Write);
        }
    }

    fn host_stopped_reading(&mut self) {
        let lost = self.unsent.len();
        self.unsent.clear();
        self.forward(lost);
        self.host_deaf = true;
        if self.guest_shut & SHUTDOWN_SEND == 0 && self.phase == Phase::Established {
            self.shutdown_pending |= SHUTDOWN_RECEIVE;
        }
    }

    /// `len` bytes of the guest's are out of the way: it may send as many more. It is told when
    /// half of what it knows of is used up, so that it never comes to a halt.
    fn forward(&mut self, len: usize) {
        self.forwarded = self.forwarded.wrapping_add(len as u32);
        if self.forwarded.wrapping_sub(self.announced) >= BUFFER_BYTES / 2 {
            self.credit_pending = true;
        }
    }

    // What the mux does for it.

    /// How many bytes the guest can take.
    pub(super) fn credit(&self) -> u32 {
        let in_flight = self.sent.wrapping_sub(self.guest_fwd_cnt);
        self.guest_buf_alloc.saturating_sub(in_flight)
    }

    fn can_read(&self) -> bool {
        self.phase == Phase::Established
            && !self.host_ended
            && self.guest_shut & SHUTDOWN_RECEIVE == 0
            && self.credit() > 0
    }

    /// Whether it has a packet for the guest, or may have.
    pub(super) fn wants_service(&self) -> bool {
        self.request_pending
            || self.response_pending
            || self.credit_pending
            || self.shutdown_pending != 0
            || self.wants_read()
    }

    /// Whether there may be data for the guest.
    pub(super) fn wants_read(&self) -> bool {
        self.readable && self.can_read()
    }

    /// The events to be registered for; `None` for none at all, not even the end.
    pub(super) fn interest(&self) -> Option<EventFlags> {
        let mut events = EventFlags::empty();
        if self.can_read() && !self.queued {
            events |= EventFlags::IN;
        }
        if !self.unsent.is_empty() {
            events |= EventFlags::OUT;
        }
        if events.is_empty() && self.hung_up {
            // It would be reported again and again.
            return None;
        }
        Some(events)
    }

    /// The next packet without data that it has for the guest.
    pub(super) fn next_control(&self) -> Option<(u16, u32)> {
        if self.request_pending {
            Some((OP_REQUEST, 0))
        } else if self.response_pending {
            Some((OP_RESPONSE, 0))
        } else if self.shutdown_pending != 0 {
            Some((OP_SHUTDOWN, self.shutdown_pending))
        } else if self.credit_pending && !self.wants_read() {
            Some((OP_CREDIT_UPDATE, 0))
        } else {
            None
        }
    }

    /// Completes the header of a packet that goes to the guest now.
    pub(super) fn stamp(&mut self, header: &mut Header) {
        header.buf_alloc = BUFFER_BYTES;
        header.fwd_cnt = self.forwarded;
        self.announced = self.forwarded;
        self.credit_pending = false;
        match header.op {
            OP_REQUEST => self.request_pending = false,
            OP_RESPONSE => self.response_pending = false,
            OP_SHUTDOWN => self.shutdown_pending = 0,
            _ => {}
        }
        self.sent = self.sent.wrapping_add(header.len);
    }

    /// Reads from the host into the guest's `data`.
    pub(super) fn read(&mut self, memory: &GuestMemoryMmap, data: &Buffers) -> Read {
        match guest_io::read(self.stream.as_fd(), memory, data) {
            Ok(0) => self.ended(),
            Ok(len) => Read::Data(len as u32),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                Read::Nothing
            }
            Err(_) => self.ended(),
        }
    }

    fn ended(&mut self) -> Read {
        self.host_ended = true;
        self.readable = false;
        // One that only sends no more still listens.
        let mut polled = [PollFd::new(&self.stream, PollFlags::empty())];
        let now = rustix::event::Timespec::default();
        let hung_up =
            poll(&mut polled, Some(&now)).is_ok() && (polled[0].revents()).intersects(PollFlags::HUP | PollFlags::ERR);
        if hung_up {
            self.hung_up = true;
            return Read::Over;
        }
        self.shutdown_pending |= SHUTDOWN_SEND;
        Read::Nothing
    }

    /// Reads what the host still sends, before the stream is closed.
    pub(super) fn drain(&mut self) {
        use io::Read;
        let mut chunk = vec![0; 16 << 10];
        let mut left = MAX_DRAIN_BYTES;
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
        while left > 0 {
            match (&self.stream).read(&mut chunk) {
                Ok(len) if len > 0 => left = left.saturating_sub(len),
                _ => return,
            }
        }
    }
}

/// What came of [`Connection::read`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Read {
    /// So many bytes.
    Data(u32),
    /// No bytes now; or no more at all, which the guest is told by a shutdown.
    Nothing,
    /// The connection is over: everything was read, and nobody is there any more.
    Over,
}
