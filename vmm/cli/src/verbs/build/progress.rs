//! A build's steps and their output, on stderr: one line for a step, and what it prints, with its stage in front where several go
//! on at once.
use std::{
    collections::HashMap,
    io::{IsTerminal, Write, stderr},
    sync::{Mutex, PoisonError},
    time::Instant,
};

use caisson_build::progress::{Event, Progress, StepId};

/// Shows what happens.
#[derive(Debug)]
pub(super) struct Shown {
    quiet: bool,
    dim: bool,
    state: Mutex<HashMap<String, Step>>,
}

#[derive(Debug)]
struct Step {
    began: Instant,
    cached: bool,
    /// A line of output that has not ended yet.
    partial: Vec<u8>,
}

/// A line longer than this is shown in pieces.
const MAX_LINE_BYTES: usize = 64 << 10;

impl Shown {
    pub(super) fn new(quiet: bool, plain: bool) -> Self {
        Self { quiet, dim: !plain && stderr().is_terminal(), state: Mutex::new(HashMap::new()) }
    }

    /// Says what is not about a step.
    pub(super) fn say(&self, what: &str) {
        if !self.quiet {
            eprintln!("{what}");
        }
    }

    fn output(&self, name: &str, bytes: &[u8]) {
        let mut out = stderr().lock();
        let (before, after) = if self.dim { ("\x1b[2m", "\x1b[0m") } else { ("", "") };
        let _ = write!(out, "{before}[{name}] ");
        let _ = out.write_all(bytes);
        let _ = writeln!(out, "{after}");
    }
}

impl Progress for Shown {
    fn event(&self, id: StepId<'_>, event: Event<'_>) {
        if self.quiet {
            return;
        }
        let key = format!("{} {}/{}", id.stage, id.number, id.of);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            Event::Started(text) => {
                eprintln!("[{key}] {text}");
                state.insert(key, Step { began: Instant::now(), cached: false, partial: Vec::new() });
            }
            Event::Cached => {
                if let Some(step) = state.get_mut(&key) {
                    step.cached = true;
                }
            }
            Event::Output(bytes) => {
                let Some(step) = state.get_mut(&key) else { return };
                step.partial.extend_from_slice(bytes);
                while let Some(end) = step.partial.iter().position(|byte| *byte == b'\n') {
                    let line: Vec<u8> = step.partial.drain(..=end).collect();
                    self.output(&key, line.strip_suffix(b"\n").unwrap_or(&line));
                }
                if step.partial.len() > MAX_LINE_BYTES {
                    let line = std::mem::take(&mut step.partial);
                    self.output(&key, &line);
                }
            }
            Event::Done => {
                let Some(step) = state.remove(&key) else { return };
                if !step.partial.is_empty() {
                    self.output(&key, &step.partial);
                }
                if step.cached {
                    eprintln!("[{key}] cached");
                } else {
                    eprintln!("[{key}] done in {:.1} s", step.began.elapsed().as_secs_f64());
                }
            }
        }
    }
}
