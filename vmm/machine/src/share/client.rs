//! Spawns a file server.
use super::ShareConfig;
use crate::client::{memory_file, prepare_child};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// Why a file server is not there.
#[derive(Debug, thiserror::Error)]
pub enum FileServerError {
    /// The configuration could not be handed over.
    #[error("cannot set up the channels to the file server")]
    Channels(#[source] io::Error),
    /// There is no socket for the device to connect to.
    #[error("cannot listen on {}", path.display())]
    Listen {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The program could not be started.
    #[error("cannot start the file server {}", exe.display())]
    Spawn {
        /// The program.
        exe: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A running file server. It ends when its device hangs up; dropping this kills it.
#[derive(Debug)]
pub struct FileServer {
    child: Child,
    socket: PathBuf,
}

impl FileServer {
    /// Starts `exe` (the `caisson-fs` binary), which the device of a [`crate::config::Share`] with this `socket` finds
    /// listening. The socket must not exist, and its path have less than 108 bytes.
    ///
    /// The server is killed when the *thread* that called this ends: call it from one that lives as long as the machine.
    ///
    /// # Errors
    /// If the socket cannot be made or the program cannot be started. What is wrong with an export the server says on
    /// `stderr` (the caller's own if there is none), and ends.
    pub fn spawn(
        exe: &Path,
        config: &ShareConfig,
        socket: &Path,
        stderr: Option<Stdio>,
    ) -> Result<Self, FileServerError> {
        let json = serde_json::to_vec(config).map_err(|error| FileServerError::Channels(error.into()))?;
        let config_file = memory_file(&json).map_err(FileServerError::Channels)?;
        let listener =
            UnixListener::bind(socket).map_err(|source| FileServerError::Listen { path: socket.to_owned(), source })?;
        let mut command = Command::new(exe);
        command
            .args(["--config-fd", &config_file.as_raw_fd().to_string()])
            .args(["--listen-fd", &listener.as_raw_fd().to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .current_dir("/");
        if let Some(stderr) = stderr {
            command.stderr(stderr);
        }
        let inherited = [config_file.as_raw_fd(), listener.as_raw_fd()];
        let parent = std::process::id();
        #[allow(unsafe_code, reason = "the child is prepared between fork and exec")]
        // SAFETY: it makes async-signal-safe system calls only, and allocates nothing.
        unsafe {
            command.pre_exec(move || prepare_child(inherited, parent));
        }
        let child = command.spawn().map_err(|source| {
            let _ = std::fs::remove_file(socket);
            FileServerError::Spawn { exe: exe.to_owned(), source }
        })?;
        Ok(Self { child, socket: socket.to_owned() })
    }

    /// The server's process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for FileServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.socket);
    }
}
