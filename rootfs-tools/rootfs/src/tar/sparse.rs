//! Maps of GNU sparse files: the old format in the header block, and the pax formats 0.0, 0.1 and 1.0.
use super::header::{BLOCK_BYTES, Header, number};
use super::pax::{SparseRecords, decimal};
use super::{Entry, MAX_FILE_BYTES, MAX_SPARSE_SEGMENTS, Reader, Segment, TarError};
use std::io::Read;

/// The old format's map in a header block: four pairs of numbers, a flag that more follow, the file's size.
const OLD_MAP_AT: usize = 386;
const OLD_MAP_PAIRS: usize = 4;
const OLD_EXTENDED_AT: usize = 482;
const OLD_SIZE_AT: usize = 483;
/// In each block that follows: 21 pairs and a flag.
const CONTINUED_PAIRS: usize = 21;
const CONTINUED_EXTENDED_AT: usize = 504;
const NUMBER_BYTES: usize = 12;

/// Where a sparse file's data belongs.
pub(super) struct Map {
    pub(super) size_bytes: u64,
    pub(super) segments: Vec<Segment>,
}

impl Map {
    /// Finds and checks the map of an entry whose data is next in the stream; None for an ordinary file.
    pub(super) fn find<R: Read>(
        reader: &mut Reader<R>,
        header: &Header,
        block: &[u8; BLOCK_BYTES],
        pax: &SparseRecords,
        entry: &Entry,
    ) -> Result<Option<Self>, TarError> {
        let (numbers, size_bytes) = if header.type_flag == b'S' {
            old_format(reader, block, entry)?
        } else if pax.major == Some(1) {
            (format_1_0(reader, entry)?, pax.size_bytes)
        } else if pax.has_map {
            (pax.map.clone(), pax.size_bytes)
        } else {
            return Ok(None);
        };
        let size_bytes = size_bytes.filter(|size| *size <= MAX_FILE_BYTES);
        let size_bytes = size_bytes.ok_or_else(|| entry.error("it is sparse, and its size is missing or too large"))?;
        let mut segments = Vec::with_capacity(numbers.len() / 2);
        let mut end = 0;
        let mut data_bytes = 0u64;
        if !numbers.len().is_multiple_of(2) {
            return Err(entry.error("its sparse map is incomplete"));
        }
        for pair in numbers.chunks_exact(2) {
            let segment = Segment { offset: pair[0], len_bytes: pair[1] };
            let segment_end = segment.offset.checked_add(segment.len_bytes).filter(|end| *end <= size_bytes);
            let Some(segment_end) = segment_end.filter(|_| segment.offset >= end) else {
                return Err(entry.error("its sparse map is not in order or exceeds its size"));
            };
            end = segment_end;
            data_bytes += segment.len_bytes;
            if segment.len_bytes > 0 {
                segments.push(segment);
            }
        }
        if data_bytes != reader.data_left() {
            return Err(entry.error("its sparse map does not fit the length of its data"));
        }
        Ok(Some(Self { size_bytes, segments }))
    }
}

fn old_format<R: Read>(
    reader: &mut Reader<R>,
    block: &[u8; BLOCK_BYTES],
    entry: &Entry,
) -> Result<(Vec<u64>, Option<u64>), TarError> {
    let mut numbers = Vec::new();
    let mut more = old_pairs(&block[OLD_MAP_AT..], OLD_MAP_PAIRS, &mut numbers)
        .map(|()| block[OLD_EXTENDED_AT] != 0)
        .ok_or_else(|| entry.error("its sparse map is not a list of numbers"))?;
    let size = number(&block[OLD_SIZE_AT..OLD_SIZE_AT + NUMBER_BYTES]).and_then(|size| u64::try_from(size).ok());
    while more {
        let mut next = [0; BLOCK_BYTES];
        if reader.read_full(&mut next)? != BLOCK_BYTES {
            return Err(TarError::Truncated {
                offset: reader.offset(),
                what: format!("the sparse map of {:?}", entry.display_name()),
            });
        }
        old_pairs(&next, CONTINUED_PAIRS, &mut numbers)
            .ok_or_else(|| entry.error("its sparse map is not a list of numbers"))?;
        more = next[CONTINUED_EXTENDED_AT] != 0;
        if numbers.len() > 2 * MAX_SPARSE_SEGMENTS {
            return Err(entry.error("it is sparse with too many segments"));
        }
    }
    Ok((numbers, size))
}

fn old_pairs(bytes: &[u8], count: usize, numbers: &mut Vec<u64>) -> Option<()> {
    for pair in bytes.chunks_exact(2 * NUMBER_BYTES).take(count) {
        if pair[0] == 0 {
            break;
        }
        for field in pair.chunks_exact(NUMBER_BYTES) {
            numbers.push(u64::try_from(number(field)?).ok()?);
        }
    }
    Some(())
}

/// Format 1.0: the map is at the start of the data, in decimal lines, padded to a block.
fn format_1_0<R: Read>(reader: &mut Reader<R>, entry: &Entry) -> Result<Vec<u64>, TarError> {
    let bad = || entry.error("its sparse map is not a list of numbers");
    let mut numbers: Vec<u64> = Vec::new();
    let mut wanted = None;
    let mut digits = Vec::new();
    loop {
        if wanted == Some(numbers.len()) {
            return Ok(numbers);
        }
        let mut block = [0; BLOCK_BYTES];
        let mut filled = 0;
        while filled < BLOCK_BYTES {
            match reader.read_data(&mut block[filled..])? {
                0 => return Err(bad()),
                got => filled += got,
            }
        }
        for byte in block {
            if wanted == Some(numbers.len()) {
                break;
            }
            if byte != b'\n' {
                digits.push(byte);
                // As many as a 64-bit number can have.
                if digits.len() > 20 {
                    return Err(bad());
                }
                continue;
            }
            let value = decimal(&digits).ok_or_else(bad)?;
            digits.clear();
            match wanted {
                None if value > MAX_SPARSE_SEGMENTS as u64 => {
                    return Err(entry.error("it is sparse with too many segments"));
                }
                None => wanted = Some(2 * value as usize),
                Some(_) => numbers.push(value),
            }
        }
    }
}
