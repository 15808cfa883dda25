//! Drives the real monitor with micro-guests.
#![allow(clippy::unwrap_used, missing_docs)]
mod micro;

use caisson_machine::client::{ClientError, Monitor, SpawnOptions};
use caisson_machine::config::{KvmKind, MachineConfig};
use caisson_machine::control::{EndReason, Event};
use micro::{Guest, concat, deadline, ended, print, reset};

#[test]
fn a_program_that_is_not_there_is_named() {
    let config = MachineConfig::new("/boot/vmlinux", 128, KvmKind::Hardware);
    let error = Monitor::spawn("/nowhere/caisson-vmm".as_ref(), &config, SpawnOptions::default()).unwrap_err();
    assert!(matches!(error, ClientError::Spawn { .. }), "{error}");
    assert!(error.to_string().contains("/nowhere/caisson-vmm"), "{error}");
}

#[test]
fn a_guest_prints_and_resets_the_machine() {
    if micro::skip() {
        return;
    }
    let guest = Guest::new(&concat(&[print("hello\n"), reset()]));
    let monitor = guest.start();
    assert!(matches!(monitor.wait_event(Some(deadline())).unwrap(), Event::Running { .. }));
    let (reason, message, statistics) = ended(&monitor);
    assert_eq!((reason, message.as_str()), (EndReason::Reset, ""));
    assert_eq!(guest.serial(), "hello\n");
    assert!(statistics.exits["io-out"] >= 7, "{statistics:?}");
    assert!(statistics.kvm_run_ns > 0 && statistics.wall_ns > 0, "{statistics:?}");
    let status = monitor.quit().unwrap();
    assert!(status.success(), "{status}");
}

#[test]
fn a_kernel_that_is_not_there_ends_the_machine_with_the_reason() {
    if micro::skip() {
        return;
    }
    let mut guest = Guest::new(&[]);
    guest.config.kernel = "/nowhere/vmlinux".into();
    let (reason, message, _) = guest.run();
    assert_eq!(reason, EndReason::Error);
    assert!(message.starts_with("cannot read /nowhere/vmlinux: No such file"), "{message}");
}

#[test]
fn a_triple_fault_ends_the_machine_with_the_reason() {
    if micro::skip() {
        return;
    }
    // lidt of an empty table, then ud2: no handler for anything.
    let code = [0x6a, 0, 0x6a, 0, 0x0f, 0x01, 0x1c, 0x24, 0x0f, 0x0b];
    let (reason, message, _) = Guest::new(&code).run();
    assert_eq!(reason, EndReason::Error);
    assert!(message.contains("triple fault"), "{message}");
}

#[test]
fn the_supervisor_can_end_a_guest_that_spins() {
    if micro::skip() {
        return;
    }
    let guest = Guest::new(&concat(&[print("spin\n"), vec![0xeb, 0xfe]]));
    let monitor = guest.start();
    assert!(matches!(monitor.wait_event(Some(deadline())).unwrap(), Event::Running { .. }));
    let status = monitor.quit().unwrap();
    assert!(status.success(), "{status}");
    assert_eq!(ended(&monitor).0, EndReason::Shutdown);
}

#[test]
fn a_machine_can_be_paused_and_resumed() {
    if micro::skip() {
        return;
    }
    let guest = Guest::new(&concat(&[print("a\n"), vec![0xeb, 0xfe]]));
    let monitor = guest.start();
    for _ in 0..20 {
        monitor.pause(deadline()).unwrap();
        monitor.resume(deadline()).unwrap();
    }
    monitor.pause(deadline()).unwrap();
    monitor.pause(deadline()).unwrap();
    assert!(monitor.quit().unwrap().success());
}
