//! What may go: collection, pins, and what dead processes left.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Read};

use serde::Deserialize;

use super::{Lock, Store, StoreError};
use crate::digest::Digest;
use crate::limits::{MAX_INDEX_DEPTH, MAX_MANIFEST_BYTES};

/// What a collection removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Freed {
    /// How many blobs.
    pub blobs: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// What the store takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskUsage {
    /// Images, with and without references.
    pub images: u64,
    /// Images without a reference and a pin: a prune removes them.
    pub dangling: u64,
    /// All blobs.
    pub blobs: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Bytes of the blobs that a prune removes.
    pub reclaimable_bytes: u64,
}

#[derive(Deserialize)]
struct Link {
    digest: String,
}

/// What a manifest or an index refers to, as far as collection has to know.
#[derive(Deserialize)]
struct Links {
    #[serde(default)]
    config: Option<Link>,
    #[serde(default)]
    layers: Vec<Link>,
    #[serde(default)]
    manifests: Vec<Link>,
}

impl Store {
    /// Keeps an image (or any blob) from being collected, across processes and reboots, under a name: a container's id.
    /// A pin of the same name is replaced.
    ///
    /// # Errors
    /// A blob is missing, or the pin can't be written.
    pub fn pin(&self, name: &str, digests: &[Digest]) -> Result<(), StoreError> {
        let path = self.directory.join("pins").join(pin_name(name)?);
        let _lock = self.lock(Lock::Exclusive)?;
        let mut content = String::new();
        for digest in digests {
            self.blob(digest)?;
            content.push_str(&format!("{digest}\n"));
        }
        self.replace(&path, content.as_bytes())
    }

    /// Takes a pin away, if there is one, and collects what only it kept.
    ///
    /// # Errors
    /// The pin can't be removed.
    pub fn unpin(&self, name: &str) -> Result<Freed, StoreError> {
        let path = self.directory.join("pins").join(pin_name(name)?);
        let _lock = self.lock(Lock::Exclusive)?;
        let digests = match File::open(&path) {
            Ok(file) => read_digests(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Freed::default()),
            Err(source) => return Err(StoreError::io("open", &path)(source)),
        };
        let reach = self.reach(digests);
        fs::remove_file(&path).map_err(StoreError::io("remove", &path))?;
        self.collect(Some(&reach?))
    }

    /// Removes images that have neither a reference nor a pin, and all blobs that nothing refers to. Safe beside a pull.
    ///
    /// # Errors
    /// The store is damaged, or something can't be removed.
    pub fn prune(&self) -> Result<Freed, StoreError> {
        let _lock = self.lock(Lock::Exclusive)?;
        let mut index = self.load_index()?;
        for digest in self.dangling()? {
            index.drop_image(&digest);
        }
        self.save_index(&index)?;
        self.collect(None)
    }

    /// What the store takes, and what a prune would give back.
    ///
    /// # Errors
    /// The store is damaged.
    pub fn disk_usage(&self) -> Result<DiskUsage, StoreError> {
        let _lock = self.lock(Lock::Shared)?;
        let dangling: HashSet<Digest> = self.dangling()?.into_iter().collect();
        let index = self.load_index()?;
        let mut usage = DiskUsage { dangling: dangling.len() as u64, ..DiskUsage::default() };
        let mut roots = self.pinned()?;
        for entry in index.images() {
            usage.images += 1;
            if !dangling.contains(&entry.descriptor.digest) {
                roots.insert(entry.descriptor.digest);
            }
        }
        let kept = self.reach(roots)?;
        for (digest, bytes) in self.blobs()? {
            usage.blobs += 1;
            usage.bytes += bytes;
            if !kept.contains(&digest) {
                usage.reclaimable_bytes += bytes;
            }
        }
        Ok(usage)
    }

    /// Removes those of `candidates` (or of all blobs) that nothing keeps. The caller holds the exclusive lock.
    pub(crate) fn collect(&self, candidates: Option<&HashSet<Digest>>) -> Result<Freed, StoreError> {
        let mut roots = self.pinned()?;
        roots.extend(self.load_index()?.images().map(|entry| entry.descriptor.digest));
        let mut kept = self.reach(roots)?;
        kept.extend(self.leases()?.1);
        let mut freed = Freed::default();
        let mut remove = |digest: &Digest, bytes: u64| -> Result<(), StoreError> {
            let path = self.blob_path(digest);
            match fs::remove_file(&path) {
                Ok(()) => {
                    freed.blobs += 1;
                    freed.bytes += bytes;
                    Ok(())
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                Err(source) => Err(StoreError::io("remove", &path)(source)),
            }
        };
        match candidates {
            Some(candidates) => {
                for digest in candidates.difference(&kept) {
                    let bytes = fs::metadata(self.blob_path(digest)).map_or(0, |metadata| metadata.len());
                    remove(digest, bytes)?;
                }
            }
            None => {
                for (digest, bytes) in self.blobs()? {
                    if !kept.contains(&digest) {
                        remove(&digest, bytes)?;
                    }
                }
            }
        }
        Ok(freed)
    }

    /// All that can be reached from `roots`, these included. What is not here reaches nothing.
    pub(crate) fn reach(&self, roots: HashSet<Digest>) -> Result<HashSet<Digest>, StoreError> {
        let mut reached = roots.clone();
        let mut level: Vec<Digest> = roots.into_iter().collect();
        for _ in 0..=MAX_INDEX_DEPTH {
            let mut next = Vec::new();
            for digest in level {
                let path = self.blob_path(&digest);
                let file = match File::open(&path) {
                    Ok(file) => file,
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                    Err(source) => return Err(StoreError::io("open", &path)(source)),
                };
                let len_bytes = file.metadata().map_err(StoreError::io("look up", &path))?.len();
                if len_bytes > MAX_MANIFEST_BYTES {
                    continue;
                }
                let bytes = super::read_bounded(file, MAX_MANIFEST_BYTES, &path)?;
                // A pinned blob may be anything; what was committed as an image was checked to be a manifest.
                let Ok(links) = serde_json::from_slice::<Links>(&bytes) else {
                    continue;
                };
                for link in links.config.iter().chain(&links.layers) {
                    reached.extend(link.digest.parse::<Digest>());
                }
                next.extend(links.manifests.iter().filter_map(|link| link.digest.parse::<Digest>().ok()));
            }
            next.retain(|digest| reached.insert(*digest));
            level = next;
        }
        Ok(reached)
    }

    /// The names of the pins that keep an image.
    pub(super) fn pins_of(&self, digest: &Digest) -> Result<Vec<String>, StoreError> {
        let image = self.reach([*digest].into_iter().collect())?;
        let mut names = Vec::new();
        for (name, digests) in self.pins()? {
            if digests.iter().any(|digest| image.contains(digest)) {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    /// Images that have neither a reference nor a pin.
    fn dangling(&self) -> Result<Vec<Digest>, StoreError> {
        let index = self.load_index()?;
        let pinned = self.pinned()?;
        let mut dangling = Vec::new();
        for entry in index.images() {
            let digest = entry.descriptor.digest;
            if !index.references(&digest).is_empty() {
                continue;
            }
            let image = self.reach([digest].into_iter().collect())?;
            if pinned.is_disjoint(&image) {
                dangling.push(digest);
            }
        }
        Ok(dangling)
    }

    fn pins(&self) -> Result<Vec<(String, HashSet<Digest>)>, StoreError> {
        let directory = self.directory.join("pins");
        let mut pins = Vec::new();
        for entry in fs::read_dir(&directory).map_err(StoreError::io("list", &directory))? {
            let entry = entry.map_err(StoreError::io("list", &directory))?;
            let path = entry.path();
            match File::open(&path) {
                Ok(file) => pins.push((entry.file_name().to_string_lossy().into_owned(), read_digests(file))),
                Err(error) if error.kind() == io::ErrorKind::NotFound => (),
                Err(source) => return Err(StoreError::io("open", &path)(source)),
            }
        }
        Ok(pins)
    }

    fn pinned(&self) -> Result<HashSet<Digest>, StoreError> {
        Ok(self.pins()?.into_iter().flat_map(|(_, digests)| digests).collect())
    }

    fn blobs(&self) -> Result<Vec<(Digest, u64)>, StoreError> {
        let directory = self.directory.join("blobs/sha256");
        let mut blobs = Vec::new();
        for entry in fs::read_dir(&directory).map_err(StoreError::io("list", &directory))? {
            let entry = entry.map_err(StoreError::io("list", &directory))?;
            if let Ok(digest) = Digest::from_hex(&entry.file_name().to_string_lossy()) {
                blobs.push((digest, entry.metadata().map_or(0, |metadata| metadata.len())));
            }
        }
        Ok(blobs)
    }

    /// The files in `tmp/` whose owners are dead, and what the leases name: (theirs, that of the living).
    fn leases(&self) -> Result<(Stale, HashSet<Digest>), StoreError> {
        let directory = self.directory.join("tmp");
        let mut stale = Stale::default();
        let mut living = HashSet::new();
        for entry in fs::read_dir(&directory).map_err(StoreError::io("list", &directory))? {
            let path = entry.map_err(StoreError::io("list", &directory))?.path();
            let file = match File::open(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(source) => return Err(StoreError::io("open", &path)(source)),
            };
            let is_lease = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"lease-"));
            let dead = file.try_lock().is_ok();
            let digests = if is_lease { read_digests(file) } else { HashSet::new() };
            if dead {
                stale.digests.extend(digests);
                stale.paths.push(path);
            } else {
                living.extend(digests);
            }
        }
        Ok((stale, living))
    }

    /// Removes what dead processes left: temporary files, and blobs that they named and nothing refers to.
    pub(super) fn clear_stale(&self) -> Result<(), StoreError> {
        let directory = self.directory.join("tmp");
        let mut entries = fs::read_dir(&directory).map_err(StoreError::io("list", &directory))?;
        if entries.next().is_none() {
            return Ok(());
        }
        let _lock = self.lock(Lock::Exclusive)?;
        let (stale, _) = self.leases()?;
        self.collect(Some(&stale.digests))?;
        for path in stale.paths {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(StoreError::io("remove", &path)(error));
                }
                _ => (),
            }
        }
        Ok(())
    }
}

#[derive(Default)]
struct Stale {
    paths: Vec<std::path::PathBuf>,
    digests: HashSet<Digest>,
}

/// The digests of a lease or a pin. A last line that a kill cut short names nothing that exists.
fn read_digests(mut file: File) -> HashSet<Digest> {
    let mut text = String::new();
    let _ = file.read_to_string(&mut text);
    text.lines().filter_map(|line| line.parse().ok()).collect()
}

fn pin_name(name: &str) -> Result<&str, StoreError> {
    let good = (1..=128).contains(&name.len())
        && !name.starts_with(['.', '-'])
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'));
    if good { Ok(name) } else { Err(StoreError::PinName(name.chars().take(200).collect())) }
}
