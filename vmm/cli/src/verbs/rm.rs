//! `caisson rm`: containers and all that they have.
use caisson_runtime::containers::ContainersError;

use super::{exec::print_name, stop};
use crate::context::{Context, each};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Kill those that run; those that are not there are no error
    #[arg(short, long)]
    force: bool,
    /// The containers
    #[arg(required = true)]
    containers: Vec<String>,
}

pub(crate) fn run(arguments: &Arguments, context: &Context) -> anyhow::Result<u8> {
    let containers = context.containers();
    each(&arguments.containers, |name| {
        let container = match containers.find(name) {
            Err(ContainersError::NotFound(_)) if arguments.force => return Ok(()),
            container => container?,
        };
        if arguments.force {
            stop::kill(&container, context)?;
        }
        let lock = container.directory.lock();
        match (lock, arguments.force) {
            // It was one that removes itself.
            (Err(_), true) => {}
            (lock, _) => {
                let _lock = lock?;
                containers.remove(&container)?;
            }
        }
        print_name(name);
        Ok(())
    })
}
