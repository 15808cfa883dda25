//! The virtual devices: virtio 1.2 over MMIO (§4.2), split virtqueues (§2.7).
//!
//! A device is a struct that owns its queues while it runs:
//!
//! ```text
//!            new ──► stopped ──start(queues)──► running ──┐
//!                      ▲  │                       │  ▲    │ queue_notified, fd_ready
//!          restore ────┘  └──reset──► stopped     │  └────┘
//!                      ▲                          │
//!                      └──────stop() -> queues────┘
//! ```
//!
//! A reset by the driver, a pause and a snapshot all go through `stop`. The one who calls is
//! [`MmioTransport`], which keeps what the driver sees of a device: status, features, queue
//! addresses, interrupt status. All devices run on the thread of the event loop.

pub mod block;
pub mod fs;
mod guest_io;
mod interrupt;
pub mod net;
mod poller;
mod queue;
pub mod rng;
mod transport;
pub mod vsock;

#[cfg(test)]
pub(crate) mod testing;

use std::os::fd::RawFd;
use std::sync::Arc;

use vm_memory::GuestMemoryMmap;

pub use interrupt::Interrupt;
pub use queue::{Buffers, Chain, QueueError, Segment, Virtqueue};
pub use transport::{MMIO_SIZE_BYTES, MmioTransport, QUEUE_NOTIFY_OFFSET, TransportError, TransportState};

/// What a device gets when its driver is ready, and keeps until [`VirtioDevice::stop`].
pub struct Running {
    /// All queues of the device, in order. One that the driver did not enable yields nothing.
    pub queues: Vec<Virtqueue>,
    /// The guest's memory.
    pub memory: GuestMemoryMmap,
    /// How to tell the driver something.
    pub interrupt: Arc<Interrupt>,
    /// The features that both sides agreed on.
    pub features: u64,
}

impl Running {
    /// Interrupts the driver if queue `index` has used buffers that it wants to hear of.
    pub fn interrupt_queue(&mut self, index: usize) {
        if let Some(queue) = self.queues.get_mut(index)
            && queue.needs_interrupt(&self.memory)
        {
            self.interrupt.used_buffers();
        }
    }
}

/// Whether a device has work left that nothing will wake it for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// All done; the driver or a descriptor will call again.
    Done,
    /// The budget of one call was spent: call `queue_notified` again soon.
    More,
}

/// A device cannot do what the monitor asked of it.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The saved state is not one that this device could have had.
    #[error("the saved state of the {device} device is not valid: {problem}")]
    State {
        /// Which device.
        device: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// Something that the device stands on failed on the host.
    #[error("the {device} device cannot {action}")]
    Host {
        /// Which device.
        device: &'static str,
        /// What it tried.
        action: String,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
}

/// One virtio device, apart from how the driver reaches it.
pub trait VirtioDevice: Send {
    /// The device's type (virtio 1.2 §5).
    fn device_type(&self) -> u32;

    /// The device's own features; the transport adds those of the transport and of the queues.
    fn features(&self) -> u64;

    /// The greatest size of each queue, and so their number. Powers of two.
    fn queue_max_sizes(&self) -> &[u16];

    /// Reads the configuration space at `offset`; what lies past its end reads as zeroes.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the configuration space. Most devices have nothing to write.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The driver is ready (or the machine goes on): take the queues and work. Each queue is
    /// notified once after this, so nothing that lies there already needs to be looked for.
    fn start(&mut self, running: Running) -> Result<(), DeviceError>;

    /// Gives the queues back, with no buffer in flight; a stopped device gives none. While it is
    /// stopped, [`VirtioDevice::poll_fd`] is never ready.
    fn stop(&mut self) -> Vec<Virtqueue>;

    /// Forgets all that the driver ever did: the driver reset the (stopped) device.
    fn reset(&mut self) {}

    /// The driver put buffers into the queue `index`.
    fn queue_notified(&mut self, index: usize) -> Work;

    /// A descriptor (an epoll instance as a rule) that is readable when the device has work from
    /// the host. It stays the same for the device's life.
    fn poll_fd(&self) -> Option<RawFd> {
        None
    }

    /// [`VirtioDevice::poll_fd`] is readable.
    fn fd_ready(&mut self) {}

    /// The state of the stopped device, as far as the guest can tell it.
    fn save(&self) -> serde_json::Value {
        serde_json::Value::Null
    }

    /// Takes over a state that [`VirtioDevice::save`] gave, perhaps in another process and with
    /// another medium behind the device. It may be corrupt.
    fn restore(&mut self, _state: &serde_json::Value) -> Result<(), DeviceError> {
        Ok(())
    }
}

/// Copies what `config` holds at `offset` to `data`, and zeroes where it holds nothing.
pub(crate) fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let Ok(offset) = usize::try_from(offset) else {
        return;
    };
    if let Some(tail) = config.get(offset..) {
        let len = tail.len().min(data.len());
        data[..len].copy_from_slice(&tail[..len]);
    }
}
