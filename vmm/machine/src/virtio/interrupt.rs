//! How a device reaches its driver: the interrupt status of the MMIO transport (virtio 1.2
//! §4.2.2) and an event that KVM turns into an interrupt (irqfd).

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use vmm_sys_util::eventfd::EventFd;

/// Bit of the interrupt status: a queue has used buffers.
const USED_BUFFERS: u32 = 1;
/// Bit of the interrupt status: the configuration or the status changed.
const CONFIG_CHANGED: u32 = 2;

/// The interrupt of one device, shared by the device and its transport.
#[derive(Debug)]
pub struct Interrupt {
    status: AtomicU32,
    generation: AtomicU32,
    needs_reset: AtomicBool,
    event: EventFd,
}

impl Interrupt {
    /// An interrupt that is raised by a write to `event`.
    pub fn new(event: EventFd) -> Self {
        Self { status: AtomicU32::new(0), generation: AtomicU32::new(0), needs_reset: AtomicBool::new(false), event }
    }

    /// Tells the driver that a queue has used buffers.
    pub fn used_buffers(&self) {
        self.raise(USED_BUFFERS);
    }

    /// Tells the driver that the configuration space is another now.
    pub fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.raise(CONFIG_CHANGED);
    }

    /// Tells the driver that it broke the protocol, and that only a reset helps. The transport
    /// stops the device.
    pub fn needs_reset(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
        self.raise(CONFIG_CHANGED);
    }

    /// Whether [`Interrupt::needs_reset`] was called since the last reset.
    pub fn is_broken(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    /// The event that raises it, for `KVM_IRQFD`.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    pub(super) fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    pub(super) fn generation(&self) -> u32 {
        self.generation.load(Ordering::SeqCst)
    }

    pub(super) fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    pub(super) fn reset(&self) {
        self.status.store(0, Ordering::SeqCst);
        self.needs_reset.store(false, Ordering::SeqCst);
    }

    /// Sets what a snapshot holds, and raises the interrupt if one was pending.
    pub(super) fn restore(&self, status: u32, generation: u32, needs_reset: bool) {
        self.generation.store(generation, Ordering::SeqCst);
        self.needs_reset.store(needs_reset, Ordering::SeqCst);
        self.status.store(0, Ordering::SeqCst);
        let status = status & (USED_BUFFERS | CONFIG_CHANGED);
        if status != 0 {
            self.raise(status);
        }
    }

    /// A bit that the driver has not acknowledged yet has an interrupt on its way: the driver
    /// acknowledges before it looks at the queues, so a second one would tell it nothing.
    fn raise(&self, bits: u32) {
        let before = self.status.fetch_or(bits, Ordering::SeqCst);
        if before & bits != bits {
            // The counter of an eventfd is full only when nobody reads it: then it is raised.
            let _ = self.event.write(1);
        }
    }
}
