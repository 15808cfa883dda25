//! `caisson supervise`: hidden. The process that owns a container is this program too.
use std::path::PathBuf;

use caisson_runtime::supervisor;

/// Told by the command that starts it.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    #[arg(long)]
    directory: PathBuf,
    #[arg(long)]
    run: PathBuf,
    #[arg(long)]
    channel: i32,
    #[arg(long)]
    stdio: bool,
    #[arg(long, default_value_t = 0)]
    request_ns: u64,
}

pub(crate) fn run(arguments: Arguments) -> u8 {
    let Arguments { directory, run, channel, stdio, request_ns } = arguments;
    supervisor::run(supervisor::Arguments { directory, run, channel, stdio, request_ns })
}
