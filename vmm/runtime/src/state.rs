//! What is known of a container on disk: its frozen configuration, and its state.
//!
//! Each container has a directory (0700): for people's containers in the store, for an engine's below `--root`. The supervisor writes the
//! state while it lives; whether it lives is asked of the kernel each time, by PID and start time, and never believed from disk.
use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use oci_spec::runtime::Spec;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::paths::{At, PathError};

/// The name of the frozen configuration.
const CONFIG: &str = "container.json";
/// The name of the state.
const STATE: &str = "state.json";
/// The longest file that is read here: a configuration holds a spec, which holds a seccomp profile.
const MAX_FILE_BYTES: u64 = 8 << 20;

/// Why a container's files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A file operation failed.
    #[error(transparent)]
    Path(#[from] PathError),
    /// A file is not what this program writes.
    #[error("{} is damaged", .path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
    /// Another process works on the container.
    #[error("another process has held the lock of container {0} for too long")]
    Locked(String),
}

/// How far a container has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Its guest is being made.
    Creating,
    /// Everything is ready for its program.
    Created,
    /// Its program runs.
    Running,
    /// Its program is frozen.
    Paused,
    /// Its program ended, or never began.
    Stopped,
}

impl Status {
    /// Whether `start` makes sense.
    pub fn can_start(self) -> bool {
        self == Status::Created
    }

    /// Whether there is something to signal.
    pub fn can_kill(self) -> bool {
        matches!(self, Status::Created | Status::Running | Status::Paused)
    }

    /// Whether it can be deleted without force.
    pub fn can_delete(self) -> bool {
        self == Status::Stopped
    }

    /// The OCI's word, and runc's for paused.
    pub fn name(self) -> &'static str {
        match self {
            Status::Creating => "creating",
            Status::Created => "created",
            Status::Running => "running",
            Status::Paused => "paused",
            Status::Stopped => "stopped",
        }
    }
}

/// How a container's or exec's process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Exit {
    /// With this code.
    Code(u8),
    /// By this signal.
    Signal(u8),
}

impl Exit {
    /// The code that a shell would give: 128 and the signal's number.
    pub fn code(self) -> u8 {
        match self {
            Exit::Code(code) => code,
            Exit::Signal(signal) => 128_u8.saturating_add(signal),
        }
    }
}

/// A process by a name that is not used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessName {
    /// Its PID.
    pub pid: i32,
    /// Its start, in clock ticks since boot (proc(5), field 22 of stat).
    pub start: u64,
}

impl ProcessName {
    /// The name of a process that runs (a zombie does not).
    pub fn of(pid: i32) -> Option<ProcessName> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let mut fields = stat.get(stat.rfind(')')? + 2..)?.split(' ');
        let alive = !matches!(fields.next()?, "Z" | "X");
        alive.then_some(ProcessName { pid, start: fields.nth(18)?.parse().ok()? })
    }

    /// This process's own name.
    pub fn own() -> Option<ProcessName> {
        ProcessName::of(i32::try_from(std::process::id()).ok()?)
    }

    /// Whether it still runs.
    pub fn is_alive(self) -> bool {
        ProcessName::of(self.pid) == Some(self)
    }
}

/// What changes in a container's life.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// As last written; [`State::status`] knows better.
    pub status: Status,
    /// The supervisor.
    pub supervisor: Option<ProcessName>,
    /// The kernel's boot id when that was written: PIDs and start times repeat after a reboot.
    #[serde(default)]
    pub boot_id: String,
    /// When the program was started, RFC 3339.
    pub started: Option<String>,
    /// When it ended.
    pub finished: Option<String>,
    /// How it ended.
    pub exit: Option<Exit>,
    /// The guest's kernel killed something in it for want of memory.
    #[serde(default)]
    pub oom_killed: bool,
    /// What went wrong, if it did not end by itself.
    #[serde(default)]
    pub error: Option<String>,
    /// How often a restart policy has started it again.
    #[serde(default)]
    pub restarts: u32,
}

impl State {
    /// Of a container that has no process yet.
    pub fn new(status: Status) -> State {
        State {
            status,
            supervisor: None,
            boot_id: String::new(),
            started: None,
            finished: None,
            exit: None,
            oom_killed: false,
            error: None,
            restarts: 0,
        }
    }

    /// Whether its supervisor lives.
    pub fn is_alive(&self) -> bool {
        self.supervisor.is_some_and(ProcessName::is_alive) && self.boot_id == boot_id()
    }

    /// The status as it is now: without its supervisor, no container runs.
    pub fn status(&self) -> Status {
        match self.status {
            Status::Created if self.supervisor.is_none() => Status::Created,
            status if self.is_alive() => status,
            _ => Status::Stopped,
        }
    }
}

/// The kernel's boot id.
pub fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|id| id.trim().to_owned()).unwrap_or_default()
}

/// Where a container's root file system comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RootSource {
    /// EROFS blobs, lowest first, and a writable layer of that size in the container's directory.
    Image {
        /// Blobs.
        layers: Vec<PathBuf>,
        /// Size of the writable layer; 0 for none.
        upper_bytes: u64,
    },
    /// A directory of the host.
    Directory {
        /// Absolute path.
        path: PathBuf,
    },
}

/// The machine that a container gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Guest memory in MiB, the guest's own needs included.
    pub memory_mib: u32,
    /// Virtual CPUs.
    pub vcpus: u8,
}

/// What is fixed when a container is created.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Config {
    /// Its id.
    pub id: String,
    /// Its name among people; empty for an engine's.
    #[serde(default)]
    pub name: String,
    /// When it was created, RFC 3339.
    pub created: String,
    /// The image as the user named it.
    #[serde(default)]
    pub image: String,
    /// The image's id.
    #[serde(default)]
    pub image_id: String,
    /// An engine's bundle, absolute.
    #[serde(default)]
    pub bundle: PathBuf,
    /// The OCI configuration.
    pub spec: Spec,
    /// The user in the image's terms; None: the numbers of the configuration.
    #[serde(default)]
    pub user: Option<String>,
    /// Its root file system.
    pub root: RootSource,
    /// Its machine.
    pub shape: Shape,
    /// Boot instead of restoring a template.
    #[serde(default)]
    pub cold: bool,
    /// Standard input is a stream; otherwise it is /dev/null.
    #[serde(default)]
    pub stdin: bool,
    /// Keep output in a log.
    #[serde(default)]
    pub log: bool,
    /// Remove everything when it ends.
    #[serde(default)]
    pub auto_remove: bool,
    /// Start at once, or wait for `start`.
    #[serde(default)]
    pub auto_start: bool,
    /// What `stop` sends first.
    #[serde(default)]
    pub stop_signal: Option<u8>,
    /// Labels.
    #[serde(default)]
    pub labels: std::collections::BTreeMap<String, String>,
    /// Lines for /etc/hosts: address and name.
    #[serde(default)]
    pub extra_hosts: Vec<(String, String)>,
    /// Name servers for /etc/resolv.conf.
    #[serde(default)]
    pub dns: Vec<String>,
    /// no, on-failure[:N], always, unless-stopped.
    #[serde(default)]
    pub restart: String,
    /// AF_UNIX socket that wants the terminal's master (`--console-socket`).
    #[serde(default)]
    pub console_socket: Option<PathBuf>,
    /// `--pid-file` and other things of engines go through the verbs; this is the cgroup of the host, if the configuration names one.
    #[serde(default)]
    pub cgroup: Option<String>,
}

/// A container's directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Directory(PathBuf);

impl Directory {
    /// Names a directory; it need not exist.
    pub fn new(path: impl Into<PathBuf>) -> Directory {
        Directory(path.into())
    }

    /// Makes the directory, which must not exist.
    pub fn create(path: impl Into<PathBuf>) -> Result<Directory, StateError> {
        let path = path.into();
        make_directory(&path)?;
        Ok(Directory(path))
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The writable layer's image.
    pub fn upper(&self) -> PathBuf {
        self.0.join("upper.img")
    }

    /// The log of its output.
    pub fn log(&self) -> PathBuf {
        self.0.join("log.json")
    }

    /// Reads the configuration.
    pub fn config(&self) -> Result<Config, StateError> {
        read(&self.0.join(CONFIG))
    }

    /// Writes the configuration.
    pub fn write_config(&self, config: &Config) -> Result<(), StateError> {
        write(&self.0.join(CONFIG), config)
    }

    /// Reads the state.
    pub fn state(&self) -> Result<State, StateError> {
        read(&self.0.join(STATE))
    }

    /// Writes the state.
    pub fn write_state(&self, state: &State) -> Result<(), StateError> {
        write(&self.0.join(STATE), state)
    }

    /// Takes the container's lock for a verb that changes it; it is released when the file is dropped.
    pub fn lock(&self) -> Result<File, StateError> {
        lock_file(&self.0.join("lock"))
    }

    /// Removes the directory and all that is in it.
    pub fn remove(&self) -> Result<(), StateError> {
        match fs::remove_dir_all(&self.0) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            result => Ok(result.at("remove", &self.0)?),
        }
    }
}

/// Makes a directory that must not exist, for this user only.
pub(crate) fn make_directory(path: &Path) -> Result<(), PathError> {
    if let Some(parent) = path.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(parent).at("create the directory", parent)?;
    }
    fs::DirBuilder::new().mode(0o700).create(path).at("create the directory", path)
}

/// Opens a lock file and takes its lock, waiting for who has it.
pub fn lock_file(path: &Path) -> Result<File, StateError> {
    let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path).at("open", path)?;
    flock(&file, FlockOperation::LockExclusive).at("lock", path)?;
    Ok(file)
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<T, StateError> {
    let length = fs::metadata(path).at("read", path)?.len();
    if length > MAX_FILE_BYTES {
        let error = std::io::Error::other(format!("it has {length} bytes, more than {MAX_FILE_BYTES}"));
        return Err(StateError::Path(PathError { action: "read", path: path.to_owned(), source: error }));
    }
    let text = fs::read(path).at("read", path)?;
    serde_json::from_slice(&text).map_err(|source| StateError::Damaged { path: path.to_owned(), source })
}

/// Writes a file so that whoever reads it finds the old or the new content, whatever happens to this process.
pub(crate) fn write<T: Serialize>(path: &Path, value: &T) -> Result<(), StateError> {
    let text =
        serde_json::to_vec_pretty(value).map_err(|source| StateError::Damaged { path: path.to_owned(), source })?;
    let temporary = path.with_extension(format!("tmp{}", std::process::id()));
    let written = (|| {
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&temporary)
            .at("create", &temporary)?;
        file.write_all(&text).at("write", &temporary)?;
        file.sync_data().at("write back", &temporary)?;
        fs::rename(&temporary, path).at("rename into place", path)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    Ok(written?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_pid_and_start() {
        let own = ProcessName::own().unwrap();
        assert!(own.is_alive());
        assert!(!ProcessName { start: own.start + 1, ..own }.is_alive());
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        assert_eq!(ProcessName::of(child.id() as i32), None);
    }

    #[test]
    fn without_its_supervisor_nothing_runs() {
        let mut state = State::new(Status::Running);
        assert_eq!(state.status(), Status::Stopped);
        state.supervisor = ProcessName::own();
        state.boot_id = boot_id();
        assert_eq!(state.status(), Status::Running);
        state.boot_id = "another boot".into();
        assert_eq!(state.status(), Status::Stopped);
        assert_eq!(State::new(Status::Created).status(), Status::Created);
    }

    #[test]
    fn files_are_replaced_whole() {
        let temporary = tempfile::tempdir().unwrap();
        let directory = Directory::create(temporary.path().join("a/b")).unwrap();
        assert!(Directory::create(directory.path()).is_err());
        let state = State { exit: Some(Exit::Signal(9)), ..State::new(Status::Stopped) };
        directory.write_state(&state).unwrap();
        directory.write_state(&state).unwrap();
        assert_eq!(directory.state().unwrap(), state);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
        fs::write(directory.path().join("state.json"), "{").unwrap();
        assert!(matches!(directory.state(), Err(StateError::Damaged { .. })));
        directory.remove().unwrap();
        directory.remove().unwrap();
    }

    #[test]
    fn exit_codes_are_a_shell_s() {
        assert_eq!(Exit::Code(7).code(), 7);
        assert_eq!(Exit::Signal(9).code(), 137);
        assert_eq!(Exit::Signal(255).code(), 255);
    }
}
