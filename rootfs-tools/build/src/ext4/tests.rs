#![allow(clippy::unwrap_used, clippy::panic)]
use super::*;
use std::fs;
use std::io::Read;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::process::Command;

fn sh(script: &str) {
    let output = Command::new("sh").args(["-ec", script]).output().unwrap();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
}

/// An image of a directory, made by mke2fs, which takes owners, modes, devices, links and attributes over.
fn image_of(tree: &Path, image: &Path, options: &str) {
    sh(&format!("mke2fs -q -F -t ext4 {options} -d '{}' '{}' 64M", tree.display(), image.display()));
}

fn text(node: &Node) -> Vec<u8> {
    let Kind::File { size, content } = &node.kind else { panic!("{node:?}") };
    let mut bytes = Vec::new();
    content.open(*size).unwrap().read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn what_mke2fs_writes_is_read() {
    let directory = tempfile::tempdir().unwrap();
    let tree = directory.path().join("tree");
    let upper = tree.join("upper");
    fs::create_dir_all(upper.join("dir/deep")).unwrap();
    fs::write(upper.join("file"), "content").unwrap();
    fs::hard_link(upper.join("file"), upper.join("dir/link")).unwrap();
    symlink("short", upper.join("short")).unwrap();
    symlink("l".repeat(300), upper.join("long")).unwrap();
    let big: Vec<u8> = (0..3_000_000u32).flat_map(u32::to_le_bytes).collect();
    fs::write(upper.join("big"), &big).unwrap();
    let sparse = fs::File::create(upper.join("sparse")).unwrap();
    for at in 0..200u64 {
        sparse.write_all_at(b"x", at * 20_000).unwrap();
    }
    sparse.set_len(5_000_001).unwrap();
    drop(sparse);
    for index in 0..2000 {
        fs::write(upper.join(format!("dir/deep/a-rather-long-name-{index}")), "").unwrap();
    }
    let there = upper.display();
    sh(&format!(
        "mknod '{there}/gone' c 0 0; mknod '{there}/null' c 1 3; mknod '{there}/disk' b 259 70000; mkfifo '{there}/pipe'
         chown 70000:80000 '{there}/file'; touch -d @5000000000 '{there}/dir'; touch -d @-100 '{there}/pipe'"
    ));
    fs::set_permissions(upper.join("file"), fs::Permissions::from_mode(0o4751)).unwrap();
    for options in ["-O ^metadata_csum,^64bit,^has_journal -b 4096", "-b 1024", "-I 512"] {
        let image = directory.path().join("image");
        image_of(&tree, &image, options);
        sh(&format!(
            "printf 'value' > '{0}.v'; debugfs -w -R 'ea_set -f {0}.v /upper/big user.note' '{0}' 2>/dev/null",
            image.display()
        ));
        let changes = read(fs::File::open(&image).unwrap(), Path::new("upper")).unwrap();
        let at = |path: &str| changes.added.get(Path::new(path)).unwrap_or_else(|| panic!("{path}"));
        assert_eq!(changes.removed, [PathBuf::from("gone")].into());
        assert_eq!(text(at("file")), b"content");
        assert_eq!((at("file").mode, at("file").uid, at("file").gid), (0o4751, 70_000, 80_000));
        assert!(Arc::ptr_eq(at("file"), at("dir/link")));
        assert_eq!(text(at("big")), big);
        assert_eq!(text(at("sparse")), fs::read(upper.join("sparse")).unwrap());
        assert!(matches!(&at("short").kind, Kind::Symlink(target) if target == Path::new("short")));
        assert!(matches!(&at("long").kind, Kind::Symlink(target) if target.as_os_str().len() == 300));
        assert!(matches!(at("null").kind, Kind::Char { major: 1, minor: 3 }));
        assert!(matches!(at("disk").kind, Kind::Block { major: 259, minor: 70_000 }));
        assert!(matches!(at("pipe").kind, Kind::Fifo));
        assert_eq!(at("pipe").mtime_s, -100);
        assert_eq!(at("big").xattrs, [("user.note".to_owned(), b"value".to_vec())].into());
        assert_eq!(changes.added.len(), 2000 + 11);
        assert!(matches!(read(fs::File::open(&image).unwrap(), Path::new("other")), Err(Ext4Error::Missing(_))));
        fs::remove_file(&image).unwrap();
    }
}

#[test]
fn what_the_kernels_overlay_leaves_is_read() {
    let directory = tempfile::tempdir().unwrap();
    let there = directory.path().display();
    // The kernel writes this image: a real overlay in a mount namespace of its own.
    let mounted = Command::new("unshare")
        .args(["-m", "sh", "-ec"])
        .arg(format!(
            "cd '{there}'; truncate -s 64M image; mke2fs -q -F -t ext4 -O ^has_journal image; mkdir m merged lower
             mkdir lower/old lower/kept; echo 1 > lower/old/a; echo 1 > lower/kept/b; echo 1 > lower/kept/c; chmod 750 lower/kept
             mount -o loop image m; mkdir m/upper m/work
             mount -t overlay overlay -o lowerdir=lower,upperdir=m/upper,workdir=m/work merged
             cd merged; rm -r old; mkdir old; echo new > old/n; rm kept/b; echo changed > kept/c; touch -d @5000000000 kept/c
             echo x > prog; setfacl -m u:1234:rwx prog 2>/dev/null || true
             cd ..; umount merged m"
        ))
        .output()
        .unwrap();
    if !mounted.status.success() {
        println!("skipped: no loop or overlay mounts here: {}", String::from_utf8_lossy(&mounted.stderr));
        return;
    }
    let image = fs::File::open(directory.path().join("image")).unwrap();
    let changes = read(image, Path::new("upper")).unwrap();
    assert_eq!(changes.opaque, [PathBuf::from("old")].into());
    assert_eq!(changes.removed, [PathBuf::from("kept/b")].into());
    let paths: Vec<_> = changes.added.keys().map(|path| path.to_str().unwrap()).collect();
    assert_eq!(paths, ["kept", "kept/c", "old", "old/n", "prog"]);
    assert_eq!(changes.added[Path::new("kept")].mode, 0o750);
    assert_eq!(text(&changes.added[Path::new("kept/c")]), b"changed\n");
    assert_eq!(changes.added[Path::new("kept/c")].mtime_s, 5_000_000_000);
    for node in changes.added.values() {
        assert!(node.xattrs.keys().all(|name| !name.starts_with("trusted.overlay")), "{:?}", node.xattrs);
    }
}

#[test]
fn damage_ends_in_errors() {
    let directory = tempfile::tempdir().unwrap();
    let tree = directory.path().join("tree");
    fs::create_dir_all(tree.join("upper/d")).unwrap();
    for index in 0..40 {
        fs::write(tree.join(format!("upper/d/{index}")), vec![7; index * 300]).unwrap();
    }
    let path = directory.path().join("image");
    image_of(&tree, &path, "-O ^metadata_csum,^has_journal -b 1024");
    let good = fs::read(&path).unwrap();
    let damaged = directory.path().join("damaged");
    let file = fs::File::options().create(true).truncate(true).read(true).write(true).open(&damaged).unwrap();
    file.write_all_at(&good[..2 << 20], 0).unwrap();
    let try_read = || read(fs::File::open(&damaged).unwrap(), Path::new("upper"));
    // Metadata is in the first part of so small an image. Bytes that are not zero become something else; nothing may panic
    // or hang, whatever comes out. A fixed stride keeps this short.
    let places: Vec<usize> = (1024..1 << 20).filter(|at| good[*at] != 0).step_by(61).take(400).collect();
    assert!(places.len() > 50);
    for at in places {
        for value in [0xff, 0x80, 0] {
            file.write_all_at(&[value], at as u64).unwrap();
            let _ = try_read();
        }
        file.write_all_at(&good[at..=at], at as u64).unwrap();
    }
    file.write_all_at(&[0], 1024 + 0x3a).unwrap();
    assert!(matches!(try_read(), Err(Ext4Error::Unclean)));
    file.write_all_at(&[0; 4096], 0).unwrap();
    assert!(matches!(try_read(), Err(Ext4Error::Corrupt { .. })));
    file.set_len(1500).unwrap();
    assert!(matches!(try_read(), Err(Ext4Error::Read(_))));
}
