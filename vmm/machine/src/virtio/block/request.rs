//! One request: its form (virtio 1.2 §5.2.6), its bounds, and what it does to the medium.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use rustix::fs::{FallocateFlags, fallocate, fdatasync};
use vm_memory::GuestMemoryMmap;

use crate::virtio::{Buffers, Chain, QueueError, guest_io};

/// The unit of all addresses of the device.
pub(super) const SECTOR_BYTES: u64 = 512;
/// The most bytes of one request.
pub(super) const MAX_BYTES: u64 = 16 << 20;
/// The most ranges of one discard or write-zeroes request.
pub(super) const MAX_RANGES: u32 = 16;
/// The most sectors of such a range: 2 GiB.
pub(super) const MAX_RANGE_SECTORS: u32 = 4 << 20;

const HEADER_BYTES: usize = 16;
const RANGE_BYTES: u64 = 16;
const ID: &[u8; 20] = b"caisson\0\0\0\0\0\0\0\0\0\0\0\0\0";

const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;
const TYPE_DISCARD: u32 = 11;
const TYPE_WRITE_ZEROES: u32 = 13;

/// Flag of a write-zeroes range: its space may be given back.
const RANGE_UNMAP: u32 = 1;

const STATUS_OK: u8 = 0;
const STATUS_IO_ERROR: u8 = 1;
const STATUS_UNSUPPORTED: u8 = 2;

/// What is behind the device.
pub(super) struct Medium {
    pub(super) file: Option<File>,
    pub(super) read_only: bool,
    pub(super) capacity_sectors: u64,
}

/// Why a request fails.
enum Failure {
    /// It is out of bounds, or the medium failed.
    Io,
    /// The device does no such thing.
    Unsupported,
    /// Its buffers do not make sense.
    Broken(QueueError),
}

impl From<io::Error> for Failure {
    fn from(_: io::Error) -> Self {
        Self::Io
    }
}

impl From<rustix::io::Errno> for Failure {
    fn from(_: rustix::io::Errno) -> Self {
        Self::Io
    }
}

impl From<QueueError> for Failure {
    fn from(error: QueueError) -> Self {
        Self::Broken(error)
    }
}

/// Serves the request in `chain`, and writes its status. Gives the bytes that were written.
///
/// # Errors
/// It has no header or no place for the status: the driver is broken.
pub(super) fn serve(medium: &Medium, memory: &GuestMemoryMmap, mut chain: Chain) -> Result<u32, QueueError> {
    let status = chain.writable.split_back(1)?;
    let mut header = [0; HEADER_BYTES];
    let header_buffer = chain.readable.split_front(HEADER_BYTES as u64)?;
    header_buffer.read(memory, &mut header)?;
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
    let sector = u64::from_le_bytes(sector);
    let outcome = match u32::from_le_bytes([t0, t1, t2, t3]) {
        TYPE_IN => medium.read(memory, chain.writable, sector),
        TYPE_OUT => medium.write(memory, chain.readable, sector),
        TYPE_FLUSH => medium.flush(),
        TYPE_GET_ID => id(memory, &chain.writable),
        kind @ (TYPE_DISCARD | TYPE_WRITE_ZEROES) => medium.clear(memory, chain.readable, kind == TYPE_WRITE_ZEROES),
        _ => Err(Failure::Unsupported),
    };
    let (code, written) = match outcome {
        Ok(written) => (STATUS_OK, written),
        Err(Failure::Io) => (STATUS_IO_ERROR, 0),
        Err(Failure::Unsupported) => (STATUS_UNSUPPORTED, 0),
        Err(Failure::Broken(error)) => return Err(error),
    };
    status.write(memory, &[code])?;
    Ok(written + 1)
}

fn id(memory: &GuestMemoryMmap, buffer: &Buffers) -> Result<u32, Failure> {
    if buffer.len_bytes() < ID.len() as u64 {
        return Err(Failure::Io);
    }
    buffer.write(memory, ID)?;
    Ok(ID.len() as u32)
}

impl Medium {
    /// Where on the medium a request of `len` bytes at `sector` is, if it is whole and inside.
    fn locate(&self, sector: u64, len: u64) -> Result<(&File, u64), Failure> {
        let file = self.file.as_ref().ok_or(Failure::Io)?;
        let end = sector.checked_add(len / SECTOR_BYTES).ok_or(Failure::Io)?;
        if !len.is_multiple_of(SECTOR_BYTES) || end > self.capacity_sectors {
            return Err(Failure::Io);
        }
        let offset = sector.checked_mul(SECTOR_BYTES).ok_or(Failure::Io)?;
        Ok((file, offset))
    }

    fn read(&self, memory: &GuestMemoryMmap, mut buffer: Buffers, sector: u64) -> Result<u32, Failure> {
        let len = buffer.len_bytes();
        if len > MAX_BYTES {
            return Err(Failure::Io);
        }
        let (file, mut offset) = self.locate(sector, len)?;
        while !buffer.is_empty() {
            let got = guest_io::read_at(file.as_fd(), memory, &buffer, offset)? as u64;
            if got == 0 {
                // Only the last sector may be there in part.
                if buffer.len_bytes() >= SECTOR_BYTES {
                    return Err(Failure::Io);
                }
                let zeroes = [0; SECTOR_BYTES as usize];
                buffer.write(memory, &zeroes[..buffer.len_bytes() as usize])?;
                break;
            }
            buffer.split_front(got)?;
            offset += got;
        }
        Ok(len as u32)
    }

    fn write(&self, memory: &GuestMemoryMmap, mut buffer: Buffers, sector: u64) -> Result<u32, Failure> {
        if self.read_only || buffer.len_bytes() > MAX_BYTES {
            return Err(Failure::Io);
        }
        let (file, mut offset) = self.locate(sector, buffer.len_bytes())?;
        while !buffer.is_empty() {
            let put = guest_io::write_at(file.as_fd(), memory, &buffer, offset)? as u64;
            if put == 0 {
                return Err(Failure::Io);
            }
            buffer.split_front(put)?;
            offset += put;
        }
        Ok(0)
    }

    fn flush(&self) -> Result<u32, Failure> {
        if let Some(file) = &self.file
            && !self.read_only
        {
            fdatasync(file)?;
        }
        Ok(0)
    }

    /// Serves discard (virtio 1.2 §5.2.6.1: a hint) and write-zeroes (an order).
    fn clear(&self, memory: &GuestMemoryMmap, mut ranges: Buffers, zero: bool) -> Result<u32, Failure> {
        if self.read_only {
            return Err(Failure::Io);
        }
        let len = ranges.len_bytes();
        if !len.is_multiple_of(RANGE_BYTES) || len > u64::from(MAX_RANGES) * RANGE_BYTES {
            return Err(Failure::Io);
        }
        while !ranges.is_empty() {
            let mut range = [0; RANGE_BYTES as usize];
            ranges.split_front(RANGE_BYTES)?.read(memory, &mut range)?;
            let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = range;
            let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
            let flags = u32::from_le_bytes(flags);
            let known = if zero { RANGE_UNMAP } else { 0 };
            if flags & !known != 0 {
                return Err(Failure::Unsupported);
            }
            if sectors > MAX_RANGE_SECTORS {
                return Err(Failure::Io);
            }
            let len = u64::from(sectors) * SECTOR_BYTES;
            let (file, offset) = self.locate(sector, len)?;
            if len > 0 {
                clear_range(file, offset, len, zero, flags & RANGE_UNMAP != 0)?;
            }
        }
        Ok(0)
    }
}

fn clear_range(file: &File, offset: u64, len: u64, zero: bool, unmap: bool) -> io::Result<()> {
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let reserve = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
    if zero && !unmap && fallocate(file, reserve, offset, len).is_ok() {
        return Ok(());
    }
    match fallocate(file, punch, offset, len) {
        // The file system keeps the blocks: a discard may be ignored.
        Err(rustix::io::Errno::OPNOTSUPP) if !zero => Ok(()),
        result => Ok(result?),
    }
}
