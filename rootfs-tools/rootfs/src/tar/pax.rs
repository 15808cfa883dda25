//! pax extended header records: `length key=value\n`.
use super::{MAX_SPARSE_SEGMENTS, MAX_XATTR_NAME_BYTES, MAX_XATTR_VALUE_BYTES, TarError};

/// The most extended attributes of one entry.
const MAX_XATTRS: usize = 1024;
const XATTR_PREFIX: &[u8] = b"SCHILY.xattr.";

/// Records about GNU sparse files, formats 0.0, 0.1 and 1.0.
#[derive(Debug, Default)]
pub(super) struct SparseRecords {
    pub(super) major: Option<u64>,
    pub(super) name: Option<Vec<u8>>,
    pub(super) size_bytes: Option<u64>,
    /// Offsets and lengths in turn.
    pub(super) map: Vec<u64>,
    pub(super) has_map: bool,
}

/// What the records before an entry say about it.
#[derive(Debug, Default)]
pub(super) struct PaxRecords {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link_path: Option<Vec<u8>>,
    pub(super) size_bytes: Option<u64>,
    pub(super) uid: Option<u64>,
    pub(super) gid: Option<u64>,
    pub(super) mtime: Option<(i64, u32)>,
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub(super) sparse: SparseRecords,
    seen: bool,
}

impl PaxRecords {
    pub(super) fn is_empty(&self) -> bool {
        !self.seen
    }

    pub(super) fn parse(&mut self, mut bytes: &[u8], offset: u64) -> Result<(), TarError> {
        self.seen = true;
        while !bytes.is_empty() {
            let (key, value, rest) =
                split_record(bytes).ok_or(TarError::Header { offset, problem: "a malformed pax record" })?;
            self.record(key, value).map_err(|problem| TarError::Header { offset, problem })?;
            bytes = rest;
        }
        Ok(())
    }

    fn record(&mut self, key: &[u8], value: &[u8]) -> Result<(), &'static str> {
        if let Some(name) = key.strip_prefix(XATTR_PREFIX) {
            if name.is_empty() || name.len() > MAX_XATTR_NAME_BYTES || name.contains(&0) {
                return Err("an extended attribute's name is empty, too long, or holds a NUL");
            }
            if value.len() > MAX_XATTR_VALUE_BYTES {
                return Err("an extended attribute's value is longer than 64 KiB");
            }
            if self.xattrs.len() >= MAX_XATTRS {
                return Err("more than 1024 extended attributes");
            }
            self.xattrs.push((name.to_vec(), value.to_vec()));
            return Ok(());
        }
        let whole = || decimal(value).ok_or("a pax record's value is not a number");
        match key {
            b"path" => self.path = name(value)?,
            b"linkpath" => self.link_path = name(value)?,
            b"size" => self.size_bytes = Some(whole()?),
            b"uid" => self.uid = Some(whole()?),
            b"gid" => self.gid = Some(whole()?),
            b"mtime" => self.mtime = Some(time(value).ok_or("a pax record's value is not a time")?),
            b"GNU.sparse.major" => self.sparse.major = Some(whole()?),
            b"GNU.sparse.name" => self.sparse.name = name(value)?,
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => self.sparse.size_bytes = Some(whole()?),
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => self.sparse_number(whole()?)?,
            b"GNU.sparse.map" => {
                self.sparse.map.clear();
                self.sparse.has_map = true;
                for number in value.split(|byte| *byte == b',').filter(|number| !number.is_empty()) {
                    self.sparse_number(decimal(number).ok_or("a sparse map is not a list of numbers")?)?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn sparse_number(&mut self, number: u64) -> Result<(), &'static str> {
        self.sparse.has_map = true;
        if self.sparse.map.len() >= 2 * MAX_SPARSE_SEGMENTS {
            return Err("a sparse file with too many segments");
        }
        self.sparse.map.push(number);
        Ok(())
    }
}

/// An empty value takes the record back, as pax has it.
fn name(value: &[u8]) -> Result<Option<Vec<u8>>, &'static str> {
    if value.contains(&0) {
        return Err("a name holds a NUL");
    }
    Ok(Some(value.to_vec()).filter(|name| !name.is_empty()))
}

/// Key, value, and what follows the record.
fn split_record(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    // Twenty digits hold any 64-bit number.
    let space = bytes.iter().take(21).position(|byte| *byte == b' ')?;
    let len = usize::try_from(decimal(&bytes[..space])?).ok()?;
    let record = bytes.get(..len)?.get(space + 1..)?.strip_suffix(b"\n")?;
    let equals = record.iter().position(|byte| *byte == b'=')?;
    Some((&record[..equals], &record[equals + 1..], &bytes[len..]))
}

pub(super) fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0u64, |value, digit| match digit {
        b'0'..=b'9' => value.checked_mul(10)?.checked_add(u64::from(digit - b'0')),
        _ => None,
    })
}

/// Seconds with an optional fraction; the fraction of a negative time counts backwards.
fn time(text: &[u8]) -> Option<(i64, u32)> {
    let (negative, digits) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let point = digits.iter().position(|byte| *byte == b'.');
    let (whole, fraction) = point.map_or((digits, &b""[..]), |at| (&digits[..at], &digits[at + 1..]));
    let seconds = i64::try_from(decimal(whole)?).ok()?;
    let mut nanoseconds = 0;
    for at in 0..9 {
        let digit = match fraction.get(at) {
            Some(digit @ b'0'..=b'9') => u32::from(digit - b'0'),
            Some(_) => return None,
            None => 0,
        };
        nanoseconds = nanoseconds * 10 + digit;
    }
    Some(match (negative, nanoseconds) {
        (false, _) => (seconds, nanoseconds),
        (true, 0) => (-seconds, 0),
        (true, _) => (-seconds - 1, 1_000_000_000 - nanoseconds),
    })
}
