//! The real command, without guests: help, bad input, exit codes, and what it does with files.
#![allow(clippy::unwrap_used)]
use std::{
    path::Path,
    process::{Command, Output},
};

fn caisson(home: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_caisson"))
        .args(arguments)
        .env("CAISSON_STORE", home.join("store"))
        .env("CAISSON_ROOT", home.join("run"))
        .env("CAISSON_CACHE", home.join("cache"))
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn ok(home: &Path, arguments: &[&str]) -> String {
    let output = caisson(home, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

fn fails(home: &Path, arguments: &[&str], code: i32) -> String {
    let output = caisson(home, arguments);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", text(&output.stderr));
    assert!(output.stdout.is_empty(), "{arguments:?}");
    text(&output.stderr)
}

#[test]
fn every_verb_explains_itself() {
    let home = tempfile::tempdir().unwrap();
    let help = ok(home.path(), &["--help"]);
    assert!(help.contains("caisson run --rm busybox echo hello"));
    assert!(!help.contains("supervise"));
    for verb in [
        "run", "exec", "ps", "logs", "attach", "start", "stop", "restart", "kill", "wait", "pause", "unpause",
        "rename", "rm", "inspect", "image", "images", "rmi", "doctor",
    ] {
        assert!(help.contains(verb), "{verb}");
        assert!(ok(home.path(), &[verb, "--help"]).contains("Usage:"), "{verb}");
    }
    assert!(ok(home.path(), &["--version"]).starts_with("caisson "));
}

#[test]
fn mistakes_are_told_once_and_have_docker_s_codes() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    let error = fails(home, &["run", "nosuchimage", "true"], 125);
    assert!(
        error.starts_with("error: ") && error.contains("nosuchimage") && error.contains("caisson image import"),
        "{error}"
    );
    assert_eq!(error.lines().count(), 1, "{error}");
    fails(home, &["run", "--nonsense", "busybox"], 125);
    fails(home, &["run", "--memory", "lots", "busybox"], 125);
    fails(home, &["nonsense"], 2);
    assert_eq!(fails(home, &["logs", "nobody"], 1), "error: no such container: nobody\n");
    assert!(fails(home, &["exec", "nobody", "true"], 125).contains("no such container"));
    assert!(fails(home, &["stop", "nobody", "noone"], 1).contains("no such container: noone"));
    assert!(fails(home, &["inspect", "nobody"], 1).contains("no such container or image"));
    assert!(fails(home, &["image", "import", "/nonexistent.tar"], 1).contains("/nonexistent.tar"));
    assert!(fails(home, &["rmi", "nosuchimage"], 1).contains("nosuchimage"));
    ok(home, &["rm", "--force", "nobody"]);
}

#[test]
fn an_empty_store_lists_nothing() {
    let home = tempfile::tempdir().unwrap();
    assert_eq!(ok(home.path(), &["ps", "-a"]), "CONTAINER ID   IMAGE   COMMAND   CREATED   STATUS   PORTS   NAMES\n");
    assert_eq!(ok(home.path(), &["ps", "-aq"]), "");
    assert_eq!(ok(home.path(), &["images"]), "REPOSITORY   TAG   IMAGE ID   CREATED   SIZE\n");
}

#[test]
fn doctor_names_what_it_looked_at() {
    let home = tempfile::tempdir().unwrap();
    let output = text(&caisson(home.path(), &["doctor"]).stdout);
    for what in ["kvm", "cgroups", "monitor", "guest kernel", "mke2fs", "busybox", "store"] {
        assert!(output.contains(what), "{output}");
    }
}

#[test]
fn engines_hear_runc_s_words() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    assert!(fails(home, &["state", "nobody"], 1).contains("container does not exist"));
    assert!(fails(home, &["delete", "nobody"], 1).contains("container does not exist"));
    assert!(fails(home, &["--systemd-cgroup", "kill", "nobody", "9"], 1).contains("container does not exist"));
    assert!(fails(home, &["exec", "--process", "p.json", "nobody"], 255).contains("container does not exist"));
    assert!(fails(home, &["create", "--bundle", "/nonexistent", "x"], 1).contains("/nonexistent"));
    assert_eq!(ok(home, &["delete", "--force", "nobody"]), "");
    assert_eq!(ok(home, &["list", "-q"]), "");
    let features: serde_json::Value = serde_json::from_str(&ok(home, &["features"])).unwrap();
    assert_eq!(features["linux"]["seccomp"]["enabled"], true);
    assert!(features["mountOptions"].as_array().unwrap().iter().any(|option| option == "rbind"));
}

#[test]
fn a_log_s_last_error_is_the_reason() {
    let home = tempfile::tempdir().unwrap();
    let log = home.path().join("log");
    let output = caisson(home.path(), &["--log", log.to_str().unwrap(), "--log-format", "json", "start", "nobody"]);
    assert_eq!(output.status.code(), Some(1));
    let line = std::fs::read_to_string(log).unwrap();
    let message: serde_json::Value = serde_json::from_str(line.trim()).unwrap();
    assert_eq!(
        (message["level"].as_str(), message["msg"].as_str()),
        (Some("error"), Some("container does not exist: nobody"))
    );
    assert!(message["time"].as_str().unwrap().contains('T'));
    assert!(text(&output.stderr).contains("container does not exist"));
}

#[test]
fn spec_writes_a_configuration_that_is_one() {
    let home = tempfile::tempdir().unwrap();
    let bundle = home.path().to_str().unwrap();
    ok(home.path(), &["spec", "--bundle", bundle]);
    let config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(home.path().join("config.json")).unwrap()).unwrap();
    assert_eq!((config["process"]["args"][0].as_str(), config["root"]["readonly"].as_bool()), (Some("sh"), Some(true)));
    assert!(fails(home.path(), &["spec", "--bundle", bundle], 1).contains("exists"));
}
