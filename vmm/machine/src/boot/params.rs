//! Boot parameters: the "zero page" (Documentation/arch/x86/zero-page.rst).

use super::layout::{COMMAND_LINE, HIGH_MEMORY, LOW_MEMORY_END};
use crate::memory::GuestMemory;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::{ByteValued, GuestMemoryBackend, GuestMemoryRegion};

/// `boot_flag` and `header` of a kernel that follows the protocol.
const BOOT_FLAG: u16 = 0xaa55;
const HEADER: u32 = 0x5372_6448;
/// `type_of_loader`: none that has a number.
const LOADER_OTHER: u8 = 0xff;
/// Alignment of the kernel: 16 MiB.
const KERNEL_ALIGNMENT: u32 = 0x100_0000;
/// `e820` type of usable memory.
const RAM: u32 = 1;

/// The page's bytes. `initramfs` is start and length.
pub(super) fn build(memory: &GuestMemory, command_line_len: usize, initramfs: Option<(u64, u64)>) -> Vec<u8> {
    let mut params = boot_params::default();
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER;
    params.hdr.type_of_loader = LOADER_OTHER;
    params.hdr.kernel_alignment = KERNEL_ALIGNMENT;
    params.hdr.cmd_line_ptr = COMMAND_LINE as u32;
    params.hdr.cmdline_size = command_line_len as u32;
    if let Some((start, len)) = initramfs {
        // Both are below the hole at 3 GiB.
        params.hdr.ramdisk_image = start as u32;
        params.hdr.ramdisk_size = len as u32;
    }
    let mut add = |addr: u64, size: u64| {
        let index = usize::from(params.e820_entries);
        params.e820_table[index] = boot_e820_entry { addr, size, r#type: RAM };
        params.e820_entries += 1;
    };
    add(0, LOW_MEMORY_END);
    for region in memory.iter() {
        let (start, len) = (region.start_addr().0, region.len());
        match start {
            0 => add(HIGH_MEMORY, len.saturating_sub(HIGH_MEMORY)),
            _ => add(start, len),
        }
    }
    params.as_slice().to_vec()
}
