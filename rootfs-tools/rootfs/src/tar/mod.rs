//! A reader of tar streams as image layers hold them: POSIX ustar and pax, GNU long names and GNU sparse files, old V7.
//!
//! It reads a stream once, from front to back, and keeps one entry's header at a time. Every length that the stream
//! names is bounded before anything is allocated for it. Field meanings follow POSIX.1-2017 (pax) and GNU tar's manual.
mod header;
mod pax;
mod sparse;

use header::{BLOCK_BYTES, Header};
use pax::PaxRecords;
use std::io::{self, Read};

/// The longest name or link target that a header may carry: PATH_MAX of Linux.
pub const MAX_NAME_BYTES: usize = 4096;
/// The longest extended header (pax records, GNU long name); Go's reader, which wrote most of the layers in use, has the same limit.
pub const MAX_EXTENDED_HEADER_BYTES: u64 = 1 << 20;
/// The most extended headers before one entry; real streams have at most three.
const MAX_EXTENDED_HEADERS: u32 = 16;
/// The most data segments of a sparse file.
pub const MAX_SPARSE_SEGMENTS: usize = 1 << 17;
/// The largest file, in bytes; ext4's limit.
pub const MAX_FILE_BYTES: u64 = 16 << 40;
/// Linux's limit for the value of an extended attribute.
pub const MAX_XATTR_VALUE_BYTES: usize = 65_536;
/// Linux's limit for the name of an extended attribute.
pub const MAX_XATTR_NAME_BYTES: usize = 255;

/// Why a stream cannot be read. Names are shown with escapes.
#[derive(Debug, thiserror::Error)]
pub enum TarError {
    /// The source failed.
    #[error("cannot read the layer's tar stream at byte {offset}")]
    Read {
        /// Where in the stream.
        offset: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The stream ends within an entry.
    #[error("the layer's tar stream ends at byte {offset}, within {what}: it is truncated")]
    Truncated {
        /// Where in the stream.
        offset: u64,
        /// The entry, or the part of the format.
        what: String,
    },
    /// These bytes are not a header.
    #[error("the layer's tar stream has no valid header at byte {offset}: {problem}")]
    Header {
        /// Where the header starts.
        offset: u64,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The stream goes on and on.
    #[error("the layer's tar stream is longer than {limit_bytes} bytes; the last header was that of {what:?}")]
    TooLong {
        /// The limit.
        limit_bytes: u64,
        /// The entry, or the part of the format.
        what: String,
    },
    /// The entry cannot be used.
    #[error("the tar entry {name:?} (header at byte {offset}) cannot be used: {problem}")]
    Entry {
        /// The entry's name.
        name: String,
        /// Where its header starts.
        offset: u64,
        /// What is wrong with it.
        problem: &'static str,
    },
}

/// What an entry stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryKind {
    /// A regular file; its data follows.
    File,
    /// Another name for an earlier entry.
    HardLink(Vec<u8>),
    /// A symbolic link with its target.
    Symlink(Vec<u8>),
    /// A character device by major and minor number.
    CharDevice(u32, u32),
    /// A block device by major and minor number.
    BlockDevice(u32, u32),
    /// A directory.
    Directory,
    /// A named pipe.
    Fifo,
}

/// A part of a sparse file that has data in the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Where it is in the file, in bytes.
    pub offset: u64,
    /// How long it is, in bytes.
    pub len_bytes: u64,
}

/// An entry's header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Where the header starts in the stream, in bytes.
    pub offset: u64,
    /// Its name as it is in the stream.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: EntryKind,
    /// Permission bits, with setuid, setgid and sticky.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time: seconds since the Epoch, and nanoseconds from 0 to 999,999,999.
    pub mtime: (i64, u32),
    /// A regular file's size, holes included, in bytes.
    pub size_bytes: u64,
    /// Where the stream's data belongs when the file is sparse: ascending, without overlap, within the size.
    pub segments: Option<Vec<Segment>>,
    /// Extended attributes by full name. A name may come twice; the last one counts.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Entry {
    /// The name for messages.
    #[must_use]
    pub fn display_name(&self) -> String {
        String::from_utf8_lossy(&self.path).into_owned()
    }

    fn error(&self, problem: &'static str) -> TarError {
        TarError::Entry { name: self.display_name(), offset: self.offset, problem }
    }
}

/// Reads entries from a stream.
#[derive(Debug)]
pub struct Reader<R> {
    inner: R,
    offset: u64,
    /// Data of the present entry that was not read yet.
    data_left: u64,
    /// Padding after it.
    padding: u64,
    name: String,
    ended: bool,
    limit_bytes: u64,
}

impl<R: Read> Reader<R> {
    /// Reads at most `limit_bytes` from `inner`, which should give large pieces.
    pub fn new(inner: R, limit_bytes: u64) -> Self {
        Self { inner, offset: 0, data_left: 0, padding: 0, name: String::new(), ended: false, limit_bytes }
    }

    /// How many bytes of the stream were read.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// How many bytes of the present entry's data are left in the stream.
    #[must_use]
    pub fn data_left(&self) -> u64 {
        self.data_left
    }

    /// The next entry; what is left of the present one is skipped. None at the end: two zero blocks, or the end of the
    /// stream between two entries (umoci leaves out the end marker).
    ///
    /// # Errors
    /// If the source fails, the stream is truncated, or it is not a tar stream within this module's limits.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, TarError> {
        self.skip_data()?;
        if self.ended {
            return Ok(None);
        }
        let mut extended = PaxRecords::default();
        let mut long_name = None;
        let mut long_link = None;
        for _ in 0..=MAX_EXTENDED_HEADERS {
            let offset = self.offset;
            let Some(block) = self.read_header_block()? else {
                if long_name.is_some() || long_link.is_some() || !extended.is_empty() {
                    return Err(TarError::Truncated { offset, what: "the extended header of an entry".to_owned() });
                }
                self.ended = true;
                return Ok(None);
            };
            let header = Header::parse(&block, offset)?;
            match header.type_flag {
                b'x' | b'X' => {
                    let bytes = self.read_extended(&header, offset)?;
                    extended.parse(&bytes, offset)?;
                }
                // Global records carry a commit id or the like; nothing about a file.
                b'g' => drop(self.read_extended(&header, offset)?),
                b'L' => long_name = Some(trim_nul(self.read_extended(&header, offset)?)),
                b'K' => long_link = Some(trim_nul(self.read_extended(&header, offset)?)),
                _ => return self.entry(offset, &block, &header, extended, long_name, long_link).map(Some),
            }
        }
        Err(TarError::Header { offset: self.offset, problem: "too many extended headers before one entry" })
    }

    /// Reads from the present entry's data; 0 at its end.
    ///
    /// # Errors
    /// If the source fails or ends early.
    pub fn read_data(&mut self, buffer: &mut [u8]) -> Result<usize, TarError> {
        let wanted = usize::try_from(self.data_left).map_or(buffer.len(), |left| left.min(buffer.len()));
        if wanted == 0 {
            return Ok(0);
        }
        let got = self.read_some(&mut buffer[..wanted])?;
        if got == 0 {
            return Err(TarError::Truncated { offset: self.offset, what: format!("the data of {:?}", self.name) });
        }
        self.data_left -= got as u64;
        Ok(got)
    }

    /// Reads what follows the end marker, which is padding; it belongs to the layer's digest.
    ///
    /// # Errors
    /// If the source fails.
    pub fn drain(&mut self) -> Result<(), TarError> {
        let mut scratch = vec![0; 64 * 1024];
        while self.read_some(&mut scratch)? != 0 {}
        Ok(())
    }

    fn read_some(&mut self, buffer: &mut [u8]) -> Result<usize, TarError> {
        loop {
            match self.inner.read(buffer) {
                Ok(got) => {
                    self.offset = self.offset.saturating_add(got as u64);
                    if self.offset > self.limit_bytes {
                        let what = self.name.clone();
                        return Err(TarError::TooLong { limit_bytes: self.limit_bytes, what });
                    }
                    return Ok(got);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(TarError::Read { offset: self.offset, source }),
            }
        }
    }

    /// Reads until the buffer is full or the stream ends.
    fn read_full(&mut self, buffer: &mut [u8]) -> Result<usize, TarError> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.read_some(&mut buffer[filled..])? {
                0 => break,
                got => filled += got,
            }
        }
        Ok(filled)
    }

    /// A header block, or None at the end of the archive.
    fn read_header_block(&mut self) -> Result<Option<[u8; BLOCK_BYTES]>, TarError> {
        let start = self.offset;
        let mut block = [0; BLOCK_BYTES];
        match self.read_full(&mut block)? {
            0 => return Ok(None),
            BLOCK_BYTES => {}
            _ => return Err(TarError::Truncated { offset: self.offset, what: "a header".to_owned() }),
        }
        if block.iter().any(|byte| *byte != 0) {
            return Ok(Some(block));
        }
        // The end marker is two such blocks; some writers leave one, and nothing, behind.
        match self.read_full(&mut block)? {
            0 => Ok(None),
            BLOCK_BYTES if block.iter().all(|byte| *byte == 0) => Ok(None),
            _ => Err(TarError::Header { offset: start, problem: "a lone block of zeroes" }),
        }
    }

    fn read_extended(&mut self, header: &Header, offset: u64) -> Result<Vec<u8>, TarError> {
        if header.size_bytes > MAX_EXTENDED_HEADER_BYTES {
            return Err(TarError::Header { offset, problem: "an extended header of more than 1 MiB" });
        }
        let mut bytes = vec![0; header.size_bytes as usize];
        self.begin_data(header.size_bytes, "an extended header".to_owned());
        let mut filled = 0;
        while filled < bytes.len() {
            filled += self.read_data(&mut bytes[filled..])?;
        }
        self.skip_data()?;
        Ok(bytes)
    }

    fn begin_data(&mut self, size_bytes: u64, name: String) {
        self.data_left = size_bytes;
        self.padding = size_bytes.next_multiple_of(BLOCK_BYTES as u64) - size_bytes;
        self.name = name;
    }

    fn skip_data(&mut self) -> Result<(), TarError> {
        let mut scratch = [0; 4096];
        while self.data_left > 0 {
            self.read_data(&mut scratch)?;
        }
        // The last entry's padding may be missing: umoci's pipes end right after the data.
        while self.padding > 0 {
            let wanted = (self.padding as usize).min(scratch.len());
            match self.read_some(&mut scratch[..wanted])? {
                0 => {
                    self.padding = 0;
                    self.ended = true;
                }
                got => self.padding -= got as u64,
            }
        }
        Ok(())
    }

    fn entry(
        &mut self,
        offset: u64,
        block: &[u8; BLOCK_BYTES],
        header: &Header,
        pax: PaxRecords,
        long_name: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
    ) -> Result<Entry, TarError> {
        let sparse = pax.sparse;
        let path = sparse.name.clone().or(pax.path).or(long_name).unwrap_or_else(|| header.name.clone());
        let link = pax.link_path.or(long_link).unwrap_or_else(|| header.link_name.clone());
        let mut entry = Entry {
            offset,
            path,
            kind: EntryKind::File,
            mode: header.mode & 0o7777,
            uid: 0,
            gid: 0,
            mtime: pax.mtime.unwrap_or((header.mtime, 0)),
            size_bytes: 0,
            segments: None,
            xattrs: pax.xattrs,
        };
        if entry.path.len() > MAX_NAME_BYTES || link.len() > MAX_NAME_BYTES {
            entry.path.truncate(64);
            return Err(entry.error("its name or link target is longer than 4096 bytes"));
        }
        let id = |value: u64| u32::try_from(value).ok().filter(|id| *id != u32::MAX);
        entry.uid = id(pax.uid.unwrap_or(header.uid)).ok_or_else(|| entry.error("its user id is out of range"))?;
        entry.gid = id(pax.gid.unwrap_or(header.gid)).ok_or_else(|| entry.error("its group id is out of range"))?;
        let device = (header.device_major, header.device_minor);
        // Linux device numbers have 12 and 20 bits.
        let device_is_valid = device.0 < 1 << 12 && device.1 < 1 << 20;
        entry.kind = match header.type_flag {
            b'0' | 0 if entry.path.ends_with(b"/") => EntryKind::Directory,
            b'0' | 0 | b'7' | b'S' => EntryKind::File,
            b'1' => EntryKind::HardLink(link),
            b'2' => EntryKind::Symlink(link),
            b'3' if device_is_valid => EntryKind::CharDevice(device.0, device.1),
            b'4' if device_is_valid => EntryKind::BlockDevice(device.0, device.1),
            b'3' | b'4' => return Err(entry.error("its device number is out of range")),
            b'5' => EntryKind::Directory,
            b'6' => EntryKind::Fifo,
            _ => {
                return Err(
                    entry.error("its type is unknown; layers hold files, directories, links, devices and pipes")
                );
            }
        };
        if entry.kind != EntryKind::File {
            // As Go's reader has it: only files have data, whatever the size field says.
            self.begin_data(0, entry.display_name());
            return Ok(entry);
        }
        let data_bytes = pax.size_bytes.unwrap_or(header.size_bytes);
        if data_bytes > MAX_FILE_BYTES {
            return Err(entry.error("it is larger than 16 TiB"));
        }
        self.begin_data(data_bytes, entry.display_name());
        entry.size_bytes = data_bytes;
        if let Some(map) = sparse::Map::find(self, header, block, &sparse, &entry)? {
            entry.size_bytes = map.size_bytes;
            entry.segments = Some(map.segments);
        }
        Ok(entry)
    }
}

fn trim_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(end) = bytes.iter().position(|byte| *byte == 0) {
        bytes.truncate(end);
    }
    bytes
}
