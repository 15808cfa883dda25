//! Processes with a deadline.
use std::{
    io::{Read, Write},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

/// No command of a test takes longer, however busy the machine is: a cold boot included.
const DEADLINE: Duration = Duration::from_secs(900);

/// What a command left.
#[derive(Debug)]
pub struct Finished {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error, as text.
    pub stderr: String,
}

impl Finished {
    /// The exit code; 128 + n where signal n ended it, as a shell has it.
    pub fn code(&self) -> i32 {
        use std::os::unix::process::ExitStatusExt;
        self.status.code().or(self.status.signal().map(|signal| 128 + signal)).expect("it ended")
    }

    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Fails the test unless the exit code is 0; gives standard output as text.
    #[track_caller]
    pub fn success(self) -> String {
        assert_eq!(self.code(), 0, "stdout: {}\nstderr: {}", self.text(), self.stderr);
        self.text()
    }

    /// Fails the test if the exit code is another one; gives standard error.
    #[track_caller]
    pub fn failure(self, code: i32) -> String {
        assert_eq!(self.code(), code, "stdout: {}\nstderr: {}", self.text(), self.stderr);
        self.stderr
    }
}

/// Runs a command without input to its end.
#[track_caller]
pub fn finish(command: &mut Command) -> Finished {
    command.stdin(Stdio::null());
    run(command, None)
}

/// Runs a command with this input to its end.
#[track_caller]
pub fn finish_with_input(command: &mut Command, input: &[u8]) -> Finished {
    command.stdin(Stdio::piped());
    run(command, Some(input.to_vec()))
}

#[track_caller]
fn run(command: &mut Command, input: Option<Vec<u8>>) -> Finished {
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let writer = input.map(|input| {
        let mut stdin = child.stdin.take().unwrap();
        // A program that does not want its input is not an error.
        thread::spawn(move || drop(stdin.write_all(&input)))
    });
    let stdout = drain(child.stdout.take().unwrap());
    let stderr = drain(child.stderr.take().unwrap());
    let status = wait(&mut child);
    if status.is_none() {
        drop(child.kill());
        drop(child.wait());
    }
    let (stdout, stderr) = (stdout.join().unwrap(), stderr.join().unwrap());
    let stderr = String::from_utf8_lossy(&stderr).into_owned();
    let Some(status) = status else {
        panic!("{command:?} did not end in {DEADLINE:?}: {}\n{stderr}", String::from_utf8_lossy(&stdout));
    };
    if let Some(writer) = writer {
        writer.join().unwrap();
    }
    Finished { status, stdout, stderr }
}

fn drain(mut from: impl Read + Send + 'static) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        drop(from.read_to_end(&mut bytes));
        bytes
    })
}

fn wait(child: &mut Child) -> Option<ExitStatus> {
    let end = Instant::now() + DEADLINE;
    while Instant::now() < end {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status);
        }
        thread::sleep(Duration::from_millis(10));
    }
    None
}
