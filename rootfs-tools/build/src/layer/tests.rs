#![allow(clippy::unwrap_used)]
use super::*;
use crate::tree::{Changes, Content, Kind, Node, View};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

fn sample() -> Changes {
    let base = Node { mtime_s: 1_700_000_000, ..Node::directory(0o644) };
    let bytes = |text: &str| Kind::File { size: text.len() as u64, content: Content::Bytes(text.as_bytes().into()) };
    let mut changes = Changes::default();
    let mut add = |path: &str, node: Node| {
        let node = Arc::new(node);
        changes.added.insert(PathBuf::from(path), Arc::clone(&node));
        node
    };
    add("d", Node { kind: Kind::Directory, mode: 0o1777, uid: 5, ..base.clone() });
    let file = add("d/file", Node { kind: bytes("content"), mode: 0o4755, ..base.clone() });
    add("d/long", Node { kind: Kind::Symlink("t".repeat(150).into()), ..base.clone() });
    add(&format!("{}/é", "x".repeat(120)), Node { kind: bytes(&"y".repeat(700)), ..base.clone() });
    add("null", Node { kind: Kind::Char { major: 1, minor: 3 }, uid: 3_000_000, ..base.clone() });
    add("pipe", Node { kind: Kind::Fifo, mtime_s: -5, ..base.clone() });
    let xattrs = [("security.capability".to_owned(), vec![1, 0, 10, b'\n', 0])].into();
    add("ping", Node { kind: bytes(""), xattrs, ..base });
    changes.added.insert("d/link".into(), file);
    changes.removed.insert("gone".into());
    changes.removed.insert("d/gone".into());
    changes.opaque.insert("d".into());
    changes
}

fn tar_of(changes: &Changes, latest: Option<i64>) -> Vec<u8> {
    let mut bytes = Vec::new();
    write(changes, latest, &mut bytes).unwrap();
    bytes
}

fn file_of(bytes: &[u8]) -> std::fs::File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    file
}

#[test]
fn what_is_written_is_read() {
    let changes = sample();
    let bytes = tar_of(&changes, None);
    assert_eq!(bytes, tar_of(&changes, None));
    let back = read(file_of(&bytes)).unwrap();
    assert_eq!(back.removed, changes.removed);
    assert_eq!(back.opaque, changes.opaque);
    assert_eq!(back.added.len(), changes.added.len());
    assert!(Arc::ptr_eq(&back.added[Path::new("d/file")], &back.added[Path::new("d/link")]));
    for (path, node) in &changes.added {
        let found = &back.added[path];
        assert_eq!(
            (found.mode, found.uid, found.gid, found.mtime_s),
            (node.mode, node.uid, node.gid, node.mtime_s),
            "{path:?}"
        );
        assert_eq!(found.xattrs, node.xattrs);
        match (&found.kind, &node.kind) {
            (Kind::File { size, content }, Kind::File { size: size2, content: content2 }) => {
                let (mut a, mut b) = (Vec::new(), Vec::new());
                content.open(*size).unwrap().read_to_end(&mut a).unwrap();
                content2.open(*size2).unwrap().read_to_end(&mut b).unwrap();
                assert_eq!(a, b, "{path:?}");
            }
            (a, b) => assert_eq!(format!("{a:?}"), format!("{b:?}")),
        }
    }
    // A layer read and written again is the same layer.
    assert_eq!(tar_of(&back, None), bytes);
    let clamped = read(file_of(&tar_of(&changes, Some(1000)))).unwrap();
    assert_eq!(clamped.added[Path::new("d")].mtime_s, 1000);
    assert_eq!(clamped.added[Path::new("pipe")].mtime_s, -5);
}

#[test]
fn gnu_tar_agrees() {
    let directory = tempfile::tempdir().unwrap();
    let archive = directory.path().join("layer.tar");
    std::fs::write(&archive, tar_of(&sample(), None)).unwrap();
    let output = Command::new("tar").args(["--numeric-owner", "-tvf"]).arg(&archive).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{output:?}");
    assert!(text.contains("d/link link to d/file"), "{text}");
    assert!(text.contains("1,3"), "{text}");
    assert!(text.contains(&"t".repeat(150)), "{text}");
    // And what GNU tar makes is read: long names, owners, links, directories.
    let tree = directory.path().join("tree");
    let long = tree.join("n".repeat(200));
    std::fs::create_dir_all(&long).unwrap();
    std::fs::write(long.join("file"), "text").unwrap();
    std::fs::hard_link(long.join("file"), tree.join("a-link")).unwrap();
    for format in ["gnu", "pax", "oldgnu"] {
        let output = Command::new("tar")
            .arg("-C")
            .arg(&tree)
            .arg(format!("--format={format}"))
            .arg("-cf")
            .arg(&archive)
            .arg(".")
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        let changes = read_archive(std::fs::File::open(&archive).unwrap()).unwrap();
        let mut view = View::default();
        view.apply(&changes);
        let node = view.get(&Path::new(&"n".repeat(200)).join("file")).unwrap();
        let Kind::File { size, content } = &node.kind else { unreachable!() };
        let mut text = String::new();
        content.open(*size).unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "text");
        assert!(Arc::ptr_eq(node, view.get(Path::new("a-link")).unwrap()));
    }
}

#[test]
fn compressed_archives_are_recognized() {
    let directory = tempfile::tempdir().unwrap();
    let tar = tar_of(&sample(), None);
    assert_eq!(archive_kind(&tar), Some(Archive::Tar));
    assert_eq!(archive_kind(&[0; 512]), None);
    assert_eq!(archive_kind(b"plain text"), None);
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(&tar).unwrap();
    for packed in [encoder.finish().unwrap(), zstd::encode_all(tar.as_slice(), 1).unwrap(), tar.clone()] {
        let mut unpacked = Vec::new();
        uncompressed(file_of(&packed), directory.path()).unwrap().read_to_end(&mut unpacked).unwrap();
        assert_eq!(unpacked, tar);
    }
    assert!(matches!(uncompressed(file_of(b"BZh9..."), directory.path()), Err(LayerError::Compression("bzip2"))));
}

#[test]
fn names_stay_inside_and_links_need_targets() {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(0);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.as_gnu_mut().unwrap().name[..10].copy_from_slice(b"../../evil");
    header.set_cksum();
    builder.append(&header, std::io::empty()).unwrap();
    let changes = read(file_of(&builder.into_inner().unwrap())).unwrap();
    assert_eq!(changes.added.keys().collect::<Vec<_>>(), [Path::new("evil")]);

    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Link);
    header.set_size(0);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    builder.append_link(&mut header, "a", "nothing").unwrap();
    let error = read(file_of(&builder.into_inner().unwrap())).unwrap_err();
    assert!(matches!(error, LayerError::Link { .. }), "{error}");
}
