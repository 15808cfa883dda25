//! `ps`, `update` and `events`.
use std::{
    io::{Read, stdin},
    path::PathBuf,
    thread,
    time::Duration,
};

use anyhow::{Context as _, bail};
use caisson_runtime::{
    engine,
    supervisor::{
        Client,
        wire::{Answer, Request},
    },
};
use serde_json::{Value, json};

use crate::{
    context::Context,
    output::{print, table},
    verbs::{parse_duration, parse_size},
};

#[derive(Debug, clap::Args)]
pub(crate) struct PsArguments {
    /// table or json
    #[arg(short, long, default_value = "table", value_parser = ["table", "json"])]
    format: String,
    /// The container's id
    id: String,
    /// Accepted: the columns are fixed
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    options: Vec<String>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct UpdateArguments {
    /// JSON of the limits, or - for standard input
    #[arg(short, long, value_name = "FILE")]
    resources: Option<PathBuf>,
    /// Memory limit in bytes, or with a unit
    #[arg(long, value_parser = parse_size)]
    memory: Option<u64>,
    /// Soft memory limit
    #[arg(long, value_parser = parse_size)]
    memory_reservation: Option<u64>,
    /// Memory and swap
    #[arg(long, allow_negative_numbers = true)]
    memory_swap: Option<i64>,
    /// CPU time per period, in microseconds
    #[arg(long, allow_negative_numbers = true)]
    cpu_quota: Option<i64>,
    /// The period, in microseconds
    #[arg(long)]
    cpu_period: Option<u64>,
    /// CPU shares
    #[arg(long)]
    cpu_share: Option<u64>,
    /// The most processes
    #[arg(long, allow_negative_numbers = true)]
    pids_limit: Option<i64>,
    /// The container's id
    id: String,
}

#[derive(Debug, clap::Args)]
pub(crate) struct EventsArguments {
    /// Once, and end
    #[arg(long)]
    stats: bool,
    /// Between two of them
    #[arg(long, default_value = "5s", value_parser = parse_duration)]
    interval: Duration,
    /// The container's id
    id: String,
}

fn client(id: &str, context: &Context) -> anyhow::Result<Client> {
    let container = engine::find(&context.paths, id)?;
    Client::connect(&context.paths, &container.directory).map_err(|_| anyhow::anyhow!("container not running"))
}

pub(crate) fn ps(arguments: &PsArguments, context: &Context) -> anyhow::Result<u8> {
    let Answer::Processes { processes } = client(&arguments.id, context)?.ask(&Request::Processes)? else {
        bail!("the supervisor's answer is of the wrong kind");
    };
    if arguments.format == "json" {
        let pids: Vec<_> = processes.iter().map(|process| process.pid).collect();
        print(&json!(pids).to_string());
        return Ok(0);
    }
    let rows: Vec<_> = processes
        .iter()
        .map(|process| {
            let seconds = process.cpu_ms / 1000;
            let time = format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60);
            vec![
                process.uid.to_string(),
                process.pid.to_string(),
                process.ppid.to_string(),
                time,
                process.command.clone(),
            ]
        })
        .collect();
    table(&["UID", "PID", "PPID", "TIME", "CMD"], &rows);
    Ok(0)
}

pub(crate) fn update(arguments: &UpdateArguments, context: &Context) -> anyhow::Result<u8> {
    let mut resources = match &arguments.resources {
        None => json!({}),
        Some(path) if path.as_os_str() == "-" => {
            let mut text = String::new();
            stdin().read_to_string(&mut text).context("cannot read the limits from standard input")?;
            serde_json::from_str(&text).context("the limits are not JSON")?
        }
        Some(path) => {
            let text = std::fs::read_to_string(path)
                .with_context(|| format!("cannot read the limits in {}", path.display()))?;
            serde_json::from_str(&text).context("the limits are not JSON")?
        }
    };
    let mut set = |section: &str, field: &str, value: Option<Value>| {
        if let Some(value) = value {
            resources[section][field] = value;
        }
    };
    set("memory", "limit", arguments.memory.map(Value::from));
    set("memory", "reservation", arguments.memory_reservation.map(Value::from));
    set("memory", "swap", arguments.memory_swap.map(Value::from));
    set("cpu", "quota", arguments.cpu_quota.map(Value::from));
    set("cpu", "period", arguments.cpu_period.map(Value::from));
    set("cpu", "shares", arguments.cpu_share.map(Value::from));
    set("pids", "limit", arguments.pids_limit.map(Value::from));
    let resources =
        serde_json::from_value(resources).context("the limits are not those of the runtime specification")?;
    client(&arguments.id, context)?.ask(&Request::Update { resources: Box::new(resources) })?;
    Ok(0)
}

pub(crate) fn events(arguments: &EventsArguments, context: &Context) -> anyhow::Result<u8> {
    loop {
        let Answer::Stats { stats } = client(&arguments.id, context)?.ask(&Request::Stats)? else {
            bail!("the supervisor's answer is of the wrong kind");
        };
        let bounded = |value: u64| if value == u64::MAX { 0 } else { value };
        let (periods, throttled_periods, throttled_us) = stats.cpu_throttling;
        let line = json!({"type": "stats", "id": arguments.id, "data": {
            "cpu": {
                "usage": {"total": stats.cpu_usage_us * 1000, "kernel": stats.cpu_system_us * 1000, "user": stats.cpu_user_us * 1000},
                "throttling": {"periods": periods, "throttledPeriods": throttled_periods, "throttledTime": throttled_us * 1000},
            },
            "memory": {
                "usage": {"limit": bounded(stats.memory_max_bytes), "usage": stats.memory_current_bytes, "max": stats.memory_peak_bytes, "failcnt": 0},
                "cache": stats.memory_file_bytes,
                "raw": {"anon": stats.memory_anon_bytes, "file": stats.memory_file_bytes, "inactive_file": stats.memory_inactive_file_bytes},
            },
            "pids": {"current": stats.pids_current, "limit": bounded(stats.pids_max)},
            "blkio": {},
        }});
        print(&format!("{line}\n"));
        if arguments.stats {
            return Ok(0);
        }
        thread::sleep(arguments.interval);
    }
}
