//! A tar archive as changes.
use super::{MAX_FILES, OPAQUE, WHITEOUT};
use crate::tree::{Changes, Content, Kind, Node, Run, normalized};
use caisson_rootfs::tar::{Entry, EntryKind, Reader, TarError};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The most that a compressed layer or archive may unpack to, bytes.
pub(super) const MAX_UNPACKED_BYTES: u64 = 256 << 30;

/// How much is read at once.
const READ_BYTES: usize = 256 << 10;

/// Why a layer or an archive cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// It is damaged, or cannot be read.
    #[error("cannot read the archive")]
    Read(#[source] io::Error),
    /// It has too many files.
    #[error("the archive has more than {MAX_FILES} files")]
    TooMany,
    /// A hard link to nothing.
    #[error("the archive's hard link {} leads to {}, which is not in it", path.display(), target.display())]
    Link {
        /// The link.
        path: PathBuf,
        /// Its target.
        target: PathBuf,
    },
    /// It is no tar stream.
    #[error(transparent)]
    Tar(#[from] TarError),
    /// It unpacks to too much.
    #[error("the archive unpacks to more than {MAX_UNPACKED_BYTES} bytes")]
    TooLarge,
    /// Compression that is not supported.
    #[error("{0} compression is not supported here: unpack the archive before, or compress it with gzip or zstd")]
    Compression(&'static str),
}

/// What an archive is, by its first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Archive {
    /// A plain tar.
    Tar,
    /// gzip.
    Gzip,
    /// Zstandard.
    Zstd,
    /// bzip2.
    Bzip2,
    /// xz.
    Xz,
}

/// Recognizes an archive by its beginning (512 bytes suffice).
pub fn archive_kind(head: &[u8]) -> Option<Archive> {
    if head.starts_with(&[0x1f, 0x8b]) {
        return Some(Archive::Gzip);
    }
    if head.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        return Some(Archive::Zstd);
    }
    if head.starts_with(b"BZh") {
        return Some(Archive::Bzip2);
    }
    if head.starts_with(&[0xfd, b'7', b'z', b'X', b'Z', 0]) {
        return Some(Archive::Xz);
    }
    let block: &[u8; 512] = head.get(..512)?.try_into().ok()?;
    let header = tar::Header::from_byte_slice(block);
    let sum: u32 =
        block.iter().enumerate().map(|(at, byte)| if (148..156).contains(&at) { 32 } else { u32::from(*byte) }).sum();
    (header.cksum().ok()? == sum && block.iter().any(|byte| *byte != 0)).then_some(Archive::Tar)
}

/// Unpacks into an unnamed file in `directory` (or gives the file itself if it is a plain tar).
pub fn uncompressed(mut file: File, directory: &Path) -> Result<File, LayerError> {
    let mut head = Vec::new();
    (&mut file).take(512).read_to_end(&mut head).map_err(LayerError::Read)?;
    file.rewind().map_err(LayerError::Read)?;
    let mut reader: Box<dyn Read> = match archive_kind(&head) {
        Some(Archive::Gzip) => Box::new(flate2::read::MultiGzDecoder::new(file)),
        Some(Archive::Zstd) => Box::new(zstd::Decoder::new(file).map_err(LayerError::Read)?),
        Some(Archive::Bzip2) => return Err(LayerError::Compression("bzip2")),
        Some(Archive::Xz) => return Err(LayerError::Compression("xz")),
        Some(Archive::Tar) | None => return Ok(file),
    };
    let mut unpacked = tempfile::tempfile_in(directory).map_err(LayerError::Read)?;
    let mut limited = (&mut reader).take(MAX_UNPACKED_BYTES);
    io::copy(&mut limited, &mut unpacked).map_err(LayerError::Read)?;
    if limited.limit() == 0 {
        return Err(LayerError::TooLarge);
    }
    unpacked.rewind().map_err(LayerError::Read)?;
    Ok(unpacked)
}

/// Reads a layer from its uncompressed tar.
pub fn read(file: File) -> Result<Changes, LayerError> {
    parse(file, true)
}

/// Reads any tar archive, in which names of whiteouts mean nothing.
pub fn read_archive(file: File) -> Result<Changes, LayerError> {
    parse(file, false)
}

fn parse(file: File, layer: bool) -> Result<Changes, LayerError> {
    let shared = Arc::new(file.try_clone().map_err(LayerError::Read)?);
    let mut reader = Reader::new(io::BufReader::with_capacity(READ_BYTES, file), MAX_UNPACKED_BYTES);
    let mut changes = Changes::default();
    let mut count = 0;
    while let Some(entry) = reader.next_entry()? {
        count += 1;
        if count > MAX_FILES {
            return Err(LayerError::TooMany);
        }
        let path = normalized(Path::new(OsStr::from_bytes(&entry.path)));
        if path.as_os_str().is_empty() {
            // The root itself: its attributes are not an image's business.
            continue;
        }
        if layer && let Some(name) = path.file_name() {
            if name == OPAQUE {
                changes.opaque.insert(path.parent().unwrap_or(Path::new("")).to_owned());
                continue;
            }
            if let Some(hidden) = name.as_bytes().strip_prefix(WHITEOUT.as_bytes()) {
                if !hidden.is_empty() && !hidden.starts_with(WHITEOUT.as_bytes()) {
                    changes.removed.insert(path.with_file_name(OsStr::from_bytes(hidden)));
                }
                continue;
            }
        }
        let node = if let EntryKind::HardLink(target) = &entry.kind {
            let target = normalized(Path::new(OsStr::from_bytes(target)));
            match changes.added.get(&target) {
                Some(node) => Arc::clone(node),
                None => return Err(LayerError::Link { path, target }),
            }
        } else {
            Arc::new(node(entry, &shared, reader.offset()))
        };
        // The last entry of a name counts, as it does when a tar is unpacked.
        if !node.is_directory() && changes.added.get(&path).is_some_and(|old| old.is_directory()) {
            changes.added.retain(|at, _| !at.starts_with(&path));
        }
        changes.added.insert(path, node);
    }
    Ok(changes)
}

fn node(entry: Entry, file: &Arc<File>, data_at: u64) -> Node {
    let path = |bytes: Vec<u8>| PathBuf::from(OsString::from_vec(bytes));
    let kind = match entry.kind {
        EntryKind::File => Kind::File {
            size: entry.size_bytes,
            content: match entry.segments {
                None => Content::Part { file: Arc::clone(file), offset: data_at },
                Some(segments) => {
                    let mut physical = data_at;
                    let runs = segments.into_iter().map(|segment| {
                        let run = Run { logical: segment.offset, physical, length: segment.len_bytes };
                        physical = physical.saturating_add(segment.len_bytes);
                        run
                    });
                    Content::Runs { file: Arc::clone(file), runs: runs.collect() }
                }
            },
        },
        EntryKind::Directory | EntryKind::HardLink(_) => Kind::Directory,
        EntryKind::Symlink(target) => Kind::Symlink(path(target)),
        EntryKind::CharDevice(major, minor) => Kind::Char { major, minor },
        EntryKind::BlockDevice(major, minor) => Kind::Block { major, minor },
        EntryKind::Fifo => Kind::Fifo,
    };
    let name = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Node {
        kind,
        mode: entry.mode.into(),
        uid: entry.uid,
        gid: entry.gid,
        mtime_s: entry.mtime.0,
        xattrs: entry.xattrs.into_iter().map(|(key, value)| (name(key), value)).collect(),
    }
}
