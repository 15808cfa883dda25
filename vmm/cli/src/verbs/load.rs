//! `caisson load`: images from an archive; docker's name for `image import`.
use std::{io::IsTerminal, path::Path};

use anyhow::bail;
use caisson_images::{
    Reference,
    import::{ImportOptions, import_path, import_stream},
};

use crate::{context::Context, output::print};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Archive or directory, in place of standard input
    #[arg(short, long, value_name = "FILE")]
    input: Option<String>,
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
}

pub(crate) fn run(arguments: &Arguments, context: &Context) -> anyhow::Result<u8> {
    let store = context.store()?;
    let options = ImportOptions::default();
    let images = match arguments.input.as_deref() {
        Some(path) if path != "-" => import_path(&store, Path::new(path), &options)?,
        _ if std::io::stdin().is_terminal() => bail!("standard input is a terminal: name an archive with --input"),
        _ => import_stream(&store, std::io::stdin(), "standard input", &options)?,
    };
    for image in images.iter().filter(|_| !arguments.quiet) {
        let names: Vec<String> = match image.references.as_slice() {
            [] => vec![format!("Loaded image ID: {}\n", image.id())],
            names => names.iter().map(Reference::familiar).map(|name| format!("Loaded image: {name}\n")).collect(),
        };
        print(&names.concat());
    }
    Ok(0)
}
