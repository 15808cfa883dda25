//! `caisson save`: images to an archive, which docker, podman and skopeo read.
use std::{
    fs::{self, File},
    io::{BufWriter, IsTerminal, Write},
    path::PathBuf,
};

use anyhow::{Context as _, bail};
use caisson_images::{Image, Reference, save::Format};

use crate::context::Context;

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  caisson save app:1 app:2 -o apps.tar
  caisson save app | docker load")]
pub(crate) struct Arguments {
    /// File, in place of standard output
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// docker-archive or oci-archive
    #[arg(long, default_value = "docker-archive", value_parser = ["docker-archive", "oci-archive"])]
    format: String,
    /// Names or ids
    #[arg(required = true)]
    images: Vec<String>,
}

pub(crate) fn run(arguments: &Arguments, context: &Context) -> anyhow::Result<u8> {
    let store = context.store()?;
    let mut images: Vec<(Image, Option<Vec<Reference>>)> = Vec::new();
    for name in &arguments.images {
        let image = store.resolve(name)?;
        // An image that is called by its id goes without a name, as docker does it.
        let reference = name.parse::<Reference>().ok().filter(|reference| image.references.contains(reference));
        match images.iter_mut().find(|(other, _)| other.top == image.top) {
            Some((_, references)) => references.get_or_insert_default().extend(reference),
            None => images.push((image, Some(reference.into_iter().collect()))),
        }
    }
    let format = if arguments.format == "oci-archive" { Format::OciArchive } else { Format::DockerArchive };
    let Some(path) = &arguments.output else {
        let output = std::io::stdout();
        if output.is_terminal() {
            bail!("standard output is a terminal: name a file with --output");
        }
        store.save(&images, format, BufWriter::new(output))?;
        return Ok(0);
    };
    let file = File::create(path).with_context(|| format!("cannot make {}", path.display()))?;
    let mut output = BufWriter::new(file);
    let saved = store.save(&images, format, &mut output).map_err(anyhow::Error::from);
    if let Err(error) = saved.and_then(|()| Ok(output.flush()?)) {
        // Half an archive helps nobody; what is no file of ours (a device, a pipe) stays.
        if path.is_file() {
            let _ = fs::remove_file(path);
        }
        return Err(error);
    }
    Ok(0)
}
