//! The virtio devices of a machine: which ones, in which order, at which address and interrupt line.

use crate::boot::layout::VIRTIO;
use crate::bus::{Bus, BusError};
use crate::config::MachineConfig;
use crate::kvm::{KvmError, Vm, failed};
use crate::memory::GuestMemory;
use crate::monitor::lock;
use crate::virtio::block::Block;
use crate::virtio::fs::Fs;
use crate::virtio::net::{Net, Tap};
use crate::virtio::rng::Rng;
use crate::virtio::vsock::Vsock;
use crate::virtio::{
    MMIO_SIZE_BYTES, MmioTransport, QUEUE_NOTIFY_OFFSET, TransportError, TransportState, VirtioDevice,
};
use kvm_ioctls::IoEventAddress;
use std::fmt::Write;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The interrupt lines that devices may have: all of the IO-APIC's but the timer, keyboard, cascade, serial ports, clock
/// and coprocessor of a PC.
const LINES: [u32; crate::config::MAX_DEVICES] = [5, 6, 7, 9, 10, 11, 12, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23];

/// Why a device is not there.
#[derive(Debug, thiserror::Error)]
pub enum WiringError {
    /// It could not be made.
    #[error("cannot make the device {name}")]
    Device {
        /// Its name.
        name: String,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Its transport could not be made, or its state is not valid.
    #[error("cannot set up the device {name}")]
    Transport {
        /// Its name.
        name: String,
        /// The cause.
        #[source]
        source: TransportError,
    },
    /// No event for its interrupt.
    #[error("cannot create an interrupt event")]
    Event(#[source] io::Error),
    /// KVM refused to connect it.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Its place is taken.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// A snapshot has not the state of each device.
    #[error("the snapshot has the state of {saved} devices, the machine has {here}")]
    States {
        /// How many it has.
        saved: usize,
        /// How many there are.
        here: usize,
    },
    /// There are more devices than lines, which a valid configuration has not.
    #[error("there is no interrupt line for the device {name}")]
    TooMany {
        /// The first that has none.
        name: String,
    },
}

/// A device in its place.
pub struct Slot {
    /// For messages: `vsock`, `rng`, `disk0`, ...
    pub name: String,
    /// Guest-physical address of its registers.
    pub address: u64,
    /// Its interrupt line.
    pub line: u32,
    /// The device.
    pub transport: Arc<Mutex<MmioTransport>>,
}

impl Slot {
    /// The device.
    pub fn lock(&self) -> MutexGuard<'_, MmioTransport> {
        lock(&self.transport)
    }

    /// Puts it on the bus, and lets KVM turn its events into interrupts and its notifications into events.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn connect(&self, vm: &Vm, mmio: &mut Bus) -> Result<(), WiringError> {
        mmio.insert(self.address, MMIO_SIZE_BYTES, Arc::clone(&self.transport) as _)?;
        let transport = self.lock();
        vm.fd.register_irqfd(transport.interrupt_event(), self.line).map_err(failed("connect an interrupt"))?;
        for (index, event) in (0u32..).zip(transport.queue_events()) {
            let address = IoEventAddress::Mmio(self.address + QUEUE_NOTIFY_OFFSET);
            vm.fd.register_ioevent(event, &address, index).map_err(failed("connect a queue"))?;
        }
        Ok(())
    }
}

/// Makes all devices of the configuration, in the order that is part of its contract.
///
/// # Errors
/// A device cannot be made; the message names it.
pub fn devices(config: &MachineConfig, memory: &GuestMemory) -> Result<Vec<Slot>, WiringError> {
    let mut slots = Vec::new();
    let mut add = |name: String, device: Box<dyn VirtioDevice>| {
        let index = slots.len();
        let Some(&line) = LINES.get(index) else {
            return Err(WiringError::TooMany { name });
        };
        let interrupt = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(WiringError::Event)?;
        let transport = MmioTransport::new(device, memory.clone(), interrupt)
            .map_err(|source| WiringError::Transport { name: name.clone(), source })?;
        let address = VIRTIO + index as u64 * MMIO_SIZE_BYTES;
        slots.push(Slot { name, address, line, transport: Arc::new(Mutex::new(transport)) });
        Ok(())
    };
    if let Some(vsock) = &config.vsock {
        let name = "vsock".to_owned();
        let device = Vsock::new(vsock.guest_cid, &vsock.directory)
            .map_err(|source| WiringError::Device { name: name.clone(), source: Box::new(source) })?;
        add(name, Box::new(device))?;
    }
    add("rng".into(), Box::new(Rng::new()))?;
    for (index, disk) in config.disks.iter().enumerate() {
        let name = format!("disk{index}");
        let failed = |source| WiringError::Device { name: name.clone(), source };
        let medium = disk.path.as_deref().map(|path| open_medium(path, disk.read_only)).transpose().map_err(failed)?;
        let device = Block::new(medium, disk.read_only).map_err(|e| failed(Box::new(e)))?;
        add(name, Box::new(device))?;
    }
    for (index, net) in config.net.iter().enumerate() {
        let name = format!("net{index}");
        let failed = |source| WiringError::Device { name: name.clone(), source };
        let open = |tap: &str| Tap::open(tap).map_err(|e| format!("cannot open the tap {tap}: {e}").into());
        let tap = net.tap.as_deref().map(open).transpose().map_err(failed)?;
        let device = Net::new(tap, net.mac).map_err(|e| failed(Box::new(e)))?;
        add(name, Box::new(device))?;
    }
    for (index, share) in config.shares.iter().enumerate() {
        let name = format!("share{index}");
        let failed = |source| WiringError::Device { name: name.clone(), source };
        let connect = |path: &Path| {
            UnixStream::connect(path).map_err(|e| format!("cannot connect to {}: {e}", path.display()).into())
        };
        let server = share.socket.as_deref().map(connect).transpose().map_err(failed)?;
        let device = Fs::new(&share.tag, server).map_err(|e| failed(Box::new(e)))?;
        add(name, Box::new(device))?;
    }
    Ok(slots)
}

fn open_medium(path: &Path, read_only: bool) -> Result<File, Box<dyn std::error::Error + Send + Sync>> {
    let file = OpenOptions::new().read(true).write(!read_only).open(path);
    file.map_err(|e| format!("cannot open {}: {e}", path.display()).into())
}

/// Gives the devices the state of a snapshot, in their order.
///
/// # Errors
/// A state is not of its device, or not valid.
pub fn restore(slots: &[Slot], states: &[TransportState]) -> Result<(), WiringError> {
    if slots.len() != states.len() {
        return Err(WiringError::States { saved: states.len(), here: slots.len() });
    }
    for (slot, state) in slots.iter().zip(states) {
        let restored = slot.lock().restore(state);
        restored.map_err(|source| WiringError::Transport { name: slot.name.clone(), source })?;
    }
    Ok(())
}

/// The command line with the devices appended (Documentation/admin-guide/kernel-parameters, `virtio_mmio.device`).
pub fn command_line(base: &str, slots: &[Slot]) -> String {
    let mut line = base.to_owned();
    for slot in slots {
        if !line.is_empty() {
            line.push(' ');
        }
        let kib = MMIO_SIZE_BYTES >> 10;
        // Writing to a string does not fail.
        let _ = write!(line, "virtio_mmio.device={kib}K@{:#x}:{}", slot.address, slot.line);
    }
    line
}
