//! What the tests with Debian's own tools share. They assume root, as CI has it.
#![allow(clippy::unwrap_used, clippy::expect_used, dead_code, unreachable_pub)]

#[path = "registry.rs"]
pub mod registry;

use std::path::Path;
use std::process::{Command, Output, Stdio};

/// Runs a tool, and gives its standard output.
pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = try_run(program, arguments);
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub fn try_run(program: &str, arguments: &[&str]) -> Output {
    Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("{program} (see .ci/run for the packages): {error}"))
}

/// An image of two layers, made by umoci: busybox, then a file. Named `latest` in the OCI layout `DIR/busybox`, which is returned.
pub fn umoci_layout(directory: &Path) -> String {
    let layout = directory.join("busybox").display().to_string();
    let image = format!("{layout}:latest");
    let bundle = directory.join("bundle").display().to_string();
    run("umoci", &["init", "--layout", &layout]);
    run("umoci", &["new", "--image", &image]);
    run("umoci", &["unpack", "--image", &image, &bundle]);
    let root = format!("{bundle}/rootfs");
    std::fs::create_dir_all(format!("{root}/bin")).unwrap();
    std::fs::copy("/bin/busybox", format!("{root}/bin/busybox")).unwrap();
    std::os::unix::fs::symlink("busybox", format!("{root}/bin/sh")).unwrap();
    run("umoci", &["repack", "--refresh-bundle", "--image", &image, &bundle]);
    std::fs::create_dir_all(format!("{root}/etc")).unwrap();
    std::fs::write(format!("{root}/etc/greeting"), "hello\n").unwrap();
    run("umoci", &["repack", "--image", &image, &bundle]);
    run(
        "umoci",
        &[
            "config",
            "--image",
            &image,
            "--config.cmd",
            "/bin/sh",
            "--config.env",
            "PATH=/bin",
            "--config.workingdir",
            "/etc",
        ],
    );
    std::fs::remove_dir_all(&bundle).unwrap();
    layout
}

/// `skopeo copy`, with any further arguments first.
pub fn skopeo_copy(further: &[&str], from: &str, to: &str) {
    let mut arguments = vec!["--insecure-policy", "copy", "--quiet"];
    arguments.extend(further);
    arguments.extend([from, to]);
    run("skopeo", &arguments);
}
