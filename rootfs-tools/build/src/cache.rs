//! What steps made, by what went into them. A record names a layer in the image store, and pins it there; a step that
//! changed nothing has a record without one.
use caisson_images::store::StoreError;
use caisson_images::{Digest, Layer, Store};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// Part of every key: count it up when steps come to mean something else.
const VERSION: u32 = 1;

/// What a step depends on, as a hash.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key(String);

impl Key {
    /// The key of a step on top of `layers`; `parts` is everything else that it depends on.
    pub fn new(layers: &[Layer], parts: &[&[u8]]) -> Self {
        let mut hasher = Sha256::new();
        hasher.update(VERSION.to_le_bytes());
        hasher.update((layers.len() as u64).to_le_bytes());
        for layer in layers {
            hasher.update(layer.diff_id.hex());
        }
        for part in parts {
            hasher.update((part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        Self(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// As hexadecimal digits.
    pub fn hex(&self) -> &str {
        &self.0
    }
}

/// What a step made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Made {
    /// Its layer; None if it changed nothing.
    pub layer: Option<Layer>,
    /// When, in seconds since the Epoch.
    pub created_s: i64,
}

#[derive(Serialize, Deserialize)]
struct Record {
    created_s: i64,
    layer: Option<LayerRecord>,
}

#[derive(Serialize, Deserialize)]
struct LayerRecord {
    digest: String,
    diff_id: String,
    size: u64,
    media_type: String,
}

/// Why the cache cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// A file of it.
    #[error("cannot write the build cache's {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The image store.
    #[error("cannot pin a layer of the build cache")]
    Pin(#[source] StoreError),
}

/// What [`Cache::prune`] did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pruned {
    /// Records that are gone.
    pub records: u64,
    /// Bytes of layers that went with them.
    pub bytes: u64,
}

/// The build cache.
#[derive(Debug, Clone)]
pub struct Cache {
    directory: PathBuf,
    store: Store,
}

impl Cache {
    /// Uses `directory`, which is made if it does not exist, for records about layers in `store`.
    pub fn open(directory: &Path, store: &Store) -> Result<Self, CacheError> {
        for part in ["records", "tmp"] {
            let path = directory.join(part);
            fs::create_dir_all(&path).map_err(|source| CacheError::Write { path, source })?;
        }
        Ok(Self { directory: directory.to_owned(), store: store.clone() })
    }

    /// A directory for temporary files.
    pub fn scratch(&self) -> PathBuf {
        self.directory.join("tmp")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join("records").join(name)
    }

    /// What a step with this key made, if it is still there.
    pub fn get(&self, key: &Key) -> Option<Made> {
        let path = self.path(key.hex());
        let record: Record = serde_json::from_slice(&fs::read(&path).ok()?).ok()?;
        let layer = match record.layer {
            None => None,
            Some(layer) => {
                let digest: Digest = layer.digest.parse().ok()?;
                let diff_id: Digest = layer.diff_id.parse().ok()?;
                if fs::metadata(self.store.blob_path(&digest)).ok()?.len() != layer.size {
                    return None;
                }
                Some(Layer { digest, diff_id, size: layer.size, media_type: layer.media_type })
            }
        };
        // Its age tells `prune` when it was last of use.
        if let Ok(file) = File::options().append(true).open(&path) {
            let _ = file.set_modified(SystemTime::now());
        }
        Some(Made { layer, created_s: record.created_s })
    }

    /// Remembers what a step made. The layer is in the store, in a transaction that has not ended.
    pub fn put(&self, key: &Key, made: &Made) -> Result<(), CacheError> {
        let layer = made.layer.as_ref().map(|layer| LayerRecord {
            digest: layer.digest.to_string(),
            diff_id: layer.diff_id.to_string(),
            size: layer.size,
            media_type: layer.media_type.clone(),
        });
        if let Some(layer) = &made.layer {
            self.store.pin(&pin_name(key.hex()), &[layer.digest]).map_err(CacheError::Pin)?;
        }
        let record = Record { created_s: made.created_s, layer };
        let path = self.path(key.hex());
        let write = || -> io::Result<()> {
            let mut file = tempfile::NamedTempFile::new_in(self.scratch())?;
            file.write_all(&serde_json::to_vec(&record)?)?;
            file.persist(&path)?;
            Ok(())
        };
        write().map_err(|source| CacheError::Write { path: path.clone(), source })
    }

    /// Forgets what was of no use for `age`.
    pub fn prune(&self, age: Duration) -> Result<Pruned, CacheError> {
        let records = self.directory.join("records");
        let fail = |source| CacheError::Write { path: records.clone(), source };
        let mut pruned = Pruned::default();
        let now = SystemTime::now();
        for entry in fs::read_dir(&records).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            let used = entry.metadata().and_then(|metadata| metadata.modified()).map_err(fail)?;
            if now.duration_since(used).unwrap_or_default() < age {
                continue;
            }
            fs::remove_file(entry.path()).map_err(fail)?;
            pruned.records += 1;
            if let Some(name) = entry.file_name().to_str() {
                pruned.bytes += self.store.unpin(&pin_name(name)).map_err(CacheError::Pin)?.bytes;
            }
        }
        Ok(pruned)
    }
}

fn pin_name(key: &str) -> String {
    format!("build-{key}")
}
