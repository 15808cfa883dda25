//! The verbs of an OCI runtime, as engines call them: runc's names, flags, exit codes and texts.
//!
//! Some names are people's verbs too. A call is an engine's if it has a flag that only runc has, or if the container that it names is a
//! bundle's.
mod create;
mod exec;
mod kill;
mod log;
mod proxy;
mod simple;
mod usage;

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

use caisson_runtime::{engine, paths::Paths};
use clap::Parser;

use crate::context::Context;

/// Verbs that people do not have.
const OWN_VERBS: &[&str] = &[
    "create",
    "state",
    "delete",
    "list",
    "spec",
    "features",
    "update",
    "events",
    "checkpoint",
    "restore",
    "exec-proxy",
];
/// Verbs that people have too.
const SHARED_VERBS: &[&str] = &["start", "kill", "exec", "ps", "pause", "resume", "run"];
/// Global flags that take a value.
const GLOBAL_WITH_VALUE: [&str; 6] = ["--root", "--log", "--log-format", "--rootless", "--criu", "--cgroup-manager"];
/// Global flags that do not.
const GLOBAL: [&str; 2] = ["--debug", "--systemd-cgroup"];
/// Flags of `run` that say that it is about a bundle.
const BUNDLE_FLAGS: [&str; 7] =
    ["--bundle", "-b", "--pid-file", "--console-socket", "--no-pivot", "--preserve-fds", "--keep"];

#[derive(Debug, Parser)]
#[command(name = "caisson", version, about = "The verbs of an OCI runtime")]
struct Cli {
    /// Directory for the state of containers
    #[arg(long, global = true, env = "CAISSON_ROOT", value_name = "DIR")]
    root: Option<PathBuf>,
    /// File for messages, beside standard error
    #[arg(long, global = true, value_name = "FILE")]
    log: Option<PathBuf>,
    /// text or json
    #[arg(long, global = true, default_value = "text", value_parser = ["text", "json"])]
    log_format: String,
    /// Accepted; messages are errors only
    #[arg(long, global = true)]
    debug: bool,
    /// Cgroup paths are systemd's: slice:prefix:name
    #[arg(long, global = true)]
    systemd_cgroup: bool,
    /// Accepted for compatibility
    #[arg(long, global = true, value_name = "VALUE", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    rootless: Option<String>,
    /// Accepted for compatibility
    #[arg(long, global = true, value_name = "VALUE")]
    criu: Option<String>,
    /// Accepted for compatibility
    #[arg(long, global = true, value_name = "VALUE")]
    cgroup_manager: Option<String>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Create a container of a bundle
    Create(create::CreateArguments),
    /// Run the program of a created container
    Start(simple::Named),
    /// Create a container, run its program, and wait for it
    Run(create::RunArguments),
    /// Print a container's state
    State(simple::Named),
    /// Send a signal to a container
    Kill(kill::KillArguments),
    /// Remove a container that has ended
    Delete(kill::DeleteArguments),
    /// List containers
    List(simple::ListArguments),
    /// Run another process in a container
    Exec(Box<exec::ExecArguments>),
    #[command(hide = true)]
    ExecProxy(proxy::ProxyArguments),
    /// List a container's processes
    Ps(usage::PsArguments),
    /// Freeze a container
    Pause(simple::Named),
    /// Let a frozen container go on
    Resume(simple::Named),
    /// Change a container's limits
    Update(Box<usage::UpdateArguments>),
    /// Print a container's usage
    Events(usage::EventsArguments),
    /// Write a configuration to begin with
    Spec(simple::SpecArguments),
    /// Print what this runtime can do
    Features,
}

/// The call's verb and its global flags.
fn scan(arguments: &[String]) -> (bool, Option<usize>, Option<PathBuf>) {
    let (mut engine_flag, mut root) = (false, None);
    let mut at = 1;
    while let Some(argument) = arguments.get(at) {
        let (name, inline) =
            argument.split_once('=').map_or((argument.as_str(), None), |(name, value)| (name, Some(value)));
        if GLOBAL_WITH_VALUE.contains(&name) {
            let value = inline.map(str::to_owned).or_else(|| arguments.get(at + 1).cloned());
            if name == "--root" {
                root = value.map(PathBuf::from);
            } else {
                engine_flag = true;
            }
            at += if inline.is_some() { 1 } else { 2 };
        } else if GLOBAL.contains(&name) {
            engine_flag = true;
            at += 1;
        } else if argument.starts_with('-') {
            return (engine_flag, None, root);
        } else {
            return (engine_flag, Some(at), root);
        }
    }
    (engine_flag, None, root)
}

/// Whether an engine, and not a person, called.
fn is_engine(arguments: &[String]) -> bool {
    let (engine_flag, verb, root) = scan(arguments);
    let Some((at, verb)) = verb.and_then(|at| Some((at, arguments.get(at)?.as_str()))) else { return false };
    if OWN_VERBS.contains(&verb) {
        return true;
    }
    if !SHARED_VERBS.contains(&verb) {
        return false;
    }
    let rest = arguments.get(at + 1..).unwrap_or_default();
    if verb == "run" {
        let bundle = rest.iter().any(|argument| BUNDLE_FLAGS.contains(&argument.split('=').next().unwrap_or_default()));
        return engine_flag || bundle || (Path::new("config.json").exists() && Path::new("rootfs").exists());
    }
    if engine_flag
        || rest.iter().any(|argument| {
            ["--process", "--pid-file", "--console-socket"].contains(&argument.split('=').next().unwrap_or_default())
        })
    {
        return true;
    }
    let Ok(paths) = Paths::new(root) else { return false };
    rest.iter().filter(|argument| !argument.starts_with('-')).take(2).any(|id| engine::exists(&paths, id))
}

/// Carries out an engine's call. None: a person called.
pub(crate) fn run(arguments: &[OsString], request_ns: u64) -> Option<u8> {
    let texts: Vec<String> = arguments.iter().map(|argument| argument.to_string_lossy().into_owned()).collect();
    if !is_engine(&texts) {
        return None;
    }
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return Some(u8::from(error.use_stderr()));
        }
    };
    // For exec, 1 is the program's; runc has 255 for its own failures.
    let failure = if matches!(cli.command, Command::Exec(_)) { 255 } else { 1 };
    let log = log::Log { file: cli.log.clone(), json: cli.log_format == "json" };
    let result = Context::new(cli.root, request_ns).and_then(|context| dispatch(cli.command, &context));
    Some(result.unwrap_or_else(|error| {
        log.error(&error);
        failure
    }))
}

fn dispatch(command: Command, context: &Context) -> anyhow::Result<u8> {
    match command {
        Command::Create(arguments) => create::create(&arguments, context),
        Command::Start(arguments) => simple::start(&arguments, context),
        Command::Run(arguments) => create::run(&arguments, context),
        Command::State(arguments) => simple::state(&arguments, context),
        Command::Kill(arguments) => kill::kill(&arguments, context),
        Command::Delete(arguments) => kill::delete(&arguments, context),
        Command::List(arguments) => simple::list(&arguments, context),
        Command::Exec(arguments) => exec::exec(*arguments, context),
        Command::ExecProxy(arguments) => proxy::run(&arguments, context),
        Command::Ps(arguments) => usage::ps(&arguments, context),
        Command::Pause(arguments) => simple::pause(&arguments, true, context),
        Command::Resume(arguments) => simple::pause(&arguments, false, context),
        Command::Update(arguments) => usage::update(&arguments, context),
        Command::Events(arguments) => usage::events(&arguments, context),
        Command::Spec(arguments) => simple::spec(&arguments),
        Command::Features => simple::features(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn engine(line: &str) -> bool {
        is_engine(&line.split(' ').map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
        for verb in ["spec", "state id", "create id", "run id", "exec id true", "ps id", "update id", "events id"] {
            let line = format!("caisson {verb}");
            assert!(Cli::try_parse_from(line.split(' ')).is_ok(), "{line}");
        }
    }

    #[test]
    fn engines_and_people_are_told_apart() {
        for line in [
            "caisson create --bundle b id",
            "caisson --root /r state id",
            "caisson --log=/l --log-format json start id",
            "caisson --systemd-cgroup kill id 9",
            "caisson run --bundle b id",
            "caisson exec --process p.json id",
            "caisson features",
        ] {
            assert!(engine(line), "{line}");
        }
        for line in [
            "caisson",
            "caisson --help",
            "caisson run --rm busybox echo",
            "caisson start nobody",
            "caisson --root /r ps -a",
            "caisson exec -it web sh",
            "caisson images",
        ] {
            assert!(!engine(line), "{line}");
        }
    }
}
