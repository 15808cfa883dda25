//! Failures, as the host gets to see them.
use alloc::{format, string::String};
use caisson_agent_protocol::{AgentError, ErrorKind};
use rustix::io::Errno;

pub(crate) type Result<T, E = AgentError> = core::result::Result<T, E>;

/// An error of a kind.
pub(crate) fn error(kind: ErrorKind, message: impl Into<String>) -> AgentError {
    AgentError { kind, message: message.into() }
}

/// What an error number means, for those that are to be expected.
pub(crate) fn describe(errno: Errno) -> String {
    let text = match errno {
        Errno::PERM => "operation not permitted",
        Errno::NOENT => "no such file or directory",
        Errno::IO => "input/output error",
        Errno::NXIO => "no such device or address",
        Errno::TOOBIG => "argument list too long",
        Errno::NOEXEC => "exec format error",
        Errno::AGAIN => "resource temporarily unavailable",
        Errno::NOMEM => "out of memory",
        Errno::ACCESS => "permission denied",
        Errno::BUSY => "device or resource busy",
        Errno::EXIST => "file exists",
        Errno::NODEV => "no such device",
        Errno::NOTDIR => "not a directory",
        Errno::ISDIR => "is a directory",
        Errno::INVAL => "invalid argument",
        Errno::MFILE => "too many open files",
        Errno::NOSPC => "no space left on device",
        Errno::ROFS => "read-only file system",
        Errno::NAMETOOLONG => "file name too long",
        Errno::NOSYS => "not implemented by the guest's kernel",
        Errno::LOOP => "too many levels of symbolic links",
        Errno::OPNOTSUPP => "not supported",
        Errno::TIMEDOUT => "timed out",
        Errno::TXTBSY => "text file busy",
        _ => return format!("error {}", errno.raw_os_error()),
    };
    text.into()
}

/// Says what was being done when a system call failed.
pub(crate) trait Context<T> {
    /// The message is `what`, then the error.
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Context<T> for rustix::io::Result<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|errno| error(ErrorKind::System, format!("{}: {}", what(), describe(errno))))
    }
}
