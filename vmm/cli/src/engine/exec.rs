//! `exec`: another process in a container, with a process of the host that stands for it.
use std::{
    fs,
    io::{Read, Seek, Write},
    os::{
        fd::{AsFd, AsRawFd},
        unix::{net::UnixStream, process::CommandExt},
    },
    path::PathBuf,
    process::Command,
};

use anyhow::{Context as _, bail};
use caisson_runtime::{engine, paths::Paths, state::Status};
use oci_spec::runtime::Process;
use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::json;

use super::create::write_pid;
use crate::context::Context;

#[derive(Debug, clap::Args)]
pub(crate) struct ExecArguments {
    /// JSON of the process
    #[arg(short, long, value_name = "FILE")]
    process: Option<PathBuf>,
    /// Do not wait for it
    #[arg(short, long)]
    detach: bool,
    /// Give it a terminal
    #[arg(short, long)]
    tty: bool,
    /// Socket that gets the terminal's master
    #[arg(long, value_name = "SOCKET")]
    console_socket: Option<PathBuf>,
    /// File for the PID of the process that stands for it
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// Working directory
    #[arg(long, value_name = "DIR")]
    cwd: Option<PathBuf>,
    /// UID[:GID]
    #[arg(short, long)]
    user: Option<String>,
    /// Additional group ids
    #[arg(short = 'g', long)]
    additional_gids: Vec<u32>,
    /// Set a variable
    #[arg(short, long, value_name = "K=V")]
    env: Vec<String>,
    /// Add a capability
    #[arg(short, long, value_name = "CAP")]
    cap: Vec<String>,
    /// Set no_new_privs
    #[arg(long)]
    no_new_privs: bool,
    /// Accepted for compatibility
    #[arg(long, value_name = "LABEL")]
    process_label: Option<String>,
    /// Accepted for compatibility
    #[arg(long, value_name = "PROFILE")]
    apparmor: Option<String>,
    /// Accepted for compatibility
    #[arg(long, value_name = "PATH")]
    cgroup: Option<String>,
    /// Accepted: descriptors cannot enter a guest
    #[arg(long, default_value_t = 0, value_name = "N")]
    preserve_fds: u32,
    /// Accepted: a paused container refuses
    #[arg(long)]
    ignore_paused: bool,
    /// The container's id
    id: String,
    /// The program and its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

impl ExecArguments {
    fn described(&self, init: &Process) -> anyhow::Result<Process> {
        if let Some(path) = &self.process {
            let text = fs::read(path).with_context(|| format!("cannot read the process in {}", path.display()))?;
            return serde_json::from_slice(&text).with_context(|| format!("{} describes no process", path.display()));
        }
        if self.command.is_empty() {
            bail!("process args cannot be empty");
        }
        let mut process = serde_json::to_value(init)?;
        process["args"] = json!(self.command);
        process["terminal"] = json!(self.tty);
        if let Some(cwd) = &self.cwd {
            process["cwd"] = json!(cwd);
        }
        if let Some(user) = &self.user {
            let (uid, gid) = user.split_once(':').unwrap_or((user, ""));
            process["user"]["uid"] = json!(uid.parse::<u32>().with_context(|| format!("parsing {uid:?} as uid"))?);
            if !gid.is_empty() {
                process["user"]["gid"] = json!(gid.parse::<u32>().with_context(|| format!("parsing {gid:?} as gid"))?);
            }
        }
        if !self.additional_gids.is_empty() {
            process["user"]["additionalGids"] = json!(self.additional_gids);
        }
        if self.no_new_privs {
            process["noNewPrivileges"] = json!(true);
        }
        let mut env: Vec<String> = init.env().clone().unwrap_or_default();
        env.extend(self.env.iter().cloned());
        process["env"] = json!(env);
        for capability in &self.cap {
            for set in ["bounding", "effective", "permitted"] {
                let known = process["capabilities"][set].as_array().cloned().unwrap_or_default();
                process["capabilities"][set] = json!(known.into_iter().chain([json!(capability)]).collect::<Vec<_>>());
            }
        }
        Ok(serde_json::from_value(process)?)
    }
}

pub(crate) fn exec(arguments: ExecArguments, context: &Context) -> anyhow::Result<u8> {
    let container = engine::find(&context.paths, &arguments.id)?;
    match container.state.status() {
        Status::Running => {}
        Status::Paused => bail!("cannot exec in a paused container"),
        _ => bail!("cannot exec in a stopped container"),
    }
    let process = arguments.described(&container.config.spec.process().clone().unwrap_or_default())?;
    let terminal = process.terminal().unwrap_or(false);
    if terminal && arguments.detach && arguments.console_socket.is_none() {
        bail!("cannot allocate tty if runc will detach without setting console socket");
    }
    if arguments.console_socket.is_some() && !(terminal && arguments.detach) {
        bail!("cannot use console socket if runc will not detach or allocate tty");
    }
    if !arguments.detach {
        let pid_file = |pid| arguments.pid_file.as_deref().map_or(Ok(()), |path| write_pid(path, pid));
        return super::proxy::stand_for(&context.paths, &container.directory, &process, None, || {
            pid_file(std::process::id())
        });
    }
    let mut file: fs::File = memfd_create("process", MemfdFlags::CLOEXEC)?.into();
    serde_json::to_writer(&file, &process)?;
    file.flush().and_then(|()| file.rewind())?;
    let (mut ours, theirs) = UnixStream::pair()?;
    let pid = spawn_proxy(&arguments, &context.paths, &file, &theirs)?;
    drop(theirs);
    let mut answer = String::new();
    ours.read_to_string(&mut answer)?;
    if let Some(error) = answer.strip_prefix("error:") {
        bail!("{error}");
    }
    if answer != "started" {
        bail!("the process that stands for the new one died");
    }
    if let Some(path) = &arguments.pid_file {
        write_pid(path, pid)?;
    }
    Ok(0)
}

/// Starts this program again, detached, to stand for the new process with this process's stdio.
fn spawn_proxy(
    arguments: &ExecArguments,
    paths: &Paths,
    process: &fs::File,
    channel: &UnixStream,
) -> anyhow::Result<u32> {
    let inherited = [process.as_fd().as_raw_fd(), channel.as_raw_fd()];
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("--root").arg(&paths.run).arg("exec-proxy");
    command.args(["--process-fd", &inherited[0].to_string(), "--channel", &inherited[1].to_string()]);
    if let Some(socket) = &arguments.console_socket {
        command.arg("--console-socket").arg(std::path::absolute(socket)?);
    }
    command.arg(&arguments.id);
    #[allow(unsafe_code)] // The child inherits two descriptors and leaves the caller's session.
    // SAFETY: only system calls between fork and exec.
    unsafe {
        command.pre_exec(move || {
            for descriptor in inherited {
                if libc::fcntl(descriptor, libc::F_SETFD, 0) != 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            if libc::setsid() < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
        });
    }
    Ok(command.spawn()?.id())
}
