//! Files that the host wants in a container.
use super::{Errno, Mode, OFlags, Result, attach_tree, clone_tree, make_below, open_within};
use crate::error::{Context, error};
use alloc::{format, string::String, vec::Vec};
use caisson_agent_protocol::{ErrorKind, FileToWrite};
use rustix::{
    fd::{AsFd, OwnedFd},
    mount::{MountFlags, UnmountFlags, mount, unmount},
};

/// Where the tmpfs is mounted that holds the files to be bound.
const STAGE: &str = "/mnt/files";

/// Writes the files that are to be bound into a tmpfs of their own, and gives a mount of each.
pub(super) fn stage(files: &[FileToWrite]) -> Result<Vec<OwnedFd>> {
    if !files.iter().any(|file| file.bind) {
        return Ok(Vec::new());
    }
    mount("tmpfs", STAGE, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, c"mode=755")
        .context(|| String::from("mounting a tmpfs for files"))?;
    let stage = rustix::fs::open(STAGE, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .context(|| format!("opening {STAGE}"))?;
    let mut mounts = Vec::new();
    for (number, file) in files.iter().filter(|file| file.bind).enumerate() {
        let doing = || format!("writing {}", file.path);
        let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
        let written = rustix::fs::openat(&stage, format!("{number}"), flags, Mode::from_raw_mode(file.mode & 0o7777))
            .context(doing)?;
        write_all(&written, &file.content).context(doing)?;
        mounts.push(clone_tree(written.as_fd(), false)?);
    }
    drop(stage);
    unmount(STAGE, UnmountFlags::DETACH).context(|| String::from("unmounting the tmpfs for files"))?;
    Ok(mounts)
}

/// Puts all files in their places: the mounts of [`stage`], and the rest by writing.
pub(super) fn put(files: &[FileToWrite], mounts: Vec<OwnedFd>) -> Result<()> {
    let mut mounts = mounts.into_iter();
    for file in files {
        if file.bind {
            let tree =
                mounts.next().ok_or_else(|| error(ErrorKind::System, format!("{} was not staged", file.path)))?;
            attach_tree(&tree, &file.path)?;
        } else {
            write_into_root(file)?;
        }
    }
    Ok(())
}

fn write_into_root(file: &FileToWrite) -> Result<()> {
    let doing = || format!("writing {}", file.path);
    let flags = OFlags::WRONLY | OFlags::TRUNC | OFlags::CLOEXEC;
    let opened = match open_within("/", &file.path, flags) {
        Err(Errno::NOENT) => {
            let root = open_within("/", "/", super::PATH).context(doing)?;
            drop(make_below(root.as_fd(), &file.path, false)?);
            open_within("/", &file.path, flags).context(doing)?
        }
        result => result.context(doing)?,
    };
    rustix::fs::fchmod(&opened, Mode::from_raw_mode(file.mode & 0o7777)).context(doing)?;
    write_all(&opened, &file.content).context(doing)
}

fn write_all(file: &OwnedFd, mut content: &[u8]) -> rustix::io::Result<()> {
    while !content.is_empty() {
        let count = rustix::io::write(file, content)?;
        content = content.get(count..).unwrap_or_default();
    }
    Ok(())
}
