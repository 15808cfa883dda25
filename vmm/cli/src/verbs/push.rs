//! `caisson push`: an image to a registry.
use caisson_images::Reference;

use crate::{
    context::Context,
    output::print,
    registry::{Bars, RegistryArguments},
};

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  caisson tag app localhost:5000/team/app:1 && caisson push localhost:5000/team/app:1
  caisson push app localhost:5000/team/app:1")]
pub(crate) struct Arguments {
    /// No progress; print the name alone
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    registry: RegistryArguments,
    /// The image: its name says where to
    image: String,
    /// Another name to push it under
    name: Option<Reference>,
}

pub(crate) fn run(arguments: &Arguments, context: &Context) -> anyhow::Result<u8> {
    let store = context.store()?;
    let image = store.resolve(&arguments.image)?;
    let name = match &arguments.name {
        Some(name) => name.clone(),
        None => arguments.image.parse()?,
    };
    let pushed = arguments.registry.client().push(&store, &image, &name, &Bars::new(arguments.quiet))?;
    if !arguments.quiet {
        eprintln!("Digest: {} ({} bytes)", pushed.digest, pushed.size);
    }
    print(&format!("{name}\n"));
    Ok(0)
}
