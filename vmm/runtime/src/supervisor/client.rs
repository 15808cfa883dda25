//! The other side of a supervisor: how commands start one and talk to it.
use std::{
    fs, io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::{net::UnixStream, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use super::{
    SOCKET,
    wire::{self, Answer, Receiver, Request},
};
use crate::{
    container::run_directory,
    paths::{At, PathError, Paths},
    state::{Directory, StateError},
};

/// Why a supervisor cannot be started or used.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// A file operation failed.
    #[error(transparent)]
    Path(#[from] PathError),
    /// The container's files cannot be read.
    #[error(transparent)]
    State(#[from] StateError),
    /// The connection broke.
    #[error("the connection to the container's supervisor broke")]
    Connection(#[source] io::Error),
    /// The supervisor went without a word.
    #[error("the container's supervisor died{0}")]
    Died(String),
    /// It cannot do what it was asked for.
    #[error("{message}")]
    Refused {
        /// Why.
        message: String,
        /// docker's exit code for it.
        code: u8,
    },
    /// There is nobody to ask.
    #[error("container {0} is not running")]
    NotRunning(String),
}

/// How to start a supervisor.
#[derive(Debug)]
pub struct Launch<'a> {
    /// The container.
    pub directory: &'a Directory,
    /// Where things are.
    pub paths: &'a Paths,
    /// Give the container this process's stdio; else it gets none.
    pub stdio: bool,
    /// When the command began, on the monotonic clock.
    pub request_ns: u64,
}

/// A connection to a supervisor.
#[derive(Debug)]
pub struct Client {
    receiver: Receiver,
    child: Option<Child>,
}

/// Starts a supervisor for a container that has none. Its first answer is Created, Started or Error, after any number of Progress.
pub fn launch(launch: &Launch<'_>) -> Result<Client, ClientError> {
    let (ours, theirs) = UnixStream::pair().map_err(ClientError::Connection)?;
    let own = own_program()?;
    let mut command = Command::new(&own);
    let theirs_fd = theirs.as_raw_fd();
    command
        .arg("supervise")
        .arg("--directory")
        .arg(launch.directory.path())
        .arg("--run")
        .arg(&launch.paths.run)
        .args(["--channel", &theirs_fd.to_string(), "--request-ns", &launch.request_ns.to_string()])
        .env("CAISSON_STORE", &launch.paths.store)
        .env("CAISSON_CACHE", &launch.paths.cache);
    if launch.stdio {
        command.arg("--stdio");
    } else {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    }
    #[allow(unsafe_code)] // The child inherits one descriptor and leaves the caller's session.
    // SAFETY: only system calls between fork and exec.
    unsafe {
        command.pre_exec(move || {
            if libc::fcntl(theirs_fd, libc::F_SETFD, 0) != 0 || libc::setsid() < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let child = command.spawn().at("execute", own)?;
    Ok(Client { receiver: Receiver::new(ours), child: Some(child) })
}

/// This program, even when its file has been replaced since.
fn own_program() -> Result<PathBuf, PathError> {
    let path = std::env::current_exe().at("find", "this program's own path")?;
    Ok(if path.exists() { path } else { "/proc/self/exe".into() })
}

impl Client {
    /// Connects to the supervisor of a container that runs.
    pub fn connect(paths: &Paths, directory: &Directory) -> Result<Client, ClientError> {
        let path = socket(&paths.run, directory.path());
        match UnixStream::connect(&path) {
            Ok(stream) => Ok(Client { receiver: Receiver::new(stream), child: None }),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                let name = directory.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
                Err(ClientError::NotRunning(name))
            }
            Err(source) => Err(PathError { action: "connect to", path, source }.into()),
        }
    }

    /// Asks for something that is answered once.
    pub fn ask(&mut self, request: &Request) -> Result<Answer, ClientError> {
        self.send(request, &[])?;
        self.answer()
    }

    /// Sends a request with descriptors.
    pub fn send(&self, request: &Request, descriptors: &[BorrowedFd<'_>]) -> Result<(), ClientError> {
        wire::send(self.receiver.stream(), request, descriptors).map_err(ClientError::Connection)
    }

    /// The next answer; a refusal is an error.
    pub fn answer(&mut self) -> Result<Answer, ClientError> {
        match self.receiver.receive().map_err(ClientError::Connection)? {
            Some(Answer::Error { message, code }) => Err(ClientError::Refused { message, code }),
            Some(answer) => Ok(answer),
            None => Err(ClientError::Died(self.death())),
        }
    }

    /// The connection, to send on it from elsewhere.
    pub fn stream(&self) -> io::Result<UnixStream> {
        self.receiver.stream().try_clone()
    }

    /// The supervisor's PID, if this process started it.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Reaps the supervisor, if this process started it.
    pub fn reap(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.wait();
        }
    }

    fn death(&mut self) -> String {
        self.child.as_mut().and_then(|child| child.wait().ok()).map(|status| format!(" ({status})")).unwrap_or_default()
    }
}

/// Where a container's supervisor listens.
pub(super) fn socket(run: &Path, directory: &Path) -> PathBuf {
    run_directory(run, directory).join(SOCKET)
}

/// Clears away what a supervisor that was killed has left in the run directory.
pub fn clear(paths: &Paths, directory: &Directory) -> Result<(), PathError> {
    let path = run_directory(&paths.run, directory.path());
    match fs::remove_dir_all(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.at("remove", path),
    }
}

/// This process's stdio, as descriptors that can be passed.
pub fn own_stdio() -> io::Result<[OwnedFd; 3]> {
    Ok([
        io::stdin().as_fd().try_clone_to_owned()?,
        io::stdout().as_fd().try_clone_to_owned()?,
        io::stderr().as_fd().try_clone_to_owned()?,
    ])
}
