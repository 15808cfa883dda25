//! Adding to the store: blobs first, then, all at once, the references to them.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use super::{BlobWriter, Lock, Store, StoreError};
use crate::digest::Digest;
use crate::image::Top;
use crate::reference::Reference;

/// The right to add blobs, which are safe from collection until it ends. Good for several threads.
///
/// Dropped without [`commit`](Self::commit), what it added goes again, but for what others refer to.
#[derive(Debug)]
pub struct Transaction {
    store: Store,
    lease: Mutex<(File, HashSet<Digest>)>,
    path: PathBuf,
    ended: bool,
}

impl Transaction {
    pub(super) fn begin(store: Store) -> Result<Self, StoreError> {
        let (file, path) = store.temporary("lease")?;
        Ok(Self { store, lease: Mutex::new((file, HashSet::new())), path, ended: false })
    }

    /// The store that it adds to.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Starts a blob. `what` names it in errors. Without a digest, or a size, it may have any.
    ///
    /// # Errors
    /// It would be too long, or no temporary file can be made.
    pub fn writer(
        &self,
        what: impl Into<String>,
        digest: Option<Digest>,
        size: Option<u64>,
    ) -> Result<BlobWriter<'_>, StoreError> {
        BlobWriter::new(self, what.into(), digest, size)
    }

    /// Adds a small blob that is in memory.
    ///
    /// # Errors
    /// It can't be written.
    pub fn add_bytes(&self, what: &str, bytes: &[u8]) -> Result<Digest, StoreError> {
        let digest = Digest::of(bytes);
        if self.claim(&digest)? == Some(bytes.len() as u64) {
            return Ok(digest);
        }
        let mut writer = self.writer(what, Some(digest), Some(bytes.len() as u64))?;
        writer.put(bytes)?;
        writer.finish()?;
        Ok(digest)
    }

    /// Lays claim on a blob, and tells its size if the store has it: then it stays until the transaction ends.
    ///
    /// # Errors
    /// The lease can't be written.
    pub fn claim(&self, digest: &Digest) -> Result<Option<u64>, StoreError> {
        let _lock = self.store.lock(Lock::Shared)?;
        self.note(*digest)?;
        let path = self.store.blob_path(digest);
        match fs::metadata(&path) {
            Ok(metadata) => Ok(Some(metadata.len())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(StoreError::io("look up the blob", &path)(source)),
        }
    }

    /// Makes the images be in the store, with their references, all or none.
    ///
    /// # Errors
    /// The index can't be written; then nothing stays.
    pub fn commit(mut self, images: Vec<(Top, Option<Reference>)>) -> Result<(), StoreError> {
        let blobs = self.store.directory.join("blobs/sha256");
        File::open(&blobs).and_then(|directory| directory.sync_all()).map_err(StoreError::io("sync", &blobs))?;
        let _lock = self.store.lock(Lock::Exclusive)?;
        let mut index = self.store.load_index()?;
        for (descriptor, reference) in images {
            index.add(descriptor, reference);
        }
        self.store.save_index(&index)?;
        self.end_locked();
        Ok(())
    }

    /// The caller holds the shared lock.
    pub(super) fn note(&self, digest: Digest) -> Result<(), StoreError> {
        let mut lease = self.lease.lock().unwrap_or_else(PoisonError::into_inner);
        let (file, noted) = &mut *lease;
        if noted.insert(digest) {
            file.write_all(format!("{digest}\n").as_bytes()).map_err(StoreError::io("write", &self.path))?;
        }
        Ok(())
    }

    /// Collects what was noted and is not referred to. The caller holds the exclusive lock.
    fn end_locked(&mut self) {
        self.ended = true;
        let noted = std::mem::take(&mut self.lease.lock().unwrap_or_else(PoisonError::into_inner).1);
        let _ = fs::remove_file(&self.path);
        // What can't be collected now, `prune` collects later.
        let _ = self.store.collect(Some(&noted));
    }
}

impl Drop for Transaction {
    fn drop(&mut self) {
        if !self.ended
            && let Ok(_lock) = self.store.lock(Lock::Exclusive)
        {
            self.end_locked();
        }
    }
}
