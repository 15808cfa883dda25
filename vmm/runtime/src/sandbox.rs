//! A sandbox: a machine whose agent answers. It is started from nothing but a description, and ended by a ladder: ask, kill, clean up.
use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::{
        fs::{DirBuilderExt, OpenOptionsExt},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use caisson_agent_protocol::{CONTROL_PORT, DOORBELL_PORT, Request, STREAM_PORT, Sandbox as Identity, StreamToken};
use caisson_machine::{
    client::{ClientError, Monitor, SpawnOptions},
    config::{Disk, MachineConfig, Net, Share, Vsock},
    control::Event,
};
pub use caisson_machine::{config::KvmKind, probe::kvm_kind};

use crate::{
    agent::{Agent, AgentEvent, RequestError},
    assets::Assets,
    clock,
    paths::{At, PathError},
    state::Shape,
    supervisor::timing::Timing,
};

/// The guest's context id: every machine has a device of its own, so they can all have the same.
const GUEST_CID: u32 = 3;
/// How long a cold boot may take, on a loaded host with software KVM.
const BOOT_DEADLINE: Duration = Duration::from_secs(300);
/// How long the agent has to answer what is quick.
pub const REQUEST_DEADLINE: Duration = Duration::from_secs(60);
/// How long the agent has to accept a connection.
const CONNECT_DEADLINE: Duration = Duration::from_secs(60);
/// How long a guest has to write back and power off.
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(30);
/// How much of the guest's console is shown in an error.
const CONSOLE_TAIL_BYTES: usize = 1500;

/// Why there is no sandbox.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// A file operation failed.
    #[error(transparent)]
    Path(#[from] PathError),
    /// The monitor cannot be started or used.
    #[error(transparent)]
    Monitor(#[from] ClientError),
    /// The agent refused or is silent.
    #[error("{what}")]
    Agent {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: RequestError,
    },
    /// The guest did not come up.
    #[error("the guest did not start: {reason}{console}")]
    Boot {
        /// What happened instead.
        reason: String,
        /// What its console says.
        console: String,
    },
    /// A connection into the guest failed.
    #[error("cannot connect to port {port} of the guest")]
    Connect {
        /// Which port.
        port: u32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The monitor's program is missing.
    #[error("there is no caisson-vmm beside {0}: build it with `cargo build --release`, or name it in CAISSON_VMM")]
    NoMonitor(PathBuf),
}

/// What to start.
#[derive(Debug, Clone)]
pub struct Description<'a> {
    /// A directory of its own for sockets and logs; it must not exist.
    pub directory: &'a Path,
    /// What to boot.
    pub assets: &'a Assets,
    /// What `/dev/kvm` is.
    pub kvm_kind: KvmKind,
    /// Memory and CPUs.
    pub shape: Shape,
    /// Disks in order.
    pub disks: Vec<Disk>,
    /// Network interfaces in order.
    pub net: Vec<Net>,
    /// Shares.
    pub shares: Vec<Share>,
    /// A template's snapshot, to be restored instead of booting.
    pub restore: Option<PathBuf>,
    /// The guest's own hostname.
    pub hostname: String,
}

/// A machine whose agent has answered.
#[derive(Debug)]
pub struct Sandbox {
    monitor: Arc<Monitor>,
    agent: Agent,
    directory: PathBuf,
    next_token: AtomicU32,
}

/// How a machine ended.
#[derive(Debug, Clone)]
pub struct MachineEnd {
    /// In words.
    pub reason: String,
    /// What the monitor counted.
    pub statistics: caisson_machine::control::Statistics,
}

impl Sandbox {
    /// Starts a machine and greets its agent. To be called from a thread that lives as long as the machine.
    pub fn start(
        description: &Description<'_>,
        timing: &mut Timing,
        events: impl FnMut(AgentEvent) + Send + 'static,
    ) -> Result<Sandbox, SandboxError> {
        let directory = description.directory;
        fs::DirBuilder::new().mode(0o700).recursive(true).create(directory).at("create the directory", directory)?;
        let doorbell = match &description.restore {
            None => Some(Doorbell::listen(directory)?),
            Some(_) => None,
        };
        let config = machine_config(description);
        let stderr = log_file(&directory.join("monitor.log"))?;
        timing.monitor_ns = clock::monotonic_ns();
        let monitor = Arc::new(Monitor::spawn(&monitor_program()?, &config, SpawnOptions { stderr: Some(stderr) })?);
        let failed = |reason: String| SandboxError::Boot { reason, console: console_tail(directory) };
        match monitor.wait_event(Some(Instant::now() + REQUEST_DEADLINE))? {
            Event::Running { .. } => timing.first_run_ns = clock::monotonic_ns(),
            Event::Ended { message, reason, .. } => return Err(failed(ended(reason, &message))),
        }
        if let Some(doorbell) = doorbell {
            doorbell.wait(&monitor, BOOT_DEADLINE).map_err(failed)?;
        }
        let stream = connect(directory, CONTROL_PORT)?;
        let agent = Agent::new(stream, events).at("start the reader of", directory.join("vsock.sock"))?;
        agent
            .hello(REQUEST_DEADLINE)
            .map_err(|source| SandboxError::Agent { what: "the agent does not greet back", source })?;
        timing.agent_ready_ns = clock::monotonic_ns();
        Ok(Sandbox { monitor, agent, directory: directory.to_owned(), next_token: AtomicU32::new(1) })
    }

    /// Makes the machine a sandbox of its own: entropy, clock, name. Must come before anything of anyone's runs in it.
    pub fn identify(&self, hostname: &str) -> Result<(), SandboxError> {
        let mut entropy = vec![0; 64];
        let mut filled = 0;
        while filled < entropy.len() {
            filled += rustix::rand::getrandom(&mut entropy[filled..], rustix::rand::GetRandomFlags::empty())
                .at("read", "the kernel's entropy")?;
        }
        let identity = Identity { entropy, realtime_ns: clock::realtime_ns(), hostname: hostname.to_owned() };
        self.agent
            .done(Request::CreateSandbox(identity), REQUEST_DEADLINE)
            .map_err(|source| SandboxError::Agent { what: "the guest cannot be made a sandbox of its own", source })
    }

    /// The agent.
    pub fn agent(&self) -> &Agent {
        &self.agent
    }

    /// Drops the connection to the agent and keeps the machine.
    pub(crate) fn disconnect(self) -> Arc<Monitor> {
        self.monitor
    }

    /// The monitor.
    pub fn monitor(&self) -> &Arc<Monitor> {
        &self.monitor
    }

    /// Where its sockets and logs are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Opens a stream, to be named in the request that uses it.
    pub fn stream(&self) -> Result<(StreamToken, UnixStream), SandboxError> {
        let token = self.next_token.fetch_add(1, Ordering::Relaxed);
        let mut stream = connect(&self.directory, STREAM_PORT)?;
        stream.write_all(&token.to_le_bytes()).map_err(|source| SandboxError::Connect { port: STREAM_PORT, source })?;
        Ok((token, stream))
    }

    /// Lets the guest write back what it has and power off; kills it when it does not. Returns what the monitor counted.
    pub fn shutdown(&self) -> MachineEnd {
        let asked = self.agent.shutdown().is_ok();
        let deadline = Instant::now() + if asked { SHUTDOWN_DEADLINE } else { Duration::ZERO };
        self.end(Some(deadline))
    }

    /// Ends the machine at once: nothing in it is wanted any more.
    pub fn stop(&self) -> MachineEnd {
        self.end(None)
    }

    fn end(&self, by_itself_until: Option<Instant>) -> MachineEnd {
        let mut event = by_itself_until.and_then(|deadline| self.monitor.wait_event(Some(deadline)).ok());
        if event.is_none() {
            let _ = self.monitor.quit();
            event = self.monitor.wait_event(Some(Instant::now())).ok();
        }
        let _ = self.monitor.kill();
        match event {
            Some(Event::Ended { reason, message, statistics }) => {
                MachineEnd { reason: ended(reason, &message), statistics }
            }
            _ => MachineEnd { reason: "the monitor was killed".into(), statistics: Default::default() },
        }
    }

    /// Why the machine is gone, for an error message.
    pub fn post_mortem(&self) -> MachineEnd {
        let mut end = self.end(Some(Instant::now() + Duration::from_secs(5)));
        end.reason.push_str(&console_tail(&self.directory));
        end
    }
}

fn ended(reason: caisson_machine::control::EndReason, message: &str) -> String {
    use caisson_machine::control::EndReason;
    match reason {
        EndReason::Shutdown => "the machine was ended".into(),
        EndReason::Reset => "the guest reset itself".into(),
        EndReason::Error => message.to_owned(),
    }
}

fn machine_config(description: &Description<'_>) -> MachineConfig {
    let Description { directory, assets, kvm_kind, shape, .. } = description;
    MachineConfig {
        initramfs: Some(assets.initramfs.clone()),
        command_line: Assets::command_line(*kvm_kind),
        vcpus: shape.vcpus,
        disks: description.disks.clone(),
        vsock: Some(Vsock { guest_cid: GUEST_CID, directory: directory.to_path_buf() }),
        net: description.net.clone(),
        shares: description.shares.clone(),
        serial: Some(directory.join("console.log")),
        restore: description.restore.clone(),
        identity: assets.identity(),
        unjailed: std::env::var_os("CAISSON_UNJAILED").is_some_and(|value| value == "1"),
        ..MachineConfig::new(&assets.kernel, shape.memory_mib, *kvm_kind)
    }
}

/// The monitor's program: beside this one.
pub fn monitor_program() -> Result<PathBuf, SandboxError> {
    if let Some(path) = std::env::var_os("CAISSON_VMM").filter(|path| !path.is_empty()) {
        return Ok(path.into());
    }
    let own = std::env::current_exe().at("find", "this program's own path")?;
    let beside = own.parent().unwrap_or(Path::new("/")).join("caisson-vmm");
    if beside.exists() { Ok(beside) } else { Err(SandboxError::NoMonitor(own)) }
}

/// Opens a log, made 0600.
pub fn log_file(path: &Path) -> Result<File, PathError> {
    OpenOptions::new().create(true).append(true).mode(0o600).open(path).at("open", path)
}

/// The end of the guest's console and of the monitor's own words, for error messages.
fn console_tail(directory: &Path) -> String {
    let mut tail = String::new();
    for (name, what) in [("monitor.log", "its monitor says"), ("console.log", "its console says")] {
        let bytes = fs::read(directory.join(name)).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(CONSOLE_TAIL_BYTES)..]).trim().to_owned();
        if !text.is_empty() {
            tail.push_str(&format!("; {what}: {text}"));
        }
    }
    tail
}

/// The connection that the agent makes once, when it listens.
struct Doorbell {
    rung: mpsc::Receiver<io::Result<()>>,
    path: PathBuf,
}

impl Doorbell {
    fn listen(directory: &Path) -> Result<Doorbell, SandboxError> {
        let path = directory.join(format!("vsock.sock_{DOORBELL_PORT}"));
        let listener = UnixListener::bind(&path).at("listen on", &path)?;
        let (sender, rung) = mpsc::sync_channel(1);
        thread::Builder::new()
            .name("doorbell".into())
            .spawn(move || {
                let _ = sender.send(listener.accept().map(|_| ()));
            })
            .at("start the thread of", &path)?;
        Ok(Doorbell { rung, path })
    }

    /// Waits for it, or for the machine's end.
    fn wait(self, monitor: &Monitor, deadline: Duration) -> Result<(), String> {
        let deadline = Instant::now() + deadline;
        loop {
            match self.rung.recv_timeout(Duration::from_millis(20)) {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(error)) => return Err(format!("its doorbell cannot be heard: {error}")),
                Err(_) if Instant::now() > deadline => return Err("its agent does not answer".into()),
                Err(_) => match monitor.wait_event(Some(Instant::now())) {
                    Ok(Event::Ended { reason, message, .. }) => return Err(ended(reason, &message)),
                    Ok(_) | Err(ClientError::Deadline { .. }) => {}
                    Err(error) => return Err(error.to_string()),
                },
            }
        }
    }
}

impl Drop for Doorbell {
    fn drop(&mut self) {
        // Lets a thread that still waits go.
        let _ = UnixStream::connect(&self.path);
        let _ = fs::remove_file(&self.path);
    }
}

/// Connects to a port of the guest, as Firecracker's vsock has it.
fn connect(directory: &Path, port: u32) -> Result<UnixStream, SandboxError> {
    let attempt = || -> io::Result<UnixStream> {
        let mut stream = UnixStream::connect(directory.join("vsock.sock"))?;
        stream.set_read_timeout(Some(CONNECT_DEADLINE))?;
        stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
        let mut answer = Vec::new();
        let mut byte = [0];
        // One byte at a time: what follows the line belongs to the stream.
        while answer.last() != Some(&b'\n') {
            if answer.len() > 32 || stream.read(&mut byte)? == 0 {
                return Err(io::Error::new(
                    io::ErrorKind::ConnectionRefused,
                    "the guest does not accept the connection",
                ));
            }
            answer.push(byte[0]);
        }
        if !answer.starts_with(b"OK ") {
            return Err(io::Error::new(
                io::ErrorKind::ConnectionRefused,
                String::from_utf8_lossy(&answer).trim().to_owned(),
            ));
        }
        stream.set_read_timeout(None)?;
        Ok(stream)
    };
    attempt().map_err(|source| SandboxError::Connect { port, source })
}
