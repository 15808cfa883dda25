//! `caisson rename`.
use crate::context::Context;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The container
    container: String,
    /// Its new name
    name: String,
}

pub(crate) fn run(arguments: &Arguments, context: &Context) -> anyhow::Result<u8> {
    let mut container = context.container(&arguments.container)?;
    context.containers().rename(&mut container, &arguments.name)?;
    Ok(0)
}
