#![allow(clippy::unwrap_used)]
use super::*;
use std::io::Write;
use std::process::{Command, Stdio};

#[test]
fn the_same_calls_give_the_same_bytes() {
    assert_eq!(agent_initramfs(b"agent").unwrap(), agent_initramfs(b"agent").unwrap());
}

#[test]
fn headers_are_newc_and_aligned() {
    let archive = agent_initramfs(b"12345").unwrap();
    assert!(archive.starts_with(b"070701"));
    assert_eq!(archive.len() % 512, 0);
    let mut at = 0;
    let mut names = Vec::new();
    loop {
        assert_eq!(&archive[at..at + 6], b"070701");
        let field = |index: usize| {
            let start = at + 6 + index * 8;
            usize::from_str_radix(std::str::from_utf8(&archive[start..start + 8]).unwrap(), 16).unwrap()
        };
        let (size, name_size) = (field(6), field(11));
        let name = std::str::from_utf8(&archive[at + 110..at + 110 + name_size - 1]).unwrap().to_owned();
        let data = (at + 110 + name_size).next_multiple_of(4);
        if name == "init" {
            assert_eq!(&archive[data..data + size], b"12345");
            assert_eq!(field(1), 0o100_755);
        }
        at = (data + size).next_multiple_of(4);
        names.push(name);
        if names.last().unwrap() == TRAILER {
            break;
        }
    }
    assert!(names.iter().position(|name| name == "dev") < names.iter().position(|name| name == "dev/console"));
}

#[test]
fn cpio_lists_it() {
    let Ok(mut child) =
        Command::new("cpio").args(["-itv", "--quiet"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()
    else {
        println!("skipped: no cpio");
        return;
    };
    let archive = agent_initramfs(b"agent").unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(&archive).unwrap();
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    let listing = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{listing}");
    assert!(listing.lines().any(|line| line.starts_with("crw-------") && line.ends_with("dev/console")), "{listing}");
    assert!(listing.lines().any(|line| line.starts_with("-rwxr-xr-x") && line.ends_with("init")), "{listing}");
}

#[test]
fn names_that_the_kernel_cannot_use_are_refused() {
    let mut archive = Initramfs::new();
    for name in ["", "/init", "a\0b", TRAILER] {
        assert!(matches!(archive.file(name, 0o644, b""), Err(InitramfsError::Name { .. })));
    }
}
