//! `caisson login`: credentials for a registry, checked and kept where docker and podman find them.
use std::io::{BufRead, IsTerminal, Read, Write};

use anyhow::{Context as _, bail};
use caisson_images::registry::Credentials;
use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};

use crate::{output::print, registry::RegistryArguments};

/// Bytes in a password or token.
const MAX_PASSWORD_BYTES: u64 = 64 << 10;

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  caisson login localhost:5000
  pass show registry | caisson login --username me --password-stdin registry.example")]
pub(crate) struct Arguments {
    /// Asked for if it is not given
    #[arg(short, long)]
    username: Option<String>,
    /// Read the password from standard input, to its end
    #[arg(long, requires = "username")]
    password_stdin: bool,
    #[command(flatten)]
    registry_options: RegistryArguments,
    /// HOST[:PORT]
    #[arg(default_value = "docker.io")]
    registry: String,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<u8> {
    let registry = arguments.registry.as_str();
    if !arguments.password_stdin && !std::io::stdin().is_terminal() {
        bail!("standard input is no terminal: give --username and --password-stdin");
    }
    let user = match &arguments.username {
        Some(user) => user.clone(),
        None => ask("Username: ", true)?,
    };
    if user.is_empty() || user.contains(':') {
        bail!("the user name {user:?} is empty or has a colon");
    }
    let password = if arguments.password_stdin {
        let mut password = String::new();
        std::io::stdin().take(MAX_PASSWORD_BYTES).read_to_string(&mut password).context("cannot read the password")?;
        password.trim_end_matches(['\r', '\n']).to_owned()
    } else {
        ask("Password: ", false)?
    };
    if password.is_empty() {
        bail!("the password is empty");
    }
    let credentials = Credentials::Password { user, password };
    arguments.registry_options.client().check(registry, &credentials)?;
    let place = arguments.registry_options.auth().store(registry, &credentials)?;
    print(&format!("Login succeeded: the credentials for {registry} are in {place}\n"));
    Ok(0)
}

/// Asks on the terminal, with or without showing what is typed.
fn ask(prompt: &str, shown: bool) -> anyhow::Result<String> {
    eprint!("{prompt}");
    std::io::stderr().flush()?;
    let stdin = std::io::stdin();
    let before = tcgetattr(&stdin)?;
    if !shown {
        let mut hidden = before.clone();
        hidden.local_modes.remove(LocalModes::ECHO);
        tcsetattr(&stdin, OptionalActions::Flush, &hidden)?;
    }
    let mut line = String::new();
    let read = stdin.lock().take(MAX_PASSWORD_BYTES).read_line(&mut line);
    if !shown {
        tcsetattr(&stdin, OptionalActions::Flush, &before)?;
        eprintln!();
    }
    read?;
    Ok(line.trim_end_matches(['\r', '\n']).to_owned())
}
