//! The processor that the guest sees: what KVM supports, less what costs more than it brings on software KVM.
//!
//! References: Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E.

use super::{KvmError, failed};
use crate::config::KvmKind;
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

/// One register of one leaf, and bits in it.
struct Bits {
    function: u32,
    index: u32,
    register: Register,
    mask: u32,
}

#[derive(Clone, Copy)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

const fn bits(function: u32, index: u32, register: Register, mask: u32) -> Bits {
    Bits { function, index, register, mask }
}

/// Not for any guest: nested virtualisation.
const MASKED_ALWAYS: &[Bits] = &[
    bits(1, 0, Register::Ecx, 1 << 5),           // VMX
    bits(0x8000_0001, 0, Register::Ecx, 1 << 2), // SVM
];

/// On software KVM the guest's kernel executes these through the emulator, which lacks them, is slow at them, or guards
/// nothing with them (the host runs the guest at CPL 3). Guest user space sees the host's CPUID whatever is masked here.
const MASKED_ON_SOFTWARE: &[Bits] = &[
    bits(1, 0, Register::Ecx, 1 << 3 | 1 << 13 | 1 << 17 | 1 << 22 | 1 << 23), // MONITOR, CX16, PCID, MOVBE, POPCNT
    bits(7, 0, Register::Ebx, 1 | 1 << 3 | 1 << 7 | 1 << 8 | 1 << 9),          // FSGSBASE, BMI1, SMEP, BMI2, ERMS
    bits(7, 0, Register::Ebx, 1 << 10 | 1 << 19 | 1 << 20 | 1 << 23 | 1 << 24), // INVPCID, ADX, SMAP, CLFLUSHOPT, CLWB
    bits(7, 0, Register::Ecx, 1 << 2 | 1 << 3 | 1 << 5 | 1 << 7 | 1 << 16 | 1 << 22), // UMIP, PKU, WAITPKG, SHSTK, LA57, RDPID
    bits(7, 0, Register::Edx, 1 << 4 | 1 << 20),                                      // FSRM, IBT
    bits(7, 1, Register::Eax, 1 << 10 | 1 << 11 | 1 << 12),                           // FZRM, FSRS, FSRC
    bits(0xd, 1, Register::Eax, u32::MAX), // XSAVEOPT, XSAVEC, XSAVES: the standard format only
    bits(0xd, 0, Register::Eax, 1 << 9),   // PKRU
    bits(0x8000_0001, 0, Register::Ecx, 1 << 5), // LZCNT
];

/// TSC-deadline timer of the local APIC, which CPUID reports only as KVM's capability says.
const TSC_DEADLINE: u32 = 1 << 24;
/// A hypervisor is present.
const HYPERVISOR: u32 = 1 << 31;
/// More than one logical processor.
const HTT: u32 = 1 << 28;

/// What every vCPU of a machine has in common.
///
/// # Errors
/// KVM does not tell what it supports.
pub fn supported(kvm: &Kvm, kind: KvmKind) -> Result<CpuId, KvmError> {
    let mut cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(failed("list its CPUID features"))?;
    let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    for entry in cpuid.as_mut_slice() {
        if entry.function == 1 {
            entry.ecx |= HYPERVISOR;
            if tsc_deadline {
                entry.ecx |= TSC_DEADLINE;
            }
        }
        mask(entry, MASKED_ALWAYS);
        if kind == KvmKind::Software {
            mask(entry, MASKED_ON_SOFTWARE);
        }
    }
    Ok(cpuid)
}

fn mask(entry: &mut kvm_cpuid_entry2, list: &[Bits]) {
    for bits in list.iter().filter(|b| b.function == entry.function && b.index == entry.index) {
        let register = match bits.register {
            Register::Eax => &mut entry.eax,
            Register::Ebx => &mut entry.ebx,
            Register::Ecx => &mut entry.ecx,
            Register::Edx => &mut entry.edx,
        };
        *register &= !bits.mask;
    }
}

/// The same for one vCPU of `count`: its APIC id, in a topology of one package of single-threaded cores.
pub fn for_vcpu(common: &CpuId, id: u8, count: u8) -> CpuId {
    let mut cpuid = common.clone();
    let (id, count) = (u32::from(id), u32::from(count));
    // Bits of the APIC id that tell cores apart.
    let core_bits = count.next_power_of_two().trailing_zeros();
    for entry in cpuid.as_mut_slice() {
        match (entry.function, entry.index) {
            (1, _) => {
                entry.ebx = entry.ebx & 0xffff | count << 16 | id << 24;
                entry.edx = if count > 1 { entry.edx | HTT } else { entry.edx & !HTT };
            }
            (4, _) if entry.eax & 0x1f != 0 => {
                entry.eax = entry.eax & 0x3fff | (count - 1) << 26;
            }
            // Extended topology: level 0 is threads (one), level 1 is cores.
            (0xb | 0x1f, 0) => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 1, 1 << 8, id);
            }
            (0xb | 0x1f, 1) => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (core_bits, count, 1 | 2 << 8, id);
            }
            (0xb | 0x1f, level) => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, level, id);
            }
            (0x8000_0008, _) => entry.ecx = (count - 1) | core_bits << 12,
            (0x8000_001e, _) => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
            (0x8000_0026, _) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, id),
            _ => {}
        }
    }
    cpuid
}
