//! Streams of a process: pumps between descriptors of the host and vsock connections to the agent.
//!
//! Output goes to any number of sinks and to a log; a sink that fails is dropped, the program never notices. Input comes from one
//! source at a time. Half-close works in both directions: the end of the source shuts the connection, and the other way round.
use std::{
    fs::File,
    io::{self, Read, Write},
    net::Shutdown,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use crate::logs;

/// Bytes moved at once.
const BUFFER_BYTES: usize = 64 * 1024;

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A log that both output streams write to.
pub type SharedLog = Arc<Mutex<logs::Writer>>;

/// An output stream.
#[derive(Debug, Default)]
pub struct Output {
    sinks: Mutex<Vec<File>>,
}

impl Output {
    /// Adds a sink.
    pub fn add(&self, sink: OwnedFd) {
        lock(&self.sinks).push(File::from(sink));
    }

    /// Copies from the agent until its end. `first` is called before the first byte is passed on.
    pub fn pump(
        self: &Arc<Self>,
        mut from: UnixStream,
        log: Option<(SharedLog, &'static str)>,
        mut first: impl FnMut() + Send + 'static,
    ) -> io::Result<JoinHandle<()>> {
        let output = Arc::clone(self);
        thread::Builder::new().name("output".into()).spawn(move || {
            let mut buffer = vec![0; BUFFER_BYTES];
            let mut lines = logs::Lines::default();
            let mut begun = false;
            loop {
                let count = match from.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(count) => count,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(_) => break,
                };
                if !std::mem::replace(&mut begun, true) {
                    first();
                }
                let bytes = &buffer[..count];
                lock(&output.sinks).retain_mut(|sink| write_all(sink, bytes).is_ok());
                if let Some((log, stream)) = &log {
                    let _ = lines.push(bytes, stream, &mut lock(log));
                }
            }
            if let Some((log, stream)) = &log {
                let _ = lines.finish(stream, &mut lock(log));
            }
            // Whoever reads the other ends sees the end now, not when this process ends.
            lock(&output.sinks).clear();
        })
    }
}

/// Writes to a descriptor that may have been made non-blocking by someone else who has it.
fn write_all(sink: &mut File, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match sink.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => bytes = &bytes[count..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                poll(&mut [PollFd::new(&*sink, PollFlags::OUT)], None)?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// An input stream to the agent.
#[derive(Debug)]
pub struct Input {
    to: UnixStream,
    /// Ends the pump that reads the present source.
    stop: Arc<OwnedFd>,
}

impl Input {
    /// Of this connection.
    pub fn new(to: UnixStream) -> io::Result<Input> {
        Ok(Input { to, stop: Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?) })
    }

    /// Copies from a source until its end, which becomes the program's end of input if `close` says so.
    pub fn pump(&self, source: OwnedFd, close: bool) -> io::Result<()> {
        let mut to = self.to.try_clone()?;
        let stop = Arc::clone(&self.stop);
        thread::Builder::new().name("input".into()).spawn(move || {
            let ended = copy_until_stopped(File::from(source), &mut to, stop.as_fd());
            if close && matches!(ended, Ok(Ended::Source)) {
                let _ = to.shutdown(Shutdown::Write);
            }
        })?;
        Ok(())
    }

    /// The program's end of input.
    pub fn close(&self) {
        let _ = self.to.shutdown(Shutdown::Write);
    }

    /// Stops all pumps: nothing is read from their sources any more.
    pub fn stop(&self) {
        let _ = rustix::io::write(&*self.stop, &1_u64.to_ne_bytes());
    }
}

enum Ended {
    /// No more comes.
    Source,
    /// Nobody wants it any more.
    Stopped,
}

fn copy_until_stopped(mut source: File, to: &mut UnixStream, stop: impl AsFd) -> io::Result<Ended> {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        {
            let hangup = to.try_clone()?;
            let mut ready = [
                PollFd::new(&source, PollFlags::IN),
                PollFd::new(&stop, PollFlags::IN),
                PollFd::new(&hangup, PollFlags::empty()),
            ];
            match poll(&mut ready, None) {
                Err(rustix::io::Errno::INTR) => continue,
                result => result?,
            };
            if !ready[1].revents().is_empty() || !ready[2].revents().is_empty() {
                return Ok(Ended::Stopped);
            }
        }
        match source.read(&mut buffer) {
            Ok(0) => return Ok(Ended::Source),
            Ok(count) => to.write_all(&buffer[..count])?,
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
            Err(_) => return Ok(Ended::Source),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_reaches_every_sink_and_the_log_and_ends() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let log = Arc::new(Mutex::new(logs::Writer::open(&path, 1 << 20).unwrap()));
        let (mut agent, host) = UnixStream::pair().unwrap();
        let (sink, mut end) = UnixStream::pair().unwrap();
        let (dead, gone) = UnixStream::pair().unwrap();
        drop(gone);
        let output = Arc::new(Output::default());
        output.add(dead.into());
        output.add(sink.into());
        let pump = output.pump(host, Some((log, "stdout")), || {}).unwrap();
        let binary: Vec<u8> = (0..=255).cycle().take(300_000).collect();
        let expected = binary.clone();
        let writer = thread::spawn(move || agent.write_all(&binary));
        let mut received = Vec::new();
        end.read_to_end(&mut received).unwrap();
        assert_eq!(received, expected);
        writer.join().unwrap().unwrap();
        pump.join().unwrap();
        assert!(path.metadata().unwrap().len() > 0);
    }

    #[test]
    fn input_half_closes_and_can_be_stopped() {
        let (mut agent, host) = UnixStream::pair().unwrap();
        let input = Input::new(host).unwrap();
        let (mut user, source) = UnixStream::pair().unwrap();
        input.pump(source.into(), true).unwrap();
        user.write_all(b"hello").unwrap();
        drop(user);
        let mut received = String::new();
        agent.read_to_string(&mut received).unwrap();
        assert_eq!(received, "hello");
        agent.write_all(b"the other direction is open").unwrap();

        let (agent, host) = UnixStream::pair().unwrap();
        let input = Input::new(host).unwrap();
        let (mut user, source) = UnixStream::pair().unwrap();
        input.pump(source.into(), true).unwrap();
        input.stop();
        // The pump drops its end of the source.
        let mut nothing = Vec::new();
        assert_eq!(user.read_to_end(&mut nothing).unwrap(), 0);
        drop(agent);
    }
}
