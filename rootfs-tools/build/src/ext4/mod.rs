//! Reads the changes that an overlay left in its upper directory, straight from the ext4 image that holds it, and writes
//! nothing. A guest made the image, so it is hostile: it is never mounted here, each number in it is checked, and every
//! walk through it has an end. On-disk formats follow the kernel's Documentation/filesystems/ext4; whiteouts and opaque
//! directories its overlayfs.rst.
mod image;
#[cfg(test)]
mod tests;
mod xattr;

use crate::tree::{Changes, Content, Kind, Node};
use image::{Image, Inode};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The most files that one step may change.
const MAX_FILES: usize = 4_000_000;
/// The most that the files of one step may hold, holes included, bytes: a layer has no holes.
const MAX_TOTAL_BYTES: u64 = 256 << 30;
/// Linux's PATH_MAX.
const MAX_PATH_BYTES: usize = 4096;
/// Attributes of overlayfs itself.
const OVERLAY: &str = "trusted.overlay.";

/// Why an image cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Ext4Error {
    /// The file.
    #[error("cannot read the writable layer")]
    Read(#[source] io::Error),
    /// It was not unmounted.
    #[error("the writable layer was not unmounted cleanly: the guest did not shut down in order; build again")]
    Unclean,
    /// It has features that are not read here.
    #[error("the writable layer has features that are not supported (incompatible features {0:#x})")]
    Features(u32),
    /// What it says cannot be.
    #[error("the writable layer is damaged: {what} (inode {inode})")]
    Corrupt {
        /// What.
        what: &'static str,
        /// Where; 0 for the file system itself.
        inode: u32,
    },
    /// No such directory.
    #[error("the writable layer has no directory {}", .0.display())]
    Missing(PathBuf),
    /// Too much.
    #[error("the step changed more than fits a layer ({what})")]
    TooMuch {
        /// Of what.
        what: &'static str,
    },
}

/// Reads the changes below `directory` of the image.
pub fn read(file: File, directory: &Path) -> Result<Changes, Ext4Error> {
    let image = Image::open(Arc::new(file))?;
    let mut number = image::ROOT_INODE;
    for component in directory.components() {
        let name = component.as_os_str().as_bytes();
        let inode = image.inode(number)?;
        let entries = if inode.is_directory() { image.entries(&inode)? } else { Vec::new() };
        match entries.into_iter().find(|(entry, _)| entry == name) {
            Some((_, found)) => number = found,
            None => return Err(Ext4Error::Missing(directory.to_owned())),
        }
    }
    let mut walk = Walk {
        image: &image,
        changes: Changes::default(),
        links: HashMap::new(),
        seen: HashSet::new(),
        files: 0,
        bytes: 0,
    };
    walk.run(number)?;
    Ok(walk.changes)
}

struct Walk<'a> {
    image: &'a Image,
    changes: Changes,
    links: HashMap<u32, Arc<Node>>,
    seen: HashSet<u32>,
    files: usize,
    bytes: u64,
}

impl Walk<'_> {
    fn run(&mut self, top: u32) -> Result<(), Ext4Error> {
        let mut stack = vec![(PathBuf::new(), top)];
        while let Some((path, number)) = stack.pop() {
            // A directory has one name: another one would make a loop.
            if !self.seen.insert(number) {
                return Err(Ext4Error::Corrupt { what: "a directory is in two places", inode: number });
            }
            let directory = self.image.inode(number)?;
            if !directory.is_directory() {
                return Err(Ext4Error::Corrupt { what: "it should be a directory", inode: number });
            }
            for (name, child) in self.image.entries(&directory)? {
                if name == b"." || name == b".." {
                    continue;
                }
                self.files += 1;
                if self.files > MAX_FILES {
                    return Err(Ext4Error::TooMuch { what: "files" });
                }
                let path = path.join(OsStr::from_bytes(&name));
                if path.as_os_str().len() > MAX_PATH_BYTES {
                    return Err(Ext4Error::TooMuch { what: "a path's length" });
                }
                if self.entry(&path, child)? {
                    stack.push((path, child));
                }
            }
        }
        Ok(())
    }

    /// Takes one entry; says whether it is a directory to descend into.
    fn entry(&mut self, path: &Path, number: u32) -> Result<bool, Ext4Error> {
        if let Some(node) = self.links.get(&number) {
            self.changes.added.insert(path.to_owned(), Arc::clone(node));
            return Ok(false);
        }
        let inode = self.image.inode(number)?;
        let mut xattrs = self.image.xattrs(&inode)?;
        if xattrs.contains_key("trusted.overlay.redirect") || xattrs.contains_key("trusted.overlay.metacopy") {
            let what = "it was renamed or changed in a way that only its overlay knows";
            return Err(Ext4Error::Corrupt { what, inode: number });
        }
        let opaque = xattrs.get("trusted.overlay.opaque").is_some_and(|value| value == b"y");
        xattrs.retain(|name, _| !name.starts_with(OVERLAY));
        let kind = match inode.file_type() {
            image::DIRECTORY => Kind::Directory,
            image::REGULAR => {
                self.bytes = self.bytes.saturating_add(inode.size);
                if self.bytes > MAX_TOTAL_BYTES {
                    return Err(Ext4Error::TooMuch { what: "bytes" });
                }
                let runs = self.image.runs(&inode)?;
                Kind::File { size: inode.size, content: Content::Runs { file: self.image.file(), runs: runs.into() } }
            }
            image::SYMLINK => {
                let target = self.image.link_target(&inode)?;
                Kind::Symlink(PathBuf::from(OsStr::from_bytes(&target)))
            }
            image::CHAR => match inode.device() {
                (0, 0) => {
                    self.changes.removed.insert(path.to_owned());
                    return Ok(false);
                }
                (major, minor) => Kind::Char { major, minor },
            },
            image::BLOCK => {
                let (major, minor) = inode.device();
                Kind::Block { major, minor }
            }
            image::FIFO => Kind::Fifo,
            // A socket means nothing once its process is gone.
            image::SOCKET => return Ok(false),
            _ => return Err(Ext4Error::Corrupt { what: "it is of no known type", inode: number }),
        };
        let node = node(&inode, kind, xattrs);
        let directory = node.is_directory();
        if directory {
            if opaque {
                self.changes.opaque.insert(path.to_owned());
            }
        } else if inode.links > 1 {
            self.links.insert(number, Arc::clone(&node));
        }
        self.changes.added.insert(path.to_owned(), node);
        Ok(directory)
    }
}

fn node(inode: &Inode, kind: Kind, xattrs: BTreeMap<String, Vec<u8>>) -> Arc<Node> {
    let (uid, gid) = (inode.uid, inode.gid);
    Arc::new(Node { kind, mode: inode.mode & 0o7777, uid, gid, mtime_s: inode.mtime_s, xattrs })
}
