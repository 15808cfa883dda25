//! Instruction assist for software KVM: supplies the instructions that the host's emulator lacks.
//!
//! On a host without hardware virtualisation KVM emulates the guest's kernel instruction by instruction, and does not know
//! them all. With `KVM_CAP_EXIT_ON_EMULATION_FAILURE` it hands such an instruction over with the vCPU in a clean state.
//! Here it is decoded and executed on the vCPU's registers and memory as the Intel SDM volume 2 and the AMD APM volume 3
//! define it, or the exception is injected that it would have raised.
//!
//! `cpu` is the processor as far as it is needed, `paging` walks the guest's page tables, `execute` and `xsave` are the
//! instructions. None of these knows KVM: only this module does.

pub mod cpu;
mod execute;
pub mod paging;
#[cfg(test)]
pub(crate) mod testing;
pub mod xsave;

use crate::memory::GuestMemory;
use cpu::{Cpu, Exception};
use iced_x86::{Decoder, DecoderOptions, FastFormatter, Instruction, Mnemonic};
use kvm_bindings::{
    KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, Msrs, kvm_msr_entry, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use paging::Access;
use std::collections::BTreeMap;
use std::io;
use xsave::Layout;

/// The longest instruction.
const MAX_INSTRUCTION_BYTES: usize = 15;

/// Why an instruction could not be supplied. Each ends the machine.
#[derive(Debug, thiserror::Error)]
pub enum AssistError {
    /// KVM stopped for another reason.
    #[error("KVM internal error {suberror} (data {data:x?}) at RIP {rip:#x}")]
    Internal {
        /// KVM's number of it.
        suberror: u32,
        /// What it adds.
        data: Vec<u64>,
        /// Where the vCPU stands.
        rip: u64,
    },
    /// There is no code for it here.
    #[error("neither KVM nor the monitor can execute `{text}` (bytes {bytes:02x?}) at RIP {rip:#x}, CPL {cpl}")]
    Unsupported {
        /// The instruction in assembly.
        text: String,
        /// The instruction.
        bytes: Vec<u8>,
        /// Where it is.
        rip: u64,
        /// Privilege level it runs at.
        cpl: u8,
    },
    /// The bytes at RIP cannot be read, or are no instruction.
    #[error("KVM cannot execute what is at RIP {rip:#x}, and it is no instruction: {bytes:02x?}")]
    Undecodable {
        /// Where it is.
        rip: u64,
        /// What is there.
        bytes: Vec<u8>,
    },
    /// It accesses what is not memory.
    #[error("`{text}` at RIP {rip:#x} accesses guest-physical address {address:#x}, where no memory is")]
    NotMemory {
        /// The instruction in assembly.
        text: String,
        /// Where it is.
        rip: u64,
        /// What it accesses.
        address: u64,
    },
    /// A call of KVM failed.
    #[error("KVM cannot {what} for an instruction assist")]
    Kvm {
        /// What was asked of it.
        what: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// The assist of one vCPU.
#[derive(Debug, Default)]
pub struct Assist {
    /// How often each instruction was supplied. There are no more kinds than are supported.
    counts: BTreeMap<Mnemonic, u64>,
    page_faults: u64,
    layout: Option<Layout>,
}

impl Assist {
    /// How often each instruction was supplied, and how many page faults were injected.
    pub fn counts(&self) -> impl Iterator<Item = (String, u64)> + '_ {
        let faults = (self.page_faults > 0).then(|| ("page-fault".to_owned(), self.page_faults));
        self.counts.iter().map(|(mnemonic, count)| (format!("{mnemonic:?}").to_lowercase(), *count)).chain(faults)
    }

    /// Executes the instruction that KVM stopped at. The vCPU can be run again after it.
    ///
    /// # Errors
    /// It cannot be supplied, or the exit was about something else.
    pub fn supply(&mut self, fd: &mut VcpuFd, memory: &GuestMemory) -> Result<(), AssistError> {
        let regs = fd.get_regs().map_err(failed("read registers"))?;
        let given = handed_over(fd, regs.rip)?;
        let sregs = fd.get_sregs().map_err(failed("read special registers"))?;
        let mut cpu = Cpu::new(regs, sregs);
        let instruction = decode(&cpu, memory, &given)?;
        if xsave::needs_state(instruction.mnemonic()) {
            let xcrs = fd.get_xcrs().map_err(failed("read XCR0"))?;
            cpu.xcr0 = xcrs.xcrs.first().map_or(1, |x| x.value);
            let area = fd.get_xsave().map_err(failed("read the vector state"))?;
            cpu.xsave = Some(xsave::area_from_kvm(&area));
            cpu.layout = self.layout.get_or_insert_with(Layout::of_host).clone();
        }
        if instruction.mnemonic() == Mnemonic::Rdpid {
            cpu.tsc_aux = Some(read_msr(fd, TSC_AUX)?);
        }
        let result = execute::execute(&mut cpu, memory, &instruction);
        match result {
            Ok(()) => {
                *self.counts.entry(instruction.mnemonic()).or_default() += 1;
                store(fd, &cpu)?;
                cpu.exception.map_or(Ok(()), |exception| inject(fd, &mut cpu, exception))
            }
            // A fault: nothing of the instruction happened, and the registers are as they were.
            Err(execute::Stop::Exception(exception)) => {
                self.page_faults += u64::from(matches!(exception, Exception::PageFault { .. }));
                inject(fd, &mut cpu, exception)
            }
            Err(execute::Stop::NotMemory(address)) => {
                Err(AssistError::NotMemory { text: text(&instruction), rip: regs.rip, address })
            }
            Err(execute::Stop::Unsupported) => Err(unsupported(&cpu, &instruction, &given)),
        }
    }
}

/// The bytes of the instruction, as KVM hands them over; perhaps not all of them.
fn handed_over(fd: &mut VcpuFd, rip: u64) -> Result<Vec<u8>, AssistError> {
    let run = fd.get_kvm_run();
    // SAFETY: the exit was KVM_EXIT_INTERNAL_ERROR, which fills these members of the union; any bits are valid for them.
    let (internal, failure) = unsafe { (run.__bindgen_anon_1.internal, run.__bindgen_anon_1.emulation_failure) };
    if internal.suberror != KVM_INTERNAL_ERROR_EMULATION {
        let count = usize::try_from(internal.ndata).unwrap_or(0).min(internal.data.len());
        return Err(AssistError::Internal { suberror: internal.suberror, data: internal.data[..count].to_vec(), rip });
    }
    let with_bytes = u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES);
    if failure.ndata == 0 || failure.flags & with_bytes == 0 {
        return Ok(Vec::new());
    }
    // SAFETY: as above; the flag says that this member is the valid one.
    let instruction = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
    let len = usize::from(instruction.insn_size).min(MAX_INSTRUCTION_BYTES);
    Ok(instruction.insn_bytes[..len].to_vec())
}

/// Decodes what KVM handed over, or what is at RIP if that is not a whole instruction.
fn decode(cpu: &Cpu, memory: &GuestMemory, given: &[u8]) -> Result<Instruction, AssistError> {
    let at = |bytes: &[u8]| {
        let instruction = Decoder::with_ip(cpu.bits(), bytes, cpu.regs.rip, DecoderOptions::NONE).decode();
        (!instruction.is_invalid()).then_some(instruction)
    };
    if let Some(instruction) = at(given) {
        return Ok(instruction);
    }
    let mut bytes = Vec::with_capacity(MAX_INSTRUCTION_BYTES);
    let start = cpu.sregs.cs.base.wrapping_add(cpu.regs.rip);
    for address in (0..MAX_INSTRUCTION_BYTES as u64).map(|offset| start.wrapping_add(offset)) {
        let mut byte = [0];
        if paging::read(cpu, memory, address, &mut byte, Access::Fetch).is_err() {
            break;
        }
        bytes.push(byte[0]);
    }
    at(&bytes).ok_or(AssistError::Undecodable { rip: cpu.regs.rip, bytes })
}

/// IA32_TSC_AUX.
const TSC_AUX: u32 = 0xc000_0103;

fn read_msr(fd: &VcpuFd, index: u32) -> Result<u64, AssistError> {
    let entry = kvm_msr_entry { index, ..kvm_msr_entry::default() };
    let mut list = Msrs::from_entries(&[entry])
        .map_err(|e| AssistError::Kvm { what: "list an MSR", source: io::Error::other(e) })?;
    fd.get_msrs(&mut list).map_err(failed("read an MSR"))?;
    Ok(list.as_slice().first().map_or(0, |e| e.data))
}

/// Gives the vCPU what changed.
fn store(fd: &VcpuFd, cpu: &Cpu) -> Result<(), AssistError> {
    if cpu.xsave_changed
        && let Some(bytes) = &cpu.xsave
    {
        let area = xsave::area_to_kvm(bytes);
        // SAFETY: no feature with a larger area than `kvm_xsave` is enabled: that takes a permission asked of the
        // kernel by arch_prctl, which the monitor does not ask for.
        unsafe { fd.set_xsave(&area) }.map_err(failed("set the vector state"))?;
    }
    if cpu.sregs_changed {
        fd.set_sregs(&cpu.sregs).map_err(failed("set special registers"))?;
    }
    fd.set_regs(&cpu.regs).map_err(failed("set registers"))
}

/// Makes the vCPU take an exception before its next instruction.
fn inject(fd: &VcpuFd, cpu: &mut Cpu, exception: Exception) -> Result<(), AssistError> {
    if let Exception::PageFault { address, .. } = exception {
        cpu.sregs.cr2 = address;
        fd.set_sregs(&cpu.sregs).map_err(failed("set CR2"))?;
    }
    let mut events = fd.get_vcpu_events().map_err(failed("read pending events"))?;
    events.exception.injected = 1;
    events.exception.nr = exception.vector();
    events.exception.has_error_code = u8::from(exception.error_code().is_some());
    events.exception.error_code = exception.error_code().unwrap_or(0);
    fd.set_vcpu_events(&events).map_err(failed("inject an exception"))
}

fn failed(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> AssistError {
    move |error| AssistError::Kvm { what, source: io::Error::from_raw_os_error(error.errno()) }
}

fn unsupported(cpu: &Cpu, instruction: &Instruction, given: &[u8]) -> AssistError {
    AssistError::Unsupported {
        text: text(instruction),
        bytes: given[..given.len().min(instruction.len())].to_vec(),
        rip: cpu.regs.rip,
        cpl: cpu.cpl(),
    }
}

fn text(instruction: &Instruction) -> String {
    let mut text = String::new();
    FastFormatter::new().format(instruction, &mut text);
    text
}

/// Bytes of KVM's XSAVE area.
pub const KVM_XSAVE_BYTES: usize = size_of::<kvm_xsave>();
