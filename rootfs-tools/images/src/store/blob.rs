//! A blob on its way into the store.

use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::path::PathBuf;

use super::{Lock, StoreError, Transaction};
use crate::digest::{Digest, Hashing};
use crate::limits::MAX_BLOB_BYTES;

/// Bytes that are moved at once.
const CHUNK_BYTES: usize = 128 << 10;

/// Writes one blob: to a temporary file, which gets its name when its digest and size are right.
///
/// Dropped before [`finish`](Self::finish), it leaves nothing.
#[derive(Debug)]
pub struct BlobWriter<'t> {
    transaction: &'t Transaction,
    what: String,
    file: Option<Hashing<File>>,
    path: PathBuf,
    digest: Option<Digest>,
    size: Option<u64>,
    limit: u64,
}

impl<'t> BlobWriter<'t> {
    pub(super) fn new(
        transaction: &'t Transaction,
        what: String,
        digest: Option<Digest>,
        size: Option<u64>,
    ) -> Result<Self, StoreError> {
        if size.is_some_and(|size| size > MAX_BLOB_BYTES) {
            return Err(StoreError::TooLong { what, limit: MAX_BLOB_BYTES });
        }
        let (file, path) = transaction.store().temporary("blob")?;
        let file = Some(Hashing::new(file));
        Ok(Self { transaction, what, file, path, digest, size, limit: size.unwrap_or(MAX_BLOB_BYTES) })
    }

    /// How many bytes were written.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.file.as_ref().map_or(0, Hashing::count)
    }

    /// Forgets what was written.
    ///
    /// # Errors
    /// The file can't be truncated.
    pub fn restart(&mut self) -> Result<(), StoreError> {
        if let Some(hashing) = self.file.take() {
            let (mut file, _, _) = hashing.finish();
            file.set_len(0).and_then(|()| file.rewind()).map_err(StoreError::io("truncate", &self.path))?;
            self.file = Some(Hashing::new(file));
        }
        Ok(())
    }

    /// Writes all that `source` has.
    ///
    /// # Errors
    /// Reading fails, writing fails, or it is more than the blob should have.
    pub fn write_from(&mut self, source: &mut impl Read) -> Result<u64, StoreError> {
        let mut chunk = vec![0; CHUNK_BYTES];
        let mut total = 0;
        loop {
            let count = match source.read(&mut chunk) {
                Ok(0) => return Ok(total),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => {
                    return Err(StoreError::Io { action: "read", path: self.what.clone().into(), source });
                }
            };
            self.put(&chunk[..count])?;
            total += count as u64;
        }
    }

    /// Writes one piece.
    ///
    /// # Errors
    /// Writing fails, or it is more than the blob should have.
    pub fn put(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        if self.written().saturating_add(bytes.len() as u64) > self.limit {
            return Err(match self.size {
                Some(expected) => StoreError::WrongSize {
                    what: self.what.clone(),
                    expected,
                    found: self.written().saturating_add(bytes.len() as u64),
                },
                None => StoreError::TooLong { what: self.what.clone(), limit: self.limit },
            });
        }
        match &mut self.file {
            Some(file) => file.write_all(bytes).map_err(StoreError::io("write", &self.path)),
            None => Ok(()),
        }
    }

    /// Checks size and digest, and gives the blob its name. It stays if the transaction is committed and something
    /// that is committed refers to it.
    ///
    /// # Errors
    /// It is not what it should be, or the file can't be synced or renamed.
    pub fn finish(mut self) -> Result<(Digest, u64), StoreError> {
        let Some(hashing) = self.file.take() else {
            return Err(StoreError::Corrupt { what: self.what.clone(), reason: "it was given up before".to_owned() });
        };
        let (file, found, size) = hashing.finish();
        if let Some(expected) = self.size
            && expected != size
        {
            return Err(StoreError::WrongSize { what: self.what.clone(), expected, found: size });
        }
        if let Some(expected) = self.digest
            && expected != found
        {
            return Err(StoreError::WrongDigest { what: self.what.clone(), expected, found });
        }
        file.sync_all().map_err(StoreError::io("sync", &self.path))?;
        let store = self.transaction.store();
        let _lock = store.lock(Lock::Shared)?;
        self.transaction.note(found)?;
        let target = store.blob_path(&found);
        fs::rename(&self.path, &target).map_err(StoreError::io("make the blob", &target))?;
        self.path = PathBuf::new();
        Ok((found, size))
    }
}

impl Write for BlobWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.put(bytes) {
            Ok(()) => Ok(bytes.len()),
            Err(StoreError::Io { source, .. }) => Err(source),
            Err(error) => Err(io::Error::new(io::ErrorKind::InvalidData, error)),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for BlobWriter<'_> {
    fn drop(&mut self) {
        if !self.path.as_os_str().is_empty() {
            let _ = fs::remove_file(&self.path);
        }
    }
}
