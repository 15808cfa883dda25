//! Extended attributes, in the inode and in a block of their own.
use super::Ext4Error;
use super::image::{Inode, u16_at, u32_at};
use std::collections::BTreeMap;

const MAGIC: u32 = 0xea02_0000;
const BLOCK_HEADER_BYTES: usize = 32;
const ENTRY_BYTES: usize = 16;
const ACL_ACCESS: u8 = 2;
const ACL_DEFAULT: u8 = 3;
/// Version of ACLs on disk, and of those that system calls exchange (linux/posix_acl_xattr.h).
const ACL_DISK_VERSION: u32 = 1;
const ACL_XATTR_VERSION: u32 = 2;
/// The tags that carry an id: ACL_USER and ACL_GROUP.
const ACL_WITH_ID: [u16; 2] = [2, 8];

type Found = BTreeMap<String, Vec<u8>>;

/// Reads those behind the inode's fields.
pub(super) fn in_inode(inode: &Inode, found: &mut Found) -> Result<(), Ext4Error> {
    if u32_at(&inode.rest, 0) != MAGIC {
        return Ok(());
    }
    let entries = inode.rest.get(4..).unwrap_or_default();
    read(inode, entries, entries, found)
}

/// Reads those of a block.
pub(super) fn in_block(inode: &Inode, block: &[u8], found: &mut Found) -> Result<(), Ext4Error> {
    if u32_at(block, 0) != MAGIC {
        return Err(corrupt(inode));
    }
    read(inode, block.get(BLOCK_HEADER_BYTES..).unwrap_or_default(), block, found)
}

fn corrupt(inode: &Inode) -> Ext4Error {
    Ext4Error::Corrupt { what: "its extended attributes", inode: inode.number }
}

/// Reads entries; the offsets of their values count from the beginning of `values`.
fn read(inode: &Inode, entries: &[u8], values: &[u8], found: &mut Found) -> Result<(), Ext4Error> {
    let mut at = 0;
    while at + 4 <= entries.len() && u32_at(entries, at) != 0 {
        let byte = |offset: usize| entries.get(at + offset).copied().ok_or_else(|| corrupt(inode));
        let (name_length, index) = (usize::from(byte(0)?), byte(1)?);
        let name = entries.get(at + ENTRY_BYTES..at + ENTRY_BYTES + name_length).ok_or_else(|| corrupt(inode))?;
        let offset = usize::from(u16_at(entries, at + 2));
        let size = u32_at(entries, at + 8) as usize;
        if u32_at(entries, at + 4) != 0 {
            // The value is an inode of its own: a feature that is refused.
            return Err(corrupt(inode));
        }
        let value = values.get(offset..offset + size).ok_or_else(|| corrupt(inode))?;
        let suffix = String::from_utf8_lossy(name);
        let (full, value) = match index {
            1 => (format!("user.{suffix}"), value.to_owned()),
            ACL_ACCESS => ("system.posix_acl_access".to_owned(), acl(inode, value)?),
            ACL_DEFAULT => ("system.posix_acl_default".to_owned(), acl(inode, value)?),
            4 => (format!("trusted.{suffix}"), value.to_owned()),
            6 => (format!("security.{suffix}"), value.to_owned()),
            7 => (format!("system.{suffix}"), value.to_owned()),
            _ => return Err(corrupt(inode)),
        };
        found.insert(full, value);
        at += (ENTRY_BYTES + name_length).next_multiple_of(4);
    }
    Ok(())
}

/// An ACL as system calls exchange it, of one as ext4 stores it: there, only users and groups carry an id.
fn acl(inode: &Inode, disk: &[u8]) -> Result<Vec<u8>, Ext4Error> {
    if u32_at(disk, 0) != ACL_DISK_VERSION {
        return Err(corrupt(inode));
    }
    let mut result = ACL_XATTR_VERSION.to_le_bytes().to_vec();
    let mut at = 4;
    while at < disk.len() {
        let head = disk.get(at..at + 4).ok_or_else(|| corrupt(inode))?;
        result.extend_from_slice(head);
        at += 4;
        if ACL_WITH_ID.contains(&u16_at(head, 0)) {
            result.extend_from_slice(disk.get(at..at + 4).ok_or_else(|| corrupt(inode))?);
            at += 4;
        } else {
            result.extend_from_slice(&u32::MAX.to_le_bytes());
        }
    }
    Ok(result)
}
