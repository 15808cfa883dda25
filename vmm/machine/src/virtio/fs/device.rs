//! The device: configuration space, life cycle and queues.
use super::link::{Broken, Link};
use crate::share::{HEADER_BYTES, MAX_FRAME_BYTES, RESPONSE_HEADER_BYTES, has_response};
use crate::virtio::poller::Poller;
use crate::virtio::{
    Buffers, Chain, DeviceError, QueueError, Running, VirtioDevice, Virtqueue, Work, read_config_bytes,
};
use rustix::event::epoll::EventFlags;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use vm_memory::GuestMemoryMmap;

/// virtio 1.2 §5.11.1.
const DEVICE_TYPE: u32 = 26;
/// FORGET and INTERRUPT come by queue 0, everything else by queue 1.
const QUEUE_SIZES: [u16; 2] = [128, 128];
const TAG_BYTES: usize = 36;
/// The most requests of one turn of the event loop.
const REQUEST_BUDGET: usize = 64;
/// As long as so much waits for the server, no more is taken from the driver.
const MAX_UNSENT_BYTES: usize = MAX_FRAME_BYTES;
/// How long a stop waits for the server to answer what it was asked already. Its disk may be slow.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);

/// A share, as the guest sees it.
pub struct Fs {
    tag: String,
    link: Option<Link>,
    poller: Poller,
    /// The socket is waited for to take more.
    waits_to_send: bool,
    running: Option<Running>,
    /// Requests that the server has, or will have, in its order.
    pending: VecDeque<Pending>,
}

/// A request whose response is to come.
struct Pending {
    queue: usize,
    head: u16,
    writable: Buffers,
    unique: [u8; 8],
}

/// What the guest knows of the device.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    tag: String,
}

impl Fs {
    /// A device that is mounted by `tag`, of at most 36 bytes; without a connection to a server it is a stub.
    ///
    /// # Errors
    /// Out of descriptors, as a rule.
    pub fn new(tag: &str, server: Option<UnixStream>) -> Result<Self, DeviceError> {
        let failed = |source| host_error("wait for its server", source);
        let poller = Poller::new().map_err(failed)?;
        let link = server.map(Link::new).transpose().map_err(failed)?;
        if let Some(link) = &link {
            poller.add(link, 0, EventFlags::IN).map_err(failed)?;
        }
        Ok(Self { tag: tag.to_owned(), link, poller, waits_to_send: false, running: None, pending: VecDeque::new() })
    }

    fn turn(&mut self, action: impl FnOnce(&mut Self, &mut Running) -> Result<Work, QueueError>) -> Work {
        let Some(mut running) = self.running.take() else { return Work::Done };
        let work = action(self, &mut running).unwrap_or_else(|_| {
            running.interrupt.needs_reset();
            Work::Done
        });
        running.interrupt_queue(0);
        running.interrupt_queue(1);
        self.running = Some(running);
        work
    }

    /// Takes the driver's requests and passes them on.
    fn take(&mut self, running: &mut Running, index: usize) -> Result<Work, QueueError> {
        let memory = running.memory.clone();
        let Some(queue) = running.queues.get_mut(index) else { return Ok(Work::Done) };
        queue.disable_notification(&memory)?;
        let mut work = Work::More;
        let mut blocked = false;
        for _ in 0..REQUEST_BUDGET {
            if self.link.as_ref().is_some_and(|link| link.unsent() > MAX_UNSENT_BYTES) {
                // Goes on when the server has taken some.
                blocked = true;
                break;
            }
            let Some(chain) = queue.pop(&memory)? else {
                if queue.enable_notification(&memory)? {
                    continue;
                }
                work = Work::Done;
                break;
            };
            self.pass(chain, index, queue, &memory)?;
        }
        if self.flush().is_err() {
            self.give_up(running)?;
        }
        // The socket is waited for if it did not take all: then it says when to go on.
        Ok(if blocked && self.waits_to_send { Work::Done } else { work })
    }

    /// Puts one request on its way to the server; what cannot be passed is answered here.
    fn pass(
        &mut self,
        chain: Chain,
        index: usize,
        queue: &mut Virtqueue,
        memory: &GuestMemoryMmap,
    ) -> Result<(), QueueError> {
        let len = chain.readable.len_bytes();
        let mut header = [0; HEADER_BYTES];
        if len < HEADER_BYTES as u64 {
            return queue.push(memory, chain.head, 0);
        }
        chain.readable.read(memory, &mut header)?;
        let code = u32::from_le_bytes([header[4], header[5], header[6], header[7]]);
        let mut unique = [0; 8];
        unique.copy_from_slice(&header[8..16]);
        let pending = Pending { queue: index, head: chain.head, writable: chain.writable, unique };
        let Some(link) = &mut self.link else { return pending.fail(queue, memory, libc::ENOTCONN) };
        let Some(len) = usize::try_from(len).ok().filter(|len| *len <= MAX_FRAME_BYTES) else {
            return pending.fail(queue, memory, libc::EINVAL);
        };
        link.request(len, |bytes| {
            chain.readable.read(memory, bytes)?;
            // The guest may have changed it since: what was looked at is what the server gets.
            bytes[..HEADER_BYTES].copy_from_slice(&header);
            Ok(())
        })?;
        if has_response(code) {
            self.pending.push_back(pending);
            return Ok(());
        }
        queue.push(memory, chain.head, 0)
    }

    /// Sends what can be sent, and waits for the socket if that was not all.
    fn flush(&mut self) -> Result<(), Broken> {
        let Some(link) = &mut self.link else { return Ok(()) };
        link.flush()?;
        let waits = link.unsent() > 0;
        if waits != self.waits_to_send {
            let events = if waits { EventFlags::IN | EventFlags::OUT } else { EventFlags::IN };
            self.poller.modify(&*link, 0, events).map_err(|_| Broken)?;
            self.waits_to_send = waits;
        }
        Ok(())
    }

    /// Gives the driver what the server has answered.
    fn answer(&mut self, running: &mut Running) -> Result<(), QueueError> {
        while let Some(link) = &mut self.link {
            let response = match link.response() {
                Ok(Some(response)) => response,
                Ok(None) => return Ok(()),
                Err(Broken) => return self.give_up(running),
            };
            // A response to nothing: the server is not one.
            let Some(pending) = self.pending.pop_front() else { return self.give_up(running) };
            let Some(queue) = running.queues.get_mut(pending.queue) else { continue };
            if response[8..16] != pending.unique {
                pending.fail(queue, &running.memory, libc::EIO)?;
                return self.give_up(running);
            }
            pending.answer(queue, &running.memory, response)?;
        }
        Ok(())
    }

    /// The server is gone: all that it was asked fails, and all that it would be.
    fn give_up(&mut self, running: &mut Running) -> Result<(), QueueError> {
        if let Some(link) = self.link.take() {
            self.poller.remove(&link);
            self.waits_to_send = false;
        }
        for pending in std::mem::take(&mut self.pending) {
            if let Some(queue) = running.queues.get_mut(pending.queue) {
                pending.fail(queue, &running.memory, libc::EIO)?;
            }
        }
        Ok(())
    }

    /// Waits for the server to answer what it was asked.
    fn drain(&mut self, running: &mut Running) -> Result<(), QueueError> {
        let deadline = Instant::now() + STOP_TIMEOUT;
        while !self.pending.is_empty() {
            self.answer(running)?;
            if self.pending.is_empty() {
                break;
            }
            let Some(link) = &mut self.link else { break };
            let gone_on = link.flush().and_then(|()| link.wait(link.unsent() > 0, deadline));
            if gone_on.is_err() {
                self.give_up(running)?;
            }
        }
        Ok(())
    }
}

impl Pending {
    fn answer(self, queue: &mut Virtqueue, memory: &GuestMemoryMmap, response: &[u8]) -> Result<(), QueueError> {
        if response.len() as u64 > self.writable.len_bytes() {
            return self.fail(queue, memory, libc::EIO);
        }
        self.writable.write(memory, response)?;
        queue.push(memory, self.head, response.len() as u32)
    }

    /// Answers with an error (`struct fuse_out_header`), if there is room for one.
    fn fail(self, queue: &mut Virtqueue, memory: &GuestMemoryMmap, error: i32) -> Result<(), QueueError> {
        if self.writable.len_bytes() < RESPONSE_HEADER_BYTES as u64 {
            return queue.push(memory, self.head, 0);
        }
        let mut response = [0; RESPONSE_HEADER_BYTES];
        response[..4].copy_from_slice(&(RESPONSE_HEADER_BYTES as u32).to_le_bytes());
        response[4..8].copy_from_slice(&(-error).to_le_bytes());
        response[8..].copy_from_slice(&self.unique);
        self.writable.write(memory, &response)?;
        queue.push(memory, self.head, RESPONSE_HEADER_BYTES as u32)
    }
}

fn host_error(action: &str, source: io::Error) -> DeviceError {
    DeviceError::Host { device: "fs", action: action.into(), source }
}

impl VirtioDevice for Fs {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; TAG_BYTES + 4];
        let len = self.tag.len().min(TAG_BYTES);
        config[..len].copy_from_slice(&self.tag.as_bytes()[..len]);
        config[TAG_BYTES] = 1; // num_request_queues
        read_config_bytes(&config, offset, data);
    }

    fn start(&mut self, running: Running) -> Result<(), DeviceError> {
        self.running = Some(running);
        self.poller.enable().map_err(|source| host_error("wait for its server", source))
    }

    fn stop(&mut self) -> Vec<Virtqueue> {
        self.turn(|device, running| device.drain(running).map(|()| Work::Done));
        self.poller.disable();
        self.pending.clear();
        self.running.take().map_or_else(Vec::new, |running| running.queues)
    }

    fn queue_notified(&mut self, index: usize) -> Work {
        self.turn(|device, running| device.take(running, index))
    }

    fn poll_fd(&self) -> Option<RawFd> {
        Some(self.poller.fd())
    }

    fn fd_ready(&mut self) {
        self.poller.take();
        self.turn(|device, running| {
            device.answer(running)?;
            // There may be room for what was left in the queues, also when the socket has just taken all and the
            // device woke itself.
            let mut more = false;
            for index in 0..QUEUE_SIZES.len() {
                more |= device.take(running, index)? == Work::More;
            }
            if more {
                device.poller.wake();
            }
            Ok(Work::Done)
        });
    }

    fn save(&self) -> serde_json::Value {
        serde_json::json!(State { tag: self.tag.clone() })
    }

    fn restore(&mut self, state: &serde_json::Value) -> Result<(), DeviceError> {
        let failed = |problem| DeviceError::State { device: "fs", problem };
        let state = State::deserialize(state).map_err(|error| failed(error.to_string()))?;
        if state.tag != self.tag {
            return Err(failed(format!("it is that of the share {:?}, not {:?}", state.tag, self.tag)));
        }
        Ok(())
    }
}
