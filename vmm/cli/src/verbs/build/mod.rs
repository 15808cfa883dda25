//! `caisson build`: an image from a Dockerfile, every RUN in a guest of its own.
mod guest;
mod progress;

use std::{
    collections::BTreeMap,
    error::Error,
    fs,
    io::Read,
    path::{Path, PathBuf},
    sync::Mutex,
};

use anyhow::{Context as _, bail};
use caisson_build::{
    BuildError, Builder, Options, builder::Images, cache::Cache, context::Context as BuildContext,
    dockerfile::Dockerfile, plan::is_supported,
};
use caisson_images::{Image, Reference, Store, layer::Compression};

use crate::{
    context::Context,
    output::{Progress, print},
    prepare,
};

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  caisson build -t app .
  caisson build -t app:test --target test --build-arg VERSION=3 -f docker/Dockerfile .
  caisson build - <Dockerfile                 without a context
  SOURCE_DATE_EPOCH=0 caisson build -t app .  the same bytes at any time

Every RUN executes in a guest of its own; the rest is made on the host, without running anything. What has not changed since
the last build comes from the cache.")]
pub(crate) struct Arguments {
    /// The Dockerfile; by default CONTEXT/Dockerfile
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Name the image; may be given several times
    #[arg(short, long, value_name = "NAME")]
    tag: Vec<Reference>,
    /// Set an ARG; without a value, it is taken from here
    #[arg(long, value_name = "K=V")]
    build_arg: Vec<String>,
    /// Build this stage, and what it needs
    #[arg(long, value_name = "STAGE")]
    target: Option<String>,
    /// Take nothing from the cache
    #[arg(long)]
    no_cache: bool,
    /// linux/amd64, the only one
    #[arg(long, value_name = "OS/ARCH")]
    platform: Option<String>,
    /// A secret for RUN --mount=type=secret: id=NAME,src=FILE or id=NAME,env=VARIABLE
    #[arg(long, value_name = "SECRET")]
    secret: Vec<String>,
    /// How progress is shown
    #[arg(long, default_value = "auto", value_parser = ["auto", "plain"])]
    progress: String,
    /// Print only the image's id
    #[arg(short, long)]
    quiet: bool,
    /// Memory limit of each RUN, such as 1g
    #[arg(short, long, value_parser = super::run::parse_size, value_name = "SIZE")]
    memory: Option<u64>,
    /// CPUs of each RUN
    #[arg(long, value_parser = super::run::parse_cpus, value_name = "N")]
    cpus: Option<u64>,
    /// How layers are stored: none is the fastest, and compresses nothing until someone else does
    #[arg(long, default_value = "none", value_parser = ["none", "gzip", "zstd"])]
    compression: String,
    /// Write the image's id to a file
    #[arg(long, value_name = "FILE")]
    iidfile: Option<PathBuf>,
    /// The directory whose files COPY and ADD see; - reads the Dockerfile from standard input
    context: PathBuf,
}

/// The most that is read as a Dockerfile or a secret, bytes.
const MAX_INPUT_BYTES: u64 = 4 << 20;

pub(crate) fn run(arguments: &Arguments, context: &Context) -> anyhow::Result<u8> {
    if let Some(platform) = &arguments.platform
        && !is_supported(platform)
    {
        bail!("--platform {platform}: guests run linux/amd64 only");
    }
    let (file, files) = input(arguments)?;
    let store = context.store()?;
    let cache = Cache::open(&context.paths.store.join("build"), &store)?;
    let options = options(arguments)?;
    let mut preparing = Progress::new();
    let needs_guest =
        file.stages.iter().flat_map(|stage| &stage.instructions).any(|one| caisson_build::needs_guest(&one.value));
    if needs_guest {
        prepare::guest(&mut preparing)?;
    }
    preparing.clear();
    let shown = progress::Shown::new(arguments.quiet, arguments.progress == "plain");
    let guest = guest::Guests::new(&context.paths, &store, arguments.memory, arguments.cpus, &shown);
    let images = Found { store: &store, lock: Mutex::new(()) };
    let builder = Builder {
        file: &file,
        context: &files,
        store: &store,
        cache: &cache,
        images: &images,
        guest: &guest,
        progress: &shown,
        options: &options,
    };
    let image = match builder.build(&arguments.tag) {
        Ok(image) => image,
        Err(BuildError::Step { file, line, text, source }) => {
            // The place first, on lines of its own; then the chain of causes as everywhere.
            eprintln!("{file}:{line}: this step failed\n  {line} | {text}");
            return Err(anyhow::Error::new(source));
        }
        Err(error) => return Err(error.into()),
    };
    let id = image.id().to_string();
    if let Some(path) = &arguments.iidfile {
        fs::write(path, &id).with_context(|| format!("cannot write the image's id to {}", path.display()))?;
    }
    print(&format!("{id}\n"));
    Ok(0)
}

/// The Dockerfile and the context.
fn input(arguments: &Arguments) -> anyhow::Result<(Dockerfile, BuildContext)> {
    if arguments.context == Path::new("-") {
        if arguments.file.is_some() {
            bail!("- reads the Dockerfile from standard input: leave out --file");
        }
        let mut text = String::new();
        std::io::stdin()
            .take(MAX_INPUT_BYTES)
            .read_to_string(&mut text)
            .context("cannot read the Dockerfile from standard input")?;
        return Ok((Dockerfile::parse("-", &text)?, BuildContext::empty()));
    }
    let path = match &arguments.file {
        Some(path) => path.clone(),
        None => {
            let path = arguments.context.join("Dockerfile");
            let other = arguments.context.join("Containerfile");
            if !path.exists() && other.exists() { other } else { path }
        }
    };
    let name = path.display().to_string();
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {name}: name the Dockerfile with -f"))?;
    let file = Dockerfile::parse(&name, &text)?;
    let files = BuildContext::open(&arguments.context, Some(&path))?;
    Ok((file, files))
}

fn options(arguments: &Arguments) -> anyhow::Result<Options> {
    let mut build_args = BTreeMap::new();
    for text in &arguments.build_arg {
        match text.split_once('=') {
            Some((name, value)) => {
                build_args.insert(name.to_owned(), value.to_owned());
            }
            None => {
                if let Ok(value) = std::env::var(text) {
                    build_args.insert(text.clone(), value);
                }
            }
        }
    }
    let epoch = build_args.get("SOURCE_DATE_EPOCH").cloned().or_else(|| std::env::var("SOURCE_DATE_EPOCH").ok());
    let source_date_epoch = match epoch.filter(|text| !text.is_empty()) {
        None => None,
        Some(text) => {
            Some(text.parse().with_context(|| format!("SOURCE_DATE_EPOCH={text} is not a number of seconds"))?)
        }
    };
    let mut secrets = BTreeMap::new();
    for text in &arguments.secret {
        let (id, content) = secret(text)?;
        secrets.insert(id, content);
    }
    Ok(Options {
        build_args,
        target: arguments.target.clone(),
        no_cache: arguments.no_cache,
        source_date_epoch,
        secrets,
        compression: match arguments.compression.as_str() {
            "gzip" => Some(Compression::Gzip),
            "zstd" => Some(Compression::Zstd),
            _ => None,
        },
        jobs: 0,
    })
}

fn secret(text: &str) -> anyhow::Result<(String, Vec<u8>)> {
    let (mut id, mut source, mut variable) = (None, None, None);
    for part in text.split(',') {
        match part.split_once('=') {
            Some(("id", value)) => id = Some(value),
            Some(("src" | "source", value)) => source = Some(value),
            Some(("env", value)) => variable = Some(value),
            Some(("type", "file" | "env")) => {}
            _ => bail!("--secret {text}: write id=NAME,src=FILE or id=NAME,env=VARIABLE"),
        }
    }
    let id = id.with_context(|| format!("--secret {text} has no id"))?;
    let content = match (source, variable) {
        (Some(path), _) => {
            let file = fs::File::open(path).with_context(|| format!("cannot read the secret {id} in {path}"))?;
            let mut content = Vec::new();
            file.take(MAX_INPUT_BYTES).read_to_end(&mut content).with_context(|| format!("cannot read {path}"))?;
            content
        }
        (None, name) => {
            let name = name.unwrap_or(id);
            std::env::var(name).with_context(|| format!("the variable {name} of the secret {id}"))?.into_bytes()
        }
    };
    Ok((id.to_owned(), content))
}

/// Images of the store, and the built-in one.
struct Found<'a> {
    store: &'a Store,
    lock: Mutex<()>,
}

impl Images for Found<'_> {
    fn image(&self, reference: &str) -> Result<Image, Box<dyn Error + Send + Sync>> {
        // Two stages may want the same image, which must be made once only.
        let _lock = self.lock.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        Ok(prepare::image(self.store, reference, &mut Progress::new())?)
    }
}
