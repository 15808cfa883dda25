//! The life of a container: create, start, exec, pause, remove.
use crate::{
    cgroup::{self, Cgroup},
    child::Child,
    error::{Context, Result, error},
    launch::{Exec, Init, Program, Stage},
    processes::Entry,
    pump::{Direction, Pump},
    root,
    server::Server,
    sys,
};
use alloc::{
    boxed::Box,
    format,
    string::{String, ToString},
    vec::Vec,
};
use caisson_agent_protocol::{self as protocol, ContainerId, ErrorKind, Event, Process, ProcessId, Reply, Stdio};
use linux_raw_sys::general::CLONE_NEWPID;
use rustix::{
    fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    io::{fcntl_dupfd_cloexec, ioctl_fionbio},
    pipe::{PipeFlags, pipe_with},
    process::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open},
};

/// The most containers of a sandbox, and the most processes of the agent's own making.
const MAX_CONTAINERS: usize = 256;
const MAX_PROCESSES: usize = 4096;

/// A container.
pub(crate) struct Container {
    pub(crate) id: ContainerId,
    /// Its init process, while that waits for its start.
    pub(crate) created: Option<Child<Init>>,
    has_process: bool,
    cgroup: Option<Cgroup>,
    oom_events: Option<OwnedFd>,
    oom_kills: u64,
    paused: bool,
}

/// A container that was begun before anybody asked for it.
pub(crate) struct Spare {
    child: Child<Init>,
    cgroup: Option<Cgroup>,
    sample: Box<protocol::Container>,
    /// The agent, in a descriptor that the child has too.
    agent: OwnedFd,
}

/// The agent's and the program's ends of standard streams.
#[derive(Default)]
struct Streams {
    /// What becomes the program's 0, 1 and 2.
    program: [Option<OwnedFd>; 3],
    pumps: Vec<Pump>,
    /// With a terminal: the host's stream for both directions.
    terminal: Option<OwnedFd>,
}

impl Streams {
    fn numbers(&self) -> [Option<RawFd>; 3] {
        self.program.each_ref().map(|fd| fd.as_ref().map(AsRawFd::as_raw_fd))
    }
}

impl Server {
    fn find(&self, container: &str) -> Result<usize> {
        let found = self.containers.iter().find(|(_, entry)| entry.id == container);
        found
            .map(|(number, _)| number)
            .ok_or_else(|| error(ErrorKind::NotFound, format!("there is no container {container:?}")))
    }

    fn entry(&mut self, container: &str) -> Result<&mut Container> {
        let number = self.find(container)?;
        self.containers.get_mut(number).ok_or_else(|| error(ErrorKind::NotFound, "the container is gone"))
    }

    pub(crate) fn cgroup(&mut self, container: &str) -> Result<&mut Cgroup> {
        let cgroup = self.entry(container)?.cgroup.as_mut();
        cgroup.ok_or_else(|| error(ErrorKind::State, "there are no cgroups here"))
    }

    fn take_streams(&mut self, stdio: Stdio, terminal: bool) -> Result<Streams> {
        let mut streams = Streams::default();
        if terminal {
            streams.terminal = stdio.stdin.map(|token| self.streams.take(token)).transpose()?;
            return Ok(streams);
        }
        let doing = || String::from("making a pipe");
        for (number, token) in [stdio.stdin, stdio.stdout, stdio.stderr].into_iter().enumerate() {
            let Some(token) = token else { continue };
            let stream = self.streams.take(token)?;
            let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).context(doing)?;
            let (program, pump) = if number == 0 {
                (reader, Pump::new(stream, writer, Direction::In))
            } else {
                (writer, Pump::new(reader, stream, Direction::Out))
            };
            let ours = if number == 0 { pump.to() } else { pump.from() };
            ioctl_fionbio(ours, true).context(doing)?;
            streams.program[number] = Some(program);
            streams.pumps.push(pump);
        }
        Ok(streams)
    }

    pub(crate) fn create(&mut self, mut container: Box<protocol::Container>) -> Result<Reply> {
        if self.find(&container.id).is_ok() {
            return Err(error(ErrorKind::State, format!("there is a container {:?} already", container.id)));
        }
        if self.containers.iter().count() >= MAX_CONTAINERS {
            return Err(error(ErrorKind::State, format!("there are {MAX_CONTAINERS} containers already")));
        }
        let process = container.process.take();
        let has_process = process.is_some();
        let terminal = process.as_ref().is_some_and(|process| process.terminal.is_some());
        let streams = self.take_streams(container.stdio, terminal)?;
        let mut spare = self.spare.take_if(|spare| root::is_like(&container, &spare.sample));
        let mut cgroup = match &mut spare {
            Some(spare) => spare.cgroup.take(),
            None => self.machine.cgroups.as_mut().map(cgroup::Root::make).transpose()?,
        };
        let spawned = match &mut cgroup {
            Some(cgroup) => cgroup.set(&container.resources),
            None => Ok(()),
        }
        .and_then(|()| {
            let id = container.id.clone();
            let null = self.machine.null.as_raw_fd();
            let mut program = process.map(|process| Program::new(process, streams.numbers(), null));
            if let Some(Spare { mut child, sample, agent, .. }) = spare {
                if let Some(program) = &mut program {
                    program.agent = Some(agent.as_raw_fd());
                }
                let job = child.job();
                (job.container, job.program, job.sample) = (container, program, Some(sample));
                return Ok((id, child.advance()?));
            }
            let job = Init {
                program,
                stage: Stage::Container,
                sample: None,
                share_directory: self.machine.share_directory.clone(),
                is_own_machine: self.machine.is_own,
                container,
            };
            let flags = Init::namespaces(&job.container);
            Ok((id, Child::spawn(job, flags, cgroup.as_ref().map(Cgroup::directory))?))
        });
        let spawned = spawned.and_then(|(id, mut child)| {
            if let Some(cgroup) = &mut cgroup {
                cgroup.enforce_device_rules(&child.job().container.resources.devices)?;
            }
            Ok((id, child))
        });
        let (id, mut child) = match spawned {
            Ok(spawned) => spawned,
            Err(failure) => {
                if let (Some(root), Some(cgroup)) = (&self.machine.cgroups, &cgroup) {
                    let _ = root.remove(cgroup);
                }
                return Err(failure);
            }
        };
        let master = child.job().program.as_ref().and_then(|program| program.master);
        let number = self.processes.insert(Entry {
            container: id.clone(),
            process: ProcessId::new(),
            pidfd: None,
            terminal: None,
            outputs: 0,
            status: None,
            drain_until_ms: None,
        });
        let attached = match child.pidfd() {
            Some(pidfd) => {
                self.attach_streams(number, streams, pidfd, master).and_then(|()| self.watch_process(pidfd, number))
            }
            None => Ok(()),
        };
        let oom_events = cgroup.as_ref().and_then(Cgroup::watch_oom);
        let entry =
            Container { id, created: Some(child), has_process, cgroup, oom_events, oom_kills: 0, paused: false };
        let container = self.containers.insert(entry);
        if let Some(events) = self.containers.get(container).and_then(|container| container.oom_events.as_ref()) {
            let _ = self.watch_oom(events.as_fd(), container);
        }
        if let Err(failure) = attached {
            let id = self.containers.get(container).map(|container| container.id.clone()).unwrap_or_default();
            let _ = self.remove(&id);
            return Err(failure);
        }
        Ok(Reply::Process { pid: 1 })
    }

    /// Begins a container like this one, to be used by the next that is.
    pub(crate) fn prepare_container(&mut self, sample: Box<protocol::Container>) -> Result<()> {
        if self.spare.is_some() || !root::can_be_spare(&sample) {
            return Err(error(ErrorKind::Invalid, "a container like this one cannot be begun without its root"));
        }
        let doing = || String::from("opening the agent's own process");
        let agent = pidfd_open(rustix::process::getpid(), PidfdFlags::empty()).context(doing)?;
        let mut cgroup = self.machine.cgroups.as_mut().map(cgroup::Root::make).transpose()?;
        if let Some(cgroup) = &mut cgroup {
            cgroup.load_device_rules(&sample.resources.devices)?;
        }
        let flags = Init::namespaces(&sample);
        let job = Init {
            program: None,
            stage: Stage::Spare,
            sample: None,
            share_directory: self.machine.share_directory.clone(),
            is_own_machine: self.machine.is_own,
            container: sample.clone(),
        };
        let child = Child::spawn(job, flags, cgroup.as_ref().map(Cgroup::directory))?;
        self.spare = Some(Spare { child, cgroup, sample, agent });
        Ok(())
    }

    /// Has the streams of a process pumped. The program's own ends are closed here: it has them.
    fn attach_streams(
        &mut self,
        number: usize,
        streams: Streams,
        pidfd: BorrowedFd<'_>,
        master: Option<RawFd>,
    ) -> Result<()> {
        let Streams { mut pumps, terminal, program: _ } = streams;
        if let Some(master) = master {
            let doing = || String::from("taking the terminal from the process");
            let master = pidfd_getfd(pidfd, master, PidfdGetfdFlags::empty()).context(doing)?;
            ioctl_fionbio(&master, true).context(doing)?;
            if let Some(stream) = terminal {
                let copy = |fd: &OwnedFd| fcntl_dupfd_cloexec(fd, 3).context(doing);
                pumps.push(Pump::new(copy(&stream)?, copy(&master)?, Direction::In));
                pumps.push(Pump::new(copy(&master)?, stream, Direction::Out));
            }
            if let Some(entry) = self.processes.get_mut(number) {
                entry.terminal = Some(master);
            }
        }
        for pump in pumps {
            if pump.direction == Direction::Out
                && let Some(entry) = self.processes.get_mut(number)
            {
                entry.outputs += 1;
            }
            self.start_pump(pump, number)?;
        }
        Ok(())
    }

    pub(crate) fn start(&mut self, container: &str) -> Result<()> {
        let entry = self.entry(container)?;
        if !entry.has_process {
            return Err(error(ErrorKind::State, format!("container {container:?} has no process to start")));
        }
        let child = entry.created.take();
        let child =
            child.ok_or_else(|| error(ErrorKind::State, format!("container {container:?} was started before")))?;
        let number = self.find_process(container, "")?;
        let pidfd = child.execute();
        match pidfd {
            Ok(pidfd) => {
                if let Some(entry) = self.processes.get_mut(number) {
                    entry.pidfd = Some(pidfd);
                }
                Ok(())
            }
            Err(failure) => {
                self.forget(number);
                Err(failure)
            }
        }
    }

    /// Forgets a process that never ran its program.
    fn forget(&mut self, number: usize) {
        self.processes.remove(number);
        for pump in self.pumps.numbers(|pump| pump.process == number) {
            self.pumps.remove(pump);
        }
    }

    pub(crate) fn exec(&mut self, container: &str, process: ProcessId, spec: Process, stdio: Stdio) -> Result<Reply> {
        if process.is_empty() || self.find_process(container, &process).is_ok() {
            return Err(error(ErrorKind::State, format!("process {process:?} is there already")));
        }
        let entry = self.entry(container)?;
        if entry.created.is_some() || entry.paused {
            return Err(error(ErrorKind::State, format!("container {container:?} is not running")));
        }
        if self.processes.iter().count() >= MAX_PROCESSES {
            return Err(error(ErrorKind::State, format!("there are {MAX_PROCESSES} processes already")));
        }
        let streams = self.take_streams(stdio, spec.terminal.is_some())?;
        let init = self.find_process(container, "")?;
        let running = || error(ErrorKind::State, format!("container {container:?} is not running"));
        let init = self.pidfd(init).ok_or_else(running)?;
        let program = Program::new(spec, streams.numbers(), self.machine.null.as_raw_fd());
        let job = Exec { init: init.as_raw_fd(), program };
        let cgroup = self
            .containers
            .iter()
            .find(|(_, entry)| entry.id == container)
            .and_then(|(_, entry)| entry.cgroup.as_ref());
        let mut child = in_pid_namespace(init, self.machine.pid_namespace.as_fd(), || {
            Child::spawn(job, 0, cgroup.map(Cgroup::directory))
        })?;
        let (master, pid) = (child.job().program.master, child.job().program.pid);
        let number = self.processes.insert(Entry {
            container: container.to_string(),
            process,
            pidfd: None,
            terminal: None,
            outputs: 0,
            status: None,
            drain_until_ms: None,
        });
        let attached = match child.pidfd() {
            Some(pidfd) => self.attach_streams(number, streams, pidfd, master),
            None => Ok(()),
        };
        let started = attached.and_then(|()| child.execute());
        let pidfd = match started {
            Ok(pidfd) => pidfd,
            Err(failure) => {
                self.forget(number);
                return Err(failure);
            }
        };
        let watched = self.watch_process(pidfd.as_fd(), number);
        if let Some(entry) = self.processes.get_mut(number) {
            entry.pidfd = Some(pidfd);
        }
        watched?;
        Ok(Reply::Process { pid: pid.cast_unsigned() })
    }

    pub(crate) fn pause(&mut self, container: &str, pause: bool) -> Result<()> {
        let entry = self.entry(container)?;
        if entry.paused == pause {
            let state = if pause { "paused already" } else { "not paused" };
            return Err(error(ErrorKind::State, format!("container {container:?} is {state}")));
        }
        self.cgroup(container)?.freeze(pause)?;
        self.entry(container)?.paused = pause;
        Ok(())
    }

    /// Tells the host if the kernel has killed processes of a container for want of memory.
    pub(crate) fn check_oom(&mut self, container: usize) {
        let Some(entry) = self.containers.get_mut(container) else { return };
        let Some(events) = &entry.oom_events else { return };
        let kills = cgroup::oom_kills(events);
        if kills > entry.oom_kills {
            entry.oom_kills = kills;
            let container = entry.id.clone();
            self.tell(Event::Oom { container });
        }
    }

    pub(crate) fn remove(&mut self, container: &str) -> Result<()> {
        let number = self.find(container)?;
        if let Some(entry) = self.containers.get_mut(number) {
            // Ends it if it was never started.
            entry.created = None;
            if let Some(cgroup) = &entry.cgroup {
                cgroup.kill()?;
            }
        }
        for process in self.processes.numbers(|entry| entry.container == container) {
            if let Some(pidfd) = self.pidfd(process) {
                let _ = sys::send_signal(pidfd, 9);
            } else if let Some(entry) = self.processes.get(process)
                && entry.status.is_none()
            {
                self.forget(process);
            }
        }
        self.wait_for_end(container)?;
        // Nobody is interested in the rest of their output.
        for process in self.processes.numbers(|entry| entry.container == container) {
            self.forget(process);
        }
        let entry = self.containers.remove(number);
        match (entry.and_then(|entry| entry.cgroup), &self.machine.cgroups) {
            (Some(cgroup), Some(root)) => root.remove(&cgroup),
            _ => Ok(()),
        }
    }

    /// Ends all containers and the machine.
    pub(crate) fn shut_down(&mut self) {
        let ids: Vec<ContainerId> = self.containers.iter().map(|(_, container)| container.id.clone()).collect();
        for id in ids {
            let _ = self.remove(&id);
        }
        if self.machine.is_own {
            rustix::fs::sync();
            sys::end_machine();
        }
    }
}

/// Does something that makes a process, which is to be in the PID namespace of another one.
fn in_pid_namespace<T>(of: BorrowedFd<'_>, own: BorrowedFd<'_>, make: impl FnOnce() -> Result<T>) -> Result<T> {
    sys::set_namespaces(of, CLONE_NEWPID).context(|| String::from("entering the container's PID namespace"))?;
    let made = make();
    sys::set_namespaces(own, CLONE_NEWPID).context(|| String::from("leaving the container's PID namespace"))?;
    made
}
