//! What the tests of the EROFS writer share: a tar writer that can also write nonsense, and a mounted view to compare.
#![allow(dead_code, clippy::unwrap_used, unreachable_pub)]
use caisson_rootfs::erofs::{self, ConvertError, Options, Summary};
use rustix::fs::{Mode, OFlags, open};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap};
use std::ffi::CString;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Runs a program that must succeed.
pub fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {text}");
    text
}

/// Converts a tar stream into a new image in `directory`.
pub fn convert(tar: impl Read, directory: &Path) -> Result<(PathBuf, Summary), ConvertError> {
    merge(vec![tar], directory, false)
}

pub fn merge<R: Read>(mut tars: Vec<R>, directory: &Path, merging: bool) -> Result<(PathBuf, Summary), ConvertError> {
    let image = tempfile::Builder::new().suffix(".erofs").tempfile_in(directory).unwrap();
    let spool = tempfile::tempfile_in(directory).unwrap();
    let options = Options::default();
    let summary = if merging {
        erofs::merge(tars.into_iter().map(Ok), image.as_file(), &spool, &options, &mut |_| {})?
    } else {
        erofs::convert(tars.remove(0), image.as_file(), &spool, &options, &mut |_| {})?
    };
    let (_, path) = image.keep().unwrap();
    Ok((path, summary))
}

/// erofs-utils' judgement.
pub fn fsck(image: &Path) {
    run("fsck.erofs", &["--extract", image.to_str().unwrap()]);
}

/// A mounted image; unmounted when dropped, also by a failing test.
pub struct Mounted {
    directory: tempfile::TempDir,
}

impl Mounted {
    /// Mounts an image; None where the host's kernel has no EROFS.
    pub fn new(image: &Path) -> Option<Self> {
        if !fs::read_to_string("/proc/filesystems").unwrap().lines().any(|line| line.trim() == "erofs") {
            println!("skipped the mount: the kernel has no EROFS");
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        // Newer kernels mount a file as it is.
        if mount(image, directory.path(), "erofs", MountFlags::RDONLY, None).is_err() {
            run(
                "mount",
                &["-t", "erofs", "-o", "ro,loop", image.to_str().unwrap(), directory.path().to_str().unwrap()],
            );
        }
        Some(Self { directory })
    }

    /// A read-only overlay, the topmost layer first.
    pub fn overlay(layers: &[&Path]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let lower: Vec<_> = layers.iter().map(|layer| layer.to_str().unwrap()).collect();
        let options = CString::new(format!("lowerdir={}", lower.join(":"))).unwrap();
        mount("overlay", directory.path(), "overlay", MountFlags::RDONLY, Some(options.as_c_str())).unwrap();
        Self { directory }
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = unmount(self.directory.path(), UnmountFlags::DETACH);
    }
}

/// What is compared of an entry.
#[derive(Debug, PartialEq, Eq, Clone)]
pub struct Seen {
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: (i64, i64),
    pub links: u64,
    /// Of files and links.
    pub size: u64,
    pub device: u64,
    /// A link's target, or a file's hash.
    pub content: Vec<u8>,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The first path of the same inode.
    pub same_as: PathBuf,
}

/// Everything below a directory, and itself.
pub fn look(root: &Path) -> BTreeMap<PathBuf, Seen> {
    let mut seen = BTreeMap::new();
    let mut first = HashMap::new();
    let mut todo = vec![PathBuf::new()];
    while let Some(path) = todo.pop() {
        let full = root.join(&path);
        let metadata = fs::symlink_metadata(&full).unwrap();
        let kind = metadata.file_type();
        let content = if kind.is_symlink() {
            fs::read_link(&full).unwrap().as_os_str().as_bytes().to_vec()
        } else if kind.is_file() {
            let mut hasher = Sha256::new();
            std::io::copy(&mut File::open(&full).unwrap(), &mut hasher).unwrap();
            hasher.finalize().to_vec()
        } else {
            Vec::new()
        };
        let has_size = kind.is_file() || kind.is_symlink();
        let is_device = kind.is_block_device() || kind.is_char_device();
        seen.insert(
            path.clone(),
            Seen {
                mode: metadata.mode(),
                uid: metadata.uid(),
                gid: metadata.gid(),
                mtime: (metadata.mtime(), metadata.mtime_nsec()),
                links: metadata.nlink(),
                size: if has_size { metadata.size() } else { 0 },
                device: if is_device { metadata.rdev() } else { 0 },
                content,
                xattrs: xattrs(&full),
                same_as: PathBuf::new(),
            },
        );
        first.entry((metadata.dev(), metadata.ino())).or_insert_with(Vec::new).push(path.clone());
        if kind.is_dir() {
            let mut names: Vec<_> = fs::read_dir(&full).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            todo.extend(names.iter().map(|name| path.join(name)));
        }
    }
    for paths in first.values_mut() {
        paths.sort();
        for path in paths.iter() {
            seen.get_mut(path).unwrap().same_as = paths[0].clone();
        }
    }
    seen
}

fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut names = vec![0; 1 << 16];
    let len = rustix::fs::llistxattr(path, &mut names[..]).unwrap_or(0);
    let mut found = BTreeMap::new();
    for name in names[..len].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0; 1 << 16];
        let c_name = CString::new(name).unwrap();
        let len = rustix::fs::lgetxattr(path, c_name.as_c_str(), &mut value[..]).unwrap();
        value.truncate(len);
        found.insert(name.to_vec(), value);
    }
    found
}

/// Fails with the first entries that differ.
pub fn assert_same(expected: &BTreeMap<PathBuf, Seen>, actual: &BTreeMap<PathBuf, Seen>) {
    let mut differences = Vec::new();
    for path in expected.keys().chain(actual.keys().filter(|path| !expected.contains_key(*path))) {
        if expected.get(path) != actual.get(path) {
            differences.push(format!(
                "{path:?}:\n  expected {:?}\n  actual   {:?}",
                expected.get(path),
                actual.get(path)
            ));
        }
    }
    assert!(
        differences.is_empty(),
        "{} differences\n{}",
        differences.len(),
        differences[..differences.len().min(5)].join("\n")
    );
}

/// Whether a directory's file system keeps user and trusted attributes.
pub fn has_xattrs(directory: &Path) -> bool {
    let file = open(directory, OFlags::RDONLY, Mode::empty()).unwrap();
    [c"trusted.caisson", c"user.caisson"].iter().all(|name| {
        rustix::fs::fsetxattr(&file, *name, b"1", rustix::fs::XattrFlags::empty()).is_ok()
            && rustix::fs::fremovexattr(&file, *name).is_ok()
    })
}

/// A tar stream under construction.
#[derive(Default, Clone)]
pub struct Tar {
    pub bytes: Vec<u8>,
}

impl Tar {
    pub fn new() -> Self {
        Self::default()
    }

    /// A header with these fields; the checksum is right.
    pub fn header(&mut self, name: &[u8], kind: u8, mode: u32, size: u64, link: &[u8]) -> &mut [u8] {
        let start = self.bytes.len();
        self.bytes.resize(start + 512, 0);
        let header = &mut self.bytes[start..];
        let name = &name[..name.len().min(100)];
        header[..name.len()].copy_from_slice(name);
        header[100..108].copy_from_slice(format!("{mode:07o}\0").as_bytes());
        header[108..116].copy_from_slice(b"0001750\0");
        header[116..124].copy_from_slice(b"0000144\0");
        header[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
        header[136..148].copy_from_slice(b"14000000000\0");
        header[156] = kind;
        let link = &link[..link.len().min(100)];
        header[157..157 + link.len()].copy_from_slice(link);
        header[257..265].copy_from_slice(b"ustar\x0000");
        header[329..345].copy_from_slice(b"0000000\x000000000\0");
        checksum(header);
        header
    }

    pub fn data(&mut self, data: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(data);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self
    }

    pub fn pax(&mut self, records: &[(&str, &[u8])]) -> &mut Self {
        let mut data = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let mut len = rest + 1;
            while len != rest + len.to_string().len() {
                len = rest + len.to_string().len();
            }
            data.extend_from_slice(format!("{len} {key}=").as_bytes());
            data.extend_from_slice(value);
            data.push(b'\n');
        }
        self.header(b"pax", b'x', 0o644, data.len() as u64, b"");
        self.data(&data)
    }

    pub fn file(&mut self, name: &str, data: &[u8]) -> &mut Self {
        self.header(name.as_bytes(), b'0', 0o644, data.len() as u64, b"");
        self.data(data)
    }

    pub fn directory(&mut self, name: &str) -> &mut Self {
        self.header(name.as_bytes(), b'5', 0o755, 0, b"");
        self
    }

    pub fn symlink(&mut self, name: &str, target: &str) -> &mut Self {
        self.header(name.as_bytes(), b'2', 0o777, 0, target.as_bytes());
        self
    }

    pub fn hard_link(&mut self, name: &str, target: &str) -> &mut Self {
        self.header(name.as_bytes(), b'1', 0o644, 0, target.as_bytes());
        self
    }

    /// The end marker.
    pub fn end(&mut self) -> Vec<u8> {
        self.bytes.resize(self.bytes.len() + 1024, 0);
        std::mem::take(&mut self.bytes)
    }
}

/// Sets a header's checksum.
pub fn checksum(header: &mut [u8]) {
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}
