//! `create` and `run`.
use std::{
    fs,
    io::{IsTerminal, stdin},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use caisson_runtime::{
    engine::{self, Create, Engine},
    hooks,
    state::Status,
    supervisor::{
        self, Client, ClientError, Launch, launch,
        wire::{Answer, Request},
    },
};

use crate::{
    context::Context,
    interactive::{self, Signals},
    output::Progress,
    prepare,
};

#[derive(Debug, clap::Args)]
pub(crate) struct CreateArguments {
    /// The bundle's directory
    #[arg(short, long, default_value = ".", value_name = "DIR")]
    bundle: PathBuf,
    /// In place of the bundle's config.json
    #[arg(short = 'f', long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Socket that gets the terminal's master
    #[arg(long, value_name = "SOCKET")]
    console_socket: Option<PathBuf>,
    /// File for the PID of the process that stands for the container
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// Accepted: there is nothing to pivot from in a guest
    #[arg(long)]
    no_pivot: bool,
    /// Accepted: a guest has its own keyrings
    #[arg(long)]
    no_new_keyring: bool,
    /// Descriptors cannot enter a guest; they are left open to the process that stands for the container
    #[arg(long, default_value_t = 0, value_name = "N")]
    preserve_fds: u32,
    /// The container's id
    id: String,
}

#[derive(Debug, clap::Args)]
pub(crate) struct RunArguments {
    #[command(flatten)]
    create: CreateArguments,
    /// Do not wait for it
    #[arg(short, long)]
    detach: bool,
    /// Do not delete it when it ends
    #[arg(long)]
    keep: bool,
    /// Accepted: the process that stands for the container is its own reaper
    #[arg(long)]
    no_subreaper: bool,
}

/// Writes a PID file, whole or not at all.
pub(crate) fn write_pid(path: &Path, pid: u32) -> anyhow::Result<()> {
    let name = path
        .file_name()
        .with_context(|| format!("{} is no file's path", path.display()))?
        .to_string_lossy()
        .into_owned();
    let temporary = path.with_file_name(format!(".{name}"));
    fs::write(&temporary, pid.to_string())
        .and_then(|()| fs::rename(&temporary, path))
        .with_context(|| format!("cannot write the PID file {}", path.display()))
}

pub(crate) fn create(arguments: &CreateArguments, context: &Context) -> anyhow::Result<u8> {
    make(arguments, context)?;
    Ok(0)
}

/// Creates a container up to the point where it can be started.
fn make(arguments: &CreateArguments, context: &Context) -> anyhow::Result<(Engine, Client)> {
    let console_socket = arguments.console_socket.as_ref().map(std::path::absolute).transpose()?;
    let create = Create {
        id: arguments.id.clone(),
        bundle: arguments.bundle.clone(),
        config: arguments.config.clone(),
        console_socket,
        auto_start: false,
    };
    let mut made = engine::create(&context.paths, create)?;
    let result = (|| {
        prepare::guest(&mut Progress::new())?;
        supervisor::clear(&context.paths, &made.directory)?;
        let mut client = launch(&Launch {
            directory: &made.directory,
            paths: &context.paths,
            stdio: true,
            request_ns: context.request_ns,
        })?;
        loop {
            match client.answer() {
                Ok(Answer::Created) => break,
                Ok(_) => {}
                Err(error) => return Err(explain(error, &made)),
            }
        }
        made.state = made.directory.state()?;
        let hooks = made.config.spec.hooks().clone().unwrap_or_default();
        let state = made.describe_as(Status::Created);
        #[allow(deprecated)] // Engines still use it.
        hooks::run("prestart", hooks.prestart().as_ref(), &state)?;
        hooks::run("createRuntime", hooks.create_runtime().as_ref(), &state)?;
        // Their paths are the host's, so they run on the host.
        hooks::run("createContainer", hooks.create_container().as_ref(), &state)?;
        if let Some(path) = &arguments.pid_file {
            write_pid(path, client.pid().unwrap_or(0))?;
        }
        Ok(client)
    })();
    match result {
        Ok(client) => Ok((made, client)),
        Err(error) => {
            let _ = super::kill::destroy(&made, context);
            Err(error)
        }
    }
}

/// Says it as runc does, where callers look at the words.
fn explain(error: ClientError, made: &Engine) -> anyhow::Error {
    let args = made.config.spec.process().as_ref().and_then(|process| process.args().clone()).unwrap_or_default();
    let program = args.first().cloned().unwrap_or_default();
    explain_program(error, &program)
}

/// The same for any program.
pub(crate) fn explain_program(error: ClientError, program: &str) -> anyhow::Error {
    match &error {
        ClientError::Refused { code: 127, .. } if program.contains('/') => {
            anyhow::anyhow!(
                "unable to start container process: exec: {program:?}: stat {program}: no such file or directory ({error})"
            )
        }
        ClientError::Refused { code: 127, .. } => {
            anyhow::anyhow!(
                "unable to start container process: exec: {program:?}: executable file not found in $PATH ({error})"
            )
        }
        ClientError::Refused { code: 126, .. } => {
            anyhow::anyhow!("unable to start container process: exec: {program:?}: permission denied ({error})")
        }
        _ => error.into(),
    }
}

/// Starts a created container: its program, then the poststart hooks.
pub(crate) fn start(made: &Engine, client: &mut Client, context: &Context) -> anyhow::Result<()> {
    let args = made.config.spec.process().as_ref().and_then(|process| process.args().clone()).unwrap_or_default();
    client.ask(&Request::Start).map_err(|error| explain_program(error, args.first().map_or("", String::as_str)))?;
    let hooks = made.config.spec.hooks().clone().unwrap_or_default();
    if let Err(error) = hooks::run("poststart", hooks.poststart().as_ref(), &made.describe_as(Status::Running)) {
        let _ = super::kill::destroy(made, context);
        return Err(error.into());
    }
    Ok(())
}

pub(crate) fn run(arguments: &RunArguments, context: &Context) -> anyhow::Result<u8> {
    if arguments.create.console_socket.is_some() && !arguments.detach {
        bail!("cannot use console socket if runc will not detach or allocate tty");
    }
    let signals = (!arguments.detach).then(Signals::take).transpose()?;
    let (made, mut client) = make(&arguments.create, context)?;
    let terminal = made.config.spec.process().as_ref().and_then(|process| process.terminal()).unwrap_or(false);
    let Some(signals) = signals else {
        return start(&made, &mut client, context).map(|()| 0);
    };
    let result = start(&made, &mut client, context).and_then(|()| {
        let end = interactive::follow(
            &mut client,
            &signals,
            terminal && stdin().is_terminal(),
            Some(String::new()),
            &mut Progress::new(),
        )?;
        client.reap();
        crate::verbs::report(&end);
        Ok(end.exit.code())
    });
    if !arguments.keep {
        super::kill::destroy(&made, context)?;
    }
    result
}
