//! System calls that read and write guest memory directly, without a copy in between.
//!
//! The guest may change the memory meanwhile; the kernel copies, and bears that.
#![allow(unsafe_code)] // preadv and the like take raw addresses; vm-memory vouches for them here

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use libc::{c_int, iovec};
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

use super::queue::Buffers;

/// The most pieces that the kernel takes in one call (`UIO_MAXIOV`).
const MAX_IOVECS: usize = 1024;

/// Reads from `file` at `offset` into `buffers`. Short as `preadv` is, and at 1024 pieces.
pub(super) fn read_at(
    file: BorrowedFd<'_>,
    memory: &GuestMemoryMmap,
    buffers: &Buffers,
    offset: u64,
) -> io::Result<usize> {
    let offset = file_offset(offset)?;
    with_iovecs(memory, buffers, Permissions::Write, |iovecs, count| {
        // SAFETY: each iovec names guest memory, which stays mapped while `memory` is borrowed and
        // which no Rust reference points into.
        unsafe { libc::preadv(file.as_raw_fd(), iovecs, count, offset) }
    })
}

/// Writes `buffers` to `file` at `offset`. Short as `pwritev` is, and at 1024 pieces.
pub(super) fn write_at(
    file: BorrowedFd<'_>,
    memory: &GuestMemoryMmap,
    buffers: &Buffers,
    offset: u64,
) -> io::Result<usize> {
    let offset = file_offset(offset)?;
    with_iovecs(memory, buffers, Permissions::Read, |iovecs, count| {
        // SAFETY: as in `read_at`; the memory is only read.
        unsafe { libc::pwritev(file.as_raw_fd(), iovecs, count, offset) }
    })
}

/// Reads from a stream, a socket or a tap into `buffers`.
pub(super) fn read(stream: BorrowedFd<'_>, memory: &GuestMemoryMmap, buffers: &Buffers) -> io::Result<usize> {
    with_iovecs(memory, buffers, Permissions::Write, |iovecs, count| {
        // SAFETY: as in `read_at`.
        unsafe { libc::readv(stream.as_raw_fd(), iovecs, count) }
    })
}

/// Writes `buffers` to a tap or another file that raises no SIGPIPE.
pub(super) fn write(file: BorrowedFd<'_>, memory: &GuestMemoryMmap, buffers: &Buffers) -> io::Result<usize> {
    with_iovecs(memory, buffers, Permissions::Read, |iovecs, count| {
        // SAFETY: as in `read_at`; the memory is only read.
        unsafe { libc::writev(file.as_raw_fd(), iovecs, count) }
    })
}

/// Writes `buffers` to a socket, without waiting and without SIGPIPE.
pub(super) fn send(socket: BorrowedFd<'_>, memory: &GuestMemoryMmap, buffers: &Buffers) -> io::Result<usize> {
    with_iovecs(memory, buffers, Permissions::Read, |iovecs, count| {
        let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
        // SAFETY: an all-zero msghdr is a valid one: no address, no buffers, no control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = iovecs.cast_mut();
        message.msg_iovlen = count as usize;
        // SAFETY: as in `read_at`; sendmsg reads the memory only.
        unsafe { libc::sendmsg(socket.as_raw_fd(), &message, flags) }
    })
}

fn file_offset(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Calls `call` with the host's addresses of `buffers`; again when a signal interrupts it.
fn with_iovecs(
    memory: &GuestMemoryMmap,
    buffers: &Buffers,
    access: Permissions,
    call: impl Fn(*const iovec, c_int) -> isize,
) -> io::Result<usize> {
    let mut iovecs = Vec::with_capacity(buffers.segments().len().min(MAX_IOVECS));
    let mut guards = Vec::with_capacity(iovecs.capacity());
    'segments: for segment in buffers.segments() {
        let address = GuestAddress(segment.address.0);
        let slices = memory.get_slices(address, segment.len as usize, access).map_err(io::Error::other)?;
        for slice in slices {
            if iovecs.len() == MAX_IOVECS {
                break 'segments;
            }
            let guard = slice.map_err(io::Error::other)?.ptr_guard_mut();
            iovecs.push(iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() });
            guards.push(guard);
        }
    }
    // At most MAX_IOVECS.
    let count = iovecs.len() as c_int;
    loop {
        match usize::try_from(call(iovecs.as_ptr(), count)) {
            Ok(len) => return Ok(len),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}
