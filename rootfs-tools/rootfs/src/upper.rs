//! The writable upper of a container's root: a sparse ext4 image, formatted once per kind and size by mke2fs and copied
//! for each container in a few milliseconds.
//!
//! The options are chosen for a guest in which an instruction is dear: no checksums, no lazy initialisation and no
//! read-ahead of bitmaps by a kernel thread, no journal where nothing outlives the guest.
use crate::sparse;
use rustix::fs::{FlockOperation, flock};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The size of an upper when nobody says otherwise, in bytes. The image is sparse: it costs what is written to it.
pub const DEFAULT_SIZE_BYTES: u64 = 4 << 30;
/// The smallest size that mke2fs can put a file system with a journal into, in bytes.
pub const MIN_SIZE_BYTES: u64 = 16 << 20;
/// The largest size, in bytes; beyond 16 TiB ext4 needs wider group descriptors.
pub const MAX_SIZE_BYTES: u64 = 8 << 40;
/// Part of a formatted image's file name. Count it up when the options below change.
const FORMAT_VERSION: u32 = 1;
const BLOCK_BYTES: u64 = 4096;
/// Not `metadata_csum`, `gdt_csum`, `64bit`, `huge_file`, `resize_inode`: each costs the guest instructions and gains a container nothing.
const FEATURES: &str = "none,extent,filetype,sparse_super,large_file,flex_bg,dir_index,ext_attr,extra_isize,dir_nlink";
/// In MiB, the smallest that mke2fs makes.
const JOURNAL_MIB: u32 = 4;

/// Whether an upper outlives its guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Removed with the container: no journal, no barriers.
    Throwaway,
    /// Used again after a crash: a small journal.
    Kept,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Throwaway => "throwaway",
            Kind::Kept => "kept",
        }
    }

    /// Mount options that are stored in the image, so that whoever mounts it has them: at most 63 bytes.
    fn mount_options(self) -> &'static str {
        match self {
            Kind::Throwaway => "no_prefetch_block_bitmaps,nobarrier",
            Kind::Kept => "no_prefetch_block_bitmaps",
        }
    }
}

/// Why an upper cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum UpperError {
    /// The size asked for is outside of what works.
    #[error("cannot make a writable layer of {0} bytes: choose a size from {MIN_SIZE_BYTES} to {MAX_SIZE_BYTES} bytes")]
    Size(u64),
    /// A file operation failed.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A program of e2fsprogs could not be started.
    #[error("cannot run {program}: install e2fsprogs")]
    Start {
        /// Which.
        program: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A program of e2fsprogs failed.
    #[error("{program} could not format {}: {message}", path.display())]
    Format {
        /// Which.
        program: &'static str,
        /// The image.
        path: PathBuf,
        /// What it printed.
        message: String,
    },
}

fn io_error<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> UpperError + 'a {
    move |source| UpperError::Io { action, path: path.to_owned(), source }
}

/// Formatted images, one per kind and size, in a directory.
#[derive(Debug, Clone)]
pub struct UpperCache {
    directory: PathBuf,
}

impl UpperCache {
    /// Uses `directory`, which is made if it does not exist.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn open(directory: impl Into<PathBuf>) -> Result<Self, UpperError> {
        let directory = directory.into();
        fs::create_dir_all(&directory).map_err(io_error("make the directory", &directory))?;
        Ok(Self { directory })
    }

    /// Makes `destination`, which must not exist, a fresh file system of `size_bytes` (rounded up to 4 KiB) with the
    /// empty directories `upper` and `work` in its root.
    ///
    /// # Errors
    /// If the size is out of range, mke2fs is missing or fails, or a file cannot be written; then `destination` does not exist.
    pub fn create(&self, kind: Kind, size_bytes: u64, destination: &Path) -> Result<(), UpperError> {
        let formatted = self.formatted(kind, size_bytes)?;
        let to = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(destination)
            .map_err(io_error("create the writable layer", destination))?;
        sparse::copy(&formatted, &to).map_err(|source| {
            let _ = fs::remove_file(destination);
            UpperError::Io { action: "copy a formatted image to", path: destination.to_owned(), source }
        })
    }

    /// The formatted image of that kind and size, made if there is none.
    fn formatted(&self, kind: Kind, size_bytes: u64) -> Result<File, UpperError> {
        if !(MIN_SIZE_BYTES..=MAX_SIZE_BYTES).contains(&size_bytes) {
            return Err(UpperError::Size(size_bytes));
        }
        let size_bytes = size_bytes.next_multiple_of(BLOCK_BYTES);
        let path = self.directory.join(format!("{}-{size_bytes}-v{FORMAT_VERSION}.ext4", kind.name()));
        match File::open(&path) {
            Ok(file) => return Ok(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(io_error("open", &path)(error)),
        }
        let lock_path = self.directory.join("lock");
        let lock = OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(false)
            .open(&lock_path)
            .map_err(io_error("open", &lock_path))?;
        flock(&lock, FlockOperation::LockExclusive).map_err(|error| io_error("lock", &lock_path)(error.into()))?;
        if let Ok(file) = File::open(&path) {
            return Ok(file);
        }
        let work = tempfile::Builder::new()
            .prefix(".formatting-")
            .tempdir_in(&self.directory)
            .map_err(io_error("make a temporary directory in", &self.directory))?;
        let image = format(kind, size_bytes, work.path())?;
        // mke2fs allocates the inode tables; the copy has holes for them.
        let copy_path = work.path().join("sparse");
        let copy = File::create_new(&copy_path).map_err(io_error("create", &copy_path))?;
        sparse::copy(&image, &copy).map_err(io_error("copy the image to", &copy_path))?;
        fs::rename(&copy_path, &path).map_err(io_error("rename a formatted image to", &path))?;
        File::open(&path).map_err(io_error("open", &path))
    }
}

fn format(kind: Kind, size_bytes: u64, work: &Path) -> Result<File, UpperError> {
    let skeleton = work.join("skeleton");
    for name in ["upper", "work"] {
        let directory = skeleton.join(name);
        fs::create_dir_all(&directory).map_err(io_error("make the directory", &directory))?;
    }
    let image_path = work.join("image");
    let image = File::create_new(&image_path).map_err(io_error("create", &image_path))?;
    image.set_len(size_bytes).map_err(io_error("set the size of", &image_path))?;
    drop(image);
    let mut mke2fs = Command::new("mke2fs");
    mke2fs.args(["-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-i", "16384", "-m", "0", "-G", "256"]);
    mke2fs.args(["-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard,packed_meta_blocks=1,root_owner=0:0"]);
    match kind {
        Kind::Throwaway => mke2fs.args(["-O", FEATURES]),
        Kind::Kept => mke2fs.args(["-O", &format!("{FEATURES},has_journal"), "-J", &format!("size={JOURNAL_MIB}")]),
    };
    mke2fs.arg("-d").arg(&skeleton).arg(&image_path);
    run("mke2fs", mke2fs, &image_path)?;
    // tune2fs -E takes one mount option only: it splits at the comma.
    let mut debugfs = Command::new("debugfs");
    debugfs.args(["-w", "-R", &format!("set_super_value mount_opts {}", kind.mount_options())]).arg(&image_path);
    run("debugfs", debugfs, &image_path)?;
    File::open(&image_path).map_err(io_error("open", &image_path))
}

fn run(program: &'static str, mut command: Command, image: &Path) -> Result<(), UpperError> {
    // Some users' PATH lacks the directory where e2fsprogs is.
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:/usr/sbin:/sbin")).stdin(Stdio::null());
    let output = command.output().map_err(|source| UpperError::Start { program, source })?;
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(UpperError::Format { program, path: image.to_owned(), message })
}

#[cfg(test)]
mod tests;
