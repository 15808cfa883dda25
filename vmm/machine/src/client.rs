//! Spawns a monitor process and drives it over its control channel.
//!
//! ```no_run
//! # use caisson_machine::{client::*, config::*};
//! # use std::time::{Duration, Instant};
//! # fn f() -> Result<(), ClientError> {
//! let config = MachineConfig::new("/boot/vmlinux", 128, KvmKind::Hardware);
//! let monitor = Monitor::spawn("/usr/bin/caisson-vmm".as_ref(), &config, SpawnOptions::default())?;
//! let event = monitor.wait_event(Some(Instant::now() + Duration::from_secs(10)))?;
//! monitor.pause(Instant::now() + Duration::from_secs(10))?;
//! # Ok(()) }
//! ```

use crate::config::{ConfigError, MachineConfig};
use crate::control::{Event, LineReader, Message, Reply, Request, write_line};
use crate::snapshot::{MEMORY_NAME, STATE_NAME};
use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, Write};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// How many events wait to be fetched: a monitor sends two in its life.
const MAX_EVENTS: usize = 16;
/// How long a monitor that was asked to quit has before it is killed.
const QUIT_GRACE: Duration = Duration::from_secs(2);

/// Why a monitor could not be started or driven.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The configuration is invalid.
    #[error("invalid machine configuration")]
    Config(#[from] ConfigError),
    /// The configuration could not be handed over.
    #[error("cannot set up the channels to the monitor")]
    Channels(#[source] io::Error),
    /// The program could not be started.
    #[error("cannot start the monitor {exe}")]
    Spawn {
        /// The program.
        exe: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// There is no place for a snapshot.
    #[error("cannot create a snapshot in {}", directory.display())]
    Target {
        /// Where it was to be.
        directory: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The control channel cannot be written.
    #[error("cannot send a request to the monitor")]
    Send(#[source] io::Error),
    /// The monitor refused or failed.
    #[error("the monitor cannot {request}: {message}")]
    Refused {
        /// What was asked for.
        request: &'static str,
        /// What it said.
        message: String,
    },
    /// Nothing was heard in time.
    #[error("the monitor did not {what} in time")]
    Deadline {
        /// What was waited for.
        what: &'static str,
    },
    /// The monitor went without a word, or its channel is broken.
    #[error("the monitor died ({status}){detail}")]
    Died {
        /// Its exit status.
        status: String,
        /// What was wrong with the channel, if anything.
        detail: String,
    },
}

/// How to start a monitor.
#[derive(Debug, Default)]
pub struct SpawnOptions {
    /// Where its standard error goes; `None` is where the caller's goes.
    pub stderr: Option<File>,
}

/// A running monitor. It can be used from several threads. Dropping it kills the monitor.
#[derive(Debug)]
pub struct Monitor {
    pid: u32,
    child: Mutex<Child>,
    /// Also serialises requests: one is outstanding at a time.
    sender: Mutex<UnixStream>,
    inbox: Arc<Inbox>,
}

#[derive(Debug, Default)]
struct Inbox {
    state: Mutex<InboxState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct InboxState {
    events: VecDeque<Event>,
    replies: VecDeque<Reply>,
    /// Replies that nobody waits for any more, because their deadline passed.
    orphans: usize,
    /// The channel ended, with what was wrong with it.
    closed: Option<String>,
}

impl Monitor {
    /// Starts `exe` (the `caisson-vmm` binary) as the machine `config`.
    ///
    /// The monitor ends when its end of the control channel does: when this value is dropped or this process dies. As a
    /// second line it is killed when the *thread* that called this ends (`PR_SET_PDEATHSIG`): call it from one that lives
    /// as long as the machine, such as the main thread.
    ///
    /// # Errors
    /// The configuration is invalid, or the process cannot be started. What fails later comes as [`Event::Ended`].
    pub fn spawn(exe: &Path, config: &MachineConfig, options: SpawnOptions) -> Result<Self, ClientError> {
        let json = config.to_json()?;
        let config_file = memory_file(&json).map_err(ClientError::Channels)?;
        let (ours, theirs) = UnixStream::pair().map_err(ClientError::Channels)?;
        let receiver = ours.try_clone().map_err(ClientError::Channels)?;
        let mut command = Command::new(exe);
        command
            .arg("--config-fd")
            .arg(config_file.as_raw_fd().to_string())
            .arg("--control-fd")
            .arg(theirs.as_raw_fd().to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .current_dir("/");
        if let Some(stderr) = options.stderr {
            command.stderr(stderr);
        }
        let inherited = [config_file.as_raw_fd(), theirs.as_raw_fd()];
        let parent = std::process::id();
        // SAFETY: between fork and exec only async-signal-safe system calls are made, and nothing is allocated.
        unsafe {
            command.pre_exec(move || prepare_child(inherited, parent));
        }
        let child = command.spawn().map_err(|source| ClientError::Spawn { exe: exe.to_owned(), source })?;
        let pid = child.id();
        let inbox = Arc::new(Inbox::default());
        let reader_inbox = Arc::clone(&inbox);
        let started = thread::Builder::new()
            .name("monitor-inbox".into())
            .spawn(move || reader_inbox.fill_from(receiver))
            .map_err(ClientError::Channels);
        let monitor = Self { pid, child: Mutex::new(child), sender: Mutex::new(ours), inbox };
        started?;
        Ok(monitor)
    }

    /// The monitor's process id. It stays its own until [`Monitor::wait`] or a drop, as it is not reaped before.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Stops the vCPUs and devices at an exact point.
    ///
    /// # Errors
    /// The monitor refuses, is gone, or does not answer by the deadline.
    pub fn pause(&self, deadline: Instant) -> Result<(), ClientError> {
        self.request("pause", &Request::Pause, deadline)
    }

    /// Lets a paused machine go on.
    ///
    /// # Errors
    /// As [`Monitor::pause`].
    pub fn resume(&self, deadline: Instant) -> Result<(), ClientError> {
        self.request("resume", &Request::Resume, deadline)
    }

    /// Writes a snapshot of the paused machine into `directory`, which must not exist or be empty.
    ///
    /// # Errors
    /// As [`Monitor::pause`]; a machine that runs, or a directory that cannot be written.
    pub fn snapshot(&self, directory: &Path, deadline: Instant) -> Result<(), ClientError> {
        let target = |source| ClientError::Target { directory: directory.to_owned(), source };
        let mut builder = std::fs::DirBuilder::new();
        match builder.mode(0o700).create(directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(target(error)),
            _ => {}
        }
        let paths = [directory.join(STATE_NAME), directory.join(MEMORY_NAME)];
        let mut files = Vec::new();
        for path in &paths {
            let mut options = OpenOptions::new();
            options.write(true).create_new(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
            files.push(options.open(path).map_err(target)?);
        }
        let request = Request::Snapshot { directory: directory.to_owned() };
        let fds: Vec<_> = files.iter().map(AsRawFd::as_raw_fd).collect();
        let result = self.request_with_files("snapshot", &request, &fds, deadline);
        if result.is_err() {
            for path in &paths {
                // What is left is refused as truncated when it is used.
                let _ = std::fs::remove_file(path);
            }
        }
        result
    }

    /// Ends the monitor: asks, waits two seconds at most, kills, and reaps. Safe to call again.
    ///
    /// # Errors
    /// The process cannot be waited for.
    pub fn quit(&self) -> Result<ExitStatus, ClientError> {
        let _ = self.request("quit", &Request::Quit, Instant::now() + QUIT_GRACE);
        let _ = lock(&self.sender).shutdown(std::net::Shutdown::Write);
        let deadline = Instant::now() + QUIT_GRACE;
        while Instant::now() < deadline {
            if let Ok(Some(status)) = lock(&self.child).try_wait() {
                return Ok(status);
            }
            thread::sleep(Duration::from_millis(2));
        }
        self.kill()
    }

    /// Kills the monitor with SIGKILL and reaps it. Safe to call again.
    ///
    /// # Errors
    /// The process cannot be waited for.
    pub fn kill(&self) -> Result<ExitStatus, ClientError> {
        let mut child = lock(&self.child);
        let _ = child.kill();
        child.wait().map_err(ClientError::Channels)
    }

    /// The next event. `None` as deadline waits for ever.
    ///
    /// # Errors
    /// [`ClientError::Deadline`] when it passed; [`ClientError::Died`] when the monitor is gone and all events were
    /// fetched.
    pub fn wait_event(&self, deadline: Option<Instant>) -> Result<Event, ClientError> {
        self.wait_for("report", deadline, |state| state.events.pop_front())
    }

    fn request(&self, name: &'static str, request: &Request, deadline: Instant) -> Result<(), ClientError> {
        self.request_with_files(name, request, &[], deadline)
    }

    fn request_with_files(
        &self,
        name: &'static str,
        request: &Request,
        files: &[RawFd],
        deadline: Instant,
    ) -> Result<(), ClientError> {
        let sender = lock(&self.sender);
        let mut line = Vec::new();
        write_line(&mut line, request).map_err(ClientError::Send)?;
        // One byte is sent at least, and the files with it.
        let sent = sender.send_with_fds(&[&line[..]], files);
        let sent = sent.map_err(|e| ClientError::Send(io::Error::from_raw_os_error(e.errno())))?;
        (&*sender).write_all(&line[sent..]).map_err(ClientError::Send)?;
        match self.wait_for(name, Some(deadline), |state| state.replies.pop_front()) {
            Ok(Reply::Done) => Ok(()),
            Ok(Reply::Error { message }) => Err(ClientError::Refused { request: name, message }),
            Err(error) => {
                lock(&self.inbox.state).orphans += 1;
                Err(error)
            }
        }
    }

    fn wait_for<T>(
        &self,
        what: &'static str,
        deadline: Option<Instant>,
        mut take: impl FnMut(&mut InboxState) -> Option<T>,
    ) -> Result<T, ClientError> {
        let mut state = lock(&self.inbox.state);
        loop {
            if let Some(value) = take(&mut state) {
                return Ok(value);
            }
            if let Some(detail) = state.closed.clone() {
                drop(state);
                return Err(ClientError::Died { status: self.status_text(), detail });
            }
            state = match deadline {
                None => self.inbox.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(ClientError::Deadline { what });
                    }
                    self.inbox.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    /// The exit status in words. Its channel is closed, so it is about to exit, or is made to.
    fn status_text(&self) -> String {
        for _ in 0..500 {
            if let Ok(Some(status)) = lock(&self.child).try_wait() {
                return status.to_string();
            }
            thread::sleep(Duration::from_millis(2));
        }
        self.kill().map_or_else(|e| e.to_string(), |s| s.to_string())
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

impl Inbox {
    /// Reads until the channel ends. The thread ends with the monitor, whose death closes the channel.
    fn fill_from(&self, stream: UnixStream) {
        let mut lines = LineReader::new(stream);
        let problem = loop {
            let line = match lines.next_line() {
                Ok(Some(line)) => line,
                Ok(None) => break String::new(),
                Err(error) => break format!(": its control channel broke: {error}"),
            };
            let mut state = lock(&self.state);
            match serde_json::from_slice(&line) {
                Ok(Message::Event(event)) if state.events.len() < MAX_EVENTS => state.events.push_back(event),
                Ok(Message::Reply(_)) if state.orphans > 0 => state.orphans -= 1,
                Ok(Message::Reply(reply)) if state.replies.len() < MAX_EVENTS => state.replies.push_back(reply),
                Ok(_) => break ": it sends without being asked".to_owned(),
                Err(error) => break format!(": it sent what is not a message: {error}"),
            }
            self.changed.notify_all();
        };
        lock(&self.state).closed = Some(problem);
        self.changed.notify_all();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An anonymous file with these bytes, to be read from its start.
pub(crate) fn memory_file(bytes: &[u8]) -> io::Result<File> {
    // SAFETY: the name is a valid C string; the result is checked.
    let fd = unsafe { libc::memfd_create(c"caisson-machine".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    let mut file = unsafe { File::from_raw_fd(fd) };
    file.write_all(bytes)?;
    file.rewind()?;
    Ok(file)
}

/// In the child, before exec: nothing is inherited but the two channels, and it dies with its parent.
pub(crate) fn prepare_child(inherited: [i32; 2], parent: u32) -> io::Result<()> {
    // SAFETY: plain system calls with constant or checked arguments, no memory is passed.
    unsafe {
        if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
            return Err(io::Error::last_os_error());
        }
        // The parent may have died before the line above.
        if u32::try_from(libc::getppid()) != Ok(parent) {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        // Other threads of the parent may have opened files that are to be inherited by their children, not by this.
        if libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) != 0 {
            return Err(io::Error::last_os_error());
        }
        for fd in inherited {
            if libc::fcntl(fd, libc::F_SETFD, 0) != 0 {
                return Err(io::Error::last_os_error());
            }
        }
    }
    Ok(())
}
