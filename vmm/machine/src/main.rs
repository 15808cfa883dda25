//! `caisson-vmm`: the monitor process, which is one virtual machine.
use std::process::ExitCode;

fn main() -> ExitCode {
    eprintln!("caisson-vmm: not built yet");
    ExitCode::FAILURE
}
