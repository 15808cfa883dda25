//! `caisson-vmm`: the monitor process, which is one virtual machine.
//!
//! `caisson-vmm --config-fd N --control-fd M`: reads the machine's configuration (JSON) from N to its end, and is
//! controlled over M; see `caisson_machine::control`.
#![allow(unsafe_code)] // Takes ownership of the two descriptors that it was started with.

use caisson_machine::config::{MAX_CONFIG_BYTES, MachineConfig};
use caisson_machine::control::{EndReason, Event, Statistics};
use caisson_machine::event_loop::{self, Control, Outcome, chain};
use caisson_machine::monitor::Machine;
use std::fs::File;
use std::io::Read;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::process::ExitCode;
use std::time::Instant;

fn main() -> ExitCode {
    let started = Instant::now();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (config, control) = match &arguments[..] {
        [a, n, b, m] if a == "--config-fd" && b == "--control-fd" => match (own(n), own(m)) {
            (Some(n), Some(m)) if n != m => (n, m),
            _ => return usage(),
        },
        _ => return usage(),
    };
    // SAFETY: both numbers are open descriptors that the parent made for this process alone, not equal, and taken once.
    let (config, control) = unsafe { (OwnedFd::from_raw_fd(config), OwnedFd::from_raw_fd(control)) };
    let mut control = Control::new(control.into());
    let (reason, message, statistics) = run(config.into(), &mut control, started);
    if reason == EndReason::Error {
        eprintln!("caisson-vmm: {message}");
    }
    control.send(&event_loop::ended(reason, &message, statistics));
    ExitCode::from(u8::from(reason == EndReason::Error))
}

/// From the configuration to the machine's end.
fn run(config: File, control: &mut Control, started: Instant) -> (EndReason, String, Statistics) {
    let (mut machine, config) = match build(config) {
        Ok(machine) => machine,
        Err(message) => return (EndReason::Error, message, Statistics::default()),
    };
    control.send(&Event::Running { setup_ns: ns(started) });
    let outcome = event_loop::run(&mut machine, &config, control);
    let mut statistics = machine.finish();
    statistics.wall_ns = ns(started);
    match outcome {
        Ok(Outcome::Ended(reason, message)) => (reason, message, statistics),
        Ok(Outcome::Orphaned) => (EndReason::Shutdown, String::new(), statistics),
        Err(error) => (EndReason::Error, format!("cannot wait for events: {error}"), statistics),
    }
}

fn build(config: File) -> Result<(Machine, MachineConfig), String> {
    let mut json = Vec::new();
    let limit = MAX_CONFIG_BYTES as u64 + 1;
    config.take(limit).read_to_end(&mut json).map_err(|e| format!("cannot read the configuration: {e}"))?;
    let config = MachineConfig::from_json(&json).map_err(|e| chain(&e))?;
    let built = match &config.restore {
        Some(directory) => Machine::restore(&config, directory),
        None => Machine::boot(&config),
    };
    let mut machine = built.map_err(|e| chain(&e))?;
    machine.spawn_threads().map_err(|e| chain(&e))?;
    Ok((machine, config))
}

fn own(number: &str) -> Option<RawFd> {
    number.parse().ok().filter(|&fd: &RawFd| fd > 2)
}

fn usage() -> ExitCode {
    eprintln!("usage: caisson-vmm --config-fd N --control-fd M");
    ExitCode::from(2)
}

fn ns(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX)
}
