//! The reference is the processor itself: a state is loaded, the instruction executed, and all of it saved again, in one
//! piece of assembly that nothing else can come between.
#![allow(clippy::unwrap_used)]
use super::super::testing::{P, Rig, W};
use super::*;
use proptest::prelude::*;
use std::arch::asm;
use std::arch::x86_64::_xgetbv;

const AREA: usize = 4096;

#[repr(C, align(64))]
#[derive(Clone, PartialEq, Eq)]
struct Area([u8; AREA]);

impl Area {
    fn zeroes() -> Box<Self> {
        Box::new(Self([0; AREA]))
    }
}

/// The components of this processor that programs use, without protection keys, which would break this very program.
fn features() -> u64 {
    if !std::is_x86_feature_detected!("xsave") {
        return 0;
    }
    // SAFETY: XSAVE is enabled.
    let xcr0 = unsafe { xcr0() };
    xcr0 & 0xe7
}

#[target_feature(enable = "xsave")]
unsafe fn xcr0() -> u64 {
    // SAFETY: the caller's promise.
    unsafe { _xgetbv(0) }
}

#[derive(Debug, Clone, Copy)]
enum Operation {
    Save,
    SaveCompacted,
    Restore,
}

/// Loads `state`, executes the operation for `rfbm` on `operand`, and returns all of the state after it.
fn on_hardware(state: &Area, operation: Operation, operand: &mut Area, rfbm: u64) -> Box<Area> {
    let (mut own, mut after) = (Area::zeroes(), Area::zeroes());
    let all = features();
    macro_rules! run {
        ($instruction:literal) => {
            // SAFETY: the areas are aligned and long enough, the processor's own state is saved before and restored
            // after, and no other instruction uses vector registers in between.
            unsafe {
                asm!(
                    "xsave64 [{own}]",
                    "xrstor64 [{state}]",
                    "mov eax, {rfbm:e}",
                    $instruction,
                    "mov eax, {all:e}",
                    "xsave64 [{after}]",
                    "xrstor64 [{own}]",
                    own = in(reg) &raw mut own.0,
                    state = in(reg) &raw const state.0,
                    operand = in(reg) &raw mut operand.0,
                    after = in(reg) &raw mut after.0,
                    rfbm = in(reg) rfbm,
                    all = in(reg) all,
                    inout("eax") all as u32 => _,
                    in("edx") 0,
                )
            }
        };
    }
    match operation {
        Operation::Save => run!("xsave64 [{operand}]"),
        Operation::SaveCompacted => run!("xsavec64 [{operand}]"),
        Operation::Restore => run!("xrstor64 [{operand}]"),
    }
    after
}

fn has_xsavec() -> bool {
    features() != 0 && std::is_x86_feature_detected!("xsavec")
}

/// A valid area in the standard format, with random content.
fn area(seed: &[u8], in_use: u64) -> Box<Area> {
    let mut area = Area::zeroes();
    for (byte, value) in area.0.iter_mut().zip(seed.iter().cycle()) {
        *byte = *value;
    }
    let bytes = &mut area.0;
    // What is reserved, and what this or that processor does not keep: opcode and pointers of the last instruction.
    bytes[..2].copy_from_slice(&(0x27fu16 | u16::from(seed[0] & 0xc) << 8).to_le_bytes());
    bytes[2] = 0;
    bytes[3] &= 0x47;
    bytes[5..24].fill(0);
    let mxcsr = u32::from(seed[1]) << 8 | 0x80;
    bytes[MXCSR].copy_from_slice(&(mxcsr & 0xffbf).to_le_bytes());
    bytes[28..32].fill(0);
    for register in 0..8 {
        bytes[32 + 16 * register + 10..][..6].fill(0);
    }
    bytes[416..EXTENDED].fill(0);
    bytes[XSTATE_BV].copy_from_slice(&in_use.to_le_bytes());
    area
}

/// A vCPU with this state, whose operand lies across pages that are not neighbours, at linear 0x5f40.
fn rig(state: &Area) -> Rig {
    let mut rig = Rig::new();
    for (page, frame) in [(5, 0x10_0000), (6, 0x13_0000)] {
        rig.page(page * 4096, frame, P | W);
    }
    rig.cpu.xcr0 = features();
    rig.cpu.layout = Layout::of_host();
    rig.cpu.xsave = Some(state.0.to_vec());
    rig.cpu.regs.rdi = OPERAND;
    rig
}

const OPERAND: u64 = 0x5f40;
const IN_FIRST_PAGE: usize = 0xc0;

fn poke(rig: &Rig, bytes: &[u8]) {
    rig.poke(0x10_0f40, &bytes[..IN_FIRST_PAGE]);
    rig.poke(0x13_0000, &bytes[IN_FIRST_PAGE..AREA - 512]);
}

fn peek(rig: &Rig) -> Vec<u8> {
    let mut bytes = rig.peek(0x10_0f40, IN_FIRST_PAGE);
    bytes.extend(rig.peek(0x13_0000, AREA - 512 - IN_FIRST_PAGE));
    bytes
}

/// The architectural content: header left out, as processors differ in which components they report in their initial state.
fn content(bytes: &[u8]) -> Vec<u8> {
    let layout = Layout::of_host();
    let mut content = Vec::new();
    for range in [X87_CONTROL, X87_REGISTERS, MXCSR, XMM] {
        content.extend_from_slice(&bytes[range]);
    }
    for (_, range) in layout.of(features()) {
        content.extend_from_slice(&bytes[range]);
    }
    content
}

const XSAVE64: [u8; 4] = [0x48, 0x0f, 0xae, 0x27];
const XSAVEC64: [u8; 4] = [0x48, 0x0f, 0xc7, 0x27];
const XRSTOR64: [u8; 4] = [0x48, 0x0f, 0xae, 0x2f];

proptest! {
    #[test]
    fn saving_is_as_on_hardware(seed in prop::collection::vec(any::<u8>(), 61), junk in 0u8.., in_use in 0u64..256, rfbm in 0u64..256) {
        prop_assume!(features() != 0);
        let loaded = area(&seed, in_use & features());
        let mut operand = Area::zeroes();
        operand.0.fill(junk);
        // What the processor says of its state after the load is what KVM would give.
        let state = on_hardware(&loaded, Operation::Save, &mut operand, rfbm);
        let mut rig = rig(&state);
        poke(&rig, &[junk; AREA]);
        rig.cpu.regs.rax = rfbm;
        rig.run(&XSAVE64).unwrap();
        prop_assert!(peek(&rig) == operand.0[..AREA - 512]);
        prop_assert!(!rig.cpu.xsave_changed);
    }

    #[test]
    fn saving_compacted_is_as_on_hardware(seed in prop::collection::vec(any::<u8>(), 61), junk in 0u8.., in_use in 0u64..256, rfbm in 0u64..256) {
        prop_assume!(has_xsavec());
        let loaded = area(&seed, in_use & features());
        let mut operand = Area::zeroes();
        operand.0.fill(junk);
        let state = on_hardware(&loaded, Operation::SaveCompacted, &mut operand, rfbm);
        let mut rig = rig(&state);
        poke(&rig, &[junk; AREA]);
        rig.cpu.regs.rax = rfbm;
        rig.run(&XSAVEC64).unwrap();
        let got = peek(&rig);
        let differs: Vec<_> = (0..AREA - 512).filter(|&i| got[i] != operand.0[i]).map(|i| (i, got[i], operand.0[i])).collect();
        prop_assert!(differs.is_empty(), "offset, supplied, hardware: {differs:?}");
    }

    #[test]
    fn restoring_is_as_on_hardware(
        seeds in prop::collection::vec(any::<u8>(), 122), before in 0u64..256, in_use in 0u64..256, rfbm in 0u64..256,
    ) {
        prop_assume!(features() != 0);
        let loaded = area(&seeds[..61], before & features());
        let mut operand = area(&seeds[61..], in_use & features());
        let state = on_hardware(&loaded, Operation::Save, &mut Area::zeroes(), 0);
        let after = on_hardware(&loaded, Operation::Restore, &mut operand, rfbm);
        let mut rig = rig(&state);
        poke(&rig, &operand.0);
        rig.cpu.regs.rax = rfbm;
        rig.run(&XRSTOR64).unwrap();
        prop_assert!(content(rig.cpu.xsave.as_deref().unwrap()) == content(&after.0));
        prop_assert!(rig.cpu.xsave_changed);
    }

    #[test]
    fn restoring_compacted_is_as_on_hardware(
        seeds in prop::collection::vec(any::<u8>(), 122), before in 0u64..256, saved in 0u64..256, rfbm in 0u64..256,
    ) {
        prop_assume!(has_xsavec());
        let mut operand = Area::zeroes();
        on_hardware(&area(&seeds[61..], features()), Operation::SaveCompacted, &mut operand, saved);
        let loaded = area(&seeds[..61], before & features());
        let state = on_hardware(&loaded, Operation::Save, &mut Area::zeroes(), 0);
        let after = on_hardware(&loaded, Operation::Restore, &mut operand, rfbm);
        let mut rig = rig(&state);
        poke(&rig, &operand.0);
        rig.cpu.regs.rax = rfbm;
        rig.run(&XRSTOR64).unwrap();
        prop_assert!(content(rig.cpu.xsave.as_deref().unwrap()) == content(&after.0));
    }
}

#[test]
fn malformed_areas_are_protection_faults() {
    if features() == 0 {
        return;
    }
    const PROTECTION: Stop = Stop::Exception(Exception::GeneralProtection);
    let good = area(&[1; 61], 3);
    let refused = |change: &dyn Fn(&mut [u8])| {
        let mut operand = good.clone();
        change(&mut operand.0);
        let mut rig = rig(&good);
        poke(&rig, &operand.0);
        rig.cpu.regs.rax = features();
        let stop = rig.run(&XRSTOR64);
        assert_eq!(rig.cpu.regs.rip, if stop.is_ok() { 4 } else { 0 });
        stop
    };
    assert_eq!(refused(&|_| {}), Ok(()));
    assert_eq!(refused(&|a| a[HEADER + 7] = 0x40), Err(PROTECTION)); // a component that is not enabled
    assert_eq!(refused(&|a| a[HEADER + 8] = 1), Err(PROTECTION)); // XCOMP_BV without its bit 63
    assert_eq!(refused(&|a| a[HEADER + 16] = 1), Err(PROTECTION)); // reserved
    assert_eq!(refused(&|a| a[MXCSR.end - 1] = 0x80), Err(PROTECTION)); // a reserved bit of MXCSR
    assert_eq!(refused(&|a| a[HEADER + 15] = 0x80), Err(PROTECTION)); // compacted, without the components in use
    let mut rig = rig(&good);
    rig.cpu.regs.rdi = OPERAND + 8;
    assert_eq!(rig.run(&XRSTOR64), Err(PROTECTION));
    assert_eq!(rig.run(&XSAVE64), Err(PROTECTION));
}

#[test]
fn the_state_is_guarded_by_control_bits() {
    let mut rig = rig(&area(&[1; 61], 3));
    rig.cpu.sregs.cr0 |= super::super::cpu::bits::CR0_TS;
    assert_eq!(rig.run(&XSAVE64), Err(Stop::Exception(Exception::DeviceNotAvailable)));
    rig.cpu.sregs.cr0 = 0x8001_0001;
    rig.cpu.sregs.cr4 &= !super::super::cpu::bits::CR4_OSXSAVE;
    assert_eq!(rig.run(&XSAVE64), Err(Stop::Exception(Exception::InvalidOpcode)));
}

#[test]
fn a_save_that_faults_on_its_second_page_writes_nothing() {
    if features() == 0 {
        return;
    }
    let mut rig = rig(&area(&[1; 61], 3));
    rig.page(0x6000, 0x13_0000, P);
    rig.cpu.regs.rax = features();
    let stop = rig.run(&XSAVE64);
    assert_eq!(stop, Err(Stop::Exception(Exception::PageFault { address: 0x6000, error_code: 3 })));
    assert!(peek(&rig).iter().all(|&b| b == 0));
}

#[test]
fn control_and_status_registers() {
    let mut rig = rig(&area(&[0; 61], 0));
    rig.poke(0x10_0f40, &0x1fa0u32.to_le_bytes());
    rig.run(&[0x0f, 0xae, 0x17]).unwrap(); // ldmxcsr [rdi]
    assert_eq!(mxcsr(&rig.cpu).unwrap(), 0x1fa0);
    rig.poke(0x10_0f40, &[0; 4]);
    rig.run(&[0x0f, 0xae, 0x1f]).unwrap(); // stmxcsr [rdi]
    assert_eq!(rig.peek(0x10_0f40, 4), 0x1fa0u32.to_le_bytes());
    rig.poke(0x10_0f40, &u32::MAX.to_le_bytes());
    assert_eq!(rig.run(&[0x0f, 0xae, 0x17]), Err(Stop::Exception(Exception::GeneralProtection)));
    rig.cpu.regs.rcx = 0;
    rig.cpu.xcr0 = 0x1_0000_0007;
    rig.run(&[0x0f, 0x01, 0xd0]).unwrap(); // xgetbv
    assert_eq!((rig.cpu.regs.rax, rig.cpu.regs.rdx), (7, 1));
    rig.cpu.regs.rcx = 5;
    assert_eq!(rig.run(&[0x0f, 0x01, 0xd0]), Err(Stop::Exception(Exception::GeneralProtection)));
}
