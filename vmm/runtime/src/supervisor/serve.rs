//! Serves the commands that come to a running container, each connection in a thread of its own.
use std::{
    os::unix::net::UnixListener,
    sync::{Arc, Mutex, atomic::Ordering},
    thread,
};

use caisson_agent_protocol::{self as agent, Reply, Request as AgentRequest};
use oci_spec::runtime::Process as SpecProcess;

use super::{
    run::{Failure, Shared, Wanted, Watcher, lock, open_process, program_failure, tell},
    wire::{Answer, Receiver, Request},
};
use crate::{agent::RequestError, container::GUEST_ID, sandbox::REQUEST_DEADLINE, spec, state::Status};

/// Accepts connections for as long as this process lives.
pub(super) fn accept(shared: &Arc<Shared>, listener: UnixListener) -> Result<(), Failure> {
    let shared = Arc::clone(shared);
    thread::Builder::new().name("accept".into()).spawn(move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else { continue };
            let Ok(writer) = stream.try_clone() else { continue };
            let _ = connection(&shared, Receiver::new(stream), Arc::new(Mutex::new(writer)));
        }
    })?;
    Ok(())
}

/// Serves one connection in a thread of its own.
pub(super) fn connection(shared: &Arc<Shared>, mut receiver: Receiver, watcher: Watcher) -> Result<(), Failure> {
    let shared = Arc::clone(shared);
    thread::Builder::new().name("connection".into()).spawn(move || {
        while let Ok(Some(request)) = receiver.receive::<Request>() {
            match handle(&shared, request, &mut receiver, &watcher) {
                Ok(Some(answer)) => tell(&watcher, &answer),
                Ok(None) => {}
                Err(Failure { code, message }) => tell(&watcher, &Answer::Error { message, code }),
            }
        }
    })?;
    Ok(())
}

fn refuse(message: impl Into<String>) -> Failure {
    Failure { code: 125, message: message.into() }
}

/// Carries out a request. None: the answer was given, or comes later.
fn handle(
    shared: &Arc<Shared>,
    request: Request,
    receiver: &mut Receiver,
    watcher: &Watcher,
) -> Result<Option<Answer>, Failure> {
    let container = || GUEST_ID.to_owned();
    let done = |request| -> Result<Option<Answer>, Failure> {
        shared.sandbox.agent().done(request, REQUEST_DEADLINE)?;
        Ok(Some(Answer::Done))
    };
    let status = || lock(&shared.state).status;
    match request {
        Request::Start => {
            if !status().can_start() {
                return Err(refuse(format!("cannot start a container that is {}", status().name())));
            }
            shared.start()?;
            Ok(Some(Answer::Done))
        }
        Request::Exec { process, user, streams, container_defaults } => {
            if status() != Status::Running {
                return Err(refuse(format!("cannot exec in a container that is {}", status().name())));
            }
            let stdio = streams.map(|passed| if passed { receiver.take_descriptor() } else { None });
            exec(shared, *process, user, stdio, container_defaults, watcher)
        }
        Request::Attach { streams } => {
            let [source, out, err] = streams.map(|passed| if passed { receiver.take_descriptor() } else { None });
            let init = lock(&shared.processes).get("").ok_or_else(|| refuse("the container has ended"))?;
            lock(&init.watchers).push(Arc::clone(watcher));
            if let Some(out) = out {
                init.stdout.add(out);
            }
            if let Some(err) = err {
                init.stderr.add(err);
            }
            if let (true, Some(input), Some(source)) = (shared.config.stdin, &init.input, source) {
                input.pump(source, false)?;
            }
            Ok(Some(Answer::Done))
        }
        Request::Signal { process, signal, all } => {
            shared.signal(&process, signal, all)?;
            Ok(Some(Answer::Done))
        }
        Request::Stop { signal } => {
            shared.stopping.store(true, Ordering::Relaxed);
            shared.signal("", signal, false)?;
            Ok(Some(Answer::Done))
        }
        Request::Resize { process, width, height } => {
            done(AgentRequest::Resize { container: container(), process, size: agent::TerminalSize { width, height } })
        }
        Request::Pause => {
            if status() != Status::Running {
                return Err(refuse(format!("cannot pause a container that is {}", status().name())));
            }
            let answer = done(AgentRequest::Pause { container: container() })?;
            shared.set_status(Status::Paused)?;
            Ok(answer)
        }
        Request::Resume => {
            if status() != Status::Paused {
                return Err(refuse(format!("cannot resume a container that is {}", status().name())));
            }
            let answer = done(AgentRequest::Resume { container: container() })?;
            shared.set_status(Status::Running)?;
            Ok(answer)
        }
        Request::Update { resources } => {
            let resources = spec::convert_resources(&resources)?;
            done(AgentRequest::Update { container: container(), resources })
        }
        Request::Stats => {
            match shared.sandbox.agent().request(AgentRequest::Stats { container: container() }, REQUEST_DEADLINE)? {
                Reply::Stats(stats) => Ok(Some(Answer::Stats { stats })),
                _ => Err(RequestError::Answer { request: "Stats" }.into()),
            }
        }
        Request::Processes => {
            match shared
                .sandbox
                .agent()
                .request(AgentRequest::Processes { container: container() }, REQUEST_DEADLINE)?
            {
                Reply::Processes(processes) => Ok(Some(Answer::Processes { processes })),
                _ => Err(RequestError::Answer { request: "Processes" }.into()),
            }
        }
        Request::State => Ok(Some(Answer::State { status: status() })),
        Request::Wait => {
            let init = lock(&shared.processes).get("").ok_or_else(|| refuse("the container has ended"))?;
            lock(&init.watchers).push(Arc::clone(watcher));
            Ok(Some(Answer::Done))
        }
    }
}

fn exec(
    shared: &Arc<Shared>,
    described: SpecProcess,
    user: Option<String>,
    stdio: [Option<std::os::fd::OwnedFd>; 3],
    container_defaults: bool,
    watcher: &Watcher,
) -> Result<Option<Answer>, Failure> {
    let filter = shared.config.spec.linux().as_ref().and_then(|linux| linux.seccomp().as_ref());
    let mut converted = spec::convert_process(&described, filter)?;
    if container_defaults && let Some(init) = shared.config.spec.process() {
        let init = spec::convert_process(init, None)?;
        converted.capabilities = init.capabilities;
        converted.no_new_privileges = init.no_new_privileges;
        converted.rlimits = init.rlimits;
    }
    if let Some(user) = user {
        converted.user = agent::User::Name(user);
    }
    let name = format!("exec-{}", shared.next_exec.fetch_add(1, Ordering::Relaxed));
    let wanted = Wanted { stdin: stdio[0].is_some(), terminal: converted.terminal.is_some() };
    let (process, tokens) = open_process(&shared.sandbox, wanted, None, Some(stdio), || {})?;
    let request = AgentRequest::Exec {
        container: GUEST_ID.into(),
        process: name.clone(),
        spec: Box::new(converted),
        stdio: tokens,
    };
    let pid =
        match shared.sandbox.agent().request(request, REQUEST_DEADLINE).map_err(|error| program_failure(&error))? {
            Reply::Process { pid } => pid,
            _ => return Err(RequestError::Answer { request: "Exec" }.into()),
        };
    // Told before the process can be found by its end.
    tell(watcher, &Answer::Started { process: name.clone(), pid });
    lock(&process.watchers).push(Arc::clone(watcher));
    let early = lock(&shared.processes).add(&name, Arc::new(process));
    if let Some(exit) = early {
        shared.exec_ended(name, exit);
    }
    Ok(None)
}
