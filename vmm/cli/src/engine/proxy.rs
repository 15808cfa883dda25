//! The process of the host that stands for a process in a guest: it has the caller's stdio, passes signals on, and ends as that one ends.
use std::{
    fs::File,
    io::{IsTerminal, Write, stdin},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::PathBuf,
};

use anyhow::bail;
use caisson_runtime::{
    console, engine,
    paths::Paths,
    signals,
    state::{Directory, Exit},
    supervisor::{
        Client, own_stdio,
        wire::{Answer, Request},
    },
};
use oci_spec::runtime::Process;

use super::create::explain_program;
use crate::{
    context::Context,
    interactive::{self, Signals},
    output::Progress,
};

#[derive(Debug, clap::Args)]
pub(crate) struct ProxyArguments {
    #[arg(long)]
    process_fd: i32,
    #[arg(long)]
    channel: i32,
    #[arg(long)]
    console_socket: Option<PathBuf>,
    id: String,
}

/// The hidden verb: tells its parent how it went, then stands.
pub(crate) fn run(arguments: &ProxyArguments, context: &Context) -> anyhow::Result<u8> {
    let mut channel = Some(UnixStream::from(signals::inherited(arguments.channel)?));
    let process = signals::inherited(arguments.process_fd)?;
    let mut tell = |text: &str| {
        if let Some(mut channel) = channel.take() {
            let _ = channel.write_all(text.as_bytes());
        }
    };
    let result = (|| {
        let process: Process = serde_json::from_reader(File::from(process))?;
        let container = engine::find(&context.paths, &arguments.id)?;
        let terminal = arguments.console_socket.as_deref().map(console::open).transpose()?;
        stand_for(&context.paths, &container.directory, &process, terminal, || {
            tell("started");
            Ok(())
        })
    })();
    if let Err(error) = &result {
        tell(&format!("error:{error:#}"));
    }
    result
}

/// Runs a process in a container and ends as it does. `started` is called when it runs.
pub(crate) fn stand_for(
    paths: &Paths,
    directory: &Directory,
    process: &Process,
    terminal: Option<OwnedFd>,
    started: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<u8> {
    let signals = Signals::take()?;
    let mut client =
        Client::connect(paths, directory).map_err(|_| anyhow::anyhow!("cannot exec in a stopped container"))?;
    let with_terminal = process.terminal().unwrap_or(false);
    let stdio = match &terminal {
        Some(slave) => [slave.try_clone()?, slave.try_clone()?, slave.try_clone()?],
        None => own_stdio()?,
    };
    let streams = [true, true, !with_terminal];
    let passed: Vec<_> =
        stdio.iter().zip(streams).filter(|(_, pass)| *pass).map(|(descriptor, _)| descriptor.as_fd()).collect();
    client.send(
        &Request::Exec { process: Box::new(process.clone()), user: None, streams, container_defaults: false },
        &passed,
    )?;
    let program = process.args().iter().flatten().next().cloned().unwrap_or_default();
    let name = match client.answer().map_err(|error| explain_program(error, &program))? {
        Answer::Started { process, .. } => process,
        other => bail!("the supervisor answered {other:?}"),
    };
    started()?;
    // The supervisor has the terminal now; this process keeps it only to hear of its size.
    let raw = with_terminal && (terminal.is_some() || stdin().is_terminal());
    let end = interactive::follow(&mut client, &signals, raw, Some(name), &mut Progress::new())?;
    if let Exit::Signal(signal) = end.exit
        && terminal.is_some()
    {
        signals::die_of(signal);
    }
    Ok(end.exit.code())
}
