//! Drives the real monitor.
#![allow(clippy::unwrap_used, missing_docs)]
use caisson_machine::client::{ClientError, Monitor, SpawnOptions};
use caisson_machine::config::{KvmKind, MachineConfig};

#[test]
fn a_program_that_is_not_there_is_named() {
    let config = MachineConfig::new("/boot/vmlinux", 128, KvmKind::Hardware);
    let error = Monitor::spawn("/nowhere/caisson-vmm".as_ref(), &config, SpawnOptions::default()).unwrap_err();
    assert!(matches!(error, ClientError::Spawn { .. }), "{error}");
    assert!(error.to_string().contains("/nowhere/caisson-vmm"), "{error}");
    let _ = env!("CARGO_BIN_EXE_caisson-vmm");
}
