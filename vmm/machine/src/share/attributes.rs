//! Attributes: GETATTR, SETATTR, STATFS, extended attributes, and `struct fuse_attr`.
use super::server::Server;
use super::table::{NodeKind, stat};
use super::wire::{Input, Output, ROOT_ID, RequestHeader};
use rustix::fs::{
    AtFlags, CWD, Gid, Mode, Nsecs, OFlags, Statx, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid, XattrFlags,
    chmodat, chownat, fstatvfs, ftruncate, getxattr, listxattr, removexattr, setxattr, utimensat,
};
use rustix::io::Errno;
use std::ffi::CString;

const FATTR_MODE: u32 = 1 << 0;
const FATTR_UID: u32 = 1 << 1;
const FATTR_GID: u32 = 1 << 2;
const FATTR_SIZE: u32 = 1 << 3;
const FATTR_ATIME: u32 = 1 << 4;
const FATTR_MTIME: u32 = 1 << 5;
const FATTR_FH: u32 = 1 << 6;
const FATTR_ATIME_NOW: u32 = 1 << 7;
const FATTR_MTIME_NOW: u32 = 1 << 8;
const FATTR_KILL_SUIDGID: u32 = 1 << 11;
const GETATTR_FH: u32 = 1;

/// Linux's limit for an attribute's value and for the list of names, in bytes.
const MAX_XATTR_BYTES: u32 = 65_536;
const MAX_XATTR_NAME_BYTES: usize = 255;

/// Linux's encoding of a device number, as FUSE has it.
fn encode_device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

impl Server {
    /// `struct fuse_attr`.
    pub(super) fn put_attributes(&mut self, stat: &Statx, out: &mut Output) {
        out.u64(self.table.inode_number(stat));
        out.u64(stat.stx_size);
        out.u64(stat.stx_blocks);
        for time in [stat.stx_atime, stat.stx_mtime, stat.stx_ctime] {
            out.u64(time.tv_sec.cast_unsigned());
        }
        for time in [stat.stx_atime, stat.stx_mtime, stat.stx_ctime] {
            out.u32(time.tv_nsec);
        }
        out.u32(u32::from(stat.stx_mode));
        out.u32(stat.stx_nlink);
        out.u32(stat.stx_uid);
        out.u32(stat.stx_gid);
        out.u32(encode_device(stat.stx_rdev_major, stat.stx_rdev_minor));
        out.u32(stat.stx_blksize);
        out.u32(0);
    }

    /// `struct fuse_attr_out`.
    fn put_attr_out(&mut self, stat: &Statx, out: &mut Output) {
        let timeout = self.attribute_timeout;
        out.u64(timeout.as_secs());
        out.u32(timeout.subsec_nanos());
        out.u32(0);
        self.put_attributes(stat, out);
    }

    pub(super) fn get_attr(
        &mut self,
        header: &RequestHeader,
        mut input: Input<'_>,
        out: &mut Output,
    ) -> Result<(), Errno> {
        let flags = input.u32()?;
        input.skip(4)?;
        let handle = input.u64()?;
        if header.node == ROOT_ID {
            let timeout = self.attribute_timeout;
            out.u64(timeout.as_secs());
            out.u32(timeout.subsec_nanos());
            out.u32(0);
            self.put_root_attributes(out);
            return Ok(());
        }
        let stat = match self.table.file(handle) {
            Ok(file) if flags & GETATTR_FH != 0 => stat(file)?,
            _ => self.table.node(header.node)?.stat()?,
        };
        self.put_attr_out(&stat, out);
        Ok(())
    }

    pub(super) fn set_attr(
        &mut self,
        header: &RequestHeader,
        mut input: Input<'_>,
        out: &mut Output,
    ) -> Result<(), Errno> {
        let valid = input.u32()?;
        input.skip(4)?;
        let handle = input.u64()?;
        let size = input.u64()?;
        input.skip(8)?;
        let (atime, mtime, _) = (input.u64()?, input.u64()?, input.u64()?);
        let (atime_nsec, mtime_nsec, _) = (input.u32()?, input.u32()?, input.u32()?);
        let mode = input.u32()?;
        input.skip(4)?;
        let (uid, gid) = (input.u32()?, input.u32()?);

        let node = self.table.node(header.node)?;
        node.writable()?;
        if valid & (FATTR_UID | FATTR_GID) != 0 {
            let id = |flag, id: u32| if valid & flag != 0 && id != u32::MAX { Some(id) } else { None };
            let (uid, gid) = (id(FATTR_UID, uid).map(Uid::from_raw), id(FATTR_GID, gid).map(Gid::from_raw));
            chownat(node, "", uid, gid, AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW)?;
        }
        if valid & FATTR_SIZE != 0 {
            self.identity.killing_set_id(valid & FATTR_KILL_SUIDGID != 0, || match self.table.file(handle) {
                Ok(file) if valid & FATTR_FH != 0 => ftruncate(file, size),
                _ if node.kind == NodeKind::Regular => ftruncate(node.open(OFlags::WRONLY)?, size),
                _ => Err(Errno::INVAL),
            })?;
        }
        if valid & FATTR_MODE != 0 {
            if node.stat()?.stx_mode & 0o170_000 == 0o120_000 {
                return Err(Errno::OPNOTSUPP);
            }
            chmodat(CWD, node.proc_path(), Mode::from_bits_truncate(mode & 0o7777), AtFlags::empty())?;
        }
        if valid & (FATTR_ATIME | FATTR_MTIME) != 0 {
            let time = |set, now, seconds: u64, nanoseconds: u32| match (valid & set != 0, valid & now != 0) {
                (false, _) => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
                (true, true) => Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
                (true, false) => {
                    Timespec { tv_sec: seconds.cast_signed(), tv_nsec: Nsecs::from(nanoseconds.min(999_999_999)) }
                }
            };
            let times = Timestamps {
                last_access: time(FATTR_ATIME, FATTR_ATIME_NOW, atime, atime_nsec),
                last_modification: time(FATTR_MTIME, FATTR_MTIME_NOW, mtime, mtime_nsec),
            };
            utimensat(node, "", &times, AtFlags::EMPTY_PATH)?;
        }
        let stat = node.stat()?;
        self.put_attr_out(&stat, out);
        Ok(())
    }

    pub(super) fn stat_fs(&mut self, header: &RequestHeader, out: &mut Output) -> Result<(), Errno> {
        let stat = match header.node {
            ROOT_ID => fstatvfs(&self.exports[0].fd)?,
            node => fstatvfs(self.table.node(node)?)?,
        };
        out.u64(stat.f_blocks);
        out.u64(stat.f_bfree);
        out.u64(stat.f_bavail);
        out.u64(stat.f_files);
        out.u64(stat.f_ffree);
        out.u32(stat.f_bsize as u32);
        out.u32(stat.f_namemax as u32);
        out.u32(stat.f_frsize as u32);
        out.zeroes(28);
        Ok(())
    }

    pub(super) fn set_xattr(&mut self, header: &RequestHeader, mut input: Input<'_>) -> Result<(), Errno> {
        let size = input.u32()?;
        let flags = XattrFlags::from_bits(input.u32()?).ok_or(Errno::INVAL)?;
        let name = xattr_name(input.string()?)?;
        if size > MAX_XATTR_BYTES {
            return Err(Errno::RANGE);
        }
        let value = input.bytes(size as usize)?;
        let node = self.table.node(header.node)?;
        node.writable()?;
        setxattr(node.proc_path(), &name, value, flags)
    }

    pub(super) fn get_xattr(
        &mut self,
        header: &RequestHeader,
        mut input: Input<'_>,
        out: &mut Output,
    ) -> Result<(), Errno> {
        let size = input.u32()?;
        input.skip(4)?;
        let name = xattr_name(input.string()?)?;
        if header.node == ROOT_ID {
            return Err(Errno::NODATA);
        }
        let path = self.table.node(header.node)?.proc_path();
        sized(size, out, |buffer| getxattr(&*path, &name, buffer))
    }

    pub(super) fn list_xattr(
        &mut self,
        header: &RequestHeader,
        mut input: Input<'_>,
        out: &mut Output,
    ) -> Result<(), Errno> {
        let size = input.u32()?;
        if header.node == ROOT_ID {
            return sized(size, out, |_| Ok(0));
        }
        let path = self.table.node(header.node)?.proc_path();
        sized(size, out, |buffer| listxattr(&*path, buffer))
    }

    pub(super) fn remove_xattr(&mut self, header: &RequestHeader, mut input: Input<'_>) -> Result<(), Errno> {
        let name = xattr_name(input.string()?)?;
        let node = self.table.node(header.node)?;
        node.writable()?;
        removexattr(node.proc_path(), &name)
    }
}

/// The value, or only its size when the guest has no room for any.
fn sized(size: u32, out: &mut Output, get: impl FnOnce(&mut [u8]) -> Result<usize, Errno>) -> Result<(), Errno> {
    let size = size.min(MAX_XATTR_BYTES) as usize;
    if size > 0 {
        return out.fill_with(size, get);
    }
    let len = get(&mut [])?;
    out.u32(len as u32);
    out.u32(0);
    Ok(())
}

/// Names that a guest may use. What steers the host's own overlays and security modules is not its business.
fn xattr_name(name: &[u8]) -> Result<CString, Errno> {
    let allowed = name.starts_with(b"user.")
        || (name.starts_with(b"trusted.") && !name.starts_with(b"trusted.overlay."))
        || name == b"security.capability";
    if !allowed {
        return Err(Errno::OPNOTSUPP);
    }
    if name.len() > MAX_XATTR_NAME_BYTES {
        return Err(Errno::RANGE);
    }
    CString::new(name).map_err(|_| Errno::INVAL)
}
