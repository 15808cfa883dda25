//! Names: LOOKUP and what makes, moves and removes entries.
use super::server::Server;
use super::wire::{Input, Output, ROOT_ID, RequestHeader};
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, RenameFlags, linkat, makedev, mkdirat, mknodat, readlinkat, renameat_with, symlinkat,
    unlinkat,
};
use rustix::io::Errno;

const RENAME_NOREPLACE: u32 = 1;
const RENAME_EXCHANGE: u32 = 2;
/// PATH_MAX of Linux.
const MAX_TARGET_BYTES: usize = 4095;

impl Server {
    /// `struct fuse_entry_out` of a name, with one more lookup counted.
    pub(super) fn put_entry(&mut self, parent: u64, name: &[u8], out: &mut Output) -> Result<u64, Errno> {
        let (node, stat) =
            if parent == ROOT_ID { self.lookup_export(name)? } else { self.table.lookup(parent, name)? };
        self.put_entry_out(node, &stat, out);
        Ok(node)
    }

    pub(super) fn put_entry_out(&mut self, node: u64, stat: &rustix::fs::Statx, out: &mut Output) {
        out.u64(node);
        out.u64(0);
        out.u64(self.entry_timeout.as_secs());
        out.u64(self.attribute_timeout.as_secs());
        out.u32(self.entry_timeout.subsec_nanos());
        out.u32(self.attribute_timeout.subsec_nanos());
        self.put_attributes(stat, out);
    }

    pub(super) fn lookup(
        &mut self,
        header: &RequestHeader,
        mut input: Input<'_>,
        out: &mut Output,
    ) -> Result<(), Errno> {
        let name = input.name()?;
        self.put_entry(header.node, name, out).map(drop)
    }

    /// Makes an entry as the caller's, and tells the guest of it.
    fn make(
        &mut self,
        header: &RequestHeader,
        name: &[u8],
        out: &mut Output,
        make: impl FnOnce(&super::table::Node) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        let parent = self.table.directory(header.node).map_err(|error| self.root_is_fixed(header.node, error))?;
        parent.writable()?;
        self.identity.act_as(header.uid, header.gid, || make(parent))?;
        self.put_entry(header.node, name, out).map(drop)
    }

    /// Nothing can be made or removed among the exports.
    pub(super) fn root_is_fixed(&self, node: u64, error: Errno) -> Errno {
        if node == ROOT_ID { Errno::ROFS } else { error }
    }

    pub(super) fn symlink(
        &mut self,
        header: &RequestHeader,
        mut input: Input<'_>,
        out: &mut Output,
    ) -> Result<(), Errno> {
        let name = input.name()?;
        let target = input.string()?;
        if target.is_empty() || target.len() > MAX_TARGET_BYTES {
            return Err(Errno::NAMETOOLONG);
        }
        self.make(header, name, out, |parent| symlinkat(target, parent, name))
    }

    pub(super) fn make_node(
        &mut self,
        header: &RequestHeader,
        mut input: Input<'_>,
        out: &mut Output,
    ) -> Result<(), Errno> {
        let mode = input.u32()?;
        let device = input.u32()?;
        input.skip(8)?;
        let name = input.name()?;
        let kind = FileType::from_raw_mode(mode);
        if !matches!(
            kind,
            FileType::RegularFile
                | FileType::Fifo
                | FileType::Socket
                | FileType::CharacterDevice
                | FileType::BlockDevice
        ) {
            return Err(Errno::INVAL);
        }
        let device = makedev((device & 0xfff00) >> 8, (device & 0xff) | ((device >> 12) & 0xfff00));
        self.make(header, name, out, |parent| {
            mknodat(parent, name, kind, Mode::from_bits_truncate(mode & 0o7777), device)
        })
    }

    pub(super) fn make_directory(
        &mut self,
        header: &RequestHeader,
        mut input: Input<'_>,
        out: &mut Output,
    ) -> Result<(), Errno> {
        let mode = input.u32()?;
        input.skip(4)?;
        let name = input.name()?;
        self.make(header, name, out, |parent| mkdirat(parent, name, Mode::from_bits_truncate(mode & 0o7777)))
    }

    pub(super) fn link(&mut self, header: &RequestHeader, mut input: Input<'_>, out: &mut Output) -> Result<(), Errno> {
        let old = input.u64()?;
        let name = input.name()?;
        let parent = self.table.directory(header.node).map_err(|error| self.root_is_fixed(header.node, error))?;
        let old = self.table.node(old)?;
        parent.writable()?;
        if old.export() != parent.export() {
            return Err(Errno::XDEV);
        }
        linkat(CWD, old.proc_path(), parent, name, AtFlags::SYMLINK_FOLLOW)?;
        self.put_entry(header.node, name, out).map(drop)
    }

    pub(super) fn remove(
        &mut self,
        header: &RequestHeader,
        mut input: Input<'_>,
        directory: bool,
    ) -> Result<(), Errno> {
        let name = input.name()?;
        let parent = self.table.directory(header.node).map_err(|error| self.root_is_fixed(header.node, error))?;
        parent.writable()?;
        unlinkat(parent, name, if directory { AtFlags::REMOVEDIR } else { AtFlags::empty() })
    }

    pub(super) fn rename(
        &mut self,
        header: &RequestHeader,
        mut input: Input<'_>,
        has_flags: bool,
    ) -> Result<(), Errno> {
        let new_parent = input.u64()?;
        let mut flags = RenameFlags::empty();
        if has_flags {
            let bits = input.u32()?;
            input.skip(4)?;
            // Not RENAME_WHITEOUT: guests' overlays have their upper layers elsewhere.
            if bits & !(RENAME_NOREPLACE | RENAME_EXCHANGE) != 0 {
                return Err(Errno::INVAL);
            }
            flags = RenameFlags::from_bits_truncate(bits);
        }
        let old_name = input.name()?;
        let new_name = input.name()?;
        let old = self.table.directory(header.node).map_err(|error| self.root_is_fixed(header.node, error))?;
        let new = self.table.directory(new_parent).map_err(|error| self.root_is_fixed(new_parent, error))?;
        old.writable()?;
        new.writable()?;
        if old.export() != new.export() {
            return Err(Errno::XDEV);
        }
        renameat_with(old, old_name, new, new_name, flags)
    }

    pub(super) fn read_link(&mut self, header: &RequestHeader, out: &mut Output) -> Result<(), Errno> {
        let target = readlinkat(self.table.node(header.node)?, "", Vec::new())?;
        out.put(target.as_bytes());
        Ok(())
    }
}
