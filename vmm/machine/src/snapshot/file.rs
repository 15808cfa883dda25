//! The format of the state file: magic, version, length, checksum of all that and of the body, body.
//!
//! Nothing of a file is believed before its checksum was found right; and nothing of a right one is, by those who take the
//! parts over: it may come from another version of this program.

use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};
use std::io::{self, Write};

/// The first bytes.
const MAGIC: [u8; 8] = *b"CAISSNAP";
/// Counts changes of the format or of the state's meaning.
const VERSION: u32 = 1;
const VERSION_AT: usize = 8;
const LENGTH_AT: usize = 12;
const CHECKSUM_AT: usize = 20;
const CHECKSUM_BYTES: usize = 32;
const HEADER_BYTES: usize = CHECKSUM_AT + CHECKSUM_BYTES;
/// The longest body: 32 vCPUs take less than 2 MiB.
pub const MAX_BODY_BYTES: u64 = 16 << 20;
/// The longest file.
pub const MAX_FILE_BYTES: u64 = MAX_BODY_BYTES + HEADER_BYTES as u64;

/// What is wrong with a file.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// It is of something else.
    #[error("it is not a snapshot's state")]
    Magic,
    /// It is of another version.
    #[error("it has format version {found}, this program knows version {VERSION}: make the snapshot again")]
    Version {
        /// What it has.
        found: u32,
    },
    /// It is too short or too long.
    #[error("it has {found} bytes, but should have {expected}: it is truncated or damaged")]
    Length {
        /// How long it is.
        found: u64,
        /// How long it says it is.
        expected: u64,
    },
    /// Its bytes changed.
    #[error("its checksum is wrong: it is damaged")]
    Checksum,
    /// The checksum is right, but the content is not a state.
    #[error("its content is not valid")]
    Content(#[from] serde_json::Error),
}

/// Encodes a state.
///
/// # Errors
/// It is not JSON, or longer than a file may be.
pub fn encode<T: Serialize>(state: &T) -> io::Result<Vec<u8>> {
    let body = serde_json::to_vec(state)?;
    let len = body.len() as u64;
    if len > MAX_BODY_BYTES {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("the state has {len} bytes")));
    }
    let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len());
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&len.to_le_bytes());
    let checksum = checksum(&bytes, &body);
    bytes.extend_from_slice(&checksum);
    bytes.extend_from_slice(&body);
    Ok(bytes)
}

/// Writes a state and brings it to the disk.
///
/// # Errors
/// As [`encode`], or the file cannot be written.
pub fn write<T: Serialize>(file: &mut std::fs::File, state: &T) -> io::Result<()> {
    file.write_all(&encode(state)?)
}

/// Decodes a file.
///
/// # Errors
/// It is not whole and unchanged, or of another version.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, FormatError> {
    let found = bytes.len() as u64;
    let short = FormatError::Length { found, expected: HEADER_BYTES as u64 };
    if !bytes.starts_with(&MAGIC[..bytes.len().min(MAGIC.len())]) {
        return Err(FormatError::Magic);
    }
    let Some((header, body)) = bytes.split_at_checked(HEADER_BYTES) else {
        return Err(short);
    };
    let version = header[VERSION_AT..LENGTH_AT].iter().rev().fold(0, |v, &b| v << 8 | u32::from(b));
    if version != VERSION {
        return Err(FormatError::Version { found: version });
    }
    let len = header[LENGTH_AT..CHECKSUM_AT].iter().rev().fold(0, |v, &b| v << 8 | u64::from(b));
    if body.len() as u64 != len {
        return Err(FormatError::Length { found, expected: len.saturating_add(HEADER_BYTES as u64) });
    }
    if checksum(&header[..CHECKSUM_AT], body) != header[CHECKSUM_AT..] {
        return Err(FormatError::Checksum);
    }
    Ok(serde_json::from_slice(body)?)
}

fn checksum(header: &[u8], body: &[u8]) -> [u8; CHECKSUM_BYTES] {
    Sha256::new().chain_update(header).chain_update(body).finalize().into()
}
