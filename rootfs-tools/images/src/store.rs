//! The content-addressed store: an OCI image layout (image-spec, `image-layout.md`) with locks around it.
//!
//! ```text
//! oci-layout  index.json    the layout; an image's full reference is its org.opencontainers.image.ref.name
//! blobs/sha256/HEX          blobs, each verified, fsynced, then renamed to here
//! tmp/                      blobs on their way, and leases: each file is flocked by its owner, for as long as that lives
//! pins/NAME                 digests that must not be collected, until unpinned: images in use by containers
//! lock                      flocked: shared to read or to lay claim on blobs, exclusive to change the index or collect
//! ```
//!
//! Whoever adds blobs holds a [`Transaction`]: its lease names them before they appear, so that collection beside it spares
//! them, and so that the next one to open the store knows what a killed owner left behind.

mod blob;
mod collect;
mod error;
mod index;
mod transaction;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

pub use blob::BlobWriter;
pub use collect::{DiskUsage, Freed};
pub use error::StoreError;
pub use transaction::Transaction;

use crate::digest::Digest;
use crate::image::Image;
use crate::reference::Reference;

/// A handle on a store; cheap to clone, and good for several threads.
#[derive(Debug, Clone)]
pub struct Store {
    directory: PathBuf,
}

/// What [`Store::remove`] did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Removed {
    /// The references that are gone.
    pub untagged: Vec<Reference>,
    /// The image that went with its last reference: the manifest's or index's digest.
    pub deleted: Option<Digest>,
    /// What was collected.
    pub freed: Freed,
}

pub(crate) enum Lock {
    Shared,
    Exclusive,
}

impl Store {
    /// Opens the store in `directory`, makes it if there is none, and clears what dead processes left in it.
    ///
    /// # Errors
    /// The directory can't be made or read, or holds another version of the layout.
    pub fn open(directory: impl Into<PathBuf>) -> Result<Self, StoreError> {
        let store = Self { directory: directory.into() };
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o755);
        for sub in ["blobs/sha256", "tmp", "pins"] {
            let path = store.directory.join(sub);
            builder.create(&path).map_err(StoreError::io("make the directory", &path))?;
        }
        let header = store.directory.join("oci-layout");
        match fs::read(&header) {
            Ok(bytes) => {
                let version = serde_json::from_slice::<index::LayoutHeader>(&bytes).map(|header| header.version);
                match version.as_deref() {
                    Ok("1.0.0") => (),
                    _ => {
                        return Err(StoreError::Corrupt {
                            what: header.display().to_string(),
                            reason: "it names no layout of version 1.0.0: is this directory a store?".to_owned(),
                        });
                    }
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let _lock = store.lock(Lock::Exclusive)?;
                store.replace(&header, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
            }
            Err(source) => return Err(StoreError::io("read", &header)(source)),
        }
        store.clear_stale()?;
        Ok(store)
    }

    /// Where the store is.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Starts adding blobs. Without a [`Transaction::commit`] nothing stays.
    ///
    /// # Errors
    /// The lease can't be written.
    pub fn begin(&self) -> Result<Transaction, StoreError> {
        Transaction::begin(self.clone())
    }

    /// Opens a blob. Its content was verified when it came in.
    ///
    /// # Errors
    /// The store has no such blob.
    pub fn blob(&self, digest: &Digest) -> Result<File, StoreError> {
        let path = self.blob_path(digest);
        File::open(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => StoreError::MissingBlob { digest: *digest, store: self.directory.clone() },
            _ => StoreError::io("open the blob", &path)(error),
        })
    }

    /// Where a blob is or would be.
    #[must_use]
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.directory.join("blobs/sha256").join(digest.hex())
    }

    /// Reads a small blob, and checks its digest again.
    ///
    /// # Errors
    /// It is missing, longer than `limit` bytes, or damaged.
    pub fn read_blob(&self, digest: &Digest, limit: u64) -> Result<Vec<u8>, StoreError> {
        let path = self.blob_path(digest);
        let bytes = read_bounded(self.blob(digest)?, limit, &path)?;
        let found = Digest::of(&bytes);
        if found != *digest {
            return Err(StoreError::Corrupt {
                what: path.display().to_string(),
                reason: format!(
                    "its content has the digest {found}: the disk damaged it; remove the image and fetch it again"
                ),
            });
        }
        Ok(bytes)
    }

    /// Finds an image by what a person may call it: a reference, or the beginning of its id (or of its manifest's digest).
    ///
    /// # Errors
    /// There is none, several begin so, or the image is damaged.
    pub fn resolve(&self, name: &str) -> Result<Image, StoreError> {
        let reference = name.parse::<Reference>();
        if let Ok(reference) = &reference
            && let Some(image) = self.find(reference)?
        {
            return Ok(image);
        }
        let prefix = name.strip_prefix("sha256:").unwrap_or(name);
        if !prefix.is_empty()
            && prefix.len() <= 64
            && prefix.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'))
        {
            let _lock = self.lock(Lock::Shared)?;
            let mut found = self.images()?;
            found.retain(|image| {
                [image.id(), image.digest, image.top.digest].iter().any(|digest| digest.hex().starts_with(prefix))
            });
            if found.len() > 1 {
                return Err(StoreError::Ambiguous {
                    prefix: name.to_owned(),
                    ids: found.iter().map(|image| image.id().short()).collect::<Vec<_>>().join(", "),
                });
            }
            if let Some(image) = found.pop() {
                return Ok(image);
            }
        }
        match reference {
            Ok(reference) => Err(StoreError::NotFound { name: reference.familiar(), store: self.directory.clone() }),
            Err(source) => Err(StoreError::Reference(source)),
        }
    }

    /// Finds an image by its reference; `None` if there is none. A digest counts more than a tag.
    ///
    /// # Errors
    /// The store or the image is damaged.
    pub fn find(&self, reference: &Reference) -> Result<Option<Image>, StoreError> {
        let _lock = self.lock(Lock::Shared)?;
        let index = self.load_index()?;
        if let Some(digest) = reference.digest() {
            for entry in index.images() {
                if entry.descriptor.digest == digest {
                    return self.read_image(entry).map(Some);
                }
            }
            // The digest of the platform's own manifest, inside an index that we hold.
            let images = self.images()?;
            return Ok(images.into_iter().find(|image| image.digest == digest));
        }
        match index.by_reference(reference) {
            Some(entry) => self.read_image(entry).map(Some),
            None => Ok(None),
        }
    }

    /// All images, in the order in which they came.
    ///
    /// # Errors
    /// The store or one of the images is damaged.
    pub fn list(&self) -> Result<Vec<Image>, StoreError> {
        let _lock = self.lock(Lock::Shared)?;
        self.images()
    }

    /// Gives an image one more reference; whichever image had it before loses it.
    ///
    /// # Errors
    /// There is no such image, or the index can't be written.
    pub fn tag(&self, name: &str, reference: &Reference) -> Result<(), StoreError> {
        let image = self.resolve(name)?;
        let _lock = self.lock(Lock::Exclusive)?;
        let mut index = self.load_index()?;
        if !index.holds(&image.top.digest) {
            return Err(StoreError::NotFound { name: name.to_owned(), store: self.directory.clone() });
        }
        index.add(image.top, Some(reference.clone()));
        self.save_index(&index)
    }

    /// Takes a reference away; with an image's last one, and with an id, the image goes and its blobs are collected.
    ///
    /// # Errors
    /// There is no such image; it is pinned (unless `force`: then only the references go, the blobs stay until they are
    /// unpinned); an id names an image that has several references (unless `force`).
    pub fn remove(&self, name: &str, force: bool) -> Result<Removed, StoreError> {
        let reference = name.parse::<Reference>().ok();
        let by_reference = match &reference {
            Some(reference) => self.load_index()?.by_reference(reference).map(|entry| entry.descriptor.digest),
            None => None,
        };
        // A damaged image can still be removed by its reference: it is not read then.
        let digest = match by_reference {
            Some(digest) => digest,
            None => self.resolve(name)?.top.digest,
        };
        let _lock = self.lock(Lock::Exclusive)?;
        let mut index = self.load_index()?;
        let references = index.references(&digest);
        let untagged: Vec<Reference> = match (&reference, by_reference) {
            (Some(reference), Some(_)) => vec![reference.clone()],
            _ if references.len() > 1 && !force => {
                return Err(StoreError::SeveralReferences {
                    name: name.to_owned(),
                    references: references.iter().map(Reference::familiar).collect::<Vec<_>>().join(", "),
                });
            }
            _ => references.clone(),
        };
        let last = references.iter().all(|reference| untagged.contains(reference));
        if last && !force {
            let users = self.pins_of(&digest)?;
            if !users.is_empty() {
                return Err(StoreError::InUse { name: name.to_owned(), by: users.join(", ") });
            }
        }
        for reference in &untagged {
            index.untag(reference);
        }
        let mut removed = Removed { untagged, ..Removed::default() };
        if last {
            let reach = self.reach([digest].into_iter().collect());
            index.drop_image(&digest);
            self.save_index(&index)?;
            removed.deleted = Some(digest);
            removed.freed = match reach {
                Ok(reach) => self.collect(Some(&reach))?,
                Err(_) => self.collect(None)?,
            };
        } else {
            self.save_index(&index)?;
        }
        Ok(removed)
    }

    pub(crate) fn lock(&self, kind: Lock) -> Result<File, StoreError> {
        let path = self.directory.join("lock");
        let file = OpenOptions::new()
            .create(true)
            .read(true)
            .append(true)
            .mode(0o644)
            .open(&path)
            .map_err(StoreError::io("open the lock", &path))?;
        loop {
            let locked = match kind {
                Lock::Shared => file.lock_shared(),
                Lock::Exclusive => file.lock(),
            };
            match locked {
                Ok(()) => return Ok(file),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                Err(source) => return Err(StoreError::io("lock", &path)(source)),
            }
        }
    }

    /// A new file in `tmp/`, which is this process's own as long as it is open: it is locked. The caller holds no lock.
    pub(crate) fn temporary(&self, kind: &str) -> Result<(File, PathBuf), StoreError> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        // With the shared lock, nobody clears the file between its creation and its lock.
        let _lock = self.lock(Lock::Shared)?;
        loop {
            let count = COUNT.fetch_add(1, Ordering::Relaxed);
            let path = self.directory.join(format!("tmp/{kind}-{}-{count}", std::process::id()));
            let mut options = OpenOptions::new();
            options.read(true).append(true).create_new(true).mode(0o644);
            match options.open(&path) {
                Ok(file) => {
                    file.lock().map_err(StoreError::io("lock", &path))?;
                    return Ok((file, path));
                }
                // A dead process of the same id left it, or one in another PID namespace has it.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => (),
                Err(source) => return Err(StoreError::io("make", &path)(source)),
            }
        }
    }

    /// Replaces a file's content, whole or not at all. The caller holds the exclusive lock.
    pub(crate) fn replace(&self, path: &Path, content: &[u8]) -> Result<(), StoreError> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let temporary = self.directory.join(format!("tmp/file-{}-{count}", std::process::id()));
        let written = || -> io::Result<()> {
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o644).open(&temporary)?;
            file.write_all(content)?;
            file.sync_all()?;
            fs::rename(&temporary, path)?;
            path.parent().map_or(Ok(()), |parent| File::open(parent)?.sync_all())
        };
        written().map_err(|source| {
            let _ = fs::remove_file(&temporary);
            StoreError::io("write", path)(source)
        })
    }
}

/// Reads all of a file of at most `limit` bytes.
pub(crate) fn read_bounded(file: impl Read, limit: u64, path: &Path) -> Result<Vec<u8>, StoreError> {
    let mut bytes = Vec::new();
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes).map_err(StoreError::io("read", path))?;
    if bytes.len() as u64 > limit {
        return Err(StoreError::TooLong { what: path.display().to_string(), limit });
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests;
