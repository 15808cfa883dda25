//! The file server behind a virtio-fs device: FUSE requests (include/uapi/linux/fuse.h of Linux 6.12) on a set of
//! exported directories and files, for a guest that is hostile.
//!
//! What keeps a guest within its exports: each inode that it knows is pinned by an `O_PATH` descriptor; a name is looked up
//! in one such directory at a time, never as a path, with `openat2` and no symbolic links, so that links, `..` and rename
//! races lead nowhere; only regular files and directories are ever opened. The process is jailed besides ([`jail`]).
//!
//! The device talks to the server over a Unix stream socket: each request is a little-endian `u32` with its length, then
//! the request as the guest wrote it; each response likewise. FORGET, BATCH_FORGET and INTERRUPT have no response, all
//! others exactly one, in the order of the requests. The server ends when the connection does.
mod attributes;
mod client;
mod data;
mod directory;
mod identity;
pub mod jail;
mod names;
mod server;
mod table;
mod wire;

pub use client::{FileServer, FileServerError};
pub use server::{Server, ServerError, serve};
pub use wire::{HEADER_BYTES, MAX_FRAME_BYTES, RESPONSE_HEADER_BYTES, has_response};

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The most exports of a server.
pub const MAX_EXPORTS: usize = 256;

/// What a server serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareConfig {
    /// They appear in the root of the file system that the guest mounts, by their names.
    pub exports: Vec<Export>,
    /// How long a guest may believe what it knows of an inode's attributes, in milliseconds: how late it may notice what
    /// the host changes.
    #[serde(default = "default_timeout_ms")]
    pub attribute_timeout_ms: u32,
    /// The same for names.
    #[serde(default = "default_timeout_ms")]
    pub entry_timeout_ms: u32,
}

/// A shared directory or file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Export {
    /// Its name in the guest's view: one path component.
    pub name: String,
    /// What is shared. Symbolic links in this path are followed, once, at the start.
    pub path: PathBuf,
    /// Refuse every change.
    #[serde(default)]
    pub read_only: bool,
}

/// New names are seen at once, as nothing is remembered of names that are not there; changed content and removed names at the
/// latest after this. In a slow guest less would mean to ask for each file again and again.
fn default_timeout_ms() -> u32 {
    1000
}
