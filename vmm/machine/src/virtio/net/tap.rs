//! A tap: a network interface of the host whose frames a process reads and writes
//! (Documentation/networking/tuntap).

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags, open};

/// What precedes each frame: `struct virtio_net_hdr_v1`.
pub(super) const HEADER_BYTES: usize = 12;

const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
const TUNSETOFFLOAD: libc::Ioctl = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::Ioctl = 0x4004_54d8;

/// What the reader of the tap accepts: checksums to be completed, TCP segments to be cut.
pub(super) const OFFLOAD_CHECKSUM: u32 = 1;
pub(super) const OFFLOAD_TSO4: u32 = 2;
pub(super) const OFFLOAD_TSO6: u32 = 4;

/// An open tap.
pub struct Tap {
    fd: OwnedFd,
    name: String,
}

impl Tap {
    /// Opens the tap `name`, which is made if there is none; a `%d` in it becomes a free number.
    ///
    /// # Errors
    /// The name is none for an interface; `/dev/net/tun` cannot be opened; somebody else has the tap
    /// open; there is an interface of the name that is no tap.
    pub fn open(name: &str) -> io::Result<Self> {
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = open("/dev/net/tun", flags, Mode::empty())?;
        let c_name = CString::new(name)?;
        // SAFETY: an all-zero ifreq is a valid one.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        if name.is_empty() || name.len() >= request.ifr_name.len() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a name of an interface has 1 to 15 bytes"));
        }
        for (to, from) in request.ifr_name.iter_mut().zip(c_name.as_bytes()) {
            *to = *from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
        // SAFETY: TUNSETIFF reads and writes the ifreq, which outlives the call.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETIFF, &mut request) })?;
        let size: libc::c_int = HEADER_BYTES as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads the integer.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETVNETHDRSZ, &size) })?;
        let name = request.ifr_name.iter().take_while(|c| **c != 0).map(|c| *c as u8 as char).collect();
        Ok(Self { fd, name })
    }

    /// The name of the interface.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Something else that holds packets apart.
    #[cfg(test)]
    pub(super) fn from_socket(socket: OwnedFd) -> Self {
        Self { fd: socket, name: String::new() }
    }

    /// Says what the reader accepts (`OFFLOAD_*`).
    pub(super) fn set_offload(&self, offload: u32) -> io::Result<()> {
        // SAFETY: TUNSETOFFLOAD takes a number.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), TUNSETOFFLOAD, libc::c_ulong::from(offload)) })
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
