//! `caisson pause` and `unpause`.
use caisson_runtime::supervisor::{Client, wire::Request};

use super::exec::print_name;
use crate::context::{Context, each};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The containers
    #[arg(required = true)]
    containers: Vec<String>,
}

pub(crate) fn run(arguments: &Arguments, pause: bool, context: &Context) -> anyhow::Result<u8> {
    each(&arguments.containers, |name| {
        let container = context.container(name)?;
        let _lock = container.directory.lock()?;
        let request = if pause { Request::Pause } else { Request::Resume };
        Client::connect(&context.paths, &container.directory)?.ask(&request)?;
        print_name(name);
        Ok(())
    })
}
