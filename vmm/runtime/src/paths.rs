//! Where things are on the host.
use std::{env, io, path::PathBuf};

/// The directories that this program uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paths {
    /// What must survive a reboot: images, layers, containers, volumes. `CAISSON_STORE`, or /var/lib/caisson.
    pub store: PathBuf,
    /// What must not: sockets and locks, and the state of engines' containers. `--root`, `CAISSON_ROOT`, or /run/caisson.
    pub run: PathBuf,
    /// What can be made again: the guest kernel, the initramfs, templates. `CAISSON_CACHE`, or ~/.cache/caisson.
    pub cache: PathBuf,
}

impl Paths {
    /// The directories that the environment names; `root` is the `--root` flag.
    pub fn new(root: Option<PathBuf>) -> io::Result<Paths> {
        let variable = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let store = variable("CAISSON_STORE").unwrap_or_else(|| "/var/lib/caisson".into());
        let run = root.or_else(|| variable("CAISSON_ROOT")).unwrap_or_else(|| "/run/caisson".into());
        let cache = variable("CAISSON_CACHE")
            .or_else(|| variable("XDG_CACHE_HOME").map(|home| home.join("caisson")))
            .unwrap_or_else(|| variable("HOME").unwrap_or_else(|| "/root".into()).join(".cache/caisson"));
        Ok(Paths {
            store: std::path::absolute(store)?,
            run: std::path::absolute(run)?,
            cache: std::path::absolute(cache)?,
        })
    }

    /// People's containers.
    pub fn containers(&self) -> PathBuf {
        self.store.join("containers")
    }

    /// Templates: nothing of anyone's is in them, so that every store can use them.
    pub fn templates(&self) -> PathBuf {
        self.cache.join("templates")
    }
}

/// A failure of a file operation, with its path.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}", .path.display())]
pub struct PathError {
    /// What was tried.
    pub action: &'static str,
    /// On what.
    pub path: PathBuf,
    /// Why it failed.
    #[source]
    pub source: io::Error,
}

/// Gives an I/O result its path.
pub trait At<T> {
    /// Says what was tried, on what.
    fn at(self, action: &'static str, path: impl Into<PathBuf>) -> Result<T, PathError>;
}

impl<T, E: Into<io::Error>> At<T> for Result<T, E> {
    fn at(self, action: &'static str, path: impl Into<PathBuf>) -> Result<T, PathError> {
        self.map_err(|source| PathError { action, path: path.into(), source: source.into() })
    }
}
