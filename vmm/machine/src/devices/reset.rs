//! The i8042 keyboard controller, of which only the reset line is there: how `reboot=k` ends the machine.

use crate::bus::BusDevice;
use std::io;
use vm_superio::{I8042Device, Trigger};
use vmm_sys_util::eventfd::EventFd;

/// First port and how many: data at 0x60, command and status at 0x64.
pub const PORT: u64 = 0x60;
/// See [`PORT`].
pub const PORTS: u64 = 5;

/// Rings an event of ours.
#[derive(Debug)]
pub struct EventTrigger(pub EventFd);

impl Trigger for EventTrigger {
    type E = io::Error;
    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The controller.
pub struct Reset(I8042Device<EventTrigger>);

impl Reset {
    /// Rings `event` when the guest pulls the reset line.
    pub fn new(event: EventFd) -> Self {
        Self(I8042Device::new(EventTrigger(event)))
    }
}

impl BusDevice for Reset {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            *byte = self.0.read(offset);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            // The event's counter cannot overflow by ones within the life of a machine, and there is no one to tell.
            let _ = self.0.write(offset, *byte);
        }
    }
}
