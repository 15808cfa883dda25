//! Device rules as a BPF_PROG_TYPE_CGROUP_DEVICE program.
//!
//! The kernel asks with a kind of device, its numbers and a set of kinds of access. For each kind of access the last rule that speaks of it
//! decides; what no rule speaks of is denied.
#![allow(unsafe_code)] // bpf(2).
use crate::{
    error::{Context, Result, error},
    sys,
};
use alloc::{format, string::String, vec::Vec};
use caisson_agent_protocol::{DeviceRule, ErrorKind};
use rustix::fd::{AsRawFd, BorrowedFd, OwnedFd};

/// The most rules that are taken; a container has some twenty.
const MAX_RULES: usize = 256;

// Registers. R1 is the context; R0 is the answer.
const R0: u8 = 0;
const CONTEXT: u8 = 1;
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;

// Operation codes, from linux/bpf.h: class | operation | source.
const LOAD_32: u8 = 0x61;
const MOVE_32: u8 = 0xb4;
const MOVE_32_FROM: u8 = 0xbc;
const AND_32: u8 = 0x54;
const SHIFT_RIGHT_32: u8 = 0x74;
const JUMP_IF_NOT_32: u8 = 0x56;
const JUMP_IF_32: u8 = 0x16;
const EXIT: u8 = 0x95;

// From linux/bpf.h too.
const PROG_LOAD: u32 = 5;
const PROG_ATTACH: u32 = 8;
const PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const ATTACH_CGROUP_DEVICE: u32 = 6;
const ALLOW_MULTI: u32 = 2;
const REPLACE: u32 = 4;
const DEVICE_BLOCK: i32 = 1;
const DEVICE_CHAR: i32 = 2;
const ALL_ACCESS: u8 = 7;
const MKNOD: u8 = 1;

/// An instruction: operation, destination, source, offset of a jump, constant.
#[derive(Debug, Clone, Copy)]
struct Instruction {
    operation: u8,
    destination: u8,
    source: u8,
    offset: i16,
    constant: i32,
}

impl Instruction {
    const fn new(operation: u8, destination: u8, source: u8, constant: i32) -> Self {
        Self { operation, destination, source, offset: 0, constant }
    }

    /// As the kernel reads it.
    const fn encode(self) -> u64 {
        let [o0, o1] = self.offset.to_le_bytes();
        let [c0, c1, c2, c3] = self.constant.to_le_bytes();
        u64::from_le_bytes([self.operation, self.destination | self.source << 4, o0, o1, c0, c1, c2, c3])
    }
}

/// The program for rules.
fn compile(rules: &[DeviceRule]) -> Vec<Instruction> {
    let load = |register, field: i16| Instruction { offset: field, ..Instruction::new(LOAD_32, register, CONTEXT, 0) };
    let mut program = Vec::from([
        load(KIND, 0),
        Instruction::new(MOVE_32_FROM, ACCESS, KIND, 0),
        Instruction::new(SHIFT_RIGHT_32, ACCESS, 0, 16),
        Instruction::new(AND_32, KIND, 0, 0xffff),
        load(MAJOR, 4),
        load(MINOR, 8),
    ]);
    for rule in rules.iter().rev() {
        let start = program.len();
        let access = rule.access & ALL_ACCESS;
        let kind = match rule.kind {
            b'b' => Some(DEVICE_BLOCK),
            b'c' => Some(DEVICE_CHAR),
            _ => None,
        };
        let conditions =
            [(KIND, kind), (MAJOR, rule.major.map(u32::cast_signed)), (MINOR, rule.minor.map(u32::cast_signed))];
        for (register, value) in conditions {
            if let Some(value) = value {
                program.push(Instruction::new(JUMP_IF_NOT_32, register, 0, value));
            }
        }
        let decides_all = access == ALL_ACCESS;
        if rule.allow {
            // What this rule allows need not be allowed by an earlier one.
            program.push(Instruction::new(AND_32, ACCESS, 0, i32::from(!access & ALL_ACCESS)));
            if !decides_all {
                program.push(Instruction::new(JUMP_IF_NOT_32, ACCESS, 0, 0));
            }
            program.push(Instruction::new(MOVE_32, R0, 0, 1));
        } else {
            if !decides_all {
                program.push(Instruction::new(MOVE_32_FROM, R0, ACCESS, 0));
                program.push(Instruction::new(AND_32, R0, 0, i32::from(access)));
                program.push(Instruction::new(JUMP_IF_32, R0, 0, 0));
            }
            program.push(Instruction::new(MOVE_32, R0, 0, 0));
        }
        program.push(Instruction::new(EXIT, 0, 0, 0));
        // All jumps go on to the next rule.
        let end = program.len();
        for (at, instruction) in program.iter_mut().enumerate().skip(start) {
            if matches!(instruction.operation, JUMP_IF_NOT_32 | JUMP_IF_32) {
                // A rule has at most ten instructions.
                instruction.offset = i16::try_from(end - at - 1).unwrap_or(0);
            }
        }
        // A rule for everything leaves nothing for earlier ones, and the kernel refuses code that is never reached.
        if decides_all && conditions.iter().all(|(_, value)| value.is_none()) {
            return program;
        }
    }
    program.push(Instruction::new(MOVE_32, R0, 0, 0));
    program.push(Instruction::new(EXIT, 0, 0, 0));
    program
}

/// What every container is allowed, as in runc, whatever its rules say: its own terminals and the specification's default devices. None is
/// any number.
const ALWAYS_ALLOWED: [(u32, Option<u32>); 8] =
    [(1, Some(3)), (1, Some(5)), (1, Some(7)), (1, Some(8)), (1, Some(9)), (5, Some(0)), (5, Some(2)), (136, None)];

/// The rules with those for devices that are always allowed. Nodes of any kind can be made, though not be opened.
fn with_defaults(rules: &[DeviceRule]) -> Vec<DeviceRule> {
    let allow = |kind, major, minor, access| DeviceRule { allow: true, kind, major, minor, access };
    let mut all = rules.to_vec();
    all.extend([allow(b'c', None, None, MKNOD), allow(b'b', None, None, MKNOD)]);
    all.extend(ALWAYS_ALLOWED.map(|(major, minor)| allow(b'c', Some(major), minor, ALL_ACCESS)));
    all
}

/// Loads the program for rules into the kernel.
pub(crate) fn load(rules: &[DeviceRule]) -> Result<OwnedFd> {
    if rules.len() > MAX_RULES {
        return Err(error(ErrorKind::Invalid, format!("{} device rules are more than {MAX_RULES}", rules.len())));
    }
    let program: Vec<u64> = compile(&with_defaults(rules)).into_iter().map(Instruction::encode).collect();
    let count = u32::try_from(program.len()).unwrap_or(u32::MAX);
    // prog_type and insn_cnt, insns, license; the rest is zero.
    let mut attributes = [0; 9];
    attributes[0] = words(PROG_TYPE_CGROUP_DEVICE, count);
    attributes[1] = program.as_ptr() as u64;
    attributes[2] = c"Apache-2.0".as_ptr() as u64;
    // SAFETY: the program is as long as it says, and the license a string.
    unsafe { sys::bpf_open(PROG_LOAD, &attributes) }.context(|| String::from("loading the device rules' BPF program"))
}

/// Puts a loaded program in force for a cgroup, instead of another one if there is one.
pub(crate) fn attach(
    cgroup: BorrowedFd<'_>,
    program: BorrowedFd<'_>,
    instead_of: Option<BorrowedFd<'_>>,
) -> Result<()> {
    let number = |fd: BorrowedFd<'_>| fd.as_raw_fd().cast_unsigned();
    let flags = if instead_of.is_some() { ALLOW_MULTI | REPLACE } else { ALLOW_MULTI };
    // target_fd and attach_bpf_fd, attach_type and attach_flags, replace_bpf_fd.
    let attributes = [
        words(number(cgroup), number(program)),
        words(ATTACH_CGROUP_DEVICE, flags),
        instead_of.map_or(0, |fd| words(number(fd), 0)),
    ];
    // SAFETY: no pointers.
    unsafe { sys::bpf(PROG_ATTACH, &attributes) }
        .context(|| String::from("attaching the device rules to the cgroup"))
        .map(drop)
}

const fn words(low: u32, high: u32) -> u64 {
    low as u64 | (high as u64) << 32
}

#[cfg(test)]
mod tests;
