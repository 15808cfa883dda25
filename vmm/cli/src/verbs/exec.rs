//! `caisson exec`: another process in a running container.
use std::{
    io::{IsTerminal, stdin},
    os::fd::AsFd,
};

use anyhow::bail;
use caisson_runtime::{
    spec::image::DEFAULT_PATH,
    supervisor::{
        Client, own_stdio,
        wire::{Answer, Request},
    },
};
use serde_json::json;

use crate::{
    context::{Context, coded},
    interactive::{self, Signals},
    output::{Progress, print},
};

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  caisson exec web cat /etc/hostname
  caisson exec -it web sh
  caisson exec -u www-data -w /srv -e DEBUG=1 web ./task")]
pub(crate) struct Arguments {
    /// Run it in the background
    #[arg(short, long)]
    detach: bool,
    /// Keep standard input open
    #[arg(short, long)]
    interactive: bool,
    /// Give it a terminal
    #[arg(short, long)]
    tty: bool,
    /// Set a variable
    #[arg(short, long, value_name = "K=V")]
    env: Vec<String>,
    /// Working directory
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// User and group
    #[arg(short, long)]
    user: Option<String>,
    /// The container
    container: String,
    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

pub(crate) fn run(arguments: Arguments, context: &Context) -> anyhow::Result<u8> {
    exec(&arguments, context).map_err(|error| coded(error, 125))
}

fn exec(arguments: &Arguments, context: &Context) -> anyhow::Result<u8> {
    if arguments.tty && arguments.interactive && !stdin().is_terminal() {
        bail!("the input device is not a terminal: leave out -t");
    }
    let signals = (!arguments.detach).then(Signals::take).transpose()?;
    let container = context.container(&arguments.container)?;
    let mut client = Client::connect(&context.paths, &container.directory)
        .map_err(|_| anyhow::anyhow!("container {} is not running", arguments.container))?;
    let init = container.config.spec.process().clone().unwrap_or_default();
    let mut env = init.env().clone().unwrap_or_else(|| vec![format!("PATH={DEFAULT_PATH}")]);
    if arguments.tty {
        env.push("TERM=xterm".into());
    }
    for variable in &arguments.env {
        let name = variable.split('=').next().unwrap_or_default();
        env.retain(|known| known.split('=').next() != Some(name));
        match (variable.contains('='), std::env::var(variable)) {
            (true, _) => env.push(variable.clone()),
            (false, Ok(value)) => env.push(format!("{variable}={value}")),
            (false, Err(_)) => {}
        }
    }
    let mut process = json!({
        "terminal": arguments.tty,
        "user": {"uid": 0, "gid": 0},
        "args": arguments.command,
        "env": env,
        "cwd": arguments.workdir.clone().unwrap_or_else(|| init.cwd().display().to_string()),
    });
    if let (true, Some((width, height))) = (arguments.tty, interactive::terminal_size()) {
        process["consoleSize"] = json!({"width": width, "height": height});
    }
    let user = arguments.user.clone().or_else(|| container.config.user.clone());
    let streams = if arguments.detach { [false; 3] } else { [arguments.interactive, true, !arguments.tty] };
    let request =
        Request::Exec { process: Box::new(serde_json::from_value(process)?), user, streams, container_defaults: true };
    let stdio = own_stdio()?;
    let passed: Vec<_> =
        stdio.iter().zip(streams).filter(|(_, pass)| *pass).map(|(descriptor, _)| descriptor.as_fd()).collect();
    client.send(&request, &passed)?;
    let Some(signals) = signals else {
        client.answer()?;
        return Ok(0);
    };
    match client.answer()? {
        Answer::Started { process, .. } => {
            let terminal = arguments.tty && stdin().is_terminal();
            let end = interactive::follow(&mut client, &signals, terminal, Some(process), &mut Progress::new())?;
            Ok(end.exit.code())
        }
        other => bail!("the supervisor answered {other:?}"),
    }
}

/// Prints an id or name on a line of its own.
pub(crate) fn print_name(name: &str) {
    print(&format!("{name}\n"));
}
