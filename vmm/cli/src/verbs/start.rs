//! `caisson start`: a container that has ended runs again, on the root file system as it left it.
use anyhow::bail;
use caisson_runtime::{
    containers::Container,
    state::Status,
    supervisor::{self, Launch, launch},
};

use super::exec::print_name;
use crate::{
    context::{Context, coded, each},
    interactive::{self, Signals},
    output::Progress,
    verbs::run::{report, start_detached},
};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Join its output, and end as it does
    #[arg(short, long)]
    attach: bool,
    /// The containers
    #[arg(required = true)]
    containers: Vec<String>,
}

/// Starts one in the background, unless it runs.
pub(crate) fn start(container: &Container, context: &Context) -> anyhow::Result<()> {
    let _lock = container.directory.lock()?;
    let state = container.directory.state()?;
    if matches!(state.status(), Status::Running | Status::Paused | Status::Creating) {
        return Ok(());
    }
    supervisor::clear(&context.paths, &container.directory)?;
    let mut progress = Progress::new();
    crate::prepare::guest(&mut progress)?;
    start_detached(context, container, &mut progress)
}

pub(crate) fn run(arguments: &Arguments, context: &Context) -> anyhow::Result<u8> {
    if !arguments.attach {
        return each(&arguments.containers, |name| {
            start(&context.container(name)?, context)?;
            print_name(name);
            Ok(())
        });
    }
    let [name] = arguments.containers.as_slice() else { bail!("--attach takes one container") };
    let signals = Signals::take()?;
    let container = context.container(name)?;
    if container.state.status() == Status::Running {
        bail!("container {name} is running: use attach");
    }
    let mut progress = Progress::new();
    crate::prepare::guest(&mut progress)?;
    let mut client = {
        let _lock = container.directory.lock()?;
        supervisor::clear(&context.paths, &container.directory)?;
        launch(&Launch {
            directory: &container.directory,
            paths: &context.paths,
            stdio: true,
            request_ns: context.request_ns,
        })?
    };
    signals.supervisor(client.pid());
    let end =
        interactive::follow(&mut client, &signals, false, None, &mut progress).map_err(|error| coded(error, 125))?;
    client.reap();
    report(&end);
    Ok(end.exit.code())
}
