//! The loop that serves the host: one thread, one epoll instance, nothing that blocks but the waits that [`child`](crate::child) and
//! [`streams`](crate::streams) bound.
use crate::{
    cgroup,
    container::{Container, Spare},
    control::{Control, Ended},
    error::{Context, Result, error},
    processes::Entry,
    pump::{Direction, Progress, Pump},
    sandbox,
    slab::Slab,
    streams::Streams,
};
use alloc::{
    collections::VecDeque,
    format,
    string::{String, ToString},
    vec,
    vec::Vec,
};
use caisson_agent_protocol::{ErrorKind, Event, FromAgent, Reply, Request, ToAgent, VERSION};
use core::{convert::Infallible, mem::MaybeUninit};
use rustix::{
    event::{Timespec, epoll},
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::{Mode, OFlags},
    net::{SocketFlags, accept_with},
};

/// What is read from a pipe or stream at a time.
const BUFFER_BYTES: usize = 64 * 1024;
/// How many events are taken at a time.
const EVENTS: usize = 16;
/// How many events are kept for a host that is not connected. Each process makes one in the end.
const MAX_KEPT_EVENTS: usize = 1024;
/// How long a program's output is waited for after its end while there is none: something in the background may hold the pipe.
const DRAIN_MS: u64 = 100;
/// The same for a container's init, whose end has ended all others that could write.
const INIT_DRAIN_MS: u64 = 2000;

/// The machine that the agent runs in.
pub struct Machine {
    pub(crate) cgroups: Option<cgroup::Root>,
    pub(crate) share_directory: Option<String>,
    pub(crate) is_own: bool,
    pub(crate) null: OwnedFd,
    pub(crate) pid_namespace: OwnedFd,
}

impl Machine {
    /// A machine whose PID 1 the agent is.
    pub(crate) fn own(cgroups: cgroup::Root) -> Result<Self> {
        Self::new(Some(cgroups), None, true)
    }

    /// Has shares be directories below the given one, instead of devices.
    #[must_use]
    pub fn with_share_directory(self, share_directory: String) -> Self {
        Self { share_directory: Some(share_directory), ..self }
    }

    /// A machine that others use too, for tests: there are no cgroups, shares are directories below the given one, and neither the clock
    /// nor the names of the machine are touched.
    ///
    /// # Errors
    /// If it is not Linux with /dev and /proc.
    pub fn borrowed(share_directory: String) -> Result<Self> {
        Self::new(None, Some(share_directory), false)
    }

    fn new(cgroups: Option<cgroup::Root>, share_directory: Option<String>, is_own: bool) -> Result<Self> {
        let open = |path: &str, flags| {
            rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty()).context(|| format!("opening {path}"))
        };
        Ok(Self {
            cgroups,
            share_directory,
            is_own,
            null: open("/dev/null", OFlags::RDWR)?,
            pid_namespace: open("/proc/self/ns/pid", OFlags::RDONLY)?,
        })
    }
}

/// What an epoll event is about. The number is a slab's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Listener,
    Control,
    Doorbell,
    Process(usize),
    Pump(usize),
    Oom(usize),
}

impl Source {
    fn encode(self) -> epoll::EventData {
        let (kind, number) = match self {
            Self::Listener => (0, 0),
            Self::Control => (1, 0),
            Self::Doorbell => (2, 0),
            Self::Process(number) => (3, number),
            Self::Pump(number) => (4, number),
            Self::Oom(number) => (5, number),
        };
        epoll::EventData::new_u64(kind << 32 | number as u64)
    }

    fn decode(data: epoll::EventData) -> Option<Self> {
        let value = data.u64();
        let number = (value & 0xffff_ffff) as usize;
        Some(match value >> 32 {
            0 => Self::Listener,
            1 => Self::Control,
            2 => Self::Doorbell,
            3 => Self::Process(number),
            4 => Self::Pump(number),
            5 => Self::Oom(number),
            _ => return None,
        })
    }
}

/// A pump, and the process that it serves.
pub(crate) struct ProcessPump {
    pub(crate) pump: Pump,
    pub(crate) process: usize,
}

/// The agent.
pub struct Server {
    pub(crate) machine: Machine,
    epoll: OwnedFd,
    listener: OwnedFd,
    pub(crate) streams: Streams,
    control: Option<Control>,
    doorbell: Option<OwnedFd>,
    pub(crate) containers: Slab<Container>,
    pub(crate) spare: Option<Spare>,
    pub(crate) processes: Slab<Entry>,
    pub(crate) pumps: Slab<ProcessPump>,
    /// Pumps that have more to do.
    busy: Vec<usize>,
    kept: VecDeque<Event>,
    buffer: Vec<u8>,
    is_sandbox: bool,
}

impl Server {
    /// An agent that serves the host on two listening, non-blocking sockets: for the control connection and for streams.
    ///
    /// # Errors
    /// If they cannot be watched.
    pub fn new(machine: Machine, listener: OwnedFd, streams: OwnedFd) -> Result<Self> {
        let doing = || String::from("watching the control port");
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).context(doing)?;
        epoll::add(&epoll, &listener, Source::Listener.encode(), epoll::EventFlags::IN).context(doing)?;
        Ok(Self {
            machine,
            epoll,
            listener,
            streams: Streams::new(streams),
            control: None,
            doorbell: None,
            containers: Slab::new(),
            spare: None,
            processes: Slab::new(),
            pumps: Slab::new(),
            busy: Vec::new(),
            kept: VecDeque::new(),
            buffer: vec![0; BUFFER_BYTES],
            is_sandbox: false,
        })
    }

    /// Keeps the doorbell's connection until it has been made or refused.
    pub(crate) fn ring(&mut self, doorbell: OwnedFd) -> Result<()> {
        self.watch(doorbell.as_fd(), Source::Doorbell, epoll::EventFlags::OUT)?;
        self.doorbell = Some(doorbell);
        Ok(())
    }

    /// Serves for ever.
    ///
    /// # Errors
    /// If events can no longer be waited for.
    pub fn run(&mut self) -> Result<Infallible> {
        loop {
            let mut events = [const { MaybeUninit::<epoll::Event>::uninit() }; EVENTS];
            let timeout = self.timeout();
            let (events, _) = match epoll::wait(&self.epoll, &mut events, timeout.as_ref()) {
                Ok(events) => events,
                Err(rustix::io::Errno::INTR) => continue,
                Err(errno) => return Err(errno).context(|| String::from("waiting for events")),
            };
            for event in events {
                if let Some(source) = Source::decode(event.data) {
                    self.handle(source);
                }
            }
            for number in core::mem::take(&mut self.busy) {
                self.serve_pump(number);
            }
            self.drain_ended();
        }
    }

    fn handle(&mut self, source: Source) {
        match source {
            Source::Listener => self.accept(),
            Source::Control => self.serve_control(),
            Source::Doorbell => self.doorbell = None,
            Source::Process(number) => self.process_ended(number),
            Source::Pump(number) => self.serve_pump(number),
            Source::Oom(number) => self.check_oom(number),
        }
    }

    fn watch(&self, fd: BorrowedFd<'_>, source: Source, flags: epoll::EventFlags) -> Result<()> {
        epoll::add(&self.epoll, fd, source.encode(), flags).context(|| format!("watching {source:?}"))
    }

    fn accept(&mut self) {
        while let Ok(socket) = accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            // The host has one connection. If it makes another, it is a new one that took the old one's place.
            self.control = None;
            if self.watch(socket.as_fd(), Source::Control, epoll::EventFlags::IN | epoll::EventFlags::RDHUP).is_ok() {
                self.control = Some(Control::new(socket));
            }
        }
    }

    fn serve_control(&mut self) {
        loop {
            let Some(control) = &mut self.control else { return };
            let received = control.flush().and_then(|()| control.receive(&mut self.buffer));
            match received {
                Ok(Some(request)) => self.answer(request),
                Ok(None) => break,
                Err(Ended) => {
                    self.control = None;
                    self.streams.clear();
                    return;
                }
            }
        }
        self.watch_room();
    }

    /// Watches for room to send if something waits for it, and not otherwise.
    fn watch_room(&mut self) {
        let Some(control) = &mut self.control else { return };
        if control.is_full() != control.watches_room {
            control.watches_room = control.is_full();
            let room = if control.watches_room { epoll::EventFlags::OUT } else { epoll::EventFlags::empty() };
            let flags = epoll::EventFlags::IN | epoll::EventFlags::RDHUP | room;
            let _ = epoll::modify(&self.epoll, control.socket(), Source::Control.encode(), flags);
        }
    }

    fn answer(&mut self, ToAgent { id, request }: ToAgent) {
        let result = self.perform(request);
        let succeeded = result.is_ok();
        self.send(&FromAgent::Reply { id, result });
        let was_greeted = self.control.as_ref().is_some_and(|control| control.greeted);
        if succeeded && !was_greeted {
            if let Some(control) = &mut self.control {
                control.greeted = true;
            }
            // What happened while no host was there.
            for event in core::mem::take(&mut self.kept) {
                self.tell(event);
            }
        }
    }

    fn send(&mut self, message: &FromAgent) {
        let sent = self.control.as_mut().map(|control| control.send(message));
        if let Some(Err(Ended)) = sent {
            self.control = None;
        }
        self.watch_room();
    }

    /// Tells the host of an event, now or when it is there.
    pub(crate) fn tell(&mut self, event: Event) {
        if self.control.as_ref().is_some_and(|control| control.greeted) {
            self.send(&FromAgent::Event(event));
        } else if self.kept.len() < MAX_KEPT_EVENTS {
            self.kept.push_back(event);
        }
    }

    fn perform(&mut self, request: Request) -> Result<Reply> {
        let greeted = self.control.as_ref().is_some_and(|control| control.greeted);
        match request {
            Request::Hello { version } if version == VERSION => return Ok(Reply::Hello { version: VERSION }),
            Request::Hello { version } => {
                let message = format!("the agent speaks version {VERSION} of the protocol, the host {version}");
                return Err(error(ErrorKind::Version, message));
            }
            _ if !greeted => return Err(error(ErrorKind::State, "the first request has to be Hello")),
            Request::Prepare => {}
            Request::PrepareContainer(sample) => self.prepare_container(sample)?,
            Request::CreateSandbox(sandbox) => {
                if self.machine.is_own {
                    sandbox::make_own(&sandbox)?;
                }
                self.is_sandbox = true;
                return Ok(Reply::Done);
            }
            Request::CreateContainer(_) if !self.is_sandbox => {
                return Err(error(ErrorKind::State, "CreateSandbox has to come before CreateContainer"));
            }
            Request::CreateContainer(container) => return self.create(container),
            Request::Exec { container, process, spec, stdio } => return self.exec(&container, process, *spec, stdio),
            Request::Start { container } => self.start(&container)?,
            Request::Signal { container, process, signal, all } => self.signal(&container, &process, signal, all)?,
            Request::Resize { container, process, size } => self.resize(&container, &process, size)?,
            Request::Update { container, resources } => {
                let cgroup = self.cgroup(&container)?;
                cgroup.set(&resources)?;
                cgroup.enforce_device_rules(&resources.devices)?;
            }
            Request::Pause { container } => self.pause(&container, true)?,
            Request::Resume { container } => self.pause(&container, false)?,
            Request::Stats { container } => return Ok(Reply::Stats(self.cgroup(&container)?.stats())),
            Request::Processes { container } => return self.list_processes(&container),
            Request::Remove { container } => self.remove(&container)?,
            Request::ConfigureNetwork(network) => crate::network::configure(&network)?,
            Request::Shutdown => self.shut_down(),
        }
        Ok(Reply::Done)
    }

    /// Watches a process for its end.
    pub(crate) fn watch_process(&self, pidfd: BorrowedFd<'_>, number: usize) -> Result<()> {
        self.watch(pidfd, Source::Process(number), epoll::EventFlags::IN | epoll::EventFlags::ONESHOT)
    }

    /// Watches a container's memory events.
    pub(crate) fn watch_oom(&self, events: BorrowedFd<'_>, number: usize) -> Result<()> {
        self.watch(events, Source::Oom(number), epoll::EventFlags::PRI | epoll::EventFlags::ET)
    }

    /// Has a pump run whenever it can.
    pub(crate) fn start_pump(&mut self, pump: Pump, process: usize) -> Result<()> {
        let number = self.pumps.insert(ProcessPump { pump, process });
        if let Some(entry) = self.pumps.get(number) {
            // Edge-triggered: a pump always goes on until one side has no more.
            let flags = epoll::EventFlags::IN | epoll::EventFlags::RDHUP | epoll::EventFlags::ET;
            let watched = self.watch(entry.pump.from(), Source::Pump(number), flags);
            if watched.is_err() {
                self.pumps.remove(number);
            }
            watched?;
        }
        Ok(())
    }

    fn serve_pump(&mut self, number: usize) {
        let Some(entry) = self.pumps.get_mut(number) else { return };
        match entry.pump.run(&mut self.buffer) {
            Progress::Empty => {}
            Progress::Busy => self.busy.push(number),
            Progress::Full if entry.pump.watches_to => {}
            Progress::Full => {
                entry.pump.watches_to = true;
                let flags = epoll::EventFlags::OUT | epoll::EventFlags::ET;
                let _ = epoll::add(&self.epoll, entry.pump.to(), Source::Pump(number).encode(), flags);
            }
            Progress::Done => self.pump_done(number),
        }
    }

    fn pump_done(&mut self, number: usize) {
        let Some(ProcessPump { pump, process }) = self.pumps.remove(number) else { return };
        if pump.direction == Direction::Out {
            if let Some(entry) = self.processes.get_mut(process) {
                entry.outputs = entry.outputs.saturating_sub(1);
            }
            self.finish(process);
        }
    }

    /// Sends the exit of a process that has ended, if its output has been delivered and it is its turn.
    pub(crate) fn finish(&mut self, number: usize) {
        let Some(entry) = self.processes.get(number) else { return };
        let Some(status) = entry.status else { return };
        let others =
            self.processes.iter().any(|(_, other)| other.container == entry.container && !other.process.is_empty());
        if entry.outputs > 0 || (entry.process.is_empty() && others) {
            return;
        }
        let Some(entry) = self.processes.remove(number) else { return };
        for pump in self.pumps.numbers(|pump| pump.process == number) {
            self.pumps.remove(pump);
        }
        let container = entry.container.to_string();
        let is_init = entry.process.is_empty();
        self.tell(Event::Exit { container: container.clone(), process: entry.process, status });
        if !is_init {
            // Init's exit waits for those of all others.
            for init in self.processes.numbers(|entry| entry.container == container && entry.process.is_empty()) {
                self.finish(init);
            }
        }
    }

    /// How long there is nothing to do unless something happens.
    fn timeout(&self) -> Option<Timespec> {
        if !self.busy.is_empty() {
            return Some(Timespec { tv_sec: 0, tv_nsec: 0 });
        }
        let next = self.processes.iter().filter_map(|(_, entry)| entry.drain_until_ms).min()?;
        let wait = next.saturating_sub(now_ms());
        let seconds = i64::try_from(wait / 1000).unwrap_or(i64::MAX);
        Some(Timespec { tv_sec: seconds, tv_nsec: i64::try_from(wait % 1000).unwrap_or(0) * 1_000_000 })
    }

    /// Ends the output of processes that have ended, when nothing has come for a while.
    fn drain_ended(&mut self) {
        let waiting = self.processes.numbers(|entry| entry.status.is_some() && entry.outputs > 0);
        if waiting.is_empty() {
            return;
        }
        let now = now_ms();
        for number in waiting {
            let Some(entry) = self.processes.get_mut(number) else { continue };
            let patience = if entry.process.is_empty() { INIT_DRAIN_MS } else { DRAIN_MS };
            if *entry.drain_until_ms.get_or_insert(now + patience) > now {
                continue;
            }
            entry.drain_until_ms = Some(now + patience);
            for pump in self.pumps.numbers(|pump| pump.process == number && pump.pump.direction == Direction::Out) {
                let Some(entry) = self.pumps.get_mut(pump) else { continue };
                match entry.pump.run(&mut self.buffer) {
                    Progress::Empty => {
                        entry.pump.end();
                        self.pump_done(pump);
                    }
                    Progress::Done => self.pump_done(pump),
                    // The host is slow to read it, which is the host's affair.
                    Progress::Full | Progress::Busy => {}
                }
            }
        }
    }
}

/// Milliseconds on the monotonic clock.
fn now_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1000 + u64::try_from(now.tv_nsec).unwrap_or(0) / 1_000_000
}
