//! `kill` and `delete`.
use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use caisson_runtime::{
    containers::signal_number,
    engine::{self, Engine, EngineError},
    hooks,
    state::Status,
    supervisor::{self, Client, wire::Request},
};
use rustix::process::{Pid, Signal, kill_process};

use crate::context::Context;

/// How long a killed container has to be gone, on a loaded host.
const GONE: Duration = Duration::from_secs(60);

#[derive(Debug, clap::Args)]
pub(crate) struct KillArguments {
    /// All processes of the container
    #[arg(short, long)]
    all: bool,
    /// The container's id
    id: String,
    /// The signal, by name or number
    #[arg(default_value = "SIGTERM")]
    signal: String,
}

#[derive(Debug, clap::Args)]
pub(crate) struct DeleteArguments {
    /// Kill it first; one that is not there is no error
    #[arg(short, long)]
    force: bool,
    /// The container's id
    id: String,
}

pub(crate) fn kill(arguments: &KillArguments, context: &Context) -> anyhow::Result<u8> {
    let signal = signal_number(&arguments.signal).with_context(|| format!("unknown signal {:?}", arguments.signal))?;
    let container = engine::find(&context.paths, &arguments.id)?;
    let _lock = container.directory.lock()?;
    let container = engine::find(&context.paths, &arguments.id)?;
    if !container.state.status().can_kill() {
        if arguments.all {
            return Ok(0);
        }
        bail!("container not running");
    }
    if signal == 0 {
        return Ok(0);
    }
    let request = Request::Signal { process: String::new(), signal, all: arguments.all };
    let asked = Client::connect(&context.paths, &container.directory).and_then(|mut client| client.ask(&request));
    match asked {
        Ok(_) => Ok(0),
        // Whatever the guest says, SIGKILL ends it.
        Err(_) if i32::from(signal) == libc::SIGKILL => {
            end(&container)?;
            Ok(0)
        }
        Err(_) if !container.directory.state().is_ok_and(|state| state.is_alive()) => bail!("container not running"),
        Err(error) => Err(error.into()),
    }
}

/// Kills a container's supervisor, and with it its machine; waits until it is gone.
fn end(container: &Engine) -> anyhow::Result<()> {
    let Some(supervisor) =
        container.directory.state().ok().filter(|state| state.is_alive()).and_then(|state| state.supervisor)
    else {
        return Ok(());
    };
    if let Some(pid) = Pid::from_raw(supervisor.pid) {
        let _ = kill_process(pid, Signal::KILL);
    }
    let deadline = Instant::now() + GONE;
    while supervisor.is_alive() {
        if Instant::now() > deadline {
            bail!("container {} cannot be killed", container.config.id);
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Ends a container if it lives, and removes all that was made for it; then the poststop hooks.
pub(crate) fn destroy(container: &Engine, context: &Context) -> anyhow::Result<()> {
    end(container)?;
    supervisor::clear(&context.paths, &container.directory)?;
    container.directory.remove()?;
    let hooks = container.config.spec.hooks().clone().unwrap_or_default();
    for hook in hooks.poststop().iter().flatten() {
        // A failure is told; the others run all the same.
        if let Err(error) = hooks::run("poststop", Some(&vec![hook.clone()]), &container.describe_as(Status::Stopped)) {
            eprintln!("warning: {:#}", anyhow::Error::from(error));
        }
    }
    Ok(())
}

pub(crate) fn delete(arguments: &DeleteArguments, context: &Context) -> anyhow::Result<u8> {
    let container = match engine::find(&context.paths, &arguments.id) {
        Err(EngineError::NotFound(_)) if arguments.force => return Ok(0),
        // What a creation that was killed has left, or a file that is damaged.
        Err(EngineError::State(_)) if arguments.force => {
            caisson_runtime::state::Directory::new(context.paths.run.join(&arguments.id)).remove()?;
            return Ok(0);
        }
        container => container?,
    };
    let _lock = container.directory.lock()?;
    // As runc does, and as containerd's shim relies on: one that was only created goes without force.
    let status = container.directory.state()?.status();
    if !(arguments.force || status.can_delete() || status == Status::Created) {
        bail!("cannot delete container {} that is not stopped: {}", arguments.id, status.name());
    }
    destroy(&container, context)?;
    Ok(0)
}
