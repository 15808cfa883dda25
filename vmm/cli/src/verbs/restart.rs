//! `caisson restart`: stop and start.
use std::time::Duration;

use super::{exec::print_name, start, stop};
use crate::context::{Context, each};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Seconds between asking and killing
    #[arg(short, long, default_value_t = 10, value_name = "SECONDS")]
    time: u64,
    /// The containers
    #[arg(required = true)]
    containers: Vec<String>,
}

pub(crate) fn run(arguments: &Arguments, context: &Context) -> anyhow::Result<u8> {
    each(&arguments.containers, |name| {
        let container = context.container(name)?;
        stop::stop(&container, Duration::from_secs(arguments.time), context)?;
        start::start(&container, context)?;
        print_name(name);
        Ok(())
    })
}
