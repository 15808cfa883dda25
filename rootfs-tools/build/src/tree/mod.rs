//! Files as the builder sees them: nodes by path, the changes that a layer makes, and the view that stacked layers give.
//! Everything here is an index in memory; contents stay where they are until they are read. Paths are relative to the
//! root, whose own path is empty; they are resolved here and never by the host's kernel, so no link leads outside.
mod content;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::ops::Bound;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

pub use content::{Content, Run};

/// How many symbolic links a path may lead through, as in Linux.
const MAX_LINKS: usize = 40;

/// A file of any type. Hard links to one file share one node.
#[derive(Debug, Clone)]
pub struct Node {
    /// What it is.
    pub kind: Kind,
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time, seconds since the Epoch.
    pub mtime_s: i64,
    /// Extended attributes by full name.
    pub xattrs: BTreeMap<String, Vec<u8>>,
}

/// Types of files.
#[derive(Debug, Clone)]
pub enum Kind {
    /// A regular file.
    File {
        /// Bytes.
        size: u64,
        /// Where they are.
        content: Content,
    },
    /// A directory.
    Directory,
    /// A symbolic link and its target.
    Symlink(PathBuf),
    /// A character device.
    Char {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A block device.
    Block {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
}

impl Node {
    /// A directory of root's.
    pub fn directory(mode: u32) -> Self {
        Self { kind: Kind::Directory, mode, uid: 0, gid: 0, mtime_s: 0, xattrs: BTreeMap::new() }
    }

    /// Whether it is a directory.
    pub fn is_directory(&self) -> bool {
        matches!(self.kind, Kind::Directory)
    }
}

/// What a layer does to what is below it.
#[derive(Debug, Clone, Default)]
pub struct Changes {
    /// Files added or replaced, by path.
    pub added: BTreeMap<PathBuf, Arc<Node>>,
    /// Files removed, with all below them.
    pub removed: BTreeSet<PathBuf>,
    /// Directories whose lower content is hidden.
    pub opaque: BTreeSet<PathBuf>,
}

impl Changes {
    /// Whether nothing changes.
    pub fn is_empty(&self) -> bool {
        self.added.is_empty() && self.removed.is_empty() && self.opaque.is_empty()
    }
}

/// The files that a stack of layers shows.
#[derive(Debug, Clone, Default)]
pub struct View {
    nodes: BTreeMap<PathBuf, Arc<Node>>,
}

/// Why a path cannot be followed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}: too many symbolic links", path.display())]
pub struct LinkLoop {
    /// The path.
    pub path: PathBuf,
}

impl View {
    /// The node at `path`, which is taken as it is: links in it are not followed.
    pub fn get(&self, path: &Path) -> Option<&Arc<Node>> {
        self.nodes.get(path)
    }

    /// Whether there is a directory at `path` (the root always is one).
    pub fn is_directory(&self, path: &Path) -> bool {
        path.as_os_str().is_empty() || self.get(path).is_some_and(|node| node.is_directory())
    }

    /// Everything at and below `path`, in order.
    pub fn below<'a>(&'a self, path: &'a Path) -> impl Iterator<Item = (&'a Path, &'a Arc<Node>)> {
        self.nodes
            .range::<Path, _>((Bound::Included(path), Bound::Unbounded))
            .take_while(move |(at, _)| at.starts_with(path))
            .map(|(at, node)| (at.as_path(), node))
    }

    /// The names in a directory, in order.
    pub fn names<'a>(&'a self, directory: &'a Path) -> Vec<&'a OsStr> {
        let depth = directory.components().count();
        let mut names: Vec<&OsStr> = Vec::new();
        for (path, _) in self.below(directory) {
            if let Some(Component::Normal(name)) = path.components().nth(depth)
                && names.last() != Some(&name)
            {
                names.push(name);
            }
        }
        names
    }

    /// How many files there are.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Puts a layer on top: first its whiteouts, then its files.
    pub fn apply(&mut self, changes: &Changes) {
        for path in &changes.removed {
            self.remove(path);
        }
        for path in &changes.opaque {
            let inside: Vec<PathBuf> = self.below(path).map(|(at, _)| at.to_owned()).filter(|at| at != path).collect();
            for path in inside {
                self.nodes.remove(&path);
            }
        }
        for (path, node) in &changes.added {
            self.insert(path, node);
        }
    }

    /// Adds or replaces one file; what was below it goes unless both are directories.
    pub fn insert(&mut self, path: &Path, node: &Arc<Node>) {
        if !node.is_directory() && self.nodes.get(path).is_some_and(|old| old.is_directory()) {
            self.remove(path);
        }
        self.nodes.insert(path.to_owned(), Arc::clone(node));
    }

    fn remove(&mut self, path: &Path) {
        let gone: Vec<PathBuf> = self.below(path).map(|(at, _)| at.to_owned()).collect();
        for path in gone {
            self.nodes.remove(&path);
        }
    }

    /// Follows all links in `path`, absolute ones from the view's root, `..` stopping at it. What does not exist is kept
    /// as it is written, so the result may name nothing.
    pub fn resolve(&self, path: &Path) -> Result<PathBuf, LinkLoop> {
        self.walk(path, true)
    }

    /// As [`resolve`](Self::resolve), but for the last component.
    pub fn resolve_parent(&self, path: &Path) -> Result<PathBuf, LinkLoop> {
        self.walk(path, false)
    }

    fn walk(&self, path: &Path, follow_last: bool) -> Result<PathBuf, LinkLoop> {
        let mut links = 0;
        let mut result = PathBuf::new();
        // What is still to be walked, the next component last.
        let mut rest: Vec<PathBuf> = reversed(path);
        while let Some(component) = rest.pop() {
            if component.as_os_str() == ".." {
                result.pop();
                continue;
            }
            result.push(&component);
            if rest.is_empty() && !follow_last {
                break;
            }
            if let Some(Kind::Symlink(target)) = self.get(&result).map(|node| &node.kind) {
                links += 1;
                if links > MAX_LINKS {
                    return Err(LinkLoop { path: path.to_owned() });
                }
                if target.is_absolute() {
                    result = PathBuf::new();
                } else {
                    result.pop();
                }
                rest.extend(reversed(target));
            }
        }
        Ok(result)
    }
}

/// The components of a path without `/` and `.`, the last one first.
fn reversed(path: &Path) -> Vec<PathBuf> {
    path.components()
        .rev()
        .filter_map(|component| match component {
            Component::Normal(name) => Some(PathBuf::from(name)),
            Component::ParentDir => Some(PathBuf::from("..")),
            _ => None,
        })
        .collect()
}

/// A path without `/` in front, `.` and `..`, the latter as if `/` were the root.
pub fn normalized(path: &Path) -> PathBuf {
    let mut result = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => result.push(name),
            Component::ParentDir => {
                result.pop();
            }
            _ => {}
        }
    }
    result
}
