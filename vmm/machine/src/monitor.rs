//! The machine as a whole: what it is made of, how it is built, run and ended.
//!
//! One thread per vCPU, and the event loop, which runs all devices and listens to the supervisor.

use crate::boot::{self, BootError};
use crate::bus::{Bus, BusError};
use crate::config::MachineConfig;
use crate::control::Statistics;
use crate::devices::reset::{self, Reset};
use crate::devices::serial::{self, Log, SerialPort};
use crate::gate::Gate;
use crate::kvm::vcpu::{Stop, Vcpu, VcpuError};
use crate::kvm::{self, KvmError, Vm, cpuid, failed};
use crate::memory::{self, GuestMemory, MemoryError};
use crate::snapshot::{self, HostCpu, Snapshot, SnapshotError};
use crate::wiring::{Slot, WiringError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Why a machine could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// KVM refused something.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// There is no memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The kernel cannot be booted.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A device cannot be made.
    #[error(transparent)]
    Wiring(#[from] WiringError),
    /// Two devices want one place: a mistake in the machine's layout.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The snapshot cannot be used.
    #[error("cannot restore a snapshot")]
    Snapshot(#[from] SnapshotError),
    /// The serial log cannot be opened.
    #[error("cannot open the serial log {}", path.display())]
    SerialLog {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The host has no more of something.
    #[error("cannot create {what}")]
    Resource {
        /// What was to be created.
        what: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// Turns an I/O error into one that says what was to be created.
pub fn resource(what: &'static str) -> impl Fn(io::Error) -> BuildError {
    move |source| BuildError::Resource { what, source }
}

/// How the machine ended, as its vCPUs tell it.
#[derive(Debug)]
pub enum End {
    /// The guest reset it.
    Reset,
    /// A vCPU cannot go on.
    Error(VcpuError),
}

/// A machine, whose vCPUs are parked until it is started.
pub struct Machine {
    /// KVM's side.
    pub vm: Vm,
    /// The guest's memory.
    pub memory: GuestMemory,
    /// The vCPUs; each is locked by its thread while it runs.
    pub vcpus: Vec<Arc<Mutex<Vcpu>>>,
    /// The virtio devices in their order.
    pub slots: Vec<Slot>,
    /// The serial port.
    pub serial: Arc<Mutex<SerialPort>>,
    /// Where the vCPUs stop.
    pub gate: Arc<Gate>,
    /// Readable when [`Machine::take_end`] gives something.
    pub ended: EventFd,
    /// Readable when the guest pulled the reset line.
    pub reset: EventFd,
    end: Arc<Mutex<Option<End>>>,
    pio: Bus,
    mmio: Bus,
    threads: Vec<JoinHandle<()>>,
}

impl Machine {
    /// Builds the machine and loads the kernel.
    ///
    /// # Errors
    /// Anything that it needs cannot be had.
    pub fn boot(config: &MachineConfig) -> Result<Self, BuildError> {
        let memory = memory::map(config.memory_mib, None)?;
        let slots = crate::wiring::devices(config, &memory)?;
        let log = open_log(config)?;
        let serial = SerialPort::new(event("the serial interrupt")?, log);
        let machine = Self::assemble(config, memory, slots, serial)?;
        let command_line = crate::wiring::command_line(&config.command_line, &machine.slots);
        let entry = boot::load(config, &command_line, &machine.memory)?;
        for vcpu in &machine.vcpus {
            lock(vcpu).prepare_boot(entry.rip)?;
        }
        Ok(machine)
    }

    /// Builds the machine from a snapshot. Its devices are paused, and go on when the event loop starts.
    ///
    /// # Errors
    /// The snapshot cannot be used, or anything that the machine needs cannot be had.
    pub fn restore(config: &MachineConfig, directory: &Path) -> Result<Self, BuildError> {
        let kvm = kvm::open()?;
        let cpu = HostCpu::of(&cpuid::supported(&kvm, config.kvm_kind)?);
        let Snapshot { state, memory } = snapshot::open(directory, config, &cpu)?;
        let memory = memory::map(config.memory_mib, Some(&memory))?;
        let slots = crate::wiring::devices(config, &memory)?;
        let serial = SerialPort::restore(&state.serial, event("the serial interrupt")?, open_log(config)?)
            .map_err(resource("the serial port of the snapshot"))?;
        let machine = Self::assemble(config, memory, slots, serial)?;
        for (vcpu, state) in machine.vcpus.iter().zip(&state.vcpus) {
            lock(vcpu).restore(state)?;
        }
        machine.vm.restore(&state.vm)?;
        crate::wiring::restore(&machine.slots, &state.devices)?;
        Ok(machine)
    }

    /// Puts the parts together, with vCPUs as after a reset.
    fn assemble(
        config: &MachineConfig,
        memory: GuestMemory,
        slots: Vec<Slot>,
        serial: SerialPort,
    ) -> Result<Self, BuildError> {
        let vm = Vm::new(kvm::open()?, config.kvm_kind)?;
        vm.set_memory(&memory)?;
        let (mut pio, mut mmio) = (Bus::default(), Bus::default());
        vm.fd.register_irqfd(serial.interrupt(), serial::IRQ).map_err(failed("connect the serial interrupt"))?;
        let serial = Arc::new(Mutex::new(serial));
        pio.insert(serial::PORT, serial::PORTS, Arc::clone(&serial) as _)?;
        let reset = event("the reset line")?;
        let reset_device = Reset::new(reset.try_clone().map_err(resource("the reset line"))?);
        pio.insert(reset::PORT, reset::PORTS, Arc::new(Mutex::new(reset_device)))?;
        for slot in &slots {
            slot.connect(&vm, &mut mmio)?;
        }
        let common = cpuid::supported(&vm.kvm, vm.kind)?;
        let mut vcpus = Vec::new();
        for id in 0..config.vcpus {
            vcpus.push(Arc::new(Mutex::new(Vcpu::new(&vm, &common, id, config.vcpus, &memory)?)));
        }
        let gate = Arc::new(Gate::new(vcpus.len()));
        Ok(Self {
            vm,
            memory,
            vcpus,
            slots,
            serial,
            gate,
            ended: event("the end event")?,
            reset,
            end: Arc::default(),
            pio,
            mmio,
            threads: Vec::new(),
        })
    }

    /// Starts the vCPUs' threads; each waits at the gate.
    ///
    /// # Errors
    /// The host gives no thread.
    pub fn spawn_threads(&mut self) -> Result<(), BuildError> {
        for vcpu in &self.vcpus {
            let thread = VcpuThread {
                vcpu: Arc::clone(vcpu),
                gate: Arc::clone(&self.gate),
                end: Arc::clone(&self.end),
                ended: self.ended.try_clone().map_err(resource("the end event"))?,
                pio: self.pio.clone(),
                mmio: self.mmio.clone(),
            };
            let name = format!("vcpu{}", lock(vcpu).id);
            let spawned = thread::Builder::new().name(name).spawn(move || thread.run());
            self.threads.push(spawned.map_err(resource("a vCPU's thread"))?);
        }
        Ok(())
    }

    /// What a vCPU ended with.
    pub fn take_end(&self) -> Option<End> {
        lock(&self.end).take()
    }

    /// Stops everything for good: the vCPUs' threads are joined, the devices stopped.
    pub fn finish(&mut self) -> Statistics {
        if !self.threads.is_empty() {
            self.gate.end();
        }
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
        for slot in &self.slots {
            slot.lock().pause();
        }
        lock(&self.serial).flush();
        let mut statistics = Statistics::default();
        for vcpu in &self.vcpus {
            lock(vcpu).add_statistics(&mut statistics);
        }
        statistics
    }
}

/// What a vCPU's thread works with.
struct VcpuThread {
    vcpu: Arc<Mutex<Vcpu>>,
    gate: Arc<Gate>,
    end: Arc<Mutex<Option<End>>>,
    ended: EventFd,
    pio: Bus,
    mmio: Bus,
}

impl VcpuThread {
    fn run(self) {
        self.gate.enter(lock(&self.vcpu).fd.get_kvm_run());
        while self.gate.wait() {
            let end = match lock(&self.vcpu).run(&self.gate, &self.pio, &self.mmio) {
                Stop::Asked => continue,
                Stop::Reset => End::Reset,
                Stop::Error(error) => End::Error(error),
            };
            // The first to end tells why.
            lock(&self.end).get_or_insert(end);
            // The counter of an event cannot overflow by so few.
            let _ = self.ended.write(1);
            return self.gate.retire();
        }
    }
}

fn open_log(config: &MachineConfig) -> Result<Log, BuildError> {
    Log::open(config.serial.as_deref())
        .map_err(|source| BuildError::SerialLog { path: config.serial.clone().unwrap_or_default(), source })
}

fn event(what: &'static str) -> Result<EventFd, BuildError> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(resource(what))
}

/// Locks; what a panicked thread left behind is still the best there is.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
