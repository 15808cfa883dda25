//! Image layers to EROFS images, straight from their tar streams.
//!
//! The stream is read once and nothing is unpacked: file data goes into the image as it comes, the tree of names and
//! inodes is kept in memory and written behind it. The same streams give the same bytes. Nothing is compressed, blocks are
//! 4 KiB; short files and the ends of long ones stand beside their inodes.
//!
//! Whiteouts (image-spec, layer.md) become overlayfs's own: `.wh.NAME` a character device 0:0, `.wh..wh..opq` the
//! attribute `trusted.overlay.opaque=y`. Several layers can be merged into one image instead, whiteouts applied.
mod data;
mod format;
mod image;
mod tree;

pub use data::MAX_IMAGE_BYTES;
pub use tree::{MAX_COMPONENT_BYTES, MAX_ENTRIES, MAX_TEXT_BYTES};

use crate::tar::{Entry, EntryKind, Reader, TarError};
use data::DataWriter;
use format::{
    S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFREG, SUPERBLOCK_AT, VOLUME_NAME_AT, XATTR_HEADER_BYTES,
    device_number, encode_xattr,
};
use image::inline_room;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use tree::{Inode, Place, ROOT, Tree, TreeProblem};

/// The longest tar stream of a layer when nobody says otherwise, in bytes.
pub const DEFAULT_MAX_TAR_BYTES: u64 = 64 << 30;
/// The most bytes of one inode's encoded extended attributes; Linux lists no more than 64 KiB of names.
pub const MAX_XATTR_BYTES: usize = 128 << 10;

const WHITEOUT_PREFIX: &[u8] = b".wh.";
const OPAQUE_NAME: &[u8] = b".wh..wh..opq";
/// The volume name of an image whose layer depends on those below it.
const DEPENDENT_NAME: [u8; 16] = *b"dependent\0\0\0\0\0\0\0";
/// Other names that aufs left behind.
const AUFS_PREFIX: &[u8] = b".wh..wh.";
/// What overlayfs takes for its own; a layer must not steer it.
const OVERLAY_XATTRS: [&[u8]; 2] = [b"trusted.overlay.", b"user.overlay."];

/// Why a layer cannot be converted.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// The stream cannot be read.
    #[error(transparent)]
    Tar(#[from] TarError),
    /// An entry cannot be part of a layer.
    #[error("the layer's entry {name:?} (header at byte {offset}) is refused: {problem}")]
    Entry {
        /// Its name.
        name: String,
        /// Where its header starts in the stream.
        offset: u64,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// More entries than anyone needs.
    #[error("the layer has more than {MAX_ENTRIES} entries, at {name:?}")]
    TooManyEntries {
        /// The entry that was too many.
        name: String,
    },
    /// More text than anyone needs.
    #[error("the layer's names, links and attributes take more than {MAX_TEXT_BYTES} bytes, at {name:?}")]
    TooMuchText {
        /// The entry that was too much.
        name: String,
    },
    /// The image would be too large.
    #[error("the layer's image would be larger than {MAX_IMAGE_BYTES} bytes")]
    TooLarge,
    /// A source could not be opened.
    #[error("cannot open the layer's tar stream")]
    Open {
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The image cannot be written.
    #[error("cannot write the layer's image")]
    Write {
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Choices for an image.
#[derive(Debug, Clone)]
pub struct Options {
    /// The file system's UUID. overlayfs wants its lower layers' to differ.
    pub uuid: [u8; 16],
    /// The longest tar stream of a layer, in bytes.
    pub max_tar_bytes: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self { uuid: [0; 16], max_tar_bytes: DEFAULT_MAX_TAR_BYTES }
    }
}

/// What was converted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    /// Bytes of tar streams that were read.
    pub tar_bytes: u64,
    /// The image's length in bytes, holes included.
    pub image_bytes: u64,
    /// Inodes in it.
    pub inodes: u64,
    /// Directories that no entry described, made because something is in them; the root does not count.
    pub implicit_directories: u64,
    /// The layer hides everything below it.
    pub opaque_root: bool,
}

/// Converts one layer. `image` is an empty file open for writing; `spool` another, for reading too, which may be
/// thrown away afterwards. `progress` is told the bytes read so far. The stream is read to its end.
///
/// # Errors
/// If the stream or an entry is refused, or a file cannot be written; `image` then holds rubbish.
pub fn convert(
    tar: impl Read,
    image: &File,
    spool: &File,
    options: &Options,
    progress: &mut dyn FnMut(u64),
) -> Result<Summary, ConvertError> {
    let mut converter = Converter::new(image, spool, options, false);
    converter.layer(tar, progress)?;
    converter.finish()
}

/// Merges several layers, the lowest first, into one image. Each is opened when its turn comes; otherwise as [`convert`].
///
/// # Errors
/// As for [`convert`], and if a layer cannot be opened.
pub fn merge<R: Read>(
    layers: impl IntoIterator<Item = io::Result<R>>,
    image: &File,
    spool: &File,
    options: &Options,
    progress: &mut dyn FnMut(u64),
) -> Result<Summary, ConvertError> {
    let mut converter = Converter::new(image, spool, options, true);
    for layer in layers {
        converter.layer(layer.map_err(|source| ConvertError::Open { source })?, progress)?;
    }
    converter.finish()
}

/// Whether the image in `image` can be overlaid on others and shows what the image-spec wants. Not if its layer says
/// nothing about a directory that it has something in, which must then keep the lower layer's owner and mode; nor if it is
/// opaque as a whole. Such a layer is [`merge`]d with those below it.
///
/// # Errors
/// If the file cannot be read.
pub fn can_be_overlaid(image: &File) -> io::Result<bool> {
    let mut name = [0; 16];
    image.read_exact_at(&mut name, (SUPERBLOCK_AT + VOLUME_NAME_AT) as u64)?;
    Ok(name != DEPENDENT_NAME)
}

struct Converter<'a> {
    tree: Tree,
    data: DataWriter<'a>,
    image: &'a File,
    options: &'a Options,
    tar_bytes: u64,
}

impl<'a> Converter<'a> {
    fn new(image: &'a File, spool: &'a File, options: &'a Options, merging: bool) -> Self {
        Self { tree: Tree::new(merging), data: DataWriter::new(image, spool), image, options, tar_bytes: 0 }
    }

    fn layer(&mut self, tar: impl Read, progress: &mut dyn FnMut(u64)) -> Result<(), ConvertError> {
        self.tree.begin_layer();
        let mut reader = Reader::new(tar, self.options.max_tar_bytes);
        while let Some(entry) = reader.next_entry()? {
            self.entry(&entry, &mut reader, progress)?;
            progress(self.tar_bytes + reader.offset());
        }
        reader.drain()?;
        self.tar_bytes += reader.offset();
        progress(self.tar_bytes);
        Ok(())
    }

    fn finish(mut self) -> Result<Summary, ConvertError> {
        let implicit = self.tree.inodes.iter().skip(1).filter(|inode| inode.implicit).count();
        let opaque_root = self.tree.inodes[ROOT as usize].opaque;
        let name = if implicit > 0 || opaque_root { DEPENDENT_NAME } else { [0; 16] };
        let (image_bytes, inodes) = image::write(&mut self.tree, self.data, self.image, self.options.uuid, name)?;
        Ok(Summary {
            tar_bytes: self.tar_bytes,
            image_bytes,
            inodes,
            implicit_directories: implicit as u64,
            opaque_root,
        })
    }

    fn entry<R: Read>(
        &mut self,
        entry: &Entry,
        reader: &mut Reader<R>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), ConvertError> {
        let refuse = |problem: TreeProblem| refusal(entry, problem);
        let (parent, name) = match self.tree.place(&entry.path).map_err(refuse)? {
            Place::Name(parent, name) => (parent, name),
            Place::Root if entry.kind == EntryKind::Directory => {
                let inode = self.inode(entry, S_IFDIR)?;
                self.tree.set_root(inode);
                return Ok(());
            }
            Place::Root => return Err(refuse("the root must be a directory".into())),
        };
        if name == OPAQUE_NAME {
            self.tree.make_opaque(parent);
            return Ok(());
        }
        if name.starts_with(AUFS_PREFIX) {
            return Ok(());
        }
        if let Some(hidden) = name.strip_prefix(WHITEOUT_PREFIX) {
            if matches!(hidden, b"" | b"." | b"..") {
                return Err(refuse("it is a whiteout of nothing".into()));
            }
            return self.tree.whiteout(parent, hidden).map_err(refuse);
        }
        let inode = match &entry.kind {
            EntryKind::HardLink(target) => {
                let found = self.tree.find(target).map_err(refuse)?;
                let found = found.ok_or_else(|| refuse("it is a hard link to nothing in this layer".into()))?;
                return self.tree.link(parent, name, found).map_err(refuse);
            }
            EntryKind::File => self.file(entry, reader, progress)?,
            EntryKind::Directory => self.inode(entry, S_IFDIR)?,
            EntryKind::Symlink(target) => self.symlink(entry, target)?,
            EntryKind::CharDevice(major, minor) => self.device(entry, S_IFCHR, *major, *minor)?,
            EntryKind::BlockDevice(major, minor) => self.device(entry, S_IFBLK, *major, *minor)?,
            EntryKind::Fifo => self.inode(entry, S_IFIFO)?,
        };
        self.tree.insert(parent, name, inode).map_err(refuse)?;
        Ok(())
    }

    /// An inode with the entry's attributes.
    fn inode(&mut self, entry: &Entry, file_type: u16) -> Result<Inode, ConvertError> {
        let mut inode = Inode::new(file_type | entry.mode);
        inode.uid = entry.uid;
        inode.gid = entry.gid;
        inode.mtime = entry.mtime;
        let mut encoded = Vec::new();
        for (at, (name, value)) in entry.xattrs.iter().enumerate() {
            let again = entry.xattrs[at + 1..].iter().any(|(other, _)| other == name);
            if again || OVERLAY_XATTRS.iter().any(|prefix| name.starts_with(prefix)) {
                continue;
            }
            // What Linux has no namespace for is left out: no file system could have stored it.
            encode_xattr(name, value, &mut encoded);
            if encoded.len() > MAX_XATTR_BYTES {
                return Err(refusal(entry, "its extended attributes take more than 128 KiB".into()));
            }
        }
        if !encoded.is_empty() {
            inode.xattrs_at = self.tree.add_text(&encoded).map_err(|problem| refusal(entry, problem))?;
            inode.xattrs_len = encoded.len() as u32;
        }
        Ok(inode)
    }

    fn device(&mut self, entry: &Entry, file_type: u16, major: u32, minor: u32) -> Result<Inode, ConvertError> {
        let mut inode = self.inode(entry, file_type)?;
        inode.block_or_device = device_number(major, minor);
        Ok(inode)
    }

    fn symlink(&mut self, entry: &Entry, target: &[u8]) -> Result<Inode, ConvertError> {
        if target.is_empty() || target.len() >= crate::tar::MAX_NAME_BYTES {
            return Err(refusal(
                entry,
                "it is a symbolic link to nothing, or to a name of more than 4095 bytes".into(),
            ));
        }
        let mut inode = self.inode(entry, S_IFLNK)?;
        // Linux shows links with all permissions, whatever they were made with.
        inode.mode = S_IFLNK | 0o777;
        inode.size_bytes = target.len() as u64;
        if target.len() <= inline_room(xattr_room(&inode)) {
            inode.target_at = self.tree.add_text(target).map_err(|problem| refusal(entry, problem))?;
        } else {
            inode.block_or_device = self.data.next_block();
            self.data.append(target)?;
            self.data.pad()?;
        }
        Ok(inode)
    }

    fn file<R: Read>(
        &mut self,
        entry: &Entry,
        reader: &mut Reader<R>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Inode, ConvertError> {
        let mut inode = self.inode(entry, S_IFREG)?;
        inode.size_bytes = entry.size_bytes;
        let start = self.data.next_block();
        match &entry.segments {
            None => self.copy(entry.size_bytes, reader, progress)?,
            Some(segments) => {
                let mut at = 0;
                for segment in segments {
                    self.data.append_zeroes(segment.offset - at)?;
                    self.copy(segment.len_bytes, reader, progress)?;
                    at = segment.offset + segment.len_bytes;
                }
                self.data.append_zeroes(entry.size_bytes - at)?;
            }
        }
        let placed = self.data.end_file(start, inline_room(xattr_room(&inode)))?;
        inode.block_or_device = placed.block;
        inode.tail = placed.tail;
        Ok(inode)
    }

    fn copy<R: Read>(
        &mut self,
        mut len_bytes: u64,
        reader: &mut Reader<R>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), ConvertError> {
        while len_bytes > 0 {
            let got = self.data.append_with(len_bytes, |buffer| reader.read_data(buffer))?;
            if got == 0 {
                // The header's size and the stream's agree, or there is an error: this is for a reader that lies.
                return Err(ConvertError::Tar(TarError::Truncated {
                    offset: reader.offset(),
                    what: "the data of a file".to_owned(),
                }));
            }
            len_bytes -= got;
            progress(self.tar_bytes + reader.offset());
        }
        Ok(())
    }
}

fn xattr_room(inode: &Inode) -> usize {
    if inode.xattrs_len == 0 { 0 } else { XATTR_HEADER_BYTES + inode.xattrs_len as usize }
}

fn refusal(entry: &Entry, problem: TreeProblem) -> ConvertError {
    let name = entry.display_name();
    match problem {
        TreeProblem::Problem(problem) => ConvertError::Entry { name, offset: entry.offset, problem },
        TreeProblem::TooManyEntries => ConvertError::TooManyEntries { name },
        TreeProblem::TooMuchText => ConvertError::TooMuchText { name },
    }
}
