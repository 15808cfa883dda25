//! The built kernels on disk, and the run of the build script that puts one there.

use std::collections::HashMap;
use std::io::{self, BufRead as _, BufReader};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::{Kernel, recipe};

/// Longest message of a failed build that is passed on, in bytes; the whole log stays in the cache.
const MAX_MESSAGE_BYTES: usize = 8 * 1024;

/// Why there is no kernel.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Neither `CAISSON_CACHE` nor `HOME` says where the cache is.
    #[error("cannot tell where the kernel cache is: set HOME, or CAISSON_CACHE to a directory")]
    NoCache,
    /// The named Debian packages are needed for a build, and are not installed.
    #[error("building the guest kernel needs packages that are not installed; as root: apt-get install {}", .0.join(" "))]
    MissingPackages(Vec<String>),
    /// The build script failed; its message follows.
    #[error("the guest kernel was not built: {0}")]
    Build(String),
    /// A cached kernel is not what it should be.
    #[error("the cached guest kernel in {} is damaged ({problem}); remove that directory, and it is built again", .directory.display())]
    Damaged {
        /// Its directory.
        directory: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A file or program of the build could not be used.
    #[error("cannot {what}")]
    Io {
        /// What was tried, on what.
        what: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
    let what = what.into();
    move |source| Error::Io { what, source }
}

/// What the script wrote down about a build, by name.
type Manifest = HashMap<String, String>;

/// A directory of built kernels.
pub(crate) struct Cache {
    directory: PathBuf,
}

impl Cache {
    /// `$CAISSON_CACHE`, or `~/.cache/caisson`: as the script decides.
    pub(crate) fn of_the_user() -> Result<Self, Error> {
        let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let directory = set("CAISSON_CACHE").or_else(|| set("HOME").map(|home| home.join(".cache/caisson")));
        Ok(Self { directory: directory.ok_or(Error::NoCache)? })
    }

    pub(crate) fn find(&self) -> Result<Option<Kernel>, Error> {
        Ok(self.entry()?.map(|(kernel, _)| kernel))
    }

    pub(crate) fn ensure(&self, mut progress: impl FnMut(&str)) -> Result<Kernel, Error> {
        if let Some((kernel, manifest)) = self.entry()?
            && !source_changed(&manifest)
        {
            return Ok(kernel);
        }
        let missing = missing_packages()?;
        if !missing.is_empty() {
            return Err(Error::MissingPackages(missing));
        }
        run_script(&self.directory, &mut progress)?;
        self.find()?.ok_or_else(|| Error::Build("the build script ended well, but left no kernel".into()))
    }

    /// The kernel of this recipe, and its manifest.
    fn entry(&self) -> Result<Option<(Kernel, Manifest)>, Error> {
        let link = self.directory.join(format!("kernel-of-{}", recipe::hash(recipe::FILES)));
        let directory = match std::fs::canonicalize(&link) {
            Ok(directory) => directory,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io_error(format!("follow {}", link.display()))(error)),
        };
        let path = directory.join("manifest");
        let text = std::fs::read_to_string(&path).map_err(io_error(format!("read {}", path.display())))?;
        let manifest = parse_manifest(&text);
        let damaged = |problem| Error::Damaged { directory: directory.clone(), problem };
        let field = |name, problem| manifest.get(name).cloned().ok_or_else(|| damaged(problem));
        let kernel = Kernel {
            vmlinux: directory.join("vmlinux"),
            key: field("key", "its manifest has no key")?,
            release: field("release", "its manifest has no release")?,
        };
        if !kernel.vmlinux.is_file() {
            return Err(damaged("it has no vmlinux"));
        }
        Ok(Some((kernel, manifest)))
    }
}

/// Lines of `name=value`; others are skipped, so that a later version may add some.
fn parse_manifest(text: &str) -> Manifest {
    text.lines()
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

/// Whether the source that a kernel was built from is there, but is another by now (an upgraded package).
fn source_changed(manifest: &Manifest) -> bool {
    let Some(metadata) = manifest.get("source").and_then(|path| std::fs::metadata(path).ok()) else {
        return false;
    };
    let is = |name: &str, value: String| manifest.get(name).is_none_or(|recorded| *recorded == value);
    !(is("source_size", metadata.size().to_string()) && is("source_mtime", metadata.mtime().to_string()))
}

pub(crate) fn missing_packages() -> Result<Vec<String>, Error> {
    let recipe = unpacked()?;
    let output = Command::new("bash")
        .arg(recipe.path().join("build"))
        .arg("--missing-packages")
        .stdin(Stdio::null())
        .output()
        .map_err(io_error("run bash for the kernel's build script"))?;
    if !output.status.success() {
        return Err(Error::Build(message(&output.stderr)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect())
}

fn run_script(cache: &Path, progress: &mut impl FnMut(&str)) -> Result<(), Error> {
    let recipe = unpacked()?;
    let errors = recipe.path().join("errors");
    let stderr = std::fs::File::create(&errors).map_err(io_error(format!("create {}", errors.display())))?;
    let mut script = Command::new("bash")
        .arg(recipe.path().join("build"))
        .env("CAISSON_CACHE", cache)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(stderr)
        .spawn()
        .map_err(io_error("run bash for the kernel's build script"))?;
    if let Some(stdout) = script.stdout.take() {
        // The last line is the result's directory, which is found by its link anyway.
        for line in BufReader::new(stdout).lines().map_while(Result::ok).filter(|line| !line.starts_with('/')) {
            progress(&line);
        }
    }
    let status = script.wait().map_err(io_error("wait for the kernel's build script"))?;
    if status.success() {
        return Ok(());
    }
    let text = std::fs::read(&errors).unwrap_or_default();
    Err(Error::Build(if text.is_empty() { format!("its script ended with {status}") } else { message(&text) }))
}

/// The recipe in a directory of its own, which goes with the value.
fn unpacked() -> Result<tempfile::TempDir, Error> {
    let what = || format!("write the kernel's recipe into a directory in {}", std::env::temp_dir().display());
    let directory = tempfile::Builder::new().prefix("caisson-kernel-").tempdir().map_err(io_error(what()))?;
    recipe::write(directory.path()).map_err(io_error(what()))?;
    Ok(directory)
}

/// What a script said, without its name, bounded.
fn message(stderr: &[u8]) -> String {
    let end = stderr.len().min(MAX_MESSAGE_BYTES);
    let text = String::from_utf8_lossy(&stderr[..end]);
    let text = text.trim();
    text.strip_prefix("guest-kernel/build: ").unwrap_or(text).to_owned()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
