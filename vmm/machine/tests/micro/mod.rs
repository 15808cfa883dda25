//! Micro-guests: a few hand-assembled instructions as the "kernel" of a machine.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, missing_docs)]

use caisson_machine::client::{Monitor, SpawnOptions};
use caisson_machine::config::{KvmKind, MachineConfig};
use caisson_machine::control::{EndReason, Event, Statistics};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Where the code is loaded and entered.
pub const ENTRY: u64 = 0x100_0000;

/// The monitor that this test run built.
pub fn monitor_exe() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_caisson-vmm"))
}

/// True, with a message, if there is no KVM to run a guest with.
pub fn skip() -> bool {
    let missing = !Path::new("/dev/kvm").exists();
    if missing {
        println!("skipped: no /dev/kvm");
    }
    missing
}

pub fn kind() -> KvmKind {
    caisson_machine::probe::kvm_kind(None).unwrap()
}

pub fn deadline() -> Instant {
    Instant::now() + Duration::from_secs(120)
}

/// An ELF file whose one segment is `code`.
pub fn elf(code: &[u8]) -> Vec<u8> {
    const HEADERS: u64 = 64 + 56;
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    for half in [2u16, 62] {
        elf.extend_from_slice(&half.to_le_bytes());
    }
    elf.extend_from_slice(&1u32.to_le_bytes());
    for word in [ENTRY, 64, 0] {
        elf.extend_from_slice(&word.to_le_bytes());
    }
    elf.extend_from_slice(&0u32.to_le_bytes());
    for half in [64u16, 56, 1, 64, 0, 0] {
        elf.extend_from_slice(&half.to_le_bytes());
    }
    elf.extend_from_slice(&1u32.to_le_bytes());
    elf.extend_from_slice(&7u32.to_le_bytes());
    let len = code.len() as u64;
    for word in [HEADERS, ENTRY, ENTRY, len, len, 4096] {
        elf.extend_from_slice(&word.to_le_bytes());
    }
    elf.extend_from_slice(code);
    elf
}

/// `mov dx, port; mov al, byte; out dx, al`
pub fn out(port: u16, byte: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xb0, byte, 0xee]
}

/// Writes to the serial port.
pub fn print(text: &str) -> Vec<u8> {
    text.bytes().flat_map(|b| out(0x3f8, b)).collect()
}

/// Pulls the reset line, and spins until that is heard.
pub fn reset() -> Vec<u8> {
    let mut code = out(0x64, 0xfe);
    code.extend_from_slice(&[0xeb, 0xfe]);
    code
}

/// A machine with one micro-guest.
pub struct Guest {
    pub directory: tempfile::TempDir,
    pub config: MachineConfig,
}

impl Guest {
    pub fn new(code: &[u8]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let kernel = directory.path().join("kernel");
        std::fs::write(&kernel, elf(code)).unwrap();
        let mut config = MachineConfig::new(kernel, 64, kind());
        config.serial = Some(directory.path().join("serial"));
        Self { directory, config }
    }

    pub fn start(&self) -> Monitor {
        Monitor::spawn(monitor_exe(), &self.config, SpawnOptions::default()).unwrap()
    }

    pub fn serial(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.serial_path()).unwrap()).into_owned()
    }

    pub fn serial_path(&self) -> PathBuf {
        self.directory.path().join("serial")
    }

    /// Runs to the end.
    pub fn run(&self) -> (EndReason, String, Statistics) {
        ended(&self.start())
    }
}

/// Waits for the end.
pub fn ended(monitor: &Monitor) -> (EndReason, String, Statistics) {
    loop {
        match monitor.wait_event(Some(deadline())).unwrap() {
            Event::Ended { reason, message, statistics } => return (reason, message, statistics),
            Event::Running { .. } => {}
        }
    }
}

pub fn concat(parts: &[Vec<u8>]) -> Vec<u8> {
    parts.concat()
}
