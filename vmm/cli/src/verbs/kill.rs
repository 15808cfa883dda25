//! `caisson kill`: a signal for containers.
use anyhow::Context as _;
use caisson_runtime::{
    containers::signal_number,
    supervisor::{Client, wire::Request},
};

use super::{exec::print_name, stop};
use crate::context::{Context, each};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The signal, by name or number
    #[arg(short, long, default_value = "KILL")]
    signal: String,
    /// The containers
    #[arg(required = true)]
    containers: Vec<String>,
}

pub(crate) fn run(arguments: &Arguments, context: &Context) -> anyhow::Result<u8> {
    let signal =
        signal_number(&arguments.signal).with_context(|| format!("there is no signal {}", arguments.signal))?;
    each(&arguments.containers, |name| {
        let container = context.container(name)?;
        let mut client = Client::connect(&context.paths, &container.directory)
            .map_err(|_| anyhow::anyhow!("cannot kill container {name}: container not running"))?;
        if i32::from(signal) == libc::SIGKILL {
            drop(client);
            stop::kill(&container, context)?;
        } else {
            client.ask(&Request::Signal { process: String::new(), signal, all: false })?;
        }
        print_name(name);
        Ok(())
    })
}
