//! Copies of files that keep their holes.
use rustix::fs::{SeekFrom, ftruncate, ioctl_ficlone, seek};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Bytes per read while copying.
const CHUNK_BYTES: usize = 256 * 1024;
/// The unit in which zeroes become holes.
const BLOCK_BYTES: usize = 4096;

/// Makes the empty file `to` a copy of `from`: by sharing extents where the file system can, else by copying only data
/// that is not zero.
pub(crate) fn copy(from: &File, to: &File) -> io::Result<()> {
    let len = from.metadata()?.len();
    if ioctl_ficlone(to, from).is_ok() {
        return Ok(());
    }
    ftruncate(to, len)?;
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut at = 0;
    while at < len {
        at = match seek(from, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = seek(from, SeekFrom::Hole(at))?.min(len);
        while at < end {
            let wanted = usize::try_from(end - at).map_or(CHUNK_BYTES, |rest| rest.min(CHUNK_BYTES));
            let chunk = &mut buffer[..wanted];
            from.read_exact_at(chunk, at)?;
            write_non_zero(to, chunk, at)?;
            at += wanted as u64;
        }
    }
    Ok(())
}

/// Writes those blocks of `bytes` that are not all zero; `at` is a multiple of the block size. The rest stays as it is.
pub(crate) fn write_non_zero(to: &File, bytes: &[u8], at: u64) -> io::Result<()> {
    let mut start = 0;
    while start < bytes.len() {
        let block = &bytes[start..(start + BLOCK_BYTES).min(bytes.len())];
        if is_zero(block) {
            start += block.len();
            continue;
        }
        let mut end = start + block.len();
        while end < bytes.len() {
            let next = &bytes[end..(end + BLOCK_BYTES).min(bytes.len())];
            if is_zero(next) {
                break;
            }
            end += next.len();
        }
        to.write_all_at(&bytes[start..end], at + start as u64)?;
        start = end;
    }
    Ok(())
}

fn is_zero(block: &[u8]) -> bool {
    static ZEROES: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];
    block == &ZEROES[..block.len()]
}
