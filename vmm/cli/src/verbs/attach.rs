//! `caisson attach`: a running container's streams.
use std::{
    io::{IsTerminal, stdin},
    os::fd::AsFd,
};

use caisson_runtime::supervisor::{Client, own_stdio, wire::Request};

use crate::{
    context::Context,
    interactive::{self, Signals},
    output::Progress,
    verbs::run::report,
};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Do not join its input
    #[arg(long)]
    no_stdin: bool,
    /// The container
    container: String,
}

pub(crate) fn run(arguments: &Arguments, context: &Context) -> anyhow::Result<u8> {
    let signals = Signals::take()?;
    let container = context.container(&arguments.container)?;
    let mut client = Client::connect(&context.paths, &container.directory)?;
    let terminal = container.config.spec.process().as_ref().and_then(|process| process.terminal()).unwrap_or(false);
    let streams = [!arguments.no_stdin && container.config.stdin, true, true];
    let stdio = own_stdio()?;
    let passed: Vec<_> =
        stdio.iter().zip(streams).filter(|(_, pass)| *pass).map(|(descriptor, _)| descriptor.as_fd()).collect();
    client.send(&Request::Attach { streams }, &passed)?;
    client.answer()?;
    let terminal = terminal && stdin().is_terminal();
    let end = interactive::follow(&mut client, &signals, terminal, Some(String::new()), &mut Progress::new())?;
    report(&end);
    Ok(end.exit.code())
}
