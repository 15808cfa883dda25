//! Keeps the arrows of the design: which crate may import which.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{collections::BTreeMap, process::Command};

/// Every crate of ours, and the ones of ours that it may depend on. What is not here is forbidden.
const ARROWS: &[(&str, &[&str])] = &[
    ("caisson-machine", &[]),
    (
        "caisson-runtime",
        &["caisson-machine", "caisson-agent-protocol", "caisson-images", "caisson-rootfs", "caisson-guest-kernel"],
    ),
    (
        "caisson",
        &[
            "caisson-runtime",
            "caisson-build",
            "caisson-images",
            "caisson-rootfs",
            "caisson-machine",
            "caisson-guest-kernel",
        ],
    ),
    ("caisson-agent-protocol", &[]),
    ("caisson-agent", &["caisson-agent-protocol"]),
    ("caisson-guest-kernel", &[]),
    ("caisson-images", &[]),
    ("caisson-rootfs", &[]),
    ("caisson-build", &["caisson-images", "caisson-rootfs"]),
    ("caisson-tests", &[]),
];

/// What a crate must never pull in, however indirectly.
const FORBIDDEN: &[(&str, &[&str])] = &[
    ("caisson-machine", &["tokio", "oci-spec", "caisson-agent-protocol", "clap"]),
    ("caisson-agent", &["tokio", "oci-spec", "libc"]),
];

/// The crates of rust-vmm, of which the lock file holds one version each.
const RUST_VMM: &[&str] = &[
    "event-manager",
    "kvm-bindings",
    "kvm-ioctls",
    "linux-loader",
    "virtio-bindings",
    "virtio-queue",
    "virtio-vsock",
    "vm-memory",
    "vm-superio",
    "vmm-sys-util",
];

fn metadata() -> serde_json::Value {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--locked"])
        .arg("--filter-platform=x86_64-unknown-linux-gnu")
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("cargo prints JSON")
}

#[test]
fn crates_import_only_along_the_arrows() {
    let metadata = metadata();
    let members = metadata["workspace_members"].as_array().unwrap();
    let allowed: BTreeMap<&str, &[&str]> = ARROWS.iter().copied().collect();
    let mut seen = 0;
    for package in metadata["packages"].as_array().unwrap() {
        if !members.contains(&package["id"]) {
            continue;
        }
        seen += 1;
        let name = package["name"].as_str().unwrap();
        let arrows = allowed.get(name).unwrap_or_else(|| panic!("{name} has no line in ARROWS"));
        for dependency in package["dependencies"].as_array().unwrap() {
            let to = dependency["name"].as_str().unwrap();
            let for_tests = dependency["kind"].as_str() == Some("dev");
            assert!(!allowed.contains_key(to) || for_tests || arrows.contains(&to), "{name} must not depend on {to}");
        }
    }
    assert_eq!(seen, ARROWS.len(), "ARROWS names a crate that does not exist");
}

#[test]
fn nothing_forbidden_is_pulled_in_and_nothing_twice() {
    let metadata = metadata();
    let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for package in metadata["packages"].as_array().unwrap() {
        let name = package["name"].as_str().unwrap();
        versions.entry(name).or_default().push(package["version"].as_str().unwrap());
    }
    for name in RUST_VMM {
        if let Some(found) = versions.get(name) {
            assert_eq!(found.len(), 1, "{name} is there in several versions: {found:?}");
        }
    }

    for (of, forbidden) in FORBIDDEN {
        // The features that this crate alone asks for: the metadata's graph has those of the whole workspace.
        let output = Command::new(env!("CARGO"))
            .args(["tree", "--locked", "--edges=normal", "--prefix=none", "--format={p}", "-p", of])
            .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
            .output()
            .expect("cargo runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let tree = String::from_utf8_lossy(&output.stdout).into_owned();
        let names: Vec<&str> = tree.lines().filter_map(|line| line.split(' ').next()).collect();
        assert_eq!(names.first(), Some(of));
        for name in *forbidden {
            assert!(!names.contains(name), "{of} must not pull in {name}");
        }
    }
}
