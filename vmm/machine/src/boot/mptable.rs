//! The MP table (MultiProcessor Specification 1.4, chapter 4): tells a kernel without ACPI of its processors, their local
//! APICs and the IO-APIC. Without it the kernel finds no timer.

use super::layout::{IOAPIC, LAPIC, MP_TABLE};

/// Interrupt lines of the IO-APIC.
const LINES: u8 = 24;
/// Version of the local APIC and IO-APIC that KVM emulates.
const LAPIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x11;
const POINTER_BYTES: usize = 16;
const HEADER_BYTES: usize = 44;
/// Family 6, and feature flags FPU, CX8 and APIC: Linux reads CPUID instead.
const SIGNATURE: u32 = 0x600;
const FEATURES: u32 = 0x301;

/// The floating pointer and the table, to lie at [`MP_TABLE`]. 32 processors make it 948 bytes.
pub(super) fn build(vcpus: u8) -> Vec<u8> {
    let ioapic_id = vcpus;
    let mut entries = Vec::new();
    let mut count = 0u16;
    let mut add = |bytes: &[u8]| {
        entries.extend_from_slice(bytes);
        count += 1;
    };
    for id in 0..vcpus {
        let flags = if id == 0 { 3 } else { 1 }; // Enabled; the first is the boot processor.
        let mut processor = vec![0, id, LAPIC_VERSION, flags];
        processor.extend_from_slice(&SIGNATURE.to_le_bytes());
        processor.extend_from_slice(&FEATURES.to_le_bytes());
        processor.extend_from_slice(&[0; 8]);
        add(&processor);
    }
    add(b"\x01\x00ISA   ");
    let mut ioapic = vec![2, ioapic_id, IOAPIC_VERSION, 1];
    ioapic.extend_from_slice(&IOAPIC.to_le_bytes());
    add(&ioapic);
    for line in 0..LINES {
        add(&[3, 0, 0, 0, 0, line, ioapic_id, line]); // INT, as the bus has it: ISA lines are edge-triggered.
    }
    add(&[4, 3, 0, 0, 0, 0, 0, 0]); // ExtINT to LINT0 of the boot processor.
    add(&[4, 1, 0, 0, 0, 0, 0xff, 1]); // NMI to LINT1 of all.

    let mut table = Vec::with_capacity(HEADER_BYTES + entries.len());
    table.extend_from_slice(b"PCMP");
    table.extend_from_slice(&((HEADER_BYTES + entries.len()) as u16).to_le_bytes());
    table.extend_from_slice(&[4, 0]);
    table.extend_from_slice(b"CAISSON ");
    table.extend_from_slice(b"000000000000");
    table.extend_from_slice(&[0; 6]);
    table.extend_from_slice(&count.to_le_bytes());
    table.extend_from_slice(&LAPIC.to_le_bytes());
    table.extend_from_slice(&[0; 4]);
    table.extend_from_slice(&entries);
    table[7] = checksum(&table);

    let mut pointer = b"_MP_".to_vec();
    pointer.extend_from_slice(&((MP_TABLE as u32) + POINTER_BYTES as u32).to_le_bytes());
    pointer.extend_from_slice(&[1, 4, 0, 0, 0, 0, 0, 0]);
    pointer[10] = checksum(&pointer);
    pointer.extend_from_slice(&table);
    pointer
}

/// What makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, &b| sum.wrapping_sub(b))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MAX_VCPUS;

    #[test]
    fn it_fits_below_the_bios_area_and_sums_to_zero() {
        for vcpus in 1..=MAX_VCPUS {
            let bytes = build(vcpus);
            assert!(bytes.len() <= 1024, "{} bytes for {vcpus} vCPUs", bytes.len());
            assert_eq!(checksum(&bytes[..POINTER_BYTES]), 0);
            let table = &bytes[POINTER_BYTES..];
            assert_eq!(checksum(table), 0);
            assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
            let entries = usize::from(vcpus) + 1 + 1 + usize::from(LINES) + 2;
            assert_eq!(usize::from(u16::from_le_bytes([table[34], table[35]])), entries);
        }
    }
}
