//! The cache of converted layers: one EROFS image per diff id, made once, shared by every guest.
//!
//! Safe against concurrent use, in one process or many, and against SIGKILL at any moment: an image is written under a
//! temporary name, under its layer's lock, and renamed when it is complete.
use crate::erofs::{self, ConvertError, Options};
use rustix::fs::{FlockOperation, flock};
use sha2::{Digest, Sha256, Sha512};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// Part of the file names. Count it up when the writer's output changes.
const FORMAT_VERSION: u32 = 1;
const TEMPORARY_SUFFIX: &str = ".tmp";

/// Why a layer is not in the cache.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// Not a diff id.
    #[error("{0:?} is not a layer's diff id: it must be sha256: or sha512: with lower-case hexadecimal digits")]
    DiffId(String),
    /// Nothing to stack.
    #[error("an image without layers has no root file system")]
    NoLayers,
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
    /// The layer cannot be opened.
    #[error("cannot open the layer {diff_id}")]
    Open {
        /// Which.
        diff_id: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The layer cannot be converted.
    #[error("cannot convert the layer {diff_id} to EROFS")]
    Convert {
        /// Which.
        diff_id: String,
        /// Why.
        #[source]
        source: ConvertError,
    },
}

/// A layer's content is not what its image promised.
#[derive(Debug, thiserror::Error)]
#[error("the stream has the digest {actual}, not {expected} as the image says")]
pub struct DigestMismatch {
    /// What the image says.
    pub expected: String,
    /// What came.
    pub actual: String,
}

fn io_error<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> LayerError + 'a {
    move |source| LayerError::Io { action, path: path.to_owned(), source }
}

/// An opened layer: its uncompressed tar stream.
pub type Stream = Box<dyn Read>;

/// A directory of converted layers.
#[derive(Debug, Clone)]
pub struct LayerCache {
    directory: PathBuf,
    max_tar_bytes: u64,
}

/// One image in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CachedLayer {
    /// The layer's diff id; None for several layers merged into one image.
    pub diff_id: Option<String>,
    /// The image.
    pub path: PathBuf,
    /// What it takes on the disk, in bytes.
    pub disk_bytes: u64,
}

impl LayerCache {
    /// Uses `directory`, which is made if it does not exist. What interrupted conversions left is removed.
    ///
    /// # Errors
    /// If it cannot be made or read.
    pub fn open(directory: impl Into<PathBuf>) -> Result<Self, LayerError> {
        let cache = Self { directory: directory.into(), max_tar_bytes: erofs::DEFAULT_MAX_TAR_BYTES };
        let locks = cache.directory.join("locks");
        fs::create_dir_all(&locks).map_err(io_error("make the directory", &locks))?;
        cache.remove_strays()?;
        Ok(cache)
    }

    /// Refuses layers whose tar stream is longer.
    #[must_use]
    pub fn with_max_tar_bytes(mut self, max_tar_bytes: u64) -> Self {
        self.max_tar_bytes = max_tar_bytes;
        self
    }

    /// The layer's image, converted now if there is none: then `open` gives its tar stream, which is checked against
    /// the diff id, and `progress` is told the bytes read so far.
    ///
    /// # Errors
    /// If the stream cannot be opened, read or converted, or is another; nothing is left then.
    pub fn ensure(
        &self,
        diff_id: &str,
        open: impl FnOnce() -> io::Result<Stream>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<PathBuf, LayerError> {
        let name = image_name(diff_id)?;
        self.make(&name, |image, spool| {
            let stream = open().map_err(|source| LayerError::Open { diff_id: diff_id.to_owned(), source })?;
            let stream = CheckedReader::new(stream, diff_id);
            let converted = erofs::convert(stream, image, spool, &self.options(diff_id), progress);
            converted.map(drop).map_err(|source| LayerError::Convert { diff_id: diff_id.to_owned(), source })
        })
    }

    /// The images to overlay for an image's layers, lowest first, at most `most` of them: one for each layer, or one for
    /// all where there are too many, or where a layer can only be understood with those below it. `open` is asked for a
    /// layer by its place among `diff_ids`.
    ///
    /// # Errors
    /// As for [`Self::ensure`], and if there are no layers.
    pub fn stack(
        &self,
        diff_ids: &[&str],
        most: usize,
        open: &mut dyn FnMut(usize) -> io::Result<Stream>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Vec<PathBuf>, LayerError> {
        if diff_ids.is_empty() {
            return Err(LayerError::NoLayers);
        }
        let mut images = Vec::new();
        if diff_ids.len() <= most {
            for (at, diff_id) in diff_ids.iter().enumerate() {
                let path = self.ensure(diff_id, || open(at), progress)?;
                let image = File::open(&path).map_err(io_error("open", &path))?;
                if at > 0 && !erofs::can_be_overlaid(&image).map_err(io_error("read", &path))? {
                    images.clear();
                    break;
                }
                images.push(path);
            }
        }
        if images.is_empty() {
            images.push(self.merged(diff_ids, open, progress)?);
        }
        Ok(images)
    }

    /// One image of several layers, lowest first, whiteouts applied.
    ///
    /// # Errors
    /// As for [`Self::ensure`].
    pub fn merged(
        &self,
        diff_ids: &[&str],
        open: &mut dyn FnMut(usize) -> io::Result<Stream>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<PathBuf, LayerError> {
        for diff_id in diff_ids {
            image_name(diff_id)?;
        }
        let all = diff_ids.join("\n");
        let id = format!("sha256:{}", hex(&Sha256::digest(&all)));
        let name = format!("merged-{}", image_name(&id)?);
        self.make(&name, |image, spool| {
            let layers = diff_ids.iter().enumerate().map(|(at, diff_id)| Ok(CheckedReader::new(open(at)?, diff_id)));
            let converted = erofs::merge(layers, image, spool, &self.options(&id), progress);
            converted.map(drop).map_err(|source| LayerError::Convert { diff_id: diff_ids.join(", "), source })
        })
    }

    /// Removes a layer's image. Guests that use it keep it.
    ///
    /// # Errors
    /// If it is there and cannot be removed.
    pub fn remove(&self, diff_id: &str) -> Result<(), LayerError> {
        let name = image_name(diff_id)?;
        let _lock = self.lock(&name)?;
        remove_if_there(&self.directory.join(name))
    }

    /// What is in the cache.
    ///
    /// # Errors
    /// If the directory cannot be read.
    pub fn list(&self) -> Result<Vec<CachedLayer>, LayerError> {
        use std::os::unix::fs::MetadataExt;
        let mut layers = Vec::new();
        for (name, path) in self.files()? {
            if name.ends_with(TEMPORARY_SUFFIX) {
                continue;
            }
            let Ok(metadata) = fs::metadata(&path) else { continue };
            let diff_id = diff_id_of(&name);
            layers.push(CachedLayer { diff_id, path, disk_bytes: metadata.blocks() * 512 });
        }
        layers.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(layers)
    }

    /// What the cache takes on the disk, in bytes.
    ///
    /// # Errors
    /// If the directory cannot be read.
    pub fn disk_bytes(&self) -> Result<u64, LayerError> {
        Ok(self.list()?.iter().map(|layer| layer.disk_bytes).sum())
    }

    fn options(&self, diff_id: &str) -> Options {
        let mut uuid = [0; 16];
        let digits = diff_id.split_once(':').map_or("", |(_, digits)| digits);
        for (byte, pair) in uuid.iter_mut().zip(digits.as_bytes().chunks_exact(2)) {
            *byte = std::str::from_utf8(pair).ok().and_then(|pair| u8::from_str_radix(pair, 16).ok()).unwrap_or(0);
        }
        Options { uuid, max_tar_bytes: self.max_tar_bytes }
    }

    /// The image of that name, written by `write` under the name's lock if there is none.
    fn make(
        &self,
        name: &str,
        write: impl FnOnce(&File, &File) -> Result<(), LayerError>,
    ) -> Result<PathBuf, LayerError> {
        let path = self.directory.join(name);
        if path.exists() {
            return Ok(path);
        }
        let _lock = self.lock(name)?;
        if path.exists() {
            return Ok(path);
        }
        let temporary = self.directory.join(format!("{name}{TEMPORARY_SUFFIX}"));
        let image = File::create(&temporary).map_err(io_error("create", &temporary))?;
        let written = tempfile::tempfile_in(&self.directory)
            .map_err(io_error("make a temporary file in", &self.directory))
            .and_then(|spool| write(&image, &spool))
            .and_then(|()| image.sync_data().map_err(io_error("write", &temporary)))
            .and_then(|()| fs::rename(&temporary, &path).map_err(io_error("rename an image to", &path)));
        if let Err(error) = written {
            let _ = fs::remove_file(&temporary);
            return Err(error);
        }
        Ok(path)
    }

    fn lock_file(&self, name: &str) -> Result<File, LayerError> {
        let path = self.directory.join("locks").join(name);
        let mut options = OpenOptions::new();
        options.create(true).truncate(false).write(true).open(&path).map_err(io_error("open", &path))
    }

    fn lock(&self, name: &str) -> Result<File, LayerError> {
        let lock = self.lock_file(name)?;
        flock(&lock, FlockOperation::LockExclusive)
            .map_err(|error| io_error("lock a layer in", &self.directory)(error.into()))?;
        Ok(lock)
    }

    /// Removes temporary files that nobody is writing.
    fn remove_strays(&self) -> Result<(), LayerError> {
        for (name, path) in self.files()? {
            let Some(image) = name.strip_suffix(TEMPORARY_SUFFIX) else { continue };
            let lock = self.lock_file(image)?;
            if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
                remove_if_there(&path)?;
            }
        }
        Ok(())
    }

    fn files(&self) -> Result<Vec<(String, PathBuf)>, LayerError> {
        let failed = |source| io_error("list", &self.directory)(source);
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.directory).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if let Ok(name) = entry.file_name().into_string()
                && (name.ends_with(".erofs") || name.ends_with(TEMPORARY_SUFFIX))
            {
                files.push((name, entry.path()));
            }
        }
        Ok(files)
    }
}

enum Hasher {
    Sha256(Sha256),
    Sha512(Sha512),
}

/// Fails at the end of a stream whose digest is not the expected one.
struct CheckedReader {
    inner: Stream,
    hasher: Hasher,
    expected: String,
}

impl CheckedReader {
    fn new(inner: Stream, expected: &str) -> Self {
        let hasher = match expected.starts_with("sha512:") {
            true => Hasher::Sha512(Sha512::new()),
            false => Hasher::Sha256(Sha256::new()),
        };
        Self { inner, hasher, expected: expected.to_owned() }
    }
}

impl Read for CheckedReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.inner.read(buffer)?;
        match &mut self.hasher {
            Hasher::Sha256(hasher) => hasher.update(&buffer[..got]),
            Hasher::Sha512(hasher) => hasher.update(&buffer[..got]),
        }
        if got == 0 && !buffer.is_empty() {
            let actual = match &self.hasher {
                Hasher::Sha256(hasher) => format!("sha256:{}", hex(&hasher.clone().finalize())),
                Hasher::Sha512(hasher) => format!("sha512:{}", hex(&hasher.clone().finalize())),
            };
            if actual != self.expected {
                let expected = self.expected.clone();
                return Err(io::Error::new(io::ErrorKind::InvalidData, DigestMismatch { expected, actual }));
            }
        }
        Ok(got)
    }
}

fn remove_if_there(path: &Path) -> Result<(), LayerError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", path)(error)),
        _ => Ok(()),
    }
}

/// The file name for a diff id, which is checked.
fn image_name(diff_id: &str) -> Result<String, LayerError> {
    let bad = || LayerError::DiffId(diff_id.chars().take(200).collect());
    let (algorithm, digits) = diff_id.split_once(':').ok_or_else(bad)?;
    let len = match algorithm {
        "sha256" => 64,
        "sha512" => 128,
        _ => return Err(bad()),
    };
    if digits.len() != len || !digits.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f')) {
        return Err(bad());
    }
    Ok(format!("{algorithm}-{digits}-v{FORMAT_VERSION}.erofs"))
}

fn diff_id_of(name: &str) -> Option<String> {
    let rest = name.strip_suffix(&format!("-v{FORMAT_VERSION}.erofs"))?;
    let (algorithm, digits) = rest.split_once('-')?;
    Some(format!("{algorithm}:{digits}")).filter(|diff_id| image_name(diff_id).is_ok())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
