//! The instructions that are supplied, one function for each kind.
//!
//! Every one follows the same order: check what raises an exception, read, compute, write memory, write registers. So a
//! fault leaves the processor as it was.

use super::cpu::{Cpu, Exception, bits, size_mask};
use super::paging::{self, Access, Mark};
use super::xsave;
use crate::memory::GuestMemory;
use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use vm_memory::{GuestAddress, GuestMemoryBackend};

/// Why an instruction was not completed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// It raises an exception instead.
    Exception(Exception),
    /// It accesses a guest-physical address where no memory is.
    NotMemory(u64),
    /// There is no code for it.
    Unsupported,
}

const UNDEFINED: Stop = Stop::Exception(Exception::InvalidOpcode);
const PROTECTION: Stop = Stop::Exception(Exception::GeneralProtection);
const NOT_AVAILABLE: Stop = Stop::Exception(Exception::DeviceNotAvailable);
/// All arithmetic flags.
const ARITHMETIC: u64 = bits::CF | bits::PF | bits::AF | bits::ZF | bits::SF | bits::OF;

/// Executes one instruction and moves RIP past it.
///
/// # Errors
/// It is not completed, and then the processor and memory are as they were (but for accessed bits).
pub(super) fn execute(cpu: &mut Cpu, memory: &GuestMemory, i: &Instruction) -> Result<(), Stop> {
    match i.mnemonic() {
        Mnemonic::Popcnt => count(cpu, memory, i, |v, _| u64::from(v.count_ones()))?,
        Mnemonic::Lzcnt => count(cpu, memory, i, |v, bits| u64::from(v.leading_zeros()) - (64 - bits))?,
        Mnemonic::Tzcnt => count(cpu, memory, i, |v, bits| u64::from(v.trailing_zeros()).min(bits))?,
        Mnemonic::Crc32 => crc32(cpu, memory, i)?,
        Mnemonic::Clac => set_ac(cpu, i, false)?,
        Mnemonic::Stac => set_ac(cpu, i, true)?,
        Mnemonic::Int3 => cpu.exception = Some(Exception::Breakpoint),
        Mnemonic::Ud0 | Mnemonic::Ud1 | Mnemonic::Ud2 => return Err(UNDEFINED),
        // Waits for an x87 exception, of which there is none while they are masked, as a kernel has them.
        Mnemonic::Wait => monitored(cpu)?,
        // Ordering and caching hints: what is executed here is in order, and the caches are coherent.
        Mnemonic::Lfence | Mnemonic::Mfence | Mnemonic::Sfence | Mnemonic::Serialize | Mnemonic::Pause => {}
        Mnemonic::Endbr64 | Mnemonic::Endbr32 | Mnemonic::Nop | Mnemonic::Rdsspq | Mnemonic::Rdsspd => {}
        Mnemonic::Clflush | Mnemonic::Clflushopt | Mnemonic::Clwb | Mnemonic::Cldemote => hint(cpu, memory, i)?,
        Mnemonic::Prefetchw
        | Mnemonic::Prefetchwt1
        | Mnemonic::Prefetcht0
        | Mnemonic::Prefetcht1
        | Mnemonic::Prefetcht2
        | Mnemonic::Prefetchnta
        | Mnemonic::Prefetch => {}
        Mnemonic::Lsl => segment_limit(cpu, memory, i)?,
        Mnemonic::Verr | Mnemonic::Verw => verify(cpu, memory, i)?,
        Mnemonic::Rdpid => read_pid(cpu, i)?,
        Mnemonic::Rdfsbase | Mnemonic::Rdgsbase | Mnemonic::Wrfsbase | Mnemonic::Wrgsbase => segment_base(cpu, i)?,
        Mnemonic::Cmpxchg16b => compare_exchange(cpu, memory, i, 16)?,
        Mnemonic::Cmpxchg8b => compare_exchange(cpu, memory, i, 8)?,
        Mnemonic::Rdrand | Mnemonic::Rdseed => random(cpu, i)?,
        Mnemonic::Xgetbv => xsave::xgetbv(cpu)?,
        Mnemonic::Xsave | Mnemonic::Xsave64 | Mnemonic::Xsaveopt | Mnemonic::Xsaveopt64 => {
            let address = state_operand(cpu, i)?;
            xsave::save(cpu, memory, address, is_64_bit_form(i.mnemonic()))?;
        }
        Mnemonic::Xsavec | Mnemonic::Xsavec64 => {
            let address = state_operand(cpu, i)?;
            xsave::save_compacted(cpu, memory, address, is_64_bit_form(i.mnemonic()))?;
        }
        Mnemonic::Xrstor | Mnemonic::Xrstor64 => {
            let address = state_operand(cpu, i)?;
            xsave::restore(cpu, memory, address, is_64_bit_form(i.mnemonic()))?;
        }
        Mnemonic::Ldmxcsr => {
            available(cpu)?;
            let value = source(cpu, memory, i, 0, 4)? as u32;
            xsave::set_mxcsr(cpu, value)?;
        }
        Mnemonic::Stmxcsr => {
            available(cpu)?;
            let value = xsave::mxcsr(cpu)?;
            paging::write(cpu, memory, linear(cpu, i, 0)?, &value.to_le_bytes())?;
        }
        Mnemonic::Emms => {
            available(cpu)?;
            xsave::empty_x87(cpu)?;
        }
        Mnemonic::Fnclex => {
            available(cpu)?;
            xsave::clear_x87_exceptions(cpu)?;
        }
        _ => return Err(Stop::Unsupported),
    }
    cpu.regs.rip = match cpu.bits() {
        64 => i.next_ip(),
        32 => i.next_ip() & 0xffff_ffff,
        _ => i.next_ip() & 0xffff,
    };
    cpu.set_flags(bits::RF, false);
    Ok(())
}

fn is_64_bit_form(mnemonic: Mnemonic) -> bool {
    matches!(mnemonic, Mnemonic::Xsave64 | Mnemonic::Xsaveopt64 | Mnemonic::Xsavec64 | Mnemonic::Xrstor64)
}

/// `popcnt`, `lzcnt`, `tzcnt`: of the value and its size in bits.
fn count(cpu: &mut Cpu, memory: &GuestMemory, i: &Instruction, function: impl Fn(u64, u64) -> u64) -> Result<(), Stop> {
    let destination = i.op0_register();
    let size = destination.size();
    let value = source(cpu, memory, i, 1, size)?;
    let result = function(value, 8 * size as u64);
    if i.mnemonic() == Mnemonic::Popcnt {
        cpu.set_flags(ARITHMETIC, false);
        cpu.set_flags(bits::ZF, value == 0);
    } else {
        // The others are undefined after these; they stay.
        cpu.set_flags(bits::CF, value == 0);
        cpu.set_flags(bits::ZF, result == 0);
    }
    cpu.set(destination, result).ok_or(Stop::Unsupported)
}

/// Accumulates a CRC with the polynomial 11EDC6F41h, bits reflected.
fn crc32(cpu: &mut Cpu, memory: &GuestMemory, i: &Instruction) -> Result<(), Stop> {
    const REFLECTED: u32 = 0x82f6_3b78;
    let size = match i.op1_kind() {
        OpKind::Register => i.op1_register().size(),
        _ => i.memory_size().size(),
    };
    let value = source(cpu, memory, i, 1, size)?;
    let destination = i.op0_register();
    let mut crc = cpu.get(destination).ok_or(Stop::Unsupported)? as u32;
    for byte in &value.to_le_bytes()[..size] {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ if crc & 1 != 0 { REFLECTED } else { 0 };
        }
    }
    cpu.set(destination, crc.into()).ok_or(Stop::Unsupported)
}

fn set_ac(cpu: &mut Cpu, i: &Instruction, on: bool) -> Result<(), Stop> {
    if cpu.cpl() != 0 || i.has_lock_prefix() {
        return Err(UNDEFINED);
    }
    cpu.set_flags(bits::AC, on);
    Ok(())
}

/// `fwait`: #NM if CR0.MP and CR0.TS are both set.
fn monitored(cpu: &Cpu) -> Result<(), Stop> {
    const CR0_MP: u64 = 1 << 1;
    let both = CR0_MP | bits::CR0_TS;
    if cpu.sregs.cr0 & both == both { Err(NOT_AVAILABLE) } else { Ok(()) }
}

/// Vector and x87 instructions: #NM while the state is another task's.
fn available(cpu: &Cpu) -> Result<(), Stop> {
    if cpu.sregs.cr0 & bits::CR0_TS != 0 { Err(NOT_AVAILABLE) } else { Ok(()) }
}

/// A hint about a memory operand still faults if that cannot be read.
fn hint(cpu: &Cpu, memory: &GuestMemory, i: &Instruction) -> Result<(), Stop> {
    let address = linear(cpu, i, 0)?;
    paging::check(cpu, memory, address, 1, Access::Read)
}

/// The operand of `xsave` and `xrstor`, with what they check first.
fn state_operand(cpu: &Cpu, i: &Instruction) -> Result<u64, Stop> {
    if cpu.sregs.cr4 & bits::CR4_OSXSAVE == 0 || i.has_lock_prefix() {
        return Err(UNDEFINED);
    }
    available(cpu)?;
    let address = linear(cpu, i, 0)?;
    if address % xsave::ALIGNMENT != 0 {
        return Err(PROTECTION);
    }
    Ok(address)
}

/// `cmpxchg8b` and `cmpxchg16b`, atomic towards the other vCPUs.
fn compare_exchange(cpu: &mut Cpu, memory: &GuestMemory, i: &Instruction, size: usize) -> Result<(), Stop> {
    let address = linear(cpu, i, 0)?;
    if size == 16 && address % 16 != 0 {
        return Err(PROTECTION);
    }
    if address % size as u64 != 0 {
        // A split lock: the operand may cross a page.
        return Err(Stop::Unsupported);
    }
    let physical = paging::translate(cpu, memory, address, Access::Write, Mark::Yes)?;
    let slice = memory.get_slice(GuestAddress(physical), size).map_err(|_| Stop::NotMemory(physical))?;
    let half = size / 2;
    let join = |low: u64, high: u64| {
        let mask = size_mask(half);
        u128::from(low & mask) | u128::from(high & mask) << (8 * half)
    };
    let expected = join(cpu.regs.rax, cpu.regs.rdx);
    let new = join(cpu.regs.rbx, cpu.regs.rcx);
    let pointer = slice.ptr_guard_mut();
    // SAFETY: the pointer is to `size` bytes of mapped guest memory, and aligned to that: `physical` is as `address` is.
    // Other vCPUs access it at the same time only as the processor or this function does.
    let found = unsafe { compare_exchange_at(pointer.as_ptr(), size, expected, new) };
    let equal = found == expected;
    if !equal {
        let mask = size_mask(half);
        let (low, high) = ((found as u64) & mask, ((found >> (8 * half)) as u64) & mask);
        // As registers of 32 bits are written, the upper half is cleared.
        (cpu.regs.rax, cpu.regs.rdx) = (low, high);
    }
    cpu.set_flags(bits::ZF, equal);
    Ok(())
}

/// Compares and exchanges 8 or 16 bytes atomically; returns what was there.
///
/// # Safety
/// `pointer` is to `size` (8 or 16) bytes that can be read and written, and aligned to it.
unsafe fn compare_exchange_at(pointer: *mut u8, size: usize, expected: u128, new: u128) -> u128 {
    if size == 8 {
        use std::sync::atomic::{AtomicU64, Ordering};
        // SAFETY: the caller's promise.
        let cell = unsafe { AtomicU64::from_ptr(pointer.cast()) };
        let result = cell.compare_exchange(expected as u64, new as u64, Ordering::SeqCst, Ordering::SeqCst);
        return u128::from(result.unwrap_or_else(|found| found));
    }
    let (mut low, mut high) = (expected as u64, (expected >> 64) as u64);
    // SAFETY: the caller's promise; every x86-64 processor with KVM has the instruction. RBX is reserved by the compiler,
    // so the new low half is swapped into it for the one instruction.
    unsafe {
        std::arch::asm!(
            "xchg rbx, {new_low}",
            "lock cmpxchg16b [{pointer}]",
            "mov rbx, {new_low}",
            new_low = inout(reg) new as u64 => _,
            pointer = in(reg) pointer,
            in("rcx") (new >> 64) as u64,
            inout("rax") low,
            inout("rdx") high,
            options(nostack),
        );
    }
    u128::from(low) | u128::from(high) << 64
}

/// A segment descriptor that a selector names, if it is within its table and its DPL allows it to be looked at.
fn descriptor(cpu: &Cpu, memory: &GuestMemory, selector: u16) -> Result<Option<u64>, Stop> {
    const TABLE_INDICATOR: u16 = 4;
    if selector & !3 == 0 {
        return Ok(None);
    }
    let s = &cpu.sregs;
    let (base, limit) = match selector & TABLE_INDICATOR {
        0 => (s.gdt.base, u32::from(s.gdt.limit)),
        _ if s.ldt.unusable != 0 || s.ldt.present == 0 => return Ok(None),
        _ => (s.ldt.base, s.ldt.limit),
    };
    let offset = u32::from(selector & !7);
    if offset + 7 > limit {
        return Ok(None);
    }
    let mut bytes = [0; 8];
    // Tables are read with the rights of the supervisor, whoever runs; only it runs here.
    paging::read(cpu, memory, base.wrapping_add(offset.into()), &mut bytes, Access::Read)?;
    let descriptor = u64::from_le_bytes(bytes);
    let dpl = (descriptor >> 45 & 3) as u16;
    let conforming_code = descriptor >> 42 & 7 == 7;
    let visible = conforming_code || (u16::from(cpu.cpl()) <= dpl && selector & 3 <= dpl);
    Ok(visible.then_some(descriptor))
}

/// `lsl`: the limit of a segment, in bytes.
fn segment_limit(cpu: &mut Cpu, memory: &GuestMemory, i: &Instruction) -> Result<(), Stop> {
    protected(cpu)?;
    let selector = source(cpu, memory, i, 1, 2)? as u16;
    // Code and data have bit 44 set; of the system segments only these types have a limit (SDM volume 2, LSL).
    let limited = |d: &u64| {
        d >> 44 & 1 != 0 || matches!(d >> 40 & 0xf, 2 | 9 | 11) || (cpu.bits() != 64 && matches!(d >> 40 & 0xf, 1 | 3))
    };
    let found = descriptor(cpu, memory, selector)?.filter(limited);
    cpu.set_flags(bits::ZF, found.is_some());
    let Some(descriptor) = found else {
        return Ok(());
    };
    let limit = descriptor & 0xffff | descriptor >> 32 & 0xf_0000;
    let limit = if descriptor >> 55 & 1 != 0 { limit << 12 | 0xfff } else { limit };
    cpu.set(i.op0_register(), limit).ok_or(Stop::Unsupported)
}

/// `verr`, `verw`: whether a segment can be read or written.
fn verify(cpu: &mut Cpu, memory: &GuestMemory, i: &Instruction) -> Result<(), Stop> {
    protected(cpu)?;
    let selector = source(cpu, memory, i, 0, 2)? as u16;
    let (code, readable_or_writable) = (1u64 << 43, 1u64 << 41);
    let allowed = |d: &u64| {
        let (is_code, bit) = (d & code != 0, d & readable_or_writable != 0);
        let right = if i.mnemonic() == Mnemonic::Verw { !is_code && bit } else { !is_code || bit };
        d >> 44 & 1 != 0 && right
    };
    let found = descriptor(cpu, memory, selector)?.filter(allowed);
    cpu.set_flags(bits::ZF, found.is_some());
    Ok(())
}

/// Instructions that are there in protected mode only.
fn protected(cpu: &Cpu) -> Result<(), Stop> {
    if cpu.sregs.cr0 & bits::CR0_PE == 0 { Err(UNDEFINED) } else { Ok(()) }
}

/// `rdpid`: IA32_TSC_AUX.
fn read_pid(cpu: &mut Cpu, i: &Instruction) -> Result<(), Stop> {
    let value = cpu.tsc_aux.ok_or(Stop::Unsupported)?;
    cpu.set(i.op0_register(), value & 0xffff_ffff).ok_or(Stop::Unsupported)
}

/// `rdfsbase` and its like. CR4.FSGSBASE must be set, a base canonical.
fn segment_base(cpu: &mut Cpu, i: &Instruction) -> Result<(), Stop> {
    const CR4_FSGSBASE: u64 = 1 << 16;
    if cpu.sregs.cr4 & CR4_FSGSBASE == 0 || cpu.bits() != 64 {
        return Err(UNDEFINED);
    }
    let register = i.op0_register();
    let value = cpu.get(register).ok_or(Stop::Unsupported)?;
    let writes = matches!(i.mnemonic(), Mnemonic::Wrfsbase | Mnemonic::Wrgsbase);
    if writes && !paging::is_canonical(cpu, value) {
        return Err(PROTECTION);
    }
    let fs = matches!(i.mnemonic(), Mnemonic::Rdfsbase | Mnemonic::Wrfsbase);
    let base = if fs { &mut cpu.sregs.fs.base } else { &mut cpu.sregs.gs.base };
    if writes {
        *base = value;
        cpu.sregs_changed = true;
        return Ok(());
    }
    let base = *base;
    cpu.set(register, base).ok_or(Stop::Unsupported)
}

/// `rdrand`, `rdseed`: from the host kernel's generator.
fn random(cpu: &mut Cpu, i: &Instruction) -> Result<(), Stop> {
    let mut bytes = [0; 8];
    let got = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    let success = got == Ok(bytes.len());
    let value = if success { u64::from_le_bytes(bytes) } else { 0 };
    cpu.set_flags(ARITHMETIC, false);
    cpu.set_flags(bits::CF, success);
    cpu.set(i.op0_register(), value).ok_or(Stop::Unsupported)
}

/// The value of a register or memory operand of `size` bytes.
fn source(cpu: &Cpu, memory: &GuestMemory, i: &Instruction, operand: u32, size: usize) -> Result<u64, Stop> {
    match i.op_kind(operand) {
        OpKind::Register => cpu.get(i.op_register(operand)).ok_or(Stop::Unsupported),
        OpKind::Memory => {
            let mut bytes = [0; 8];
            let address = linear(cpu, i, operand)?;
            paging::read(cpu, memory, address, &mut bytes[..size], Access::Read)?;
            Ok(u64::from_le_bytes(bytes))
        }
        _ => Err(Stop::Unsupported),
    }
}

/// The linear address of a memory operand.
fn linear(cpu: &Cpu, i: &Instruction, operand: u32) -> Result<u64, Stop> {
    let address = i
        .virtual_address(operand, 0, |register, _, _| match register {
            Register::CS | Register::DS | Register::ES | Register::SS | Register::FS | Register::GS => {
                Some(cpu.segment_base(register))
            }
            other => cpu.get(other),
        })
        .ok_or(Stop::Unsupported)?;
    let stack = i.memory_segment() == Register::SS;
    let canonical = paging::is_canonical(cpu, address);
    match (canonical, stack) {
        (true, _) => Ok(if cpu.bits() == 64 { address } else { address & 0xffff_ffff }),
        (false, true) => Err(Stop::Exception(Exception::StackFault)),
        (false, false) => Err(PROTECTION),
    }
}

#[cfg(test)]
mod tests;
