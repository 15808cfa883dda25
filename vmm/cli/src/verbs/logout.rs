//! `caisson logout`: forgets a registry's credentials.
use crate::{output::print, registry::RegistryArguments};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    registry_options: RegistryArguments,
    /// HOST[:PORT]
    #[arg(default_value = "docker.io")]
    registry: String,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<u8> {
    let registry = &arguments.registry;
    if arguments.registry_options.auth().erase(registry)? {
        print(&format!("Removed the credentials for {registry}\n"));
    } else {
        print(&format!("There were no credentials for {registry}\n"));
    }
    Ok(0)
}
