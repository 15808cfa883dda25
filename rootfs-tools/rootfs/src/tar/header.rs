//! The 512-byte header block.
use super::TarError;
use std::ops::Range;

/// The size of a header, and the unit of everything in a tar stream.
pub(super) const BLOCK_BYTES: usize = 512;

const NAME: Range<usize> = 0..100;
const MODE: Range<usize> = 100..108;
const UID: Range<usize> = 108..116;
const GID: Range<usize> = 116..124;
const SIZE: Range<usize> = 124..136;
const MTIME: Range<usize> = 136..148;
const CHECKSUM: Range<usize> = 148..156;
const TYPE_FLAG: usize = 156;
const LINK_NAME: Range<usize> = 157..257;
const MAGIC: Range<usize> = 257..263;
const DEVICE_MAJOR: Range<usize> = 329..337;
const DEVICE_MINOR: Range<usize> = 337..345;
const PREFIX: Range<usize> = 345..500;

/// A header's fields.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) name: Vec<u8>,
    pub(super) mode: u16,
    pub(super) uid: u64,
    pub(super) gid: u64,
    pub(super) size_bytes: u64,
    pub(super) mtime: i64,
    pub(super) type_flag: u8,
    pub(super) link_name: Vec<u8>,
    pub(super) device_major: u32,
    pub(super) device_minor: u32,
}

impl Header {
    pub(super) fn parse(block: &[u8; BLOCK_BYTES], offset: u64) -> Result<Self, TarError> {
        let bad = |problem| TarError::Header { offset, problem };
        let checksum = number(&block[CHECKSUM]).ok_or_else(|| bad("the checksum field is not a number"))?;
        let (unsigned, signed) = checksums(block);
        if checksum != unsigned && checksum != signed {
            return Err(bad("the checksum does not match"));
        }
        let field = |range: Range<usize>, problem| number(&block[range]).ok_or_else(|| bad(problem));
        let unsigned = |range: Range<usize>, problem| u64::try_from(field(range, problem)?).map_err(|_| bad(problem));
        let mut name = string(&block[NAME]);
        // GNU's magic ends in spaces and has other fields where the prefix would be.
        if &block[MAGIC] == b"ustar\0" {
            let prefix = string(&block[PREFIX]);
            if !prefix.is_empty() {
                name = [prefix.as_slice(), b"/", name.as_slice()].concat();
            }
        }
        let type_flag = block[TYPE_FLAG];
        let is_device = matches!(type_flag, b'3' | b'4');
        let device = |range| if is_device { unsigned(range, "the device number is not a number") } else { Ok(0) };
        Ok(Self {
            name,
            mode: (unsigned(MODE, "the mode is not a number")? & 0o7777) as u16,
            uid: unsigned(UID, "the user id is not a number")?,
            gid: unsigned(GID, "the group id is not a number")?,
            size_bytes: unsigned(SIZE, "the size is not a number")?,
            mtime: field(MTIME, "the time is not a number")?,
            type_flag,
            link_name: string(&block[LINK_NAME]),
            device_major: u32::try_from(device(DEVICE_MAJOR)?).unwrap_or(u32::MAX),
            device_minor: u32::try_from(device(DEVICE_MINOR)?).unwrap_or(u32::MAX),
        })
    }
}

fn checksums(block: &[u8; BLOCK_BYTES]) -> (i64, i64) {
    let mut sums = (0, 0);
    for (at, byte) in block.iter().enumerate() {
        let byte = if CHECKSUM.contains(&at) { b' ' } else { *byte };
        sums.0 += i64::from(byte);
        // Some ancient writers summed signed chars.
        sums.1 += i64::from(byte.cast_signed());
    }
    sums
}

fn string(field: &[u8]) -> Vec<u8> {
    let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
    field[..end].to_vec()
}

/// A number: octal digits, or GNU's base 256 with the top bit of the first byte set. An empty field is zero.
pub(super) fn number(field: &[u8]) -> Option<i64> {
    let first = *field.first()?;
    if first & 0x80 != 0 {
        // Two's complement in the remaining bits: bit 6 of the first byte is the sign.
        let negative = first & 0x40 != 0;
        let mut value: i64 = if negative { -1 } else { 0 };
        for (at, byte) in field.iter().enumerate() {
            let byte = if at == 0 { (byte & 0x3f) | if negative { 0xc0 } else { 0 } } else { *byte };
            value = value.checked_mul(256)?.checked_add(i64::from(byte))?;
        }
        return Some(value);
    }
    let text = field.trim_ascii_start();
    let end = text.iter().position(|byte| matches!(byte, 0 | b' ')).unwrap_or(text.len());
    text[..end].iter().try_fold(0i64, |value, digit| match digit {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add(i64::from(digit - b'0')),
        _ => None,
    })
}
