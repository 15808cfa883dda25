//! `caisson logs`: what a container wrote.
use std::io::Write as _;

use anyhow::Context as _;
use caisson_runtime::{clock, logs};

use crate::context::Context;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Go on until the container ends
    #[arg(short, long)]
    follow: bool,
    /// Only so many lines at the end, or all
    #[arg(short = 'n', long, default_value = "all")]
    tail: String,
    /// Only what is not older: a time (2026-11-24T18:00:00Z) or how long ago (10m)
    #[arg(long)]
    since: Option<String>,
    /// Only what is older
    #[arg(long)]
    until: Option<String>,
    /// Each line's time
    #[arg(short, long)]
    timestamps: bool,
    /// The container
    container: String,
}

fn moment(text: &str) -> anyhow::Result<u64> {
    clock::parse_rfc3339(text)
        .or_else(|| clock::parse_duration(text).map(|ago| clock::realtime_ns().saturating_sub(ago.as_nanos() as u64)))
        .with_context(|| format!("{text:?} is neither a time (2026-11-24T18:00:00Z) nor a span (10m)"))
}

pub(crate) fn run(arguments: &Arguments, context: &Context) -> anyhow::Result<u8> {
    let container = context.container(&arguments.container)?;
    let tail = match arguments.tail.as_str() {
        "all" => None,
        count => Some(count.parse().with_context(|| format!("--tail {count:?} is neither a number nor all"))?),
    };
    let query = logs::Query {
        tail,
        since_ns: arguments.since.as_deref().map(moment).transpose()?,
        until_ns: arguments.until.as_deref().map(moment).transpose()?,
    };
    let directory = container.directory.clone();
    let mut alive = move || directory.state().is_ok_and(|state| state.is_alive());
    let follow: Option<&mut dyn FnMut() -> bool> = if arguments.follow { Some(&mut alive) } else { None };
    let print = |entry: logs::Entry| {
        let line = if arguments.timestamps { format!("{} {}", entry.time, entry.log) } else { entry.log };
        if entry.stream == "stderr" {
            std::io::stderr().lock().write_all(line.as_bytes())
        } else {
            let mut out = std::io::stdout().lock();
            out.write_all(line.as_bytes()).and_then(|()| out.flush())
        }
    };
    match logs::read(&container.directory.log(), &query, follow, print) {
        // Whoever read has gone.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(0),
        result => result.map(|()| 0).context("cannot read the log"),
    }
}
