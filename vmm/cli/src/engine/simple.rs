//! `start`, `state`, `list`, `pause`, `resume`, `spec` and `features`.
use std::path::PathBuf;

use anyhow::{Context as _, bail};
use caisson_runtime::{
    engine::{self, OCI_VERSION},
    spec::{capability_names, image::Options, image::spec_for, option_names},
    supervisor::{Client, wire::Request},
};
use serde_json::json;

use crate::{
    context::Context,
    output::{print, table},
};

#[derive(Debug, clap::Args)]
pub(crate) struct Named {
    /// The container's id
    pub(crate) id: String,
}

#[derive(Debug, clap::Args)]
pub(crate) struct ListArguments {
    /// table or json
    #[arg(short, long, default_value = "table", value_parser = ["table", "json"])]
    format: String,
    /// Only ids
    #[arg(short, long)]
    quiet: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct SpecArguments {
    /// The bundle's directory
    #[arg(short, long, default_value = ".", value_name = "DIR")]
    bundle: PathBuf,
}

pub(crate) fn start(arguments: &Named, context: &Context) -> anyhow::Result<u8> {
    let container = engine::find(&context.paths, &arguments.id)?;
    let _lock = container.directory.lock()?;
    let container = engine::find(&context.paths, &arguments.id)?;
    let status = container.state.status();
    if !status.can_start() {
        match status.name() {
            "stopped" => bail!("cannot start a container that has stopped"),
            "running" => bail!("cannot start an already running container"),
            other => bail!("cannot start a container in the {other} state"),
        }
    }
    let mut client = Client::connect(&context.paths, &container.directory)?;
    super::create::start(&container, &mut client, context)?;
    Ok(0)
}

pub(crate) fn state(arguments: &Named, context: &Context) -> anyhow::Result<u8> {
    let container = engine::find(&context.paths, &arguments.id)?;
    print(&serde_json::to_string_pretty(&container.describe())?);
    Ok(0)
}

pub(crate) fn pause(arguments: &Named, pause: bool, context: &Context) -> anyhow::Result<u8> {
    let container = engine::find(&context.paths, &arguments.id)?;
    let _lock = container.directory.lock()?;
    let request = if pause { Request::Pause } else { Request::Resume };
    Client::connect(&context.paths, &container.directory)
        .map_err(|_| anyhow::anyhow!("container not running"))?
        .ask(&request)?;
    Ok(0)
}

pub(crate) fn list(arguments: &ListArguments, context: &Context) -> anyhow::Result<u8> {
    let all = engine::list(&context.paths)?;
    if arguments.quiet {
        print(&all.iter().map(|container| format!("{}\n", container.config.id)).collect::<String>());
    } else if arguments.format == "json" {
        let all: Vec<_> = all.iter().map(engine::Engine::describe).collect();
        print(&serde_json::to_string(&all)?);
    } else {
        let rows: Vec<_> = all
            .iter()
            .map(|container| {
                let state = container.describe();
                let text = |field: &str| state[field].as_str().unwrap_or_default().to_owned();
                vec![
                    text("id"),
                    state["pid"].to_string(),
                    text("status"),
                    text("bundle"),
                    text("created"),
                    "root".into(),
                ]
            })
            .collect();
        table(&["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"], &rows);
    }
    Ok(0)
}

pub(crate) fn spec(arguments: &SpecArguments) -> anyhow::Result<u8> {
    let path = arguments.bundle.join("config.json");
    if path.exists() {
        bail!("File {} exists. Remove it first", path.display());
    }
    let options = Options {
        command: vec!["sh".into()],
        terminal: true,
        hostname: "caisson".into(),
        read_only: true,
        no_seccomp: true,
        ..Options::default()
    };
    let (spec, _) = spec_for(None, &options)?;
    std::fs::write(&path, serde_json::to_string_pretty(&spec)?)
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(0)
}

pub(crate) fn features() -> anyhow::Result<u8> {
    let features = json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": OCI_VERSION,
        "hooks": ["prestart", "createRuntime", "createContainer", "poststart", "poststop"],
        "mountOptions": option_names(),
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "uts"],
            "capabilities": capability_names(),
            "cgroup": {"v1": false, "v2": true, "systemd": false, "systemdUser": false, "rdma": false},
            "seccomp": {
                "enabled": true,
                "actions": ["SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_KILL_THREAD", "SCMP_ACT_LOG", "SCMP_ACT_TRACE", "SCMP_ACT_TRAP"],
                "operators": ["SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_LE", "SCMP_CMP_LT", "SCMP_CMP_MASKED_EQ", "SCMP_CMP_NE"],
                "archs": ["SCMP_ARCH_X86_64"],
                "knownFlags": ["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_TSYNC"],
                "supportedFlags": ["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_TSYNC"],
            },
            "apparmor": {"enabled": false},
            "selinux": {"enabled": false},
            "intelRdt": {"enabled": false},
            "mountExtensions": {"idmap": {"enabled": false}},
        },
        "annotations": {"org.caisson.version": env!("CARGO_PKG_VERSION")},
    });
    print(&format!("{}\n", serde_json::to_string_pretty(&features)?));
    Ok(0)
}
