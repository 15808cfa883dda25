//! `caisson wait`: until containers have ended.
use std::time::Duration;

use super::stop::ends_within;
use crate::{
    context::{Context, each},
    output::print,
};
use caisson_runtime::supervisor::{
    Client,
    wire::{Answer, Request},
};

/// Longer than any container lives.
const FOREVER: Duration = Duration::from_secs(u32::MAX as u64);

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The containers
    #[arg(required = true)]
    containers: Vec<String>,
}

pub(crate) fn run(arguments: &Arguments, context: &Context) -> anyhow::Result<u8> {
    each(&arguments.containers, |name| {
        let container = context.container(name)?;
        let mut code = None;
        if let Ok(mut client) = Client::connect(&context.paths, &container.directory)
            && client.ask(&Request::Wait).is_ok()
            && let Ok(Answer::Exited { exit, .. }) = client.answer()
        {
            code = Some(exit.code());
        }
        ends_within(&container, FOREVER)?;
        let recorded = || container.directory.state().ok().and_then(|state| state.exit).map_or(137, |exit| exit.code());
        print(&format!("{}\n", code.unwrap_or_else(recorded)));
        Ok(())
    })
}
