//! A `caisson` of a test's own.
use crate::process::{Finished, finish, finish_with_input};
use rustix::fs::{FlockOperation, flock};
use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};
use tempfile::TempDir;

/// Guests that may run at once, over all tests of all processes.
const GUEST_SLOTS: usize = 2;

/// A store and a run directory that nobody else uses. Containers in them end with it.
pub struct Host {
    directory: TempDir,
}

/// The permission to run guests; one of [`GUEST_SLOTS`].
pub struct Guest(#[allow(dead_code, reason = "held for its lock")] File);

impl Host {
    /// An empty one.
    #[allow(clippy::new_without_default, reason = "it makes directories")]
    pub fn new() -> Self {
        Self { directory: tempfile::Builder::new().prefix("caisson-test-").tempdir().unwrap() }
    }

    /// The directory that all of it lies in; tests may put files beside it.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The run directory (`--root`).
    pub fn root(&self) -> PathBuf {
        self.directory.path().join("run")
    }

    /// The store.
    pub fn store(&self) -> PathBuf {
        self.directory.path().join("store")
    }

    /// Waits for the turn of a test with guests; `None`, said aloud, where there is no KVM.
    pub fn guest(&self, test: &str) -> Option<Guest> {
        if !Path::new("/dev/kvm").exists() {
            println!("{test}: skipped: no /dev/kvm");
            return None;
        }
        if let Some(file) = std::env::var_os("CAISSON_TEST_GUESTS") {
            let mut file = OpenOptions::new().append(true).open(file).unwrap();
            writeln!(file, "{test}").unwrap();
        }
        loop {
            for slot in 0..GUEST_SLOTS {
                let path = std::env::temp_dir().join(format!("caisson-test-guest-{slot}.lock"));
                let file = OpenOptions::new().create(true).append(true).open(path).unwrap();
                if flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
                    return Some(Guest(file));
                }
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// The command `caisson` with this store and run directory.
    pub fn command<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Command {
        let mut command = Command::new(binary("caisson"));
        command.env("CAISSON_STORE", self.store()).arg("--root").arg(self.root()).args(arguments);
        command
    }

    /// Runs `caisson` to its end.
    #[track_caller]
    pub fn caisson<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Finished {
        finish(&mut self.command(arguments))
    }

    /// Runs `caisson` with this input to its end.
    #[track_caller]
    pub fn caisson_with_input<'a>(&self, arguments: impl IntoIterator<Item = &'a str>, input: &[u8]) -> Finished {
        finish_with_input(&mut self.command(arguments), input)
    }

    /// Process ids of every process that has this host's directory in its arguments.
    pub fn processes(&self) -> Vec<(i32, String)> {
        let needle = self.directory.path().to_str().unwrap();
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else { continue };
            let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            if command.contains(needle) && pid != std::process::id() as i32 {
                found.push((pid, command));
            }
        }
        found
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let listed = self.command(["ps", "-aq"]).output();
        let listed = listed.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
        for container in listed.split_whitespace() {
            drop(self.command(["rm", "-f", container]).output());
        }
        let left = self.processes();
        for (pid, _) in &left {
            if let Some(pid) = rustix::process::Pid::from_raw(*pid) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
        if !left.is_empty() && !thread::panicking() {
            panic!("processes were left: {left:?}");
        }
    }
}

/// One of the project's binaries, built by the same `cargo test`.
pub(crate) fn binary(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let directory = test.parent().and_then(Path::parent).unwrap();
    let path = directory.join(name);
    assert!(path.exists(), "{} is not built: run `cargo build --release` first", path.display());
    path
}
