//! Changes as a tar archive.
use super::{OPAQUE, WHITEOUT, XATTR};
use crate::tree::{Changes, Kind, Node};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::OsStr;
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tar::{EntryType, Header};

/// The largest name in a ustar header.
const NAME_BYTES: usize = 100;
/// The largest number in a seven-digit octal field.
const MAX_OCTAL_7: u64 = 0o777_7777;
/// The largest number in an eleven-digit octal field.
const MAX_OCTAL_11: u64 = 0o777_7777_7777;
const BLOCK_BYTES: u64 = 512;

/// Why a layer cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot put {} into the layer", path.display())]
pub struct WriteError {
    /// The file.
    pub path: PathBuf,
    /// Why.
    #[source]
    pub source: io::Error,
}

/// Writes the layer that makes `changes`: whiteouts before files, everything in the order of its path. Times after
/// `latest_s` (seconds since the Epoch, `SOURCE_DATE_EPOCH`) become that.
pub fn write(changes: &Changes, latest_s: Option<i64>, to: &mut dyn Write) -> Result<(), WriteError> {
    let mut out = Out { to, latest_s };
    let mut names: BTreeSet<(PathBuf, Marker)> = BTreeSet::new();
    names.extend(changes.opaque.iter().map(|path| (path.clone(), Marker::Opaque)));
    // A file that takes another's place says so by itself; but what was below a directory must go first.
    names.extend(changes.removed.iter().map(|path| (path.clone(), Marker::Removed)));
    names.extend(changes.added.keys().map(|path| (path.clone(), Marker::Added)));
    let mut written: HashMap<*const Node, &Path> = HashMap::new();
    for (path, marker) in &names {
        let fail = |source| WriteError { path: path.clone(), source };
        match marker {
            Marker::Opaque => out.marker(&path.join(OPAQUE)).map_err(fail)?,
            Marker::Removed => {
                if changes.added.get(path).is_some_and(|node| !node.is_directory()) {
                    continue;
                }
                let mut name = OsStr::new(WHITEOUT).to_owned();
                name.push(path.file_name().unwrap_or_default());
                out.marker(&path.with_file_name(name)).map_err(fail)?;
            }
            Marker::Added => {
                let Some(node) = changes.added.get(path) else { continue };
                let first = match node.kind {
                    Kind::File { .. } => written.get(&Arc::as_ptr(node)).copied(),
                    _ => None,
                };
                out.node(path, node, first).map_err(fail)?;
                if first.is_none()
                    && let Some((path, _)) = changes.added.get_key_value(path)
                {
                    written.insert(Arc::as_ptr(node), path);
                }
            }
        }
    }
    out.end().map_err(|source| WriteError { path: PathBuf::new(), source })
}

/// What is written for a path; the order is that of the archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Marker {
    Removed,
    Added,
    Opaque,
}

struct Out<'a> {
    to: &'a mut dyn Write,
    latest_s: Option<i64>,
}

impl Out<'_> {
    fn marker(&mut self, path: &Path) -> io::Result<()> {
        let mut header = Header::new_ustar();
        header.set_entry_type(EntryType::Regular);
        header.set_mode(0o600);
        self.header(header, &mut BTreeMap::new(), path, None, 0)
    }

    fn node(&mut self, path: &Path, node: &Node, first: Option<&Path>) -> io::Result<()> {
        let mut pax: BTreeMap<String, Vec<u8>> = BTreeMap::new();
        let mut header = Header::new_ustar();
        header.set_mode(node.mode & 0o7777);
        number(node.uid.into(), MAX_OCTAL_7, "uid", &mut pax, |value| header.set_uid(value));
        number(node.gid.into(), MAX_OCTAL_7, "gid", &mut pax, |value| header.set_gid(value));
        let mtime = self.latest_s.map_or(node.mtime_s, |latest| node.mtime_s.min(latest));
        match u64::try_from(mtime) {
            Ok(mtime) => number(mtime, MAX_OCTAL_11, "mtime", &mut pax, |value| header.set_mtime(value)),
            Err(_) => {
                pax.insert("mtime".to_owned(), mtime.to_string().into_bytes());
            }
        }
        if let Some(first) = first {
            header.set_entry_type(EntryType::Link);
            return self.header(header, &mut pax, path, Some(first), 0);
        }
        for (name, value) in &node.xattrs {
            pax.insert(format!("{XATTR}{name}"), value.clone());
        }
        match &node.kind {
            Kind::File { size, content } => {
                header.set_entry_type(EntryType::Regular);
                self.header(header, &mut pax, path, None, *size)?;
                let mut reader = content.open(*size)?.take(*size);
                let copied = io::copy(&mut reader, self.to)?;
                if copied != *size {
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it is shorter than it was"));
                }
                self.pad(*size)
            }
            Kind::Directory => {
                header.set_entry_type(EntryType::Directory);
                let mut name = path.as_os_str().to_owned();
                name.push("/");
                self.header(header, &mut pax, Path::new(&name), None, 0)
            }
            Kind::Symlink(target) => {
                header.set_entry_type(EntryType::Symlink);
                self.header(header, &mut pax, path, Some(target), 0)
            }
            Kind::Char { major, minor } => {
                header.set_entry_type(EntryType::Char);
                device(&mut header, *major, *minor)?;
                self.header(header, &mut pax, path, None, 0)
            }
            Kind::Block { major, minor } => {
                header.set_entry_type(EntryType::Block);
                device(&mut header, *major, *minor)?;
                self.header(header, &mut pax, path, None, 0)
            }
            Kind::Fifo => {
                header.set_entry_type(EntryType::Fifo);
                self.header(header, &mut pax, path, None, 0)
            }
        }
    }

    /// Writes a header, behind a PAX header if something does not fit.
    fn header(
        &mut self,
        mut header: Header,
        pax: &mut BTreeMap<String, Vec<u8>>,
        path: &Path,
        link: Option<&Path>,
        size: u64,
    ) -> io::Result<()> {
        number(size, MAX_OCTAL_11, "size", pax, |value| header.set_size(value));
        let name = path.as_os_str().as_bytes();
        if let Some(ustar) = header.as_ustar_mut() {
            fill(&mut ustar.name, name, "path", pax);
            if let Some(link) = link {
                fill(&mut ustar.linkname, link.as_os_str().as_bytes(), "linkpath", pax);
            }
        }
        if !pax.is_empty() {
            let mut records = Vec::new();
            for (key, value) in &*pax {
                record(&mut records, key, value);
            }
            let mut extension = Header::new_ustar();
            extension.set_entry_type(EntryType::XHeader);
            extension.set_mode(0o644);
            extension.set_size(records.len() as u64);
            if let Some(ustar) = extension.as_ustar_mut() {
                fill(&mut ustar.name, b"PaxHeaders.0", "", &mut BTreeMap::new());
            }
            extension.set_cksum();
            self.to.write_all(extension.as_bytes())?;
            self.to.write_all(&records)?;
            self.pad(records.len() as u64)?;
        }
        header.set_cksum();
        self.to.write_all(header.as_bytes())
    }

    fn pad(&mut self, size: u64) -> io::Result<()> {
        let padding = (BLOCK_BYTES - size % BLOCK_BYTES) % BLOCK_BYTES;
        io::copy(&mut io::repeat(0).take(padding), self.to)?;
        Ok(())
    }

    fn end(&mut self) -> io::Result<()> {
        self.to.write_all(&[0; 2 * BLOCK_BYTES as usize])
    }
}

fn number(value: u64, largest: u64, key: &str, pax: &mut BTreeMap<String, Vec<u8>>, set: impl FnOnce(u64)) {
    if value <= largest {
        set(value);
    } else {
        pax.insert(key.to_owned(), value.to_string().into_bytes());
        set(0);
    }
}

fn device(header: &mut Header, major: u32, minor: u32) -> io::Result<()> {
    header.set_device_major(major)?;
    header.set_device_minor(minor)
}

/// Puts a name into its field, or as much of it as fits and the whole into PAX.
fn fill(field: &mut [u8; NAME_BYTES], name: &[u8], key: &str, pax: &mut BTreeMap<String, Vec<u8>>) {
    field.fill(0);
    for (to, from) in field.iter_mut().zip(name) {
        *to = *from;
    }
    if name.len() > NAME_BYTES || (!key.is_empty() && !name.is_ascii()) {
        pax.insert(key.to_owned(), name.to_owned());
    }
}

/// A PAX record: `length key=value\n`, the length counting itself.
fn record(out: &mut Vec<u8>, key: &str, value: &[u8]) {
    let rest = 3 + key.len() + value.len();
    let mut length = rest;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    out.extend_from_slice(length.to_string().as_bytes());
    out.push(b' ');
    out.extend_from_slice(key.as_bytes());
    out.push(b'=');
    out.extend_from_slice(value);
    out.push(b'\n');
}
