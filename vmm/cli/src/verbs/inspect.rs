//! `caisson inspect`: all about containers or images, as JSON.
use caisson_runtime::{
    containers::{Container, ContainersError},
    state::{RootSource, Status},
};
use serde_json::{Value, json};

use crate::{context::Context, output::print};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Names or ids
    #[arg(required = true)]
    names: Vec<String>,
}

pub(crate) fn run(arguments: &Arguments, context: &Context) -> anyhow::Result<u8> {
    let mut all = Vec::new();
    for name in &arguments.names {
        all.push(match context.containers().find(name) {
            Ok(container) => describe(&container),
            Err(ContainersError::NotFound(_)) => match context.store()?.resolve(name) {
                Ok(image) => image.inspect(),
                Err(_) => anyhow::bail!("no such container or image: {name}"),
            },
            Err(error) => return Err(error.into()),
        });
    }
    print(&format!("{}\n", serde_json::to_string_pretty(&all)?));
    Ok(0)
}

/// In docker's words, as far as they fit.
fn describe(container: &Container) -> Value {
    let (config, state) = (&container.config, &container.state);
    let process = config.spec.process().clone().unwrap_or_default();
    let args = process.args().clone().unwrap_or_default();
    let status = state.status();
    let word = match status {
        Status::Stopped => "exited",
        other => other.name(),
    };
    let resources = config.spec.linux().as_ref().and_then(|linux| linux.resources().clone()).unwrap_or_default();
    let quota = resources.cpu().as_ref().and_then(|cpu| cpu.quota());
    json!({
        "Id": config.id,
        "Name": config.name,
        "Created": config.created,
        "Path": args.first(),
        "Args": args.get(1..).unwrap_or_default(),
        "Image": config.image_id,
        "State": {
            "Status": word,
            "Running": matches!(status, Status::Running | Status::Paused),
            "Paused": status == Status::Paused,
            "OOMKilled": state.oom_killed,
            "Pid": state.supervisor.filter(|_| status != Status::Stopped).map_or(0, |supervisor| supervisor.pid),
            "ExitCode": match status { Status::Stopped => state.exit.map_or(137, |exit| exit.code()), _ => 0 },
            "Error": state.error.clone().unwrap_or_default(),
            "StartedAt": state.started,
            "FinishedAt": state.finished,
        },
        "RestartCount": state.restarts,
        "LogPath": container.directory.log(),
        "Config": {
            "Hostname": config.spec.hostname(),
            "User": config.user,
            "Env": process.env(),
            "Image": config.image,
            "WorkingDir": process.cwd(),
            "Tty": process.terminal().unwrap_or(false),
            "OpenStdin": config.stdin,
            "Labels": config.labels,
            "StopSignal": config.stop_signal,
        },
        "HostConfig": {
            "Memory": resources.memory().and_then(|memory| memory.limit()).unwrap_or(0),
            "NanoCpus": quota.map_or(0, |quota| quota * 10_000),
            "PidsLimit": resources.pids().map_or(0, |pids| pids.limit()),
            "AutoRemove": config.auto_remove,
            "ReadonlyRootfs": config.spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or(false),
            "RestartPolicy": {"Name": config.restart},
        },
        "Machine": {
            "MemoryMiB": config.shape.memory_mib,
            "Vcpus": config.shape.vcpus,
            "Layers": match &config.root { RootSource::Image { layers, .. } => json!(layers), RootSource::Directory { path } => json!([path]) },
        },
    })
}
