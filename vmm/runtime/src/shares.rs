//! Paths of the host that a guest may see: a file server of its own (caisson-fs, jailed to them) behind one virtio-fs device.
use std::{
    fs,
    io::{self, Seek, Write},
    os::{
        fd::AsRawFd,
        unix::{net::UnixListener, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use caisson_agent_protocol::MountSource;
use caisson_machine::share::{Export, MAX_EXPORTS, ShareConfig};
use rustix::fs::{MemfdFlags, memfd_create};

use crate::{
    paths::{At, PathError},
    sandbox::monitor_program,
    spec::{HostPath, SpecError},
};

/// The device's tag.
pub const TAG: &str = "host";
/// The name of a bundle's root among the exports.
pub const ROOT: &str = "root";

/// What is shared with one guest.
#[derive(Debug, Default)]
pub struct Shares {
    exports: Vec<Export>,
}

impl Shares {
    /// Shares a container's root file system.
    pub fn add_root(&mut self, path: &Path, read_only: bool) {
        self.exports.push(Export { name: ROOT.into(), path: path.to_owned(), read_only });
    }

    /// Shares a path, and says how the guest mounts it.
    pub fn add(&mut self, host: HostPath) -> Result<MountSource, SpecError> {
        let refuse = |problem: String| SpecError::Value { field: format!("mount of {}", host.path.display()), problem };
        let metadata =
            fs::metadata(&host.path).map_err(|error| refuse(format!("the source cannot be used: {error}")))?;
        if !metadata.is_dir() && !metadata.is_file() {
            return Err(refuse("only directories and regular files can be shared with a guest".into()));
        }
        if let Some(known) =
            self.exports.iter().find(|export| export.path == host.path && export.read_only == host.read_only)
        {
            return Ok(MountSource::Share { tag: TAG.into(), path: known.name.clone() });
        }
        if self.exports.len() >= MAX_EXPORTS {
            return Err(refuse(format!("there are more than {MAX_EXPORTS} shared paths")));
        }
        let name = format!("m{}", self.exports.len());
        self.exports.push(Export { name: name.clone(), path: host.path, read_only: host.read_only });
        Ok(MountSource::Share { tag: TAG.into(), path: name })
    }

    /// Starts the server, if there is anything to serve; gives the socket that the monitor connects to. To be called from a thread that
    /// lives as long as the machine: the server dies with it.
    pub fn serve(&self, directory: &Path) -> Result<Option<Server>, PathError> {
        if self.exports.is_empty() {
            return Ok(None);
        }
        let socket = directory.join("share.sock");
        let listener = UnixListener::bind(&socket).at("listen on", &socket)?;
        let config = ShareConfig { exports: self.exports.clone(), attribute_timeout_ms: 250, entry_timeout_ms: 250 };
        let mut file: fs::File =
            memfd_create("caisson-fs", MemfdFlags::CLOEXEC).at("make the configuration of", &socket)?.into();
        let json = serde_json::to_vec(&config).map_err(io::Error::other).at("make the configuration of", &socket)?;
        file.write_all(&json).and_then(|()| file.rewind()).at("make the configuration of", &socket)?;
        let program = program();
        let inherited = [file.as_raw_fd(), listener.as_raw_fd()];
        let mut command = Command::new(&program);
        command.args(["--config-fd", &inherited[0].to_string(), "--listen-fd", &inherited[1].to_string()]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).current_dir("/");
        command.stderr(crate::sandbox::log_file(&directory.join("share.log"))?);
        #[allow(unsafe_code)] // The child inherits two descriptors.
        // SAFETY: only system calls between fork and exec.
        unsafe {
            command.pre_exec(move || {
                for descriptor in inherited {
                    if libc::fcntl(descriptor, libc::F_SETFD, 0) != 0 {
                        return Err(io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        let child = command.spawn().at("execute", program)?;
        Ok(Some(Server { child, socket }))
    }
}

/// The server's program: beside the monitor's.
fn program() -> PathBuf {
    monitor_program().map_or_else(|_| "caisson-fs".into(), |monitor| monitor.with_file_name("caisson-fs"))
}

/// A running file server; killed when dropped.
#[derive(Debug)]
pub struct Server {
    child: Child,
    /// Where it listens.
    pub socket: PathBuf,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_named_once_and_refused_with_a_reason() {
        let directory = tempfile::tempdir().unwrap();
        let mut shares = Shares::default();
        let host = |path: &Path| HostPath { path: path.to_owned(), read_only: true, recursive: false };
        let first = shares.add(host(directory.path())).unwrap();
        assert_eq!(first, MountSource::Share { tag: "host".into(), path: "m0".into() });
        assert_eq!(shares.add(host(directory.path())).unwrap(), first);
        assert!(shares.add(host(Path::new("/dev/null"))).unwrap_err().to_string().contains("/dev/null"));
        assert!(shares.add(host(&directory.path().join("none"))).is_err());
        assert!(Shares::default().serve(directory.path()).unwrap().is_none());
    }
}
