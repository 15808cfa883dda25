//! The same operations on the mount and on the file system below must have the same results.
use super::bridge::Mounted;
use rustix::fs::{
    AtFlags, CWD, FallocateFlags, FlockOperation, Mode, OFlags, RenameFlags, SeekFrom, XattrFlags, fallocate, flock,
    getxattr, linkat, listxattr, makedev, mknodat, open, removexattr, renameat_with, seek, setxattr, statx,
};
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown, lchown, symlink};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

/// What an operation came to, in words.
fn say<T: std::fmt::Debug>(result: io::Result<T>) -> String {
    match result {
        Ok(value) => format!("{value:?}"),
        Err(error) => format!("error {:?}", error.raw_os_error()),
    }
}

fn shape(path: &Path) -> String {
    say(fs::symlink_metadata(path).map(|metadata| {
        let size = if metadata.is_dir() { 0 } else { metadata.size() };
        (metadata.mode(), metadata.uid(), metadata.gid(), metadata.nlink(), size, metadata.rdev())
    }))
}

/// A long list of operations; what each came to.
fn operate(root: &Path) -> Vec<(&'static str, String)> {
    let mut log = Vec::new();
    let at = |name: &str| root.join(name);
    let mut note = |what: &'static str, outcome: String| log.push((what, outcome));

    note("write", say(fs::write(at("file"), b"hello")));
    note("read", say(fs::read(at("file"))));
    note("shape of a file", say(fs::set_permissions(at("file"), Permissions::from_mode(0o640))));
    note(
        "append",
        say(OpenOptions::new().append(true).open(at("file")).and_then(|mut file| file.write_all(b" world"))),
    );
    note("read again", say(fs::read_to_string(at("file"))));
    note("exclusive", say(File::create_new(at("file")).map(drop)));
    note("truncate at open", say(File::create(at("file")).map(drop)));
    note("empty", say(fs::read(at("file"))));
    note("missing", say(fs::read(at("missing"))));
    note("mkdir", say(fs::create_dir(at("dir"))));
    note("mkdir again", say(fs::create_dir(at("dir"))));
    note("mkdir below a file", say(fs::create_dir(at("file/dir"))));
    note("rmdir of a file", say(fs::remove_dir(at("file"))));
    note("unlink of a directory", say(fs::remove_file(at("dir"))));
    note("name too long", say(fs::write(at(&"n".repeat(256)), b"")));
    note("longest name", say(fs::write(at(&"n".repeat(255)), b"")));
    note("odd name", say(fs::write(root.join(OsStr::from_bytes(b"\xff new\nline")), b"odd")));
    let names = || {
        let mut names: Vec<_> = fs::read_dir(root)?
            .map(|entry| entry.map(|entry| (entry.file_name(), entry.file_type().unwrap())))
            .collect::<io::Result<_>>()?;
        names.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(names)
    };
    note("readdir", say(names()));
    for index in 0..3000 {
        fs::write(at(&format!("dir/{index}-{}", "x".repeat(index % 50))), b"").unwrap();
    }
    note("readdir of many", say(fs::read_dir(at("dir")).map(Iterator::count)));
    note("rmdir of a full directory", say(fs::remove_dir(at("dir"))));
    note("remove all", say(fs::remove_dir_all(at("dir"))));

    note("symlink", say(symlink("file", at("link"))));
    note("readlink", say(fs::read_link(at("link"))));
    note("through the link", say(fs::write(at("link"), b"through")));
    note("symlink's shape", shape(&at("link")));
    note("chown of a link", say(lchown(at("link"), Some(5), Some(6))));
    note("symlink's owner", shape(&at("link")));
    note("dangling", say(symlink("nowhere/at/all", at("dangling"))));
    note("open dangling", say(fs::read(at("dangling"))));
    note("longest target", say(symlink("t".repeat(4095), at("long"))));
    note("read it", say(fs::read_link(at("long")).map(|target| target.as_os_str().len())));
    note("hard link", say(fs::hard_link(at("file"), at("hard"))));
    note("two names", shape(&at("hard")));
    note(
        "same inode",
        (fs::metadata(at("hard")).unwrap().ino() == fs::metadata(at("file")).unwrap().ino()).to_string(),
    );
    note(
        "hard link to a symlink",
        say(linkat(CWD, at("link"), CWD, at("hard-link"), AtFlags::empty()).map_err(Into::into)),
    );
    note("it is one", shape(&at("hard-link")));
    note("hard link of a directory", say(fs::create_dir(at("d")).and_then(|()| fs::hard_link(at("d"), at("e")))));
    note("hard link over a name", say(fs::hard_link(at("file"), at("link"))));

    note("rename", say(fs::rename(at("hard"), at("d/moved"))));
    note("rename over", say(fs::write(at("other"), b"other").and_then(|()| fs::rename(at("other"), at("d/moved")))));
    note("one name again", shape(&at("file")));
    let rename =
        |from: &str, to: &str, flags| say(renameat_with(CWD, at(from), CWD, at(to), flags).map_err(Into::into));
    note("noreplace", rename("file", "d/moved", RenameFlags::NOREPLACE));
    note("exchange", rename("file", "d/moved", RenameFlags::EXCHANGE));
    note("exchanged", say(fs::read(at("file"))));
    note("directory into itself", rename("d", "d/below", RenameFlags::empty()));
    note("directory over a file", rename("d", "file", RenameFlags::empty()));
    note("file over a directory", rename("file", "d", RenameFlags::empty()));
    note("directory over a full one", say(fs::create_dir(at("empty")).and_then(|()| fs::rename(at("empty"), at("d")))));

    let unlinked = File::options().read(true).write(true).create_new(true).open(at("unlinked")).unwrap();
    note("unlink an open file", say(fs::remove_file(at("unlinked"))));
    note("write to it", say(unlinked.write_all_at(b"still here", 0)));
    let mut still = [0; 10];
    note("read it", say(unlinked.read_exact_at(&mut still, 0).map(|()| still)));
    note("its links", say(unlinked.metadata().map(|metadata| (metadata.nlink(), metadata.len()))));
    note("its mode", say(unlinked.set_permissions(Permissions::from_mode(0o600))));
    note("its length", say(unlinked.set_len(3)));
    note("its end", say(unlinked.metadata().map(|metadata| metadata.len())));
    drop(unlinked);
    let gone = File::open(at("empty")).unwrap();
    note("rmdir an open directory", say(fs::remove_dir(at("empty"))));
    note("its links", say(gone.metadata().map(|metadata| metadata.is_dir())));

    note("fifo", say(mknodat(CWD, at("fifo"), rustix::fs::FileType::Fifo, Mode::from(0o644), 0).map_err(Into::into)));
    note(
        "socket",
        say(mknodat(CWD, at("socket"), rustix::fs::FileType::Socket, Mode::from(0o600), 0).map_err(Into::into)),
    );
    let device = rustix::fs::FileType::CharacterDevice;
    note(
        "device",
        say(mknodat(CWD, at("device"), device, Mode::from(0o666), makedev(4000, 100_000)).map_err(Into::into)),
    );
    for name in ["fifo", "socket", "device"] {
        note("special", shape(&at(name)));
    }

    note("setuid", say(fs::set_permissions(at("file"), Permissions::from_mode(0o6755))));
    note("chown clears it", say(chown(at("file"), Some(1234), Some(5678))));
    note("cleared", shape(&at("file")));
    note("setuid again", say(fs::set_permissions(at("file"), Permissions::from_mode(0o6777))));
    note("a user's write clears it", as_user(&["sh", "-c", "echo x >> \"$1\"", "sh", at("file").to_str().unwrap()]));
    note("cleared again", shape(&at("file")));
    note(
        "a sticky directory",
        say(fs::create_dir(at("tmp")).and_then(|()| fs::set_permissions(at("tmp"), Permissions::from_mode(0o1777)))),
    );
    note(
        "a user's file",
        as_user(&[
            "sh",
            "-c",
            "umask 027; echo mine > \"$1\"; mkdir \"$1.d\"; ln -s x \"$1.l\"",
            "sh",
            at("tmp/mine").to_str().unwrap(),
        ]),
    );
    for name in ["tmp/mine", "tmp/mine.d", "tmp/mine.l"] {
        let metadata = fs::symlink_metadata(at(name)).unwrap();
        note("whose it is", format!("{:o} {} {}", metadata.mode(), metadata.uid(), metadata.gid()));
    }
    note("another's file", say(fs::write(at("tmp/root"), b"")));
    note("a user may not remove it", as_user(&["rm", "-f", at("tmp/root").to_str().unwrap()]));
    note("nor read what is not his", say(fs::set_permissions(at("tmp/root"), Permissions::from_mode(0o600))));
    note("indeed", as_user(&["cat", at("tmp/root").to_str().unwrap()]));
    note(
        "a setgid directory",
        say(fs::create_dir(at("group"))
            .and_then(|()| chown(at("group"), None, Some(4242)))
            .and_then(|()| fs::set_permissions(at("group"), Permissions::from_mode(0o2777)))),
    );
    note(
        "its files",
        as_user(&["sh", "-c", "echo > \"$1\"; mkdir \"$1.d\"", "sh", at("group/file").to_str().unwrap()]),
    );
    for name in ["group/file", "group/file.d"] {
        let metadata = fs::symlink_metadata(at(name)).unwrap();
        note("its group", format!("{:o} {} {}", metadata.mode(), metadata.uid(), metadata.gid()));
    }

    let sparse = File::options().read(true).write(true).create_new(true).open(at("sparse")).unwrap();
    note("sparse", say(sparse.write_all_at(&[1; 4096], 1 << 20).and_then(|()| sparse.set_len(4 << 20))));
    note("data", say(seek(&sparse, SeekFrom::Data(0)).map_err(Into::into)));
    note("hole", say(seek(&sparse, SeekFrom::Hole(1 << 20)).map_err(Into::into)));
    note("no data", say(seek(&sparse, SeekFrom::Data(3 << 20)).map_err(Into::into)));
    note("allocate", say(fallocate(&sparse, FallocateFlags::empty(), 0, 5 << 20).map_err(Into::into)));
    note(
        "punch",
        say(fallocate(&sparse, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 1 << 20, 4096)
            .map_err(Into::into)),
    );
    let mut punched = [9; 4096];
    note("punched", say(sparse.read_exact_at(&mut punched, 1 << 20).map(|()| punched == [0; 4096])));
    note("its size", say(sparse.metadata().map(|metadata| metadata.len())));
    note("fsync", say(sparse.sync_all().and_then(|()| sparse.sync_data())));

    let large: Vec<u8> = (0..5_000_000u32).map(|index| (index.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    note("a large file", say(fs::write(at("large"), &large)));
    note("is what was written", (fs::read(at("large")).unwrap() == large).to_string());
    note("copy", say(fs::copy(at("large"), at("copy"))));
    note("is the same", (fs::read(at("copy")).unwrap() == large).to_string());
    note(
        "write beyond the end",
        say(File::options().write(true).open(at("copy")).and_then(|file| file.write_all_at(b"end", 6_000_000))),
    );
    note("its size", say(fs::metadata(at("copy")).map(|metadata| metadata.len())));
    note("mapped", say(map(&at("mapped"))));
    note("what was mapped", say(fs::read(at("mapped"))));

    let path = at("file");
    let set = |name: &str, value: &[u8], flags| say(setxattr(&path, name, value, flags).map_err(Into::into));
    note("xattr", set("user.one", b"1", XattrFlags::empty()));
    note("xattr created twice", set("user.one", b"2", XattrFlags::CREATE));
    note("xattr replaced", set("user.one", b"three", XattrFlags::REPLACE));
    note("xattr missing", set("user.none", b"", XattrFlags::REPLACE));
    note("trusted", set("trusted.two", &[0, 255], XattrFlags::empty()));
    note(
        "capability",
        set("security.capability", b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0", XattrFlags::empty()),
    );
    let mut value = [0; 64];
    note("get", say(getxattr(&path, "user.one", &mut value[..]).map_err(Into::into)));
    note("value", format!("{:?}", &value[..8]));
    note("too small", say(getxattr(&path, "user.one", &mut value[..2]).map_err(Into::into)));
    note("none", say(getxattr(&path, "user.none", &mut value[..]).map_err(Into::into)));
    let mut list = [0; 256];
    let len = listxattr(&path, &mut list[..]).unwrap();
    let mut listed: Vec<_> = list[..len].split(|byte| *byte == 0).map(<[u8]>::to_vec).collect();
    listed.sort();
    note("list", format!("{listed:?}"));
    note("remove", say(removexattr(&path, "user.one").map_err(Into::into)));
    note("remove again", say(removexattr(&path, "user.one").map_err(Into::into)));

    let (first, second) = (File::open(&path).unwrap(), File::open(&path).unwrap());
    note("flock", say(flock(&first, FlockOperation::LockExclusive).map_err(Into::into)));
    note("flock held", say(flock(&second, FlockOperation::NonBlockingLockShared).map_err(Into::into)));
    note(
        "flock free",
        say(flock(&first, FlockOperation::Unlock)
            .and_then(|()| flock(&second, FlockOperation::NonBlockingLockShared))
            .map_err(Into::into)),
    );

    let times =
        fs::FileTimes::new().set_modified(std::time::UNIX_EPOCH + std::time::Duration::new(1_500_000_000, 123_456_789));
    note("times", say(File::open(&path).and_then(|file| file.set_times(times))));
    note("its time", say(fs::metadata(&path).map(|metadata| (metadata.mtime(), metadata.mtime_nsec()))));
    note("statfs", say(rustix::fs::statfs(root).map(|stat| (stat.f_bsize, stat.f_namelen)).map_err(Into::into)));
    note(
        "no atime",
        say(statx(CWD, &path, AtFlags::empty(), rustix::fs::StatxFlags::BASIC_STATS)
            .map(|stat| stat.stx_nlink)
            .map_err(Into::into)),
    );
    note(
        "open a directory for writing",
        say(open(at("d"), OFlags::WRONLY, Mode::empty()).map(drop).map_err(Into::into)),
    );
    note("create over a directory", say(fs::write(at("d"), b"")));
    note("O_NOFOLLOW", say(OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(at("link")).map(drop)));
    note("O_DIRECTORY", say(OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY).open(&path).map(drop)));
    let mut text = String::new();
    note(
        "executed",
        say(Command::new("cp").args(["/bin/sh", at("sh").to_str().unwrap()]).status().and_then(|_| {
            let output = Command::new(at("sh")).args(["-c", "echo ran"]).output()?;
            text = String::from_utf8_lossy(&output.stdout).into_owned();
            output.stdout.as_slice().read_to_string(&mut text)
        })),
    );
    note("what it said", text);
    log
}

/// A command as user 4321, group 8765, with no other rights.
fn as_user(command: &[&str]) -> String {
    let output = Command::new(command[0]).args(&command[1..]).uid(4321).gid(8765).output().unwrap();
    format!(
        "{} {:?}",
        output.status,
        String::from_utf8_lossy(&output.stderr).contains("ermission")
            || String::from_utf8_lossy(&output.stderr).contains("not permitted")
    )
}

/// Writes to a file through a shared mapping.
fn map(path: &Path) -> io::Result<()> {
    let file = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
    file.set_len(8192)?;
    let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
    // SAFETY: a new mapping of a file that is as long; it is used within its bounds and unmapped before it is forgotten.
    unsafe {
        let start = libc::mmap(std::ptr::null_mut(), 8192, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, fd, 0);
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        start.cast::<u8>().add(5000).write(b'm');
        let synced = libc::msync(start, 8192, libc::MS_SYNC);
        libc::munmap(start, 8192);
        if synced != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

#[test]
fn operations_have_the_same_results_as_below() {
    let work = tempfile::tempdir().unwrap();
    fs::set_permissions(work.path(), Permissions::from_mode(0o755)).unwrap();
    let (below, shared) = (work.path().join("below"), work.path().join("shared"));
    fs::create_dir(&below).unwrap();
    fs::create_dir(&shared).unwrap();
    let Some(mounted) = Mounted::new(&[("root", &shared, false)]) else { return };
    fs::set_permissions(mounted.directory.path(), Permissions::from_mode(0o755)).ok();
    let expected = operate(&below);
    let actual = operate(&mounted.directory.path().join("root"));
    for ((what, expected), (_, actual)) in expected.iter().zip(&actual) {
        assert_eq!(expected, actual, "{what}");
    }
    assert_eq!(expected.len(), actual.len());
}

#[test]
fn the_host_and_the_guest_see_each_others_changes() {
    let work = tempfile::tempdir().unwrap();
    let (shared, single) = (work.path().join("shared"), work.path().join("resolv.conf"));
    fs::create_dir(&shared).unwrap();
    fs::write(&single, b"nameserver").unwrap();
    let exports: &[(&str, &Path, bool)] = &[("root", &shared, false), ("file", &single, false), ("ro", &shared, true)];
    let Some(mounted) = Mounted::new(exports) else { return };
    let guest = |name: &str| mounted.directory.path().join(name);
    let mut names: Vec<_> =
        fs::read_dir(mounted.directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["file", "ro", "root"]);

    fs::write(shared.join("a"), b"host").unwrap();
    assert_eq!(fs::read(guest("root/a")).unwrap(), b"host");
    fs::write(shared.join("a"), b"changed by the host").unwrap();
    assert_eq!(fs::read(guest("root/a")).unwrap(), b"changed by the host");
    fs::write(guest("root/a"), b"guest").unwrap();
    assert_eq!(fs::read(shared.join("a")).unwrap(), b"guest");
    fs::write(shared.join("b"), b"another").unwrap();
    fs::rename(shared.join("b"), shared.join("a")).unwrap();
    assert_eq!(fs::read(guest("root/a")).unwrap(), b"another");
    fs::remove_file(shared.join("a")).unwrap();
    assert!(!guest("root/a").exists());

    assert_eq!(fs::read(guest("file")).unwrap(), b"nameserver");
    fs::write(guest("file"), b"changed").unwrap();
    assert_eq!(fs::read(&single).unwrap(), b"changed");

    fs::write(shared.join("c"), b"c").unwrap();
    let error = |result: io::Result<()>| result.unwrap_err().raw_os_error();
    assert_eq!(fs::read(guest("ro/c")).unwrap(), b"c");
    assert_eq!(error(fs::write(guest("ro/c"), b"")), Some(libc::EROFS));
    assert_eq!(error(fs::write(guest("ro/new"), b"")), Some(libc::EROFS));
    assert_eq!(error(fs::remove_file(guest("ro/c"))), Some(libc::EROFS));
    assert_eq!(error(fs::set_permissions(guest("ro/c"), Permissions::from_mode(0o777))), Some(libc::EROFS));
    assert_eq!(error(fs::rename(guest("root/c"), guest("ro/c2"))), Some(libc::EROFS));
    assert_eq!(error(fs::hard_link(guest("ro/c"), guest("root/c2"))), Some(libc::EXDEV));
    assert_eq!(error(fs::write(guest("new"), b"")), Some(libc::EROFS));
    assert_eq!(error(fs::create_dir(guest("new"))), Some(libc::EROFS));
    assert_eq!(error(fs::remove_file(guest("file"))), Some(libc::EROFS));
    assert_eq!(error(fs::rename(guest("file"), guest("other"))), Some(libc::EROFS));
}
