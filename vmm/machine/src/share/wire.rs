//! FUSE messages as bytes. Everything that a guest sends is read through [`Input`], which cannot run past its end.
use rustix::io::Errno;

/// Size of a request's header (`struct fuse_in_header`), in bytes.
pub const HEADER_BYTES: usize = 40;
/// Size of a response's header (`struct fuse_out_header`), in bytes.
pub const RESPONSE_HEADER_BYTES: usize = 16;
/// The most data in one READ or WRITE, in bytes: 256 pages, Linux's limit.
pub(super) const MAX_DATA_BYTES: u32 = 1 << 20;
/// The longest request or response, in bytes: data, header, and some for the operation's own fields.
pub const MAX_FRAME_BYTES: usize = MAX_DATA_BYTES as usize + 4096;
pub(super) const ROOT_ID: u64 = 1;

/// Operations (`enum fuse_opcode`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    Lookup,
    Forget,
    GetAttr,
    SetAttr,
    ReadLink,
    Symlink,
    MakeNode,
    MakeDirectory,
    Unlink,
    RemoveDirectory,
    Rename,
    Link,
    Open,
    Read,
    Write,
    StatFs,
    Release,
    Fsync,
    SetXattr,
    GetXattr,
    ListXattr,
    RemoveXattr,
    Init,
    OpenDirectory,
    ReadDirectory,
    ReleaseDirectory,
    FsyncDirectory,
    Create,
    Interrupt,
    Destroy,
    BatchForget,
    Allocate,
    ReadDirectoryPlus,
    Rename2,
    Seek,
}

impl Operation {
    /// None for those that the server leaves to the guest's kernel (FLUSH, locks, ACCESS, STATX, ...).
    pub(super) fn from_code(code: u32) -> Option<Self> {
        Some(match code {
            1 => Self::Lookup,
            2 => Self::Forget,
            3 => Self::GetAttr,
            4 => Self::SetAttr,
            5 => Self::ReadLink,
            6 => Self::Symlink,
            8 => Self::MakeNode,
            9 => Self::MakeDirectory,
            10 => Self::Unlink,
            11 => Self::RemoveDirectory,
            12 => Self::Rename,
            13 => Self::Link,
            14 => Self::Open,
            15 => Self::Read,
            16 => Self::Write,
            17 => Self::StatFs,
            18 => Self::Release,
            20 => Self::Fsync,
            21 => Self::SetXattr,
            22 => Self::GetXattr,
            23 => Self::ListXattr,
            24 => Self::RemoveXattr,
            26 => Self::Init,
            27 => Self::OpenDirectory,
            28 => Self::ReadDirectory,
            29 => Self::ReleaseDirectory,
            30 => Self::FsyncDirectory,
            35 => Self::Create,
            36 => Self::Interrupt,
            38 => Self::Destroy,
            42 => Self::BatchForget,
            43 => Self::Allocate,
            44 => Self::ReadDirectoryPlus,
            45 => Self::Rename2,
            46 => Self::Seek,
            _ => return None,
        })
    }
}

/// Whether a request, by its operation code (bytes 4 to 8 of its header), is answered at all.
#[must_use]
pub fn has_response(code: u32) -> bool {
    let silent = [Operation::Forget, Operation::BatchForget, Operation::Interrupt];
    Operation::from_code(code).is_none_or(|operation| !silent.contains(&operation))
}

/// A request's header.
#[derive(Debug, Clone, Copy)]
pub(super) struct RequestHeader {
    pub(super) code: u32,
    pub(super) unique: u64,
    pub(super) node: u64,
    pub(super) uid: u32,
    pub(super) gid: u32,
}

impl RequestHeader {
    /// The header and what follows it. None if the request is too short or lies about its length.
    pub(super) fn parse(request: &[u8]) -> Option<(Self, Input<'_>)> {
        let mut input = Input(request);
        let len = input.u32().ok()?;
        let code = input.u32().ok()?;
        let unique = input.u64().ok()?;
        let node = input.u64().ok()?;
        let uid = input.u32().ok()?;
        let gid = input.u32().ok()?;
        let _pid = input.u32().ok()?;
        let extensions = input.u32().ok()?;
        (len as usize == request.len() && extensions == 0).then_some((Self { code, unique, node, uid, gid }, input))
    }
}

/// What is left of a request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Input<'r>(&'r [u8]);

impl<'r> Input<'r> {
    pub(super) fn bytes(&mut self, len: usize) -> Result<&'r [u8], Errno> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(taken)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Errno> {
        let bytes = self.bytes(4)?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    pub(super) fn u64(&mut self) -> Result<u64, Errno> {
        let low = self.u32()?;
        let high = self.u32()?;
        Ok(u64::from(high) << 32 | u64::from(low))
    }

    pub(super) fn skip(&mut self, len: usize) -> Result<(), Errno> {
        self.bytes(len).map(drop)
    }

    /// Bytes up to a NUL, which is taken too.
    pub(super) fn string(&mut self) -> Result<&'r [u8], Errno> {
        let end = self.0.iter().position(|byte| *byte == 0).ok_or(Errno::INVAL)?;
        let text = self.bytes(end)?;
        self.skip(1)?;
        Ok(text)
    }

    /// A name of one path component, which leads nowhere but into its directory.
    pub(super) fn name(&mut self) -> Result<&'r [u8], Errno> {
        let name = self.string()?;
        match name {
            b"" | b"." | b".." => Err(Errno::INVAL),
            _ if name.contains(&b'/') => Err(Errno::INVAL),
            _ if name.len() > 255 => Err(Errno::NAMETOOLONG),
            _ => Ok(name),
        }
    }
}

/// A response under construction, its header first.
#[derive(Debug, Default)]
pub(super) struct Output {
    bytes: Vec<u8>,
}

impl Output {
    /// Starts anew.
    pub(super) fn begin(&mut self) {
        self.bytes.clear();
        self.bytes.resize(RESPONSE_HEADER_BYTES, 0);
    }

    /// Fills in the header; an error has no body.
    pub(super) fn end(&mut self, unique: u64, result: Result<(), Errno>) -> &[u8] {
        let mut error = 0;
        if let Err(errno) = result {
            self.bytes.truncate(RESPONSE_HEADER_BYTES);
            error = -errno.raw_os_error();
        }
        let len = self.bytes.len() as u32;
        self.bytes[..4].copy_from_slice(&len.to_le_bytes());
        self.bytes[4..8].copy_from_slice(&error.to_le_bytes());
        self.bytes[8..16].copy_from_slice(&unique.to_le_bytes());
        &self.bytes
    }

    pub(super) fn u16(&mut self, value: u16) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    pub(super) fn u32(&mut self, value: u32) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    pub(super) fn u64(&mut self, value: u64) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    pub(super) fn put(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    pub(super) fn zeroes(&mut self, len: usize) {
        self.bytes.resize(self.bytes.len() + len, 0);
    }

    /// The body's length so far.
    pub(super) fn len(&self) -> usize {
        self.bytes.len() - RESPONSE_HEADER_BYTES
    }

    /// Takes back what is beyond a length that [`Self::len`] gave.
    pub(super) fn truncate(&mut self, len: usize) {
        self.bytes.truncate(RESPONSE_HEADER_BYTES + len);
    }

    /// Lets `fill` write into `len` more bytes; it gives how many it did.
    pub(super) fn fill_with(
        &mut self,
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<usize, Errno>,
    ) -> Result<(), Errno> {
        let start = self.bytes.len();
        self.bytes.resize(start + len, 0);
        let got = fill(&mut self.bytes[start..])?;
        self.bytes.truncate(start + got.min(len));
        Ok(())
    }
}
