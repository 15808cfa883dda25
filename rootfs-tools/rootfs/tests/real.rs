//! Real content: what GNU tar packs, the writer converts; fsck.erofs and a mount, entry by entry, against GNU tar's extraction.
#![allow(clippy::unwrap_used)]
mod support;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use support::{Mounted, assert_same, convert, fsck, has_xattrs, look, run};

const XATTRS: [&str; 2] = ["--xattrs", "--xattrs-include=*"];

/// Packs `source`, extracts it again with tar, converts it, and compares the two.
fn round_trip(source: &Path, work: &Path, pack: &[&str]) -> PathBuf {
    let tar = work.join("layer.tar");
    let mut args = vec!["-C", source.to_str().unwrap(), "--numeric-owner"];
    if !pack.contains(&"--format=gnu") {
        args.extend(XATTRS);
    }
    args.extend(pack);
    args.extend(["-cf", tar.to_str().unwrap(), "."]);
    run("tar", &args);
    let extracted = work.join("extracted");
    fs::create_dir(&extracted).unwrap();
    let mut args = vec!["-C", extracted.to_str().unwrap(), "--numeric-owner", "--same-owner", "-p"];
    args.extend(XATTRS);
    args.extend(["-xf", tar.to_str().unwrap()]);
    run("tar", &args);

    let (image, summary) = convert(File::open(&tar).unwrap(), work).unwrap();
    assert_eq!(summary.tar_bytes, fs::metadata(&tar).unwrap().len());
    assert_eq!(summary.image_bytes, fs::metadata(&image).unwrap().len());
    fsck(&image);
    if let Some(mounted) = Mounted::new(&image) {
        assert_same(&look(&extracted), &look(mounted.path()));
    }
    let (again, _) = convert(File::open(&tar).unwrap(), work).unwrap();
    run("cmp", &[image.to_str().unwrap(), again.to_str().unwrap()]);
    image
}

/// A tree of everything that a layer can hold.
fn nasty(root: &Path) {
    let at = |name: &str| root.join(name);
    for directory in ["empty", "etc", "usr/bin", "many", "deep/a/b/c/d/e/f", "sticky"] {
        fs::create_dir_all(at(directory)).unwrap();
    }
    fs::set_permissions(at("sticky"), fs::Permissions::from_mode(0o1777)).unwrap();
    for size in
        [0usize, 1, 31, 32, 33, 4000, 4031, 4032, 4033, 4064, 4065, 4095, 4096, 4097, 8191, 8192, 12_345, 300_000]
    {
        let data: Vec<u8> = (0..size).map(|index| (index * 7 + size) as u8).collect();
        fs::write(at(&format!("etc/size-{size}")), data).unwrap();
    }
    fs::write(at("etc/zeroes"), vec![0; 1 << 20]).unwrap();
    for name in [
        " ",
        "new\nline",
        "tab\t",
        "quote\"'",
        "back\\slash",
        "uni\u{e9}\u{4e16}",
        "-dash",
        "!bang",
        "#hash",
        ".hidden",
        "...",
        "wh.x",
    ] {
        fs::write(at("many").join(name), name).unwrap();
    }
    let bytes = std::os::unix::ffi::OsStrExt::from_bytes(&b"bad\xff\xfeutf8"[..]);
    fs::write(at("many").join::<&std::ffi::OsStr>(bytes), b"bytes").unwrap();
    fs::write(at("many").join("n".repeat(255)), b"long").unwrap();
    for index in 0..700 {
        fs::write(
            at("many").join(format!("{index:04}-{}", "x".repeat(index % 200))),
            vec![index as u8; index * 13 % 5000],
        )
        .unwrap();
    }
    let deep = at("deep").join(vec!["d".repeat(100); 8].join("/"));
    fs::create_dir_all(&deep).unwrap();
    fs::write(deep.join("file"), b"deep").unwrap();
    symlink("../etc/size-1", at("usr/link")).unwrap();
    symlink("/absolute/target", at("usr/absolute")).unwrap();
    symlink("t".repeat(4095), at("usr/long-link")).unwrap();
    symlink("../".repeat(1344) + "x", at("usr/medium-link")).unwrap();
    fs::hard_link(at("etc/size-300000"), at("usr/bin/hard-1")).unwrap();
    fs::hard_link(at("etc/size-300000"), at("hard-2")).unwrap();
    fs::hard_link(at("usr/link"), at("hard-to-symlink")).unwrap();
    fs::write(at("usr/bin/su"), b"#!").unwrap();
    fs::set_permissions(at("usr/bin/su"), fs::Permissions::from_mode(0o6755)).unwrap();
    run("chown", &["12345:70000", at("etc/size-12345").to_str().unwrap()]);
    run("chown", &["-h", "4294967294:3", at("usr/absolute").to_str().unwrap()]);
    run("mknod", &[at("null").to_str().unwrap(), "c", "1", "3"]);
    run("mknod", &[at("wide").to_str().unwrap(), "b", "4095", "1048575"]);
    run("mkfifo", &[at("pipe").to_str().unwrap()]);
    run("touch", &["-h", "-d", "1969-12-31 23:59:58.25 UTC", at("usr/link").to_str().unwrap()]);
    run("touch", &["-d", "2106-02-08 01:02:03.123456789 UTC", at("etc/size-1").to_str().unwrap()]);
    let sparse = File::create(at("sparse")).unwrap();
    sparse.write_all_at(b"start", 0).unwrap();
    sparse.write_all_at(b"middle", 5_000_000).unwrap();
    sparse.set_len(20_000_001).unwrap();
    let all_hole = File::create(at("all-hole")).unwrap();
    all_hole.set_len(9_999_999).unwrap();
    if has_xattrs(root) {
        run("setfattr", &["-n", "user.note", "-v", "hello", at("etc/size-4031").to_str().unwrap()]);
        run("setfattr", &["-n", "trusted.secret", "-v", "0x00ff00", at("usr").to_str().unwrap()]);
        run("setfattr", &["-n", "user.big", "-v", &"v".repeat(3000), at("etc/size-4000").to_str().unwrap()]);
        run("setfattr", &["-n", "user.empty", at("etc/size-0").to_str().unwrap()]);
        let capability = "0x0100000200040000000000000000000000000000";
        run("setfattr", &["-n", "security.capability", "-v", capability, at("usr/bin/su").to_str().unwrap()]);
    }
}

#[test]
fn everything_that_a_layer_can_hold_in_pax_format() {
    let work = tempfile::tempdir().unwrap();
    let source = work.path().join("source");
    fs::create_dir(&source).unwrap();
    nasty(&source);
    round_trip(&source, work.path(), &["--format=posix", "--sparse"]);
}

#[test]
fn sparse_files_in_each_pax_version() {
    for version in ["0.0", "0.1", "1.0"] {
        let work = tempfile::tempdir().unwrap();
        let source = work.path().join("source");
        fs::create_dir(&source).unwrap();
        let file = File::create(source.join("sparse")).unwrap();
        for index in 0..60u64 {
            file.write_all_at(&[index as u8 + 1; 4096], index * 65_536).unwrap();
        }
        file.set_len(60 * 65_536 + 17).unwrap();
        round_trip(&source, work.path(), &["--format=posix", "--sparse", &format!("--sparse-version={version}")]);
    }
}

#[test]
fn the_gnu_format_with_long_names_and_old_sparse_maps() {
    let work = tempfile::tempdir().unwrap();
    let source = work.path().join("source");
    fs::create_dir(&source).unwrap();
    let long = source.join("l".repeat(200)).join("m".repeat(200));
    fs::create_dir_all(&long).unwrap();
    fs::write(long.join("file"), b"x").unwrap();
    symlink("target/".repeat(40), source.join("link")).unwrap();
    fs::hard_link(long.join("file"), source.join("hard")).unwrap();
    let file = File::create(source.join("sparse")).unwrap();
    for index in 0..60u64 {
        file.write_all_at(&[7; 4096], index * 65_536).unwrap();
    }
    drop(file);
    run("find", &[source.to_str().unwrap(), "-exec", "touch", "-h", "-d", "2020-01-01 UTC", "{}", "+"]);
    round_trip(&source, work.path(), &["--format=gnu", "--sparse"]);
}

#[test]
fn a_file_of_more_than_4_gib() {
    let work = tempfile::tempdir().unwrap();
    let source = work.path().join("source");
    fs::create_dir(&source).unwrap();
    let file = File::create(source.join("large")).unwrap();
    file.write_all_at(b"beyond", (4 << 30) + 4090).unwrap();
    drop(file);
    let tar = work.path().join("layer.tar");
    run("tar", &["-C", source.to_str().unwrap(), "--sparse", "-cf", tar.to_str().unwrap(), "."]);
    let (image, _) = convert(File::open(&tar).unwrap(), work.path()).unwrap();
    let Some(mounted) = Mounted::new(&image) else { return };
    let file = File::open(mounted.path().join("large")).unwrap();
    assert_eq!(file.metadata().unwrap().len(), (4 << 30) + 4096);
    let mut end = [0; 10];
    file.read_exact_at(&mut end, (4 << 30) + 4086).unwrap();
    assert_eq!(&end, b"\0\0\0\0beyond");
}

#[test]
fn a_part_of_this_machine() {
    let work = tempfile::tempdir().unwrap();
    let source = work.path().join("source");
    fs::create_dir(&source).unwrap();
    for (index, tree) in
        ["/usr/share/zoneinfo", "/usr/lib/python3", "/usr/share/perl", "/etc/alternatives"].iter().enumerate()
    {
        if Path::new(tree).exists() {
            run("cp", &["-a", tree, source.join(index.to_string()).to_str().unwrap()]);
        }
    }
    round_trip(&source, work.path(), &["--format=posix"]);
}

#[test]
fn a_stream_without_its_end_marker_or_last_padding() {
    let work = tempfile::tempdir().unwrap();
    let mut tar = support::Tar::new();
    tar.directory("d").file("d/f", b"some content");
    let bytes = tar.bytes.clone();
    let mut unpadded = bytes.clone();
    unpadded.truncate(bytes.len() - 500);
    let mut images = Vec::new();
    for stream in [tar.end(), bytes, unpadded] {
        let (image, _) = convert(&stream[..], work.path()).unwrap();
        fsck(&image);
        images.push(fs::read(image).unwrap());
    }
    assert!(images.windows(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn two_layers_as_overlayfs_shows_them() {
    let work = tempfile::tempdir().unwrap();
    let (lower, upper) = layers();
    let (lower_image, _) = convert(&lower[..], work.path()).unwrap();
    let (upper_image, summary) = convert(&upper[..], work.path()).unwrap();
    assert_eq!(summary.implicit_directories, 0);
    fsck(&upper_image);
    let (merged_image, _) = support::merge(vec![&lower[..], &upper[..]], work.path(), true).unwrap();
    fsck(&merged_image);
    let (Some(lower), Some(upper), Some(merged)) =
        (Mounted::new(&lower_image), Mounted::new(&upper_image), Mounted::new(&merged_image))
    else {
        return;
    };
    let target = Mounted::overlay(&[upper.path(), lower.path()]);
    for root in [target.path(), merged.path()] {
        assert_eq!(fs::read(root.join("kept")).unwrap(), b"lower");
        assert_eq!(fs::read(root.join("replaced")).unwrap(), b"upper");
        assert!(!root.join("deleted").exists());
        assert!(!root.join("deleted-directory").exists());
        let names = |path: &str| {
            let mut names: Vec<_> =
                fs::read_dir(root.join(path)).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            names
        };
        assert_eq!(names("opaque"), ["new"]);
        assert_eq!(names("opaque/new"), ["file"]);
        assert_eq!(names("reborn"), ["new"]);
        assert!(root.join("to-file").is_file());
        assert!(root.join("to-directory").is_dir());
    }
    // Directories' link counts are overlayfs's own.
    let mut expected = look(target.path());
    let mut actual = look(merged.path());
    for seen in expected.values_mut().chain(actual.values_mut()) {
        if seen.mode & 0o170_000 == 0o040_000 {
            seen.links = 0;
        }
    }
    assert_same(&expected, &actual);
}

fn layers() -> (Vec<u8>, Vec<u8>) {
    let mut lower = support::Tar::new();
    lower.directory("./").file("kept", b"lower").file("replaced", b"lower").file("deleted", b"lower");
    lower.directory("deleted-directory").file("deleted-directory/x", b"x");
    lower.directory("opaque").file("opaque/old", b"old").directory("opaque/new").file("opaque/new/old", b"old");
    lower
        .directory("reborn")
        .file("reborn/old", b"old")
        .directory("to-file")
        .file("to-file/x", b"x")
        .file("to-directory", b"");
    let mut upper = support::Tar::new();
    upper.directory("./").file("replaced", b"upper").file(".wh.deleted", b"").file(".wh.deleted-directory", b"");
    // The marker counts for older layers only, wherever it stands.
    upper.directory("opaque").directory("opaque/new").file("opaque/new/file", b"").file("opaque/.wh..wh..opq", b"");
    upper.file(".wh.reborn", b"").directory("reborn").file("reborn/new", b"");
    upper.file("to-file", b"file").directory("to-directory").file(".wh..wh.plnk", b"");
    (lower.end(), upper.end())
}

#[test]
fn a_merge_keeps_what_docker_keeps() {
    let work = tempfile::tempdir().unwrap();
    let mut lower = support::Tar::new();
    lower.header(b"tmp", b'5', 0o1777, 0, b"");
    lower
        .directory("usr")
        .directory("usr/lib")
        .symlink("lib", "usr/lib")
        .symlink("again", "/lib/../lib")
        .file("usr/lib/a", b"a");
    let mut upper = support::Tar::new();
    // No entries for the directories: they keep their modes, and links of older layers are followed.
    upper.file("tmp/file", b"x").file("lib/b", b"b").hard_link("again/c", "usr/lib/a").file("again/d/e", b"e");
    let (lower, upper) = (lower.end(), upper.end());
    assert!(convert(&upper[..], work.path()).is_err(), "the hard link's target is in the layer below");
    let (image, _) = support::merge(vec![&lower[..], &upper[..]], work.path(), true).unwrap();
    fsck(&image);
    let Some(mounted) = Mounted::new(&image) else { return };
    let seen = look(mounted.path());
    assert_eq!(seen[Path::new("tmp")].mode & 0o7777, 0o1777);
    assert!(seen.contains_key(Path::new("usr/lib/b")) && seen.contains_key(Path::new("usr/lib/d/e")));
    assert_eq!(seen[Path::new("usr/lib/c")].same_as, Path::new("usr/lib/a"));
    assert_eq!(seen[Path::new("usr/lib/a")].links, 2);
}
