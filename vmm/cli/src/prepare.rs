//! What a container needs of this host, made when it is not there: Debian packages, the guest kernel, the built-in image.
use std::{
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, bail};
use caisson_guest_kernel::Kernel;
use caisson_images::{Image, Store, store::StoreError};
use caisson_runtime::builtin;

use crate::output::Progress;

/// Makes sure that a guest can boot.
pub(crate) fn guest(progress: &mut Progress) -> anyhow::Result<()> {
    if ["/sbin/mke2fs", "/usr/sbin/mke2fs"].iter().all(|path| !Path::new(path).exists()) {
        install(&["e2fsprogs".to_owned()], "to format writable layers", progress)?;
    }
    if Kernel::find()?.is_some() {
        return Ok(());
    }
    let missing = Kernel::missing_packages()?;
    if !missing.is_empty() {
        install(&missing, "to build the guest kernel, once", progress)?;
    }
    eprintln!("building the guest kernel; this takes some minutes, once");
    Kernel::ensure(|what| progress.say(what)).context("cannot build the guest kernel")?;
    progress.clear();
    Ok(())
}

/// Finds an image; makes the built-in one if that is meant.
pub(crate) fn image(store: &Store, name: &str, progress: &mut Progress) -> anyhow::Result<Image> {
    match store.resolve(name) {
        Err(StoreError::NotFound { .. }) if builtin::is_builtin(name) => {
            if !Path::new("/bin/busybox").exists() {
                install(&["busybox-static".to_owned()], "for the built-in image", progress)?;
            }
            Ok(builtin::make(store)?)
        }
        Err(error @ StoreError::NotFound { .. }) => {
            Err(error).context("import it with `caisson image import`, or pull it with `caisson pull`")
        }
        other => Ok(other?),
    }
}

fn install(packages: &[String], why: &str, progress: &mut Progress) -> anyhow::Result<()> {
    progress.clear();
    let list = packages.join(" ");
    if !rustix::process::geteuid().is_root() || !Path::new("/usr/bin/apt-get").exists() {
        bail!("Debian packages are missing {why}: as root, apt-get install {list}");
    }
    eprintln!("installing Debian packages {why}: apt-get install {list}");
    let apt = |arguments: &[&str]| -> anyhow::Result<bool> {
        let status = Command::new("apt-get")
            .args(arguments)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::null())
            // The program's output is not ours to mix with.
            .stdout(Stdio::null())
            .status()
            .context("cannot run apt-get")?;
        Ok(status.success())
    };
    let mut arguments = vec!["install", "-qq", "-y", "--no-install-recommends"];
    arguments.extend(packages.iter().map(String::as_str));
    if apt(&arguments)? || (apt(&["update", "-qq"])? && apt(&arguments)?) {
        return Ok(());
    }
    bail!("apt-get could not install {list}")
}
