//! Named volumes: each an ext4 image of a stated size, attached to a guest as a disk. It is bounded, it is POSIX, and no file system of the
//! host is exposed.
//!
//! One container may write to a volume, or many may read it: who attaches it holds a lock on its image for as long as it lives, so that a
//! SIGKILL of anything frees it.
use caisson_rootfs::upper::{Kind, UpperCache, UpperError};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, File, OpenOptions},
    io,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

/// The directory within the image that containers see.
pub const DATA: &str = "data";
/// The size of a volume when nobody says otherwise, in bytes. The image is sparse.
pub const DEFAULT_SIZE_BYTES: u64 = 10 << 30;
/// The longest name.
const MAX_NAME_BYTES: usize = 128;

/// Why something could not be done to a volume.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// A name that cannot be one.
    #[error(
        "{0:?} is no volume name: it begins with a letter or digit, and goes on with those, '_', '.' and '-', up to {MAX_NAME_BYTES}"
    )]
    Name(String),
    /// There is none of this name.
    #[error("there is no volume {0}; `caisson volume ls` lists them, `caisson volume create {0}` makes it")]
    NotFound(String),
    /// There is one of this name.
    #[error("there is a volume {0} already")]
    Exists(String),
    /// Somebody writes to it, or would be disturbed.
    #[error("volume {0} is in use: {1}")]
    InUse(String, &'static str),
    /// A file could not be handled.
    #[error("cannot {what} {path}")]
    File {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The image could not be made.
    #[error(transparent)]
    Image(#[from] UpperError),
}

fn file(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> VolumeError {
    let path = path.to_owned();
    move |source| VolumeError::File { what, path, source }
}

/// A volume, as `inspect` tells of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Volume {
    /// Its name.
    pub name: String,
    /// The most that it can hold, in bytes, its own structures included.
    pub size_bytes: u64,
    /// When it was made, in seconds since the Epoch.
    pub created: u64,
}

/// An attached volume; attached as long as the value lives.
#[derive(Debug)]
pub struct Attached {
    /// The image.
    pub image: PathBuf,
    /// Whether it may only be read.
    pub read_only: bool,
    _lock: File,
}

/// The volumes of a store.
#[derive(Debug, Clone)]
pub struct Volumes {
    directory: PathBuf,
    images: UpperCache,
}

impl Volumes {
    /// Opens the volumes in `directory`, with a cache of formatted images. Both are made as they come to be needed.
    pub fn open(directory: impl Into<PathBuf>, images: UpperCache) -> Self {
        Self { directory: directory.into(), images }
    }

    fn check(name: &str) -> Result<(), VolumeError> {
        let mut bytes = name.bytes();
        let first = bytes.next().is_some_and(|byte| byte.is_ascii_alphanumeric());
        let ok = first
            && bytes.all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte))
            && name.len() <= MAX_NAME_BYTES;
        if ok { Ok(()) } else { Err(VolumeError::Name(name.to_owned())) }
    }

    fn image(&self, name: &str) -> PathBuf {
        self.directory.join(name).join("volume.ext4")
    }

    /// Makes an empty volume.
    pub fn create(&self, name: &str, size_bytes: u64) -> Result<Volume, VolumeError> {
        Self::check(name)?;
        fs::create_dir_all(&self.directory).map_err(file("make the directory", &self.directory))?;
        // Made aside and renamed: a volume is there whole or not at all.
        let aside = tempfile::Builder::new()
            .prefix(".making-")
            .tempdir_in(&self.directory)
            .map_err(file("make a directory in", &self.directory))?;
        self.images.create(Kind::Kept, size_bytes, &aside.path().join("volume.ext4"))?;
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let volume = Volume { name: name.to_owned(), size_bytes, created };
        let description = aside.path().join("volume.json");
        let json = serde_json::to_vec(&volume).map_err(|error| file("write", &description)(error.into()))?;
        fs::write(&description, json).map_err(file("write", &description))?;
        let place = self.directory.join(name);
        match fs::rename(aside.path(), &place) {
            Ok(()) => {
                // What was renamed is no longer there to be removed.
                let _ = aside.keep();
                Ok(volume)
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists) => {
                Err(VolumeError::Exists(name.to_owned()))
            }
            Err(error) => Err(file("make", &place)(error)),
        }
    }

    /// One volume.
    pub fn inspect(&self, name: &str) -> Result<Volume, VolumeError> {
        Self::check(name)?;
        let path = self.directory.join(name).join("volume.json");
        let json = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(VolumeError::NotFound(name.to_owned()));
            }
            other => other.map_err(file("read", &path))?,
        };
        serde_json::from_slice(&json).map_err(|error| file("read", &path)(error.into()))
    }

    /// All volumes by name.
    pub fn list(&self) -> Result<Vec<Volume>, VolumeError> {
        let entries = match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(file("read the directory", &self.directory))?,
        };
        let mut volumes = Vec::new();
        for entry in entries {
            let entry = entry.map_err(file("read the directory", &self.directory))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if Self::check(&name).is_ok() {
                match self.inspect(&name) {
                    // Removed in the meantime.
                    Err(VolumeError::NotFound(_)) => {}
                    volume => volumes.push(volume?),
                }
            }
        }
        volumes.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(volumes)
    }

    /// Attaches a volume; with `read_only`, beside others that only read it.
    pub fn attach(&self, name: &str, read_only: bool) -> Result<Attached, VolumeError> {
        self.inspect(name)?;
        let image = self.image(name);
        let lock = OpenOptions::new().read(true).write(true).open(&image).map_err(file("open", &image))?;
        let operation =
            if read_only { FlockOperation::NonBlockingLockShared } else { FlockOperation::NonBlockingLockExclusive };
        match flock(&lock, operation) {
            Ok(()) => Ok(Attached { image, read_only, _lock: lock }),
            Err(rustix::io::Errno::WOULDBLOCK) if read_only => Err(VolumeError::InUse(
                name.to_owned(),
                "a container writes to it; it can be read by others when that has ended",
            )),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(VolumeError::InUse(
                name.to_owned(),
                "another container has it; one can write to it at a time (`:ro` lets many read it)",
            )),
            Err(error) => Err(file("lock", &image)(error.into())),
        }
    }

    /// Attaches a volume, which is made first if it does not exist.
    pub fn attach_or_create(&self, name: &str, read_only: bool) -> Result<Attached, VolumeError> {
        match self.create_unless_there(name) {
            Ok(()) => self.attach(name, read_only),
            Err(error) => Err(error),
        }
    }

    fn create_unless_there(&self, name: &str) -> Result<(), VolumeError> {
        match self.inspect(name) {
            Err(VolumeError::NotFound(_)) => match self.create(name, DEFAULT_SIZE_BYTES) {
                Ok(_) | Err(VolumeError::Exists(_)) => Ok(()),
                Err(error) => Err(error),
            },
            other => other.map(drop),
        }
    }

    /// Removes a volume and all that is in it, unless a container has it.
    pub fn remove(&self, name: &str) -> Result<(), VolumeError> {
        let attached = match self.attach(name, false) {
            Err(VolumeError::InUse(name, _)) => return Err(VolumeError::InUse(name, "a container has it")),
            other => other?,
        };
        let place = self.directory.join(name);
        // Renamed first: a removal that is interrupted leaves no half of a volume under its name.
        let aside = self.directory.join(format!(".removed-{name}-{}", std::process::id()));
        fs::rename(&place, &aside).map_err(file("remove", &place))?;
        drop(attached);
        fs::remove_dir_all(&aside).map_err(file("remove", &aside))
    }

    /// Removes every volume that no container has; returns the names.
    ///
    /// `keep` tells of volumes that are to stay though nobody has them now, as a stopped container's.
    pub fn prune(&self, keep: impl Fn(&str) -> bool) -> Result<Vec<String>, VolumeError> {
        let mut removed = Vec::new();
        for volume in self.list()? {
            if keep(&volume.name) {
                continue;
            }
            match self.remove(&volume.name) {
                Ok(()) => removed.push(volume.name),
                Err(VolumeError::InUse(..) | VolumeError::NotFound(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(removed)
    }
}

#[cfg(test)]
mod tests {
    use super::{Volume, VolumeError, Volumes};
    use caisson_rootfs::upper::UpperCache;
    use tempfile::TempDir;

    const SIZE: u64 = 32 << 20;

    fn volumes() -> (TempDir, Volumes) {
        let directory = tempfile::tempdir().unwrap();
        let cache = UpperCache::open(directory.path().join("cache")).unwrap();
        let volumes = Volumes::open(directory.path().join("volumes"), cache);
        (directory, volumes)
    }

    #[test]
    fn volumes_are_made_listed_and_removed() {
        let (_directory, volumes) = volumes();
        assert_eq!(volumes.list().unwrap(), []);
        let made = volumes.create("data", SIZE).unwrap();
        assert_eq!((made.name.as_str(), made.size_bytes), ("data", SIZE));
        assert!(matches!(volumes.create("data", SIZE), Err(VolumeError::Exists(_))));
        volumes.create("another", SIZE).unwrap();
        let names: Vec<_> = volumes.list().unwrap().into_iter().map(|Volume { name, .. }| name).collect();
        assert_eq!(names, ["another", "data"]);
        volumes.remove("data").unwrap();
        assert!(matches!(volumes.remove("data"), Err(VolumeError::NotFound(_))));
        assert_eq!(volumes.prune(|_| true).unwrap(), Vec::<String>::new());
        assert_eq!(volumes.prune(|_| false).unwrap(), ["another"]);
    }

    #[test]
    fn one_writes_or_many_read() {
        let (_directory, volumes) = volumes();
        volumes.create("data", SIZE).unwrap();
        let writer = volumes.attach("data", false).unwrap();
        assert!(matches!(volumes.attach("data", false), Err(VolumeError::InUse(..))));
        assert!(matches!(volumes.attach("data", true), Err(VolumeError::InUse(..))));
        assert!(matches!(volumes.remove("data"), Err(VolumeError::InUse(..))));
        assert_eq!(volumes.prune(|_| false).unwrap(), Vec::<String>::new());
        drop(writer);
        let readers = [volumes.attach("data", true).unwrap(), volumes.attach("data", true).unwrap()];
        assert!(matches!(volumes.attach("data", false), Err(VolumeError::InUse(..))));
        drop(readers);
        volumes.attach("data", false).unwrap();
    }

    #[test]
    fn names_lead_nowhere() {
        let (_directory, volumes) = volumes();
        for name in ["", ".", "..", "a/b", ".hidden", "-x", "a b", &"x".repeat(200)] {
            assert!(matches!(volumes.create(name, SIZE), Err(VolumeError::Name(_))), "{name}");
            assert!(matches!(volumes.attach(name, true), Err(VolumeError::Name(_))), "{name}");
        }
        assert!(volumes.create("small", 1).is_err());
        assert_eq!(volumes.list().unwrap(), []);
    }
}
