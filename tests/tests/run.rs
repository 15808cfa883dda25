//! `caisson run`, end to end: real images, real guests.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use caisson_tests::{Finished, Host, images};
use std::collections::BTreeMap;

/// The memory of every container here: machines of one shape share a template.
const MEMORY: &str = "48m";

/// A host with the busybox image, as `test`.
fn host_with_busybox() -> Host {
    let host = Host::new();
    host.caisson(["image", "import", "--tag", "test", images::busybox().to_str().unwrap()]).success();
    host
}

/// Runs a shell script in a throw-away container.
#[track_caller]
fn script(host: &Host, options: &[&str], script: &str) -> Finished {
    let mut arguments = vec!["run", "--rm", "--memory", MEMORY];
    arguments.extend(options);
    arguments.extend(["test", "/bin/sh", "-c", script]);
    host.caisson(arguments)
}

/// Lines of `key=value`.
fn answers(text: &str) -> BTreeMap<&str, &str> {
    text.lines().filter_map(|line| line.split_once('=')).collect()
}

#[test]
fn the_program_sees_what_the_image_and_the_options_say() {
    let host = host_with_busybox();
    let Some(_guest) = host.guest("run: the program sees what the image and the options say") else { return };
    let text = script(
        &host,
        &[
            "--hostname", "diver", "-e", "DEPTH=20", "-e", "COLOUR=green", "--cpus", "0.9",
            "--pids-limit", "50",
        ],
        r#"echo "cwd=$(pwd)"; echo "env=$DEPTH $COLOUR $PATH $HOME"; echo "hostname=$(hostname)"; echo "id=$(id)"
        echo "pid=$$"; echo "removed=$(test -e removed; echo $?)"; echo "replaced=$(cat replaced)"; echo "opaque=$(ls opaque)"
        echo "kept=$(cat kept)"; echo "links=$(stat -c %h first)"; echo "second=$(cat second)"; echo "absolute=$(readlink absolute)"
        echo "device=$(stat -c '%F %t %T' null)"; echo "pipe=$(stat -c %F pipe)"; echo "setuid=$(stat -c %a setuid)"
        echo "owned=$(stat -c %u:%g owned)"; echo "space=$(cat 'with space')"; echo "line=$(cat "$(printf 'new\nline')")"
        echo "sparse=$(stat -c %s sparse)"; echo "dated=$(stat -c %Y dated)"; echo "files=$(ls | wc -l)"
        echo "memory=$(cat /sys/fs/cgroup/memory.max)"; echo "cpu=$(cat /sys/fs/cgroup/cpu.max)"; echo "pids=$(cat /sys/fs/cgroup/pids.max)"
        echo "nnp=$(grep NoNewPrivs /proc/self/status | tr -d '\t')"; echo "seccomp=$(grep Seccomp: /proc/self/status | tr -d '\t')"
        echo "caps=$(grep CapBnd /proc/self/status | tr -d '\t')"; echo "processes=$(ls /proc | grep -c '^[0-9]')"
        echo "kcore=$(head -c 1 /proc/kcore | wc -c)"; echo "sysrq=$(echo h 2>/dev/null >/proc/sysrq-trigger; echo $?)"
        echo "sys=$(mkdir /sys/x 2>/dev/null; echo $?)"; echo "mount=$(mount -t tmpfs none /tmp 2>/dev/null; echo $?)"
        echo "written=$(echo w >/data/w && cat /data/w)"; echo "interfaces=$(ls /sys/class/net)"; echo "null=$(cat /dev/null | wc -c)"
        echo "random=$(head -c 16 /dev/urandom | wc -c)"; echo "shm=$(echo s >/dev/shm/s && cat /dev/shm/s)"
        echo "fd=$(readlink /dev/fd) $(readlink /dev/stdin)"; echo "hosts=$(grep -c localhost /etc/hosts)"; echo "date=$(date +%Y)"
        echo "root=$(stat -f -c %T / 2>/dev/null)"; echo "ping=$(ping -c 1 -W 5 127.0.0.1 >/dev/null 2>&1; echo $?)""#,
    )
    .success();
    let answers = answers(&text);
    let expected = [
        ("cwd", "/data"),
        ("env", "20 green /bin /root"),
        ("hostname", "diver"),
        ("pid", "1"),
        ("removed", "1"),
        ("replaced", "new"),
        ("opaque", "new"),
        ("kept", "kept"),
        ("links", "2"),
        ("second", "linked"),
        ("absolute", "/etc/passwd"),
        ("device", "character special file 1 3"),
        ("pipe", "fifo"),
        ("setuid", "4755"),
        ("owned", "1234:70000"),
        ("space", "n"),
        ("line", "n"),
        ("sparse", "10000000"),
        ("dated", "981173107"), // umoci rounds to seconds.
        ("memory", "50331648"),
        ("cpu", "90000 100000"),
        ("pids", "50"),
        ("nnp", "NoNewPrivs:1"),
        ("seccomp", "Seccomp:2"),
        ("caps", "CapBnd:00000000a80425fb"),
        ("kcore", "0"),
        ("sysrq", "1"),
        ("sys", "1"),
        ("mount", "1"),
        ("written", "w"),
        ("interfaces", "lo"),
        ("null", "0"),
        ("random", "16"),
        ("shm", "s"),
        ("fd", "/proc/self/fd /proc/self/fd/0"),
        ("ping", "0"),
    ];
    for (key, value) in expected {
        assert_eq!(answers.get(key), Some(&value), "{key}, in {text}");
    }
    assert!(answers["id"].starts_with("uid=0(root) gid=0(root)"), "{text}");
    assert!(answers["date"].parse::<u32>().unwrap() >= 2026, "{text}");
}

#[test]
fn exit_codes_are_the_programs_or_dockers() {
    let host = host_with_busybox();
    let Some(_guest) = host.guest("run: exit codes are the program's or docker's") else { return };
    script(&host, &[], "exit 3").failure(3);
    script(&host, &[], "kill -9 $$; exit 4").failure(4); // Nobody kills the first process of a namespace from within.
    script(&host, &["-u", "alice"], "id -un; id -Gn; kill -TERM $$; sleep 1; exit 5").failure(5);
    let missing = host.caisson(["run", "--rm", "--memory", MEMORY, "test", "/no/such/program"]).failure(127);
    assert!(missing.contains("/no/such/program"), "{missing}");
    let directory = host.caisson(["run", "--rm", "--memory", MEMORY, "test", "/etc"]).failure(126);
    assert!(directory.contains("/etc"), "{directory}");
    let unknown = host.caisson(["run", "--rm", "--memory", MEMORY, "-u", "nobody-here", "test", "true"]).failure(125);
    assert!(unknown.contains("nobody-here"), "{unknown}");
    assert_eq!(host.caisson(["ps", "-aq"]).success(), "");
}

#[test]
fn streams_are_binary_clean_and_end_each_on_its_own() {
    let host = host_with_busybox();
    let Some(_guest) = host.guest("run: streams are binary clean and end each on its own") else { return };
    let input: Vec<u8> = (0..100_000u32).flat_map(|number| number.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let echoed = host.caisson_with_input(["run", "--rm", "--memory", MEMORY, "-i", "test", "cat"], &input);
    assert_eq!(echoed.code(), 0, "{}", echoed.stderr);
    assert!(echoed.stdout == input, "{} of {} bytes came back", echoed.stdout.len(), input.len());

    // Without -i there is no input; output and errors are two streams; a closed one does not close the other.
    let both = script(&host, &[], "cat; echo out; echo err >&2; exec >&-; sleep 0.2; echo late >&2");
    assert_eq!((both.text().as_str(), both.stderr.as_str()), ("out\n", "err\nlate\n"));
}

#[test]
fn limits_hold_and_the_user_is_told() {
    let host = host_with_busybox();
    let Some(_guest) = host.guest("run: limits hold and the user is told") else { return };
    // So little that few pages have to be touched: each costs a guest on software KVM a millisecond.
    let oom = host.caisson(["run", "--rm", "--memory", "12m", "test", "tail", "/dev/zero"]);
    assert!(oom.stderr.contains("out of memory") || oom.stderr.contains("OOM"), "{}", oom.stderr);
    oom.failure(137);
    let full = script(
        &host,
        &["--disk", "24m", "--pids-limit", "10"],
        "dd if=/dev/zero of=/data/big bs=1M count=30 2>&1 | tail -n 1; df -m / | tail -n 1; \
         for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 5 & done",
    );
    assert!(full.stderr.contains("can't fork") || full.stderr.contains("Resource temporarily unavailable"), "{full:?}");
    assert!(full.text().contains("23+0 records out") && full.text().contains("100% /"), "{full:?}");
    let readonly = script(&host, &["--read-only"], "echo x >/data/x; echo y >/dev/shm/y && cat /dev/shm/y");
    assert!(readonly.stderr.contains("Read-only file system"), "{readonly:?}");
    assert_eq!(readonly.success(), "y\n");
}
