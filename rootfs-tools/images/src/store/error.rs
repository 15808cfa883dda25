//! What can go wrong in the store.

use std::io;
use std::path::{Path, PathBuf};

use crate::digest::{Digest, DigestError};
use crate::reference::ReferenceError;

/// Why the store could not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A system call failed.
    #[error("cannot {action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// No image of that name.
    #[error(
        "no image {name} in {store}: `caisson images` lists them, `caisson pull` and `caisson image import` bring one in"
    )]
    NotFound {
        /// What was asked for.
        name: String,
        /// Where.
        store: PathBuf,
    },
    /// Several images' ids begin so.
    #[error("the id {prefix} is ambiguous: it begins {ids}; write more of it")]
    Ambiguous {
        /// What was asked for.
        prefix: String,
        /// What it could mean.
        ids: String,
    },
    /// The name is no reference.
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    /// A digest that is none, in a manifest or an index.
    #[error("{what} holds a digest that is not supported")]
    Digest {
        /// The document.
        what: String,
        /// Why.
        #[source]
        source: DigestError,
    },
    /// A blob that something refers to is not here.
    #[error("the blob {digest} is missing from {store}: remove the image and fetch it again")]
    MissingBlob {
        /// Which one.
        digest: Digest,
        /// Where.
        store: PathBuf,
    },
    /// Something is not what it has to be.
    #[error("{what} is damaged or malformed: {reason}")]
    Corrupt {
        /// The file or document.
        what: String,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// Something is not JSON of the shape that it has to be.
    #[error("{what} is not the JSON document that it has to be")]
    Json {
        /// The document.
        what: String,
        /// Where it goes wrong.
        #[source]
        source: serde_json::Error,
    },
    /// The content is not what its digest says.
    #[error("{what} has the digest {found}, and should have {expected}: it was damaged or tampered with on its way")]
    WrongDigest {
        /// The blob.
        what: String,
        /// What its descriptor says.
        expected: Digest,
        /// What it is.
        found: Digest,
    },
    /// The content is not as long as its descriptor says.
    #[error("{what} has {found} bytes, and should have {expected}: it was truncated or tampered with on its way")]
    WrongSize {
        /// The blob.
        what: String,
        /// What its descriptor says.
        expected: u64,
        /// What there was.
        found: u64,
    },
    /// Longer than we take.
    #[error("{what} is longer than {limit} bytes, which is the most that is accepted")]
    TooLong {
        /// The blob or file.
        what: String,
        /// The limit in bytes.
        limit: u64,
    },
    /// Not for this machine.
    #[error("{what} has no manifest for linux/amd64: it has {available}")]
    NoPlatform {
        /// The index.
        what: String,
        /// What it has.
        available: String,
    },
    /// A kind of content that we don't know.
    #[error("{what} has the media type {media_type:?}: {reason}")]
    MediaType {
        /// The blob or document.
        what: String,
        /// Its media type.
        media_type: String,
        /// Why it is refused.
        reason: &'static str,
    },
    /// Containers use it.
    #[error("the image {name} is in use by {by}: remove that first, or force it")]
    InUse {
        /// The image.
        name: String,
        /// The pins' names.
        by: String,
    },
    /// An id that names more than one reference.
    #[error("the image {name} has several references: {references}; remove them one by one, or force it")]
    SeveralReferences {
        /// The id.
        name: String,
        /// Its references.
        references: String,
    },
    /// A pin's name would not be a file name.
    #[error("{0:?} is not a name for a pin: up to 128 letters, digits, and _ . - (not first)")]
    PinName(String),
}

impl StoreError {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action, path: path.to_owned(), source }
    }

    pub(crate) fn json(what: &str) -> impl FnOnce(serde_json::Error) -> Self {
        move |source| Self::Json { what: what.to_owned(), source }
    }
}
