//! Walks the guest's page tables for a memory operand, as the processor would (Intel SDM volume 3, chapter 4): permissions
//! are checked, accessed and dirty bits set, and what fails is a #PF with the right error code.

use super::cpu::{Cpu, Exception, bits};
use super::execute::Stop;
use crate::memory::GuestMemory;
use std::sync::atomic::{AtomicU64, Ordering};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileMemory};

/// Bytes of a page.
pub const PAGE: u64 = 4096;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
/// The address in an entry.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Bits of a #PF error code.
mod code {
    pub(super) const PRESENT: u32 = 1;
    pub(super) const WRITE: u32 = 1 << 1;
    pub(super) const USER: u32 = 1 << 2;
    pub(super) const RESERVED: u32 = 1 << 3;
    pub(super) const FETCH: u32 = 1 << 4;
}

/// What memory is accessed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// To read data.
    Read,
    /// To write, or to read and write.
    Write,
    /// To fetch an instruction.
    Fetch,
}

/// Reads `data.len()` bytes at a linear address, which may cross pages.
///
/// # Errors
/// #PF or #GP, or a physical address that is not memory.
pub fn read(cpu: &Cpu, memory: &GuestMemory, address: u64, data: &mut [u8], access: Access) -> Result<(), Stop> {
    for (linear, range) in pages(address, data.len()) {
        let physical = translate(cpu, memory, linear, access, Mark::Yes)?;
        memory.read_slice(&mut data[range], GuestAddress(physical)).map_err(|_| Stop::NotMemory(physical))?;
    }
    Ok(())
}

/// Checks that `len` bytes at a linear address can be accessed, and changes nothing.
///
/// # Errors
/// As [`read`].
pub fn check(cpu: &Cpu, memory: &GuestMemory, address: u64, len: usize, access: Access) -> Result<(), Stop> {
    for (linear, range) in pages(address, len) {
        let physical = translate(cpu, memory, linear, access, Mark::No)?;
        if !memory.check_range(GuestAddress(physical), range.len()) {
            return Err(Stop::NotMemory(physical));
        }
    }
    Ok(())
}

/// Writes `data` at a linear address, which may cross pages: all of it or, if a page cannot be written, nothing.
///
/// # Errors
/// As [`read`].
pub fn write(cpu: &Cpu, memory: &GuestMemory, address: u64, data: &[u8]) -> Result<(), Stop> {
    check(cpu, memory, address, data.len(), Access::Write)?;
    for (linear, range) in pages(address, data.len()) {
        let physical = translate(cpu, memory, linear, Access::Write, Mark::Yes)?;
        memory.write_slice(&data[range], GuestAddress(physical)).map_err(|_| Stop::NotMemory(physical))?;
    }
    Ok(())
}

/// The parts of an access that lie in one page each: linear address, and range of the data.
fn pages(address: u64, len: usize) -> impl Iterator<Item = (u64, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done >= len {
            return None;
        }
        let linear = address.wrapping_add(done as u64);
        let in_page = usize::try_from(PAGE - linear % PAGE).unwrap_or(0).min(len - done);
        let range = done..done + in_page;
        done += in_page;
        Some((linear, range))
    })
}

/// Whether a walk sets accessed and dirty bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    /// It does.
    Yes,
    /// It only looks.
    No,
}

/// The guest-physical address behind a linear one.
///
/// # Errors
/// #PF; #GP if the address is not canonical; page tables that are not in memory; paging without long mode.
pub fn translate(cpu: &Cpu, memory: &GuestMemory, linear: u64, access: Access, mark: Mark) -> Result<u64, Stop> {
    let s = &cpu.sregs;
    if s.cr0 & bits::CR0_PG == 0 {
        return Ok(linear & 0xffff_ffff);
    }
    if s.efer & bits::EFER_LMA == 0 {
        // No kernel that is entered in long mode pages without it when it needs an assist.
        return Err(Stop::Unsupported);
    }
    if !is_canonical(cpu, linear) {
        return Err(Stop::Exception(Exception::GeneralProtection));
    }
    let levels = levels(cpu);
    let walk = Walk { cpu, memory, linear, access };
    let mut entries = Vec::with_capacity(5);
    let mut table = s.cr3 & ADDRESS;
    let (mut writable, mut user, mut executable) = (true, true, true);
    let mut level = levels;
    let physical = loop {
        let shift = 12 + 9 * (level - 1);
        let slot = table + (linear >> shift & 0x1ff) * 8;
        let entry = walk.load(slot)?;
        if entry & PRESENT == 0 {
            return Err(walk.fault(0));
        }
        let large = entry & LARGE != 0 && (level == 2 || level == 3);
        if walk.reserved(entry, level, large) {
            return Err(walk.fault(code::PRESENT | code::RESERVED));
        }
        writable &= entry & WRITABLE != 0;
        user &= entry & USER != 0;
        executable &= s.efer & bits::EFER_NXE == 0 || entry & NO_EXECUTE == 0;
        entries.push(slot);
        if level == 1 || large {
            let offset = (1u64 << shift) - 1;
            break entry & ADDRESS & !offset | linear & offset;
        }
        table = entry & ADDRESS;
        level -= 1;
    };
    if !walk.allowed(writable, user, executable) {
        return Err(walk.fault(code::PRESENT));
    }
    if mark == Mark::Yes {
        for (index, slot) in entries.iter().enumerate() {
            let leaf = index + 1 == entries.len();
            let flags = ACCESSED | if leaf && access == Access::Write { DIRTY } else { 0 };
            walk.set(*slot, flags)?;
        }
    }
    Ok(physical)
}

/// Levels of page tables.
fn levels(cpu: &Cpu) -> u32 {
    if cpu.sregs.cr4 & bits::CR4_LA57 != 0 { 5 } else { 4 }
}

/// Whether the upper bits of an address are copies of the highest one that is translated. Outside of 64-bit mode it
/// always is.
pub fn is_canonical(cpu: &Cpu, linear: u64) -> bool {
    let unused = 64 - (12 + 9 * levels(cpu));
    cpu.bits() != 64 || ((linear << unused) as i64 >> unused) as u64 == linear
}

struct Walk<'a> {
    cpu: &'a Cpu,
    memory: &'a GuestMemory,
    linear: u64,
    access: Access,
}

impl Walk<'_> {
    fn load(&self, slot: u64) -> Result<u64, Stop> {
        self.memory.load(GuestAddress(slot), Ordering::Acquire).map_err(|_| Stop::NotMemory(slot))
    }

    /// Sets flags of an entry, atomically as the processor does.
    fn set(&self, slot: u64, flags: u64) -> Result<(), Stop> {
        let not_memory = || Stop::NotMemory(slot);
        let slice = self.memory.get_slice(GuestAddress(slot), 8).map_err(|_| not_memory())?;
        let entry = slice.get_atomic_ref::<AtomicU64>(0).map_err(|_| not_memory())?;
        if entry.load(Ordering::Relaxed) & flags != flags {
            entry.fetch_or(flags, Ordering::AcqRel);
        }
        Ok(())
    }

    fn user_mode(&self) -> bool {
        self.cpu.cpl() == 3
    }

    /// SDM volume 3, 4.6.1.
    fn allowed(&self, writable: bool, user: bool, executable: bool) -> bool {
        let s = &self.cpu.sregs;
        if self.user_mode() {
            return match self.access {
                Access::Read => user,
                Access::Write => user && writable,
                Access::Fetch => user && executable,
            };
        }
        let smap = user && s.cr4 & bits::CR4_SMAP != 0 && self.cpu.regs.rflags & bits::AC == 0;
        match self.access {
            Access::Read => !smap,
            Access::Write => !smap && (writable || s.cr0 & bits::CR0_WP == 0),
            Access::Fetch => executable && !(user && s.cr4 & bits::CR4_SMEP != 0),
        }
    }

    /// SDM volume 3, 4.5.5, as far as it does not depend on the processor's address width.
    fn reserved(&self, entry: u64, level: u32, large: bool) -> bool {
        let no_nx = entry & NO_EXECUTE != 0 && self.cpu.sregs.efer & bits::EFER_NXE == 0;
        let top = level >= 4 && entry & LARGE != 0;
        // Bits between the flags and the address of a large page; bit 12 is PAT.
        let alignment = large && entry & ((1 << (12 + 9 * (level - 1))) - 1) & ADDRESS & !(1 << 12) != 0;
        no_nx || top || alignment
    }

    fn fault(&self, found: u32) -> Stop {
        let s = &self.cpu.sregs;
        let mut error_code = found;
        if self.access == Access::Write {
            error_code |= code::WRITE;
        }
        if self.user_mode() {
            error_code |= code::USER;
        }
        let fetch_is_told = s.efer & bits::EFER_NXE != 0 || s.cr4 & bits::CR4_SMEP != 0;
        if self.access == Access::Fetch && fetch_is_told {
            error_code |= code::FETCH;
        }
        Stop::Exception(Exception::PageFault { address: self.linear, error_code })
    }
}

#[cfg(test)]
mod tests;
