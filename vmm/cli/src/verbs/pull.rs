//! `caisson pull`: an image from a registry.
use caisson_images::Reference;

use crate::{
    context::Context,
    output::print,
    registry::{Bars, RegistryArguments},
};

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  caisson pull debian:12                    from docker.io
  caisson pull localhost:5000/team/app:1    from a registry of one's own
  caisson pull app@sha256:...               exactly this")]
pub(crate) struct Arguments {
    /// No progress; print the name alone
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    registry: RegistryArguments,
    /// The image
    image: Reference,
}

pub(crate) fn run(arguments: &Arguments, context: &Context) -> anyhow::Result<u8> {
    let store = context.store()?;
    let image = arguments.registry.client().pull(&store, &arguments.image, &Bars::new(arguments.quiet))?;
    if !arguments.quiet {
        eprintln!("Digest: {}", image.top.digest);
    }
    print(&format!("{}\n", arguments.image));
    Ok(0)
}
