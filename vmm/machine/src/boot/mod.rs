//! Boots an ELF `vmlinux` by the 64-bit Linux boot protocol (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol"):
//! the kernel is entered at its ELF entry point in long mode, with its first GiB mapped to itself.
//!
//! There is neither firmware nor 16-bit nor 32-bit code: on software KVM those would be emulated instruction by
//! instruction, decompression included.

pub mod entry;
pub mod layout;
mod mptable;
mod params;

use crate::config::MachineConfig;
use crate::memory::GuestMemory;
use linux_loader::loader::{Elf, KernelLoader};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

/// Why the kernel cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The kernel is not an ELF vmlinux that fits.
    #[error("cannot load {} as an ELF vmlinux into {memory_mib} MiB of memory", path.display())]
    Kernel {
        /// The file.
        path: PathBuf,
        /// The guest's memory.
        memory_mib: u64,
        /// The cause.
        #[source]
        source: linux_loader::loader::Error,
    },
    /// The initramfs does not fit beside the kernel.
    #[error("{} ({len} bytes) does not fit into memory above the kernel's end at {kernel_end:#x}", path.display())]
    Initramfs {
        /// The file.
        path: PathBuf,
        /// Its length.
        len: u64,
        /// Where the kernel ends.
        kernel_end: u64,
    },
    /// The command line with what the monitor adds is too long.
    #[error("the kernel command line is {len} bytes long, more than {}", layout::COMMAND_LINE_CAPACITY - 1)]
    CommandLine {
        /// Its length.
        len: usize,
    },
    /// Guest memory cannot be written: it is too small.
    #[error("cannot write {what} into guest memory")]
    Memory {
        /// What was to be written.
        what: &'static str,
        /// The cause.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
}

/// Where to enter the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// First instruction.
    pub rip: u64,
}

/// Puts all that a boot needs into memory: kernel, initramfs, command line, boot parameters, MP table, page tables, GDT.
///
/// # Errors
/// A file cannot be read or does not fit.
pub fn load(config: &MachineConfig, command_line: &str, memory: &GuestMemory) -> Result<Entry, BootError> {
    let low_end = memory.find_region(GuestAddress(0)).map_or(0, |r| r.len());
    let mut kernel = open(&config.kernel)?;
    let loaded = Elf::load(memory, None, &mut kernel, Some(GuestAddress(layout::HIGH_MEMORY)))
        .map_err(|source| BootError::Kernel { path: config.kernel.clone(), memory_mib: low_end >> 20, source })?;
    let kernel_end = loaded.kernel_end;
    let initramfs = match &config.initramfs {
        Some(path) => Some(load_initramfs(path, kernel_end, low_end, memory)?),
        None => None,
    };
    if command_line.len() >= layout::COMMAND_LINE_CAPACITY {
        return Err(BootError::CommandLine { len: command_line.len() });
    }
    let mut text = command_line.as_bytes().to_vec();
    text.push(0);
    write(memory, "the command line", layout::COMMAND_LINE, &text)?;
    write(memory, "the MP table", layout::MP_TABLE, &mptable::build(config.vcpus))?;
    write(memory, "the boot parameters", layout::BOOT_PARAMS, &params::build(memory, command_line.len(), initramfs))?;
    entry::write_tables(memory)?;
    Ok(Entry { rip: loaded.kernel_load.0 })
}

/// As high as possible, so that the kernel has room to grow. Returns start and length.
fn load_initramfs(path: &Path, kernel_end: u64, low_end: u64, memory: &GuestMemory) -> Result<(u64, u64), BootError> {
    let error = |source| BootError::File { path: path.to_owned(), source };
    let mut file = open(path)?;
    let len = file.metadata().map_err(error)?.len();
    let start = low_end.checked_sub(len).map(|s| s & !(layout::PAGE - 1)).filter(|&s| s >= kernel_end);
    let (Some(start), Ok(size)) = (start, usize::try_from(len)) else {
        return Err(BootError::Initramfs { path: path.to_owned(), len, kernel_end });
    };
    memory
        .read_exact_volatile_from(GuestAddress(start), &mut file, size)
        .map_err(|source| BootError::Memory { what: "the initramfs", source })?;
    Ok((start, len))
}

fn open(path: &Path) -> Result<File, BootError> {
    File::open(path).map_err(|source| BootError::File { path: path.to_owned(), source })
}

fn write(memory: &GuestMemory, what: &'static str, address: u64, bytes: &[u8]) -> Result<(), BootError> {
    memory.write_slice(bytes, GuestAddress(address)).map_err(|source| BootError::Memory { what, source })
}
