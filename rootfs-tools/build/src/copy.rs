//! COPY and ADD, made on the host: which files are meant, where they go, and the changes that this makes. Destinations,
//! links and owners are resolved in the view of the layers below.
use crate::layer::{self, LayerError};
use crate::pattern::{Ignore, Pattern, PatternError};
use crate::tree::{Changes, Content, Kind, LinkLoop, Node, View, normalized};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::io::{self, Read, Seek};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Why COPY or ADD fails.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// Nothing matches a source.
    #[error("{source_path} is not in {tree}: check its spelling, and .dockerignore")]
    Missing {
        /// The source as written.
        source_path: String,
        /// Where it was looked for.
        tree: String,
    },
    /// A wrong pattern.
    #[error(transparent)]
    Pattern(#[from] PatternError),
    /// A link loop.
    #[error(transparent)]
    Links(#[from] LinkLoop),
    /// Several sources for one file.
    #[error("several files cannot become {destination}: end the destination with /")]
    NeedsDirectory {
        /// The destination as written.
        destination: String,
    },
    /// A file is where a directory is needed, or the other way round.
    #[error("cannot copy {source_path} to /{}: {problem}", destination.display())]
    Kind {
        /// What.
        source_path: String,
        /// Where to.
        destination: PathBuf,
        /// What is wrong.
        problem: &'static str,
    },
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// An archive cannot be unpacked.
    #[error("cannot unpack {}", path.display())]
    Archive {
        /// The archive.
        path: PathBuf,
        /// Why.
        #[source]
        source: LayerError,
    },
}

/// A file or directory that a source names.
#[derive(Debug, Clone)]
pub struct Selected {
    /// The name as written or matched, relative to the source's root: gives the name in the destination.
    pub named: PathBuf,
    /// Where it really is: links followed.
    pub path: PathBuf,
}

/// Finds what a source names in a tree; `tree` is what messages call it.
pub fn select(view: &View, tree: &str, source: &str) -> Result<Vec<Selected>, CopyError> {
    let missing = || CopyError::Missing { source_path: source.to_owned(), tree: tree.to_owned() };
    let named = normalized(Path::new(source));
    if !Pattern::is_glob(source) {
        let path = view.resolve(&named)?;
        if view.get(&path).is_none() && !path.as_os_str().is_empty() {
            return Err(missing());
        }
        return Ok(vec![Selected { named, path }]);
    }
    let components: Vec<Pattern> = named
        .components()
        .map(|component| Pattern::glob(&component.as_os_str().to_string_lossy()))
        .collect::<Result<_, _>>()?;
    let mut found = vec![PathBuf::new()];
    for pattern in &components {
        let mut next = Vec::new();
        for parent in &found {
            let real = view.resolve(parent)?;
            for name in view.names(&real) {
                if pattern.matches(Path::new(name)) {
                    next.push(parent.join(name));
                }
            }
        }
        found = next;
    }
    let mut selected = Vec::new();
    for named in found {
        let path = view.resolve(&named)?;
        if view.get(&path).is_some() {
            selected.push(Selected { named, path });
        }
    }
    if selected.is_empty() {
        return Err(missing());
    }
    Ok(selected)
}

/// Feeds everything about the selected files that the result depends on into a hash: names, types, modes and contents.
/// Times do not count, as with every builder: a fresh checkout is the same source.
pub fn hash(view: &View, selected: &[Selected], exclude: &Ignore, hasher: &mut Sha256) -> Result<(), CopyError> {
    let mut text = |bytes: &[u8]| {
        hasher.update((bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    for one in selected {
        text(one.named.as_os_str().as_bytes());
        for (path, node) in view.below(&one.path) {
            let relative = path.strip_prefix(&one.path).unwrap_or(path);
            if exclude.ignores(relative) {
                continue;
            }
            text(relative.as_os_str().as_bytes());
            let number = |value: u32| value.to_le_bytes();
            text(&[number(node.mode), number(node.uid), number(node.gid)].concat());
            match &node.kind {
                Kind::Directory => text(b"d"),
                Kind::Symlink(target) => text(&[b"l", target.as_os_str().as_bytes()].concat()),
                Kind::Fifo => text(b"p"),
                Kind::Char { major, minor } => {
                    text(&[b"c".to_vec(), number(*major).into(), number(*minor).into()].concat())
                }
                Kind::Block { major, minor } => {
                    text(&[b"b".to_vec(), number(*major).into(), number(*minor).into()].concat())
                }
                Kind::File { size, content } => {
                    let read = |source| CopyError::Read { path: path.to_owned(), source };
                    let mut digest = Sha256::new();
                    io::copy(&mut content.open(*size).map_err(read)?, &mut digest).map_err(read)?;
                    text(&[b"f".as_slice(), digest.finalize().as_slice()].concat());
                }
            }
        }
    }
    Ok(())
}

/// Where files come from.
#[derive(Debug)]
pub enum Source<'a> {
    /// A tree, and what was selected in it.
    Tree(&'a View, Vec<Selected>),
    /// A file that the Dockerfile holds.
    File(String, Vec<u8>),
}

/// A COPY or ADD whose words are expanded.
#[derive(Debug)]
pub struct Request<'a> {
    /// What.
    pub sources: Vec<Source<'a>>,
    /// Where to, as written.
    pub destination: &'a str,
    /// What a relative destination is relative to.
    pub workdir: &'a Path,
    /// `--chown`, resolved.
    pub owner: Option<(u32, u32)>,
    /// `--chmod`.
    pub mode: Option<u32>,
    /// ADD: unpack archives.
    pub unpack: bool,
    /// `--link`: do not follow links of the destination.
    pub link: bool,
    /// `--parents`: keep the sources' directories.
    pub parents: bool,
    /// `--exclude`.
    pub exclude: &'a Ignore,
    /// The time that new directories get, seconds since the Epoch.
    pub now_s: i64,
    /// Where archives are unpacked to.
    pub scratch: &'a Path,
}

/// The changes that a request makes to what is below.
pub fn copy(base: &View, request: &Request<'_>) -> Result<Changes, CopyError> {
    let mut target = Target {
        now: base.clone(),
        changes: Changes::default(),
        owner: request.owner,
        mode: request.mode,
        link: request.link,
        now_s: request.now_s,
        made: HashMap::new(),
    };
    let written = request.destination;
    let full = request.workdir.join(written);
    let destination = target.resolve(&full)?;
    let wants_directory = written.is_empty()
        || written.ends_with('/')
        || written.ends_with("/.")
        || written == "."
        || written.ends_with("..");
    let count: usize = request
        .sources
        .iter()
        .map(|source| match source {
            Source::Tree(_, selected) => selected.len(),
            Source::File(..) => 1,
        })
        .sum();
    let into = wants_directory || request.parents || target.now.is_directory(&destination);
    if count > 1 && !into {
        return Err(CopyError::NeedsDirectory { destination: written.to_owned() });
    }
    if wants_directory {
        target.directories(&destination, written)?;
    }
    for source in &request.sources {
        match source {
            Source::File(name, bytes) => {
                let at = if into { destination.join(name) } else { destination.clone() };
                let content = Content::Bytes(bytes.as_slice().into());
                let kind = Kind::File { size: bytes.len() as u64, content };
                let node = Arc::new(Node { kind, mtime_s: request.now_s, ..Node::directory(0o644) });
                target.parents(&at, name)?;
                target.put(&at, &node, name)?;
            }
            Source::Tree(view, selected) => {
                for one in selected {
                    target.one(request, view, one, &destination, into)?;
                }
            }
        }
    }
    Ok(target.changes)
}

/// The changes that WORKDIR makes: the directory and its parents, if they are missing.
pub fn make_directory(base: &View, path: &Path, owner: (u32, u32), now_s: i64) -> Result<Changes, CopyError> {
    let resolved = base.resolve(path)?;
    if base.is_directory(&resolved) {
        return Ok(Changes::default());
    }
    let mut target = Target {
        now: base.clone(),
        changes: Changes::default(),
        owner: Some(owner),
        mode: None,
        link: false,
        now_s,
        made: HashMap::new(),
    };
    target.directories(&resolved, &path.to_string_lossy())?;
    // Parents belong to root; only the directory itself is the user's.
    let parents: Vec<PathBuf> = resolved.ancestors().skip(1).map(Path::to_owned).collect();
    for parent in parents {
        if base.get(&parent).is_none()
            && let Some(node) = target.changes.added.get_mut(&parent)
        {
            *node = Arc::new(Node { uid: 0, gid: 0, ..node.as_ref().clone() });
        }
    }
    Ok(target.changes)
}

struct Target {
    /// What is below, with the changes made so far.
    now: View,
    changes: Changes,
    owner: Option<(u32, u32)>,
    mode: Option<u32>,
    link: bool,
    now_s: i64,
    /// What became of source nodes, so that hard links stay together. The source is kept: its address is the key.
    made: HashMap<*const Node, (Arc<Node>, Arc<Node>)>,
}

impl Target {
    fn resolve(&self, path: &Path) -> Result<PathBuf, CopyError> {
        if self.link { Ok(normalized(path)) } else { Ok(self.now.resolve(path)?) }
    }

    fn one(
        &mut self,
        request: &Request<'_>,
        view: &View,
        one: &Selected,
        destination: &Path,
        into: bool,
    ) -> Result<(), CopyError> {
        let label = one.named.display().to_string();
        let is_directory = view.is_directory(&one.path);
        if request.unpack
            && !is_directory
            && let Some(archive) = self.archive(view, one, request.scratch)?
        {
            self.directories(destination, &label)?;
            return self.tree(&archive, Path::new(""), Path::new(""), destination, &Ignore::default(), &label, true);
        }
        let at = if request.parents {
            destination.join(&one.named)
        } else if into && !is_directory {
            destination.join(one.named.file_name().unwrap_or(OsStr::new("")))
        } else {
            destination.to_owned()
        };
        if is_directory {
            self.directories(&at, &label)?;
            return self.tree(view, &one.path, &one.path, &at, request.exclude, &label, false);
        }
        let name: OsString = one.named.file_name().unwrap_or_default().to_owned();
        if request.exclude.ignores(Path::new(&name)) {
            return Ok(());
        }
        if let Some(node) = view.get(&one.path) {
            self.parents(&at, &label)?;
            let node = self.transform(node, false);
            self.put(&at, &node, &label)?;
        }
        Ok(())
    }

    /// The source as an unpacked archive, if it is one.
    fn archive(&self, view: &View, one: &Selected, scratch: &Path) -> Result<Option<View>, CopyError> {
        let Some(Kind::File { size, content }) = view.get(&one.path).map(|node| &node.kind) else { return Ok(None) };
        let read = |source| CopyError::Read { path: one.named.clone(), source };
        let mut head = Vec::new();
        content.open(*size).and_then(|reader| reader.take(512).read_to_end(&mut head)).map_err(read)?;
        if layer::archive_kind(&head).is_none() {
            return Ok(None);
        }
        let mut file = tempfile::tempfile_in(scratch).map_err(read)?;
        content.open(*size).and_then(|mut reader| io::copy(&mut reader, &mut file)).map_err(read)?;
        file.rewind().map_err(read)?;
        let fail = |source| CopyError::Archive { path: one.named.clone(), source };
        let mut tar = layer::uncompressed(file, scratch).map_err(fail)?;
        // A compressed file that is no archive is copied as it is.
        let mut head = Vec::new();
        (&mut tar).take(512).read_to_end(&mut head).map_err(read)?;
        tar.rewind().map_err(read)?;
        if layer::archive_kind(&head) != Some(layer::Archive::Tar) {
            return Ok(None);
        }
        let mut unpacked = View::default();
        unpacked.apply(&layer::read_archive(tar).map_err(fail)?);
        Ok(Some(unpacked))
    }

    /// Copies what is in a directory into another, which exists. `root` is what exclusions are relative to.
    #[allow(clippy::too_many_arguments)]
    fn tree(
        &mut self,
        view: &View,
        root: &Path,
        from: &Path,
        to: &Path,
        exclude: &Ignore,
        label: &str,
        archive: bool,
    ) -> Result<(), CopyError> {
        // Depth first with a stack of our own: a tree may be deeper than ours.
        let mut stack = vec![(from.to_owned(), to.to_owned())];
        while let Some((from, to)) = stack.pop() {
            let mut deeper = Vec::new();
            for name in view.names(&from) {
                let source = from.join(name);
                let relative = source.strip_prefix(root).unwrap_or(&source);
                let ignored = exclude.ignores(relative);
                if ignored && !exclude.has_exceptions() {
                    continue;
                }
                let at = to.join(name);
                let node = view.get(&source);
                if node.is_none_or(|node| node.is_directory()) {
                    let at = if ignored { at } else { self.directory(&at, node, label, archive)? };
                    deeper.push((source, at));
                } else if let (Some(node), false) = (node, ignored) {
                    self.parents(&at, label)?;
                    let node = self.transform(node, archive);
                    self.put(&at, &node, label)?;
                }
            }
            stack.extend(deeper.into_iter().rev());
        }
        Ok(())
    }

    /// Makes or keeps a directory; gives where it really is, links followed.
    fn directory(
        &mut self,
        at: &Path,
        node: Option<&Arc<Node>>,
        label: &str,
        archive: bool,
    ) -> Result<PathBuf, CopyError> {
        let real = self.resolve(at)?;
        if self.now.is_directory(&real) && !archive {
            self.directories(&real, label)?;
            return Ok(real);
        }
        self.parents(&real, label)?;
        let node = match node {
            Some(node) => self.transform(node, archive),
            None => Arc::new(self.plain_directory()),
        };
        self.put(&real, &node, label)?;
        Ok(real)
    }

    fn plain_directory(&self) -> Node {
        let (uid, gid) = self.owner.unwrap_or((0, 0));
        Node { uid, gid, mtime_s: self.now_s, ..Node::directory(0o755) }
    }

    fn parents(&mut self, path: &Path, label: &str) -> Result<(), CopyError> {
        match path.parent() {
            Some(parent) => self.directories(parent, label),
            None => Ok(()),
        }
    }

    /// Makes a directory and those above it, as far as they are missing. Those that exist become part of the layer, with
    /// the attributes that they have: an upper layer's directory hides a lower one's attributes.
    fn directories(&mut self, path: &Path, label: &str) -> Result<(), CopyError> {
        let mut all: Vec<&Path> = path.ancestors().filter(|part| !part.as_os_str().is_empty()).collect();
        all.reverse();
        for part in all {
            if self.changes.added.get(part).is_some_and(|node| node.is_directory()) {
                continue;
            }
            let node = match self.now.get(part) {
                Some(node) if node.is_directory() => Arc::clone(node),
                Some(node) if self.link && matches!(node.kind, Kind::Symlink(_)) => Arc::new(self.plain_directory()),
                Some(_) => {
                    return Err(CopyError::Kind {
                        source_path: label.to_owned(),
                        destination: part.to_owned(),
                        problem: "there is a file, and a directory is needed",
                    });
                }
                None => Arc::new(self.plain_directory()),
            };
            self.now.insert(part, &node);
            self.changes.added.insert(part.to_owned(), node);
        }
        Ok(())
    }

    fn put(&mut self, path: &Path, node: &Arc<Node>, label: &str) -> Result<(), CopyError> {
        let is = self.now.is_directory(path);
        let problem = match (is, node.is_directory()) {
            (true, false) => Some("there is a directory, and it would become a file"),
            (false, true) if self.now.get(path).is_some() => Some("there is a file, and it would become a directory"),
            _ => None,
        };
        if let Some(problem) = problem {
            return Err(CopyError::Kind { source_path: label.to_owned(), destination: path.to_owned(), problem });
        }
        self.now.insert(path, node);
        self.changes.added.insert(path.to_owned(), Arc::clone(node));
        Ok(())
    }

    /// The node as it will be in the image.
    fn transform(&mut self, node: &Arc<Node>, archive: bool) -> Arc<Node> {
        let key = Arc::as_ptr(node);
        if let Some((_, made)) = self.made.get(&key) {
            return Arc::clone(made);
        }
        let (uid, gid) = self.owner.unwrap_or((node.uid, node.gid));
        let mode = match self.mode {
            Some(mode) if !archive && !matches!(node.kind, Kind::Symlink(_)) => mode,
            _ => node.mode,
        };
        let made = Arc::new(Node { uid, gid, mode, ..node.as_ref().clone() });
        self.made.insert(key, (Arc::clone(node), Arc::clone(&made)));
        made
    }
}

#[cfg(test)]
mod tests;
