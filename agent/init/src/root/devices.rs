//! The nodes and links in a container's /dev.
use super::{Device, Errno, Kind, Mode, Result, disk_device, make_below, open_within, resolve};
use crate::error::Context;
use alloc::{format, string::String, vec::Vec};
use caisson_agent_protocol::DeviceNode;
use rustix::{
    fd::{AsFd, BorrowedFd},
    fs::{AtFlags, CWD, FileType, Gid, Uid, makedev, mknodat, symlinkat, unlinkat},
};

/// The nodes that the runtime specification wants in every container: name and minor number. Their major is 1, but for tty's.
const DEFAULTS: [(&str, u32, u32); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];
/// The links, as the specification has them, and what they point to.
const LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

/// Makes the default devices, the given ones, and the links.
pub(super) fn make(devices: &[DeviceNode], disk_numbers: &[u64]) -> Result<()> {
    let directory = resolve("/dev", Kind::Directory)?;
    for (name, major, minor) in DEFAULTS {
        if devices.iter().any(|device| device.path.strip_prefix("/dev/") == Some(name)) {
            continue;
        }
        let mode = Mode::from_raw_mode(0o666);
        let result = mknodat(&directory, name, FileType::CharacterDevice, mode, makedev(major, minor));
        present(result).context(|| format!("making /dev/{name}"))?;
    }
    for (name, target) in LINKS {
        let result = symlinkat(target, &directory, name);
        // An image may bring a node of that name.
        if name == "ptmx" && result == Err(Errno::EXIST) {
            let _ = unlinkat(&directory, name, AtFlags::empty());
            let _ = symlinkat(target, &directory, name);
            continue;
        }
        present(result).context(|| format!("making /dev/{name}"))?;
    }
    devices.iter().zip(disk_numbers).try_for_each(|(device, number)| make_one(device, *number))
}

fn present(result: rustix::io::Result<()>) -> rustix::io::Result<()> {
    match result {
        Err(Errno::EXIST | Errno::ROFS) => Ok(()),
        result => result,
    }
}

fn make_one(device: &DeviceNode, disk_number: u64) -> Result<()> {
    let path = &device.path;
    let doing = || format!("making the device {path}");
    let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
    let root = open_within("/", "/", super::PATH).context(doing)?;
    let parent = make_below(root.as_fd(), parent, true)?;
    let (kind, number) = match &device.device {
        Device::Char { major, minor } => (FileType::CharacterDevice, makedev(*major, *minor)),
        Device::Block { major, minor } => (FileType::BlockDevice, makedev(*major, *minor)),
        Device::Fifo => (FileType::Fifo, 0),
        Device::Disk { .. } => (FileType::BlockDevice, disk_number),
    };
    make_node(parent.as_fd(), name, kind, device.mode, number).context(doing)?;
    let (uid, gid) = (Uid::from_raw(device.uid), Gid::from_raw(device.gid));
    rustix::fs::chownat(&parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW).context(doing)
}

fn make_node(parent: BorrowedFd<'_>, name: &str, kind: FileType, mode: u32, number: u64) -> rustix::io::Result<()> {
    let mode = Mode::from_raw_mode(mode & 0o7777);
    match mknodat(parent, name, kind, mode, number) {
        Err(Errno::EXIST) => {
            unlinkat(parent, name, AtFlags::empty())?;
            mknodat(parent, name, kind, mode, number)
        }
        result => result,
    }
}

/// The device numbers of those devices that are disks, zero for the others. To be called while the machine's /dev can be reached.
pub(super) fn disk_numbers(devices: &[DeviceNode]) -> Result<Vec<u64>> {
    let number = |device: &DeviceNode| {
        let Device::Disk { disk } = device.device else { return Ok(0) };
        let name = disk_device(disk)?;
        let file = rustix::fs::statat(CWD, &*name, AtFlags::empty()).context(|| format!("looking at disk {disk}"))?;
        Ok(file.st_rdev)
    };
    devices.iter().map(number).collect()
}

/// Makes the terminal the container's console.
pub(crate) fn bind_console(terminal: BorrowedFd<'_>) -> Result<()> {
    let doing = || String::from("mounting the terminal on /dev/console");
    let target = resolve("/dev/console", Kind::File)?;
    let tree = super::clone_tree(terminal, false)?;
    super::move_tree(&tree, target.as_fd()).context(doing)
}
