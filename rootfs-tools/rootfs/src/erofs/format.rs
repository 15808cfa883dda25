//! The on-disk format, as far as it is used: fs/erofs/erofs_fs.h of Linux 6.12. All numbers are little-endian.

/// Size of a block: that of a page, so that the guest maps files without copying.
pub(super) const BLOCK_BYTES: usize = 4096;
/// Inodes are at multiples of this, counted from the start of the metadata; the quotient is the inode's number (nid).
pub(super) const SLOT_BYTES: usize = 32;
pub(super) const SUPERBLOCK_AT: usize = 1024;
/// Within the superblock.
pub(super) const VOLUME_NAME_AT: usize = 64;
const MAGIC: u32 = 0xE0F5_E1E2;
/// Inodes' times are modification times.
const FEATURE_COMPAT_MTIME: u32 = 2;

pub(super) const COMPACT_INODE_BYTES: usize = 32;
pub(super) const EXTENDED_INODE_BYTES: usize = 64;
const VERSION_EXTENDED: u16 = 1;
/// Data in whole blocks.
pub(super) const LAYOUT_PLAIN: u16 = 0;
/// The last part of the data follows the inode, in the same block.
pub(super) const LAYOUT_INLINE: u16 = 2;

/// `struct erofs_xattr_ibody_header`, here always of zeroes: no shared attributes, no filter.
pub(super) const XATTR_HEADER_BYTES: usize = 12;
pub(super) const DIRENT_BYTES: usize = 12;

pub(super) const S_IFMT: u16 = 0o170_000;
pub(super) const S_IFIFO: u16 = 0o010_000;
pub(super) const S_IFCHR: u16 = 0o020_000;
pub(super) const S_IFDIR: u16 = 0o040_000;
pub(super) const S_IFBLK: u16 = 0o060_000;
pub(super) const S_IFREG: u16 = 0o100_000;
pub(super) const S_IFLNK: u16 = 0o120_000;

/// Attribute name prefixes and their numbers; the ACLs' names are prefixes with nothing behind.
const XATTR_PREFIXES: [(&[u8], u8); 5] = [
    (b"user.", 1),
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"trusted.", 4),
    (b"security.", 6),
];

/// What `struct erofs_super_block` says about an image.
pub(super) struct Superblock {
    pub(super) root_nid: u16,
    pub(super) inodes: u64,
    pub(super) build_time: (i64, u32),
    pub(super) blocks: u32,
    pub(super) meta_block: u32,
    pub(super) uuid: [u8; 16],
    /// Zero-terminated.
    pub(super) volume_name: [u8; 16],
}

impl Superblock {
    /// The image's first block. The checksum is left out: its verification would cost the guest 10,000 instructions per layer.
    pub(super) fn block(&self) -> [u8; BLOCK_BYTES] {
        let mut block = [0; BLOCK_BYTES];
        let mut put = |at: usize, bytes: &[u8]| {
            block[SUPERBLOCK_AT + at..SUPERBLOCK_AT + at + bytes.len()].copy_from_slice(bytes);
        };
        put(0, &MAGIC.to_le_bytes());
        put(8, &FEATURE_COMPAT_MTIME.to_le_bytes());
        put(12, &[BLOCK_BYTES.trailing_zeros() as u8]);
        put(14, &self.root_nid.to_le_bytes());
        put(16, &self.inodes.to_le_bytes());
        put(24, &self.build_time.0.to_le_bytes());
        put(32, &self.build_time.1.to_le_bytes());
        put(36, &self.blocks.to_le_bytes());
        put(40, &self.meta_block.to_le_bytes());
        put(48, &self.uuid);
        put(VOLUME_NAME_AT, &self.volume_name);
        block
    }
}

/// An inode's on-disk fields.
#[derive(Debug, Clone, Copy)]
pub(super) struct DiskInode {
    pub(super) extended: bool,
    pub(super) layout: u16,
    pub(super) xattr_bytes: usize,
    pub(super) mode: u16,
    pub(super) links: u32,
    pub(super) size_bytes: u64,
    /// First data block, or the device number.
    pub(super) block_or_device: u32,
    /// What a 32-bit stat would show.
    pub(super) number: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: (i64, u32),
}

impl DiskInode {
    /// Appends `struct erofs_inode_compact` or `erofs_inode_extended`.
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        let format = self.layout << 1 | if self.extended { VERSION_EXTENDED } else { 0 };
        out.extend_from_slice(&format.to_le_bytes());
        let count = if self.xattr_bytes == 0 { 0 } else { (self.xattr_bytes - XATTR_HEADER_BYTES) / 4 + 1 };
        out.extend_from_slice(&(count as u16).to_le_bytes());
        out.extend_from_slice(&self.mode.to_le_bytes());
        if self.extended {
            out.extend_from_slice(&[0; 2]);
            out.extend_from_slice(&self.size_bytes.to_le_bytes());
        } else {
            out.extend_from_slice(&(self.links as u16).to_le_bytes());
            out.extend_from_slice(&(self.size_bytes as u32).to_le_bytes());
            out.extend_from_slice(&[0; 4]);
        }
        out.extend_from_slice(&self.block_or_device.to_le_bytes());
        out.extend_from_slice(&self.number.to_le_bytes());
        if self.extended {
            out.extend_from_slice(&self.uid.to_le_bytes());
            out.extend_from_slice(&self.gid.to_le_bytes());
            out.extend_from_slice(&self.mtime.0.to_le_bytes());
            out.extend_from_slice(&self.mtime.1.to_le_bytes());
            out.extend_from_slice(&self.links.to_le_bytes());
            out.extend_from_slice(&[0; 16]);
        } else {
            out.extend_from_slice(&(self.uid as u16).to_le_bytes());
            out.extend_from_slice(&(self.gid as u16).to_le_bytes());
            out.extend_from_slice(&[0; 4]);
        }
    }
}

/// A directory entry's file type, from a mode.
pub(super) fn file_type(mode: u16) -> u8 {
    match mode & S_IFMT {
        S_IFREG => 1,
        S_IFDIR => 2,
        S_IFCHR => 3,
        S_IFBLK => 4,
        S_IFIFO => 5,
        S_IFLNK => 7,
        _ => 0,
    }
}

/// Linux's encoding of a device number (`new_encode_dev`).
pub(super) fn device_number(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// Appends `struct erofs_xattr_entry`, padded to 4 bytes. False, and nothing appended, if the name is in none of the
/// namespaces that Linux's file systems have.
pub(super) fn encode_xattr(name: &[u8], value: &[u8], out: &mut Vec<u8>) -> bool {
    for (prefix, index) in XATTR_PREFIXES {
        let Some(rest) = name.strip_prefix(prefix) else { continue };
        let takes_rest = prefix.ends_with(b".");
        let (Ok(name_len), Ok(value_len)) = (u8::try_from(rest.len()), u16::try_from(value.len())) else { continue };
        if takes_rest == rest.is_empty() {
            continue;
        }
        out.extend_from_slice(&[name_len, index]);
        out.extend_from_slice(&value_len.to_le_bytes());
        out.extend_from_slice(rest);
        out.extend_from_slice(value);
        out.resize(out.len().next_multiple_of(4), 0);
        return true;
    }
    false
}
