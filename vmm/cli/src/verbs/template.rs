//! `caisson template`: machines that were booted once, to be restored for each container.
use caisson_runtime::{assets::Assets, container::shape_for, sandbox::kvm_kind, template};
use serde_json::json;

use super::run::{parse_cpus, parse_size};
use crate::{
    context::{Context, each},
    output::{Progress, age, print, size, table},
    prepare,
};

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// List templates
    Ls(ListArguments),
    /// Remove templates; the next container that needs one makes it again
    Rm(RemoveArguments),
    /// Make a template now, for containers with these limits
    Build(BuildArguments),
}

#[derive(Debug, clap::Args)]
pub(crate) struct ListArguments {
    /// Only keys
    #[arg(short, long)]
    quiet: bool,
    /// table or json
    #[arg(long, default_value = "table", value_parser = ["table", "json"])]
    format: String,
}

#[derive(Debug, clap::Args)]
pub(crate) struct RemoveArguments {
    /// All of them
    #[arg(long, conflicts_with = "templates")]
    all: bool,
    /// Keys
    #[arg(required_unless_present = "all")]
    templates: Vec<String>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct BuildArguments {
    /// The containers' memory limit
    #[arg(short, long, value_parser = parse_size, value_name = "SIZE")]
    memory: Option<u64>,
    /// The containers' CPUs
    #[arg(long, value_parser = parse_cpus, value_name = "N")]
    cpus: Option<u64>,
}

pub(crate) fn run(command: &Command, context: &Context) -> anyhow::Result<u8> {
    match command {
        Command::Ls(arguments) => list(arguments, context),
        Command::Rm(arguments) => {
            let all = || {
                template::list(&context.paths).map(|all| all.into_iter().map(|(template, _)| template.key).collect())
            };
            let keys = if arguments.all { all()? } else { arguments.templates.clone() };
            each(&keys, |key| {
                template::remove_key(&context.paths, key)?;
                print(&format!("{key}\n"));
                Ok(())
            })
        }
        Command::Build(arguments) => {
            let mut progress = Progress::new();
            prepare::guest(&mut progress)?;
            let assets = Assets::prepare(&context.paths, |what| progress.say(what))?;
            let kind = kvm_kind(Some(&context.paths.cache))?;
            let shape = shape_for(arguments.memory, arguments.cpus);
            let snapshot = template::ensure(&context.paths, &assets, kind, shape, |what| progress.say(what))?;
            progress.clear();
            let key = snapshot.parent().and_then(|directory| directory.file_name()).unwrap_or_default();
            print(&format!("{}\n", key.to_string_lossy()));
            Ok(0)
        }
    }
}

fn list(arguments: &ListArguments, context: &Context) -> anyhow::Result<u8> {
    let all = template::list(&context.paths)?;
    if arguments.quiet {
        print(&all.iter().map(|(template, _)| format!("{}\n", template.key)).collect::<String>());
        return Ok(0);
    }
    if arguments.format == "json" {
        for (template, bytes) in &all {
            print(&format!("{}\n", json!({"template": template, "diskBytes": bytes})));
        }
        return Ok(0);
    }
    let rows: Vec<_> = all
        .iter()
        .map(|(template, bytes)| {
            let shape = template.shape;
            let created = format!("{} ago", age(&template.created));
            let made = format!("{:.1} s", template.build_ms as f64 / 1000.0);
            vec![
                template.key.clone(),
                format!("{} MiB", shape.memory_mib),
                shape.vcpus.to_string(),
                created,
                made,
                size(*bytes),
            ]
        })
        .collect();
    table(&["TEMPLATE", "MEMORY", "CPUS", "CREATED", "TOOK", "DISK"], &rows);
    Ok(0)
}
