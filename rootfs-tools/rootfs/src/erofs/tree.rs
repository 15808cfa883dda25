//! The tree of a layer, or of several, in memory: names and inodes apart (hard links), both in flat vectors, names in
//! one arena. Some 130 bytes an entry.
//!
//! A node's parent always has a smaller index than the node. Removed nodes stay in the vectors, marked; what is below
//! them is not marked, but cannot be found any more.
use super::format::{S_IFCHR, S_IFDIR, S_IFMT};
use hashbrown::HashTable;
use std::hash::{BuildHasher, RandomState};

/// The most entries, replaced ones included. The largest images in use have some 500,000.
pub const MAX_ENTRIES: usize = 2 << 20;
/// The most bytes of names, link targets and extended attributes.
pub const MAX_TEXT_BYTES: usize = 256 << 20;
/// The longest name of one path component: NAME_MAX of Linux.
pub const MAX_COMPONENT_BYTES: usize = 255;
/// The most symbolic links on the way to one entry.
const MAX_LINKS: u32 = 40;

/// The root directory's index, as a node and as an inode.
pub(super) const ROOT: u32 = 0;
const NONE: u32 = u32::MAX;

/// A name in a directory.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) parent: u32,
    pub(super) inode: u32,
    first_child: u32,
    next_sibling: u32,
    name_at: u32,
    name_len: u8,
    pub(super) removed: bool,
    /// The layer that made or last touched it.
    layer: u16,
    /// The last layer that hid what older layers have here; 0 for none.
    opaque_layer: u16,
}

/// What a name stands for.
#[derive(Debug, Clone)]
pub(super) struct Inode {
    /// Type and permission bits.
    pub(super) mode: u16,
    pub(super) opaque: bool,
    /// Made because something was below it, not because an entry said so.
    pub(super) implicit: bool,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: (i64, u32),
    /// Of a file's data or a link's target.
    pub(super) size_bytes: u64,
    /// The first data block, or the device number.
    pub(super) block_or_device: u32,
    /// Of a file: where its tail is in the spool.
    pub(super) tail: Option<u64>,
    /// Of a link: where its target is in the text.
    pub(super) target_at: u32,
    /// Encoded extended attributes in the text.
    pub(super) xattrs_at: u32,
    pub(super) xattrs_len: u32,
}

impl Inode {
    pub(super) fn new(mode: u16) -> Self {
        Self {
            mode,
            opaque: false,
            implicit: false,
            uid: 0,
            gid: 0,
            mtime: (0, 0),
            size_bytes: 0,
            block_or_device: 0,
            tail: None,
            target_at: 0,
            xattrs_at: 0,
            xattrs_len: 0,
        }
    }

    pub(super) fn is_directory(&self) -> bool {
        self.mode & S_IFMT == S_IFDIR
    }

    /// overlayfs's whiteout: a character device 0:0.
    fn is_whiteout(&self) -> bool {
        self.mode & S_IFMT == S_IFCHR && self.block_or_device == 0
    }
}

/// Why an entry does not fit the tree.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum TreeProblem {
    Problem(&'static str),
    TooManyEntries,
    TooMuchText,
}

impl From<&'static str> for TreeProblem {
    fn from(problem: &'static str) -> Self {
        Self::Problem(problem)
    }
}

/// Where an entry's name leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place<'p> {
    Root,
    /// In a directory, under a name.
    Name(u32, &'p [u8]),
}

/// Names and inodes.
#[derive(Debug)]
pub(super) struct Tree {
    pub(super) nodes: Vec<Node>,
    pub(super) inodes: Vec<Inode>,
    text: Vec<u8>,
    /// Nodes by parent and name.
    table: HashTable<u32>,
    hasher: RandomState,
    /// The layer being read, from 1.
    layer: u16,
    /// Several layers become one image: whiteouts act on the tree. Otherwise they are kept for overlayfs.
    merging: bool,
}

impl Tree {
    pub(super) fn new(merging: bool) -> Self {
        let mut root = Inode::new(S_IFDIR | 0o755);
        root.implicit = true;
        let node = Node {
            parent: ROOT,
            inode: ROOT,
            first_child: NONE,
            next_sibling: NONE,
            name_at: 0,
            name_len: 0,
            removed: false,
            layer: 0,
            opaque_layer: 0,
        };
        Self {
            nodes: vec![node],
            inodes: vec![root],
            text: Vec::new(),
            table: HashTable::new(),
            hasher: RandomState::new(),
            layer: 0,
            merging,
        }
    }

    pub(super) fn begin_layer(&mut self) {
        self.layer = self.layer.saturating_add(1);
    }

    pub(super) fn name(&self, node: u32) -> &[u8] {
        let node = &self.nodes[node as usize];
        self.text(node.name_at, u32::from(node.name_len))
    }

    pub(super) fn text(&self, at: u32, len: u32) -> &[u8] {
        &self.text[at as usize..at as usize + len as usize]
    }

    pub(super) fn add_text(&mut self, bytes: &[u8]) -> Result<u32, TreeProblem> {
        if self.text.len() + bytes.len() > MAX_TEXT_BYTES {
            return Err(TreeProblem::TooMuchText);
        }
        let at = self.text.len() as u32;
        self.text.extend_from_slice(bytes);
        Ok(at)
    }

    pub(super) fn inode_of(&self, node: u32) -> &Inode {
        &self.inodes[self.nodes[node as usize].inode as usize]
    }

    fn inode_of_mut(&mut self, node: u32) -> &mut Inode {
        let inode = self.nodes[node as usize].inode as usize;
        &mut self.inodes[inode]
    }

    /// Splits a path and finds or makes the directory that it is in.
    pub(super) fn place<'p>(&mut self, path: &'p [u8]) -> Result<Place<'p>, TreeProblem> {
        let mut components = components(path)?;
        let Some(last) = components.pop() else { return Ok(Place::Root) };
        let mut parent = ROOT;
        for component in components {
            parent = self.enter(parent, component)?;
        }
        Ok(Place::Name(parent, last))
    }

    /// The directory of that name, made if there is none.
    fn enter(&mut self, parent: u32, name: &[u8]) -> Result<u32, TreeProblem> {
        let Some(found) = self.lookup(parent, name) else { return self.make_directory(parent, name) };
        let inode = self.inode_of(found);
        if inode.is_directory() {
            self.nodes[found as usize].layer = self.layer;
            return Ok(found);
        }
        if !self.merging && inode.is_whiteout() {
            return self.make_directory(parent, name);
        }
        if inode.mode & S_IFMT != super::format::S_IFLNK {
            return Err("it lies below an entry that is not a directory".into());
        }
        if self.nodes[found as usize].layer == self.layer {
            return Err("it lies below a symbolic link of the same layer".into());
        }
        self.follow(found)
    }

    /// The directory that an older layer's link leads to, as it would be found in a root directory.
    fn follow(&mut self, link: u32) -> Result<u32, TreeProblem> {
        let mut links = 0;
        let mut at = self.nodes[link as usize].parent;
        let mut todo: Vec<Vec<u8>> = Vec::new();
        let mut next = Some(link);
        loop {
            if let Some(link) = next.take() {
                links += 1;
                if links > MAX_LINKS {
                    return Err("it lies below a symbolic link that leads in a circle".into());
                }
                let inode = self.inode_of(link);
                // Only targets that need a block of their own, close to 4 KiB, are not in the text.
                if inode.block_or_device != 0 {
                    return Err("it lies below a symbolic link with a very long target".into());
                }
                let target = self.text(inode.target_at, inode.size_bytes as u32).to_vec();
                if target.first() == Some(&b'/') {
                    at = ROOT;
                }
                let parts = target.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".");
                todo.extend(parts.rev().map(<[u8]>::to_vec));
            }
            let Some(part) = todo.pop() else { return Ok(at) };
            if part == b".." {
                at = self.nodes[at as usize].parent;
                continue;
            }
            if part.len() > MAX_COMPONENT_BYTES {
                return Err("it lies below a symbolic link to a name that is too long".into());
            }
            match self.lookup(at, &part) {
                None => at = self.make_directory(at, &part)?,
                Some(found) if self.inode_of(found).is_directory() => {
                    self.nodes[found as usize].layer = self.layer;
                    at = found;
                }
                Some(found) if self.inode_of(found).mode & S_IFMT == super::format::S_IFLNK => next = Some(found),
                Some(_) => return Err("it lies below an entry that is not a directory".into()),
            }
        }
    }

    fn make_directory(&mut self, parent: u32, name: &[u8]) -> Result<u32, TreeProblem> {
        let mut inode = Inode::new(S_IFDIR | 0o755);
        inode.implicit = true;
        self.insert(parent, name, inode)
    }

    pub(super) fn lookup(&self, parent: u32, name: &[u8]) -> Option<u32> {
        let hash = self.hasher.hash_one((parent, name));
        self.table.find(hash, |node| self.nodes[*node as usize].parent == parent && self.name(*node) == name).copied()
    }

    /// Finds the target of a hard link, an entry of the same tree.
    pub(super) fn find(&self, path: &[u8]) -> Result<Option<u32>, TreeProblem> {
        let mut at = ROOT;
        for component in components(path)? {
            match self.lookup(at, component) {
                Some(found) => at = found,
                None => return Ok(None),
            }
        }
        Ok(Some(at))
    }

    /// Puts an inode under a name. A directory keeps what is in it when a directory comes in its place; anything else
    /// is replaced.
    pub(super) fn insert(&mut self, parent: u32, name: &[u8], mut inode: Inode) -> Result<u32, TreeProblem> {
        if let Some(found) = self.lookup(parent, name) {
            let old = self.inode_of(found);
            if old.is_directory() && inode.is_directory() {
                inode.opaque = old.opaque;
                *self.inode_of_mut(found) = inode;
                self.nodes[found as usize].layer = self.layer;
                return Ok(found);
            }
            // What older layers have below this name was hidden by this layer, and stays hidden.
            inode.opaque = !self.merging && inode.is_directory() && old.is_whiteout();
            self.remove(found);
        }
        if self.inodes.len() >= MAX_ENTRIES {
            return Err(TreeProblem::TooManyEntries);
        }
        let index = self.inodes.len() as u32;
        self.inodes.push(inode);
        self.add_node(parent, name, index)
    }

    /// Puts another name to the inode of `target`.
    pub(super) fn link(&mut self, parent: u32, name: &[u8], target: u32) -> Result<(), TreeProblem> {
        if self.inode_of(target).is_directory() {
            return Err("it is a hard link to a directory".into());
        }
        if self.inode_of(target).is_whiteout() {
            return Err("it is a hard link to nothing in this layer".into());
        }
        let inode = self.nodes[target as usize].inode;
        if let Some(found) = self.lookup(parent, name) {
            if self.nodes[found as usize].inode == inode {
                return Ok(());
            }
            self.remove(found);
        }
        self.add_node(parent, name, inode).map(drop)
    }

    /// Replaces the root's attributes.
    pub(super) fn set_root(&mut self, mut inode: Inode) {
        inode.opaque = self.inodes[ROOT as usize].opaque;
        self.inodes[ROOT as usize] = inode;
    }

    /// Hides what older layers have under a name.
    pub(super) fn whiteout(&mut self, parent: u32, name: &[u8]) -> Result<(), TreeProblem> {
        let Some(found) = self.lookup(parent, name) else {
            return if self.merging { Ok(()) } else { self.insert(parent, name, Inode::new(S_IFCHR)).map(drop) };
        };
        if self.nodes[found as usize].layer < self.layer {
            self.remove(found);
        } else if self.inode_of(found).is_directory() {
            self.make_opaque(found);
        }
        Ok(())
    }

    /// Hides what older layers have in a directory.
    pub(super) fn make_opaque(&mut self, directory: u32) {
        if !self.merging {
            self.inode_of_mut(directory).opaque = true;
            return;
        }
        let mut directories = vec![directory];
        while let Some(directory) = directories.pop() {
            // Once per layer is enough, and keeps a hostile layer from making this slow.
            if self.nodes[directory as usize].opaque_layer == self.layer {
                continue;
            }
            self.nodes[directory as usize].opaque_layer = self.layer;
            let mut child = self.nodes[directory as usize].first_child;
            while child != NONE {
                let node = &self.nodes[child as usize];
                let (next, removed, layer) = (node.next_sibling, node.removed, node.layer);
                if !removed && layer < self.layer {
                    self.remove(child);
                } else if !removed && self.inode_of(child).is_directory() {
                    directories.push(child);
                }
                child = next;
            }
        }
    }

    fn remove(&mut self, node: u32) {
        self.nodes[node as usize].removed = true;
        let hash = self.hasher.hash_one((self.nodes[node as usize].parent, self.name(node)));
        if let Ok(entry) = self.table.find_entry(hash, |other| *other == node) {
            entry.remove();
        }
    }

    fn add_node(&mut self, parent: u32, name: &[u8], inode: u32) -> Result<u32, TreeProblem> {
        if self.nodes.len() >= MAX_ENTRIES {
            return Err(TreeProblem::TooManyEntries);
        }
        let name_at = self.add_text(name)?;
        let index = self.nodes.len() as u32;
        let first_child = std::mem::replace(&mut self.nodes[parent as usize].first_child, index);
        self.nodes.push(Node {
            parent,
            inode,
            first_child: NONE,
            next_sibling: first_child,
            name_at,
            // Components are no longer than that.
            name_len: name.len() as u8,
            removed: false,
            layer: self.layer,
            opaque_layer: 0,
        });
        let (nodes, text, hasher) = (&self.nodes, &self.text, &self.hasher);
        let hash_of = |index: u32| {
            let node = &nodes[index as usize];
            let name = &text[node.name_at as usize..node.name_at as usize + usize::from(node.name_len)];
            hasher.hash_one((node.parent, name))
        };
        self.table.insert_unique(hash_of(index), index, |index| hash_of(*index));
        Ok(index)
    }
}

/// A path's components. Leading slashes mean the image's root, as in docker; `..` is refused.
fn components(path: &[u8]) -> Result<Vec<&[u8]>, TreeProblem> {
    let mut components = Vec::new();
    for component in path.split(|byte| *byte == b'/') {
        match component {
            b"" | b"." => {}
            b".." => return Err("its path holds `..`".into()),
            _ if component.len() > MAX_COMPONENT_BYTES => {
                return Err("a part of its path is longer than 255 bytes".into());
            }
            _ => components.push(component),
        }
    }
    Ok(components)
}
