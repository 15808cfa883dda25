//! The device: features, configuration space, life cycle and queues.

use std::io;
use std::os::fd::RawFd;
use std::path::Path;

use serde::{Deserialize, Serialize};
use virtio_queue::QueueT;
use vm_memory::GuestMemoryMmap;

use super::mux::Mux;
use super::packet::{HEADER_BYTES, Header};
use crate::virtio::{DeviceError, QueueError, Running, VirtioDevice, Virtqueue, Work, read_config_bytes};

/// virtio 1.2 §5.10.1.
const DEVICE_TYPE: u32 = 19;
const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;
const TX_SIZE: u16 = 128;
const QUEUE_SIZES: [u16; 3] = [128, TX_SIZE, 16];

/// Streams (virtio 1.2 §5.10.3).
const F_STREAM: u64 = 1;

/// The event that tells the driver that its connections are no more (virtio 1.2 §5.10.6.7).
const EVENT_TRANSPORT_RESET: u32 = 0;

/// The most packets of the guest in one turn of the event loop.
const PACKET_BUDGET: usize = 128;
/// How many descriptors of the guest's packets are kept until it is interrupted anyway. The driver
/// has far more, so it does not wait for them.
const MAX_HELD_DESCRIPTORS: usize = TX_SIZE as usize / 4;

/// The socket device.
pub struct Vsock {
    guest_cid: u32,
    mux: Mux,
    running: Option<Running>,
    /// Packets of the guest that were taken, and whose buffers were not given back yet.
    held: Vec<u16>,
    held_descriptors: usize,
    /// Packets of the guest were left because too many refusals wait for its buffers.
    blocked: bool,
    reset: Reset,
}

/// How far the driver is told that its connections are no more. Until it knows, it gets no packets:
/// it would take new connections for old ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reset {
    /// It knows all.
    Done,
    /// The event is still to be sent.
    Wanted,
    /// It was sent; the driver gives the buffer back, at an available index other than this one, when it
    /// has handled it.
    Sent(u16),
}

/// What the guest knows of the device.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    guest_cid: u32,
    /// The driver has connections, which are not in the snapshot.
    connections: bool,
}

impl Vsock {
    /// A device for the guest with the context id `guest_cid` (3 or more), whose sockets are in
    /// `directory`. It listens there at once.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn new(guest_cid: u32, directory: &Path) -> Result<Self, DeviceError> {
        let mux = Mux::new(guest_cid, directory).map_err(|source| {
            let action = format!("listen in {}", directory.display());
            host_error(action, source)
        })?;
        Ok(Self {
            guest_cid,
            mux,
            running: None,
            held: Vec::new(),
            held_descriptors: 0,
            blocked: false,
            reset: Reset::Done,
        })
    }

    /// Does something with the queues, and then all that may follow from it.
    fn turn(&mut self, action: impl FnOnce(&mut Self, &mut Running) -> Result<Work, QueueError>) -> Work {
        let Some(mut running) = self.running.take() else {
            return Work::Done;
        };
        let result = action(self, &mut running).and_then(|work| {
            self.send(&mut running)?;
            self.interrupt(&mut running, false)?;
            let unblocked = self.blocked && self.mux.accepts_packets();
            Ok(if unblocked { Work::More } else { work })
        });
        let work = result.unwrap_or_else(|_| {
            running.interrupt.needs_reset();
            Work::Done
        });
        self.running = Some(running);
        work
    }

    /// Sends the driver what there is for it.
    fn send(&mut self, running: &mut Running) -> Result<(), QueueError> {
        self.send_reset(running)?;
        if self.reset == Reset::Done
            && let Some(queue) = running.queues.get_mut(RX)
        {
            self.mux.send_to_guest(&running.memory, queue)?;
        }
        Ok(())
    }

    fn send_reset(&mut self, running: &mut Running) -> Result<(), QueueError> {
        if self.reset == Reset::Done {
            return Ok(());
        }
        let memory = &running.memory;
        let Some(queue) = running.queues.get_mut(EVENT) else {
            return Ok(());
        };
        if !queue.queue().ready() {
            // Such a driver does not want to know.
            self.reset = Reset::Done;
            return Ok(());
        }
        // Before the event is sent: the answer may come at once.
        let available = queue.notify_of_more(memory)?;
        match self.reset {
            Reset::Wanted => {
                if let Some(chain) = queue.pop(memory)? {
                    let event = EVENT_TRANSPORT_RESET.to_le_bytes();
                    chain.writable.write(memory, &event)?;
                    queue.push(memory, chain.head, event.len() as u32)?;
                    self.reset = Reset::Sent(available);
                }
            }
            Reset::Sent(before) if before != available => self.reset = Reset::Done,
            Reset::Sent(_) | Reset::Done => {}
        }
        Ok(())
    }

    /// Takes the driver's packets.
    fn receive(&mut self, running: &mut Running) -> Result<Work, QueueError> {
        let memory = &running.memory;
        let Some(queue) = running.queues.get_mut(TX) else {
            return Ok(Work::Done);
        };
        self.blocked = false;
        queue.disable_notification(memory)?;
        for _ in 0..PACKET_BUDGET {
            if !self.mux.accepts_packets() {
                // It goes on once the driver has buffers for the refusals.
                self.blocked = true;
                return Ok(Work::Done);
            }
            let Some(mut chain) = queue.pop(memory)? else {
                if queue.enable_notification(memory)? {
                    continue;
                }
                return Ok(Work::Done);
            };
            let descriptors = chain.readable.segments().len();
            let mut header = [0; HEADER_BYTES];
            let place = chain.readable.split_front(HEADER_BYTES as u64)?;
            place.read(memory, &mut header)?;
            let header = Header::from_bytes(&header);
            self.mux.guest_packet(memory, &header, chain.readable)?;
            self.held.push(chain.head);
            self.held_descriptors += descriptors;
            if self.held_descriptors > MAX_HELD_DESCRIPTORS {
                give_back(&mut self.held, &mut self.held_descriptors, memory, queue)?;
            }
        }
        Ok(Work::More)
    }

    /// Interrupts the driver if there is something for it; then it gets all at once.
    fn interrupt(&mut self, running: &mut Running, stopping: bool) -> Result<(), QueueError> {
        let memory = &running.memory;
        let mut needed = false;
        for index in [RX, EVENT] {
            let queue = running.queues.get_mut(index);
            needed |= queue.is_some_and(|queue| queue.needs_interrupt(memory));
        }
        if let Some(queue) = running.queues.get_mut(TX) {
            if needed || stopping {
                give_back(&mut self.held, &mut self.held_descriptors, memory, queue)?;
            }
            needed |= queue.needs_interrupt(memory);
        }
        if needed {
            running.interrupt.used_buffers();
        }
        Ok(())
    }
}

/// Gives the driver the buffers back whose packets were taken.
fn give_back(
    held: &mut Vec<u16>,
    descriptors: &mut usize,
    memory: &GuestMemoryMmap,
    queue: &mut Virtqueue,
) -> Result<(), QueueError> {
    *descriptors = 0;
    for head in held.drain(..) {
        queue.push(memory, head, 0)?;
    }
    Ok(())
}

fn host_error(action: String, source: io::Error) -> DeviceError {
    DeviceError::Host { device: "vsock", action, source }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        F_STREAM
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = u64::from(self.guest_cid).to_le_bytes();
        read_config_bytes(&config, offset, data);
    }

    fn start(&mut self, running: Running) -> Result<(), DeviceError> {
        self.running = Some(running);
        self.mux.poller.enable().map_err(|source| host_error("wait for its sockets".into(), source))
    }

    fn stop(&mut self) -> Vec<Virtqueue> {
        // What the host did before it asked for this, such as closing its connections, comes first: a
        // snapshot without connections spares the restored guest the event that they are gone.
        self.fd_ready();
        self.mux.poller.disable();
        let Some(mut running) = self.running.take() else {
            return Vec::new();
        };
        // If the driver broke the queue, it does not miss what was in it.
        if !running.interrupt.is_broken() {
            let _ = self.interrupt(&mut running, true);
        }
        self.held.clear();
        self.held_descriptors = 0;
        running.queues
    }

    fn reset(&mut self) {
        self.mux.clear();
        self.blocked = false;
        self.reset = Reset::Done;
    }

    fn queue_notified(&mut self, index: usize) -> Work {
        self.turn(|device, running| match index {
            // Buffers to receive into may let refused packets be refused, and others be taken.
            RX | TX => device.receive(running),
            _ => Ok(Work::Done),
        })
    }

    fn poll_fd(&self) -> Option<RawFd> {
        Some(self.mux.poller.fd())
    }

    fn fd_ready(&mut self) {
        let work = self.turn(|device, running| {
            device.mux.host_events();
            if device.blocked { device.receive(running) } else { Ok(Work::Done) }
        });
        if work == Work::More {
            self.mux.poller.wake();
        }
    }

    fn save(&self) -> serde_json::Value {
        serde_json::json!(State {
            guest_cid: self.guest_cid,
            connections: !self.mux.is_idle() || self.reset != Reset::Done,
        })
    }

    fn restore(&mut self, state: &serde_json::Value) -> Result<(), DeviceError> {
        let state = State::deserialize(state)
            .map_err(|error| DeviceError::State { device: "vsock", problem: error.to_string() })?;
        self.mux.clear();
        self.reset = if state.connections || state.guest_cid != self.guest_cid { Reset::Wanted } else { Reset::Done };
        Ok(())
    }
}
