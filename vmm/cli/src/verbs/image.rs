//! `caisson image ...`, `images` and `rmi`: the store.
use std::path::Path;

use caisson_images::{
    Reference,
    import::{ImportOptions, import_path, import_stream},
};
use serde_json::json;

use crate::{
    context::{Context, each},
    output::{age, print, size, table},
};

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Import an OCI layout (directory or tar) or a docker-archive
    Import(ImportArguments),
    /// List images
    Ls(ListArguments),
    /// Remove images
    Rm(RemoveArguments),
    /// Show all about images
    Inspect(InspectArguments),
    /// Give an image another name
    Tag(TagArguments),
    /// Remove images that have no name, and what nothing refers to
    Prune,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  skopeo copy docker-daemon:app:latest oci-archive:app.tar && caisson image import app.tar
  podman save app | caisson image import -
  caisson image import --tag app:1 layout/")]
pub(crate) struct ImportArguments {
    /// In place of the name in the archive
    #[arg(short, long, value_name = "NAME")]
    tag: Option<Reference>,
    /// File, directory, or - for standard input
    source: String,
}

#[derive(Debug, clap::Args)]
pub(crate) struct ListArguments {
    /// Only ids
    #[arg(short, long)]
    quiet: bool,
    /// Whole ids
    #[arg(long)]
    no_trunc: bool,
    /// table or json
    #[arg(long, default_value = "table", value_parser = ["table", "json"])]
    format: String,
}

#[derive(Debug, clap::Args)]
pub(crate) struct RemoveArguments {
    /// Although containers use it, and all its names
    #[arg(short, long)]
    force: bool,
    /// Names or ids
    #[arg(required = true)]
    images: Vec<String>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct InspectArguments {
    /// Names or ids
    #[arg(required = true)]
    images: Vec<String>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct TagArguments {
    /// The image
    image: String,
    /// Its new name
    name: Reference,
}

pub(crate) fn run(command: Command, context: &Context) -> anyhow::Result<u8> {
    match command {
        Command::Import(arguments) => import(&arguments, context),
        Command::Ls(arguments) => list(&arguments, context),
        Command::Rm(arguments) => remove(&arguments, context),
        Command::Inspect(arguments) => {
            let store = context.store()?;
            let all = arguments
                .images
                .iter()
                .map(|name| Ok(store.resolve(name)?.inspect()))
                .collect::<anyhow::Result<Vec<_>>>()?;
            print(&format!("{}\n", serde_json::to_string_pretty(&all)?));
            Ok(0)
        }
        Command::Tag(arguments) => {
            context.store()?.tag(&arguments.image, &arguments.name)?;
            Ok(0)
        }
        Command::Prune => {
            let freed = context.store()?.prune()?;
            print(&format!("freed {freed:?}\n"));
            Ok(0)
        }
    }
}

fn import(arguments: &ImportArguments, context: &Context) -> anyhow::Result<u8> {
    let store = context.store()?;
    let options = ImportOptions { reference: arguments.tag.clone(), ..ImportOptions::default() };
    let images = if arguments.source == "-" {
        import_stream(&store, std::io::stdin(), "standard input", &options)?
    } else {
        import_path(&store, Path::new(&arguments.source), &options)?
    };
    for image in images {
        let name = image.references.first().map_or_else(|| image.id().to_string(), Reference::familiar);
        print(&format!("{name}\n"));
    }
    Ok(0)
}

pub(crate) fn list(arguments: &ListArguments, context: &Context) -> anyhow::Result<u8> {
    let images = context.store()?.list()?;
    let mut rows = Vec::new();
    for image in images.iter().rev() {
        let id = if arguments.no_trunc { image.id().to_string() } else { image.id().short() };
        let created = image.config.created().clone();
        let created = created.as_deref().map_or_else(|| "N/A".into(), |time| format!("{} ago", age(time)));
        let names: Vec<(String, String)> = match image.references.as_slice() {
            [] => vec![("<none>".into(), "<none>".into())],
            references => references
                .iter()
                .map(|reference| (reference.familiar_name(), reference.tag().unwrap_or("<none>").to_owned()))
                .collect(),
        };
        for (name, tag) in names {
            rows.push(vec![name, tag, id.clone(), created.clone(), size(image.size())]);
        }
    }
    if arguments.quiet {
        rows.dedup_by(|one, other| one[2] == other[2]);
        print(&rows.iter().map(|row| format!("{}\n", row[2])).collect::<String>());
    } else if arguments.format == "json" {
        for row in &rows {
            let line =
                json!({"Repository": row[0], "Tag": row[1], "ID": row[2], "CreatedSince": row[3], "Size": row[4]});
            print(&format!("{line}\n"));
        }
    } else {
        table(&["REPOSITORY", "TAG", "IMAGE ID", "CREATED", "SIZE"], &rows);
    }
    Ok(0)
}

pub(crate) fn remove(arguments: &RemoveArguments, context: &Context) -> anyhow::Result<u8> {
    let store = context.store()?;
    each(&arguments.images, |name| {
        let removed = store.remove(name, arguments.force)?;
        for reference in removed.untagged {
            print(&format!("Untagged: {}\n", reference.familiar()));
        }
        if let Some(digest) = removed.deleted {
            print(&format!("Deleted: {digest}\n"));
        }
        Ok(())
    })
}
