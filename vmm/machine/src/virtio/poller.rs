//! A changing set of descriptors behind a single one: an epoll instance in another.
//!
//! While its device is stopped, the inner instance is not in the outer one, and so the outer one
//! is never ready, whatever happens on the host.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use vmm_sys_util::eventfd::EventFd;

/// The most events that are taken at once.
const BATCH: usize = 32;
/// The token of [`Poller::wake`].
const WAKE: u64 = u64::MAX;

/// The set, and a way to wake oneself.
pub(super) struct Poller {
    outer: OwnedFd,
    inner: OwnedFd,
    wake: EventFd,
    enabled: bool,
}

impl Poller {
    /// An empty set, disabled.
    pub(super) fn new() -> io::Result<Self> {
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let poller = Self {
            outer: epoll::create(CreateFlags::CLOEXEC)?,
            inner: epoll::create(CreateFlags::CLOEXEC)?,
            wake,
            enabled: false,
        };
        let wake = fd_of(&poller.wake);
        epoll::add(&poller.inner, wake, EventData::new_u64(WAKE), EventFlags::IN)?;
        Ok(poller)
    }

    /// The one descriptor, readable if any of the set is ready and the set is enabled.
    pub(super) fn fd(&self) -> RawFd {
        self.outer.as_raw_fd()
    }

    pub(super) fn enable(&mut self) -> io::Result<()> {
        if !self.enabled {
            epoll::add(&self.outer, &self.inner, EventData::new_u64(0), EventFlags::IN)?;
            self.enabled = true;
        }
        Ok(())
    }

    pub(super) fn disable(&mut self) {
        if self.enabled {
            // It is there, so it can be taken out.
            let _ = epoll::delete(&self.outer, &self.inner);
            self.enabled = false;
        }
    }

    /// Makes the set ready once, though nothing happened on any of its descriptors.
    pub(super) fn wake(&self) {
        let _ = self.wake.write(1);
    }

    pub(super) fn add(&self, fd: impl AsFd, token: u64, events: EventFlags) -> io::Result<()> {
        Ok(epoll::add(&self.inner, fd, EventData::new_u64(token), events)?)
    }

    pub(super) fn modify(&self, fd: impl AsFd, token: u64, events: EventFlags) -> io::Result<()> {
        Ok(epoll::modify(&self.inner, fd, EventData::new_u64(token), events)?)
    }

    pub(super) fn remove(&self, fd: impl AsFd) {
        let _ = epoll::delete(&self.inner, fd);
    }

    /// Takes what is ready: tokens and events. Does not wait.
    pub(super) fn take(&self) -> Vec<(u64, EventFlags)> {
        let mut events = Vec::<Event>::with_capacity(BATCH);
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        // It fails if a signal comes, and then is ready still.
        let spare = rustix::buffer::spare_capacity(&mut events);
        if epoll::wait(&self.inner, spare, Some(&now)).is_err() {
            return Vec::new();
        }
        let mut ready = Vec::with_capacity(events.len());
        for event in events {
            let token = event.data.u64();
            if token == WAKE {
                let _ = self.wake.read();
            } else {
                ready.push((token, event.flags));
            }
        }
        ready
    }
}

/// `EventFd` knows its raw descriptor only.
#[allow(unsafe_code)]
fn fd_of(event: &EventFd) -> std::os::fd::BorrowedFd<'_> {
    // SAFETY: the event is borrowed as long as the descriptor is, and holds it open.
    unsafe { std::os::fd::BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
