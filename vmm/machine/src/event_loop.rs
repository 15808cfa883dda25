//! The event loop: one thread that runs all devices and answers the supervisor, until the machine ends.

use crate::config::MachineConfig;
use crate::control::{EndReason, Event, LineReader, Reply, Request, cut, write_line};
use crate::monitor::{End, Machine, lock};
use crate::snapshot::{self, Target};
use serde::Serialize;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::net::UnixStream;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Tokens of the loop's own events; devices come from `FIRST_DEVICE` on, with their index shifted and the queue below.
const CONTROL: u64 = 0;
const RESET: u64 = 1;
const ENDED: u64 = 2;
const FIRST_DEVICE: u64 = 1 << 16;
/// The low half of a token: a queue's index, or this for the device's own descriptor.
const OWN: u64 = 0xff;
/// How many events are fetched at once.
const BATCH: usize = 32;

/// How the loop ended.
#[derive(Debug)]
pub enum Outcome {
    /// The machine ended, and the supervisor is to be told.
    Ended(EndReason, String),
    /// The supervisor is gone.
    Orphaned,
}

/// How many descriptors may come with requests that were not answered yet: a snapshot's two files.
const MAX_FILES: usize = 2;

/// The receiving side of the control channel: bytes, and the files that come with them.
#[derive(Debug)]
struct Receiver {
    stream: UnixStream,
    files: VecDeque<File>,
}

impl Read for Receiver {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut fds = [-1; MAX_FILES];
        let mut parts = [libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() }];
        // SAFETY: the one part is the buffer, which is borrowed until the call returns; any bytes may be in it.
        let received = unsafe { self.stream.recv_with_fds(&mut parts, &mut fds) };
        let (len, count) = received.map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
        for &fd in &fds[..count.min(MAX_FILES)] {
            // SAFETY: the kernel just made this descriptor for us.
            self.files.push_back(unsafe { File::from_raw_fd(fd) });
        }
        while self.files.len() > MAX_FILES {
            self.files.pop_front();
        }
        Ok(len)
    }
}

/// The control channel.
#[derive(Debug)]
pub struct Control {
    lines: LineReader<Receiver>,
}

impl Control {
    /// Speaks over `stream`.
    pub fn new(stream: UnixStream) -> Self {
        Self { lines: LineReader::new(Receiver { stream, files: VecDeque::new() }) }
    }

    fn stream(&self) -> &UnixStream {
        &self.lines.get_ref().stream
    }

    /// The two files that came with a request.
    fn target(&mut self) -> Option<Target> {
        let files = &mut self.lines.get_mut().files;
        let (state, memory) = (files.pop_front()?, files.pop_front()?);
        Some(Target { state, memory })
    }

    /// Sends a message. False if the supervisor is gone or does not listen.
    pub fn send<T: Serialize>(&self, message: &T) -> bool {
        write_line(self.stream(), message).is_ok()
    }

    /// The next request, if a whole line of one is there. `Err` if the supervisor is gone or makes no sense.
    fn next(&mut self) -> Result<Option<Request>, ()> {
        match self.lines.next_line() {
            Ok(Some(line)) => serde_json::from_slice(&line).map(Some).map_err(drop),
            Ok(None) => Err(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(_) => Err(()),
        }
    }
}

/// Runs the machine until it ends.
///
/// # Errors
/// The host's event queue fails.
pub fn run(machine: &mut Machine, config: &MachineConfig, control: &mut Control) -> io::Result<Outcome> {
    control.stream().set_nonblocking(true)?;
    let epoll = Epoll::new()?;
    let watch = |fd: RawFd, token| epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, token));
    watch(control.stream().as_raw_fd(), CONTROL)?;
    watch(machine.reset.as_raw_fd(), RESET)?;
    watch(machine.ended.as_raw_fd(), ENDED)?;
    for (slot, base) in machine.slots.iter().zip((FIRST_DEVICE..).step_by(1 << 8)) {
        let transport = slot.lock();
        for (event, queue) in transport.queue_events().iter().zip(0..) {
            watch(event.as_raw_fd(), base | queue)?;
        }
        if let Some(fd) = transport.poll_fd() {
            watch(fd, base | OWN)?;
        }
    }
    for slot in &machine.slots {
        // Those of a restored machine are paused.
        slot.lock().resume().map_err(io::Error::other)?;
    }
    machine.gate.release();
    let mut paused = false;
    let mut events = [EpollEvent::default(); BATCH];
    loop {
        let count = match epoll.wait(-1, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        for event in &events[..count] {
            match event.data() {
                CONTROL => loop {
                    match control.next() {
                        Ok(Some(request)) => {
                            if let Some(outcome) = answer(machine, config, control, &request, &mut paused) {
                                return Ok(outcome);
                            }
                        }
                        Ok(None) => break,
                        Err(()) => return Ok(Outcome::Orphaned),
                    }
                },
                RESET => return Ok(Outcome::Ended(EndReason::Reset, String::new())),
                ENDED => match machine.take_end() {
                    Some(End::Reset) => return Ok(Outcome::Ended(EndReason::Reset, String::new())),
                    Some(End::Error(error)) => return Ok(Outcome::Ended(EndReason::Error, chain(&error))),
                    None => {}
                },
                token => device_event(machine, token),
            }
        }
    }
}

fn device_event(machine: &Machine, token: u64) {
    let token = token - FIRST_DEVICE;
    let slot = usize::try_from(token >> 8).ok().and_then(|index| machine.slots.get(index));
    if let Some(slot) = slot {
        match token & 0xff {
            OWN => slot.lock().device_event(),
            queue => slot.lock().queue_event(queue as usize),
        }
    }
}

/// Does what the supervisor asks for.
fn answer(
    machine: &mut Machine,
    config: &MachineConfig,
    control: &mut Control,
    request: &Request,
    paused: &mut bool,
) -> Option<Outcome> {
    let result = match request {
        Request::Pause => {
            if !*paused {
                pause(machine);
                *paused = true;
            }
            Ok(())
        }
        Request::Resume if *paused => resume(machine).map(|()| *paused = false),
        Request::Resume => Ok(()),
        Request::Snapshot { .. } if !*paused => Err("the machine runs: pause it first".to_owned()),
        Request::Snapshot { .. } => match control.target() {
            Some(target) => snapshot::save(machine, config, target).map_err(|error| chain(&error)),
            None => Err("the request came without its two files".to_owned()),
        },
        Request::Quit => {
            control.send(&Reply::Done);
            return Some(Outcome::Ended(EndReason::Shutdown, String::new()));
        }
    };
    let reply = match result {
        Ok(()) => Reply::Done,
        Err(message) => Reply::error(&message),
    };
    (!control.send(&reply)).then_some(Outcome::Orphaned)
}

/// First the vCPUs, then the devices, so that no device is started any more.
fn pause(machine: &Machine) {
    machine.gate.close();
    for slot in &machine.slots {
        slot.lock().pause();
    }
    lock(&machine.serial).flush();
}

fn resume(machine: &Machine) -> Result<(), String> {
    for slot in &machine.slots {
        slot.lock().resume().map_err(|error| chain(&error))?;
    }
    for vcpu in &machine.vcpus {
        // So that a watchdog of the guest does not bark; a guest without kvmclock has none of it.
        let _ = lock(vcpu).fd.kvmclock_ctrl();
    }
    machine.gate.release();
    Ok(())
}

/// The event that tells of the end.
pub fn ended(reason: EndReason, message: &str, statistics: crate::control::Statistics) -> Event {
    Event::Ended { reason, message: cut(message), statistics }
}

/// An error with its causes on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
