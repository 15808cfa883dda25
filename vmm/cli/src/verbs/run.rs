//! `caisson run`: a new container, in the foreground or in the background.
use std::{
    io::{IsTerminal, stdin},
    path::PathBuf,
};

use anyhow::{Context as _, bail};
use caisson_runtime::{
    containers::{Container, Create, signal_number},
    spec::image::Options,
    supervisor::{Launch, launch, timing::Timing, wire::Answer},
};

use crate::{
    context::{Context, coded},
    interactive::{self, Signals},
    output::{Progress, print},
    prepare,
};

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  caisson run --rm busybox echo hello
  echo hello | caisson run --rm -i busybox cat
  caisson run --rm -it --memory 128m --cpus 2 busybox sh
  caisson run -d --name web -e PORT=8080 my/web

A container's memory limit is what its programs get; the guest's own needs (64 MiB at most) come on top of it.
The exit code is the program's; 128 and the signal's number if a signal killed it; 127 if there is no such program,
126 if it cannot be executed, 125 if the container could not be run.")]
pub(crate) struct Arguments {
    /// Remove the container when it ends
    #[arg(long)]
    rm: bool,
    /// Run in the background and print the container's id
    #[arg(short, long)]
    detach: bool,
    /// A name for it
    #[arg(long)]
    name: Option<String>,
    /// Keep standard input open
    #[arg(short, long)]
    interactive: bool,
    /// Give it a terminal
    #[arg(short, long)]
    tty: bool,
    /// Memory limit, such as 128m or 1g
    #[arg(short, long, value_parser = parse_size, value_name = "SIZE")]
    memory: Option<u64>,
    /// CPUs' worth of time, such as 1.5
    #[arg(long, value_parser = parse_cpus, value_name = "N")]
    cpus: Option<u64>,
    /// The most processes and threads
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pids_limit: Option<i64>,
    /// Set a variable; without a value, it is taken from here
    #[arg(short, long, value_name = "K=V")]
    env: Vec<String>,
    /// Set the variables in a file, one a line
    #[arg(long, value_name = "FILE")]
    env_file: Vec<PathBuf>,
    /// Working directory
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// User and group: NAME|UID[:NAME|GID]
    #[arg(short, long)]
    user: Option<String>,
    /// The container's hostname
    #[arg(long)]
    hostname: Option<String>,
    /// In place of the image's entrypoint
    #[arg(long)]
    entrypoint: Option<String>,
    /// The root file system cannot be written
    #[arg(long)]
    read_only: bool,
    /// A tmpfs: PATH[:OPTIONS]
    #[arg(long, value_name = "PATH")]
    tmpfs: Vec<String>,
    /// Size of /dev/shm
    #[arg(long, value_parser = parse_size, value_name = "SIZE")]
    shm_size: Option<u64>,
    /// The most that the container can write to its root
    #[arg(long, value_parser = parse_size, value_name = "SIZE")]
    disk: Option<u64>,
    /// Add a capability, or ALL
    #[arg(long, value_name = "CAP")]
    cap_add: Vec<String>,
    /// Drop a capability, or ALL
    #[arg(long, value_name = "CAP")]
    cap_drop: Vec<String>,
    /// All capabilities, no seccomp filter, nothing masked: within the container's own guest
    #[arg(long)]
    privileged: bool,
    /// no-new-privileges[=false], seccomp=unconfined
    #[arg(long, value_name = "OPTION")]
    security_opt: Vec<String>,
    /// Limit: NAME=SOFT[:HARD]
    #[arg(long, value_name = "LIMIT")]
    ulimit: Vec<String>,
    /// Kernel parameter of the container's namespaces
    #[arg(long, value_name = "K=V")]
    sysctl: Vec<String>,
    /// Label: K[=V]
    #[arg(short, long, value_name = "K=V")]
    label: Vec<String>,
    /// A line for /etc/hosts: NAME:ADDRESS
    #[arg(long, value_name = "NAME:IP")]
    add_host: Vec<String>,
    /// Name server
    #[arg(long, value_name = "IP")]
    dns: Vec<String>,
    /// no, on-failure[:N], always, unless-stopped
    #[arg(long, value_name = "POLICY", default_value = "no")]
    restart: String,
    /// Signal that stop sends first
    #[arg(long, value_name = "SIGNAL")]
    stop_signal: Option<String>,
    /// Boot the guest instead of restoring a template
    #[arg(long)]
    cold: bool,
    /// Print where the time went
    #[arg(long)]
    timing: bool,
    /// The image: a name, or the beginning of an id
    image: String,
    /// In place of the image's command
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

/// A size with a unit: b, k, m, g (powers of 1024).
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let lower = text.to_ascii_lowercase();
    let lower = lower.strip_suffix("ib").or_else(|| lower.strip_suffix('b')).unwrap_or(&lower);
    let (digits, shift) = match lower.as_bytes().last() {
        Some(b'k') => (&lower[..lower.len() - 1], 10),
        Some(b'm') => (&lower[..lower.len() - 1], 20),
        Some(b'g') => (&lower[..lower.len() - 1], 30),
        Some(b't') => (&lower[..lower.len() - 1], 40),
        _ => (lower, 0),
    };
    let value: u64 = digits.parse().map_err(|_| format!("{text:?} is not a size such as 128m or 1g"))?;
    value.checked_mul(1 << shift).filter(|bytes| *bytes > 0).ok_or_else(|| format!("{text:?} is out of range"))
}

/// CPUs in thousandths.
pub(crate) fn parse_cpus(text: &str) -> Result<u64, String> {
    let cpus: f64 = text.parse().map_err(|_| format!("{text:?} is not a number of CPUs such as 1.5"))?;
    if (0.01..=32.0).contains(&cpus) {
        Ok((cpus * 1000.0).round() as u64)
    } else {
        Err("must be from 0.01 to 32".into())
    }
}

impl Arguments {
    fn create(&self) -> anyhow::Result<Create> {
        let mut env = Vec::new();
        for file in &self.env_file {
            let text = std::fs::read_to_string(file)
                .with_context(|| format!("cannot read the variables in {}", file.display()))?;
            env.extend(
                text.lines()
                    .map(str::trim)
                    .filter(|line| !line.is_empty() && !line.starts_with('#'))
                    .map(str::to_owned),
            );
        }
        env.extend(self.env.iter().cloned());
        let security = |name: &str| self.security_opt.iter().any(|option| option == name);
        for option in &self.security_opt {
            let known = [
                "no-new-privileges",
                "no-new-privileges=true",
                "no-new-privileges=false",
                "no-new-privileges:true",
                "no-new-privileges:false",
                "seccomp=unconfined",
            ];
            if !known.contains(&option.as_str()) {
                bail!("--security-opt {option} is not known: {} are", known.join(", "));
            }
        }
        let options = Options {
            command: self.command.clone(),
            entrypoint: self.entrypoint.clone(),
            env,
            workdir: self.workdir.clone(),
            user: self.user.clone(),
            hostname: self.hostname.clone().unwrap_or_default(),
            read_only: self.read_only,
            terminal: self.tty,
            memory_bytes: self.memory,
            cpus_milli: self.cpus,
            pids: self.pids_limit,
            cap_add: self.cap_add.clone(),
            cap_drop: self.cap_drop.clone(),
            privileged: self.privileged,
            new_privileges: security("no-new-privileges=false") || security("no-new-privileges:false"),
            no_seccomp: security("seccomp=unconfined"),
            ulimits: self.ulimit.clone(),
            sysctls: self.sysctl.clone(),
            tmpfs: self.tmpfs.clone(),
            shm_bytes: self.shm_size,
        };
        let pair = |text: &String, separator: char| {
            text.split_once(separator).map_or((text.clone(), String::new()), |(k, v)| (k.to_owned(), v.to_owned()))
        };
        let stop_signal = self
            .stop_signal
            .as_deref()
            .map(|name| signal_number(name).with_context(|| format!("there is no signal {name}")))
            .transpose()?;
        Ok(Create {
            name: self.name.clone(),
            image: self.image.clone(),
            options,
            cold: self.cold,
            stdin: self.interactive,
            log: self.detach || !self.rm,
            auto_remove: self.rm,
            labels: self.label.iter().map(|text| pair(text, '=')).collect(),
            extra_hosts: self
                .add_host
                .iter()
                .map(|text| pair(text, ':'))
                .map(|(name, address)| (address, name))
                .collect(),
            dns: self.dns.clone(),
            restart: self.restart.clone(),
            stop_signal,
            upper_bytes: self.disk,
        })
    }
}

pub(crate) fn run(arguments: Arguments, context: &Context) -> anyhow::Result<u8> {
    run_coded(&arguments, context).map_err(|error| coded(error, 125))
}

fn run_coded(arguments: &Arguments, context: &Context) -> anyhow::Result<u8> {
    if arguments.tty && arguments.interactive && !arguments.detach && !stdin().is_terminal() {
        bail!("the input device is not a terminal: leave out -t");
    }
    let signals = (!arguments.detach).then(Signals::take).transpose()?;
    let mut progress = Progress::new();
    let create = arguments.create()?;
    let store = context.store()?;
    let image = prepare::image(&store, &arguments.image, &mut progress)?;
    prepare::guest(&mut progress)?;
    let containers = context.containers();
    let mut convert = |bytes: u64| progress.say(&format!("converting layers: {}", crate::output::size(bytes)));
    let container = containers.create(&image, &store, create, &mut convert)?;
    let result = match signals {
        Some(signals) => foreground(arguments, context, &container, &signals, &mut progress),
        None => background(context, &container, &mut progress),
    };
    if arguments.rm && result.is_err() {
        let _ = containers.remove(&container);
    }
    result
}

fn background(context: &Context, container: &Container, progress: &mut Progress) -> anyhow::Result<u8> {
    start_detached(context, container, progress)?;
    print(&format!("{}\n", container.config.id));
    Ok(0)
}

/// Starts a container without stdio; returns when its program runs.
pub(crate) fn start_detached(context: &Context, container: &Container, progress: &mut Progress) -> anyhow::Result<()> {
    let mut client = launch(&Launch {
        directory: &container.directory,
        paths: &context.paths,
        stdio: false,
        request_ns: context.request_ns,
    })?;
    loop {
        match client.answer()? {
            Answer::Progress { what } => progress.say(&what),
            Answer::Started { .. } => return Ok(()),
            _ => {}
        }
    }
}

fn foreground(
    arguments: &Arguments,
    context: &Context,
    container: &Container,
    signals: &Signals,
    progress: &mut Progress,
) -> anyhow::Result<u8> {
    let mut client = launch(&Launch {
        directory: &container.directory,
        paths: &context.paths,
        stdio: true,
        request_ns: context.request_ns,
    })?;
    signals.supervisor(client.pid());
    let terminal = arguments.tty && stdin().is_terminal();
    let end = interactive::follow(&mut client, signals, terminal, None, progress)?;
    client.reap();
    if let (true, Some(timing)) = (arguments.timing, &end.timing) {
        print_timing(timing);
    }
    report(&end);
    Ok(end.exit.code())
}

/// Says what the exit code alone does not.
pub(crate) fn report(end: &interactive::End) {
    if end.oom {
        eprintln!(
            "caisson: the container ran out of memory, and the guest's kernel killed a process of it (--memory sets the limit)"
        );
    }
    if let Some(error) = &end.error {
        eprintln!("error: {error}");
    }
}

fn print_timing(timing: &Timing) {
    let milliseconds = |ns: u64| format!("{}.{:03} ms", ns / 1_000_000, ns / 1000 % 1000);
    let mut before = 0;
    eprintln!(
        "{:<20} {:>14} {:>14}",
        if timing.template { "from a template" } else { "booted" },
        "since request",
        "step"
    );
    for (name, at) in timing.phases() {
        eprintln!("{name:<20} {:>14} {:>14}", milliseconds(at), milliseconds(at.saturating_sub(before)));
        before = at;
    }
    eprintln!("{:<20} {:>14}", "in KVM_RUN", milliseconds(timing.kvm_run_ns));
    eprintln!("{:<20} {:>14}", "answering exits", milliseconds(timing.vcpu_host_ns));
    let counts = |counts: &std::collections::BTreeMap<String, u64>| {
        counts.iter().map(|(name, count)| format!("{name} {count}")).collect::<Vec<_>>().join(", ")
    };
    eprintln!("exits: {}", counts(&timing.exits));
    if !timing.assists.is_empty() {
        eprintln!("supplied instructions: {}", counts(&timing.assists));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_cpus_as_people_write_them() {
        assert_eq!(parse_size("128m"), Ok(128 << 20));
        assert_eq!(parse_size("1GiB"), Ok(1 << 30));
        assert_eq!(parse_size("512"), Ok(512));
        assert_eq!(parse_size("2kb"), Ok(2048));
        for bad in ["", "m", "0", "-1", "1.5g", "99999999999t"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
        assert_eq!(parse_cpus("1.5"), Ok(1500));
        for bad in ["", "0", "-1", "33", "NaN", "x"] {
            assert!(parse_cpus(bad).is_err(), "{bad}");
        }
    }
}
