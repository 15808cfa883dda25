#![allow(clippy::unwrap_used)]
use super::super::testing::{A, D, LEVEL1, LEVEL2, LEVEL3, LEVEL4, NX, P, PS, Rig, U, W};
use super::*;

fn fault(address: u64, error_code: u32) -> Stop {
    Stop::Exception(Exception::PageFault { address, error_code })
}

fn walk(rig: &Rig, linear: u64, access: Access) -> Result<u64, Stop> {
    translate(&rig.cpu, &rig.memory, linear, access, Mark::Yes)
}

#[test]
fn pages_of_all_sizes_are_found() {
    let rig = Rig::new();
    rig.page(0x5000, 0x10_0000, P | W);
    assert_eq!(walk(&rig, 0x5123, Access::Read), Ok(0x10_0123));
    rig.entry(LEVEL2, 1, 0x20_0000 | P | W | PS);
    assert_eq!(walk(&rig, 0x20_1234, Access::Read), Ok(0x20_1234));
    rig.entry(LEVEL3, 1, 0x4000_0000 | P | W | PS);
    assert_eq!(walk(&rig, 0x4567_89ab, Access::Read), Ok(0x4567_89ab));
}

#[test]
fn accessed_is_set_on_the_way_and_dirty_where_it_is_written() {
    let rig = Rig::new();
    rig.page(0x5000, 0x10_0000, P | W);
    translate(&rig.cpu, &rig.memory, 0x5000, Access::Write, Mark::No).unwrap();
    assert_eq!(rig.get_entry(LEVEL1, 5) & (A | D), 0);
    walk(&rig, 0x5000, Access::Read).unwrap();
    for (table, index) in [(LEVEL4, 0), (LEVEL3, 0), (LEVEL2, 0), (LEVEL1, 5)] {
        assert_eq!(rig.get_entry(table, index) & (A | D), A);
    }
    walk(&rig, 0x5000, Access::Write).unwrap();
    assert_eq!(rig.get_entry(LEVEL1, 5) & (A | D), A | D);
    assert_eq!(rig.get_entry(LEVEL2, 0) & (A | D), A);
}

#[test]
fn what_is_not_present_faults() {
    let rig = Rig::new();
    assert_eq!(walk(&rig, 0x5008, Access::Read), Err(fault(0x5008, 0)));
    assert_eq!(walk(&rig, 0x5008, Access::Write), Err(fault(0x5008, 2)));
    assert_eq!(walk(&rig, 0x5008, Access::Fetch), Err(fault(0x5008, 0x10)));
    assert_eq!(walk(&rig, 1 << 30, Access::Read), Err(fault(1 << 30, 0)));
}

#[test]
fn the_supervisor_writes_read_only_pages_without_wp_only() {
    let mut rig = Rig::new();
    rig.page(0x5000, 0x10_0000, P);
    assert_eq!(walk(&rig, 0x5000, Access::Write), Err(fault(0x5000, 3)));
    assert!(walk(&rig, 0x5000, Access::Read).is_ok());
    rig.cpu.sregs.cr0 &= !bits::CR0_WP;
    assert!(walk(&rig, 0x5000, Access::Write).is_ok());
    // A table that is read-only makes all below it so.
    rig.cpu.sregs.cr0 |= bits::CR0_WP;
    rig.page(0x5000, 0x10_0000, P | W);
    rig.entry(LEVEL2, 0, LEVEL1 | P);
    assert_eq!(walk(&rig, 0x5000, Access::Write), Err(fault(0x5000, 3)));
}

#[test]
fn user_mode_has_user_pages_only() {
    let mut rig = Rig::new();
    rig.cpu.sregs.ss.dpl = 3;
    rig.page(0x5000, 0x10_0000, P | W);
    rig.page(0x6000, 0x10_0000, P | U);
    assert_eq!(walk(&rig, 0x5000, Access::Read), Err(fault(0x5000, 5)));
    assert_eq!(walk(&rig, 0x5000, Access::Write), Err(fault(0x5000, 7)));
    assert!(walk(&rig, 0x6000, Access::Read).is_ok());
    rig.cpu.sregs.cr0 &= !bits::CR0_WP;
    assert_eq!(walk(&rig, 0x6000, Access::Write), Err(fault(0x6000, 7)));
}

#[test]
fn execution_and_supervisor_protection() {
    let mut rig = Rig::new();
    rig.page(0x5000, 0x10_0000, P | W | NX);
    rig.page(0x6000, 0x10_0000, P | W | U);
    assert_eq!(walk(&rig, 0x5000, Access::Fetch), Err(fault(0x5000, 0x11)));
    assert!(walk(&rig, 0x6000, Access::Fetch).is_ok());
    rig.cpu.sregs.cr4 |= bits::CR4_SMEP | bits::CR4_SMAP;
    assert_eq!(walk(&rig, 0x6000, Access::Fetch), Err(fault(0x6000, 0x11)));
    assert_eq!(walk(&rig, 0x6000, Access::Read), Err(fault(0x6000, 1)));
    rig.cpu.regs.rflags |= bits::AC;
    assert!(walk(&rig, 0x6000, Access::Read).is_ok());
}

#[test]
fn reserved_bits_fault() {
    let mut rig = Rig::new();
    rig.entry(LEVEL2, 1, 0x20_0000 | 1 << 14 | P | W | PS);
    assert_eq!(walk(&rig, 0x20_0000, Access::Read), Err(fault(0x20_0000, 9)));
    rig.entry(LEVEL4, 1, LEVEL3 | P | W | PS);
    assert_eq!(walk(&rig, 1 << 39, Access::Write), Err(fault(1 << 39, 0xb)));
    rig.page(0x5000, 0x10_0000, P | W | NX);
    rig.cpu.sregs.efer &= !bits::EFER_NXE;
    assert_eq!(walk(&rig, 0x5000, Access::Read), Err(fault(0x5000, 9)));
}

#[test]
fn addresses_that_are_not_canonical_and_tables_outside_of_memory() {
    let mut rig = Rig::new();
    assert_eq!(walk(&rig, 1 << 47, Access::Read), Err(Stop::Exception(Exception::GeneralProtection)));
    rig.entry(LEVEL4, 511, 0x7000_0000 | P | W);
    assert_eq!(walk(&rig, u64::MAX, Access::Read), Err(Stop::NotMemory(0x7000_0ff8)));
    rig.cpu.sregs.cr3 = 1 << 40;
    assert_eq!(walk(&rig, 0, Access::Read), Err(Stop::NotMemory(1 << 40)));
}

#[test]
fn an_access_may_cross_pages_that_are_not_neighbours() {
    let rig = Rig::new();
    rig.page(0x5000, 0x10_0000, P | W);
    rig.page(0x6000, 0x18_0000, P | W);
    let data: Vec<u8> = (0..64).collect();
    write(&rig.cpu, &rig.memory, 0x5fe0, &data).unwrap();
    assert_eq!(rig.peek(0x10_0fe0, 32), data[..32]);
    assert_eq!(rig.peek(0x18_0000, 32), data[32..]);
    let mut back = [0; 64];
    read(&rig.cpu, &rig.memory, 0x5fe0, &mut back, Access::Read).unwrap();
    assert_eq!(back[..], data);
}

#[test]
fn a_write_that_faults_on_its_second_page_writes_nothing() {
    let rig = Rig::new();
    rig.page(0x5000, 0x10_0000, P | W);
    rig.page(0x6000, 0x18_0000, P);
    assert_eq!(write(&rig.cpu, &rig.memory, 0x5ff0, &[7; 32]), Err(fault(0x6000, 3)));
    assert_eq!(rig.peek(0x10_0ff0, 16), [0; 16]);
    assert_eq!(rig.get_entry(LEVEL1, 5) & D, 0);
}
