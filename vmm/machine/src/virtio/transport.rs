//! The MMIO transport (virtio 1.2 §4.2.2, version 2): what the driver sees of one device.
//!
//! Queue addresses and sizes are frozen when the driver says DRIVER_OK, features when it says
//! FEATURES_OK. A driver that breaks the rules of a queue finds DEVICE_NEEDS_RESET in the status,
//! and its device stopped.

mod state;
#[cfg(test)]
mod tests;

use std::os::fd::RawFd;
use std::sync::Arc;

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::interrupt::Interrupt;
use super::queue::Virtqueue;
use super::{DeviceError, Running, VirtioDevice, Work};
use crate::bus::BusDevice;

pub use state::TransportState;

/// How much address space a device takes.
pub const MMIO_SIZE_BYTES: u64 = 0x1000;
/// The register that the driver writes a queue's index to, for `KVM_IOEVENTFD`.
pub const QUEUE_NOTIFY_OFFSET: u64 = 0x50;

/// The most queues of one device.
const MAX_QUEUES: usize = 64;

/// "virt".
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "CSSN": whose devices these are.
const VENDOR: u32 = 0x4e53_5343;
/// The length of a shared memory region that is not there.
const NO_SHARED_MEMORY: u32 = u32::MAX;

const REG_MAGIC: u64 = 0x00;
const REG_VERSION: u64 = 0x04;
const REG_DEVICE_ID: u64 = 0x08;
const REG_VENDOR_ID: u64 = 0x0c;
const REG_DEVICE_FEATURES: u64 = 0x10;
const REG_DEVICE_FEATURES_SEL: u64 = 0x14;
const REG_DRIVER_FEATURES: u64 = 0x20;
const REG_DRIVER_FEATURES_SEL: u64 = 0x24;
const REG_QUEUE_SEL: u64 = 0x30;
const REG_QUEUE_NUM_MAX: u64 = 0x34;
const REG_QUEUE_NUM: u64 = 0x38;
const REG_QUEUE_READY: u64 = 0x44;
const REG_QUEUE_NOTIFY: u64 = QUEUE_NOTIFY_OFFSET;
const REG_INTERRUPT_STATUS: u64 = 0x60;
const REG_INTERRUPT_ACK: u64 = 0x64;
const REG_STATUS: u64 = 0x70;
const REG_QUEUE_DESC_LOW: u64 = 0x80;
const REG_QUEUE_DESC_HIGH: u64 = 0x84;
const REG_QUEUE_DRIVER_LOW: u64 = 0x90;
const REG_QUEUE_DRIVER_HIGH: u64 = 0x94;
const REG_QUEUE_DEVICE_LOW: u64 = 0xa0;
const REG_QUEUE_DEVICE_HIGH: u64 = 0xa4;
const REG_SHM_LEN_LOW: u64 = 0xb0;
const REG_SHM_LEN_HIGH: u64 = 0xb4;
const REG_SHM_BASE_LOW: u64 = 0xb8;
const REG_SHM_BASE_HIGH: u64 = 0xbc;
const REG_CONFIG_GENERATION: u64 = 0xfc;
const REG_CONFIG: u64 = 0x100;

/// Device status (virtio 1.2 §2.1).
pub(crate) mod status {
    pub(crate) const ACKNOWLEDGE: u32 = 1;
    pub(crate) const DRIVER: u32 = 2;
    pub(crate) const DRIVER_OK: u32 = 4;
    pub(crate) const FEATURES_OK: u32 = 8;
    pub(crate) const NEEDS_RESET: u32 = 64;
    pub(crate) const FAILED: u32 = 128;
    /// Before the features are agreed on.
    pub(super) const STARTED: u32 = ACKNOWLEDGE | DRIVER;
    /// All that the driver may set.
    pub(super) const BY_DRIVER: u32 = STARTED | DRIVER_OK | FEATURES_OK | FAILED;
}

/// Features of the transport and the queues (virtio 1.2 §6).
pub(crate) mod feature {
    pub(crate) const INDIRECT_DESC: u64 = 1 << 28;
    pub(crate) const EVENT_IDX: u64 = 1 << 29;
    pub(crate) const VERSION_1: u64 = 1 << 32;
    /// What every device offers.
    pub(super) const COMMON: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1;
}

/// A device cannot be put on the bus, or its state cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// Out of descriptors, as a rule.
    #[error("cannot create an event for a virtqueue")]
    Event(#[source] std::io::Error),
    /// A mistake in a device.
    #[error("virtio device {device_type} has unusable queues")]
    Queues {
        /// The device's type.
        device_type: u32,
    },
    /// A snapshot that is corrupt, or of another machine.
    #[error("the saved state of virtio device {device_type} is not valid: {problem}")]
    State {
        /// The device's type.
        device_type: u32,
        /// What is wrong.
        problem: &'static str,
    },
    /// The device itself.
    #[error("virtio device {device_type} failed")]
    Device {
        /// The device's type.
        device_type: u32,
        /// Why.
        #[source]
        source: DeviceError,
    },
}

/// One device on the bus: its registers, and when it runs.
///
/// It is locked by the vCPU that accesses a register and by the event loop. The event loop waits for
/// each of [`Self::queue_events`] and for [`Self::poll_fd`], and calls [`Self::queue_event`] and
/// [`Self::device_event`].
pub struct MmioTransport {
    device: Box<dyn VirtioDevice>,
    memory: GuestMemoryMmap,
    interrupt: Arc<Interrupt>,
    queue_events: Vec<EventFd>,
    /// The queues while the device is stopped; empty while it has them.
    queues: Vec<Virtqueue>,
    queue_count: usize,
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    /// The device has the queues.
    running: bool,
    /// The machine is paused: the device is stopped, whatever the driver says.
    paused: bool,
}

impl MmioTransport {
    /// Puts `device` on the bus; a write to `interrupt` shall interrupt the guest.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemoryMmap,
        interrupt: EventFd,
    ) -> Result<Self, TransportError> {
        let device_type = device.device_type();
        let queues = new_queues(&*device);
        let queue_count = device.queue_max_sizes().len();
        if queue_count > MAX_QUEUES || queues.len() != queue_count {
            return Err(TransportError::Queues { device_type });
        }
        let queue_events = (0..queue_count)
            .map(|_| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC))
            .collect::<Result<_, _>>()
            .map_err(TransportError::Event)?;
        Ok(Self {
            device,
            memory,
            interrupt: Arc::new(Interrupt::new(interrupt)),
            queue_events,
            queues,
            queue_count,
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            running: false,
            paused: false,
        })
    }

    /// The device's type (virtio 1.2 §5).
    pub fn device_type(&self) -> u32 {
        self.device.device_type()
    }

    /// The event that interrupts the guest, for `KVM_IRQFD`.
    pub fn interrupt_event(&self) -> &EventFd {
        self.interrupt.event()
    }

    /// One event for each queue, for `KVM_IOEVENTFD` at [`QUEUE_NOTIFY_OFFSET`] with the queue's
    /// index as a 32-bit datamatch. A write to the register that KVM does not catch gets here too.
    pub fn queue_events(&self) -> &[EventFd] {
        &self.queue_events
    }

    /// A descriptor that is readable when [`Self::device_event`] is to be called.
    pub fn poll_fd(&self) -> Option<RawFd> {
        self.device.poll_fd()
    }

    /// The event of queue `index` is readable.
    pub fn queue_event(&mut self, index: usize) {
        let Some(event) = self.queue_events.get(index) else {
            return;
        };
        // Non-blocking: if it was not readable after all, a look at the queue costs little.
        let _ = event.read();
        if !self.running {
            return;
        }
        if self.device.queue_notified(index) == Work::More {
            let _ = event.write(1);
        }
        self.stop_if_broken();
    }

    /// The device's own descriptor is readable.
    pub fn device_event(&mut self) {
        self.device.fd_ready();
        self.stop_if_broken();
    }

    /// Stops the device until [`Self::resume`]. The vCPUs have stopped already.
    pub fn pause(&mut self) {
        self.paused = true;
        self.stop_device();
    }

    /// Lets the device go on, after [`Self::pause`] or [`Self::restore`].
    pub fn resume(&mut self) -> Result<(), TransportError> {
        self.paused = false;
        self.start_device().map_err(|source| TransportError::Device { device_type: self.device.device_type(), source })
    }

    fn offered_features(&self) -> u64 {
        self.device.features() | feature::COMMON
    }

    fn stop_if_broken(&mut self) {
        if self.interrupt.is_broken() {
            self.stop_device();
        }
    }

    fn stop_device(&mut self) {
        if self.running {
            self.running = false;
            self.queues = self.device.stop();
        }
    }

    /// Starts the device if the driver, the monitor and the rules all allow it.
    fn start_device(&mut self) -> Result<(), DeviceError> {
        if self.running || self.paused || self.interrupt.is_broken() || self.status & status::DRIVER_OK == 0 {
            return Ok(());
        }
        self.running = true;
        self.device.start(Running {
            queues: std::mem::take(&mut self.queues),
            memory: self.memory.clone(),
            interrupt: Arc::clone(&self.interrupt),
            features: self.driver_features,
        })?;
        // What was notified while the device was stopped, or before it started, is not lost.
        for event in &self.queue_events {
            let _ = event.write(1);
        }
        self.stop_if_broken();
        Ok(())
    }

    fn reset(&mut self) {
        self.stop_device();
        self.device.reset();
        self.interrupt.reset();
        self.queues = new_queues(&*self.device);
        self.status = 0;
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.driver_features = 0;
        self.queue_sel = 0;
    }

    fn write_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let value = value & status::BY_DRIVER;
        if value & status::FAILED != 0 {
            self.status |= status::FAILED;
            return;
        }
        // Bits are only ever added, and each stage needs the one before (virtio 1.2 §3.1.1).
        let added = value & !self.status;
        if added & status::STARTED != 0 {
            self.status |= added & status::STARTED;
        }
        if added & status::FEATURES_OK != 0
            && self.status & status::STARTED == status::STARTED
            && self.features_acceptable(self.driver_features)
        {
            self.status |= status::FEATURES_OK;
        }
        if added & status::DRIVER_OK != 0 && self.status & status::FEATURES_OK != 0 {
            self.driver_ok();
        }
    }

    fn features_acceptable(&self, features: u64) -> bool {
        features & !self.offered_features() == 0 && features & feature::VERSION_1 != 0
    }

    fn driver_ok(&mut self) {
        self.status |= status::DRIVER_OK;
        let event_idx = self.driver_features & feature::EVENT_IDX != 0;
        for queue in &mut self.queues {
            queue.queue_mut().set_event_idx(event_idx);
        }
        if !self.queues_valid() || self.start_device().is_err() {
            self.interrupt.needs_reset();
            self.stop_if_broken();
        }
    }

    fn queues_valid(&self) -> bool {
        self.queues.iter().all(|queue| {
            let queue = queue.queue();
            !queue.ready() || queue.is_valid(&self.memory)
        })
    }

    /// The selected queue, as long as the driver may still set it up.
    fn queue_being_set_up(&mut self) -> Option<&mut Queue> {
        let frozen = self.status & (status::DRIVER_OK | status::FAILED) != 0 || self.status & status::FEATURES_OK == 0;
        if frozen {
            return None;
        }
        let queue = self.queues.get_mut(self.queue_sel as usize)?.queue_mut();
        Some(queue)
    }

    /// The selected queue, if its addresses and its size may be set.
    fn idle_queue(&mut self) -> Option<&mut Queue> {
        self.queue_being_set_up().filter(|queue| !queue.ready())
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            REG_MAGIC => MAGIC,
            REG_VERSION => VERSION,
            REG_DEVICE_ID => self.device.device_type(),
            REG_VENDOR_ID => VENDOR,
            REG_DEVICE_FEATURES => half(self.offered_features(), self.device_features_sel),
            REG_QUEUE_NUM_MAX => {
                self.device.queue_max_sizes().get(self.queue_sel as usize).map_or(0, |size| u32::from(*size))
            }
            REG_QUEUE_READY => {
                let queue = self.queues.get(self.queue_sel as usize);
                u32::from(queue.is_some_and(|queue| queue.queue().ready()))
            }
            REG_INTERRUPT_STATUS => self.interrupt.status(),
            REG_STATUS => {
                let broken = self.interrupt.is_broken();
                self.status | if broken { status::NEEDS_RESET } else { 0 }
            }
            REG_SHM_LEN_LOW | REG_SHM_LEN_HIGH | REG_SHM_BASE_LOW | REG_SHM_BASE_HIGH => NO_SHARED_MEMORY,
            REG_CONFIG_GENERATION => self.interrupt.generation(),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            REG_DEVICE_FEATURES_SEL => self.device_features_sel = value,
            REG_DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            REG_DRIVER_FEATURES => self.write_driver_features(value),
            REG_QUEUE_SEL => self.queue_sel = value,
            REG_QUEUE_NUM => {
                if let Some(queue) = self.idle_queue() {
                    // A size that is no power of two or too great leaves the old one.
                    let _ = u16::try_from(value).map(|size| queue.try_set_size(size));
                }
            }
            REG_QUEUE_READY => {
                if let Some(queue) = self.queue_being_set_up() {
                    queue.set_ready(value & 1 != 0);
                }
            }
            REG_QUEUE_NOTIFY => {
                if let Some(event) = self.queue_events.get(value as usize) {
                    let _ = event.write(1);
                }
            }
            REG_INTERRUPT_ACK => self.interrupt.acknowledge(value),
            REG_STATUS => self.write_status(value),
            _ => self.write_queue_address(offset, value),
        }
    }

    fn write_driver_features(&mut self, value: u32) {
        if self.status & status::FEATURES_OK != 0 {
            return;
        }
        match self.driver_features_sel {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | u64::from(value),
            1 => {
                self.driver_features = self.driver_features & 0xffff_ffff | u64::from(value) << 32;
            }
            _ => {}
        }
    }

    fn write_queue_address(&mut self, offset: u64, value: u32) {
        let Some(queue) = self.idle_queue() else {
            return;
        };
        match offset {
            REG_QUEUE_DESC_LOW => queue.set_desc_table_address(Some(value), None),
            REG_QUEUE_DESC_HIGH => queue.set_desc_table_address(None, Some(value)),
            REG_QUEUE_DRIVER_LOW => queue.set_avail_ring_address(Some(value), None),
            REG_QUEUE_DRIVER_HIGH => queue.set_avail_ring_address(None, Some(value)),
            REG_QUEUE_DEVICE_LOW => queue.set_used_ring_address(Some(value), None),
            REG_QUEUE_DEVICE_HIGH => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(REG_CONFIG) {
            return self.device.read_config(offset, data);
        }
        data.fill(0);
        // Registers are 32 bits wide, and accessed as that (virtio 1.2 §4.2.2.2).
        if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
            *data = self.read_register(offset).to_le_bytes();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(REG_CONFIG) {
            if self.status & status::DRIVER != 0 && !self.interrupt.is_broken() {
                self.device.write_config(offset, data);
                self.stop_if_broken();
            }
            return;
        }
        if let Ok(data) = <[u8; 4]>::try_from(data) {
            self.write_register(offset, u32::from_le_bytes(data));
        }
    }
}

fn new_queues(device: &dyn VirtioDevice) -> Vec<Virtqueue> {
    let sizes = device.queue_max_sizes().iter();
    sizes.filter_map(|size| Queue::new(*size).ok()).map(Virtqueue::new).collect()
}

/// The half of a feature set that a select register names.
fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}
