//! Files' data: OPEN, CREATE, READ, WRITE and their kin.
use super::server::Server;
use super::table::{ContentVersion, NodeKind};
use super::wire::{Input, MAX_DATA_BYTES, Output, ROOT_ID, RequestHeader};
use rustix::fs::{CWD, FallocateFlags, Mode, OFlags, SeekFrom, Statx, fallocate, fdatasync, fsync, openat, seek};
use rustix::io::{Errno, pread, pwrite};
use std::os::fd::AsRawFd;

/// Flags of open(2) that reach the host; what is not here is the guest kernel's business, or nobody's.
const OPEN_FLAGS: OFlags =
    OFlags::RWMODE.union(OFlags::APPEND).union(OFlags::TRUNC).union(OFlags::DSYNC).union(OFlags::SYNC);
const FUSE_OPEN_KILL_SUIDGID: u32 = 1;
const FUSE_WRITE_KILL_SUIDGID: u32 = 1 << 2;
const FOPEN_KEEP_CACHE: u32 = 1 << 1;
const FSYNC_DATA: u32 = 1;
const SEEK_DATA: u32 = 3;
const SEEK_HOLE: u32 = 4;

fn open_flags(bits: u32) -> OFlags {
    OFlags::from_bits_truncate(bits) & OPEN_FLAGS
}

fn writes(flags: OFlags) -> bool {
    !(flags & OFlags::RWMODE).is_empty() || flags.contains(OFlags::TRUNC)
}

fn version(stat: &Statx) -> ContentVersion {
    (stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec, stat.stx_ctime.tv_sec, stat.stx_ctime.tv_nsec, stat.stx_size)
}

impl Server {
    pub(super) fn open(&mut self, header: &RequestHeader, mut input: Input<'_>, out: &mut Output) -> Result<(), Errno> {
        let flags = open_flags(input.u32()?);
        let kill = input.u32()? & FUSE_OPEN_KILL_SUIDGID != 0;
        self.open_node(header.node, flags, kill, out)
    }

    /// `struct fuse_open_out` of a new handle.
    fn open_node(&mut self, id: u64, flags: OFlags, kill: bool, out: &mut Output) -> Result<(), Errno> {
        let identity = self.identity;
        let node = self.table.node_mut(id)?;
        if node.kind != NodeKind::Regular {
            return Err(if node.kind == NodeKind::Directory { Errno::ISDIR } else { Errno::NXIO });
        }
        if writes(flags) {
            node.writable()?;
        }
        let file = identity.killing_set_id(kill && flags.contains(OFlags::TRUNC), || node.open(flags))?;
        // What the guest has cached is good as long as the file is as it was when it was last opened.
        let now = version(&node.stat()?);
        let keep = node.opened.replace(now) == Some(now);
        let handle = self.table.add_handle(file, false)?;
        out.u64(handle);
        out.u32(if keep { FOPEN_KEEP_CACHE } else { 0 });
        out.u32(0);
        Ok(())
    }

    pub(super) fn create(
        &mut self,
        header: &RequestHeader,
        mut input: Input<'_>,
        out: &mut Output,
    ) -> Result<(), Errno> {
        let bits = input.u32()?;
        let mode = input.u32()?;
        input.skip(4)?;
        let kill = input.u32()? & FUSE_OPEN_KILL_SUIDGID != 0;
        let name = input.name()?;
        let flags = open_flags(bits);
        let parent = self.table.directory(header.node).map_err(|error| self.root_is_fixed(header.node, error))?;
        parent.writable()?;
        // Always exclusive: what is there already may be a device, and is opened as any other node.
        let new = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let made = self.identity.act_as(header.uid, header.gid, || {
            openat(parent, name, flags.difference(OFlags::TRUNC) | new, Mode::from_bits_truncate(mode & 0o7777))
        });
        let file = match made {
            Ok(file) => file,
            Err(Errno::EXIST) if !OFlags::from_bits_truncate(bits).contains(OFlags::EXCL) => {
                let node = self.put_entry(header.node, name, out)?;
                return self.open_node(node, flags, kill, out).inspect_err(|_| self.table.forget(node, 1));
            }
            Err(error) => return Err(error),
        };
        // By the descriptor: the host may have put something else under the name meanwhile.
        let (export, read_only) = (parent.export(), parent.read_only);
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let inode = openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        let (node, stat) = self.table.insert(inode, export, read_only)?;
        self.table.node_mut(node)?.opened = Some(version(&stat));
        let handle = self.table.add_handle(file, false).inspect_err(|_| self.table.forget(node, 1))?;
        self.put_entry_out(node, &stat, out);
        out.u64(handle);
        out.u32(0);
        out.u32(0);
        Ok(())
    }

    pub(super) fn read(&mut self, mut input: Input<'_>, out: &mut Output) -> Result<(), Errno> {
        let handle = input.u64()?;
        let offset = input.u64()?;
        let size = input.u32()?.min(MAX_DATA_BYTES) as usize;
        let file = self.table.file(handle)?;
        out.fill_with(size, |buffer| {
            let mut filled = 0;
            while filled < buffer.len() {
                match pread(file, &mut buffer[filled..], offset.saturating_add(filled as u64)) {
                    Ok(0) => break,
                    Ok(got) => filled += got,
                    Err(Errno::INTR) => {}
                    Err(error) if filled == 0 => return Err(error),
                    Err(_) => break,
                }
            }
            Ok(filled)
        })
    }

    pub(super) fn write(&mut self, mut input: Input<'_>, out: &mut Output) -> Result<(), Errno> {
        let handle = input.u64()?;
        let offset = input.u64()?;
        let size = input.u32()?;
        let flags = input.u32()?;
        input.skip(16)?;
        let data = input.bytes(size as usize)?;
        let file = self.table.file(handle)?;
        let written =
            self.identity.killing_set_id(flags & FUSE_WRITE_KILL_SUIDGID != 0, || pwrite(file, data, offset))?;
        out.u32(written as u32);
        out.u32(0);
        Ok(())
    }

    pub(super) fn fsync(&mut self, mut input: Input<'_>, directory: bool) -> Result<(), Errno> {
        let handle = input.u64()?;
        let data_only = input.u32()? & FSYNC_DATA != 0;
        let file = if directory { self.table.open_directory(handle)? } else { self.table.file(handle)? };
        if data_only { fdatasync(file) } else { fsync(file) }
    }

    pub(super) fn allocate(&mut self, mut input: Input<'_>) -> Result<(), Errno> {
        let handle = input.u64()?;
        let offset = input.u64()?;
        let len = input.u64()?;
        let flags = FallocateFlags::from_bits(input.u32()?).ok_or(Errno::OPNOTSUPP)?;
        fallocate(self.table.file(handle)?, flags, offset, len)
    }

    pub(super) fn seek(&mut self, mut input: Input<'_>, out: &mut Output) -> Result<(), Errno> {
        let handle = input.u64()?;
        let offset = input.u64()?;
        let from = match input.u32()? {
            SEEK_DATA => SeekFrom::Data(offset),
            SEEK_HOLE => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL),
        };
        out.u64(seek(self.table.file(handle)?, from)?);
        Ok(())
    }

    pub(super) fn release(&mut self, mut input: Input<'_>) -> Result<(), Errno> {
        let handle = input.u64()?;
        self.table.remove_handle(handle);
        Ok(())
    }

    pub(super) fn open_directory(&mut self, header: &RequestHeader, out: &mut Output) -> Result<(), Errno> {
        let handle = if header.node == ROOT_ID {
            0
        } else {
            let directory = self.table.directory(header.node)?.open(OFlags::RDONLY | OFlags::DIRECTORY)?;
            self.table.add_handle(directory, true)?
        };
        out.u64(handle);
        out.u32(0);
        out.u32(0);
        Ok(())
    }
}
