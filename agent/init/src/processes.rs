//! The processes that the agent has started, and those that they have started.
use crate::{
    cgroup::sleep_ms,
    error::{Context, Result, error},
    launch,
    server::Server,
    sys,
};
use alloc::{
    format,
    string::{String, ToString},
    vec::Vec,
};
use caisson_agent_protocol::{ContainerId, ErrorKind, ExitStatus, ProcessId, ProcessInfo, Reply, TerminalSize};
use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::{Mode, OFlags},
    process::{WaitId, WaitIdOptions, waitid},
};

/// A process that the agent has made.
pub(crate) struct Entry {
    pub(crate) container: ContainerId,
    /// Empty for the container's init.
    pub(crate) process: ProcessId,
    /// None while it waits for its start; its child has it.
    pub(crate) pidfd: Option<OwnedFd>,
    /// The master side of its terminal.
    pub(crate) terminal: Option<OwnedFd>,
    /// How many output streams have not been delivered to their end.
    pub(crate) outputs: usize,
    /// How it ended, once it has.
    pub(crate) status: Option<ExitStatus>,
    /// When to look again whether its output has come to an end.
    pub(crate) drain_until_ms: Option<u64>,
}

impl Server {
    pub(crate) fn find_process(&self, container: &str, process: &str) -> Result<usize> {
        let found = self.processes.iter().find(|(_, entry)| entry.container == container && entry.process == process);
        found.map(|(number, _)| number).ok_or_else(|| {
            let which = if process.is_empty() { "init process".to_string() } else { format!("process {process:?}") };
            error(ErrorKind::NotFound, format!("container {container:?} has no {which}"))
        })
    }

    /// A descriptor of a process that has not ended.
    pub(crate) fn pidfd(&self, number: usize) -> Option<BorrowedFd<'_>> {
        let entry = self.processes.get(number)?;
        if entry.status.is_some() {
            return None;
        }
        match &entry.pidfd {
            Some(pidfd) => Some(pidfd.as_fd()),
            None => self
                .containers
                .iter()
                .find(|(_, container)| container.id == entry.container)?
                .1
                .created
                .as_ref()?
                .pidfd(),
        }
    }

    /// Reaps a process that has ended.
    pub(crate) fn process_ended(&mut self, number: usize) {
        let Some(pidfd) = self.pidfd(number) else { return };
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        let status = match waitid(WaitId::PidFd(pidfd), options) {
            Ok(Some(status)) => status,
            Ok(None) => return,
            Err(_) => {
                if let Some(entry) = self.processes.get_mut(number) {
                    entry.status = Some(ExitStatus::Code(255));
                }
                return self.finish(number);
            }
        };
        let status = match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => ExitStatus::Code((code & 0xff) as u8),
            (None, signal) => ExitStatus::Signal((signal.unwrap_or(9) & 0x7f) as u8),
        };
        let Some(entry) = self.processes.get_mut(number) else { return };
        entry.status = Some(status);
        let (id, is_init) = (entry.container.clone(), entry.process.is_empty());
        let containers = self.containers.numbers(|container| container.id == id);
        for container in containers {
            if is_init && let Some(container) = self.containers.get_mut(container) {
                container.created = None;
            }
            // The kernel counts before it kills, so this comes in time.
            if status == ExitStatus::Signal(9) {
                self.check_oom(container);
            }
        }
        self.finish(number);
    }

    pub(crate) fn signal(&mut self, container: &str, process: &str, signal: u8, all: bool) -> Result<()> {
        if all {
            return self.signal_all(container, signal);
        }
        let number = self.find_process(container, process)?;
        let pidfd = self.pidfd(number).ok_or_else(|| error(ErrorKind::NotFound, "the process has ended"))?;
        sys::send_signal(pidfd, signal).context(|| format!("sending signal {signal} to process {process:?}"))
    }

    fn signal_all(&mut self, container: &str, signal: u8) -> Result<()> {
        match self.cgroup(container) {
            Ok(cgroup) if signal == 9 => cgroup.kill(),
            Ok(cgroup) => {
                for pid in cgroup.processes() {
                    let _ = sys::kill(pid, signal);
                }
                Ok(())
            }
            // Without cgroups those that the agent knows have to do.
            Err(_) => {
                for number in self.processes.numbers(|entry| entry.container == container) {
                    if let Some(pidfd) = self.pidfd(number) {
                        let _ = sys::send_signal(pidfd, signal);
                    }
                }
                Ok(())
            }
        }
    }

    pub(crate) fn resize(&mut self, container: &str, process: &str, size: TerminalSize) -> Result<()> {
        let number = self.find_process(container, process)?;
        let terminal = self.processes.get(number).and_then(|entry| entry.terminal.as_ref());
        let terminal = terminal.ok_or_else(|| error(ErrorKind::State, "the process has no terminal"))?;
        launch::set_terminal_size(terminal, size).context(|| String::from("setting the terminal's size"))
    }

    /// Reaps a container's processes until none is left, for at most ten seconds.
    pub(crate) fn wait_for_end(&mut self, container: &str) -> Result<()> {
        for _ in 0..2000 {
            let alive = self.processes.numbers(|entry| entry.container == container && entry.status.is_none());
            if alive.is_empty() {
                return Ok(());
            }
            for number in alive {
                self.process_ended(number);
            }
            sleep_ms(5);
        }
        Err(error(ErrorKind::System, format!("processes of container {container:?} did not end within 10 s")))
    }

    pub(crate) fn list_processes(&mut self, container: &str) -> Result<Reply> {
        let pids = self.cgroup(container)?.processes();
        Ok(Reply::Processes(describe(&pids)))
    }
}

/// The longest command line that is given, and the most of all together, in bytes. The rest of a message has room enough.
const MAX_COMMAND_BYTES: usize = 4096;
const MAX_COMMANDS_BYTES: usize = 512 * 1024;
/// USER_HZ: /proc's unit of time is 10 ms.
const TICK_MS: u64 = 10;

fn describe(pids: &[u32]) -> Vec<ProcessInfo> {
    let mut found: Vec<(u32, u32, ProcessInfo)> = Vec::new();
    let mut budget = MAX_COMMANDS_BYTES;
    for pid in pids {
        if let Some(info) = describe_one(*pid) {
            let Some(rest) = budget.checked_sub(info.2.command.len() + 64) else { break };
            budget = rest;
            found.push(info);
        }
    }
    // Parents as the container sees them; whose parent is not in it has none.
    let numbers: Vec<(u32, u32)> = found.iter().map(|(pid, _, info)| (*pid, info.pid)).collect();
    let seen = |ppid: u32| numbers.iter().find(|(pid, _)| *pid == ppid).map_or(0, |(_, pid)| *pid);
    found.into_iter().map(|(_, ppid, info)| ProcessInfo { ppid: seen(ppid), ..info }).collect()
}

fn read_file(path: &str) -> Option<String> {
    let file = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let mut content = alloc::vec![0; MAX_COMMAND_BYTES];
    let count = rustix::io::read(file, &mut *content).ok()?;
    content.truncate(count);
    Some(String::from_utf8_lossy(&content).into_owned())
}

/// A process by its PID here: that PID, its parent's here, and the rest.
fn describe_one(pid: u32) -> Option<(u32, u32, ProcessInfo)> {
    let status = read_file(&format!("/proc/{pid}/status"))?;
    let line = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
    let own_pid = line("NSpid:")?.split_whitespace().next_back()?.parse().ok()?;
    let uid = line("Uid:")?.split_whitespace().next()?.parse().ok()?;
    let ppid = line("PPid:")?.trim().parse().ok()?;
    let stat = read_file(&format!("/proc/{pid}/stat"))?;
    // The name in brackets may hold anything, brackets too.
    let (head, fields) = stat.rsplit_once(')')?;
    let name = head.split_once('(')?.1;
    // Of proc(5), counted from the state, which is field 3: utime and stime are 14 and 15, starttime is 22.
    let fields: Vec<u64> = fields.split_whitespace().map(|field| field.parse().unwrap_or(0)).collect();
    let ticks = |number: usize| fields.get(number - 3).copied().unwrap_or(0);
    let arguments = read_file(&format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let arguments = arguments.trim_end_matches('\0').replace('\0', " ");
    let command = if arguments.is_empty() { format!("[{name}]") } else { arguments };
    let info = ProcessInfo {
        pid: own_pid,
        ppid: 0,
        uid,
        cpu_ms: ticks(14).saturating_add(ticks(15)).saturating_mul(TICK_MS),
        started_ms: ticks(22).saturating_mul(TICK_MS),
        command,
    };
    Some((pid, ppid, info))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_are_described_from_proc() {
        let me = std::process::id();
        let infos = describe(&[me, u32::MAX]);
        assert_eq!(infos.len(), 1);
        assert_eq!(infos[0].ppid, 0);
        assert!(infos[0].command.contains("caisson"), "{}", infos[0].command);
        assert!(infos[0].started_ms > 0);
    }
}
