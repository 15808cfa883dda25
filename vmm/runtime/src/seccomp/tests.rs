//! The compiled programs are run by a small interpreter of classic BPF.
use oci_spec::runtime::{Capability, LinuxSeccomp};
use serde_json::json;

use super::{compile, default_profile, table};

const ALLOW: u32 = 0x7fff_0000;
const EPERM: u32 = 0x0005_0001;
const ENOSYS: u32 = 0x0005_0026;

/// Runs a program over a seccomp_data; returns the verdict and how many instructions it took.
fn run(program: &[(u16, u8, u8, u32)], arch: u32, number: u32, args: [u64; 6]) -> (u32, usize) {
    let mut data = Vec::new();
    data.extend(number.to_le_bytes());
    data.extend(arch.to_le_bytes());
    data.extend(0_u64.to_le_bytes());
    args.iter().for_each(|arg| data.extend(arg.to_le_bytes()));
    let (mut at, mut accumulator, mut steps) = (0_usize, 0_u32, 0);
    loop {
        let (code, jt, jf, k) = program[at];
        steps += 1;
        at += 1;
        let mut branch = |taken: bool| at += usize::from(if taken { jt } else { jf });
        match code {
            0x20 => accumulator = u32::from_le_bytes(data[k as usize..k as usize + 4].try_into().unwrap()),
            0x05 => at += k as usize,
            0x15 => branch(accumulator == k),
            0x25 => branch(accumulator > k),
            0x35 => branch(accumulator >= k),
            0x54 => accumulator &= k,
            0x06 => return (k, steps),
            other => panic!("opcode {other:#x}"),
        }
    }
}

fn verdict(seccomp: &LinuxSeccomp, name: &str, args: [u64; 6]) -> u32 {
    let filter = compile(seccomp).unwrap();
    run(&filter.program, 0xc000_003e, table::number(name).unwrap(), args).0
}

#[test]
fn the_table_is_sorted() {
    assert!(table::SYSCALLS.windows(2).all(|pair| pair[0].0 < pair[1].0));
    assert_eq!(table::number("read"), Some(0));
    assert_eq!(table::number("futex_waitv"), Some(449));
    assert_eq!(table::number("nonsense"), None);
}

#[test]
fn the_default_profile_does_what_docker_users_expect() {
    let profile = default_profile(|_| false);
    let none = [0; 6];
    for name in ["read", "openat", "execve", "statx", "rseq", "epoll_pwait2", "fchmodat2", "ptrace"] {
        assert_eq!(verdict(&profile, name, none), ALLOW, "{name}");
    }
    for name in ["mount", "bpf", "keyctl", "reboot", "unshare", "kexec_load", "io_uring_setup", "init_module"] {
        assert_eq!(verdict(&profile, name, none), EPERM, "{name}");
    }
    assert_eq!(verdict(&profile, "clone", [0x11, 0, 0, 0, 0, 0]), ALLOW);
    assert_eq!(verdict(&profile, "clone", [0x1000_0011, 0, 0, 0, 0, 0]), EPERM);
    assert_eq!(verdict(&profile, "clone3", none), ENOSYS);
    assert_eq!(verdict(&profile, "socket", [2, 1, 0, 0, 0, 0]), ALLOW);
    assert_eq!(verdict(&profile, "socket", [40, 1, 0, 0, 0, 0]), EPERM);
    assert_eq!(verdict(&profile, "personality", [0xffff_ffff, 0, 0, 0, 0, 0]), ALLOW);
    assert_eq!(verdict(&profile, "personality", [0x0400_0000, 0, 0, 0, 0, 0]), EPERM);
    let admin = default_profile(|capability| capability == Capability::SysAdmin);
    assert_eq!(verdict(&admin, "mount", none), ALLOW);
    assert_eq!(verdict(&admin, "clone3", none), ALLOW);
    assert_eq!(verdict(&admin, "clone", [0x1000_0011, 0, 0, 0, 0, 0]), ALLOW);
}

#[test]
fn programs_are_short_searches() {
    let filter = compile(&default_profile(|_| false)).unwrap();
    for number in 0..500 {
        let (_, steps) = run(&filter.program, 0xc000_003e, number, [0; 6]);
        assert!(steps < 32, "system call {number} takes {steps} instructions");
    }
    assert_eq!(run(&filter.program, 0xc000_003e, 1000, [0; 6]).0, ENOSYS);
    assert_eq!(run(&filter.program, 0xc000_003e, 0x4000_0000, [0; 6]).0, ENOSYS);
    assert_eq!(run(&filter.program, 0x4000_0003, 3, [0; 6]).0, 0x8000_0000);
}

#[test]
fn operators_compare_64_bits() {
    let big = 0x1_0000_0005_u64;
    let cases = [
        ("SCMP_CMP_EQ", [false, true, false, false]),
        ("SCMP_CMP_NE", [true, false, true, true]),
        ("SCMP_CMP_LT", [true, false, false, true]),
        ("SCMP_CMP_LE", [true, true, false, true]),
        ("SCMP_CMP_GE", [false, true, true, false]),
        ("SCMP_CMP_GT", [false, false, true, false]),
    ];
    for (operator, expected) in cases {
        let seccomp: LinuxSeccomp = serde_json::from_value(json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
            {"names": ["read"], "action": "SCMP_ACT_ERRNO", "errnoRet": 7, "args": [{"index": 2, "value": big, "op": operator}]}]}))
        .unwrap();
        for (value, hit) in [big - 1, big, big + 1, 5].into_iter().zip(expected) {
            let expected = if hit { 0x0005_0007 } else { ALLOW };
            assert_eq!(verdict(&seccomp, "read", [0, 0, value, 0, 0, 0]), expected, "{operator} {value:#x}");
        }
    }
}

#[test]
fn refusals_say_why() {
    let notify: LinuxSeccomp = serde_json::from_value(json!({"defaultAction": "SCMP_ACT_NOTIFY"})).unwrap();
    assert!(compile(&notify).unwrap_err().to_string().contains("SCMP_ACT_NOTIFY"));
    let arm: LinuxSeccomp =
        serde_json::from_value(json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_ARM"]})).unwrap();
    assert!(compile(&arm).is_err());
}

#[test]
fn an_engine_s_profile_compiles() {
    // Debian's containers-common, when it is installed, holds an OCI-like profile with every kind of rule.
    let Ok(text) = std::fs::read("/usr/share/containers/seccomp.json") else { return };
    let mut value: serde_json::Value = serde_json::from_slice(&text).unwrap();
    for entry in value["syscalls"].as_array_mut().unwrap() {
        let args = entry["args"].as_array().cloned().unwrap_or_default();
        entry["args"] = json!(args);
    }
    value["architectures"] = json!(["SCMP_ARCH_X86_64"]);
    let seccomp: LinuxSeccomp = serde_json::from_value(value).unwrap();
    let filter = compile(&seccomp).unwrap();
    assert!(filter.program.len() < 2000, "{}", filter.program.len());
}
