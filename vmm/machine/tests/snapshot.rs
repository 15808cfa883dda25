//! Snapshots of micro-guests: a guest that counts goes on where it was, and what does not fit is refused.
#![allow(clippy::unwrap_used, missing_docs)]
mod micro;

use caisson_machine::client::{ClientError, Monitor};
use caisson_machine::config::{Disk, KvmKind};
use caisson_machine::control::EndReason;
use micro::{Guest, deadline, ended};
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// A guest that prints digits for ever, one a line; the next one is kept in memory, the address of that in a register.
fn counting_guest() -> Guest {
    let pause: u32 = if micro::kind() == KvmKind::Software { 2_000 } else { 5_000_000 };
    let mut code = vec![0xbf, 0, 0, 0x20, 0]; // mov edi, 0x200000
    code.extend([0x8b, 0x1f]); // 1: mov ebx, [rdi]
    code.extend([0x66, 0xba, 0xf8, 0x03, 0x88, 0xd8, 0x04, 0x30, 0xee]); // mov dx, 0x3f8; mov al, bl; add al, '0'; out dx, al
    code.extend([0xb0, 0x0a, 0xee]); // mov al, '\n'; out dx, al
    code.extend([0xff, 0xc3, 0x83, 0xfb, 0x0a, 0x75, 0x02, 0x31, 0xdb]); // inc ebx; cmp ebx, 10; jne 2f; xor ebx, ebx
    code.extend([0x89, 0x1f, 0xb9]); // 2: mov [rdi], ebx; mov ecx, pause
    code.extend(pause.to_le_bytes());
    code.extend([0xff, 0xc9, 0x75, 0xfc, 0xeb, 0xdc]); // 3: dec ecx; jnz 3b; jmp 1b
    Guest::new(&code)
}

/// Waits until the guest has printed so many lines.
fn wait_for_lines(path: &Path, lines: usize) {
    let deadline = deadline();
    while std::fs::read_to_string(path).unwrap_or_default().lines().count() < lines {
        assert!(Instant::now() < deadline, "the guest did not print {lines} lines");
        sleep(Duration::from_millis(5));
    }
}

fn snapshot(guest: &Guest, directory: &Path) {
    let monitor = guest.start();
    wait_for_lines(&guest.serial_path(), 15);
    let running = monitor.snapshot(directory, deadline()).unwrap_err();
    assert!(running.to_string().contains("pause it first"), "{running}");
    monitor.pause(deadline()).unwrap();
    monitor.snapshot(directory, deadline()).unwrap();
    assert!(monitor.quit().unwrap().success());
}

fn restored(guest: &mut Guest, directory: &Path, log: &str) -> Monitor {
    guest.config.restore = Some(directory.to_owned());
    guest.config.serial = Some(guest.directory.path().join(log));
    guest.start()
}

#[test]
fn a_restored_guest_goes_on_counting() {
    if micro::skip() {
        return;
    }
    let mut guest = counting_guest();
    guest.config.disks = vec![Disk { path: None, read_only: true }];
    let directory = guest.directory.path().join("snapshot");
    snapshot(&guest, &directory);
    let first = guest.serial();
    // Twice from the same snapshot: it is not changed by the machines that run from it.
    for log in ["one", "two"] {
        let monitor = restored(&mut guest, &directory, log);
        let path = guest.directory.path().join(log);
        wait_for_lines(&path, 15);
        monitor.pause(deadline()).unwrap();
        let all = format!("{first}{}", std::fs::read_to_string(path).unwrap());
        let digits: Vec<u32> = all.chars().filter_map(|c| c.to_digit(10)).collect();
        let consecutive = digits.windows(2).all(|pair| (pair[0] + 1) % 10 == pair[1]);
        assert!(consecutive, "{digits:?}");
        assert!(monitor.quit().unwrap().success());
    }
}

#[test]
fn what_does_not_fit_is_refused_with_the_reason() {
    if micro::skip() {
        return;
    }
    let mut guest = counting_guest();
    guest.config.identity = "kernel 1".into();
    let directory = guest.directory.path().join("snapshot");
    snapshot(&guest, &directory);
    let mode = |path: &Path| std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(path).unwrap()) & 0o777;
    assert_eq!(mode(&directory), 0o700);
    assert_eq!(mode(&directory.join("state")), 0o600);
    assert_eq!(mode(&directory.join("memory")), 0o600);

    let refusal = |guest: &mut Guest| {
        let (reason, message, _) = ended(&restored(guest, &directory, "log"));
        assert_eq!(reason, EndReason::Error);
        message
    };
    guest.config.vcpus = 2;
    assert!(refusal(&mut guest).contains("another shape of machine"));
    guest.config.vcpus = 1;
    guest.config.identity = "kernel 2".into();
    assert!(refusal(&mut guest).contains("another kernel or agent: it has kernel 1, this is kernel 2"));
    guest.config.identity = "kernel 1".into();

    let memory = std::fs::OpenOptions::new().write(true).open(directory.join("memory")).unwrap();
    memory.set_len(1 << 20).unwrap();
    assert!(refusal(&mut guest).contains("is not the memory of a machine with 64 MiB"));
    memory.set_len(64 << 20).unwrap();

    let state = directory.join("state");
    let mut bytes = std::fs::read(&state).unwrap();
    bytes[100] ^= 1;
    std::fs::write(&state, &bytes).unwrap();
    assert!(refusal(&mut guest).contains("its checksum is wrong"));
    std::fs::remove_file(&state).unwrap();
    std::os::unix::fs::symlink("memory", &state).unwrap();
    assert!(refusal(&mut guest).contains("cannot open"));
}

#[test]
fn a_snapshot_is_not_written_over_another() {
    if micro::skip() {
        return;
    }
    let guest = counting_guest();
    let directory = guest.directory.path().join("snapshot");
    snapshot(&guest, &directory);
    let before = std::fs::read(directory.join("state")).unwrap();
    let monitor = guest.start();
    monitor.pause(deadline()).unwrap();
    let error = monitor.snapshot(&directory, deadline()).unwrap_err();
    assert!(matches!(error, ClientError::Target { .. }), "{error}");
    assert_eq!(std::fs::read(directory.join("state")).unwrap(), before);
}
