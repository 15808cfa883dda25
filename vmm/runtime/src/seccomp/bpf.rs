//! From rules to a classic BPF program over `struct seccomp_data`.
use std::collections::BTreeMap;

use oci_spec::runtime::LinuxSeccompOperator as Operator;

/// `struct sock_filter`: code, jt, jf, k.
type Instruction = (u16, u8, u8, u32);

const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
const JUMP: u16 = 0x05; // BPF_JMP | BPF_JA
const JUMP_EQ: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const JUMP_GT: u16 = 0x25; // BPF_JMP | BPF_JGT | BPF_K
const JUMP_GE: u16 = 0x35; // BPF_JMP | BPF_JGE | BPF_K
const AND: u16 = 0x54; // BPF_ALU | BPF_AND | BPF_K
const RETURN: u16 = 0x06; // BPF_RET | BPF_K

const OFFSET_NUMBER: u32 = 0;
const OFFSET_ARCHITECTURE: u32 = 4;
const OFFSET_ARGUMENTS: u32 = 16;
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
const RET_KILL_PROCESS: u32 = 0x8000_0000;

/// A comparison of one argument.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Condition {
    pub(super) index: u32,
    pub(super) operator: Operator,
    pub(super) value: u64,
    pub(super) value_two: u64,
}

/// One system call's rules in order; the last may be unconditional.
type Chain = Vec<(Vec<Condition>, u32)>;

/// What to do for each system call.
#[derive(Debug)]
pub(super) struct Rules {
    default: u32,
    chains: BTreeMap<u32, Chain>,
}

impl Rules {
    pub(super) fn new(default: u32) -> Rules {
        Rules { default, chains: BTreeMap::new() }
    }

    /// Adds a rule. An unconditional one replaces the conditional ones of its system call, and nothing comes after it.
    pub(super) fn add(&mut self, number: u32, conditions: Vec<Condition>, verdict: u32) {
        let chain = self.chains.entry(number).or_default();
        if chain.iter().any(|(conditions, _)| conditions.is_empty()) {
            return;
        }
        if conditions.is_empty() {
            chain.clear();
        }
        chain.push((conditions, verdict));
    }

    /// The program. `last` is the highest known number; `beyond` is for the numbers above it.
    pub(super) fn compile(&self, last: u32, beyond: u32) -> Vec<Instruction> {
        let default: Chain = vec![(Vec::new(), self.default)];
        let unknown: Chain = vec![(Vec::new(), beyond)];
        // Ranges of numbers that are treated alike, by their first number.
        let mut ranges: Vec<(u32, &Chain)> = Vec::new();
        let mut next = 0;
        for (&number, chain) in &self.chains {
            if number > next {
                push(&mut ranges, next, &default);
            }
            push(&mut ranges, number, chain);
            next = number + 1;
        }
        if next <= last {
            push(&mut ranges, next, &default);
        }
        push(&mut ranges, last.max(next.saturating_sub(1)) + 1, &unknown);

        let mut program = vec![
            (LOAD, 0, 0, OFFSET_ARCHITECTURE),
            (JUMP_EQ, 1, 0, AUDIT_ARCH_X86_64),
            (RETURN, 0, 0, RET_KILL_PROCESS),
            (LOAD, 0, 0, OFFSET_NUMBER),
        ];
        program.extend(search(&ranges, self.default));
        program
    }
}

/// Begins a range, unless it continues the one before.
fn push<'a>(ranges: &mut Vec<(u32, &'a Chain)>, start: u32, chain: &'a Chain) {
    if ranges.last().is_none_or(|(_, previous)| *previous != chain) {
        ranges.push((start, chain));
    }
}

/// A binary search over the ranges; the accumulator holds the number.
fn search(ranges: &[(u32, &Chain)], default: u32) -> Vec<Instruction> {
    match ranges {
        [] => vec![(RETURN, 0, 0, default)],
        [(_, chain)] => chain_code(chain, default),
        _ => {
            let middle = ranges.len() / 2;
            let left = search(&ranges[..middle], default);
            let right = search(&ranges[middle..], default);
            let start = ranges[middle].0;
            let mut code = Vec::with_capacity(left.len() + right.len() + 2);
            match u8::try_from(left.len()) {
                Ok(skip) => code.push((JUMP_GE, skip, 0, start)),
                Err(_) => code.extend([(JUMP_GE, 0, 1, start), (JUMP, 0, 0, left.len() as u32)]),
            }
            code.extend(left);
            code.extend(right);
            code
        }
    }
}

fn chain_code(chain: &Chain, default: u32) -> Vec<Instruction> {
    let mut code = Vec::new();
    for (conditions, verdict) in chain {
        code.extend(rule_code(conditions, *verdict));
        if conditions.is_empty() {
            return code;
        }
    }
    code.push((RETURN, 0, 0, default));
    code
}

/// A jump's target within one comparison.
#[derive(Clone, Copy)]
enum To {
    Next,
    Pass,
    Fail,
}

/// All conditions hold: return the verdict; else go on behind this code. At most six conditions of six instructions: jumps fit their byte.
fn rule_code(conditions: &[Condition], verdict: u32) -> Vec<Instruction> {
    let comparisons: Vec<_> = conditions.iter().map(comparison).collect();
    let total: usize = comparisons.iter().map(Vec::len).sum::<usize>() + 1;
    let mut code: Vec<Instruction> = Vec::with_capacity(total);
    for comparison in comparisons {
        let end = code.len() + comparison.len();
        for (operation, on_true, on_false, k) in comparison {
            let here = code.len() + 1;
            let offset = |to| match to {
                To::Next => 0,
                To::Pass => (end - here) as u8,
                To::Fail => (total - here) as u8,
            };
            code.push((operation, offset(on_true), offset(on_false), k));
        }
    }
    code.push((RETURN, 0, 0, verdict));
    code
}

fn comparison(condition: &Condition) -> Vec<(u16, To, To, u32)> {
    use To::{Fail, Next, Pass};
    let low = OFFSET_ARGUMENTS + 8 * condition.index;
    let load_high = (LOAD, Next, Next, low + 4);
    let load_low = (LOAD, Next, Next, low);
    let halves = |value: u64| ((value >> 32) as u32, value as u32);
    let (high, value) = halves(condition.value);
    match condition.operator {
        Operator::ScmpCmpEq => vec![load_high, (JUMP_EQ, Next, Fail, high), load_low, (JUMP_EQ, Next, Fail, value)],
        Operator::ScmpCmpNe => vec![load_high, (JUMP_EQ, Next, Pass, high), load_low, (JUMP_EQ, Fail, Next, value)],
        Operator::ScmpCmpGe => {
            vec![
                load_high,
                (JUMP_GT, Pass, Next, high),
                (JUMP_EQ, Next, Fail, high),
                load_low,
                (JUMP_GE, Next, Fail, value),
            ]
        }
        Operator::ScmpCmpGt => {
            vec![
                load_high,
                (JUMP_GT, Pass, Next, high),
                (JUMP_EQ, Next, Fail, high),
                load_low,
                (JUMP_GT, Next, Fail, value),
            ]
        }
        Operator::ScmpCmpLt => {
            vec![
                load_high,
                (JUMP_GT, Fail, Next, high),
                (JUMP_EQ, Next, Pass, high),
                load_low,
                (JUMP_GE, Fail, Next, value),
            ]
        }
        Operator::ScmpCmpLe => {
            vec![
                load_high,
                (JUMP_GT, Fail, Next, high),
                (JUMP_EQ, Next, Pass, high),
                load_low,
                (JUMP_GT, Fail, Next, value),
            ]
        }
        Operator::ScmpCmpMaskedEq => {
            let (wanted_high, wanted) = halves(condition.value_two);
            vec![
                load_high,
                (AND, Next, Next, high),
                (JUMP_EQ, Next, Fail, wanted_high),
                load_low,
                (AND, Next, Next, value),
                (JUMP_EQ, Next, Fail, wanted),
            ]
        }
    }
}
