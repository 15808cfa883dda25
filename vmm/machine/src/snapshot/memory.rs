//! Writes guest memory to a sparse file: pages of zeroes are holes.

use crate::memory::GuestMemory;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

/// The granularity of holes.
const PAGE: usize = 4096;
/// How much is copied out of the guest's memory at once.
const CHUNK: usize = 64 * PAGE;

/// Writes all regions, one after the other.
///
/// # Errors
/// The file cannot be written.
pub(super) fn write(memory: &GuestMemory, file: &File) -> io::Result<()> {
    let total = memory.iter().map(GuestMemoryRegion::len).sum();
    file.set_len(total)?;
    let mut chunk = vec![0; CHUNK];
    let mut base = 0;
    for region in memory.iter() {
        let mut offset = 0;
        while offset < region.len() {
            let len = usize::try_from(region.len() - offset).unwrap_or(CHUNK).min(CHUNK);
            let data = &mut chunk[..len];
            region.read_slice(data, MemoryRegionAddress(offset)).map_err(io::Error::other)?;
            write_pages(file, base + offset, data)?;
            offset += len as u64;
        }
        base += region.len();
    }
    Ok(())
}

/// Writes runs of pages that are not zero.
fn write_pages(file: &File, offset: u64, data: &[u8]) -> io::Result<()> {
    let mut run = 0..0;
    for (index, page) in data.chunks(PAGE).enumerate() {
        let start = index * PAGE;
        if page.iter().all(|&b| b == 0) {
            file.write_all_at(&data[run.clone()], offset + run.start as u64)?;
            run = start + page.len()..start + page.len();
        } else {
            run.end = start + page.len();
        }
    }
    file.write_all_at(&data[run.clone()], offset + run.start as u64)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::memory::map;
    use std::os::unix::fs::MetadataExt;
    use vm_memory::GuestAddress;

    #[test]
    fn what_is_written_is_mapped_again_and_zeroes_take_no_space() {
        let memory = map(8, None).unwrap();
        for (address, value) in [(0u64, 1u8), (5 * 4096 + 7, 2), (0x40_0000, 3), ((8 << 20) - 1, 4)] {
            memory.write_obj(value, GuestAddress(address)).unwrap();
        }
        let file = tempfile::tempfile().unwrap();
        write(&memory, &file).unwrap();
        let metadata = file.metadata().unwrap();
        assert_eq!(metadata.len(), 8 << 20);
        assert!(metadata.blocks() * 512 <= 1 << 20, "{} blocks", metadata.blocks());
        let copy = map(8, Some(&file)).unwrap();
        let (mut one, mut other) = (vec![0u8; 8 << 20], vec![0u8; 8 << 20]);
        memory.read_slice(&mut one, GuestAddress(0)).unwrap();
        copy.read_slice(&mut other, GuestAddress(0)).unwrap();
        assert!(one == other);
    }
}
