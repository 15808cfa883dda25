//! The file system's structures: superblock, group descriptors, inodes, extents, directories.
use super::Ext4Error;
use crate::tree::Run;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// The root directory's inode.
pub(super) const ROOT_INODE: u32 = 2;

pub(super) const FIFO: u32 = 0o010_000;
pub(super) const CHAR: u32 = 0o020_000;
pub(super) const DIRECTORY: u32 = 0o040_000;
pub(super) const BLOCK: u32 = 0o060_000;
pub(super) const REGULAR: u32 = 0o100_000;
pub(super) const SYMLINK: u32 = 0o120_000;
pub(super) const SOCKET: u32 = 0o140_000;

const SUPERBLOCK_AT: u64 = 1024;
const SUPERBLOCK_BYTES: usize = 1024;
const MAGIC: u16 = 0xef53;
const STATE_VALID: u16 = 1;
const STATE_ERRORS: u16 = 2;
/// s_feature_incompat.
const FILETYPE: u32 = 0x2;
const RECOVER: u32 = 0x4;
const EXTENTS: u32 = 0x40;
const WIDE: u32 = 0x80;
const FLEX_BG: u32 = 0x200;
const CSUM_SEED: u32 = 0x2000;
const LARGEDIR: u32 = 0x4000;
const SUPPORTED: u32 = FILETYPE | EXTENTS | WIDE | FLEX_BG | CSUM_SEED | LARGEDIR;

const INODE_EXTENTS: u32 = 0x8_0000;
const INODE_INLINE: u32 = 0x1000_0000;
const EXTENT_MAGIC: u16 = 0xf30a;
/// Extents longer than this are unwritten: they read as zeros.
const MAX_WRITTEN: u32 = 32_768;
const MAX_EXTENT_DEPTH: u16 = 5;
/// The most extents, and the most nodes of the extent tree, of one file: enough for any that a build writes.
const MAX_EXTENTS: usize = 1 << 22;
/// The largest directory, bytes.
const MAX_DIRECTORY_BYTES: u64 = 256 << 20;
/// Linux's limit for a link's target.
const MAX_TARGET_BYTES: u64 = 4096;
/// Bytes of i_block.
const BLOCK_MAP_BYTES: usize = 60;
const DIRECT_BLOCKS: usize = 12;
/// Bytes of an inode before its extra fields.
const OLD_INODE_BYTES: usize = 128;

/// An open image.
#[derive(Debug)]
pub(super) struct Image {
    file: Arc<File>,
    block_bytes: u64,
    inodes: u32,
    inodes_per_group: u32,
    inode_bytes: u16,
    groups_at: u64,
    descriptor_bytes: u64,
    wide: bool,
}

/// An inode's fields.
#[derive(Debug)]
pub(super) struct Inode {
    pub(super) number: u32,
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) size: u64,
    pub(super) mtime_s: i64,
    pub(super) links: u16,
    flags: u32,
    map: [u8; BLOCK_MAP_BYTES],
    /// The block of extended attributes; 0 for none.
    pub(super) xattr_block: u64,
    /// What follows the fields, in the inode itself.
    pub(super) rest: Vec<u8>,
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).and_then(|part| part.try_into().ok()).map_or(0, u16::from_le_bytes)
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|part| part.try_into().ok()).map_or(0, u32::from_le_bytes)
}

impl Inode {
    pub(super) fn file_type(&self) -> u32 {
        self.mode & 0o170_000
    }

    pub(super) fn is_directory(&self) -> bool {
        self.file_type() == DIRECTORY
    }

    /// A device's numbers, in the old or the new encoding.
    pub(super) fn device(&self) -> (u32, u32) {
        let old = u32_at(&self.map, 0);
        if old != 0 {
            return ((old >> 8) & 0xff, old & 0xff);
        }
        let new = u32_at(&self.map, 4);
        ((new & 0xf_ff00) >> 8, (new & 0xff) | ((new >> 12) & 0xf_ff00))
    }

    fn corrupt(&self, what: &'static str) -> Ext4Error {
        Ext4Error::Corrupt { what, inode: self.number }
    }
}

impl Image {
    pub(super) fn open(file: Arc<File>) -> Result<Self, Ext4Error> {
        let corrupt = |what| Ext4Error::Corrupt { what, inode: 0 };
        let mut block = [0; SUPERBLOCK_BYTES];
        file.read_exact_at(&mut block, SUPERBLOCK_AT).map_err(Ext4Error::Read)?;
        if u16_at(&block, 0x38) != MAGIC {
            return Err(corrupt("there is no ext4 superblock"));
        }
        let incompat = u32_at(&block, 0x60);
        let state = u16_at(&block, 0x3a);
        if incompat & RECOVER != 0 || state & STATE_VALID == 0 || state & STATE_ERRORS != 0 {
            return Err(Ext4Error::Unclean);
        }
        if incompat & !SUPPORTED != 0 {
            return Err(Ext4Error::Features(incompat & !SUPPORTED));
        }
        let log = u32_at(&block, 0x18);
        if log > 6 {
            return Err(corrupt("its block size"));
        }
        let block_bytes = 1024u64 << log;
        let wide = incompat & WIDE != 0;
        let descriptor_bytes = if wide { u64::from(u16_at(&block, 0xfe)) } else { 32 };
        let inodes_per_group = u32_at(&block, 0x28);
        let inode_bytes = if u32_at(&block, 0x4c) == 0 { 128 } else { u16_at(&block, 0x58) };
        if inodes_per_group == 0
            || !(128..=4096).contains(&inode_bytes)
            || !inode_bytes.is_power_of_two()
            || !(32..=1024).contains(&descriptor_bytes)
        {
            return Err(corrupt("its superblock"));
        }
        Ok(Self {
            file,
            block_bytes,
            inodes: u32_at(&block, 0),
            inodes_per_group,
            inode_bytes,
            groups_at: (u64::from(u32_at(&block, 0x14)) + 1) * block_bytes,
            descriptor_bytes,
            wide,
        })
    }

    pub(super) fn file(&self) -> Arc<File> {
        Arc::clone(&self.file)
    }

    fn read(&self, inode: u32, buffer: &mut [u8], at: u64) -> Result<(), Ext4Error> {
        self.file.read_exact_at(buffer, at).map_err(|source| match source.kind() {
            std::io::ErrorKind::UnexpectedEof => Ext4Error::Corrupt { what: "it leads beyond the end", inode },
            _ => Ext4Error::Read(source),
        })
    }

    fn block_at(&self, inode: u32, block: u64) -> Result<u64, Ext4Error> {
        let at = block.checked_mul(self.block_bytes).filter(|at| *at < 1 << 62);
        at.ok_or(Ext4Error::Corrupt { what: "a block's number", inode })
    }

    pub(super) fn block(&self, inode: u32, block: u64) -> Result<Vec<u8>, Ext4Error> {
        let mut bytes = vec![0; self.block_bytes as usize];
        self.read(inode, &mut bytes, self.block_at(inode, block)?)?;
        Ok(bytes)
    }

    pub(super) fn inode(&self, number: u32) -> Result<Inode, Ext4Error> {
        if number == 0 || number > self.inodes {
            return Err(Ext4Error::Corrupt { what: "an inode's number", inode: number });
        }
        let (group, index) = ((number - 1) / self.inodes_per_group, (number - 1) % self.inodes_per_group);
        let mut descriptor = [0; 64];
        let wanted = if self.wide && self.descriptor_bytes >= 64 { 64 } else { 32 };
        let part = descriptor.get_mut(..wanted).unwrap_or_default();
        self.read(number, part, self.groups_at + u64::from(group) * self.descriptor_bytes)?;
        let table = u64::from(u32_at(&descriptor, 0x8)) | (u64::from(u32_at(&descriptor, 0x28)) << 32);
        // Both terms are far below the limit of a u64.
        let at = self.block_at(number, table)? + u64::from(index) * u64::from(self.inode_bytes);
        let mut bytes = vec![0; self.inode_bytes.into()];
        self.read(number, &mut bytes, at)?;
        let mut map = [0; BLOCK_MAP_BYTES];
        for (to, from) in map.iter_mut().zip(bytes.iter().skip(0x28)) {
            *to = *from;
        }
        let wide16 = |low: usize, high: usize| u32::from(u16_at(&bytes, low)) | (u32::from(u16_at(&bytes, high)) << 16);
        let extra = usize::from(u16_at(&bytes, 0x80));
        let has_extra = bytes.len() > OLD_INODE_BYTES && extra <= bytes.len() - OLD_INODE_BYTES;
        let mut mtime_s = i64::from(u32_at(&bytes, 0x10) as i32);
        if has_extra && extra >= 12 {
            mtime_s += i64::from(u32_at(&bytes, 0x88) & 3) << 32;
        }
        let inode = Inode {
            number,
            mode: u16_at(&bytes, 0).into(),
            uid: wide16(0x2, 0x78),
            gid: wide16(0x18, 0x7a),
            size: u64::from(u32_at(&bytes, 0x4)) | (u64::from(u32_at(&bytes, 0x6c)) << 32),
            mtime_s,
            links: u16_at(&bytes, 0x1a),
            flags: u32_at(&bytes, 0x20),
            map,
            xattr_block: u64::from(u32_at(&bytes, 0x68)) | (u64::from(u16_at(&bytes, 0x76)) << 32),
            rest: if has_extra { bytes.split_off(OLD_INODE_BYTES + extra) } else { Vec::new() },
        };
        if inode.links == 0 {
            return Err(inode.corrupt("a name leads to a removed file"));
        }
        Ok(inode)
    }

    /// Where a file's bytes are.
    pub(super) fn runs(&self, inode: &Inode) -> Result<Vec<Run>, Ext4Error> {
        if inode.flags & INODE_INLINE != 0 {
            return Err(inode.corrupt("its data is in the inode"));
        }
        let mut runs = Vec::new();
        if inode.flags & INODE_EXTENTS != 0 {
            let mut nodes = 0;
            self.extents(inode, &inode.map, None, &mut runs, &mut nodes)?;
        } else {
            self.direct_blocks(inode, &mut runs)?;
        }
        let mut end = 0;
        for run in &runs {
            if run.logical < end {
                return Err(inode.corrupt("its extents overlap"));
            }
            // Both have at most 48 bits.
            end = run.logical + run.length;
        }
        Ok(runs)
    }

    fn direct_blocks(&self, inode: &Inode, runs: &mut Vec<Run>) -> Result<(), Ext4Error> {
        if inode.size.div_ceil(self.block_bytes) > DIRECT_BLOCKS as u64 {
            return Err(inode.corrupt("it has a block map, and extents are expected"));
        }
        for index in 0..DIRECT_BLOCKS {
            let block = u64::from(u32_at(&inode.map, index * 4));
            if block != 0 {
                runs.push(Run {
                    logical: index as u64 * self.block_bytes,
                    physical: self.block_at(inode.number, block)?,
                    length: self.block_bytes,
                });
            }
        }
        Ok(())
    }

    /// Reads a node of the extent tree. `depth` is what the node above demands.
    fn extents(
        &self,
        inode: &Inode,
        node: &[u8],
        depth: Option<u16>,
        runs: &mut Vec<Run>,
        nodes: &mut usize,
    ) -> Result<(), Ext4Error> {
        let (count, found) = (usize::from(u16_at(node, 2)), u16_at(node, 6));
        *nodes += 1;
        if u16_at(node, 0) != EXTENT_MAGIC
            || found > MAX_EXTENT_DEPTH
            || depth.is_some_and(|depth| depth != found)
            || 12 + 12 * count > node.len()
            || *nodes > MAX_EXTENTS
        {
            return Err(inode.corrupt("its extent tree"));
        }
        for index in 0..count {
            let at = 12 + 12 * index;
            if found == 0 {
                let length = u32::from(u16_at(node, at + 4));
                if length > MAX_WRITTEN {
                    continue;
                }
                if runs.len() >= MAX_EXTENTS {
                    return Err(inode.corrupt("its number of extents"));
                }
                let start = u64::from(u32_at(node, at + 8)) | (u64::from(u16_at(node, at + 6)) << 32);
                runs.push(Run {
                    logical: u64::from(u32_at(node, at)) * self.block_bytes,
                    physical: self.block_at(inode.number, start)?,
                    length: u64::from(length) * self.block_bytes,
                });
            } else {
                let child = u64::from(u32_at(node, at + 4)) | (u64::from(u16_at(node, at + 8)) << 32);
                let block = self.block(inode.number, child)?;
                self.extents(inode, &block, Some(found - 1), runs, nodes)?;
            }
        }
        Ok(())
    }

    /// All of a small file, whose size the caller has checked.
    fn read_all(&self, inode: &Inode) -> Result<Vec<u8>, Ext4Error> {
        let mut bytes = vec![0; inode.size as usize];
        for run in self.runs(inode)? {
            let Some(part) = bytes.get_mut(run.logical as usize..) else { continue };
            let length = part.len().min(run.length as usize);
            self.read(inode.number, part.get_mut(..length).unwrap_or_default(), run.physical)?;
        }
        Ok(bytes)
    }

    /// A directory's names and inodes.
    pub(super) fn entries(&self, inode: &Inode) -> Result<Vec<(Vec<u8>, u32)>, Ext4Error> {
        if inode.size > MAX_DIRECTORY_BYTES {
            return Err(inode.corrupt("its size as a directory"));
        }
        let bytes = self.read_all(inode)?;
        let mut entries = Vec::new();
        for block in bytes.chunks(self.block_bytes as usize) {
            let mut at = 0;
            while at + 8 <= block.len() {
                let length = match u16_at(block, at + 4) {
                    // 64 KiB do not fit the field.
                    0 | u16::MAX if self.block_bytes == 65_536 => 65_536,
                    length => usize::from(length),
                };
                let name_length = usize::from(block.get(at + 6).copied().unwrap_or(0));
                if length < 8 || !length.is_multiple_of(4) || at + length > block.len() || 8 + name_length > length {
                    return Err(inode.corrupt("an entry of its directory"));
                }
                let number = u32_at(block, at);
                if number != 0 && name_length > 0 {
                    let name = block.get(at + 8..at + 8 + name_length).unwrap_or_default();
                    if name.contains(&b'/') || name.contains(&0) {
                        return Err(inode.corrupt("a name in its directory"));
                    }
                    entries.push((name.to_owned(), number));
                }
                at += length;
            }
        }
        Ok(entries)
    }

    pub(super) fn link_target(&self, inode: &Inode) -> Result<Vec<u8>, Ext4Error> {
        if inode.size == 0 || inode.size > MAX_TARGET_BYTES {
            return Err(inode.corrupt("a link's length"));
        }
        let target = if inode.flags & INODE_EXTENTS == 0 && inode.size < BLOCK_MAP_BYTES as u64 {
            inode.map.get(..inode.size as usize).unwrap_or_default().to_owned()
        } else {
            self.read_all(inode)?
        };
        if target.contains(&0) {
            return Err(inode.corrupt("a link's target"));
        }
        Ok(target)
    }

    pub(super) fn xattrs(&self, inode: &Inode) -> Result<BTreeMap<String, Vec<u8>>, Ext4Error> {
        let mut found = BTreeMap::new();
        super::xattr::in_inode(inode, &mut found)?;
        if inode.xattr_block != 0 {
            let block = self.block(inode.number, inode.xattr_block)?;
            super::xattr::in_block(inode, &block, &mut found)?;
        }
        Ok(found)
    }
}
