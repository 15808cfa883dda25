//! The host's side of the control connection: requests with deadlines, replies by number, events as they come.
//!
//! The guest is not trusted: a reply that nobody waits for or a frame that cannot be decoded ends the connection, and with it every
//! request that is under way.
use std::{
    collections::HashMap,
    io::{self, Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use caisson_agent_protocol::{
    AgentError, Decoder, ErrorKind, Event, FrameError, FromAgent, Reply, Request, ToAgent, VERSION, encode,
};

/// Bytes read at once from the control connection.
const READ_BYTES: usize = 16 * 1024;

/// Why a request to the agent failed.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// The agent refused.
    #[error("{}", .0.message)]
    Agent(AgentError),
    /// The request cannot be sent.
    #[error("cannot send {request} to the agent")]
    Send {
        /// Which request.
        request: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The request does not fit in a frame.
    #[error("{request} cannot be framed")]
    Frame {
        /// Which request.
        request: &'static str,
        /// Why.
        #[source]
        source: FrameError,
    },
    /// It did not answer in time.
    #[error("the agent did not answer {request} within {} s", .deadline.as_secs())]
    Deadline {
        /// Which request.
        request: &'static str,
        /// How long it had.
        deadline: Duration,
    },
    /// The connection ended.
    #[error("the agent's connection ended before it answered {request}")]
    Ended {
        /// Which request.
        request: &'static str,
    },
    /// It answered something else than was asked.
    #[error("the agent's answer to {request} is of the wrong kind")]
    Answer {
        /// Which request.
        request: &'static str,
    },
}

impl RequestError {
    /// The agent's kind of failure, if it was the agent that refused.
    pub fn kind(&self) -> Option<ErrorKind> {
        match self {
            RequestError::Agent(error) => Some(error.kind),
            _ => None,
        }
    }
}

/// What comes without being asked for.
#[derive(Debug)]
pub enum AgentEvent {
    /// Something happened in the guest.
    Event(Event),
    /// The connection ended; why, if it did so in disorder. The last event.
    Ended(Option<String>),
}

/// A control connection. Requests can be made from several threads.
#[derive(Debug)]
pub struct Agent {
    writer: Mutex<UnixStream>,
    pending: Arc<Mutex<Pending>>,
    next: AtomicU32,
}

type Answer = Result<Reply, AgentError>;

#[derive(Debug, Default)]
struct Pending {
    ended: bool,
    waiting: HashMap<u32, mpsc::SyncSender<Answer>>,
}

impl Agent {
    /// Takes over a connection to the agent's control port. Events go to `events` from a thread of its own.
    pub fn new(stream: UnixStream, events: impl FnMut(AgentEvent) + Send + 'static) -> io::Result<Agent> {
        let reader = stream.try_clone()?;
        let pending = Arc::new(Mutex::new(Pending::default()));
        let theirs = Arc::clone(&pending);
        thread::Builder::new().name("agent-reader".into()).spawn(move || read(reader, &theirs, events))?;
        Ok(Agent { writer: Mutex::new(stream), pending, next: AtomicU32::new(1) })
    }

    /// Greets the agent and checks its version.
    pub fn hello(&self, deadline: Duration) -> Result<(), RequestError> {
        match self.request(Request::Hello { version: VERSION }, deadline)? {
            Reply::Hello { version } if version == VERSION => Ok(()),
            Reply::Hello { version } => Err(RequestError::Agent(AgentError {
                kind: ErrorKind::Version,
                message: format!("the agent speaks version {version} of the protocol, this program {VERSION}"),
            })),
            _ => Err(RequestError::Answer { request: "Hello" }),
        }
    }

    /// Makes a request that is answered with Done.
    pub fn done(&self, request: Request, deadline: Duration) -> Result<(), RequestError> {
        let name = name(&request);
        match self.request(request, deadline)? {
            Reply::Done => Ok(()),
            _ => Err(RequestError::Answer { request: name }),
        }
    }

    /// Makes a request and waits for its answer.
    pub fn request(&self, request: Request, deadline: Duration) -> Result<Reply, RequestError> {
        let name = name(&request);
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = mpsc::sync_channel(1);
        {
            let mut pending = lock(&self.pending);
            if pending.ended {
                return Err(RequestError::Ended { request: name });
            }
            pending.waiting.insert(id, sender);
        }
        if let Err(error) = self.send(name, &ToAgent { id, request }) {
            lock(&self.pending).waiting.remove(&id);
            return Err(error);
        }
        match receiver.recv_timeout(deadline) {
            Ok(answer) => answer.map_err(RequestError::Agent),
            Err(mpsc::RecvTimeoutError::Disconnected) => Err(RequestError::Ended { request: name }),
            // The number stays in the table: should the answer come after all, it is expected and dropped.
            Err(mpsc::RecvTimeoutError::Timeout) => Err(RequestError::Deadline { request: name, deadline }),
        }
    }

    /// Sends a request that has no answer.
    pub fn shutdown(&self) -> Result<(), RequestError> {
        self.send("Shutdown", &ToAgent { id: self.next.fetch_add(1, Ordering::Relaxed), request: Request::Shutdown })
    }

    fn send(&self, request: &'static str, message: &ToAgent) -> Result<(), RequestError> {
        let frame = encode(message).map_err(|source| RequestError::Frame { request, source })?;
        lock(&self.writer).write_all(&frame).map_err(|source| RequestError::Send { request, source })
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = lock(&self.writer).shutdown(Shutdown::Both);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn read(mut stream: UnixStream, pending: &Mutex<Pending>, mut events: impl FnMut(AgentEvent)) {
    let ended = read_messages(&mut stream, pending, &mut events);
    let _ = stream.shutdown(Shutdown::Both);
    {
        let mut pending = lock(pending);
        pending.ended = true;
        pending.waiting.clear();
    }
    events(AgentEvent::Ended(ended.err()));
}

fn read_messages(
    stream: &mut UnixStream,
    pending: &Mutex<Pending>,
    events: &mut impl FnMut(AgentEvent),
) -> Result<(), String> {
    let mut decoder = Decoder::new();
    let mut buffer = vec![0; READ_BYTES];
    loop {
        let count = match stream.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(format!("cannot read from the agent: {error}")),
        };
        decoder.push(&buffer[..count]);
        while let Some(message) =
            decoder.next::<FromAgent>().map_err(|error| format!("the agent sent what is no message: {error}"))?
        {
            match message {
                FromAgent::Event(event) => events(AgentEvent::Event(event)),
                FromAgent::Reply { id, result } => {
                    let waiting = lock(pending).waiting.remove(&id);
                    let waiting =
                        waiting.ok_or_else(|| format!("the agent answered request {id}, which nobody made"))?;
                    let _ = waiting.try_send(result);
                }
            }
        }
    }
}

/// A request's name, for messages.
fn name(request: &Request) -> &'static str {
    match request {
        Request::Hello { .. } => "Hello",
        Request::Prepare => "Prepare",
        Request::PrepareContainer(_) => "PrepareContainer",
        Request::CreateSandbox(_) => "CreateSandbox",
        Request::CreateContainer(_) => "CreateContainer",
        Request::Start { .. } => "Start",
        Request::Exec { .. } => "Exec",
        Request::Signal { .. } => "Signal",
        Request::Resize { .. } => "Resize",
        Request::Update { .. } => "Update",
        Request::Pause { .. } => "Pause",
        Request::Resume { .. } => "Resume",
        Request::Stats { .. } => "Stats",
        Request::Processes { .. } => "Processes",
        Request::Remove { .. } => "Remove",
        Request::ConfigureNetwork(_) => "ConfigureNetwork",
        Request::Shutdown => "Shutdown",
    }
}

#[cfg(test)]
mod tests;
