//! `caisson stop`: the ladder. Ask the program, kill it, kill its supervisor.
use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::bail;
use caisson_runtime::{
    containers::Container,
    supervisor::{self, Client, wire::Request},
};
use rustix::process::{Pid, Signal, kill_process};

use super::exec::print_name;
use crate::context::{Context, each};

/// How long a killed program has to be gone, and its guest to write back.
const KILL_GRACE: Duration = Duration::from_secs(60);

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
        stop(&context.container(name)?, Duration::from_secs(arguments.time), context)?;
        print_name(name);
        Ok(())
    })
}

/// Ends a container; one that does not run is no error.
pub(crate) fn stop(container: &Container, grace: Duration, context: &Context) -> anyhow::Result<()> {
    let signal = container.config.stop_signal.unwrap_or(libc::SIGTERM as u8);
    let ask = |request: &Request| {
        Client::connect(&context.paths, &container.directory).and_then(|mut client| client.ask(request))
    };
    let _ = ask(&Request::Stop { signal });
    if !ends_within(container, grace)? {
        kill(container, context)?;
    }
    supervisor::clear(&context.paths, &container.directory)?;
    Ok(())
}

/// Kills a container, and its supervisor if that does not help.
pub(crate) fn kill(container: &Container, context: &Context) -> anyhow::Result<()> {
    let kill = Request::Stop { signal: libc::SIGKILL as u8 };
    let asked = Client::connect(&context.paths, &container.directory).and_then(|mut client| client.ask(&kill));
    if asked.is_ok() && ends_within(container, KILL_GRACE)? {
        return Ok(());
    }
    let supervisor =
        container.directory.state().ok().filter(|state| state.is_alive()).and_then(|state| state.supervisor);
    if let Some(pid) = supervisor.and_then(|supervisor| Pid::from_raw(supervisor.pid)) {
        kill_process(pid, Signal::KILL)?;
        if !ends_within(container, KILL_GRACE)? {
            bail!("container {} cannot be killed", container.config.name);
        }
    }
    Ok(())
}

/// Waits for the end of a container's supervisor.
pub(crate) fn ends_within(container: &Container, limit: Duration) -> anyhow::Result<bool> {
    let deadline = Instant::now() + limit;
    loop {
        match container.directory.state() {
            // Gone with its container.
            Err(_) if !container.directory.path().exists() => return Ok(true),
            state => {
                if !state?.is_alive() {
                    return Ok(true);
                }
            }
        }
        if Instant::now() >= deadline {
            return Ok(false);
        }
        thread::sleep(Duration::from_millis(10));
    }
}
