//! A supervisor's life: machine, container, program, end.
use std::{
    collections::HashMap,
    error::Error,
    fs,
    io::Write,
    os::{
        fd::OwnedFd,
        unix::{
            fs::DirBuilderExt,
            net::{UnixListener, UnixStream},
        },
    },
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32},
        mpsc,
    },
    thread,
};

use caisson_agent_protocol::{self as agent, ErrorKind, Event, ExitStatus, Reply, Request as AgentRequest};
use caisson_machine::probe;

use super::{
    client, serve,
    stdio::{Input, Output, SharedLog},
    timing::Timing,
    wire::{self, Answer, Receiver},
};
use crate::{
    agent::{AgentEvent, RequestError},
    assets::Assets,
    clock, console, container,
    containers::Containers,
    logs,
    paths::Paths,
    sandbox::{Description, MachineEnd, REQUEST_DEADLINE, Sandbox},
    shares::Shares,
    signals,
    state::{Config, Directory, Exit, ProcessName, RootSource, State, Status, boot_id},
    template,
};

/// What the hidden verb is told.
#[derive(Debug)]
pub struct Arguments {
    /// The container's directory.
    pub directory: PathBuf,
    /// The run directory.
    pub run: PathBuf,
    /// The descriptor of the connection to the command.
    pub channel: i32,
    /// The container gets this process's stdio.
    pub stdio: bool,
    /// When the command began.
    pub request_ns: u64,
}

/// A connection that answers are written to, from several threads.
pub(super) type Watcher = Arc<Mutex<UnixStream>>;

/// Writes an answer; whoever is gone does not hear it.
pub(super) fn tell(watcher: &Watcher, answer: &Answer) {
    let _ = wire::send(&lock(watcher), answer, &[]);
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A process of the container: its streams, and who waits for its end.
#[derive(Debug, Default)]
pub(super) struct Process {
    pub(super) input: Option<Input>,
    pub(super) stdout: Arc<Output>,
    pub(super) stderr: Arc<Output>,
    pub(super) pumps: Mutex<Vec<thread::JoinHandle<()>>>,
    pub(super) watchers: Mutex<Vec<Watcher>>,
}

/// The processes by name; the init process's is empty.
#[derive(Debug, Default)]
pub(super) struct Processes {
    live: HashMap<String, Arc<Process>>,
    /// Ends of processes that were reported before the answer that they run was worked on.
    early: HashMap<String, Exit>,
}

impl Processes {
    pub(super) fn get(&self, name: &str) -> Option<Arc<Process>> {
        self.live.get(name).cloned()
    }

    /// Adds a process; says how it ended, if it already has.
    pub(super) fn add(&mut self, name: &str, process: Arc<Process>) -> Option<Exit> {
        self.live.insert(name.to_owned(), process);
        self.early.remove(name)
    }

    /// Takes out a process that has ended, or keeps its end for when it is added.
    fn ended(&mut self, name: &str, exit: Exit) -> Option<Arc<Process>> {
        let process = self.live.remove(name);
        if process.is_none() {
            self.early.insert(name.to_owned(), exit);
        }
        process
    }
}

/// What the threads of a supervisor share.
pub(super) struct Shared {
    pub(super) config: Config,
    pub(super) sandbox: Sandbox,
    pub(super) directory: Directory,
    pub(super) state: Mutex<State>,
    pub(super) timing: Arc<Mutex<Timing>>,
    pub(super) processes: Mutex<Processes>,
    pub(super) next_exec: AtomicU32,
    /// `stop` was asked for: no restart policy applies.
    pub(super) stopping: AtomicBool,
}

/// What goes wrong before the program runs: docker's exit code and the chain of causes.
pub(super) struct Failure {
    pub(super) code: u8,
    pub(super) message: String,
}

impl<E: Error> From<E> for Failure {
    fn from(error: E) -> Failure {
        Failure { code: 125, message: chain(&error) }
    }
}

/// An error and its causes, in one line.
pub(super) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    text
}

/// An agent's refusal to run a program, with docker's exit code for it.
pub(super) fn program_failure(error: &RequestError) -> Failure {
    let code = match error.kind() {
        Some(ErrorKind::ProgramNotFound) => 127,
        Some(ErrorKind::ProgramNotExecutable) => 126,
        _ => 125,
    };
    Failure { code, message: chain(error) }
}

/// Runs a container to its end. Returns the exit code, unless the program died of a signal that ends this process too.
pub fn run(arguments: Arguments) -> u8 {
    match supervise(arguments) {
        Ok(Exit::Code(code)) => code,
        Ok(Exit::Signal(signal)) => {
            signals::die_of(signal);
            Exit::Signal(signal).code()
        }
        Err(failure) => failure.code,
    }
}

fn supervise(arguments: Arguments) -> Result<Exit, Failure> {
    let timing = Timing { request_ns: arguments.request_ns, supervisor_ns: clock::monotonic_ns(), ..Timing::default() };
    let stdio = arguments.stdio.then(client::own_stdio).transpose()?;
    signals::drop_stdio()?;
    signals::block()?;
    let receiver = Receiver::new(signals::inherited(arguments.channel)?.into());
    let initial: Watcher = Arc::new(Mutex::new(receiver.stream().try_clone()?));
    let directory = Directory::new(&arguments.directory);
    let paths = Paths::new(Some(arguments.run))?;
    let run_directory = container::run_directory(&paths.run, directory.path());
    let result = contain(&paths, &directory, timing, stdio, receiver, &initial);
    let _ = fs::remove_dir_all(&run_directory);
    if let Err(failure) = &result {
        let mut state = directory.state().unwrap_or_else(|_| State::new(Status::Stopped));
        state.status = Status::Stopped;
        state.finished = Some(clock::now_rfc3339());
        state.exit = Some(Exit::Code(failure.code));
        state.error = Some(failure.message.clone());
        let _ = directory.write_state(&state);
        if let Ok(config) = directory.config()
            && config.auto_remove
        {
            let _ = Containers::new(&paths).forget(&config);
            let _ = directory.remove();
        }
        tell(&initial, &Answer::Error { message: failure.message.clone(), code: failure.code });
    }
    result
}

fn contain(
    paths: &Paths,
    directory: &Directory,
    mut timing: Timing,
    stdio: Option<[OwnedFd; 3]>,
    receiver: Receiver,
    initial: &Watcher,
) -> Result<Exit, Failure> {
    let config = directory.config()?;
    let mut state = directory.state().unwrap_or_else(|_| State::new(Status::Creating));
    state = State { restarts: state.restarts, ..State::new(Status::Creating) };
    state.supervisor = ProcessName::own();
    state.boot_id = boot_id();
    directory.write_state(&state)?;
    let run_directory = container::run_directory(&paths.run, directory.path());
    let _ = fs::remove_dir_all(&run_directory);

    let (events, inbox) = mpsc::channel();
    let progress = |what: &str| tell(initial, &Answer::Progress { what: what.to_owned() });
    let assets = Assets::prepare(paths, progress)?;
    let kvm_kind = probe::kvm_kind(Some(&paths.cache))?;
    let mut template = None;
    if !config.cold {
        match template::ensure(paths, &assets, kvm_kind, config.shape, progress) {
            Ok(snapshot) => template = Some(snapshot),
            Err(error) => progress(&format!("no template, so the guest boots: {}", chain(&error))),
        }
    }
    timing.template = template.is_some();
    let (disks, root) = container::disks(&config, directory, template.is_some())?;
    let mut shares = Shares::default();
    if let RootSource::Directory { path } = &config.root {
        shares.add_root(path, false);
    }
    let no_stdio = agent::Stdio::default();
    let mut described = container::describe(&config, root, no_stdio, None, &mut |path| shares.add(path))?;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&run_directory)?;
    let file_server = shares.serve(&run_directory)?;
    let socket = file_server.as_ref().map(|server| server.socket.clone());
    let share = (socket.is_some() || template.is_some()).then(|| container::share(socket));
    let description = Description {
        directory: &run_directory,
        assets: &assets,
        kvm_kind,
        shape: config.shape,
        disks,
        net: Vec::new(),
        shares: share.into_iter().collect(),
        restore: template,
        hostname: config.spec.hostname().clone().unwrap_or_default(),
    };
    let sandbox = Sandbox::start(&description, &mut timing, move |event| {
        let _ = events.send(event);
    })?;
    sandbox.identify(&description.hostname)?;

    let listener = UnixListener::bind(run_directory.join(super::SOCKET))?;
    let timing = Arc::new(Mutex::new(timing));
    let mut stdio = stdio;
    let mut terminal = None;
    if let Some(socket) = &config.console_socket {
        let slave = console::open(socket)?;
        if let (Some((width, height)), Some(process)) = (console::size(&slave), &mut described.process) {
            process.terminal = Some(agent::TerminalSize { width, height });
        }
        stdio = Some([slave.try_clone()?, slave.try_clone()?, slave.try_clone()?]);
        terminal = Some(slave);
    }
    let (process, tokens) = open_streams(&sandbox, &config, directory, &timing, stdio)?;
    process.watchers.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(initial));
    described.stdio = tokens;
    let created = sandbox.agent().request(AgentRequest::CreateContainer(Box::new(described)), REQUEST_DEADLINE);
    let pid = match created.map_err(|error| program_failure(&error))? {
        Reply::Process { pid } => pid,
        Reply::Done => 1,
        _ => return Err(RequestError::Answer { request: "CreateContainer" }.into()),
    };
    Timing::mark(&mut lock(&timing).created_ns);
    let shared = Arc::new(Shared {
        config,
        sandbox,
        directory: directory.clone(),
        state: Mutex::new(state),
        timing,
        processes: Mutex::new(Processes {
            live: HashMap::from([(String::new(), Arc::new(process))]),
            ..Processes::default()
        }),
        next_exec: AtomicU32::new(1),
        stopping: AtomicBool::new(false),
    });
    shared.set_status(Status::Created)?;
    if shared.config.auto_start {
        shared.start()?;
        tell(initial, &Answer::Started { process: String::new(), pid });
    } else {
        tell(initial, &Answer::Created);
    }
    serve::accept(&shared, listener)?;
    serve::connection(&shared, receiver, Arc::clone(initial))?;
    forward_signals(&shared, terminal)?;
    let (exit, error) = until_exit(&shared, &inbox);
    let exit = finish(paths, &shared, exit, error);
    drop(file_server);
    Ok(exit)
}

/// Opens the init process's streams and connects them with the log and with this process's stdio.
fn open_streams(
    sandbox: &Sandbox,
    config: &Config,
    directory: &Directory,
    timing: &Arc<Mutex<Timing>>,
    stdio: Option<[OwnedFd; 3]>,
) -> Result<(Process, agent::Stdio), Failure> {
    let terminal = config.spec.process().as_ref().and_then(|process| process.terminal()).unwrap_or(false);
    let log = if config.log {
        Some(Arc::new(Mutex::new(logs::Writer::open(&directory.log(), logs::MAX_LOG_BYTES)?)))
    } else {
        None
    };
    let timing = Arc::clone(timing);
    let first = move || Timing::mark(&mut lock(&timing).first_output_ns);
    let wanted = Wanted { stdin: config.stdin, terminal };
    open_process(sandbox, wanted, log, stdio.map(|stdio| stdio.map(Some)), first)
}

/// Which streams a process has.
#[derive(Clone, Copy)]
pub(super) struct Wanted {
    pub(super) stdin: bool,
    pub(super) terminal: bool,
}

/// Opens a process's streams. `stdio` is the source and the sinks to begin with.
pub(super) fn open_process(
    sandbox: &Sandbox,
    wanted: Wanted,
    log: Option<SharedLog>,
    stdio: Option<[Option<OwnedFd>; 3]>,
    first: impl FnMut() + Send + Clone + 'static,
) -> Result<(Process, agent::Stdio), Failure> {
    let [source, out, err] = stdio.unwrap_or_default();
    let mut process = Process::default();
    let mut tokens = agent::Stdio::default();
    let log = |stream| log.clone().map(|log| (log, stream));
    if let Some(out) = out {
        process.stdout.add(out);
    }
    if wanted.terminal {
        let (token, stream) = sandbox.stream()?;
        tokens.stdin = Some(token);
        let pump = process.stdout.pump(stream.try_clone()?, log("stdout"), first)?;
        lock(&process.pumps).push(pump);
        process.input = Some(Input::new(stream)?);
    } else {
        if wanted.stdin {
            let (token, stream) = sandbox.stream()?;
            tokens.stdin = Some(token);
            process.input = Some(Input::new(stream)?);
        }
        if let Some(err) = err {
            process.stderr.add(err);
        }
        let (token, stream) = sandbox.stream()?;
        tokens.stdout = Some(token);
        let pump = process.stdout.pump(stream, log("stdout"), first.clone())?;
        lock(&process.pumps).push(pump);
        let (token, stream) = sandbox.stream()?;
        tokens.stderr = Some(token);
        let pump = process.stderr.pump(stream, log("stderr"), first)?;
        lock(&process.pumps).push(pump);
    }
    if let (true, Some(input), Some(source)) = (wanted.stdin, &process.input, source) {
        input.pump(source, !wanted.terminal)?;
    }
    Ok((process, tokens))
}

impl Shared {
    /// Writes a new status.
    pub(super) fn set_status(&self, status: Status) -> Result<(), Failure> {
        let mut state = lock(&self.state);
        state.status = status;
        if status == Status::Running && state.started.is_none() {
            state.started = Some(clock::now_rfc3339());
        }
        self.directory.write_state(&state)?;
        Ok(())
    }

    /// Runs the program.
    pub(super) fn start(&self) -> Result<(), Failure> {
        if self.config.spec.process().is_none() {
            return Err(Failure { code: 125, message: "the configuration has no process to start".into() });
        }
        let request = AgentRequest::Start { container: container::GUEST_ID.into() };
        self.sandbox.agent().done(request, REQUEST_DEADLINE).map_err(|error| program_failure(&error))?;
        Timing::mark(&mut lock(&self.timing).started_ns);
        self.set_status(Status::Running)
    }

    /// Sends a signal to a process.
    pub(super) fn signal(&self, process: &str, signal: u8, all: bool) -> Result<(), Failure> {
        let request =
            AgentRequest::Signal { container: container::GUEST_ID.into(), process: process.to_owned(), signal, all };
        Ok(self.sandbox.agent().done(request, REQUEST_DEADLINE)?)
    }

    /// Reports the end of a process that is not the init process, when its output has been passed on.
    pub(super) fn exec_ended(self: &Arc<Self>, name: String, exit: Exit) {
        let shared = Arc::clone(self);
        let report = move || {
            let Some(process) = lock(&shared.processes).ended(&name, exit) else { return };
            drain(&process);
            let oom = lock(&shared.state).oom_killed;
            for watcher in lock(&process.watchers).drain(..) {
                tell(&watcher, &Answer::Exited { exit, oom, error: None, timing: None });
            }
        };
        let _ = thread::Builder::new().name("exec-end".into()).spawn(report);
    }
}

/// Waits until a process's output has been passed on, and stops reading its input.
fn drain(process: &Process) {
    if let Some(input) = &process.input {
        input.stop();
    }
    for pump in lock(&process.pumps).drain(..) {
        let _ = pump.join();
    }
}

fn forward_signals(shared: &Arc<Shared>, terminal: Option<OwnedFd>) -> Result<(), Failure> {
    let shared = Arc::clone(shared);
    thread::Builder::new().name("signals".into()).spawn(move || {
        while let Ok(signal) = signals::wait() {
            if signal != libc::SIGWINCH {
                let _ = shared.signal("", signal as u8, false);
            } else if let Some((width, height)) = terminal.as_ref().and_then(console::size) {
                let size = agent::TerminalSize { width, height };
                let request =
                    AgentRequest::Resize { container: container::GUEST_ID.into(), process: String::new(), size };
                let _ = shared.sandbox.agent().done(request, REQUEST_DEADLINE);
            }
        }
    })?;
    Ok(())
}

/// The loop: until the init process or the machine has ended.
fn until_exit(shared: &Arc<Shared>, inbox: &mpsc::Receiver<AgentEvent>) -> (Exit, Option<MachineEnd>) {
    while let Ok(event) = inbox.recv() {
        match event {
            AgentEvent::Event(Event::Exit { process, status, .. }) => {
                let exit = match status {
                    ExitStatus::Code(code) => Exit::Code(code),
                    ExitStatus::Signal(signal) => Exit::Signal(signal.clamp(1, 64)),
                };
                if process.is_empty() {
                    return (exit, None);
                }
                shared.exec_ended(process, exit);
            }
            AgentEvent::Event(Event::Oom { .. }) => lock(&shared.state).oom_killed = true,
            AgentEvent::Ended(reason) => {
                let mut end = shared.sandbox.post_mortem();
                if let Some(reason) = reason {
                    end.reason = format!("{reason}; {}", end.reason);
                }
                return (Exit::Signal(9), Some(end));
            }
        }
    }
    (Exit::Signal(9), None)
}

/// Ends the machine, writes what became of the container, and tells everyone.
fn finish(paths: &Paths, shared: &Arc<Shared>, exit: Exit, dead: Option<MachineEnd>) -> Exit {
    Timing::mark(&mut lock(&shared.timing).exit_ns);
    let init = lock(&shared.processes).get("").unwrap_or_default();
    drain(&init);
    let error = dead.as_ref().map(|end| format!("the machine ended before the program did: {}", end.reason));
    let keeps_data =
        !shared.config.auto_remove && matches!(shared.config.root, RootSource::Image { upper_bytes: 1.., .. });
    let end = match dead {
        Some(end) => end,
        None if keeps_data => shared.sandbox.shutdown(),
        None => shared.sandbox.stop(),
    };
    let timing = {
        let mut timing = lock(&shared.timing);
        Timing::mark(&mut timing.ended_ns);
        timing.kvm_run_ns = end.statistics.kvm_run_ns;
        timing.vcpu_host_ns = end.statistics.host_ns;
        timing.exits = end.statistics.exits;
        timing.assists = end.statistics.assists;
        timing.clone()
    };
    let oom = {
        let mut state = lock(&shared.state);
        state.status = Status::Stopped;
        state.finished = Some(clock::now_rfc3339());
        state.exit = Some(exit);
        state.error = error.clone();
        let _ = shared.directory.write_state(&state);
        state.oom_killed
    };
    // Gone before anyone is told, so that what they do next meets nothing of this.
    let _ = fs::remove_dir_all(container::run_directory(&paths.run, shared.directory.path()));
    if shared.config.auto_remove {
        let _ = Containers::new(paths).forget(&shared.config);
        let _ = shared.directory.remove();
    }
    let others: Vec<_> =
        lock(&shared.processes).live.drain().filter(|(name, _)| !name.is_empty()).map(|(_, process)| process).collect();
    for process in others {
        for watcher in lock(&process.watchers).drain(..) {
            tell(&watcher, &Answer::Exited { exit: Exit::Signal(9), oom, error: None, timing: None });
        }
    }
    let answer = Answer::Exited { exit, oom, error, timing: Some(Box::new(timing)) };
    for watcher in lock(&init.watchers).drain(..) {
        tell(&watcher, &answer);
        let _ = lock(&watcher).flush();
    }
    exit
}
