use std::collections::{BTreeMap, BTreeSet};
use std::process::{Command, Output};

use super::*;

fn script(arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    let directory = tempfile::tempdir().unwrap();
    write(directory.path()).unwrap();
    Command::new("bash")
        .arg(directory.path().join("build"))
        .args(arguments)
        .env_remove("CAISSON_KERNEL_SOURCE")
        .env("CAISSON_CACHE", directory.path().join("cache"))
        .envs(environment.iter().copied())
        .output()
        .unwrap()
}

fn fragments() -> impl Iterator<Item = &'static File> {
    FILES.iter().filter(|(path, _)| path.starts_with("config/"))
}

#[test]
fn nothing_is_left_out_of_the_embedded_recipe() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = BTreeSet::from(["build".to_owned()]);
    for (directory, extension) in [("config", "config"), ("patches", "patch")] {
        for entry in std::fs::read_dir(root.join(directory)).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            assert!(name.ends_with(&format!(".{extension}")), "{directory}/{name} is no .{extension}");
            found.insert(format!("{directory}/{name}"));
        }
    }
    assert_eq!(found.into_iter().collect::<Vec<_>>(), FILES.iter().map(|(path, _)| *path).collect::<Vec<_>>());
}

#[test]
fn the_script_computes_the_same_hash() {
    let output = script(&["--recipe"], &[]);
    assert_eq!(String::from_utf8(output.stdout).unwrap().trim(), hash(FILES));
}

#[test]
fn the_hash_changes_with_each_file() {
    let mut hashes = BTreeSet::from([hash(FILES)]);
    for index in 0..FILES.len() {
        let mut files = FILES.to_vec();
        files[index].1 = "something else";
        hashes.insert(hash(&files));
        files.remove(index);
        hashes.insert(hash(&files));
    }
    assert_eq!(hashes.len(), 1 + 2 * FILES.len());
}

#[test]
fn the_key_changes_with_source_and_compiler() {
    let directory = tempfile::tempdir().unwrap();
    let key = |source: &str, compiler: &str| {
        let tarball = directory.path().join("source.tar.xz");
        std::fs::write(&tarball, source).unwrap();
        let program = directory.path().join("cc");
        std::fs::write(&program, format!("#!/bin/sh\necho {compiler}\n")).unwrap();
        let environment =
            [("CAISSON_KERNEL_SOURCE", tarball.to_str().unwrap()), ("CC", &format!("sh {}", program.display()))];
        let output = script(&["--key"], &environment);
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let first = key("6.12.1", "gcc 12");
    assert_eq!(first, key("6.12.1", "gcc 12"));
    assert_ne!(first, key("6.12.2", "gcc 12"));
    assert_ne!(first, key("6.12.1", "gcc 13"));
}

#[test]
fn fragments_do_not_contradict_each_other() {
    let mut seen = BTreeMap::new();
    for (path, text) in fragments() {
        assert!(text.starts_with("# "), "{path} does not say what it is for");
        for line in text.lines() {
            let option = match line.strip_prefix("# CONFIG_") {
                Some(rest) => rest.strip_suffix(" is not set"),
                None => line.strip_prefix("CONFIG_").and_then(|rest| rest.split_once('=')).map(|(name, _)| name),
            };
            let Some(option) = option else {
                assert!(line.is_empty() || line.starts_with('#'), "{path}: what is {line:?}?");
                continue;
            };
            assert_eq!(seen.insert(option, path), None, "CONFIG_{option} is set twice; the second time in {path}");
        }
    }
    assert!(seen.len() > 100);
}

#[test]
fn lost_options_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = directory.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let fragment = write("fragment", "# A comment.\nCONFIG_NET=y\nCONFIG_HZ=100\n# CONFIG_PCI is not set\n");
    let good = write("good", "CONFIG_NET=y\nCONFIG_HZ=100\n# CONFIG_PCI is not set\nCONFIG_MORE=y\n");
    assert!(script(&["--check", &good, &fragment], &[]).status.success());

    let bad = write("bad", "# CONFIG_NET is not set\nCONFIG_HZ=1000\nCONFIG_PCI=y\n");
    let output = script(&["--check", &bad, &fragment], &[]);
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success());
    for lost in ["CONFIG_NET=y", "CONFIG_HZ=100", "CONFIG_PCI=n"] {
        assert!(message.contains(lost), "{lost} is not in {message:?}");
    }
}

#[test]
fn a_missing_source_is_named_with_its_package() {
    let nowhere = [("CAISSON_KERNEL_SOURCE", "/nonexistent/linux.tar.xz")];
    let output = script(&["--missing-packages"], &nowhere);
    assert!(String::from_utf8(output.stdout).unwrap().lines().any(|package| package == "linux-source-6.12"));
    let output = script(&["--key"], &nowhere);
    assert!(!output.status.success());
    assert!(String::from_utf8(output.stderr).unwrap().contains("apt-get install linux-source-6.12"));
    let output = script(&[], &nowhere);
    assert!(!output.status.success());
    assert!(String::from_utf8(output.stderr).unwrap().contains("/nonexistent/linux.tar.xz"));
}

#[test]
fn each_patch_says_why() {
    for (path, text) in FILES.iter().filter(|(path, _)| path.starts_with("patches/")) {
        let header = text.split("\n--- a/").next().unwrap();
        assert!(header.lines().count() >= 3 && !header.starts_with("---"), "{path} has no header");
    }
}
