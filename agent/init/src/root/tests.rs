use super::*;

fn directory() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn root(directory: &tempfile::TempDir) -> OwnedFd {
    rustix::fs::open(directory.path(), PATH, Mode::empty()).unwrap()
}

#[test]
fn paths_are_made_within_the_root() {
    let directory = directory();
    let root = root(&directory);
    make_below(root.as_fd(), "/a/./b//c", true).unwrap();
    assert!(directory.path().join("a/b/c").is_dir());
    make_below(root.as_fd(), "/a/b/file", false).unwrap();
    assert!(directory.path().join("a/b/file").is_file());
    make_below(root.as_fd(), "/../../x/y", true).unwrap();
    assert!(directory.path().join("x/y").is_dir());
}

#[test]
fn links_lead_nowhere_else() {
    let outside = directory();
    let directory = directory();
    let root = root(&directory);
    std::os::unix::fs::symlink(outside.path(), directory.path().join("absolute")).unwrap();
    std::os::unix::fs::symlink("../../../../../../tmp", directory.path().join("relative")).unwrap();
    std::os::unix::fs::symlink("/target", directory.path().join("inside")).unwrap();
    std::fs::create_dir(directory.path().join("target")).unwrap();
    make_below(root.as_fd(), "/inside/made", true).unwrap();
    assert!(directory.path().join("target/made").is_dir());
    // The links' targets do not exist in the root.
    assert!(make_below(root.as_fd(), "/absolute/made", true).is_err());
    assert!(make_below(root.as_fd(), "/relative/made", true).is_err());
    assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
    // The links of /proc are not followed.
    let process = rustix::fs::open("/proc/self", PATH, Mode::empty()).unwrap();
    assert!(make_below(process.as_fd(), "/root/tmp", true).is_err());
}

#[test]
fn mount_flags_become_attributes() {
    let flags = MountFlags::RDONLY | MountFlags::NOEXEC | MountFlags::STRICTATIME | MountFlags::BIND;
    assert_eq!(attributes(flags.bits().into()), 1 | 8 | 0x20);
    assert_eq!(attributes(0x4000), 0);
}

#[test]
fn disks_are_named_as_the_kernel_names_them() {
    assert_eq!(disk_device(0).unwrap(), "/dev/vda");
    assert_eq!(disk_device(25).unwrap(), "/dev/vdz");
    assert!(disk_device(26).is_err());
}
