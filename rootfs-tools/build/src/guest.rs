//! What the builder asks of whoever runs its RUN steps. The build's code is not trusted: it executes in a guest, and what
//! it leaves behind comes back as a disk image, which [`ext4`](crate::ext4) reads without mounting it.
use caisson_images::Layer;
use std::error::Error;
use std::fs::File;
use std::path::PathBuf;

/// A command to run on top of layers.
#[derive(Debug)]
pub struct RunStep<'a> {
    /// The root's layers, lowest first; at least one.
    pub layers: &'a [Layer],
    /// Program and arguments; the program is looked up in the root by `env`'s PATH.
    pub arguments: Vec<String>,
    /// `NAME=value`.
    pub env: Vec<String>,
    /// `user[:group]`, to be resolved in the root; empty is root.
    pub user: String,
    /// Working directory, absolute.
    pub workdir: String,
    /// Mounts, in order.
    pub mounts: Vec<RunMount>,
    /// Whether it may have a network.
    pub network: bool,
}

/// A mount of a RUN step.
#[derive(Debug)]
pub struct RunMount {
    /// Where, absolute; made if it is missing.
    pub target: String,
    /// What.
    pub source: RunMountSource,
    /// Whether it is read-only.
    pub readonly: bool,
}

/// What is mounted.
#[derive(Debug)]
pub enum RunMountSource {
    /// Files as an uncompressed tar, laid out as a layer.
    Tree {
        /// The tar, at its beginning.
        tar: File,
        /// The file or directory in it that is mounted; empty for all.
        path: PathBuf,
    },
    /// A directory that lives on between builds.
    Cache {
        /// Its name: hex digits.
        id: String,
        /// Owner of a new one.
        uid: u32,
        /// Group of a new one.
        gid: u32,
        /// Permission bits of a new one.
        mode: u32,
    },
    /// Memory.
    Tmpfs {
        /// Its limit, bytes.
        size_bytes: Option<u64>,
    },
    /// One file, which must not get into the image: a secret, or a script.
    File {
        /// Its content.
        content: Vec<u8>,
        /// Permission bits.
        mode: u32,
        /// Owner.
        uid: u32,
        /// Group.
        gid: u32,
    },
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// With this code.
    Code(u8),
    /// By this signal.
    Signal(u8),
}

/// What a RUN step left behind.
#[derive(Debug)]
pub struct RunResult {
    /// How it ended.
    pub exit: Exit,
    /// The writable layer: an ext4 image that nothing writes to any more, cleanly unmounted.
    pub upper: File,
    /// The overlay's upper directory in it, relative to its root.
    pub directory: PathBuf,
}

/// Takes what a command prints, stdout and stderr in the order in which they come.
pub type Sink<'a> = &'a (dyn Fn(&[u8]) + Sync);

/// Runs commands in guests.
pub trait Guest: Sync {
    /// Runs a command to its end.
    ///
    /// # Errors
    /// The guest cannot be started, the program not be found, or the guest dies.
    fn run(&self, step: RunStep<'_>, output: Sink<'_>) -> Result<RunResult, Box<dyn Error + Send + Sync>>;
}
