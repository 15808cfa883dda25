//! `caisson ps`: the containers.
use caisson_runtime::{containers::Container, state::Status};
use serde_json::json;

use crate::{
    context::Context,
    output::{age, print, table},
};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Those that have ended too
    #[arg(short, long)]
    all: bool,
    /// Only ids
    #[arg(short, long)]
    quiet: bool,
    /// Whole ids and commands
    #[arg(long)]
    no_trunc: bool,
    /// table or json
    #[arg(long, default_value = "table", value_parser = ["table", "json"])]
    format: String,
}

/// A container's status in docker's words.
pub(crate) fn status_text(container: &Container) -> String {
    let state = &container.state;
    let up = || format!("Up {}", state.started.as_deref().map(age).unwrap_or_default());
    match state.status() {
        Status::Running => up(),
        Status::Paused => format!("{} (Paused)", up()),
        Status::Created | Status::Creating => "Created".into(),
        Status::Stopped => {
            // Without a recorded end, its supervisor was killed, and so was it.
            let code = state.exit.map_or(137, |exit| exit.code());
            let ended = state.finished.as_deref().map(|time| format!(" {} ago", age(time))).unwrap_or_default();
            format!("Exited ({code}){ended}")
        }
    }
}

pub(crate) fn run(arguments: &Arguments, context: &Context) -> anyhow::Result<u8> {
    let mut containers = context.containers().list()?;
    containers
        .retain(|container| arguments.all || matches!(container.state.status(), Status::Running | Status::Paused));
    let id = |container: &Container| {
        if arguments.no_trunc { container.config.id.clone() } else { container.short_id().to_owned() }
    };
    if arguments.quiet {
        print(&containers.iter().map(|container| id(container) + "\n").collect::<String>());
        return Ok(0);
    }
    let command = |container: &Container| {
        let args = container
            .config
            .spec
            .process()
            .as_ref()
            .and_then(|process| process.args().clone())
            .unwrap_or_default()
            .join(" ");
        let short: String = args.chars().take(if arguments.no_trunc { usize::MAX } else { 20 }).collect();
        format!("\"{}{}\"", short, if short.len() < args.len() { "…" } else { "" })
    };
    if arguments.format == "json" {
        for container in &containers {
            let line = json!({
                "ID": id(container), "Image": container.config.image, "Command": command(container), "CreatedAt": container.config.created,
                "RunningFor": format!("{} ago", age(&container.config.created)), "Status": status_text(container),
                "State": container.state.status().name(), "Names": container.config.name, "Labels": container.config.labels,
            });
            print(&format!("{line}\n"));
        }
        return Ok(0);
    }
    let rows: Vec<_> = containers
        .iter()
        .map(|container| {
            let created = format!("{} ago", age(&container.config.created));
            let config = &container.config;
            vec![
                id(container),
                config.image.clone(),
                command(container),
                created,
                status_text(container),
                String::new(),
                config.name.clone(),
            ]
        })
        .collect();
    table(&["CONTAINER ID", "IMAGE", "COMMAND", "CREATED", "STATUS", "PORTS", "NAMES"], &rows);
    Ok(0)
}
