//! The guest's memory: where it lies in the guest's physical address space, and what is behind it.

use std::fs::File;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

/// The guest's memory. Clones share it.
pub type GuestMemory = GuestMemoryMmap<()>;

/// Start of the hole for memory-mapped devices below 4 GiB.
pub const HOLE_START: u64 = 0xc000_0000;
/// End of that hole; memory goes on here.
pub const HOLE_END: u64 = 0x1_0000_0000;

/// Why there is no memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host does not give it.
    #[error("cannot map {mib} MiB of guest memory")]
    Map {
        /// How much was asked for.
        mib: u32,
        /// The cause.
        #[source]
        source: vm_memory::mmap::MmapRegionError,
    },
    /// The regions do not make an address space.
    #[error("cannot lay out {mib} MiB of guest memory: {problem}")]
    Layout {
        /// How much was asked for.
        mib: u32,
        /// What is wrong.
        problem: String,
    },
}

/// Start and length in bytes of each region of a machine with `mib` MiB.
pub fn regions(mib: u32) -> Vec<(GuestAddress, u64)> {
    let total = u64::from(mib) << 20;
    if total <= HOLE_START {
        vec![(GuestAddress(0), total)]
    } else {
        vec![(GuestAddress(0), HOLE_START), (GuestAddress(HOLE_END), total - HOLE_START)]
    }
}

/// Maps memory of zeroes, or a private copy of what `snapshot` holds: the regions, one after the other.
///
/// # Errors
/// The host's address space or memory does not suffice.
pub fn map(mib: u32, snapshot: Option<&File>) -> Result<GuestMemory, MemoryError> {
    let layout = |problem: String| MemoryError::Layout { mib, problem };
    let mut offset = 0;
    let mut maps = Vec::new();
    for (start, len) in regions(mib) {
        let size = usize::try_from(len).map_err(|e| layout(e.to_string()))?;
        let mut flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        if snapshot.is_none() {
            flags |= libc::MAP_ANONYMOUS;
        }
        let mut builder =
            MmapRegionBuilder::new(size).with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE).with_mmap_flags(flags);
        if let Some(file) = snapshot {
            let file = file.try_clone().map_err(|e| layout(e.to_string()))?;
            builder = builder.with_file_offset(FileOffset::new(file, offset));
        }
        let region = builder.build().map_err(|source| MemoryError::Map { mib, source })?;
        maps.push(
            GuestRegionMmap::new(region, start).ok_or_else(|| layout(format!("region at {:#x} wraps", start.0)))?,
        );
        offset += len;
    }
    GuestMemory::from_regions(maps).map_err(|e| layout(e.to_string()))
}

/// Whether the file is what [`map`] can take for this much memory: long enough that no access is past its end.
///
/// # Errors
/// Its length cannot be read.
pub fn fits(mib: u32, file: &File) -> std::io::Result<bool> {
    Ok(file.metadata()?.len() == u64::from(mib) << 20)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::io::Write;
    use vm_memory::{Bytes, GuestMemoryBackend};

    #[test]
    fn memory_leaves_the_hole_below_4_gib() {
        assert_eq!(regions(128), [(GuestAddress(0), 128 << 20)]);
        assert_eq!(regions(3072), [(GuestAddress(0), 3 << 30)]);
        assert_eq!(regions(4096), [(GuestAddress(0), 3 << 30), (GuestAddress(4 << 30), 1 << 30)]);
    }

    #[test]
    fn memory_above_the_hole_can_be_used() {
        let memory = map(4096, None).unwrap();
        assert_eq!(memory.num_regions(), 2);
        memory.write_obj(7u64, GuestAddress(HOLE_END)).unwrap();
        assert_eq!(memory.read_obj::<u64>(GuestAddress(HOLE_END)).unwrap(), 7);
        assert!(memory.write_obj(7u64, GuestAddress(HOLE_START)).is_err());
    }

    #[test]
    fn a_snapshot_is_mapped_privately() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"saved").unwrap();
        file.set_len(1 << 20).unwrap();
        assert!(fits(1, &file).unwrap());
        assert!(!fits(2, &file).unwrap());
        let (one, two) = (map(1, Some(&file)).unwrap(), map(1, Some(&file)).unwrap());
        one.write_slice(b"other", GuestAddress(0)).unwrap();
        assert_eq!(two.read_obj::<[u8; 5]>(GuestAddress(0)).unwrap(), *b"saved");
    }
}
