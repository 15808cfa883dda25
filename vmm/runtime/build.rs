//! Builds the agent, which is a program of its own for no operating system's libraries, with a nested cargo, and hands it to
//! `src/assets.rs` for embedding.
use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            println!("cargo::error={}", message.replace('\n', " "));
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), String> {
    let variable = |name: &str| env::var_os(name).map(PathBuf::from).ok_or_else(|| format!("cargo has not set {name}"));
    let root = variable("CARGO_MANIFEST_DIR")?.join("../..");
    let out = variable("OUT_DIR")?;
    for path in ["agent", "Cargo.toml", "Cargo.lock"] {
        println!("cargo::rerun-if-changed={}", root.join(path).display());
    }
    println!("cargo::rerun-if-changed=build.rs");
    let target = out.join("agent");
    // Without the network first: what the workspace needs has been fetched by now, and a build should not wait for a registry.
    if let Err(first) = cargo(&root, &target, &["--offline"]) {
        cargo(&root, &target, &[]).map_err(|second| format!("cannot build the agent: {second} (offline: {first})"))?;
    }
    let built = target.join("agent/caisson-agent");
    let embedded = out.join("caisson-agent");
    fs::copy(&built, &embedded).map_err(|error| format!("cannot copy {}: {error}", built.display()))?;
    Ok(())
}

fn cargo(root: &Path, target: &Path, more: &[&str]) -> Result<(), String> {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command
        .args([
            "build",
            "--quiet",
            "--locked",
            "-p",
            "caisson-agent",
            "--bin",
            "caisson-agent",
            "--profile",
            "agent",
            "--features",
            "freestanding",
        ])
        .arg("--target-dir")
        .arg(target)
        .args(more)
        .current_dir(root);
    // What is meant for the outer build only. RUSTC_WORKSPACE_WRAPPER is how clippy works.
    for name in [
        "CARGO_ENCODED_RUSTFLAGS",
        "RUSTFLAGS",
        "RUSTC_WORKSPACE_WRAPPER",
        "CARGO_BUILD_TARGET",
        "CARGO_TARGET_DIR",
        "CARGO_BUILD_TARGET_DIR",
    ] {
        command.env_remove(name);
    }
    let output = command.output().map_err(|error| format!("cannot run cargo: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(String::from_utf8_lossy(&output.stderr).into_owned())
}
