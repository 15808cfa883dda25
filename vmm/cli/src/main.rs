//! The caisson command: containers that run in their own small virtual machines.
mod context;
mod engine;
mod interactive;
mod output;
mod prepare;
mod registry;
mod verbs;

use std::process::ExitCode;

use clap::Parser;

use verbs::Command;

/// Runs containers, each in its own small KVM guest.
#[derive(Debug, Parser)]
#[command(
    name = "caisson",
    version,
    about,
    max_term_width = 120,
    after_help = "Examples:
  caisson run --rm busybox echo hello        run a program in the built-in image
  caisson image import image.tar             import what skopeo, podman save or umoci wrote
  caisson run -d --name web my/web           run in the background
  caisson exec -it web sh                    run a shell in it
  caisson doctor                             see what this host lacks"
)]
struct Cli {
    /// Directory for what must not survive a reboot, and for the state of engines' containers
    #[arg(long, global = true, env = "CAISSON_ROOT", value_name = "DIR")]
    root: Option<std::path::PathBuf>,
    #[command(subcommand)]
    command: Command,
}

fn main() -> ExitCode {
    let request_ns = caisson_runtime::clock::monotonic_ns();
    let arguments: Vec<_> = std::env::args_os().collect();
    if let Some(code) = engine::run(&arguments, request_ns) {
        return ExitCode::from(code);
    }
    let cli = match Cli::try_parse_from(&arguments) {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            // docker's code for a command that it does not understand; scripts tell it from the program's own.
            let run = std::env::args().nth(1).is_some_and(|verb| verb == "run" || verb == "exec");
            return ExitCode::from(if !error.use_stderr() {
                0
            } else if run {
                125
            } else {
                2
            });
        }
    };
    let context = match context::Context::new(cli.root, request_ns) {
        Ok(context) => context,
        Err(error) => return fail(&error, 1),
    };
    match cli.command.run(&context) {
        Ok(code) => ExitCode::from(code),
        Err(error) => fail(&error, error.downcast_ref::<context::Coded>().map_or(1, |coded| coded.code)),
    }
}

fn fail(error: &anyhow::Error, code: u8) -> ExitCode {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string).filter(|cause| !cause.is_empty()) {
        if !text.is_empty() {
            text.push_str(": ");
        }
        text.push_str(&cause);
    }
    eprintln!("error: {text}");
    ExitCode::from(code)
}
