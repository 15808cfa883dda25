#![allow(clippy::unwrap_used)]
use super::super::testing::{P, Rig, W};
use super::*;
use proptest::prelude::*;
use std::arch::asm;

/// What the processor itself makes of it: destination, and the flags.
fn on_hardware(mnemonic: Mnemonic, size: u32, before: u64, source: u64) -> (u64, u64) {
    let (mut destination, flags): (u64, u64);
    macro_rules! run {
        ($instruction:literal) => {{
            destination = before;
            // SAFETY: works on registers only, and leaves the stack as it was.
            unsafe { asm!($instruction, "pushfq", "pop {f}", d = inout(reg) destination, s = in(reg) source, f = out(reg) flags) }
        }};
    }
    match (mnemonic, size) {
        (Mnemonic::Popcnt, 2) => run!("popcnt {d:x}, {s:x}"),
        (Mnemonic::Popcnt, 4) => run!("popcnt {d:e}, {s:e}"),
        (Mnemonic::Popcnt, _) => run!("popcnt {d}, {s}"),
        (Mnemonic::Lzcnt, 2) => run!("lzcnt {d:x}, {s:x}"),
        (Mnemonic::Lzcnt, 4) => run!("lzcnt {d:e}, {s:e}"),
        (Mnemonic::Lzcnt, _) => run!("lzcnt {d}, {s}"),
        (Mnemonic::Tzcnt, 2) => run!("tzcnt {d:x}, {s:x}"),
        (Mnemonic::Tzcnt, 4) => run!("tzcnt {d:e}, {s:e}"),
        (Mnemonic::Tzcnt, _) => run!("tzcnt {d}, {s}"),
        (Mnemonic::Crc32, 1) => run!("crc32 {d:e}, {s:l}"),
        (Mnemonic::Crc32, 2) => run!("crc32 {d:e}, {s:x}"),
        (Mnemonic::Crc32, 4) => run!("crc32 {d:e}, {s:e}"),
        (Mnemonic::Crc32, _) => run!("crc32 {d}, {s}"),
        other => unreachable!("{other:?}"),
    }
    (destination, flags)
}

/// `OP rax, rcx` with operands of `size` bytes.
fn encoding(mnemonic: Mnemonic, size: u32) -> Vec<u8> {
    let (prefix, opcode): (u8, &[u8]) = match (mnemonic, size) {
        (Mnemonic::Popcnt, _) => (0xf3, &[0x0f, 0xb8]),
        (Mnemonic::Lzcnt, _) => (0xf3, &[0x0f, 0xbd]),
        (Mnemonic::Tzcnt, _) => (0xf3, &[0x0f, 0xbc]),
        (_, 1) => (0xf2, &[0x0f, 0x38, 0xf0]),
        _ => (0xf2, &[0x0f, 0x38, 0xf1]),
    };
    let mut code = if size == 2 { vec![0x66] } else { vec![] };
    code.push(prefix);
    code.extend(if size == 8 { Some(0x48) } else { None });
    code.extend(opcode);
    code.push(0xc1);
    code
}

/// Values with many bits, few bits, and none.
fn values() -> impl Strategy<Value = u64> {
    prop_oneof![any::<u64>(), (0u32..64, any::<u8>()).prop_map(|(shift, v)| u64::from(v) << shift), Just(0)]
}

proptest! {
    #[test]
    fn bit_counts_and_crc_are_as_on_hardware(before in any::<u64>(), source in values(), which in 0usize..4, size in 0u32..4) {
        let mnemonic = [Mnemonic::Popcnt, Mnemonic::Lzcnt, Mnemonic::Tzcnt, Mnemonic::Crc32][which];
        let size = 1 << if mnemonic == Mnemonic::Crc32 { size } else { size.max(1) };
        let known = std::is_x86_feature_detected!("popcnt") && std::is_x86_feature_detected!("lzcnt")
            && std::is_x86_feature_detected!("bmi1") && std::is_x86_feature_detected!("sse4.2");
        prop_assume!(known);
        let (destination, flags) = on_hardware(mnemonic, size, before, source);
        let mut rig = Rig::new();
        (rig.cpu.regs.rax, rig.cpu.regs.rcx) = (before, source);
        rig.run(&encoding(mnemonic, size)).unwrap();
        prop_assert_eq!(rig.cpu.regs.rax, destination);
        let defined = match mnemonic {
            Mnemonic::Popcnt => ARITHMETIC,
            Mnemonic::Crc32 => 0,
            _ => bits::CF | bits::ZF,
        };
        prop_assert_eq!(rig.cpu.regs.rflags & defined, flags & defined);
        prop_assert_eq!(rig.cpu.regs.rip, encoding(mnemonic, size).len() as u64);
    }

    #[test]
    fn compare_and_exchange_is_as_defined(old in any::<u128>(), expected in any::<u128>(), new in any::<u128>(), equal in any::<bool>()) {
        let mut rig = Rig::new();
        rig.page(0x5000, 0x10_0000, P | W);
        rig.poke(0x10_0010, &old.to_le_bytes());
        let expected = if equal { old } else { expected };
        let r = &mut rig.cpu.regs;
        (r.rax, r.rdx) = (expected as u64, (expected >> 64) as u64);
        (r.rbx, r.rcx) = (new as u64, (new >> 64) as u64);
        r.rdi = 0x5010;
        rig.run(&[0xf0, 0x48, 0x0f, 0xc7, 0x0f]).unwrap(); // lock cmpxchg16b [rdi]
        let (r, now) = (rig.cpu.regs, u128::from_le_bytes(rig.peek(0x10_0010, 16).try_into().unwrap()));
        if expected == old {
            prop_assert_eq!((now, r.rflags & bits::ZF), (new, bits::ZF));
            prop_assert_eq!((r.rax, r.rdx), (expected as u64, (expected >> 64) as u64));
        } else {
            prop_assert_eq!((now, r.rflags & bits::ZF), (old, 0));
            prop_assert_eq!((r.rax, r.rdx), (old as u64, (old >> 64) as u64));
        }
    }
}

#[test]
fn a_count_reads_memory_by_every_kind_of_address() {
    let mut rig = Rig::new();
    rig.page(0x5000, 0x10_0000, P | W);
    rig.page(0x6000, 0x14_0000, P | W);
    rig.poke(0x10_0ffc, &[0xff; 4]);
    rig.poke(0x14_0000, &[0x0f, 0, 0, 0]);
    let cases: [(&[u8], u64); 3] = [
        (&[0xf3, 0x48, 0x0f, 0xb8, 0x84, 0x4b, 0xf0, 0x0f, 0, 0], 36), // popcnt rax, [rbx+2*rcx+0xff0], across two pages
        (&[0xf3, 0x65, 0x48, 0x0f, 0xb8, 0x04, 0x25, 0xfc, 0, 0, 0], 36), // popcnt rax, gs:[0xfc]
        (&[0xf3, 0x0f, 0xb8, 0x05, 0xf4, 0x0f, 0, 0], 32),             // popcnt eax, [rip+0xff4]
    ];
    for (code, expected) in cases {
        (rig.cpu.regs.rip, rig.cpu.regs.rbx, rig.cpu.regs.rcx) = (0x5000, 0x5000, 6);
        rig.cpu.sregs.gs.base = 0x5f00;
        rig.run(code).unwrap();
        assert_eq!(rig.cpu.regs.rax, expected, "{code:02x?}");
        assert_eq!(rig.cpu.regs.rip, 0x5000 + code.len() as u64);
    }
}

#[test]
fn a_fault_leaves_the_processor_as_it_was() {
    let mut rig = Rig::new();
    rig.page(0x5000, 0x10_0000, P);
    rig.cpu.regs.rdi = 0x5000;
    rig.cpu.regs.rip = 0x1234;
    let before = rig.cpu.regs;
    let stop = rig.run(&[0xf0, 0x48, 0x0f, 0xc7, 0x0f]).unwrap_err();
    assert_eq!(stop, Stop::Exception(Exception::PageFault { address: 0x5000, error_code: 3 }));
    rig.cpu.regs.rdi = 0x5008;
    assert_eq!(rig.run(&[0xf0, 0x48, 0x0f, 0xc7, 0x0f]), Err(PROTECTION));
    rig.cpu.regs.rdi = 1 << 50;
    assert_eq!(rig.run(&[0xf3, 0x0f, 0xb8, 0x07]), Err(PROTECTION));
    rig.cpu.regs.rbp = 1 << 50;
    assert_eq!(rig.run(&[0xf3, 0x0f, 0xb8, 0x45, 0]), Err(Stop::Exception(Exception::StackFault)));
    rig.cpu.regs.rdi = 0x5000;
    rig.cpu.regs.rbp = 0;
    assert_eq!(rig.cpu.regs, before);
}

#[test]
fn instructions_without_operands() {
    let mut rig = Rig::new();
    rig.run(&[0x0f, 0x01, 0xcb]).unwrap(); // stac
    assert_ne!(rig.cpu.regs.rflags & bits::AC, 0);
    rig.run(&[0x0f, 0x01, 0xca]).unwrap(); // clac
    assert_eq!(rig.cpu.regs.rflags & bits::AC, 0);
    assert_eq!(rig.cpu.regs.rip, 6);
    rig.run(&[0xcc]).unwrap();
    assert_eq!((rig.cpu.exception, rig.cpu.regs.rip), (Some(Exception::Breakpoint), 7));
    assert_eq!(rig.run(&[0x0f, 0x0b]), Err(UNDEFINED));
    rig.run(&[0x9b]).unwrap();
    rig.cpu.sregs.cr0 |= bits::CR0_TS | 2;
    assert_eq!(rig.run(&[0x9b]), Err(NOT_AVAILABLE));
    rig.cpu.sregs.ss.dpl = 3;
    assert_eq!(rig.run(&[0x0f, 0x01, 0xcb]), Err(UNDEFINED));
    assert_eq!(rig.run(&[0x0f, 0xa2]), Err(Stop::Unsupported)); // cpuid: the emulator's own
}

#[test]
fn random_numbers_say_that_they_are() {
    let mut rig = Rig::new();
    rig.cpu.regs.rax = u64::MAX;
    rig.run(&[0x0f, 0xc7, 0xf0]).unwrap(); // rdrand eax
    assert_eq!(rig.cpu.regs.rflags & ARITHMETIC, bits::CF);
    assert_eq!(rig.cpu.regs.rax >> 32, 0);
}

#[test]
fn segments_are_looked_up() {
    let mut rig = Rig::new();
    rig.page(0x5000, 0x10_0000, P | W);
    (rig.cpu.sregs.gdt.base, rig.cpu.sregs.gdt.limit) = (0x5000, 0x1f);
    // 1: data, writable, 4 KiB granularity, limit 0x12345; 2: code, readable, limit 7 bytes, DPL 3; 3: not a segment.
    rig.poke(0x10_0008, &0x0081_9200_0000_2345u64.to_le_bytes());
    rig.poke(0x10_0010, &0x0020_fa00_0000_0007u64.to_le_bytes());
    let lsl = [0x0f, 0x03, 0xc1]; // lsl eax, ecx
    let mut limit = |selector: u64| {
        (rig.cpu.regs.rax, rig.cpu.regs.rcx) = (99, selector);
        rig.run(&lsl).unwrap();
        (rig.cpu.regs.rflags & bits::ZF != 0, rig.cpu.regs.rax)
    };
    assert_eq!(limit(8), (true, 0x1234_5fff));
    assert_eq!(limit(0x10), (true, 7));
    for none in [0, 3, 0x18, 0x20, 0x0c] {
        assert_eq!(limit(none), (false, 99), "{none:#x}");
    }
    for (code, selector, right) in
        [(0xe9, 8, true), (0xe9, 0x10, false), (0xe1, 0x10, true), (0xe1, 8, true), (0xe9, 0x18, false)]
    {
        rig.cpu.regs.rcx = selector;
        rig.run(&[0x0f, 0x00, code]).unwrap(); // verw cx; verr cx
        assert_eq!(rig.cpu.regs.rflags & bits::ZF != 0, right, "{code:#x} {selector:#x}");
    }
}

#[test]
fn segment_bases_are_read_and_written() {
    let mut rig = Rig::new();
    assert_eq!(rig.run(&[0xf3, 0x48, 0x0f, 0xae, 0xc8]), Err(UNDEFINED)); // rdgsbase rax, not enabled
    rig.cpu.sregs.cr4 |= 1 << 16;
    rig.cpu.sregs.gs.base = 0x1234_5678_9abc;
    rig.run(&[0xf3, 0x48, 0x0f, 0xae, 0xc8]).unwrap();
    assert_eq!(rig.cpu.regs.rax, 0x1234_5678_9abc);
    rig.run(&[0xf3, 0x48, 0x0f, 0xae, 0xd0]).unwrap(); // wrfsbase rax
    assert_eq!((rig.cpu.sregs.fs.base, rig.cpu.sregs_changed), (0x1234_5678_9abc, true));
    rig.cpu.regs.rax = 1 << 63;
    assert_eq!(rig.run(&[0xf3, 0x48, 0x0f, 0xae, 0xd0]), Err(PROTECTION));
}
