//! One virtual CPU: its set-up, and the loop around `KVM_RUN` that answers its exits.

use super::cpuid;
use super::msr::{self, Msr};
use super::{KvmError, Vm, failed};
use crate::assist::{Assist, AssistError};
use crate::boot::entry;
use crate::bus::Bus;
use crate::config::KvmKind;
use crate::control::Statistics;
use crate::gate::Gate;
use crate::memory::GuestMemory;
use kvm_bindings::{CpuId, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::{VcpuExit, VcpuFd};
use std::io;
use std::time::Instant;

/// Why a vCPU cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// `KVM_RUN` failed.
    #[error("vCPU {id}: KVM_RUN failed at RIP {rip:#x}")]
    Run {
        /// Which vCPU.
        id: u8,
        /// Where it stands.
        rip: u64,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// An exit that has no answer.
    #[error("vCPU {id}: {what} at RIP {rip:#x}")]
    Exit {
        /// Which vCPU.
        id: u8,
        /// Where it stands.
        rip: u64,
        /// What happened.
        what: String,
    },
    /// An instruction could not be supplied.
    #[error("vCPU {id}")]
    Assist {
        /// Which vCPU.
        id: u8,
        /// The cause.
        #[source]
        source: AssistError,
    },
}

/// Why a vCPU stopped.
#[derive(Debug)]
pub enum Stop {
    /// The gate asks for it.
    Asked,
    /// The guest reset or powered off the machine.
    Reset,
    /// It cannot go on.
    Error(VcpuError),
}

/// Kinds of exits that are counted.
#[derive(Debug, Clone, Copy)]
enum Kind {
    IoIn,
    IoOut,
    MmioRead,
    MmioWrite,
    Assist,
    Interrupted,
    Other,
}

const KIND_NAMES: [&str; 7] = ["io-in", "io-out", "mmio-read", "mmio-write", "assist", "interrupted", "other"];

/// One virtual CPU.
#[derive(Debug)]
pub struct Vcpu {
    /// The number, which is its APIC id.
    pub id: u8,
    /// KVM's side of it.
    pub fd: VcpuFd,
    /// MSRs that KVM refused to set.
    pub refused_msrs: Vec<Msr>,
    memory: GuestMemory,
    assist: Option<Assist>,
    exits: [u64; KIND_NAMES.len()],
    run_ns: u64,
    host_ns: u64,
}

impl Vcpu {
    /// Creates vCPU `id` of `count` as it is after a reset.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn new(vm: &Vm, common: &CpuId, id: u8, count: u8, memory: &GuestMemory) -> Result<Self, KvmError> {
        let fd = vm.fd.create_vcpu(id.into()).map_err(failed("create a vCPU"))?;
        fd.set_cpuid2(&cpuid::for_vcpu(common, id, count)).map_err(failed("set CPUID"))?;
        let assist = (vm.kind == KvmKind::Software).then(Assist::default);
        Ok(Self {
            id,
            fd,
            refused_msrs: Vec::new(),
            memory: memory.clone(),
            assist,
            exits: [0; KIND_NAMES.len()],
            run_ns: 0,
            host_ns: 0,
        })
    }

    /// Prepares it for a boot: vCPU 0 to enter the kernel at `rip` in long mode, the others to wait for INIT and SIPI.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn prepare_boot(&mut self, rip: u64) -> Result<(), KvmError> {
        self.refused_msrs = msr::set(&self.fd, &msr::at_boot())?;
        self.connect_local_interrupts()?;
        if self.id == 0 {
            let mut sregs = self.fd.get_sregs().map_err(failed("read special registers"))?;
            entry::set_long_mode(&mut sregs);
            self.fd.set_sregs(&sregs).map_err(failed("set special registers"))?;
            self.fd.set_regs(&entry::registers(rip)).map_err(failed("set registers"))?;
        }
        Ok(())
    }

    /// LINT0 takes interrupts from the 8259, LINT1 is NMI, as the MP table says.
    fn connect_local_interrupts(&self) -> Result<(), KvmError> {
        /// Offsets of the two registers, and the delivery modes in bits 8 to 10 (Intel SDM volume 3, 11.5.1).
        const LINT0: usize = 0x350;
        const LINT1: usize = 0x360;
        const EXT_INT: u32 = 7 << 8;
        const NMI: u32 = 4 << 8;
        let mut lapic = self.fd.get_lapic().map_err(failed("read a local APIC"))?;
        for (offset, mode) in [(LINT0, EXT_INT), (LINT1, NMI)] {
            for (register, byte) in lapic.regs[offset..offset + 4].iter_mut().zip(mode.to_le_bytes()) {
                *register = byte as _;
            }
        }
        self.fd.set_lapic(&lapic).map_err(failed("set a local APIC"))
    }

    /// Runs until the gate asks for a stop or the machine ends. In-flight I/O is then completed, so that the registers
    /// are those between two instructions.
    pub fn run(&mut self, gate: &Gate, pio: &Bus, mmio: &Bus) -> Stop {
        let mut stopping = false;
        let mut entered = Instant::now();
        loop {
            stopping |= gate.attention();
            // With it set, KVM_RUN completes the access that was answered before, and returns with EINTR.
            self.fd.set_kvm_immediate_exit(u8::from(stopping));
            if !stopping && gate.attention() {
                // A kick came between the two lines; its signal may have come before the second.
                continue;
            }
            let start = Instant::now();
            self.host_ns += ns(start - entered);
            let exit = self.fd.run();
            entered = Instant::now();
            self.run_ns += ns(entered - start);
            let (kind, stop) = match exit {
                Ok(VcpuExit::IoOut(port, data)) => {
                    // A string instruction hands over several bytes for the one port.
                    for byte in data {
                        pio.write(port.into(), &[*byte]);
                    }
                    (Kind::IoOut, None)
                }
                Ok(VcpuExit::IoIn(port, data)) => {
                    for byte in data {
                        pio.read(port.into(), std::slice::from_mut(byte));
                    }
                    (Kind::IoIn, None)
                }
                Ok(VcpuExit::MmioRead(address, data)) => {
                    mmio.read(address, data);
                    (Kind::MmioRead, None)
                }
                Ok(VcpuExit::MmioWrite(address, data)) => {
                    mmio.write(address, data);
                    (Kind::MmioWrite, None)
                }
                Ok(VcpuExit::InternalError) => (Kind::Assist, self.assist().err()),
                Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET | KVM_SYSTEM_EVENT_SHUTDOWN, _)) => {
                    (Kind::Other, Some(Stop::Reset))
                }
                Ok(VcpuExit::Shutdown) => (Kind::Other, Some(self.dead_end("triple fault".into()))),
                Ok(VcpuExit::IrqWindowOpen | VcpuExit::Intr) => (Kind::Interrupted, None),
                Ok(other) => {
                    let what = format!("unexpected exit {other:?}");
                    (Kind::Other, Some(self.dead_end(what)))
                }
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                    (Kind::Interrupted, stopping.then_some(Stop::Asked))
                }
                Err(error) => {
                    let source = io::Error::from_raw_os_error(error.errno());
                    (Kind::Other, Some(Stop::Error(VcpuError::Run { id: self.id, rip: self.rip(), source })))
                }
            };
            self.exits[kind as usize] += 1;
            if let Some(stop) = stop {
                self.fd.set_kvm_immediate_exit(0);
                return stop;
            }
        }
    }

    /// KVM could not emulate an instruction, or broke.
    fn assist(&mut self) -> Result<(), Stop> {
        match &mut self.assist {
            Some(assist) => assist
                .supply(&mut self.fd, &self.memory)
                .map_err(|source| Stop::Error(VcpuError::Assist { id: self.id, source })),
            None => {
                // SAFETY: the exit was KVM_EXIT_INTERNAL_ERROR, which fills this member of the union; any bits are valid.
                let suberror = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal.suberror };
                Err(self.dead_end(format!("KVM internal error {suberror}")))
            }
        }
    }

    fn dead_end(&self, what: String) -> Stop {
        Stop::Error(VcpuError::Exit { id: self.id, rip: self.rip(), what })
    }

    fn rip(&self) -> u64 {
        self.fd.get_regs().map_or(0, |r| r.rip)
    }

    /// Adds what it did to the machine's statistics.
    pub fn add_statistics(&self, statistics: &mut Statistics) {
        for (name, count) in KIND_NAMES.iter().zip(self.exits).filter(|(_, count)| *count > 0) {
            *statistics.exits.entry((*name).to_owned()).or_default() += count;
        }
        if let Some(assist) = &self.assist {
            for (name, count) in assist.counts() {
                *statistics.assists.entry(name).or_default() += count;
            }
        }
        statistics.kvm_run_ns += self.run_ns;
        statistics.host_ns += self.host_ns;
    }
}

fn ns(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
