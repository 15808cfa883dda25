//! `caisson search-tags`: the tags that a registry has of an image.
use caisson_images::Reference;

use crate::{output::print, registry::RegistryArguments};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    registry: RegistryArguments,
    /// At most so many
    #[arg(long)]
    limit: Option<usize>,
    /// The image, without a tag
    image: Reference,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<u8> {
    let tags = arguments.registry.client().tags(&arguments.image)?;
    let tags = tags.iter().take(arguments.limit.unwrap_or(usize::MAX));
    print(&tags.map(|tag| format!("{tag}\n")).collect::<String>());
    Ok(0)
}
