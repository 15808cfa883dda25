//! The processor's state that an instruction works on, and the exceptions that it may raise.

use super::xsave::Layout;
use iced_x86::Register;
use kvm_bindings::{kvm_regs, kvm_sregs};

/// Control register bits (Intel SDM volume 3, 2.5).
pub mod bits {
    #![allow(missing_docs)]
    pub const CR0_PE: u64 = 1;
    pub const CR0_TS: u64 = 1 << 3;
    pub const CR0_WP: u64 = 1 << 16;
    pub const CR0_PG: u64 = 1 << 31;
    pub const CR4_PAE: u64 = 1 << 5;
    pub const CR4_LA57: u64 = 1 << 12;
    pub const CR4_OSXSAVE: u64 = 1 << 18;
    pub const CR4_SMEP: u64 = 1 << 20;
    pub const CR4_SMAP: u64 = 1 << 21;
    pub const EFER_LMA: u64 = 1 << 10;
    pub const EFER_NXE: u64 = 1 << 11;
    pub const CF: u64 = 1;
    pub const PF: u64 = 1 << 2;
    pub const AF: u64 = 1 << 4;
    pub const ZF: u64 = 1 << 6;
    pub const SF: u64 = 1 << 7;
    pub const RF: u64 = 1 << 16;
    pub const AC: u64 = 1 << 18;
    pub const OF: u64 = 1 << 11;
}

/// An exception (Intel SDM volume 3, 6.15).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exception {
    /// #BP, after `int3`.
    Breakpoint,
    /// #UD.
    InvalidOpcode,
    /// #NM.
    DeviceNotAvailable,
    /// #SS(0).
    StackFault,
    /// #GP(0).
    GeneralProtection,
    /// #PF.
    PageFault {
        /// For CR2.
        address: u64,
        /// What kind of access found what.
        error_code: u32,
    },
}

impl Exception {
    /// Its number.
    pub fn vector(self) -> u8 {
        match self {
            Self::Breakpoint => 3,
            Self::InvalidOpcode => 6,
            Self::DeviceNotAvailable => 7,
            Self::StackFault => 12,
            Self::GeneralProtection => 13,
            Self::PageFault { .. } => 14,
        }
    }

    /// Its error code, if it has one.
    pub fn error_code(self) -> Option<u32> {
        match self {
            Self::StackFault | Self::GeneralProtection => Some(0),
            Self::PageFault { error_code, .. } => Some(error_code),
            _ => None,
        }
    }
}

/// The state of one vCPU.
#[derive(Debug, Clone)]
pub struct Cpu {
    /// General registers, RIP and RFLAGS.
    pub regs: kvm_regs,
    /// Segments and control registers.
    pub sregs: kvm_sregs,
    /// Whether an instruction changed `sregs`.
    pub sregs_changed: bool,
    /// IA32_TSC_AUX, for the instruction that needs it.
    pub tsc_aux: Option<u64>,
    /// Which components of the vector state the guest manages. Only with `xsave`.
    pub xcr0: u64,
    /// The vector state as `XSAVE` has it, for instructions that need it.
    pub xsave: Option<Vec<u8>>,
    /// Whether an instruction changed it.
    pub xsave_changed: bool,
    /// Where its components lie. Only with `xsave`.
    pub layout: Layout,
    /// A trap that the completed instruction raises.
    pub exception: Option<Exception>,
}

impl Cpu {
    /// A vCPU without vector state.
    pub fn new(regs: kvm_regs, sregs: kvm_sregs) -> Self {
        Self {
            regs,
            sregs,
            sregs_changed: false,
            tsc_aux: None,
            xcr0: 1,
            xsave: None,
            xsave_changed: false,
            layout: Layout::default(),
            exception: None,
        }
    }

    /// Current privilege level.
    pub fn cpl(&self) -> u8 {
        if self.sregs.cr0 & bits::CR0_PE == 0 { 0 } else { self.sregs.ss.dpl }
    }

    /// In 64-bit mode, 32-bit, or 16-bit code.
    pub fn bits(&self) -> u32 {
        match (self.sregs.efer & bits::EFER_LMA != 0 && self.sregs.cs.l != 0, self.sregs.cs.db != 0) {
            (true, _) => 64,
            (false, true) => 32,
            (false, false) => 16,
        }
    }

    /// The value of a general register of any size.
    pub fn get(&self, register: Register) -> Option<u64> {
        let shift = if is_high_byte(register) { 8 } else { 0 };
        let mask = size_mask(register.size());
        let mut regs = self.regs;
        full(&mut regs, register).map(|r| (*r >> shift) & mask)
    }

    /// Sets a general register of any size: 32 bits clear the upper half, fewer leave the rest (SDM volume 1, 3.4.1.1).
    pub fn set(&mut self, register: Register, value: u64) -> Option<()> {
        let shift = if is_high_byte(register) { 8 } else { 0 };
        let size = register.size();
        let full = full(&mut self.regs, register)?;
        *full = match size {
            8 => value,
            4 => value & 0xffff_ffff,
            _ => {
                let mask = size_mask(size) << shift;
                (*full & !mask) | ((value << shift) & mask)
            }
        };
        Some(())
    }

    /// Base of a segment; in 64-bit mode only FS and GS have one.
    pub fn segment_base(&self, register: Register) -> u64 {
        let s = &self.sregs;
        match register {
            Register::FS => s.fs.base,
            Register::GS => s.gs.base,
            _ if self.bits() == 64 => 0,
            Register::CS => s.cs.base,
            Register::SS => s.ss.base,
            Register::ES => s.es.base,
            _ => s.ds.base,
        }
    }

    /// Sets or clears flags.
    pub fn set_flags(&mut self, flags: u64, on: bool) {
        if on {
            self.regs.rflags |= flags;
        } else {
            self.regs.rflags &= !flags;
        }
    }
}

/// The whole 64-bit register that `register` is a part of.
fn full(r: &mut kvm_regs, register: Register) -> Option<&mut u64> {
    Some(match register.full_register() {
        Register::RAX => &mut r.rax,
        Register::RCX => &mut r.rcx,
        Register::RDX => &mut r.rdx,
        Register::RBX => &mut r.rbx,
        Register::RSP => &mut r.rsp,
        Register::RBP => &mut r.rbp,
        Register::RSI => &mut r.rsi,
        Register::RDI => &mut r.rdi,
        Register::R8 => &mut r.r8,
        Register::R9 => &mut r.r9,
        Register::R10 => &mut r.r10,
        Register::R11 => &mut r.r11,
        Register::R12 => &mut r.r12,
        Register::R13 => &mut r.r13,
        Register::R14 => &mut r.r14,
        Register::R15 => &mut r.r15,
        _ => return None,
    })
}

/// All bits of so many bytes.
pub fn size_mask(bytes: usize) -> u64 {
    if bytes >= 8 { u64::MAX } else { (1 << (8 * bytes)) - 1 }
}

fn is_high_byte(register: Register) -> bool {
    matches!(register, Register::AH | Register::BH | Register::CH | Register::DH)
}
