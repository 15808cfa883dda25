//! How the first vCPU stands when it enters the kernel: long mode, paging on, flat segments.

use super::layout::{BOOT_PARAMS, GDT, PAGE, PAGE_TABLES, STACK};
use super::{BootError, write};
use crate::memory::GuestMemory;
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

const CR0_PE: u64 = 1;
const CR0_MP: u64 = 1 << 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Always set in RFLAGS.
const RFLAGS_RESERVED: u64 = 2;
/// Selectors `__BOOT_CS` and `__BOOT_DS` of the boot protocol, and their descriptors.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const CODE_DESCRIPTOR: u64 = 0x00af_9b00_0000_ffff;
const DATA_DESCRIPTOR: u64 = 0x00cf_9300_0000_ffff;
const GDT_LIMIT: u16 = 0x1f;
/// Present, writable; and a large page, global bit left clear.
const TABLE_FLAGS: u64 = 0x3;
const LARGE_PAGE_FLAGS: u64 = 0x83;
const LARGE_PAGE: u64 = 2 << 20;

/// Writes the GDT, and page tables that map the first GiB to itself.
///
/// # Errors
/// Guest memory is smaller than that.
pub(crate) fn write_tables(memory: &GuestMemory) -> Result<(), BootError> {
    let gdt = [0, 0, CODE_DESCRIPTOR, DATA_DESCRIPTOR].map(u64::to_le_bytes).concat();
    write(memory, "the GDT", GDT, &gdt)?;
    let (level4, level3, level2) = (PAGE_TABLES, PAGE_TABLES + PAGE, PAGE_TABLES + 2 * PAGE);
    write(memory, "page tables", level4, &(level3 | TABLE_FLAGS).to_le_bytes())?;
    write(memory, "page tables", level3, &(level2 | TABLE_FLAGS).to_le_bytes())?;
    let pages: Vec<u8> = (0..512).flat_map(|i: u64| ((i * LARGE_PAGE) | LARGE_PAGE_FLAGS).to_le_bytes()).collect();
    write(memory, "page tables", level2, &pages)
}

/// General registers for the entry at `rip`: RSI points to the boot parameters.
pub fn registers(rip: u64) -> kvm_regs {
    kvm_regs { rip, rsi: BOOT_PARAMS, rsp: STACK, rflags: RFLAGS_RESERVED, ..kvm_regs::default() }
}

/// Changes the special registers of a vCPU after reset to 64-bit mode.
pub fn set_long_mode(sregs: &mut kvm_sregs) {
    let code = kvm_segment {
        limit: u32::MAX,
        selector: CODE_SELECTOR,
        type_: 0xb,
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..kvm_segment::default()
    };
    let data = kvm_segment { selector: DATA_SELECTOR, type_: 3, l: 0, db: 1, ..code };
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (data, data, data, data, data);
    sregs.gdt.base = GDT;
    sregs.gdt.limit = GDT_LIMIT;
    sregs.cr3 = PAGE_TABLES;
    sregs.cr4 = CR4_PAE;
    sregs.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_PG;
    sregs.efer = EFER_LME | EFER_LMA;
}
