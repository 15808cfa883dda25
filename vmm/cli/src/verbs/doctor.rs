//! `caisson doctor`: what this host offers, what it lacks, and how to get it.
use std::{fs, path::Path};

use caisson_guest_kernel::Kernel;
use caisson_runtime::sandbox::{KvmKind, kvm_kind, monitor_program};

use crate::{context::Context, output::print};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {}

enum Verdict {
    Good,
    /// Not needed, or made when it is.
    Note,
    Bad,
}

pub(crate) fn run(_: &Arguments, context: &Context) -> anyhow::Result<u8> {
    let mut bad = false;
    let mut say = |verdict: Verdict, what: &str, text: String| {
        let mark = match verdict {
            Verdict::Good => "ok     ",
            Verdict::Note => "note   ",
            Verdict::Bad => {
                bad = true;
                "MISSING"
            }
        };
        print(&format!("{mark}  {what:<14} {text}\n"));
    };
    match kvm_kind(Some(&context.paths.cache)) {
        Ok(KvmKind::Software) => {
            let text = "software: /dev/kvm works without hardware virtualisation; guests run, but their kernels are emulated and slow";
            say(Verdict::Good, "kvm", text.into());
        }
        Ok(KvmKind::Hardware) => say(Verdict::Good, "kvm", "hardware".into()),
        Err(error) => say(
            Verdict::Bad,
            "kvm",
            format!("{:#}; on a cloud, choose a machine with nested virtualisation", anyhow::Error::from(error)),
        ),
    }
    say(Verdict::Good, "cgroups", cgroups().into());
    match monitor_program() {
        Ok(path) => say(Verdict::Good, "monitor", path.display().to_string()),
        Err(error) => say(Verdict::Bad, "monitor", error.to_string()),
    }
    match Kernel::find() {
        Ok(Some(kernel)) => {
            say(Verdict::Good, "guest kernel", format!("{} ({})", kernel.release, kernel.vmlinux.display()))
        }
        Ok(None) => match Kernel::missing_packages() {
            Ok(missing) if missing.is_empty() => {
                say(Verdict::Note, "guest kernel", "not built yet: the first run builds it".into())
            }
            Ok(missing) => {
                say(
                    Verdict::Note,
                    "guest kernel",
                    format!(
                        "not built yet: the first run builds it with these packages: apt-get install {}",
                        missing.join(" ")
                    ),
                );
            }
            Err(error) => say(Verdict::Bad, "guest kernel", format!("{:#}", anyhow::Error::from(error))),
        },
        Err(error) => say(Verdict::Bad, "guest kernel", format!("{:#}", anyhow::Error::from(error))),
    }
    let tools =
        [("mke2fs", "e2fsprogs", "formats writable layers"), ("busybox", "busybox-static", "makes the built-in image")];
    for (program, package, purpose) in tools {
        let directories = ["/bin", "/sbin", "/usr/bin", "/usr/sbin"];
        match directories.iter().map(|directory| Path::new(directory).join(program)).find(|path| path.exists()) {
            Some(path) => say(Verdict::Good, program, path.display().to_string()),
            None => say(Verdict::Note, program, format!("{purpose}: apt-get install {package}")),
        }
    }
    let store = &context.paths.store;
    let writable = fs::create_dir_all(store).and_then(|()| tempfile_in(store));
    match writable {
        Ok(()) => say(Verdict::Good, "store", store.display().to_string()),
        Err(error) => {
            say(Verdict::Bad, "store", format!("{}: {error} (CAISSON_STORE names another place)", store.display()))
        }
    }
    Ok(u8::from(bad))
}

fn tempfile_in(directory: &Path) -> std::io::Result<()> {
    let path = directory.join(format!(".doctor-{}", std::process::id()));
    fs::write(&path, "")?;
    fs::remove_file(path)
}

fn cgroups() -> &'static str {
    let exists = |path: &str| Path::new(path).exists();
    if exists("/sys/fs/cgroup/cgroup.controllers") {
        "version 2"
    } else if exists("/sys/fs/cgroup/unified/cgroup.controllers") {
        "version 1, with an empty version 2 hierarchy (hybrid)"
    } else if exists("/sys/fs/cgroup/memory") {
        "version 1"
    } else {
        "none mounted"
    }
}
