//! Images out of files: OCI layouts (directory or tar), and docker-archives, as skopeo, podman, umoci, buildah and docker
//! write them. A stream is read once and front to back, so that it may be a pipe.
//!
//! Everything is one [`Transaction`]: after an error nothing of the archive is in the store.

mod docker;
mod oci;
mod tar_stream;

use std::collections::{HashMap, HashSet};
use std::fs::{self, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::digest::Digest;
use crate::image::{Image, Layer, Top};
use crate::layer::decompress;
use crate::limits::{MAX_ARCHIVE_MEMBERS, MAX_MANIFEST_BYTES};
use crate::reference::{Reference, ReferenceError};
use crate::store::{Store, StoreError, Transaction};
pub use tar_stream::TarError;
use tar_stream::{Kind, TarStream};

/// How to import.
#[derive(Debug, Clone, Default)]
pub struct ImportOptions {
    /// The image's reference, instead of those in the archive; only for an archive of one image.
    pub reference: Option<Reference>,
    /// What an image is called whose name in the archive is a mere tag, as umoci writes them; by default, the file's or
    /// directory's name without its extension.
    pub stem: Option<String>,
}

/// Why an import failed. Nothing of it is in the store.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The source can't be read.
    #[error("cannot read {what}")]
    Read {
        /// The file, directory or stream.
        what: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The tar stream is malformed or truncated.
    #[error("{what} is not a whole tar archive")]
    Tar {
        /// The file or stream.
        what: String,
        /// Where and why.
        #[source]
        source: TarError,
    },
    /// It is no archive or layout of images.
    #[error(
        "{what} holds no image: {reason}; an OCI layout has an index.json, a docker-archive has a manifest.json (make one with `skopeo copy` or `podman save`)"
    )]
    NoImage {
        /// The file, directory or stream.
        what: String,
        /// What is missing.
        reason: String,
    },
    /// A blob or file that is referred to is missing.
    #[error("{what} is incomplete: {missing} is missing")]
    Incomplete {
        /// The file, directory or stream.
        what: String,
        /// What is missing.
        missing: String,
    },
    /// An archive's name for an image is no reference.
    #[error("the image name {name:?} in {what} can't be used; give it another one with --tag")]
    Name {
        /// The file, directory or stream.
        what: String,
        /// The name.
        name: String,
        /// Why.
        #[source]
        source: ReferenceError,
    },
    /// One reference for several images.
    #[error("{what} holds {count} images: a single name does not fit")]
    Several {
        /// The file, directory or stream.
        what: String,
        /// How many there are.
        count: usize,
    },
    /// A document or blob is malformed, or the store can't be written.
    #[error("{what} can't be imported")]
    Content {
        /// The file, directory or stream.
        what: String,
        /// Why.
        #[source]
        source: StoreError,
    },
}

/// Imports from a file or directory.
///
/// # Errors
/// See [`ImportError`].
pub fn import_path(store: &Store, path: &Path, options: &ImportOptions) -> Result<Vec<Image>, ImportError> {
    let what = path.display().to_string();
    let failed = |source| ImportError::Read { what: what.clone(), source };
    let mut options = options.clone();
    if options.stem.is_none() {
        let path = fs::canonicalize(path).map_err(failed)?;
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let stem = if path.is_dir() { name.as_str() } else { name.split('.').next().unwrap_or_default() };
        options.stem = Some(stem.to_ascii_lowercase());
    }
    if fs::metadata(path).map_err(failed)?.is_dir() {
        let mut import = Import::begin(store, what)?;
        let index = read_layout_file(&mut import, path, "index.json")?;
        let images = import.oci(&index, &options, Some(path))?;
        return import.commit(images);
    }
    let file = OpenOptions::new().read(true).open(path).map_err(failed)?;
    import_stream(store, file, &what, &options)
}

/// Imports from a stream, which need not be seekable. `what` names it in errors.
///
/// # Errors
/// See [`ImportError`].
pub fn import_stream(
    store: &Store,
    stream: impl Read + Send + 'static,
    what: &str,
    options: &ImportOptions,
) -> Result<Vec<Image>, ImportError> {
    let mut import = Import::begin(store, what.to_owned())?;
    let stream = decompress(stream).map_err(|source| ImportError::Read { what: what.to_owned(), source })?;
    import.unpack(stream)?;
    let images = match (import.documents.remove("index.json"), import.documents.remove("manifest.json")) {
        // docker since 25 writes both; the layout has the original manifests.
        (Some(index), _) => import.oci(&index, options, None)?,
        (None, Some(manifest)) => import.docker(&manifest, options)?,
        (None, None) => {
            return Err(ImportError::NoImage {
                what: what.to_owned(),
                reason: "it has neither an index.json nor a manifest.json".to_owned(),
            });
        }
    };
    import.commit(images)
}

/// An import under way.
struct Import {
    transaction: Transaction,
    what: String,
    /// `index.json` and `manifest.json`.
    documents: HashMap<String, Vec<u8>>,
    /// A docker-archive's files, which are in the store already.
    files: HashMap<String, (Digest, u64)>,
    /// Its symbolic and hard links, by name.
    links: HashMap<String, String>,
    /// Layers whose diff ids are right.
    verified: HashSet<(Digest, Digest)>,
}

/// An image that was found: its references, and what they point to.
struct Found {
    image: Image,
    references: Vec<Reference>,
}

impl Import {
    fn begin(store: &Store, what: String) -> Result<Self, ImportError> {
        let transaction = store.begin().map_err(|source| ImportError::Content { what: what.clone(), source })?;
        Ok(Self {
            transaction,
            what,
            documents: HashMap::new(),
            files: HashMap::new(),
            links: HashMap::new(),
            verified: HashSet::new(),
        })
    }

    fn content(&self) -> impl Fn(StoreError) -> ImportError + use<> {
        let what = self.what.clone();
        move |source| ImportError::Content { what: what.clone(), source }
    }

    /// Brings an archive's members into the store, whatever it turns out to be.
    fn unpack(&mut self, stream: impl Read) -> Result<(), ImportError> {
        let what = self.what.clone();
        let tar = |source| ImportError::Tar { what: what.clone(), source };
        let mut stream = TarStream::new(stream);
        let mut members = 0;
        while let Some(member) = stream.next_member().map_err(tar)? {
            members += 1;
            if members > MAX_ARCHIVE_MEMBERS {
                return Err(tar(stream.refuse(format!("it has more than {MAX_ARCHIVE_MEMBERS} members"))));
            }
            let name = member.name;
            match member.kind {
                Kind::File => (),
                Kind::Link(target) => {
                    self.links.insert(name, target);
                    continue;
                }
                Kind::Other => continue,
            }
            let base = name.rsplit('/').next().unwrap_or_default();
            if matches!(name.as_str(), "index.json" | "manifest.json" | "oci-layout") {
                if member.size > MAX_MANIFEST_BYTES {
                    return Err(tar(stream.refuse(format!("{name} is longer than {MAX_MANIFEST_BYTES} bytes"))));
                }
                let mut bytes = Vec::new();
                stream.read_to_end(&mut bytes).map_err(|error| tar(stream.truncated(&error)))?;
                self.documents.insert(name, bytes);
                continue;
            }
            let blob = name.strip_prefix("blobs/sha256/").map(Digest::from_hex);
            let expected = match blob {
                Some(Ok(digest)) => Some(digest),
                Some(Err(source)) => {
                    return Err(self.content()(StoreError::Digest { what: format!("the name of {name}"), source }));
                }
                // What docker wrote for its predecessors: of no use.
                None if matches!(base, "VERSION" | "json" | "repositories") => continue,
                None if !base.ends_with(".json") && !base.ends_with(".tar") && !base.ends_with(".gz") => {
                    continue;
                }
                None => None,
            };
            let mut writer = self
                .transaction
                .writer(format!("{name} in {what}"), expected, Some(member.size))
                .map_err(self.content())?;
            let mut chunk = vec![0; 128 << 10];
            loop {
                match stream.read(&mut chunk).map_err(|error| tar(stream.truncated(&error)))? {
                    0 => break,
                    count => writer.put(&chunk[..count]).map_err(self.content())?,
                }
            }
            let written = writer.finish().map_err(self.content())?;
            self.files.insert(name, written);
        }
        Ok(())
    }

    /// Checks the layers' diff ids, several at a time.
    fn verify(&mut self, layers: &[Layer]) -> Result<(), ImportError> {
        let mut todo: Vec<&Layer> = Vec::new();
        for layer in layers {
            if self.verified.insert((layer.digest, layer.diff_id)) {
                todo.push(layer);
            }
        }
        let next = AtomicUsize::new(0);
        let failure = Mutex::new(None);
        let store = self.transaction.store();
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(4).min(todo.len());
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    while let Some(layer) = todo.get(next.fetch_add(1, Ordering::Relaxed)) {
                        if let Err(error) = store.verify_layer(layer) {
                            next.store(todo.len(), Ordering::Relaxed);
                            failure.lock().unwrap_or_else(std::sync::PoisonError::into_inner).get_or_insert(error);
                        }
                    }
                });
            }
        });
        match failure.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
            Some(source) => Err(self.content()(source)),
            None => Ok(()),
        }
    }

    fn commit(self, found: Vec<Found>) -> Result<Vec<Image>, ImportError> {
        let content = self.content();
        let mut entries: Vec<(Top, Option<Reference>)> = Vec::new();
        for Found { image, references } in &found {
            match references.as_slice() {
                [] => entries.push((image.top.clone(), None)),
                references => {
                    entries.extend(references.iter().map(|reference| (image.top.clone(), Some(reference.clone()))))
                }
            }
        }
        self.transaction.commit(entries).map_err(content)?;
        Ok(found.into_iter().map(|Found { image, references }| Image { references, ..image }).collect())
    }

    /// The references of the only image, if the caller named it.
    fn named(&self, options: &ImportOptions, count: usize) -> Result<Option<Reference>, ImportError> {
        match &options.reference {
            Some(_) if count != 1 => Err(ImportError::Several { what: self.what.clone(), count }),
            reference => Ok(reference.clone()),
        }
    }
}

/// Opens a layout's file: a regular one, where a hostile layout might have put a pipe or a link to elsewhere.
fn open_layout_file(what: &str, directory: &Path, name: &str) -> Result<fs::File, ImportError> {
    let path: PathBuf = directory.join(name);
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound if name == "index.json" => {
            ImportError::NoImage { what: what.to_owned(), reason: "it has no index.json".to_owned() }
        }
        io::ErrorKind::NotFound => ImportError::Incomplete { what: what.to_owned(), missing: name.to_owned() },
        _ => ImportError::Read { what: path.display().to_string(), source },
    };
    // From <fcntl.h>: O_NOFOLLOW and O_NONBLOCK, the same on all that we run on.
    let flags = 0o400_000 | 0o4_000;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(&path).map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file")));
    }
    Ok(file)
}

fn read_layout_file(import: &mut Import, directory: &Path, name: &str) -> Result<Vec<u8>, ImportError> {
    let file = open_layout_file(&import.what, directory, name)?;
    crate::store::read_bounded(file, MAX_MANIFEST_BYTES, &directory.join(name)).map_err(import.content())
}

#[cfg(test)]
mod tests;
