//! The build context: a directory of the host's, indexed once, without what `.dockerignore` names. Links in it are kept
//! as links, and followed in the index only, so none leads outside; files are opened beneath the directory only.
use crate::pattern::{Ignore, PatternError};
use crate::tree::{Changes, Content, Kind, Node, View};
use rustix::fs::{Mode, OFlags};
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, Metadata};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Most files of a context: the index is in memory.
const MAX_FILES: usize = 2_000_000;
/// Largest `.dockerignore`, bytes.
const MAX_IGNORE_BYTES: u64 = 1 << 20;

/// Why a context cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ContextError {
    /// It cannot be read.
    #[error("cannot read {} of the build context", path.display())]
    Read {
        /// What.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A pattern of its ignore file is wrong.
    #[error("{}: wrong pattern", path.display())]
    Pattern {
        /// The ignore file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: PatternError,
    },
    /// It has too many files.
    #[error("the build context {} has more than {MAX_FILES} files: leave some out with a .dockerignore file", path.display())]
    TooMany {
        /// The directory.
        path: PathBuf,
    },
}

/// An indexed build context.
#[derive(Debug, Clone)]
pub struct Context {
    /// The directory as the user named it.
    pub directory: PathBuf,
    /// Its files.
    pub view: View,
}

impl Context {
    /// Indexes `directory`. `<dockerfile>.dockerignore` counts before the context's own `.dockerignore`.
    pub fn open(directory: &Path, dockerfile: Option<&Path>) -> Result<Self, ContextError> {
        let ignore = read_ignore(directory, dockerfile)?;
        let fd = rustix::fs::open(directory, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|errno| ContextError::Read { path: directory.to_owned(), source: errno.into() })?;
        let mut walk = Walk {
            directory,
            root: Arc::new(fd),
            ignore,
            changes: Changes::default(),
            links: HashMap::new(),
            visited: 0,
        };
        walk.directory(Path::new(""))?;
        let mut view = View::default();
        view.apply(&walk.changes);
        Ok(Self { directory: directory.to_owned(), view })
    }

    /// A context without files.
    pub fn empty() -> Self {
        Self { directory: PathBuf::new(), view: View::default() }
    }
}

fn read_ignore(directory: &Path, dockerfile: Option<&Path>) -> Result<Ignore, ContextError> {
    let own = dockerfile.map(|path| {
        let mut name = path.as_os_str().to_owned();
        name.push(".dockerignore");
        PathBuf::from(name)
    });
    for path in own.into_iter().chain([directory.join(".dockerignore")]) {
        let read = |source| ContextError::Read { path: path.clone(), source };
        match fs::metadata(&path) {
            Ok(metadata) if metadata.len() > MAX_IGNORE_BYTES => {
                return Err(read(io::Error::other("it is larger than 1 MiB")));
            }
            Ok(_) => {
                let text = fs::read_to_string(&path).map_err(read)?;
                return Ignore::parse(&text).map_err(|source| ContextError::Pattern { path: path.clone(), source });
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(read(error)),
        }
    }
    Ok(Ignore::default())
}

struct Walk<'a> {
    directory: &'a Path,
    root: Arc<OwnedFd>,
    ignore: Ignore,
    changes: Changes,
    links: HashMap<(u64, u64), Arc<Node>>,
    visited: usize,
}

impl Walk<'_> {
    fn directory(&mut self, relative: &Path) -> Result<(), ContextError> {
        let full = self.directory.join(relative);
        let fail = |source| ContextError::Read { path: relative.to_owned(), source };
        let mut names = Vec::new();
        for entry in fs::read_dir(&full).map_err(fail)? {
            names.push(entry.map_err(fail)?.file_name());
        }
        names.sort();
        for name in names {
            let path = relative.join(&name);
            self.visited += 1;
            if self.visited > MAX_FILES {
                return Err(ContextError::TooMany { path: self.directory.to_owned() });
            }
            let ignored = self.ignore.ignores(&path);
            if ignored && !self.ignore.has_exceptions() {
                continue;
            }
            let full = self.directory.join(&path);
            let metadata =
                fs::symlink_metadata(&full).map_err(|source| ContextError::Read { path: path.clone(), source })?;
            if !ignored && let Some(node) = self.node(&path, &full, &metadata)? {
                self.add_parents(&path)?;
                self.changes.added.insert(path.clone(), node);
            }
            if metadata.is_dir() {
                self.directory(&path)?;
            }
        }
        Ok(())
    }

    /// Ignored directories come back with the first file that is kept below them.
    fn add_parents(&mut self, path: &Path) -> Result<(), ContextError> {
        let missing: Vec<&Path> = path
            .ancestors()
            .skip(1)
            .filter(|part| !part.as_os_str().is_empty())
            .take_while(|part| !self.changes.added.contains_key(*part))
            .collect();
        for part in missing {
            let full = self.directory.join(part);
            let metadata =
                fs::symlink_metadata(&full).map_err(|source| ContextError::Read { path: part.to_owned(), source })?;
            if let Some(node) = self.node(part, &full, &metadata)? {
                self.changes.added.insert(part.to_owned(), node);
            }
        }
        Ok(())
    }

    fn node(&mut self, path: &Path, full: &Path, metadata: &Metadata) -> Result<Option<Arc<Node>>, ContextError> {
        let kind = metadata.file_type();
        let identity = (metadata.dev(), metadata.ino());
        if kind.is_file()
            && metadata.nlink() > 1
            && let Some(node) = self.links.get(&identity)
        {
            return Ok(Some(Arc::clone(node)));
        }
        let (major, minor) = (rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev()));
        let kind = if kind.is_file() {
            let content = Content::Host { root: Arc::clone(&self.root), path: path.to_owned() };
            Kind::File { size: metadata.len(), content }
        } else if kind.is_dir() {
            Kind::Directory
        } else if kind.is_symlink() {
            let target = fs::read_link(full).map_err(|source| ContextError::Read { path: path.to_owned(), source })?;
            Kind::Symlink(target)
        } else if kind.is_fifo() {
            Kind::Fifo
        } else if kind.is_char_device() {
            Kind::Char { major, minor }
        } else if kind.is_block_device() {
            Kind::Block { major, minor }
        } else {
            // A socket means nothing elsewhere.
            return Ok(None);
        };
        // Who owns a file on the host means nothing in an image.
        let node = Arc::new(Node {
            kind,
            mode: metadata.mode() & 0o7777,
            uid: 0,
            gid: 0,
            mtime_s: metadata.mtime(),
            xattrs: BTreeMap::new(),
        });
        if metadata.is_file() && metadata.nlink() > 1 {
            self.links.insert(identity, Arc::clone(&node));
        }
        Ok(Some(node))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::io::Read;
    use std::os::unix::fs::symlink;

    fn paths(context: &Context) -> Vec<String> {
        context.view.below(Path::new("")).map(|(path, _)| path.display().to_string()).collect()
    }

    #[test]
    fn ignored_files_are_left_out() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        for path in ["src/a.c", "src/a.o", "out/x/keep", "out/x/drop", "top.o"] {
            fs::create_dir_all(root.join(path).parent().unwrap()).unwrap();
            fs::write(root.join(path), path).unwrap();
        }
        fs::write(root.join(".dockerignore"), "**/*.o\nout\n!out/x/keep\n.dockerignore\n").unwrap();
        let context = Context::open(root, None).unwrap();
        assert_eq!(paths(&context), ["out", "out/x", "out/x/keep", "src", "src/a.c"]);
        let dockerfile = root.join("other.Dockerfile");
        fs::write(root.join("other.Dockerfile.dockerignore"), "*\n!src\n").unwrap();
        let context = Context::open(root, Some(&dockerfile)).unwrap();
        assert_eq!(paths(&context), ["src", "src/a.c", "src/a.o"]);
        fs::write(root.join(".dockerignore"), "[").unwrap();
        assert!(matches!(Context::open(root, None), Err(ContextError::Pattern { .. })));
    }

    #[test]
    fn links_lead_nowhere_outside() {
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("secret"), "secret").unwrap();
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        symlink(outside.path(), root.join("out")).unwrap();
        fs::create_dir(root.join("in")).unwrap();
        fs::write(root.join("in/f"), "f").unwrap();
        fs::hard_link(root.join("in/f"), root.join("same")).unwrap();
        let context = Context::open(root, None).unwrap();
        assert_eq!(paths(&context), ["in", "in/f", "out", "same"]);
        let resolved = context.view.resolve(Path::new("out/secret")).unwrap();
        assert!(context.view.get(&resolved).is_none());
        assert!(Arc::ptr_eq(
            context.view.get(Path::new("same")).unwrap(),
            context.view.get(Path::new("in/f")).unwrap()
        ));
        // A directory that becomes a link after the walk is not followed either.
        let node = Arc::clone(context.view.get(Path::new("in/f")).unwrap());
        let Kind::File { size, content } = &node.kind else { unreachable!() };
        let mut text = String::new();
        content.open(*size).unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "f");
        fs::rename(root.join("in"), root.join("moved")).unwrap();
        symlink("moved", root.join("in")).unwrap();
        assert!(content.open(*size).is_err());
    }
}
