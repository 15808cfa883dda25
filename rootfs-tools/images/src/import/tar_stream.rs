//! The members of a tar archive, front to back (POSIX.1-2024 `pax`, and GNU's long names).
//!
//! The `tar` crate reads names of any length into memory, and ends quietly where a stream is cut short; archives from
//! outside need neither. Headers are its.

use std::io::{self, Read};

use tar::{EntryType, Header};

use crate::limits::MAX_ARCHIVE_NAME_BYTES;

const BLOCK_BYTES: u64 = 512;
/// Bytes in a pax extended header: names of the longest length, and some attributes of no interest here.
const MAX_PAX_BYTES: u64 = 1 << 20;

/// Where and why a tar stream is refused.
#[derive(Debug, thiserror::Error)]
#[error("at byte {offset}: {reason}")]
pub struct TarError {
    /// Bytes from the (decompressed) beginning.
    pub offset: u64,
    /// What is wrong.
    pub reason: String,
}

/// A member, without its content.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Member {
    /// Its path, relative, without `.` and `..`.
    pub(super) name: String,
    pub(super) kind: Kind,
    pub(super) size: u64,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    /// A link, to a path in the archive.
    Link(String),
    Other,
}

/// Reads a tar stream. As [`Read`], it is the content of the current member, whole or an error.
pub(super) struct TarStream<R> {
    source: R,
    offset: u64,
    remaining: u64,
    padding: u64,
}

/// What precedes a member's header and changes it.
#[derive(Default)]
struct Extension {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
}

impl<R: Read> TarStream<R> {
    pub(super) fn new(source: R) -> Self {
        Self { source, offset: 0, remaining: 0, padding: 0 }
    }

    pub(super) fn refuse(&self, reason: impl Into<String>) -> TarError {
        TarError { offset: self.offset, reason: reason.into() }
    }

    pub(super) fn truncated(&self, error: &io::Error) -> TarError {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => self.refuse("the archive is truncated: copy it again"),
            _ => self.refuse(format!("it can't be read: {error}")),
        }
    }

    /// The next member; `None` at the end. What was not read of the current one is skipped.
    pub(super) fn next_member(&mut self) -> Result<Option<Member>, TarError> {
        let mut extension = Extension::default();
        loop {
            self.skip()?;
            let Some(header) = self.header()? else {
                return Ok(None);
            };
            let size = header.entry_size().map_err(|error| self.refuse(format!("the size is malformed: {error}")))?;
            let kind = header.entry_type();
            self.enter(size)?;
            match kind {
                EntryType::GNULongName => extension.path = Some(self.name(size)?),
                EntryType::GNULongLink => extension.link = Some(self.name(size)?),
                EntryType::XHeader => self.pax(size, &mut extension)?,
                EntryType::XGlobalHeader => (),
                _ => return self.member(&header, size, extension).map(Some),
            }
        }
    }

    fn member(&mut self, header: &Header, size: u64, extension: Extension) -> Result<Member, TarError> {
        let size = match extension.size {
            Some(size) => {
                self.enter(size)?;
                size
            }
            None => size,
        };
        let name = match extension.path {
            Some(path) => path,
            None => header.path_bytes().into_owned(),
        };
        let name = self.within("", &name)?;
        let kind = match header.entry_type() {
            EntryType::Regular | EntryType::Continuous => Kind::File,
            // Old tars mark directories by a slash alone.
            kind @ (EntryType::Symlink | EntryType::Link) => {
                let target = match extension.link {
                    Some(link) => link,
                    None => header.link_name_bytes().map(|name| name.into_owned()).unwrap_or_default(),
                };
                let base = match (kind, name.rsplit_once('/')) {
                    (EntryType::Symlink, Some((parent, _))) => parent,
                    _ => "",
                };
                Kind::Link(self.within(base, &target)?)
            }
            EntryType::GNUSparse => {
                return Err(self.refuse(format!("{name} is a sparse file: write it plainly")));
            }
            _ => Kind::Other,
        };
        Ok(Member { name, kind, size })
    }

    /// A path, from `base`, that stays inside the archive.
    fn within(&self, base: &str, path: &[u8]) -> Result<String, TarError> {
        let shown = || String::from_utf8_lossy(&path[..path.len().min(200)]).into_owned();
        let text =
            std::str::from_utf8(path).map_err(|_| self.refuse(format!("the name {:?} is not UTF-8", shown())))?;
        let escapes =
            || self.refuse(format!("the name {:?} leads out of the archive: it is not to be trusted", shown()));
        if text.starts_with('/') || text.contains('\0') {
            return Err(escapes());
        }
        let mut parts: Vec<&str> = base.split('/').filter(|part| !part.is_empty()).collect();
        let inside = parts.len();
        for part in text.split('/') {
            match part {
                "" | "." => (),
                // Links in a docker-archive lead over their parent; members' own names have no reason to.
                ".." if inside == 0 => return Err(escapes()),
                ".." => {
                    parts.pop().ok_or_else(escapes)?;
                }
                part => parts.push(part),
            }
        }
        Ok(parts.join("/"))
    }

    fn enter(&mut self, size: u64) -> Result<(), TarError> {
        self.remaining = size;
        self.padding = (BLOCK_BYTES - size % BLOCK_BYTES) % BLOCK_BYTES;
        match self.offset.checked_add(size).and_then(|end| end.checked_add(BLOCK_BYTES)) {
            Some(_) => Ok(()),
            None => Err(self.refuse(format!("the size {size} is absurd"))),
        }
    }

    fn skip(&mut self) -> Result<(), TarError> {
        let mut chunk = [0; 8192];
        let mut left = self.remaining;
        self.remaining = 0;
        let mut padding = std::mem::take(&mut self.padding);
        while left != 0 || padding != 0 {
            let in_padding = left == 0;
            let want = if in_padding { padding } else { left }.min(chunk.len() as u64);
            // `want` fits: it is no more than the chunk's length.
            let count = match self.source.read(&mut chunk[..want as usize]) {
                Ok(0) if in_padding => return Ok(()), // The last member's padding is missing: nothing is lost.
                Ok(0) => return Err(self.truncated(&io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => count as u64,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(self.truncated(&error)),
            };
            if in_padding {
                padding -= count;
            } else {
                left -= count;
            }
            self.offset += count;
        }
        Ok(())
    }

    /// The next header; `None` at the end blocks, and where the stream ends between two members.
    fn header(&mut self) -> Result<Option<Header>, TarError> {
        let mut block = [0; BLOCK_BYTES as usize];
        let mut filled = 0;
        while filled < block.len() {
            match self.source.read(&mut block[filled..]) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(self.truncated(&io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                Err(error) => return Err(self.truncated(&error)),
            }
        }
        if block.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let header = Header::from_byte_slice(&block).clone();
        let sum = block.iter().enumerate().fold(0, |sum: u32, (at, byte)| {
            sum + if (148..156).contains(&at) { u32::from(b' ') } else { u32::from(*byte) }
        });
        if header.cksum().ok() != Some(sum) {
            return Err(self.refuse(if self.offset == 0 {
                "there is no tar header: is this an archive?"
            } else {
                "the header's checksum is wrong: the archive is damaged"
            }));
        }
        self.offset += BLOCK_BYTES;
        Ok(Some(header))
    }

    fn extension(&mut self, size: u64, limit: u64) -> Result<Vec<u8>, TarError> {
        if size > limit {
            return Err(self.refuse(format!(
                "a name or extended header has {size} bytes, and {limit} are the most that is accepted"
            )));
        }
        let mut bytes = Vec::new();
        self.read_to_end(&mut bytes).map_err(|error| self.truncated(&error))?;
        Ok(bytes)
    }

    fn name(&mut self, size: u64) -> Result<Vec<u8>, TarError> {
        let mut name = self.extension(size, MAX_ARCHIVE_NAME_BYTES)?;
        while name.last() == Some(&0) {
            name.pop();
        }
        Ok(name)
    }

    fn pax(&mut self, size: u64, extension: &mut Extension) -> Result<(), TarError> {
        let bytes = self.extension(size, MAX_PAX_BYTES)?;
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let malformed = || self.refuse("a pax extended header is malformed");
            let space = rest.iter().position(|byte| *byte == b' ').ok_or_else(malformed)?;
            let length = std::str::from_utf8(&rest[..space]).ok().and_then(|digits| digits.parse::<usize>().ok());
            let length = length.filter(|length| *length > space + 1 && *length <= rest.len()).ok_or_else(malformed)?;
            let record = rest[space + 1..length].strip_suffix(b"\n").ok_or_else(malformed)?;
            let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(malformed)?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            if value.len() as u64 > MAX_ARCHIVE_NAME_BYTES && matches!(key, b"path" | b"linkpath") {
                return Err(self.refuse(format!("a name is longer than {MAX_ARCHIVE_NAME_BYTES} bytes")));
            }
            match key {
                b"path" => extension.path = Some(value.to_vec()),
                b"linkpath" => extension.link = Some(value.to_vec()),
                b"size" => {
                    let size = std::str::from_utf8(value).ok().and_then(|digits| digits.parse().ok());
                    extension.size = Some(size.ok_or_else(malformed)?);
                }
                _ => (),
            }
            rest = &rest[length..];
        }
        Ok(())
    }
}

impl<R: Read> Read for TarStream<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = usize::try_from(self.remaining).unwrap_or(usize::MAX).min(buffer.len());
        if want == 0 {
            return Ok(0);
        }
        match self.source.read(&mut buffer[..want])? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            count => {
                self.remaining -= count as u64;
                self.offset += count as u64;
                Ok(count)
            }
        }
    }
}

#[cfg(test)]
#[path = "tar_stream_tests.rs"]
mod tests;
