//! The vector state, and the instructions that save and restore it (Intel SDM volume 1, chapter 13).
//!
//! KVM gives and takes the state in the standard format with the host's offsets, so that components are copied from one
//! area to the other. In memory it has the standard or the compacted format (13.4.3): some software KVMs show the guest's
//! kernel the host's CPUID leaf 0xD, subleaf 1 whatever was masked, and then a kernel uses `xsavec`. `xsaves` is privileged
//! and not among them.

use super::KVM_XSAVE_BYTES;
use super::cpu::{Cpu, Exception};
use super::execute::Stop;
use super::paging::{self, Access};
use crate::memory::GuestMemory;
use iced_x86::Mnemonic;
use kvm_bindings::kvm_xsave;
use std::arch::x86_64::__cpuid_count;
use std::ops::Range;

/// What the operand of `xsave` and `xrstor` is aligned to.
pub const ALIGNMENT: u64 = 64;

/// Components of the legacy region.
const X87: u64 = 1;
const SSE: u64 = 1 << 1;
const AVX: u64 = 1 << 2;
/// Parts of the legacy region (SDM volume 1, table 13-1): x87 without MXCSR, MXCSR with its mask, XMM registers.
const X87_CONTROL: Range<usize> = 0..24;
const X87_REGISTERS: Range<usize> = 32..160;
const MXCSR: Range<usize> = 24..28;
const MXCSR_AND_MASK: Range<usize> = 24..32;
const XMM: Range<usize> = 160..416;
/// The x87 instruction and data pointers; in the 32-bit form their selectors are in bytes 12, 13 and 20, 21.
const FIP_HIGH: Range<usize> = 12..16;
const FDP_HIGH: Range<usize> = 20..24;
/// The header.
const HEADER: usize = 512;
const XSTATE_BV: Range<usize> = HEADER..HEADER + 8;
const XCOMP_BV: Range<usize> = HEADER + 8..HEADER + 16;
/// Zero in the standard format, but for the last 40 bytes, which are not looked at.
const HEADER_ZEROES: Range<usize> = HEADER + 8..HEADER + 24;
/// Zero in the compacted format.
const COMPACTED_ZEROES: Range<usize> = HEADER + 16..HEADER + 64;
/// The bit of XCOMP_BV that says that the area is compacted.
const COMPACTED: u64 = 1 << 63;
const EXTENDED: usize = 576;
/// Initial values.
const INITIAL_FCW: u16 = 0x37f;
const INITIAL_MXCSR: u32 = 0x1f80;
/// Bits of MXCSR that a processor without MXCSR_MASK has.
const DEFAULT_MXCSR_MASK: u32 = 0xffbf;
/// The most components there are; 62 and 63 are not components.
const MAX_COMPONENTS: usize = 62;

/// Where each component above SSE lies in the standard format.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Layout {
    /// By number; empty if there is none.
    components: Vec<Range<usize>>,
    /// Those that are aligned to 64 bytes in the compacted format.
    aligned: u64,
}

impl Layout {
    /// The host's, which KVM uses: CPUID leaf 0xD.
    pub fn of_host() -> Self {
        let top = __cpuid_count(0xd, 0);
        let supported = u64::from(top.eax) | u64::from(top.edx) << 32;
        let mut aligned = 0;
        let components = (0..MAX_COMPONENTS as u32).map(|number| {
            if number < 2 || supported >> number & 1 == 0 {
                return 0..0;
            }
            let leaf = __cpuid_count(0xd, number);
            aligned |= u64::from(leaf.ecx >> 1 & 1) << number;
            let (offset, size) = (leaf.ebx as usize, leaf.eax as usize);
            // What does not fit into KVM's area is not used by any guest.
            if offset < EXTENDED || offset + size > KVM_XSAVE_BYTES { 0..0 } else { offset..offset + size }
        });
        let components = components.collect();
        Self { components, aligned }
    }

    /// The components of a set of features, with their numbers.
    fn of(&self, features: u64) -> impl Iterator<Item = (usize, Range<usize>)> + '_ {
        let all = self.components.iter().cloned().enumerate();
        all.filter(move |(number, range)| *number >= 2 && features >> number & 1 != 0 && !range.is_empty())
    }

    /// Number, place in the compacted format, and place in the standard format of the components of `features`.
    fn compacted(&self, features: u64) -> Vec<(usize, Range<usize>, Range<usize>)> {
        let mut end = EXTENDED;
        self.of(features)
            .map(|(number, standard)| {
                let start = if self.aligned >> number & 1 != 0 { end.next_multiple_of(64) } else { end };
                end = start + standard.len();
                (number, start..end, standard)
            })
            .collect()
    }

    /// Bytes of an area that holds these features.
    fn len(&self, features: u64) -> usize {
        self.of(features).map(|(_, range)| range.end).max().unwrap_or(EXTENDED)
    }
}

/// Whether an instruction works on the vector state.
pub fn needs_state(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Xsave
            | Mnemonic::Xsave64
            | Mnemonic::Xsaveopt
            | Mnemonic::Xsaveopt64
            | Mnemonic::Xsavec
            | Mnemonic::Xsavec64
            | Mnemonic::Xrstor
            | Mnemonic::Xrstor64
            | Mnemonic::Xgetbv
            | Mnemonic::Ldmxcsr
            | Mnemonic::Stmxcsr
            | Mnemonic::Emms
            | Mnemonic::Fnclex
    )
}

/// KVM's area as bytes.
pub fn area_from_kvm(area: &kvm_xsave) -> Vec<u8> {
    area.region.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Bytes as KVM's area.
pub fn area_to_kvm(bytes: &[u8]) -> kvm_xsave {
    let mut area = kvm_xsave::default();
    for (word, bytes) in area.region.iter_mut().zip(bytes.chunks_exact(4)) {
        *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    }
    area
}

/// `xgetbv`: only XCR0 is there.
pub fn xgetbv(cpu: &mut Cpu) -> Result<(), Stop> {
    if cpu.regs.rcx as u32 != 0 {
        return Err(Stop::Exception(Exception::GeneralProtection));
    }
    (cpu.regs.rax, cpu.regs.rdx) = (cpu.xcr0 & 0xffff_ffff, cpu.xcr0 >> 32);
    Ok(())
}

/// The components that an instruction is asked for: those in EDX:EAX that XCR0 has.
fn requested(cpu: &Cpu) -> u64 {
    (cpu.regs.rax & 0xffff_ffff | cpu.regs.rdx << 32) & cpu.xcr0
}

/// `xsave` (SDM volume 1, 13.7): what is not asked for stays as it is in memory.
pub fn save(cpu: &mut Cpu, memory: &GuestMemory, address: u64, wide: bool) -> Result<(), Stop> {
    let features = requested(cpu);
    let state = cpu.xsave.as_deref().ok_or(Stop::Unsupported)?;
    let mut area = vec![0; cpu.layout.len(features)];
    // All of it must be writable before any is written. Reading it first keeps what is between the components.
    paging::check(cpu, memory, address, area.len(), Access::Write)?;
    paging::read(cpu, memory, address, &mut area, Access::Write)?;
    let mut copy = |range: Range<usize>| area[range.clone()].copy_from_slice(&state[range]);
    if features & X87 != 0 {
        copy(X87_CONTROL);
        copy(X87_REGISTERS);
    }
    if features & (SSE | AVX) != 0 {
        copy(MXCSR_AND_MASK);
    }
    if features & SSE != 0 {
        copy(XMM);
    }
    for (_, range) in cpu.layout.of(features) {
        copy(range);
    }
    if features & X87 != 0 && !wide {
        // Processors of today save no selectors (CPUID 7, "deprecates FPU CS and DS").
        area[FIP_HIGH].fill(0);
        area[FDP_HIGH].fill(0);
    }
    let in_use = u64_at(&area, XSTATE_BV) & !features | u64_at(state, XSTATE_BV) & features;
    area[XSTATE_BV].copy_from_slice(&in_use.to_le_bytes());
    paging::write(cpu, memory, address, &area)
}

/// `xsavec` (SDM volume 1, 13.10): what is in its initial state is not written, and
/// of the header only XSTATE_BV and XCOMP_BV are.
pub fn save_compacted(cpu: &mut Cpu, memory: &GuestMemory, address: u64, wide: bool) -> Result<(), Stop> {
    let features = requested(cpu);
    let state = cpu.xsave.as_deref().ok_or(Stop::Unsupported)?;
    let mut in_use = u64_at(state, XSTATE_BV) & features;
    if u32_at(state, MXCSR) != INITIAL_MXCSR {
        in_use |= SSE & features;
    }
    let places = cpu.layout.compacted(features);
    let len = places.last().map_or(EXTENDED, |(_, place, _)| place.end);
    let mut area = vec![0; len];
    paging::check(cpu, memory, address, len, Access::Write)?;
    paging::read(cpu, memory, address, &mut area, Access::Write)?;
    let mut copy = |to: Range<usize>, from: Range<usize>| area[to].copy_from_slice(&state[from]);
    if in_use & X87 != 0 {
        copy(X87_CONTROL, X87_CONTROL);
        copy(X87_REGISTERS, X87_REGISTERS);
    }
    if in_use & SSE != 0 {
        copy(XMM, XMM);
        copy(MXCSR_AND_MASK, MXCSR_AND_MASK);
    }
    for (number, place, standard) in places {
        if in_use >> number & 1 != 0 {
            copy(place, standard);
        }
    }
    if in_use & X87 != 0 && !wide {
        area[FIP_HIGH].fill(0);
        area[FDP_HIGH].fill(0);
    }
    area[XSTATE_BV].copy_from_slice(&in_use.to_le_bytes());
    area[XCOMP_BV].copy_from_slice(&(features | COMPACTED).to_le_bytes());
    paging::write(cpu, memory, address, &area)
}

/// `xrstor` (SDM volume 1, 13.8), both forms.
pub fn restore(cpu: &mut Cpu, memory: &GuestMemory, address: u64, wide: bool) -> Result<(), Stop> {
    const PROTECTION: Stop = Stop::Exception(Exception::GeneralProtection);
    let features = requested(cpu);
    let mut area = read_area(cpu, memory, address, features)?;
    let in_use = u64_at(&area, XSTATE_BV);
    let compacted = u64_at(&area, XCOMP_BV) & COMPACTED != 0;
    if features & X87 != 0 && !wide {
        area[FIP_HIGH].fill(0);
        area[FDP_HIGH].fill(0);
    }
    let layout = cpu.layout.clone();
    let state = cpu.xsave.as_mut().ok_or(Stop::Unsupported)?;
    // The compacted form initialises MXCSR with SSE; the standard form loads it whatever XSTATE_BV says (13.8.1).
    if compacted && features & SSE != 0 && in_use & SSE == 0 {
        area[MXCSR].copy_from_slice(&INITIAL_MXCSR.to_le_bytes());
    }
    let with_mxcsr = features & if compacted { SSE } else { SSE | AVX } != 0;
    if with_mxcsr && u32_at(&area, MXCSR) & !mxcsr_mask(state) != 0 {
        return Err(PROTECTION);
    }
    let initial = initial_state(state.len());
    let source = |feature: u64| if in_use & feature != 0 { &area } else { &initial };
    if features & X87 != 0 {
        let source = source(X87);
        state[X87_CONTROL].copy_from_slice(&source[X87_CONTROL]);
        state[X87_REGISTERS].copy_from_slice(&source[X87_REGISTERS]);
    }
    if with_mxcsr {
        state[MXCSR].copy_from_slice(&area[MXCSR]);
    }
    if features & SSE != 0 {
        state[XMM].copy_from_slice(&source(SSE)[XMM]);
    }
    for (number, range) in layout.of(features) {
        state[range.clone()].copy_from_slice(&source(1 << number)[range]);
    }
    let mut now = u64_at(state, XSTATE_BV) & !features | in_use & features;
    if u32_at(state, MXCSR) != INITIAL_MXCSR {
        // Without this KVM would take MXCSR for initial, too.
        now |= SSE;
    }
    set_header(state, now);
    cpu.xsave_changed = true;
    Ok(())
}

/// Reads an area for `xrstor` and brings it into the standard format, but for its header. #GP if that is malformed.
fn read_area(cpu: &Cpu, memory: &GuestMemory, address: u64, features: u64) -> Result<Vec<u8>, Stop> {
    const PROTECTION: Stop = Stop::Exception(Exception::GeneralProtection);
    let mut legacy = vec![0; EXTENDED];
    paging::read(cpu, memory, address, &mut legacy, Access::Read)?;
    let (in_use, format) = (u64_at(&legacy, XSTATE_BV), u64_at(&legacy, XCOMP_BV));
    let mut area = vec![0; cpu.layout.len(features)];
    if format & COMPACTED == 0 {
        if in_use & !cpu.xcr0 != 0 || legacy[HEADER_ZEROES].iter().any(|&b| b != 0) {
            return Err(PROTECTION);
        }
        paging::read(cpu, memory, address, &mut area, Access::Read)?;
        return Ok(area);
    }
    let present = format & !COMPACTED;
    let malformed = present & !cpu.xcr0 != 0 || in_use & !present != 0;
    if malformed || legacy[COMPACTED_ZEROES].iter().any(|&b| b != 0) {
        return Err(PROTECTION);
    }
    area[..EXTENDED].copy_from_slice(&legacy);
    for (number, place, standard) in cpu.layout.compacted(present) {
        if in_use & features & 1 << number != 0 {
            let from = address.wrapping_add(place.start as u64);
            paging::read(cpu, memory, from, &mut area[standard], Access::Read)?;
        }
    }
    Ok(area)
}

/// MXCSR.
pub fn mxcsr(cpu: &Cpu) -> Result<u32, Stop> {
    cpu.xsave.as_deref().map(|state| u32_at(state, MXCSR)).ok_or(Stop::Unsupported)
}

/// `ldmxcsr`: #GP if a reserved bit is set.
pub fn set_mxcsr(cpu: &mut Cpu, value: u32) -> Result<(), Stop> {
    let state = cpu.xsave.as_mut().ok_or(Stop::Unsupported)?;
    if value & !mxcsr_mask(state) != 0 {
        return Err(Stop::Exception(Exception::GeneralProtection));
    }
    state[MXCSR].copy_from_slice(&value.to_le_bytes());
    let in_use = u64_at(state, XSTATE_BV) | SSE;
    set_header(state, in_use);
    cpu.xsave_changed = true;
    Ok(())
}

/// `emms`: all x87 registers are empty. In this format a bit of the abridged tag word is set for each that is not.
pub fn empty_x87(cpu: &mut Cpu) -> Result<(), Stop> {
    const ABRIDGED_TAGS: usize = 4;
    change_x87(cpu, |state| state[ABRIDGED_TAGS] = 0)
}

/// `fnclex`: clears the exception flags, the busy flag and the stack fault of the status word.
pub fn clear_x87_exceptions(cpu: &mut Cpu) -> Result<(), Stop> {
    const STATUS: usize = 2;
    change_x87(cpu, |state| {
        state[STATUS] = 0;
        state[STATUS + 1] &= 0x7f;
    })
}

fn change_x87(cpu: &mut Cpu, change: impl FnOnce(&mut [u8])) -> Result<(), Stop> {
    let state = cpu.xsave.as_mut().ok_or(Stop::Unsupported)?;
    change(state);
    let in_use = u64_at(state, XSTATE_BV) | X87;
    set_header(state, in_use);
    cpu.xsave_changed = true;
    Ok(())
}

/// The bits of MXCSR that are not reserved.
fn mxcsr_mask(state: &[u8]) -> u32 {
    match u32_at(state, MXCSR.end..MXCSR_AND_MASK.end) {
        0 => DEFAULT_MXCSR_MASK,
        mask => mask,
    }
}

fn initial_state(len: usize) -> Vec<u8> {
    let mut state = vec![0; len];
    state[..2].copy_from_slice(&INITIAL_FCW.to_le_bytes());
    state[MXCSR].copy_from_slice(&INITIAL_MXCSR.to_le_bytes());
    state
}

fn set_header(state: &mut [u8], in_use: u64) {
    state[XSTATE_BV].copy_from_slice(&in_use.to_le_bytes());
    state[HEADER_ZEROES].fill(0);
}

fn u64_at(bytes: &[u8], range: Range<usize>) -> u64 {
    bytes[range].iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

fn u32_at(bytes: &[u8], range: Range<usize>) -> u32 {
    u64_at(bytes, range) as u32
}

#[cfg(test)]
mod tests;
