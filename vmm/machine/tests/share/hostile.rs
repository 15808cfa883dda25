//! A client that wants out. Nothing here depends on time or luck: what races do, the test does itself between two requests.
use super::bridge::{Served, request};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const READLINK: u32 = 5;
const SYMLINK: u32 = 6;
const MKNOD: u32 = 8;
const MKDIR: u32 = 9;
const UNLINK: u32 = 10;
const RENAME: u32 = 12;
const LINK: u32 = 13;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const SETXATTR: u32 = 21;
const GETXATTR: u32 = 22;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const READDIR: u32 = 28;
const CREATE: u32 = 35;
const BATCH_FORGET: u32 = 42;
const READDIRPLUS: u32 = 44;

/// A shared directory, and beside it one that is not.
struct World {
    work: tempfile::TempDir,
    served: Served,
}

impl World {
    fn new() -> Self {
        let work = tempfile::tempdir().unwrap();
        for directory in ["shared/d", "other", "outside/d"] {
            fs::create_dir_all(work.path().join(directory)).unwrap();
        }
        fs::write(work.path().join("outside/secret"), b"secret").unwrap();
        fs::write(work.path().join("shared/file"), b"file").unwrap();
        let exports: &[(&str, &Path, bool)] = &[
            ("root", &work.path().join("shared"), false),
            ("other", &work.path().join("other"), false),
            ("ro", &work.path().join("shared"), true),
        ];
        let mut served = Served::start(exports);
        served.call(INIT, 0, &words(&[7, 38, 1 << 20, u32::MAX, 0])).unwrap();
        Self { work, served }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.work.path().join(name)
    }

    fn lookup(&mut self, parent: u64, name: &str) -> Result<u64, i32> {
        let body = self.served.call(LOOKUP, parent, &text(&[name]))?;
        Ok(u64::from_le_bytes(body[..8].try_into().unwrap()))
    }

    fn open(&mut self, node: u64, flags: i32) -> Result<u64, i32> {
        let body = self.served.call(OPEN, node, &words(&[flags as u32, 0]))?;
        Ok(u64::from_le_bytes(body[..8].try_into().unwrap()))
    }

    /// What lies outside is as it was.
    fn outside_is_untouched(&self) {
        let mut names: Vec<_> =
            fs::read_dir(self.path("outside")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["d", "secret"]);
        assert_eq!(fs::read(self.path("outside/secret")).unwrap(), b"secret");
        assert_eq!(fs::read_dir(self.path("outside/d")).unwrap().count(), 0);
    }
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_le_bytes()).collect()
}

fn text(names: &[&str]) -> Vec<u8> {
    names.iter().flat_map(|name| name.bytes().chain([0])).collect()
}

fn joined(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

#[test]
fn names_lead_nowhere_but_into_their_directory() {
    let mut world = World::new();
    let root = world.lookup(1, "root").unwrap();
    for name in ["..", ".", "", "../outside", "d/..", "/", "/etc/passwd", "d/x"] {
        assert_eq!(world.lookup(root, name), Err(libc::EINVAL), "{name}");
        assert_eq!(world.lookup(1, name), Err(libc::EINVAL), "{name}");
        let body = joined(&[&words(&[0o755, 0]), &text(&[name])]);
        assert_eq!(world.served.call(MKDIR, root, &body), Err(libc::EINVAL), "{name}");
        assert_eq!(world.served.call(UNLINK, root, &text(&[name])), Err(libc::EINVAL), "{name}");
        let body = joined(&[&longs(&[root]), &text(&[name, "x"])]);
        assert_eq!(world.served.call(RENAME, root, &body), Err(libc::EINVAL), "{name}");
        let body = joined(&[&longs(&[root]), &text(&["file", name])]);
        assert_eq!(world.served.call(RENAME, root, &body), Err(libc::EINVAL), "{name}");
        let body = joined(&[&words(&[libc::O_RDWR as u32, 0o644, 0, 0]), &text(&[name])]);
        assert_eq!(world.served.call(CREATE, root, &body), Err(libc::EINVAL), "{name}");
    }
    assert_eq!(world.lookup(root, &"n".repeat(256)), Err(libc::ENAMETOOLONG));
    // A name without its end.
    assert_eq!(world.served.call(LOOKUP, root, b"file"), Err(libc::EINVAL));
    world.outside_is_untouched();
}

#[test]
fn links_are_shown_and_never_followed() {
    let mut world = World::new();
    let root = world.lookup(1, "root").unwrap();
    let outside = world.path("outside");
    let body = text(&["way-out", outside.to_str().unwrap()]);
    world.served.call(SYMLINK, root, &body).unwrap();
    world.served.call(SYMLINK, root, &text(&["proc", "/proc/self/root"])).unwrap();
    for name in ["way-out", "proc"] {
        let link = world.lookup(root, name).unwrap();
        assert!(world.served.call(READLINK, link, &[]).is_ok());
        assert_eq!(world.lookup(link, "secret"), Err(libc::ENOTDIR));
        assert_eq!(world.open(link, libc::O_RDONLY), Err(libc::ENXIO));
        assert_eq!(world.served.call(OPENDIR, link, &words(&[0, 0])), Err(libc::ENOTDIR));
        let body = joined(&[&words(&[libc::O_RDWR as u32, 0o644, 0, 0]), &text(&["evil"])]);
        assert_eq!(world.served.call(CREATE, link, &body), Err(libc::ENOTDIR));
        // Creating over a link opens neither the link nor its target.
        let body = joined(&[&words(&[libc::O_RDWR as u32, 0o644, 0, 0]), &text(&[name])]);
        assert_eq!(world.served.call(CREATE, root, &body), Err(libc::ENXIO));
        let mut truncate = vec![0; 88];
        truncate[..4].copy_from_slice(&(1u32 << 3).to_le_bytes());
        assert_eq!(world.served.call(SETATTR, link, &truncate), Err(libc::EINVAL));
    }
    world.outside_is_untouched();
}

#[test]
fn directories_that_turn_into_links_between_two_requests() {
    let mut world = World::new();
    let root = world.lookup(1, "root").unwrap();
    let directory = world.lookup(root, "d").unwrap();
    // The race, won: the directory that was looked up is moved away, and a link out takes its name.
    fs::rename(world.path("shared/d"), world.path("shared/moved")).unwrap();
    symlink(world.path("outside"), world.path("shared/d")).unwrap();
    assert_eq!(world.lookup(directory, "secret"), Err(libc::ENOENT));
    let body = joined(&[&words(&[libc::O_RDWR as u32, 0o644, 0, 0]), &text(&["made"])]);
    world.served.call(CREATE, directory, &body).unwrap();
    assert!(world.path("shared/moved/made").exists());
    let body = joined(&[&words(&[0o755, 0]), &text(&["sub"])]);
    world.served.call(MKDIR, directory, &body).unwrap();
    assert!(world.path("shared/moved/sub").is_dir());
    // Moved out of the share by the host, the directory is still itself, and its parent still no name.
    fs::rename(world.path("shared/moved"), world.path("moved-out")).unwrap();
    assert_eq!(world.lookup(directory, ".."), Err(libc::EINVAL));
    // A file that turns into a link.
    let file = world.lookup(root, "file").unwrap();
    fs::rename(world.path("shared/file"), world.path("shared/old")).unwrap();
    symlink(world.path("outside/secret"), world.path("shared/file")).unwrap();
    let handle = world.open(file, libc::O_RDWR).unwrap();
    let read = world.served.call(READ, file, &joined(&[&longs(&[handle, 0]), &words(&[100, 0, 0, 0, 0, 0])])).unwrap();
    assert_eq!(read, b"file");
    let write = joined(&[&longs(&[handle, 0]), &words(&[4, 0, 0, 0, 0, 0]), b"evil"]);
    world.served.call(WRITE, file, &write).unwrap();
    assert_eq!(fs::read(world.path("shared/old")).unwrap(), b"evil");
    world.outside_is_untouched();
}

#[test]
fn devices_and_pipes_are_never_opened() {
    let mut world = World::new();
    let root = world.lookup(1, "root").unwrap();
    // /dev/full would say so; a pipe without a writer would hang.
    for (name, mode, device) in [
        ("full", libc::S_IFCHR | 0o666, 1 << 8 | 7),
        ("pipe", libc::S_IFIFO | 0o666, 0),
        ("sock", libc::S_IFSOCK | 0o666, 0),
    ] {
        let body = joined(&[&words(&[mode, device, 0, 0]), &text(&[name])]);
        world.served.call(MKNOD, root, &body).unwrap();
        let node = world.lookup(root, name).unwrap();
        for flags in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR | libc::O_TRUNC] {
            assert_eq!(world.open(node, flags), Err(libc::ENXIO));
        }
        let body = joined(&[&words(&[libc::O_RDWR as u32, 0o644, 0, 0]), &text(&[name])]);
        assert_eq!(world.served.call(CREATE, root, &body), Err(libc::ENXIO));
        let mut truncate = vec![0; 88];
        truncate[..4].copy_from_slice(&(1u32 << 3).to_le_bytes());
        assert_eq!(world.served.call(SETATTR, node, &truncate), Err(libc::EINVAL));
    }
    let directory = joined(&[&words(&[libc::S_IFDIR | 0o755, 0, 0, 0]), &text(&["x"])]);
    assert_eq!(world.served.call(MKNOD, root, &directory), Err(libc::EINVAL));
}

#[test]
fn read_only_exports_and_other_exports_keep_apart() {
    let mut world = World::new();
    let root = world.lookup(1, "root").unwrap();
    let other = world.lookup(1, "other").unwrap();
    let ro = world.lookup(1, "ro").unwrap();
    let file = world.lookup(root, "file").unwrap();
    let ro_file = world.lookup(ro, "file").unwrap();
    assert_ne!(file, ro_file, "the same inode by two exports is two nodes");
    for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_RDONLY | libc::O_TRUNC, 3] {
        assert_eq!(world.open(ro_file, flags), Err(libc::EROFS));
    }
    let handle = world.open(ro_file, libc::O_RDONLY).unwrap();
    let write = joined(&[&longs(&[handle, 0]), &words(&[4, 0, 0, 0, 0, 0]), b"evil"]);
    assert_eq!(world.served.call(WRITE, ro_file, &write), Err(libc::EBADF));
    assert_eq!(world.served.call(WRITE, file, &write), Err(libc::EBADF));
    let mut set = vec![0; 88];
    set[..4].copy_from_slice(&(1u32 << 3 | 1 << 6).to_le_bytes());
    assert_eq!(world.served.call(SETATTR, ro_file, &set), Err(libc::EROFS));
    let body = joined(&[&words(&[1, 0]), &text(&["user.x"]), b"1"]);
    assert_eq!(world.served.call(SETXATTR, ro_file, &body), Err(libc::EROFS));
    for (from, to) in [(root, ro), (ro, root), (ro, ro)] {
        let body = joined(&[&longs(&[to]), &text(&["file", "file2"])]);
        assert_eq!(world.served.call(RENAME, from, &body), Err(libc::EROFS));
    }
    let body = joined(&[&longs(&[other]), &text(&["file", "file2"])]);
    assert_eq!(world.served.call(RENAME, root, &body), Err(libc::EXDEV));
    for (old, parent, wanted) in
        [(file, other, libc::EXDEV), (ro_file, root, libc::EXDEV), (file, ro, libc::EROFS), (file, 1, libc::EROFS)]
    {
        let body = joined(&[&longs(&[old]), &text(&["hard"])]);
        assert_eq!(world.served.call(LINK, parent, &body), Err(wanted));
    }
    assert_eq!(fs::read(world.path("shared/file")).unwrap(), b"file");
}

#[test]
fn ids_lengths_and_sizes_that_lie() {
    let mut world = World::new();
    let root = world.lookup(1, "root").unwrap();
    let file = world.lookup(root, "file").unwrap();
    let handle = world.open(file, libc::O_RDWR).unwrap();
    for node in [0, 1 << 40, u64::MAX] {
        assert_eq!(world.lookup(node, "x"), Err(libc::ESTALE));
        assert_eq!(world.served.call(GETATTR, node, &[0; 16]), Err(libc::ESTALE));
    }
    for wrong in [0, handle + 1, u64::MAX] {
        assert_eq!(
            world.served.call(READ, file, &joined(&[&longs(&[wrong, 0]), &words(&[100, 0, 0, 0, 0, 0])])),
            Err(libc::EBADF)
        );
    }
    // A file's handle is no directory's.
    assert_eq!(
        world.served.call(READDIR, root, &joined(&[&longs(&[handle, 0]), &words(&[4096, 0, 0, 0, 0, 0])])),
        Err(libc::EBADF)
    );
    let read =
        world.served.call(READ, file, &joined(&[&longs(&[handle, 0]), &words(&[u32::MAX, 0, 0, 0, 0, 0])])).unwrap();
    assert_eq!(read, b"file");
    let read = world.served.call(READ, file, &joined(&[&longs(&[handle, u64::MAX]), &words(&[10, 0, 0, 0, 0, 0])]));
    assert_eq!(read, Err(libc::EINVAL));
    // More data promised than sent.
    let write = joined(&[&longs(&[handle, 0]), &words(&[1000, 0, 0, 0, 0, 0]), b"few"]);
    assert_eq!(world.served.call(WRITE, file, &write), Err(libc::EINVAL));
    let body = joined(&[&words(&[1 << 30, 0]), &text(&["user.x"]), b"1"]);
    assert_eq!(world.served.call(SETXATTR, file, &body), Err(libc::ERANGE));
    for name in ["security.selinux", "system.posix_acl_access", "trusted.overlay.opaque", "nonsense", ""] {
        let body = joined(&[&words(&[1, 0]), &text(&[name]), b"1"]);
        assert_eq!(world.served.call(SETXATTR, file, &body), Err(libc::EOPNOTSUPP), "{name}");
        let body = joined(&[&words(&[10, 0]), &text(&[name])]);
        assert_eq!(world.served.call(GETXATTR, file, &body), Err(libc::EOPNOTSUPP), "{name}");
    }
    // Lengths that the header lies about, and operations that are none.
    let mut lying = request(GETATTR, file, &[0; 16]);
    lying[..4].copy_from_slice(&1000u32.to_le_bytes());
    world.served.send(&lying);
    assert_eq!(world.served.receive()[4..8], (-libc::EINVAL).to_le_bytes());
    for code in [0, 7, 19, 25, 31, 33, 34, 39, 47, 48, 50, 51, 52, 4096, u32::MAX] {
        assert_eq!(world.served.call(code, file, &[0; 100]), Err(libc::ENOSYS), "{code}");
    }
    // A node is forgotten once, however often the guest says so.
    world.served.send(&request(FORGET, file, &longs(&[u64::MAX])));
    world.served.send(&request(FORGET, file, &longs(&[1])));
    world.served.send(&request(BATCH_FORGET, 0, &joined(&[&words(&[u32::MAX, 0]), &longs(&[file, 1])])));
    assert_eq!(world.served.call(GETATTR, file, &[0; 16]), Err(libc::ESTALE));
    // What it had open is open still.
    let read = world.served.call(READ, file, &joined(&[&longs(&[handle, 0]), &words(&[4, 0, 0, 0, 0, 0])])).unwrap();
    assert_eq!(read, b"file");
    let again = world.lookup(root, "file").unwrap();
    assert_ne!(again, file);
}

#[test]
fn a_frame_that_is_too_long_ends_the_server() {
    use std::io::{Read, Write};
    let mut world = World::new();
    world.served.connection.write_all(&u32::MAX.to_le_bytes()).unwrap();
    let mut rest = Vec::new();
    // It hangs up; whether in order or by a reset is the socket's matter.
    let _ = world.served.connection.read_to_end(&mut rest);
    assert!(rest.is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20, failure_persistence: None, rng_seed: RngSeed::Fixed(1), ..ProptestConfig::default() })]

    /// Each is answered once, and nothing outside changes.
    #[test]
    fn any_request_is_answered(requests in prop::collection::vec(
        (0u32..54, 0u64..8, prop::collection::vec(prop_oneof![Just(0u8), Just(1u8), Just(b'd'), any::<u8>()], 0..160)),
        1..200,
    )) {
        let mut world = World::new();
        let root = world.lookup(1, "root").unwrap();
        world.lookup(root, "d").unwrap();
        let file = world.lookup(root, "file").unwrap();
        world.open(file, libc::O_RDWR).unwrap();
        for (code, node, body) in &requests {
            // Not a write or an allocation of terabytes, which the disk below may even have.
            if matches!(*code, SETATTR | 43) {
                continue;
            }
            if matches!(*code, FORGET | 36 | BATCH_FORGET) {
                world.served.send(&request(*code, *node, body));
            } else {
                let _ = world.served.call(*code, *node, body);
            }
        }
        world.served.call(INIT, 0, &words(&[7, 38, 1 << 20, u32::MAX, 0])).unwrap();
        let root = world.lookup(1, "root").unwrap();
        let handle = world.served.call(OPENDIR, root, &words(&[0, 0])).unwrap();
        let handle = u64::from_le_bytes(handle[..8].try_into().unwrap());
        let list = world.served.call(READDIRPLUS, root, &joined(&[&longs(&[handle, 0]), &words(&[8192, 0, 0, 0, 0, 0])])).unwrap();
        prop_assert!(list.windows(4).any(|part| part == b"file") || !world.path("shared/file").exists());
        world.outside_is_untouched();
    }
}
