//! Where things lie in the guest's physical memory below 1 MiB, at boot.

/// Global descriptor table.
pub const GDT: u64 = 0x500;
/// Boot parameters, the "zero page".
pub const BOOT_PARAMS: u64 = 0x7000;
/// Initial stack: the kernel sets its own before it uses one.
pub const STACK: u64 = 0x8ff0;
/// Page tables: one page each for level 4, 3 and 2.
pub const PAGE_TABLES: u64 = 0x9000;
/// Command line.
pub const COMMAND_LINE: u64 = 0x20000;
/// Bytes for the command line with its zero: x86 `COMMAND_LINE_SIZE`.
pub const COMMAND_LINE_CAPACITY: usize = 2048;
/// MP table: the first kilobyte of the extended BIOS data area is one of the places where it is looked for
/// (MultiProcessor Specification 1.4, chapter 4).
pub const MP_TABLE: u64 = 0x9fc00;
/// Start of what is not memory on a PC.
pub const LOW_MEMORY_END: u64 = MP_TABLE;
/// Where memory goes on.
pub const HIGH_MEMORY: u64 = 0x10_0000;
/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// Local APICs.
pub const LAPIC: u32 = 0xfee0_0000;
/// IO-APIC.
pub const IOAPIC: u32 = 0xfec0_0000;
/// Three pages for KVM on Intel processors without unrestricted guests, and one for its identity map.
pub const KVM_TSS: usize = 0xfffb_d000;
/// See [`KVM_TSS`].
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// First virtio-mmio device; the others follow, a page each.
pub const VIRTIO: u64 = 0xd000_0000;
