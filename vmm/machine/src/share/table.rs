//! What the guest knows: inodes by node id, open files by handle. Both are bounded.
use super::wire::ROOT_ID;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, Statx, StatxFlags, openat, openat2, statx};
use rustix::io::Errno;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// The most inodes that a guest may keep alive, whatever descriptors the process may have: each is one.
const MAX_NODES: usize = 1 << 20;
/// The most open files of a guest.
const MAX_HANDLES: usize = 1 << 16;
/// Descriptors that are left for everything else.
const SPARE_DESCRIPTORS: u64 = 256;

/// What an inode is, so far as the server treats it differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NodeKind {
    Regular,
    Directory,
    /// A link, a device, a pipe, a socket: never opened.
    Special,
}

/// The same inode in the same mount of the same export is the same node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    export: usize,
    mount: u64,
    device: (u32, u32),
    inode: u64,
}

/// When a file's content was last what the guest may have cached: its times and size as they were when it was opened.
pub(super) type ContentVersion = (i64, u32, i64, u32, u64);

/// An inode that the guest knows.
#[derive(Debug)]
pub(super) struct Node {
    fd: OwnedFd,
    key: Key,
    pub(super) kind: NodeKind,
    pub(super) read_only: bool,
    /// How many times the guest was told of it, less how many times it forgot.
    lookups: u64,
    pub(super) opened: Option<ContentVersion>,
}

impl Node {
    pub(super) fn export(&self) -> usize {
        self.key.export
    }

    /// A path that leads to the inode itself. Symbolic links are not followed by it.
    pub(super) fn proc_path(&self) -> String {
        format!("/proc/self/fd/{}", self.fd.as_raw_fd())
    }

    /// Fails on a read-only export.
    pub(super) fn writable(&self) -> Result<(), Errno> {
        if self.read_only { Err(Errno::ROFS) } else { Ok(()) }
    }

    pub(super) fn stat(&self) -> Result<Statx, Errno> {
        stat(self)
    }

    /// Opens the inode for data. Only files and directories are opened at all.
    pub(super) fn open(&self, flags: OFlags) -> Result<OwnedFd, Errno> {
        match self.kind {
            NodeKind::Regular | NodeKind::Directory => {}
            NodeKind::Special => return Err(Errno::NXIO),
        }
        // Not O_NOFOLLOW: what is followed is the magic link of /proc, to an inode whose type is known.
        openat(CWD, self.proc_path(), flags | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK, Mode::empty())
    }
}

impl AsFd for Node {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

pub(super) fn stat(fd: impl AsFd) -> Result<Statx, Errno> {
    statx(fd, "", AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW, StatxFlags::BASIC_STATS | StatxFlags::MNT_ID)
}

pub(super) fn kind_of(mode: u32) -> NodeKind {
    match mode & 0o170_000 {
        0o100_000 => NodeKind::Regular,
        0o040_000 => NodeKind::Directory,
        _ => NodeKind::Special,
    }
}

/// An open file or directory.
#[derive(Debug)]
pub(super) struct Handle {
    pub(super) file: File,
    pub(super) directory: bool,
}

/// Nodes and handles.
#[derive(Debug)]
pub(super) struct Table {
    nodes: HashMap<u64, Node>,
    by_key: HashMap<Key, u64>,
    handles: HashMap<u64, Handle>,
    next_node: u64,
    next_handle: u64,
    max_nodes: usize,
    /// Devices in the order in which they were met: inode numbers of the first are the guest's as they are.
    devices: Vec<(u32, u32)>,
}

impl Table {
    /// `max_descriptors` is what the process may have open.
    pub(super) fn new(max_descriptors: u64) -> Self {
        let max_nodes = max_descriptors.saturating_sub(SPARE_DESCRIPTORS) / 4 * 3;
        Self {
            nodes: HashMap::new(),
            by_key: HashMap::new(),
            handles: HashMap::new(),
            next_node: ROOT_ID + 1,
            next_handle: 1,
            max_nodes: usize::try_from(max_nodes).unwrap_or(MAX_NODES).min(MAX_NODES),
            devices: Vec::new(),
        }
    }

    pub(super) fn clear(&mut self) {
        self.nodes.clear();
        self.by_key.clear();
        self.handles.clear();
    }

    pub(super) fn node(&self, id: u64) -> Result<&Node, Errno> {
        self.nodes.get(&id).ok_or(Errno::STALE)
    }

    pub(super) fn node_mut(&mut self, id: u64) -> Result<&mut Node, Errno> {
        self.nodes.get_mut(&id).ok_or(Errno::STALE)
    }

    /// The directory of that id.
    pub(super) fn directory(&self, id: u64) -> Result<&Node, Errno> {
        let node = self.node(id)?;
        if node.kind == NodeKind::Directory { Ok(node) } else { Err(Errno::NOTDIR) }
    }

    /// Finds a name in a directory and counts one more lookup of what it stands for.
    pub(super) fn lookup(&mut self, parent: u64, name: &[u8]) -> Result<(u64, Statx), Errno> {
        let parent = self.directory(parent)?;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let fd = openat2(parent, name, flags, Mode::empty(), resolve)?;
        let (export, read_only) = (parent.export(), parent.read_only);
        self.insert(fd, export, read_only)
    }

    /// Counts one more lookup of an inode, by an `O_PATH` descriptor of it.
    pub(super) fn insert(&mut self, fd: OwnedFd, export: usize, read_only: bool) -> Result<(u64, Statx), Errno> {
        let stat = stat(&fd)?;
        let key = Key {
            export,
            mount: stat.stx_mnt_id,
            device: (stat.stx_dev_major, stat.stx_dev_minor),
            inode: stat.stx_ino,
        };
        let full = self.nodes.len() >= self.max_nodes;
        match self.by_key.entry(key) {
            Entry::Occupied(entry) => {
                let id = *entry.get();
                if let Some(node) = self.nodes.get_mut(&id) {
                    node.lookups = node.lookups.saturating_add(1);
                }
                Ok((id, stat))
            }
            Entry::Vacant(_) if full => Err(Errno::NFILE),
            Entry::Vacant(entry) => {
                let id = self.next_node;
                self.next_node += 1;
                entry.insert(id);
                let kind = kind_of(u32::from(stat.stx_mode));
                self.nodes.insert(id, Node { fd, key, kind, read_only, lookups: 1, opened: None });
                Ok((id, stat))
            }
        }
    }

    pub(super) fn forget(&mut self, id: u64, lookups: u64) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        node.lookups = node.lookups.saturating_sub(lookups);
        if node.lookups == 0 {
            let key = node.key;
            self.by_key.remove(&key);
            self.nodes.remove(&id);
        }
    }

    pub(super) fn add_handle(&mut self, fd: OwnedFd, directory: bool) -> Result<u64, Errno> {
        if self.handles.len() >= MAX_HANDLES {
            return Err(Errno::MFILE);
        }
        let id = self.next_handle;
        self.next_handle += 1;
        self.handles.insert(id, Handle { file: fd.into(), directory });
        Ok(id)
    }

    pub(super) fn remove_handle(&mut self, id: u64) {
        self.handles.remove(&id);
    }

    /// An open file.
    pub(super) fn file(&self, id: u64) -> Result<&File, Errno> {
        self.handles.get(&id).filter(|handle| !handle.directory).map(|handle| &handle.file).ok_or(Errno::BADF)
    }

    /// An open directory.
    pub(super) fn open_directory(&self, id: u64) -> Result<&File, Errno> {
        self.handles.get(&id).filter(|handle| handle.directory).map(|handle| &handle.file).ok_or(Errno::BADF)
    }

    /// The inode number that the guest sees: exports of several file systems may have the same ones.
    pub(super) fn inode_number(&mut self, stat: &Statx) -> u64 {
        let device = (stat.stx_dev_major, stat.stx_dev_minor);
        let index = match self.devices.iter().position(|known| *known == device) {
            Some(index) => index,
            None if self.devices.len() < 0xff => {
                self.devices.push(device);
                self.devices.len() - 1
            }
            None => 0xff,
        };
        stat.stx_ino ^ (index as u64) << 48
    }
}
