//! A processor in 64-bit mode with page tables of its own, for the tests.
#![allow(clippy::unwrap_used)]

use super::cpu::{Cpu, bits};
use super::execute::{Stop, execute};
use crate::memory::{GuestMemory, map};
use iced_x86::{Decoder, DecoderOptions};
use kvm_bindings::{kvm_regs, kvm_sregs};
use vm_memory::{Bytes, GuestAddress};

/// Flags of page-table entries.
pub(crate) const P: u64 = 1;
pub(crate) const W: u64 = 2;
pub(crate) const U: u64 = 4;
pub(crate) const A: u64 = 0x20;
pub(crate) const D: u64 = 0x40;
pub(crate) const PS: u64 = 0x80;
pub(crate) const NX: u64 = 1 << 63;

/// The tables: one of each level, so that linear addresses are below 2 MiB with 4 KiB pages, and below 1 GiB with others.
pub(crate) const LEVEL4: u64 = 0x1000;
pub(crate) const LEVEL3: u64 = 0x2000;
pub(crate) const LEVEL2: u64 = 0x3000;
pub(crate) const LEVEL1: u64 = 0x4000;

/// 2 MiB of memory, and a vCPU at CPL 0 whose page tables map nothing yet.
pub(crate) struct Rig {
    pub(crate) cpu: Cpu,
    pub(crate) memory: GuestMemory,
}

impl Rig {
    pub(crate) fn new() -> Self {
        let memory = map(4, None).unwrap();
        let mut sregs = kvm_sregs {
            cr0: bits::CR0_PE | bits::CR0_PG | bits::CR0_WP,
            cr3: LEVEL4,
            cr4: bits::CR4_PAE | bits::CR4_OSXSAVE,
            efer: bits::EFER_LMA | 1 << 8 | bits::EFER_NXE,
            ..kvm_sregs::default()
        };
        sregs.cs.l = 1;
        let rig = Self { cpu: Cpu::new(kvm_regs::default(), sregs), memory };
        rig.entry(LEVEL4, 0, LEVEL3 | P | W | U);
        rig.entry(LEVEL3, 0, LEVEL2 | P | W | U);
        rig.entry(LEVEL2, 0, LEVEL1 | P | W | U);
        rig
    }

    /// Sets an entry of a table.
    pub(crate) fn entry(&self, table: u64, index: u64, entry: u64) {
        self.memory.write_obj(entry, GuestAddress(table + 8 * index)).unwrap();
    }

    pub(crate) fn get_entry(&self, table: u64, index: u64) -> u64 {
        self.memory.read_obj(GuestAddress(table + 8 * index)).unwrap()
    }

    /// Maps a 4 KiB page.
    pub(crate) fn page(&self, linear: u64, physical: u64, flags: u64) {
        self.entry(LEVEL1, linear / 4096, physical | flags);
    }

    /// Physical memory.
    pub(crate) fn poke(&self, physical: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(physical)).unwrap();
    }

    pub(crate) fn peek(&self, physical: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(physical)).unwrap();
        bytes
    }

    /// Executes one instruction at RIP.
    pub(crate) fn run(&mut self, code: &[u8]) -> Result<(), Stop> {
        let instruction = Decoder::with_ip(64, code, self.cpu.regs.rip, DecoderOptions::NONE).decode();
        assert!(!instruction.is_invalid(), "{code:02x?}");
        assert_eq!(instruction.len(), code.len(), "{code:02x?}");
        execute(&mut self.cpu, &self.memory, &instruction)
    }
}
