//! Where the bytes of a file are, and how to read them.
use rustix::fs::{Mode, OFlags, ResolveFlags};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

/// Where a regular file's bytes are.
#[derive(Debug, Clone)]
pub enum Content {
    /// In memory.
    Bytes(Arc<[u8]>),
    /// In a layer's uncompressed tar.
    Part {
        /// The tar.
        file: Arc<File>,
        /// Where in it.
        offset: u64,
    },
    /// In pieces of a disk image; the gaps between them are zeros.
    Runs {
        /// The image.
        file: Arc<File>,
        /// In order, without overlap.
        runs: Arc<[Run]>,
    },
    /// In a directory of the host's.
    Host {
        /// The directory.
        root: Arc<OwnedFd>,
        /// Below it. No link in it is followed.
        path: PathBuf,
    },
}

/// A piece of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Where it is in the file, bytes.
    pub logical: u64,
    /// Where it is in the image, bytes.
    pub physical: u64,
    /// Bytes.
    pub length: u64,
}

impl Content {
    /// Opens it. Exactly `size` bytes come, or an error.
    pub fn open(&self, size: u64) -> io::Result<Box<dyn Read + '_>> {
        match self {
            Content::Bytes(bytes) => Ok(Box::new(bytes.as_ref())),
            Content::Part { file, offset } => {
                Ok(Box::new(Exactly { inner: At { file, position: *offset }.take(size) }))
            }
            Content::Runs { file, runs } => Ok(Box::new(Runs { file, runs, position: 0, size })),
            Content::Host { root, path } => {
                let fd = rustix::fs::openat2(
                    root,
                    path,
                    // A FIFO that took the file's place must not block.
                    OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK,
                    Mode::empty(),
                    ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS,
                )?;
                let file = File::from(fd);
                if !file.metadata()?.is_file() {
                    return Err(io::Error::other("it is not a regular file any more"));
                }
                Ok(Box::new(Exactly { inner: file.take(size) }))
            }
        }
    }
}

/// Turns an early end into an error: a tar header has promised the size.
struct Exactly<R> {
    inner: io::Take<R>,
}

impl<R: Read> Read for Exactly<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        if count == 0 && !buffer.is_empty() && self.inner.limit() > 0 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "it became shorter while it was read: build again when nothing changes it",
            ));
        }
        Ok(count)
    }
}

struct At<'a> {
    file: &'a File,
    position: u64,
}

impl Read for At<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read_at(buffer, self.position)?;
        self.position = self.position.saturating_add(count as u64);
        Ok(count)
    }
}

struct Runs<'a> {
    file: &'a File,
    runs: &'a [Run],
    position: u64,
    size: u64,
}

impl Read for Runs<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.size.saturating_sub(self.position);
        let wanted = left.min(buffer.len() as u64);
        if wanted == 0 {
            return Ok(0);
        }
        let next = self.runs.partition_point(|run| run.logical.saturating_add(run.length) <= self.position);
        let count = match self.runs.get(next) {
            Some(run) if run.logical <= self.position => {
                let into = self.position - run.logical;
                let count = wanted.min(run.length - into) as usize;
                let part = buffer.get_mut(..count).unwrap_or_default();
                self.file.read_exact_at(part, run.physical.saturating_add(into))?;
                count
            }
            other => {
                let gap = other.map_or(wanted, |run| wanted.min(run.logical - self.position)) as usize;
                buffer.get_mut(..gap).unwrap_or_default().fill(0);
                gap
            }
        };
        self.position += count as u64;
        Ok(count)
    }
}
