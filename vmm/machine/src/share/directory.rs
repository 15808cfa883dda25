//! READDIR and READDIRPLUS.
use super::server::Server;
use super::wire::{Input, MAX_DATA_BYTES, Output, ROOT_ID, RequestHeader};
use rustix::fs::{FileType, RawDir, SeekFrom, seek};
use rustix::io::Errno;
use std::mem::MaybeUninit;

/// Bytes of `struct fuse_dirent` before its name.
const DIRENT_BYTES: usize = 24;
/// Bytes of `struct fuse_entry_out`, which READDIRPLUS puts before each.
const ENTRY_BYTES: usize = 128;
/// Bytes of host entries read at once. What does not fit the guest's buffer is read again.
const BUFFER_BYTES: usize = 32 * 1024;

struct Entry {
    name: Vec<u8>,
    inode: u64,
    /// Where the next one is.
    offset: u64,
    kind: u32,
}

/// The type as readdir(3) has it.
fn kind_of(kind: FileType) -> u32 {
    match kind {
        FileType::Fifo => 1,
        FileType::CharacterDevice => 2,
        FileType::Directory => 4,
        FileType::BlockDevice => 6,
        FileType::RegularFile => 8,
        FileType::Symlink => 10,
        FileType::Socket => 12,
        FileType::Unknown => 0,
    }
}

impl Server {
    pub(super) fn read_directory(
        &mut self,
        header: &RequestHeader,
        mut input: Input<'_>,
        out: &mut Output,
        plus: bool,
    ) -> Result<(), Errno> {
        let handle = input.u64()?;
        let offset = input.u64()?;
        let size = input.u32()?.min(MAX_DATA_BYTES) as usize;
        let entries = if header.node == ROOT_ID { self.list_exports(offset) } else { self.list(handle, offset, size)? };
        for entry in entries {
            let len = (DIRENT_BYTES + entry.name.len()).next_multiple_of(8) + if plus { ENTRY_BYTES } else { 0 };
            if out.len() + len > size {
                break;
            }
            if plus {
                let before = out.len();
                let is_dot = matches!(&entry.name[..], b"." | b"..");
                // A name that is gone, or that there is no room for in the table, is still listed.
                if is_dot || self.put_entry(header.node, &entry.name, out).is_err() {
                    out.truncate(before);
                    out.zeroes(ENTRY_BYTES);
                }
            }
            out.u64(entry.inode);
            out.u64(entry.offset);
            out.u32(entry.name.len() as u32);
            out.u32(entry.kind);
            out.put(&entry.name);
            out.zeroes(entry.name.len().next_multiple_of(8) - entry.name.len());
        }
        Ok(())
    }

    fn list(&self, handle: u64, offset: u64, size: usize) -> Result<Vec<Entry>, Errno> {
        let directory = self.table.open_directory(handle)?;
        seek(directory, SeekFrom::Start(offset))?;
        let mut buffer = vec![MaybeUninit::uninit(); size.clamp(1024, BUFFER_BYTES)];
        let mut raw = RawDir::new(directory, &mut buffer);
        let mut entries = Vec::new();
        let mut bytes = 0;
        while let Some(entry) = raw.next() {
            let entry = entry?;
            let name = entry.file_name().to_bytes().to_vec();
            bytes += DIRENT_BYTES + name.len();
            let kind = kind_of(entry.file_type());
            entries.push(Entry { name, inode: entry.ino(), offset: entry.next_entry_cookie(), kind });
            if bytes >= size || raw.is_buffer_empty() {
                break;
            }
        }
        Ok(entries)
    }

    fn list_exports(&self, offset: u64) -> Vec<Entry> {
        let dots = [(b".".to_vec(), kind_of(FileType::Directory)), (b"..".to_vec(), kind_of(FileType::Directory))];
        let exports = self.exports.iter().map(|export| (export.name.as_bytes().to_vec(), 0));
        let all = dots.into_iter().chain(exports).enumerate();
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        all.skip(from)
            .map(|(at, (name, kind))| Entry { name, inode: at as u64 + 1, offset: at as u64 + 1, kind })
            .collect()
    }
}
