//! The verbs, one file each.
mod attach;
mod build;
mod doctor;
mod exec;
mod image;
mod inspect;
mod kill;
mod load;
mod login;
mod logout;
mod logs;
mod pause;
mod ps;
mod pull;
mod push;
mod rename;
mod restart;
mod rm;
mod run;
mod save;
mod search_tags;
mod start;
mod stop;
mod supervise;
mod template;
mod wait;

pub(crate) use run::{parse_size, report};

use crate::context::Context;

/// A span of time, for clap.
pub(crate) fn parse_duration(text: &str) -> Result<std::time::Duration, String> {
    caisson_runtime::clock::parse_duration(text).ok_or_else(|| format!("{text:?} is not a span such as 5s"))
}

/// A verb.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Run a program in a new container
    Run(Box<run::Arguments>),
    /// Run another program in a running container
    Exec(exec::Arguments),
    /// List containers
    Ps(ps::Arguments),
    /// Show a container's output
    Logs(logs::Arguments),
    /// Join a running container's input and output
    Attach(attach::Arguments),
    /// Start containers that have ended
    Start(start::Arguments),
    /// Ask containers to end, and end them
    Stop(stop::Arguments),
    /// Stop containers and start them again
    Restart(restart::Arguments),
    /// Send a signal to containers
    Kill(kill::Arguments),
    /// Wait until containers have ended, and print their exit codes
    Wait(wait::Arguments),
    /// Freeze containers
    Pause(pause::Arguments),
    /// Let frozen containers go on
    #[command(visible_alias = "resume")]
    Unpause(pause::Arguments),
    /// Give a container another name
    Rename(rename::Arguments),
    /// Remove containers
    Rm(rm::Arguments),
    /// Show all about containers or images
    Inspect(inspect::Arguments),
    /// Build an image from a Dockerfile
    Build(Box<build::Arguments>),
    /// Manage images
    #[command(subcommand)]
    Image(image::Command),
    /// List images
    Images(image::ListArguments),
    /// Remove images
    Rmi(image::RemoveArguments),
    /// Fetch an image from a registry
    Pull(pull::Arguments),
    /// Store an image in a registry
    Push(push::Arguments),
    /// Check and keep credentials for a registry
    Login(login::Arguments),
    /// Forget a registry's credentials
    Logout(logout::Arguments),
    /// List the tags that a registry has of an image
    SearchTags(search_tags::Arguments),
    /// Give an image another name
    Tag(image::TagArguments),
    /// Write images to an archive
    Save(save::Arguments),
    /// Read images from an archive
    Load(load::Arguments),
    /// Manage the templates that containers are started from
    #[command(subcommand)]
    Template(template::Command),
    /// Say what this host offers and what it lacks
    Doctor(doctor::Arguments),
    #[command(hide = true)]
    Supervise(supervise::Arguments),
}

impl Command {
    /// Carries it out. The exit code, if it did not fail.
    pub(crate) fn run(self, context: &Context) -> anyhow::Result<u8> {
        match self {
            Command::Run(arguments) => run::run(*arguments, context),
            Command::Exec(arguments) => exec::run(arguments, context),
            Command::Ps(arguments) => ps::run(&arguments, context),
            Command::Logs(arguments) => logs::run(&arguments, context),
            Command::Attach(arguments) => attach::run(&arguments, context),
            Command::Start(arguments) => start::run(&arguments, context),
            Command::Stop(arguments) => stop::run(&arguments, context),
            Command::Restart(arguments) => restart::run(&arguments, context),
            Command::Kill(arguments) => kill::run(&arguments, context),
            Command::Wait(arguments) => wait::run(&arguments, context),
            Command::Pause(arguments) => pause::run(&arguments, true, context),
            Command::Unpause(arguments) => pause::run(&arguments, false, context),
            Command::Rename(arguments) => rename::run(&arguments, context),
            Command::Rm(arguments) => rm::run(&arguments, context),
            Command::Inspect(arguments) => inspect::run(&arguments, context),
            Command::Build(arguments) => build::run(&arguments, context),
            Command::Image(command) => image::run(command, context),
            Command::Images(arguments) => image::list(&arguments, context),
            Command::Rmi(arguments) => image::remove(&arguments, context),
            Command::Pull(arguments) => pull::run(&arguments, context),
            Command::Push(arguments) => push::run(&arguments, context),
            Command::Login(arguments) => login::run(&arguments),
            Command::Logout(arguments) => logout::run(&arguments),
            Command::SearchTags(arguments) => search_tags::run(&arguments),
            Command::Tag(arguments) => image::run(image::Command::Tag(arguments), context),
            Command::Save(arguments) => save::run(&arguments, context),
            Command::Load(arguments) => load::run(&arguments, context),
            Command::Template(command) => template::run(&command, context),
            Command::Doctor(arguments) => doctor::run(&arguments, context),
            Command::Supervise(arguments) => Ok(supervise::run(arguments)),
        }
    }
}
