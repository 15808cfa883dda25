//! A container's file systems: its root becomes the root of its mount namespace, then everything is mounted in it.
//!
//! All of this runs in the container's init process before its program. Paths in the container are resolved with the root in place, within
//! it, and never through the links of /proc, so that no image can lead the agent elsewhere.
use crate::{
    boot::STAGE,
    error::{Context, Result, error},
    sys,
};
use alloc::{
    format,
    string::{String, ToString},
    vec::Vec,
};
use caisson_agent_protocol::{Container, Device, ErrorKind, Mount, MountSource, Root};
use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::{FileType, Mode, OFlags, ResolveFlags},
    io::Errno,
    mount::{
        MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, mount_bind,
        mount_change, move_mount, open_tree, unmount,
    },
};

pub(crate) mod devices;
mod files;

/// The longest path that is resolved in a container.
const MAX_PATH: usize = 4096;
/// Where the root is put together.
const NEW_ROOT: &str = "/mnt/root";
/// Where disks and shares are mounted whose directories are then mounted in the container.
const SOURCE: &str = "/mnt/mount";
const PATH: OFlags = OFlags::PATH.union(OFlags::CLOEXEC);

/// The device of a disk.
fn disk_device(disk: u8) -> Result<String> {
    if disk >= 26 {
        return Err(error(ErrorKind::Invalid, format!("there is no disk {disk}")));
    }
    Ok(format!("/dev/vd{}", char::from(b'a' + disk)))
}

/// Where the mounts of a spare container wait for its root.
const SPARE: &str = "/mnt/spare";

/// The directories that hold all mounts of a spare container, relative to its root.
fn tops(sample: &Container) -> impl Iterator<Item = &str> {
    let is_below = |path: &str, other: &str| path.strip_prefix(other).is_some_and(|rest| rest.starts_with('/'));
    let all = || sample.mounts.iter().map(|mount| mount.destination.as_str());
    all().filter(move |path| !all().any(|other| is_below(path, other)))
}

/// Whether a container like the sample can be begun without its root: all is in mounts that are independent of it.
pub(crate) fn can_be_spare(sample: &Container) -> bool {
    let is_kernels = |mount: &Mount| matches!(mount.source, MountSource::Kernel { .. }) && mount.propagation.is_empty();
    let is_plain = |path: &str| {
        path.strip_prefix('/').is_some_and(|path| path.split('/').all(|name| !matches!(name, "" | "." | "..")))
    };
    let is_inside = |path: &String| {
        is_plain(path) && tops(sample).any(|top| path.strip_prefix(top).is_some_and(|rest| rest.starts_with('/')))
    };
    sample.mounts.iter().all(|mount| is_kernels(mount) && is_plain(&mount.destination))
        && tops(sample).any(|top| top == "/dev")
        && sample.masked_paths.iter().chain(&sample.readonly_paths).all(is_inside)
        && sample.devices.is_empty()
        && sample.sysctl.is_empty()
}

/// Whether a container can begin as the spare one that was made like the sample.
pub(crate) fn is_like(container: &Container, sample: &Container) -> bool {
    container.mounts.starts_with(&sample.mounts)
        && container.masked_paths == sample.masked_paths
        && container.readonly_paths == sample.readonly_paths
        && container.devices.is_empty()
        && container.sysctl.is_empty()
        && container.own_network == sample.own_network
        && container.own_cgroup_namespace == sample.own_cgroup_namespace
}

/// Mounts and makes what does not need the root: in a tmpfs, from which [`set_up`] takes it.
pub(crate) fn set_up_spare(sample: &Container) -> Result<()> {
    let doing = || String::from("mounting a tmpfs for a spare container");
    make_directory(SPARE)?;
    mount("tmpfs", SPARE, "tmpfs", MountFlags::empty(), None).context(doing)?;
    let root = rustix::fs::open("/", PATH, Mode::empty()).context(doing)?;
    rustix::process::chdir(SPARE).context(doing)?;
    rustix::process::chroot(".").context(doing)?;
    let made = (|| {
        sample.mounts.iter().try_for_each(|mount| attach(mount, None))?;
        devices::make(&[], &[])?;
        sample.readonly_paths.iter().try_for_each(|path| make_read_only(path))?;
        mask(&sample.masked_paths)
    })();
    rustix::process::fchdir(&root).context(doing)?;
    rustix::process::chroot(".").context(doing)?;
    made
}

/// Moves the mounts of [`set_up_spare`] into the root, which is mounted and not entered yet.
fn take_spare(sample: &Container) -> Result<()> {
    let root = rustix::fs::open(NEW_ROOT, PATH, Mode::empty()).context(|| String::from("opening the root"))?;
    for top in tops(sample) {
        let target = make_below(root.as_fd(), top, true)?;
        let flags = MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        move_mount(sys::CWD, format!("{SPARE}{top}"), &target, "", flags)
            .context(|| format!("moving a mount to {top}"))?;
    }
    Ok(())
}

/// Makes the container's file systems its calling process's, in the mount namespace that it has already. `spare` is what that process has
/// made already, if it was a spare container.
pub(crate) fn set_up(container: &Container, spare: Option<&Container>, share_directory: Option<&str>) -> Result<()> {
    mount_root(&container.root, share_directory)?;
    if let Some(sample) = spare {
        take_spare(sample)?;
    }
    let done = spare.map_or(0, |sample| sample.mounts.len());
    let mounts = container.mounts.get(done..).unwrap_or_default();
    let sources = mounts.iter().map(|mount| open_source(mount, share_directory)).collect::<Result<Vec<_>>>()?;
    let files = files::stage(&container.files)?;
    let disk_numbers = devices::disk_numbers(&container.devices)?;
    enter_root()?;
    for (mount, source) in mounts.iter().zip(sources) {
        attach(mount, source).map_err(|mut failure| {
            failure.message = format!("mounting on {}: {}", mount.destination, failure.message);
            failure
        })?;
    }
    if spare.is_none() {
        devices::make(&container.devices, &disk_numbers)?;
    }
    files::put(&container.files, files)
}

/// Does what has to come last, because it takes away the right to write.
pub(crate) fn close_off(container: &Container, was_spare: bool) -> Result<()> {
    if !was_spare {
        container.sysctl.iter().try_for_each(|(name, value)| set_sysctl(name, value))?;
        container.readonly_paths.iter().try_for_each(|path| make_read_only(path))?;
        mask(&container.masked_paths)?;
    }
    let readonly = match &container.root {
        Root::Layers { readonly, .. } | Root::Share { readonly, .. } => *readonly,
    };
    if readonly {
        let root = rustix::fs::open("/", PATH, Mode::empty()).context(|| String::from("opening /"))?;
        sys::set_mount_attributes(&root, MOUNT_ATTR_RDONLY, 0, 0, false)
            .context(|| String::from("making / read-only"))?;
    }
    set_propagation("/", &container.root_propagation)
}

fn mount_root(root: &Root, share_directory: Option<&str>) -> Result<()> {
    match root {
        Root::Layers { lower, upper, .. } => mount_layers(lower, *upper),
        Root::Share { tag, path, .. } => {
            mount_share(tag, SOURCE, share_directory)?;
            let source = open_within(SOURCE, path, PATH).context(|| format!("opening {path:?} in share {tag}"))?;
            let tree = clone_tree(source.as_fd(), true)?;
            move_to(&tree, NEW_ROOT).context(|| format!("mounting {path:?} of share {tag} as the root"))
        }
    }
}

fn mount_layers(lower: &[u8], upper: Option<u8>) -> Result<()> {
    if let ([only], None) = (lower, upper) {
        return mount_disk(*only, "erofs", NEW_ROOT, true);
    }
    let mut lowers = String::new();
    // overlayfs wants the uppermost first.
    for disk in lower.iter().rev() {
        let directory = format!("{STAGE}/{disk}");
        make_directory(&directory)?;
        mount_disk(*disk, "erofs", &directory, true)?;
        lowers.push(if lowers.is_empty() { '=' } else { ':' });
        lowers.push_str(&directory);
    }
    if lowers.is_empty() {
        return Err(error(ErrorKind::Invalid, "the root has no layers"));
    }
    let mut options = format!("lowerdir{lowers}");
    if let Some(disk) = upper {
        let directory = format!("{STAGE}/upper");
        mount_disk(disk, "ext4", &directory, false)?;
        make_directory(&format!("{directory}/upper"))?;
        make_directory(&format!("{directory}/work"))?;
        options = format!("{options},upperdir={directory}/upper,workdir={directory}/work");
    }
    let options = c_string(&options)?;
    let flags = if upper.is_some() { MountFlags::empty() } else { MountFlags::RDONLY };
    mount("overlay", NEW_ROOT, "overlay", flags, options.as_c_str())
        .context(|| format!("mounting the overlay of layers {lower:?}"))
}

fn c_string(text: &str) -> Result<alloc::ffi::CString> {
    alloc::ffi::CString::new(text).map_err(|_| error(ErrorKind::Invalid, format!("{text:?} holds a NUL")))
}

fn mount_disk(disk: u8, fs_type: &str, target: &str, readonly: bool) -> Result<()> {
    let device = disk_device(disk)?;
    let flags = if readonly { MountFlags::RDONLY } else { MountFlags::empty() };
    mount(&*device, target, fs_type, flags, None).context(|| format!("mounting disk {disk} ({device}, {fs_type})"))
}

fn mount_share(tag: &str, target: &str, share_directory: Option<&str>) -> Result<()> {
    let result = match share_directory {
        None => mount(tag, target, "virtiofs", MountFlags::empty(), None),
        Some(directory) => mount_bind(format!("{directory}/{tag}"), target),
    };
    result.context(|| format!("mounting share {tag}"))
}

fn make_directory(path: &str) -> Result<()> {
    match rustix::fs::mkdir(path, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(errno).context(|| format!("making {path}")),
    }
}

fn enter_root() -> Result<()> {
    let doing = || String::from("changing the root");
    rustix::process::chdir(NEW_ROOT).context(doing)?;
    // The old root ends up upon the new one, and is taken away from there.
    rustix::process::pivot_root(".", ".").context(doing)?;
    unmount(".", UnmountFlags::DETACH).context(doing)?;
    rustix::process::chdir("/").context(doing)
}

const MOUNT_ATTR_RDONLY: u64 = 1;

/// The attributes of mount_setattr(2) that flags of mount(2) mean.
fn attributes(flags: u64) -> u64 {
    const PAIRS: [(MountFlags, u64); 6] = [
        (MountFlags::RDONLY, MOUNT_ATTR_RDONLY),
        (MountFlags::NOSUID, 2),
        (MountFlags::NODEV, 4),
        (MountFlags::NOEXEC, 8),
        (MountFlags::NOATIME, 0x10),
        (MountFlags::STRICTATIME, 0x20),
    ];
    let others = [(MountFlags::NODIRATIME, 0x80), (MountFlags::from_bits_retain(256), 0x20_0000)];
    let set = |pairs: &[(MountFlags, u64)]| {
        pairs
            .iter()
            .filter(|(flag, _)| flags & u64::from(flag.bits()) != 0)
            .map(|(_, attribute)| attribute)
            .sum::<u64>()
    };
    set(&PAIRS) | set(&others)
}

/// Access-time attributes are a value of several bits, which is cleared as a whole.
const MOUNT_ATTR_ATIME_BITS: u64 = 0x70;

fn set_attributes(tree: &OwnedFd, flags: u64, recursive: bool) -> Result<()> {
    let set = attributes(flags);
    if set == 0 {
        return Ok(());
    }
    let clear = if set & MOUNT_ATTR_ATIME_BITS == 0 { 0 } else { MOUNT_ATTR_ATIME_BITS };
    sys::set_mount_attributes(tree, set, clear, 0, recursive).context(|| format!("setting mount flags {flags:#x}"))
}

fn is_recursive(mount: &Mount) -> bool {
    mount.flags & u64::from(MountFlags::REC.bits()) != 0 || mount.flags & 0x4000 != 0
}

/// What is mounted from outside of the container's root, taken while that can still be reached.
fn open_source(mount: &Mount, share_directory: Option<&str>) -> Result<Option<OwnedFd>> {
    let (path, writable) = match &mount.source {
        MountSource::Kernel { .. } | MountSource::Inside { .. } => return Ok(None),
        MountSource::Disk { disk, fs_type, path } => {
            let readonly = attributes(mount.flags) & MOUNT_ATTR_RDONLY != 0 || fs_type == "erofs";
            mount_disk(*disk, fs_type, SOURCE, readonly)?;
            (path, !readonly)
        }
        MountSource::Share { tag, path } => {
            mount_share(tag, SOURCE, share_directory)?;
            (path, false)
        }
    };
    let opened = match open_within(SOURCE, path, PATH) {
        Err(Errno::NOENT) if writable => {
            let root = rustix::fs::open(SOURCE, PATH, Mode::empty()).context(|| format!("opening {SOURCE}"))?;
            make_below(root.as_fd(), path, true)?
        }
        result => result.context(|| format!("opening {path:?} in {:?}", mount.source))?,
    };
    let tree = clone_tree(opened.as_fd(), true)?;
    set_attributes(&tree, mount.flags, is_recursive(mount))?;
    drop(opened);
    let _ = unmount(SOURCE, UnmountFlags::DETACH);
    Ok(Some(tree))
}

/// Mounts what a mount says, in the container's root.
fn attach(mount_: &Mount, source: Option<OwnedFd>) -> Result<()> {
    let destination = &mount_.destination;
    match (&mount_.source, source) {
        (MountSource::Kernel { fs_type }, _) => {
            let fs_type = if fs_type == "cgroup" { "cgroup2" } else { fs_type };
            let target = resolve(destination, Kind::Directory)?;
            rustix::process::fchdir(&target).context(|| format!("entering {destination}"))?;
            let data = c_string(&mount_.data)?;
            #[allow(clippy::cast_possible_truncation)]
            let flags = MountFlags::from_bits_retain(mount_.flags as u32);
            let result = mount(fs_type, ".", fs_type, flags, data.as_c_str());
            result.context(|| format!("mounting {fs_type} with flags {flags:?} and options {:?}", mount_.data))?;
        }
        (_, Some(tree)) => attach_tree(&tree, destination)?,
        (MountSource::Inside { path }, None) => {
            let source = open_within("/", path, PATH).context(|| format!("opening {path}"))?;
            let tree = clone_tree(source.as_fd(), is_recursive(mount_))?;
            set_attributes(&tree, mount_.flags, false)?;
            attach_tree(&tree, destination)?;
        }
        (_, None) => return Err(error(ErrorKind::System, "its source was not opened")),
    }
    for flags in &mount_.propagation {
        let target = resolve(destination, Kind::Any)?;
        rustix::process::fchdir(&target).context(|| format!("entering {destination}"))?;
        #[allow(clippy::cast_possible_truncation)]
        let flags = MountPropagationFlags::from_bits_retain(*flags as u32);
        mount_change(".", flags).context(|| format!("setting propagation {flags:?}"))?;
    }
    Ok(())
}

fn attach_tree(tree: &OwnedFd, destination: &str) -> Result<()> {
    let file = rustix::fs::fstat(tree).context(|| String::from("looking at the source"))?;
    let kind = if FileType::from_raw_mode(file.st_mode) == FileType::Directory { Kind::Directory } else { Kind::File };
    let target = resolve(destination, kind)?;
    move_tree(tree, target.as_fd()).context(|| format!("mounting on {destination}"))
}

fn clone_tree(source: BorrowedFd<'_>, recursive: bool) -> Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    open_tree(source, "", flags).context(|| String::from("cloning a mount"))
}

fn move_tree(tree: &OwnedFd, target: BorrowedFd<'_>) -> rustix::io::Result<()> {
    move_mount(tree, "", target, "", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH)
}

fn move_to(tree: &OwnedFd, target: &str) -> rustix::io::Result<()> {
    move_mount(tree, "", sys::CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
}

/// Opens a path, resolved within `root` as if that were the root.
fn open_within(root: &str, path: &str, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let relative = path.trim_start_matches('/');
    let relative = if relative.is_empty() { "." } else { relative };
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    if root == "/" {
        return rustix::fs::openat2(
            sys::CWD,
            format!("/{relative}"),
            flags,
            Mode::empty(),
            ResolveFlags::NO_MAGICLINKS,
        );
    }
    let root = rustix::fs::open(root, PATH | OFlags::DIRECTORY, Mode::empty())?;
    rustix::fs::openat2(&root, relative, flags, Mode::empty(), resolve)
}

/// What a path is to be made as if it does not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Directory,
    File,
    /// It is not to be made.
    Any,
}

/// Opens a path of the container (whose root is the root already), and makes it first if it does not exist.
fn resolve(path: &str, kind: Kind) -> Result<OwnedFd> {
    match open_within("/", path, PATH) {
        Err(Errno::NOENT) if kind != Kind::Any => {
            let root = rustix::fs::open("/", PATH, Mode::empty()).context(|| String::from("opening /"))?;
            make_below(root.as_fd(), path, kind == Kind::Directory)
        }
        result => result.context(|| format!("opening {path}")),
    }
}

/// Makes a path below a directory, with the directories that it needs, following links within the directory. Gives the last component.
fn make_below(root: BorrowedFd<'_>, path: &str, directory: bool) -> Result<OwnedFd> {
    if path.len() > MAX_PATH {
        return Err(error(ErrorKind::Invalid, format!("a path of {} bytes is too long", path.len())));
    }
    let names: Vec<&str> = path.split('/').filter(|name| !name.is_empty() && *name != ".").collect();
    let flags = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let open = |so_far: &str| rustix::fs::openat2(root, so_far, PATH, Mode::empty(), flags);
    let mut current = open(".").context(|| String::from("opening a root"))?;
    let mut so_far = String::new();
    for (number, name) in names.iter().enumerate() {
        so_far.push('/');
        so_far.push_str(name);
        // Resolved from the root each time: a link on the way may lead to anywhere within it.
        match open(&so_far) {
            Err(Errno::NOENT) => {
                let doing = || format!("making {so_far}");
                if directory || number + 1 < names.len() {
                    rustix::fs::mkdirat(&current, *name, Mode::from_raw_mode(0o755)).context(doing)?;
                } else {
                    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
                    drop(rustix::fs::openat(&current, *name, flags, Mode::from_raw_mode(0o644)).context(doing)?);
                }
                current = open(&so_far).context(doing)?;
            }
            result => current = result.context(|| format!("opening {so_far}"))?,
        }
    }
    Ok(current)
}

/// Makes a working directory that does not exist.
pub(crate) fn make_working_directory(path: &str) -> Result<()> {
    resolve(path, Kind::Directory).map(drop)
}

fn make_read_only(path: &str) -> Result<()> {
    let target = match open_within("/", path, PATH) {
        // What does not exist need not be protected.
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
        result => result.context(|| format!("opening {path}"))?,
    };
    let doing = || format!("making {path} read-only");
    let tree = clone_tree(target.as_fd(), true)?;
    sys::set_mount_attributes(&tree, MOUNT_ATTR_RDONLY, 0, 0, true).context(doing)?;
    move_tree(&tree, target.as_fd()).context(doing)
}

fn mask(paths: &[String]) -> Result<()> {
    for path in paths {
        let target = match open_within("/", path, PATH) {
            Err(Errno::NOENT | Errno::NOTDIR) => continue,
            result => result.context(|| format!("opening {path}"))?,
        };
        let doing = || format!("masking {path}");
        let file = rustix::fs::fstat(&target).context(doing)?;
        if FileType::from_raw_mode(file.st_mode) == FileType::Directory {
            rustix::process::fchdir(&target).context(doing)?;
            mount("tmpfs", ".", "tmpfs", MountFlags::RDONLY, c"size=0k,nr_inodes=2").context(doing)?;
        } else {
            let null = open_within("/", "/dev/null", PATH).context(doing)?;
            move_tree(&clone_tree(null.as_fd(), false)?, target.as_fd()).context(doing)?;
        }
    }
    Ok(())
}

fn set_sysctl(name: &str, value: &str) -> Result<()> {
    // Interface names may hold dots, which sysctl(8) writes as slashes; the kernel's own names hold neither.
    let path = if name.contains('/') { name.to_string() } else { name.replace('.', "/") };
    if path.split('/').any(|part| part == ".." || part.is_empty()) {
        return Err(error(ErrorKind::Invalid, format!("{name:?} is no kernel parameter's name")));
    }
    let doing = || format!("setting {name} to {value:?}");
    let file = open_within("/", &format!("/proc/sys/{path}"), OFlags::WRONLY | OFlags::CLOEXEC).context(doing)?;
    rustix::io::write(file, value.as_bytes()).context(doing).map(drop)
}

fn set_propagation(path: &str, name: &str) -> Result<()> {
    let flags = match name.strip_prefix('r').unwrap_or(name) {
        // That is what mounts are made as.
        "" | "private" => return Ok(()),
        "shared" => MountPropagationFlags::SHARED,
        "slave" => MountPropagationFlags::DOWNSTREAM,
        "unbindable" => MountPropagationFlags::UNBINDABLE,
        _ => return Err(error(ErrorKind::Invalid, format!("{name:?} is no propagation"))),
    };
    let flags = if name.starts_with('r') { flags | MountPropagationFlags::REC } else { flags };
    mount_change(path, flags).context(|| format!("making {path} {name}"))
}

#[cfg(test)]
mod tests;
