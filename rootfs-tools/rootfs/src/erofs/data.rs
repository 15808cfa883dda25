//! File data on its way from the tar stream: whole blocks go straight into the image, short tails into a spool from
//! which they are put beside their inodes later.
use super::ConvertError;
use super::format::BLOCK_BYTES;
use crate::sparse::write_non_zero;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;

/// Bytes gathered before they are written: a multiple of the block size.
const BUFFER_BYTES: usize = 256 * 1024;
/// The largest image, in bytes, holes included: the format's block numbers would allow 16 TiB.
pub const MAX_IMAGE_BYTES: u64 = 4 << 40;

/// Writes file data from block 1 on; blocks of zeroes become holes of the image file.
pub(super) struct DataWriter<'a> {
    image: &'a File,
    buffer: Vec<u8>,
    used: usize,
    /// Where in the image the buffer's first byte belongs.
    offset: u64,
    tails: BufWriter<&'a File>,
    tails_bytes: u64,
}

/// Where a file's data went.
pub(super) struct Placed {
    /// The first whole block, 0 if there is none.
    pub(super) block: u32,
    /// Where in the spool the tail is, if there is one.
    pub(super) tail: Option<u64>,
}

impl<'a> DataWriter<'a> {
    pub(super) fn new(image: &'a File, spool: &'a File) -> Self {
        Self {
            image,
            buffer: vec![0; BUFFER_BYTES],
            used: 0,
            offset: BLOCK_BYTES as u64,
            tails: BufWriter::with_capacity(64 * 1024, spool),
            tails_bytes: 0,
        }
    }

    /// The first block after everything written so far. Only whole blocks are in the buffer between two files.
    pub(super) fn next_block(&self) -> u32 {
        ((self.offset + self.used as u64) / BLOCK_BYTES as u64) as u32
    }

    /// Lets `fill` write at most `len_bytes` bytes of a file's data into a part of the buffer; it gives their number.
    pub(super) fn append_with<E>(
        &mut self,
        len_bytes: u64,
        fill: impl FnOnce(&mut [u8]) -> Result<usize, E>,
    ) -> Result<u64, ConvertError>
    where
        ConvertError: From<E>,
    {
        let space = BUFFER_BYTES - self.used;
        let wanted = usize::try_from(len_bytes).map_or(space, |len| len.min(space));
        let got = fill(&mut self.buffer[self.used..self.used + wanted])?.min(wanted);
        self.used += got;
        self.flush_if_full()?;
        Ok(got as u64)
    }

    /// Appends bytes of a directory or the like.
    pub(super) fn append(&mut self, mut bytes: &[u8]) -> Result<(), ConvertError> {
        while !bytes.is_empty() {
            let taken = bytes.len().min(BUFFER_BYTES - self.used);
            self.buffer[self.used..self.used + taken].copy_from_slice(&bytes[..taken]);
            self.used += taken;
            bytes = &bytes[taken..];
            self.flush_if_full()?;
        }
        Ok(())
    }

    /// Appends a hole of a file.
    pub(super) fn append_zeroes(&mut self, mut len_bytes: u64) -> Result<(), ConvertError> {
        while len_bytes > 0 {
            if self.used.is_multiple_of(BLOCK_BYTES) && len_bytes >= BUFFER_BYTES as u64 {
                self.flush()?;
                let skipped = len_bytes - len_bytes % BLOCK_BYTES as u64;
                self.offset = self.offset.saturating_add(skipped);
                self.check_size()?;
                len_bytes -= skipped;
                continue;
            }
            let to_boundary = BLOCK_BYTES - self.used % BLOCK_BYTES;
            let len = usize::try_from(len_bytes).map_or(to_boundary, |len| len.min(to_boundary));
            self.buffer[self.used..self.used + len].fill(0);
            self.used += len;
            len_bytes -= len as u64;
            self.flush_if_full()?;
        }
        Ok(())
    }

    /// Ends a file that began at `start` ([`Self::next_block`]): its tail is spooled if it is no longer than
    /// `inline_bytes`, else filled up to a block.
    pub(super) fn end_file(&mut self, start: u32, inline_bytes: usize) -> Result<Placed, ConvertError> {
        let tail_bytes = self.used % BLOCK_BYTES;
        let mut tail = None;
        if tail_bytes > 0 && tail_bytes <= inline_bytes {
            let bytes = &self.buffer[self.used - tail_bytes..self.used];
            self.tails.write_all(bytes).map_err(|source| ConvertError::Write { source })?;
            tail = Some(self.tails_bytes);
            self.tails_bytes += tail_bytes as u64;
            self.used -= tail_bytes;
        } else {
            self.pad()?;
        }
        let block = if self.next_block() > start { start } else { 0 };
        Ok(Placed { block, tail })
    }

    /// Fills up to a block with zeroes.
    pub(super) fn pad(&mut self) -> Result<(), ConvertError> {
        let end = self.used.next_multiple_of(BLOCK_BYTES);
        self.buffer[self.used..end].fill(0);
        self.used = end;
        self.flush_if_full()
    }

    /// Writes everything out and gives the spool back for reading.
    pub(super) fn finish(mut self) -> Result<&'a File, ConvertError> {
        self.pad()?;
        self.flush()?;
        self.tails.into_inner().map_err(|error| ConvertError::Write { source: error.into_error() })
    }

    fn flush_if_full(&mut self) -> Result<(), ConvertError> {
        if self.used == BUFFER_BYTES { self.flush() } else { Ok(()) }
    }

    /// Writes the buffer, which holds whole blocks.
    fn flush(&mut self) -> Result<(), ConvertError> {
        self.check_size()?;
        write_non_zero(self.image, &self.buffer[..self.used], self.offset)
            .map_err(|source| ConvertError::Write { source })?;
        self.offset += self.used as u64;
        self.used = 0;
        Ok(())
    }

    fn check_size(&self) -> Result<(), ConvertError> {
        if self.offset + self.used as u64 > MAX_IMAGE_BYTES { Err(ConvertError::TooLarge) } else { Ok(()) }
    }
}

/// Reads a tail back.
pub(super) fn read_tail(spool: &File, at: u64, bytes: &mut [u8]) -> Result<(), ConvertError> {
    spool.read_exact_at(bytes, at).map_err(|source| ConvertError::Write { source })
}
