//! The device: features, configuration space, life cycle and queues.

use std::io;
use std::os::fd::{AsFd, RawFd};

use rustix::event::epoll::EventFlags;
use serde::{Deserialize, Serialize};

use super::tap::{HEADER_BYTES, OFFLOAD_CHECKSUM, OFFLOAD_TSO4, OFFLOAD_TSO6, Tap};
use crate::virtio::poller::Poller;
use crate::virtio::{
    Chain, DeviceError, QueueError, Running, VirtioDevice, Virtqueue, Work, guest_io, read_config_bytes,
};

/// virtio 1.2 §5.1.1.
const DEVICE_TYPE: u32 = 1;
const RX: usize = 0;
const TX: usize = 1;
const QUEUE_SIZES: [u16; 2] = [256, 256];

/// Features (virtio 1.2 §5.1.3).
const F_CSUM: u64 = 1 << 0;
const F_GUEST_CSUM: u64 = 1 << 1;
const F_MAC: u64 = 1 << 5;
const F_GUEST_TSO4: u64 = 1 << 7;
const F_GUEST_TSO6: u64 = 1 << 8;
const F_HOST_TSO4: u64 = 1 << 11;
const F_HOST_TSO6: u64 = 1 << 12;
const F_MRG_RXBUF: u64 = 1 << 15;
const F_STATUS: u64 = 1 << 16;

/// The greatest frame with its header: what TCP segmentation makes of 64 KiB, and an Ethernet header
/// with a VLAN tag.
const MAX_PACKET_BYTES: usize = HEADER_BYTES + 18 + 65535;
/// The most packets of one turn of the event loop, in each direction.
const PACKET_BUDGET: usize = 64;

/// A network interface.
pub struct Net {
    tap: Option<Tap>,
    mac: [u8; 6],
    poller: Poller,
    /// The tap is waited for.
    armed: bool,
    running: Option<Running>,
    /// A packet for the driver, `packet_len` bytes of it.
    packet: Vec<u8>,
    packet_len: usize,
    /// The configuration is another than the driver was told: tell it at the start.
    changed: bool,
}

/// What the guest knows of the device.
#[derive(Serialize, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
struct State {
    mac: [u8; 6],
    link_up: bool,
}

impl Net {
    /// An interface with the hardware address `mac`; without a tap it is a stub.
    ///
    /// # Errors
    /// Out of descriptors, as a rule.
    pub fn new(tap: Option<Tap>, mac: [u8; 6]) -> Result<Self, DeviceError> {
        let poller = Poller::new().map_err(|source| host_error("wait for its tap", source))?;
        Ok(Self {
            tap,
            mac,
            poller,
            armed: false,
            running: None,
            packet: vec![0; MAX_PACKET_BYTES],
            packet_len: 0,
            changed: false,
        })
    }

    fn state(&self) -> State {
        State { mac: self.mac, link_up: self.tap.is_some() }
    }

    /// Waits for the tap or not. The driver has no buffers if not.
    fn arm(&mut self, wanted: bool) {
        let Some(tap) = &self.tap else {
            return;
        };
        if wanted == self.armed {
            return;
        }
        if wanted {
            self.armed = self.poller.add(tap, 0, EventFlags::IN).is_ok();
        } else {
            self.poller.remove(tap);
            self.armed = false;
        }
    }

    fn turn(&mut self, action: fn(&mut Self, &mut Running) -> Result<Work, QueueError>) -> Work {
        let Some(mut running) = self.running.take() else {
            return Work::Done;
        };
        let work = action(self, &mut running).unwrap_or_else(|_| {
            running.interrupt.needs_reset();
            Work::Done
        });
        running.interrupt_queue(RX);
        running.interrupt_queue(TX);
        self.running = Some(running);
        work
    }

    /// Gives the driver what the tap has for it.
    fn receive(&mut self, running: &mut Running) -> Result<Work, QueueError> {
        let Some(queue) = running.queues.get_mut(RX) else {
            return Ok(Work::Done);
        };
        let memory = &running.memory;
        let merge = running.features & F_MRG_RXBUF != 0;
        for _ in 0..PACKET_BUDGET {
            let Some(tap) = &self.tap else {
                return Ok(Work::Done);
            };
            if self.packet_len == 0 {
                match rustix::io::read(tap, &mut self.packet[..]) {
                    Ok(len) if len > HEADER_BYTES => self.packet_len = len,
                    Ok(0) => {
                        // No tap has an end: the other side of whatever it is went away.
                        self.arm(false);
                        return Ok(Work::Done);
                    }
                    Ok(_) | Err(rustix::io::Errno::INTR) => continue,
                    Err(rustix::io::Errno::AGAIN) => {
                        self.arm(true);
                        return Ok(Work::Done);
                    }
                    // The interface was taken down or away.
                    Err(_) => {
                        self.arm(false);
                        return Ok(Work::Done);
                    }
                }
            }
            let packet = &mut self.packet[..self.packet_len];
            if !deliver(packet, queue, memory, merge)? {
                // It notifies when it has more buffers, of which it may have made some just now.
                queue.notify_of_more(memory)?;
                if !deliver(packet, queue, memory, merge)? {
                    self.arm(false);
                    return Ok(Work::Done);
                }
            }
            self.packet_len = 0;
        }
        self.arm(true);
        Ok(Work::More)
    }

    /// Gives the tap what the driver has for it.
    fn transmit(&mut self, running: &mut Running) -> Result<Work, QueueError> {
        let Some(queue) = running.queues.get_mut(TX) else {
            return Ok(Work::Done);
        };
        let memory = &running.memory;
        queue.disable_notification(memory)?;
        for _ in 0..PACKET_BUDGET {
            let Some(chain) = queue.pop(memory)? else {
                if queue.enable_notification(memory)? {
                    continue;
                }
                return Ok(Work::Done);
            };
            let len = chain.readable.len_bytes();
            let fits = len > HEADER_BYTES as u64 && len <= MAX_PACKET_BYTES as u64;
            if let Some(tap) = self.tap.as_ref().filter(|_| fits) {
                // A frame that the host does not take is lost, as on any wire.
                let _ = guest_io::write(tap.as_fd(), memory, &chain.readable);
            }
            queue.push(memory, chain.head, 0)?;
        }
        Ok(Work::More)
    }
}

/// Writes `packet` to as many chains as it takes, if `merge`. False if the driver has too few now.
fn deliver(
    packet: &mut [u8],
    queue: &mut Virtqueue,
    memory: &vm_memory::GuestMemoryMmap,
    merge: bool,
) -> Result<bool, QueueError> {
    let mut chains: Vec<Chain> = Vec::new();
    let mut room = 0;
    while room < packet.len() as u64 {
        let Some(chain) = queue.pop(memory)? else {
            for _ in 0..chains.len() {
                queue.undo_pop();
            }
            return Ok(false);
        };
        if chain.writable.len_bytes() < HEADER_BYTES as u64 {
            return Err(QueueError::Short { len: chain.writable.len_bytes(), wanted: HEADER_BYTES as u64 });
        }
        room += chain.writable.len_bytes();
        chains.push(chain);
        if !merge {
            break;
        }
    }
    // num_buffers, the last field of the header; at most 256 as the queue is no longer.
    packet[10..HEADER_BYTES].copy_from_slice(&(chains.len() as u16).to_le_bytes());
    let mut rest = &*packet;
    for chain in chains {
        let len = chain.writable.len_bytes().min(rest.len() as u64) as usize;
        let (part, tail) = rest.split_at(len);
        chain.writable.write(memory, part)?;
        queue.push(memory, chain.head, len as u32)?;
        rest = tail;
    }
    // Without merging, a frame that is greater than the buffer is cut off; the driver said that it
    // takes no such ones.
    Ok(true)
}

fn host_error(action: &str, source: io::Error) -> DeviceError {
    DeviceError::Host { device: "net", action: action.into(), source }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        F_CSUM | F_GUEST_CSUM | F_MAC | F_GUEST_TSO4 | F_GUEST_TSO6 | F_HOST_TSO4 | F_HOST_TSO6 | F_MRG_RXBUF | F_STATUS
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 8];
        config[..6].copy_from_slice(&self.mac);
        config[6] = u8::from(self.tap.is_some()); // VIRTIO_NET_S_LINK_UP
        read_config_bytes(&config, offset, data);
    }

    fn start(&mut self, running: Running) -> Result<(), DeviceError> {
        if let Some(tap) = &self.tap {
            let mut offload = 0;
            if running.features & F_GUEST_CSUM != 0 {
                offload |= OFFLOAD_CHECKSUM;
                if running.features & F_GUEST_TSO4 != 0 {
                    offload |= OFFLOAD_TSO4;
                }
                if running.features & F_GUEST_TSO6 != 0 {
                    offload |= OFFLOAD_TSO6;
                }
            }
            match tap.set_offload(offload) {
                // Not a tap, in tests.
                Err(error) if error.raw_os_error() != Some(libc::ENOTTY) => {
                    self.running = Some(running);
                    return Err(host_error("set the offloads of its tap", error));
                }
                _ => {}
            }
        }
        if std::mem::take(&mut self.changed) {
            running.interrupt.config_changed();
        }
        self.running = Some(running);
        self.arm(true);
        self.poller.enable().map_err(|source| host_error("wait for its tap", source))
    }

    fn stop(&mut self) -> Vec<Virtqueue> {
        self.poller.disable();
        self.running.take().map_or_else(Vec::new, |r| r.queues)
    }

    fn reset(&mut self) {
        self.packet_len = 0;
        self.changed = false;
    }

    fn queue_notified(&mut self, index: usize) -> Work {
        match index {
            RX => self.turn(Self::receive),
            TX => self.turn(Self::transmit),
            _ => Work::Done,
        }
    }

    fn poll_fd(&self) -> Option<RawFd> {
        Some(self.poller.fd())
    }

    fn fd_ready(&mut self) {
        self.poller.take();
        if self.turn(Self::receive) == Work::More {
            self.poller.wake();
        }
    }

    fn save(&self) -> serde_json::Value {
        // A packet that was not delivered is lost, as on any wire.
        serde_json::json!(self.state())
    }

    fn restore(&mut self, state: &serde_json::Value) -> Result<(), DeviceError> {
        let state = State::deserialize(state)
            .map_err(|error| DeviceError::State { device: "net", problem: error.to_string() })?;
        self.packet_len = 0;
        self.changed = state != self.state();
        Ok(())
    }
}
