//! A command that stands for a process in a container: it passes on signals and the terminal's size, and ends with the process's code.
use std::{
    io::{IsTerminal, stdin},
    os::unix::net::UnixStream,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use caisson_runtime::{
    signals,
    state::Exit,
    supervisor::{
        Client,
        timing::Timing,
        wire::{self, Answer, Request},
    },
};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use crate::output::Progress;

/// How a process ended, as its command has heard.
#[derive(Debug)]
pub(crate) struct End {
    pub(crate) exit: Exit,
    pub(crate) oom: bool,
    pub(crate) error: Option<String>,
    pub(crate) timing: Option<Box<Timing>>,
}

/// This process's terminal in raw mode, for as long as the value lives.
#[derive(Debug)]
pub(crate) struct Raw {
    before: Option<Termios>,
}

impl Raw {
    /// Does nothing if stdin is no terminal.
    pub(crate) fn enter() -> Raw {
        let before = stdin().is_terminal().then(|| tcgetattr(stdin()).ok()).flatten();
        if let Some(before) = &before {
            let mut raw = before.clone();
            raw.make_raw();
            let _ = tcsetattr(stdin(), OptionalActions::Drain, &raw);
        }
        Raw { before }
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = tcsetattr(stdin(), OptionalActions::Drain, before);
        }
    }
}

/// The terminal's size: columns and rows.
pub(crate) fn terminal_size() -> Option<(u16, u16)> {
    tcgetwinsize(stdin())
        .ok()
        .map(|size| (size.ws_col, size.ws_row))
        .filter(|(columns, rows)| *columns != 0 && *rows != 0)
}

/// Signals of this process, passed on to whatever process it stands for once that runs.
#[derive(Debug, Clone)]
pub(crate) struct Signals {
    target: Arc<Mutex<Option<(UnixStream, String)>>>,
    terminal: Arc<AtomicBool>,
    supervisor: Arc<Mutex<Option<u32>>>,
}

impl Signals {
    /// Takes them from now on. To be called before there are other threads.
    pub(crate) fn take() -> anyhow::Result<Signals> {
        signals::block()?;
        let signals = Signals { target: Arc::default(), terminal: Arc::default(), supervisor: Arc::default() };
        let taken = signals.clone();
        thread::Builder::new().name("signals".into()).spawn(move || {
            while let Ok(signal) = signals::wait() {
                taken.pass_on(signal);
            }
        })?;
        Ok(signals)
    }

    /// Until the program runs, there is only the supervisor to end, if it is this command's own.
    pub(crate) fn supervisor(&self, pid: Option<u32>) {
        *self.supervisor.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = pid;
    }

    fn pass_on(&self, signal: i32) {
        let target = self.target.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if signal == libc::SIGWINCH {
            if let (true, Some((stream, process)), Some((width, height))) =
                (self.terminal.load(Ordering::Relaxed), &*target, terminal_size())
            {
                let _ = wire::send(stream, &Request::Resize { process: process.clone(), width, height }, &[]);
            }
            return;
        }
        if let Some((stream, process)) = &*target {
            let _ = wire::send(
                stream,
                &Request::Signal { process: process.clone(), signal: signal as u8, all: false },
                &[],
            );
        } else if matches!(signal, libc::SIGINT | libc::SIGTERM | libc::SIGHUP | libc::SIGQUIT) {
            let supervisor = *self.supervisor.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            match supervisor.and_then(|pid| rustix::process::Pid::from_raw(pid as i32)) {
                // Its end is reported, and ends this command.
                Some(pid) => drop(rustix::process::kill_process(pid, rustix::process::Signal::KILL)),
                None => std::process::exit(128 + signal),
            }
        }
    }
}

/// Waits for the process's end.
pub(crate) fn follow(
    client: &mut Client,
    signals: &Signals,
    terminal: bool,
    mut process: Option<String>,
    progress: &mut Progress,
) -> anyhow::Result<End> {
    signals.terminal.store(terminal, Ordering::Relaxed);
    let mut raw = None;
    let mut begin = |client: &Client, name: String| -> anyhow::Result<()> {
        *signals.target.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some((client.stream()?, name));
        if terminal {
            raw = Some(Raw::enter());
            signals.pass_on(libc::SIGWINCH);
        }
        Ok(())
    };
    if let Some(name) = process.take() {
        begin(client, name)?;
    }
    loop {
        match client.answer() {
            Ok(Answer::Progress { what }) => progress.say(&what),
            Ok(Answer::Started { process, .. }) => {
                progress.clear();
                begin(client, process)?;
            }
            Ok(Answer::Exited { exit, oom, error, timing }) => return Ok(End { exit, oom, error, timing }),
            Ok(_) => {}
            // A signal that came too late, or a size that the terminal did not take.
            Err(caisson_runtime::supervisor::ClientError::Refused { .. })
                if signals.target.lock().is_ok_and(|target| target.is_some()) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
