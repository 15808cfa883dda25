//! The server: requests in, responses out.
use super::identity::Identity;
use super::table::{Table, stat};
use super::wire::{
    HEADER_BYTES, Input, MAX_DATA_BYTES, MAX_FRAME_BYTES, Operation, Output, RequestHeader, has_response,
};
use super::{MAX_EXPORTS, ShareConfig};
use rustix::fs::{Mode, OFlags, Statx, open};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

const MAJOR: u32 = 7;
/// The protocol's minor version that the structures here are of.
const MINOR: u32 = 38;
/// Requests that the guest's kernel may have under way in the background.
const MAX_BACKGROUND: u16 = 64;
const MAX_READAHEAD_BYTES: u32 = 1 << 20;

const FUSE_ASYNC_READ: u32 = 1 << 0;
const FUSE_ATOMIC_O_TRUNC: u32 = 1 << 3;
const FUSE_BIG_WRITES: u32 = 1 << 5;
const FUSE_AUTO_INVAL_DATA: u32 = 1 << 12;
const FUSE_DO_READDIRPLUS: u32 = 1 << 13;
const FUSE_READDIRPLUS_AUTO: u32 = 1 << 14;
const FUSE_ASYNC_DIO: u32 = 1 << 15;
const FUSE_PARALLEL_DIROPS: u32 = 1 << 18;
const FUSE_MAX_PAGES: u32 = 1 << 22;
const FUSE_HANDLE_KILLPRIV_V2: u32 = 1 << 28;
/// Not FUSE_WRITEBACK_CACHE, so that the host sees what was written; not FUSE_POSIX_LOCKS or FUSE_FLOCK_LOCKS, so that locks
/// are the guest's own and nobody waits in the server.
const WANTED: u32 = FUSE_ASYNC_READ
    | FUSE_ATOMIC_O_TRUNC
    | FUSE_BIG_WRITES
    | FUSE_AUTO_INVAL_DATA
    | FUSE_DO_READDIRPLUS
    | FUSE_READDIRPLUS_AUTO
    | FUSE_ASYNC_DIO
    | FUSE_PARALLEL_DIROPS
    | FUSE_MAX_PAGES
    | FUSE_HANDLE_KILLPRIV_V2;

/// Why a server cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// Nothing to serve, or too much, or a name that cannot be.
    #[error("cannot share: {0}")]
    Config(String),
    /// An export cannot be opened.
    #[error("cannot share {}", path.display())]
    Export {
        /// What.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The device's connection failed.
    #[error("the connection to the virtio-fs device failed")]
    Connection(#[source] io::Error),
    /// The device sent something that is no request.
    #[error("the virtio-fs device sent a request of {0} bytes; the limit is {MAX_FRAME_BYTES}")]
    Length(usize),
}

/// An export, opened.
#[derive(Debug)]
pub(super) struct OpenExport {
    pub(super) name: String,
    pub(super) fd: OwnedFd,
    read_only: bool,
}

/// A guest's view of its exports.
#[derive(Debug)]
pub struct Server {
    pub(super) exports: Vec<OpenExport>,
    pub(super) table: Table,
    pub(super) identity: Identity,
    pub(super) attribute_timeout: Duration,
    pub(super) entry_timeout: Duration,
    output: Output,
}

impl Server {
    /// Opens the exports. New files will be made with exactly the modes that the guest asks for: the process's umask is
    /// expected to be 0.
    ///
    /// # Errors
    /// If there are none or too many, names clash, or one cannot be opened.
    pub fn new(config: &ShareConfig) -> Result<Self, ServerError> {
        if config.exports.is_empty() || config.exports.len() > MAX_EXPORTS {
            let count = config.exports.len();
            return Err(ServerError::Config(format!("there are {count} exports; there must be 1 to {MAX_EXPORTS}")));
        }
        let mut exports: Vec<OpenExport> = Vec::new();
        for export in &config.exports {
            let name = &export.name;
            let is_component =
                !matches!(name.as_str(), "" | "." | "..") && !name.contains(['/', '\0']) && name.len() <= 255;
            if !is_component || exports.iter().any(|other| other.name == *name) {
                return Err(ServerError::Config(format!("{name:?} is no usable name of an export, or there are two")));
            }
            let fd = open(&export.path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
                .map_err(|error| ServerError::Export { path: export.path.clone(), source: error.into() })?;
            exports.push(OpenExport { name: name.clone(), fd, read_only: export.read_only });
        }
        let max_descriptors = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        Ok(Self {
            exports,
            table: Table::new(max_descriptors),
            identity: Identity::current(),
            attribute_timeout: Duration::from_millis(config.attribute_timeout_ms.into()),
            entry_timeout: Duration::from_millis(config.entry_timeout_ms.into()),
            output: Output::default(),
        })
    }

    /// Answers a request. None if there is no answer: to FORGET and the like, and to what is not even a header.
    pub fn handle(&mut self, request: &[u8]) -> Option<&[u8]> {
        let (header, input) = RequestHeader::parse(request)?;
        let mut out = std::mem::take(&mut self.output);
        out.begin();
        let result = self.dispatch(&header, input, &mut out);
        self.output = out;
        has_response(header.code).then(|| self.output.end(header.unique, result))
    }

    fn dispatch(&mut self, header: &RequestHeader, input: Input<'_>, out: &mut Output) -> Result<(), Errno> {
        let Some(operation) = Operation::from_code(header.code) else { return Err(Errno::NOSYS) };
        match operation {
            Operation::Init => self.init(input, out),
            Operation::Destroy => {
                self.table.clear();
                Ok(())
            }
            Operation::Lookup => self.lookup(header, input, out),
            Operation::Forget => self.forget(header, input),
            Operation::BatchForget => self.batch_forget(input),
            Operation::GetAttr => self.get_attr(header, input, out),
            Operation::SetAttr => self.set_attr(header, input, out),
            Operation::ReadLink => self.read_link(header, out),
            Operation::Symlink => self.symlink(header, input, out),
            Operation::MakeNode => self.make_node(header, input, out),
            Operation::MakeDirectory => self.make_directory(header, input, out),
            Operation::Unlink => self.remove(header, input, false),
            Operation::RemoveDirectory => self.remove(header, input, true),
            Operation::Rename => self.rename(header, input, false),
            Operation::Rename2 => self.rename(header, input, true),
            Operation::Link => self.link(header, input, out),
            Operation::Open => self.open(header, input, out),
            Operation::Create => self.create(header, input, out),
            Operation::Read => self.read(input, out),
            Operation::Write => self.write(input, out),
            Operation::StatFs => self.stat_fs(header, out),
            Operation::Release | Operation::ReleaseDirectory => self.release(input),
            Operation::Fsync => self.fsync(input, false),
            Operation::FsyncDirectory => self.fsync(input, true),
            Operation::SetXattr => self.set_xattr(header, input),
            Operation::GetXattr => self.get_xattr(header, input, out),
            Operation::ListXattr => self.list_xattr(header, input, out),
            Operation::RemoveXattr => self.remove_xattr(header, input),
            Operation::OpenDirectory => self.open_directory(header, out),
            Operation::ReadDirectory => self.read_directory(header, input, out, false),
            Operation::ReadDirectoryPlus => self.read_directory(header, input, out, true),
            Operation::Allocate => self.allocate(input),
            Operation::Seek => self.seek(input, out),
            Operation::Interrupt => Ok(()),
        }
    }

    /// `struct fuse_init_out`.
    fn init(&mut self, mut input: Input<'_>, out: &mut Output) -> Result<(), Errno> {
        let (major, _minor) = (input.u32()?, input.u32()?);
        let readahead = input.u32()?;
        let offered = input.u32()?;
        if major < MAJOR {
            return Err(Errno::PROTO);
        }
        // A new session knows nothing of the last one.
        self.table.clear();
        out.u32(MAJOR);
        out.u32(MINOR);
        if major > MAJOR {
            out.zeroes(56);
            return Ok(());
        }
        out.u32(readahead.min(MAX_READAHEAD_BYTES));
        out.u32(offered & WANTED);
        out.u16(MAX_BACKGROUND);
        out.u16(MAX_BACKGROUND / 4 * 3);
        out.u32(MAX_DATA_BYTES);
        // Times' granularity, in nanoseconds.
        out.u32(1);
        out.u16((MAX_DATA_BYTES / 4096) as u16);
        out.u16(0);
        out.zeroes(32);
        Ok(())
    }

    fn forget(&mut self, header: &RequestHeader, mut input: Input<'_>) -> Result<(), Errno> {
        let lookups = input.u64()?;
        self.table.forget(header.node, lookups);
        Ok(())
    }

    fn batch_forget(&mut self, mut input: Input<'_>) -> Result<(), Errno> {
        let count = input.u32()?;
        input.skip(4)?;
        for _ in 0..count {
            // The request's own length bounds this.
            let (node, lookups) = (input.u64()?, input.u64()?);
            self.table.forget(node, lookups);
        }
        Ok(())
    }

    pub(super) fn lookup_export(&mut self, name: &[u8]) -> Result<(u64, Statx), Errno> {
        let at = self.exports.iter().position(|export| export.name.as_bytes() == name).ok_or(Errno::NOENT)?;
        let export = &self.exports[at];
        let fd = rustix::io::fcntl_dupfd_cloexec(&export.fd, 0)?;
        self.table.insert(fd, at, export.read_only)
    }

    /// `struct fuse_attr` of the directory of exports.
    pub(super) fn put_root_attributes(&mut self, out: &mut Output) {
        // Its times are those of the first export, so that they are some.
        match stat(&self.exports[0].fd) {
            Ok(mut stat) => {
                stat.stx_mode = 0o040_755;
                stat.stx_uid = 0;
                stat.stx_gid = 0;
                stat.stx_nlink = 2;
                stat.stx_size = 0;
                stat.stx_blocks = 0;
                stat.stx_ino = 1;
                stat.stx_rdev_major = 0;
                stat.stx_rdev_minor = 0;
                self.put_attributes(&stat, out);
            }
            Err(_) => out.zeroes(88),
        }
    }
}

/// Serves a device until it hangs up.
///
/// # Errors
/// If the connection fails or what comes is no request.
pub fn serve(server: &mut Server, mut connection: impl Read + Write) -> Result<(), ServerError> {
    let mut request = Vec::new();
    let mut response = Vec::new();
    loop {
        let mut prefix = [0; 4];
        match connection.read_exact(&mut prefix) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(ServerError::Connection(error)),
        }
        let len = u32::from_le_bytes(prefix) as usize;
        if !(HEADER_BYTES..=MAX_FRAME_BYTES).contains(&len) {
            return Err(ServerError::Length(len));
        }
        request.resize(len, 0);
        connection.read_exact(&mut request).map_err(ServerError::Connection)?;
        let code = u32::from_le_bytes([request[4], request[5], request[6], request[7]]);
        response.clear();
        match server.handle(&request) {
            Some(bytes) => {
                response.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
                response.extend_from_slice(bytes);
            }
            // The device waits for an answer to whatever looks like a request.
            None if has_response(code) => {
                response.extend_from_slice(&16u32.to_le_bytes());
                response.extend_from_slice(&16u32.to_le_bytes());
                response.extend_from_slice(&(-Errno::INVAL.raw_os_error()).to_le_bytes());
                response.extend_from_slice(&request[8..16]);
            }
            None => continue,
        }
        connection.write_all(&response).map_err(ServerError::Connection)?;
    }
}
