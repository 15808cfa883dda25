#![allow(clippy::unwrap_used, clippy::expect_used)]
use std::io::BufRead;
use std::process::{Command, Stdio};

use super::*;
use crate::layer::Compression;

fn config() -> serde_json::Value {
    serde_json::json!({ "architecture": "amd64", "os": "linux", "config": { "Cmd": ["/bin/sh"] }, "rootfs": { "type": "layers", "diff_ids": [] } })
}

/// A tar stream of one file.
fn tar_of(content: &[u8]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    builder.append_data(&mut header, "file", content).unwrap();
    builder.into_inner().unwrap()
}

fn make(store: &Store, contents: &[&str], name: Option<&str>) -> Image {
    let mut builder = store.create_image().unwrap();
    for content in contents {
        builder.add_layer_tar(&mut tar_of(content.as_bytes()).as_slice(), Compression::Gzip).unwrap();
    }
    let references: Vec<Reference> = name.iter().map(|name| name.parse().unwrap()).collect();
    builder.finish(&config(), &references).unwrap()
}

fn count(store: &Store, sub: &str) -> usize {
    fs::read_dir(store.directory().join(sub)).unwrap().count()
}

/// Each image is whole, and nothing is here that no image needs.
fn check_whole(store: &Store) {
    for image in store.list().unwrap() {
        for layer in &image.layers {
            store.verify_layer(layer).unwrap();
        }
    }
    let usage = store.disk_usage().unwrap();
    assert_eq!(usage.reclaimable_bytes, 0);
    assert_eq!(count(store, "tmp"), 0);
}

#[test]
fn an_image_is_made_found_tagged_and_removed() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path().join("deep/er")).unwrap();
    let image = make(&store, &["one", "two"], Some("busybox"));
    for name in [
        "busybox",
        "docker.io/library/busybox:latest",
        &image.id().hex()[..6],
        &image.id().to_string(),
        &image.digest.short(),
    ] {
        assert_eq!(store.resolve(name).unwrap().id(), image.id(), "{name}");
    }
    let by_digest = format!("busybox@{}", image.digest);
    assert_eq!(store.resolve(&by_digest).unwrap().id(), image.id());
    assert!(matches!(store.resolve("nginx"), Err(StoreError::NotFound { .. })));
    assert!(matches!(store.resolve("UPPER"), Err(StoreError::Reference(_))));
    store.tag("busybox", &"mine/app:1".parse().unwrap()).unwrap();
    assert_eq!(store.resolve("mine/app:1").unwrap().references.len(), 2);
    assert_eq!(store.list().unwrap().len(), 1);
    // An id with two references is not enough.
    assert!(matches!(store.remove(&image.id().hex(), false), Err(StoreError::SeveralReferences { .. })));
    let removed = store.remove("busybox", false).unwrap();
    assert_eq!(removed.deleted, None);
    assert_eq!(count(&store, "blobs/sha256"), 4);
    let removed = store.remove("mine/app:1", false).unwrap();
    assert_eq!(removed.deleted, Some(image.digest));
    assert_eq!(removed.freed.blobs, 4);
    assert_eq!(count(&store, "blobs/sha256"), 0);
    check_whole(&store);
}

#[test]
fn blobs_that_images_share_stay() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    make(&store, &["base"], Some("a"));
    make(&store, &["base", "more"], Some("b"));
    assert_eq!(count(&store, "blobs/sha256"), 6);
    store.remove("a", false).unwrap();
    store.verify_layer(&store.resolve("b").unwrap().layers[0]).unwrap();
    assert_eq!(count(&store, "blobs/sha256"), 4);
    check_whole(&store);
}

#[test]
fn a_reference_moves_and_a_dangling_image_is_pruned() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    let old = make(&store, &["old"], Some("app"));
    make(&store, &["new"], Some("app"));
    assert_eq!(store.list().unwrap().len(), 2);
    assert!(store.resolve(&old.id().hex()).unwrap().references.is_empty());
    assert_eq!(store.disk_usage().unwrap().dangling, 1);
    assert_eq!(store.prune().unwrap().blobs, 3);
    assert_eq!(store.list().unwrap().len(), 1);
    check_whole(&store);
}

#[test]
fn what_is_pinned_stays() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    let image = make(&store, &["x"], Some("app"));
    store.pin("container-1", &[image.top.digest]).unwrap();
    match store.remove("app", false) {
        Err(StoreError::InUse { by, .. }) => assert_eq!(by, "container-1"),
        other => panic!("{other:?}"),
    }
    store.remove("app", true).unwrap();
    assert_eq!(store.prune().unwrap(), Freed::default());
    store.verify_layer(&image.layers[0]).unwrap();
    assert_eq!(store.unpin("container-1").unwrap().blobs, 3);
    assert_eq!(count(&store, "blobs/sha256"), 0);
    assert!(matches!(store.pin("../x", &[]), Err(StoreError::PinName(_))));
    assert!(matches!(store.pin("x", &[image.digest]), Err(StoreError::MissingBlob { .. })));
    assert_eq!(store.unpin("x").unwrap(), Freed::default());
}

#[test]
fn an_unfinished_transaction_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    let mut builder = store.create_image().unwrap();
    builder.add_layer_tar(&mut tar_of(b"x").as_slice(), Compression::Zstd).unwrap();
    assert_eq!(count(&store, "blobs/sha256"), 1);
    // Collection beside it, and another opening, leave it alone.
    assert_eq!(store.prune().unwrap().blobs, 0);
    let again = Store::open(directory.path()).unwrap();
    assert_eq!(count(&again, "blobs/sha256"), 1);
    assert_eq!(count(&again, "tmp"), 1);
    drop(builder);
    assert_eq!(count(&store, "blobs/sha256"), 0);
    check_whole(&store);
}

#[test]
fn a_blob_is_checked_before_it_has_its_name() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    let transaction = store.begin().unwrap();
    let digest = Digest::of(b"right");
    let mut writer = transaction.writer("b", Some(digest), Some(5)).unwrap();
    writer.put(b"wrong").unwrap();
    assert!(matches!(writer.finish(), Err(StoreError::WrongDigest { .. })));
    let mut writer = transaction.writer("b", Some(digest), Some(5)).unwrap();
    writer.put(b"righ").unwrap();
    assert!(matches!(writer.finish(), Err(StoreError::WrongSize { expected: 5, found: 4, .. })));
    let mut writer = transaction.writer("b", Some(digest), Some(5)).unwrap();
    assert!(matches!(writer.put(b"right!"), Err(StoreError::WrongSize { .. })));
    drop(writer);
    assert!(transaction.writer("b", Some(digest), Some(u64::MAX)).is_err());
    assert_eq!(count(&store, "blobs/sha256"), 0);
    let mut writer = transaction.writer("b", Some(digest), Some(5)).unwrap();
    writer.put(b"wro").unwrap();
    writer.restart().unwrap();
    writer.put(b"right").unwrap();
    assert_eq!(writer.finish().unwrap(), (digest, 5));
    assert_eq!(store.read_blob(&digest, 5).unwrap(), b"right");
    assert!(matches!(store.read_blob(&digest, 4), Err(StoreError::TooLong { .. })));
}

#[test]
fn damage_is_noticed() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    let image = make(&store, &["x"], Some("app"));
    fs::write(store.blob_path(&image.layers[0].digest), tar_of(b"y")).unwrap();
    assert!(store.verify_layer(&image.layers[0]).is_err());
    fs::write(store.blob_path(&image.config_digest), b"{}").unwrap();
    assert!(store.resolve("app").is_err());
    // It can still be removed.
    store.remove("app", false).unwrap();
    assert!(store.list().unwrap().is_empty());
    fs::write(directory.path().join("oci-layout"), b"{}").unwrap();
    assert!(matches!(Store::open(directory.path()), Err(StoreError::Corrupt { .. })));
}

#[test]
fn many_write_at_once() {
    let directory = tempfile::tempdir().unwrap();
    std::thread::scope(|scope| {
        for number in 0..8 {
            let path = directory.path();
            scope.spawn(move || {
                let store = Store::open(path).unwrap();
                for round in 0..3 {
                    make(&store, &["shared", &format!("{number} {round}")], Some(&format!("app{number}:{round}")));
                    if round == 1 {
                        store.remove(&format!("app{number}:0"), false).unwrap();
                        store.prune().unwrap();
                    }
                    store.list().unwrap();
                }
            });
        }
    });
    let store = Store::open(directory.path()).unwrap();
    assert_eq!(store.list().unwrap().len(), 16);
    check_whole(&store);
}

const CHILD: &str = "CAISSON_IMAGES_TEST_CHILD";

/// Not a test: what the next ones run as another process, to kill it.
#[test]
fn child_that_is_killed() {
    let Ok(directory) = std::env::var(CHILD) else {
        return;
    };
    let store = Store::open(directory).unwrap();
    for round in 0.. {
        let transaction = store.begin().unwrap();
        transaction.add_bytes("orphan", format!("orphan {round}").as_bytes()).unwrap();
        let mut half = transaction.writer("half", None, None).unwrap();
        half.put(b"half of it").unwrap();
        println!("ready");
        drop(half);
        drop(transaction);
        make(&store, &["kept", &round.to_string()], Some("app"));
        store.prune().unwrap();
    }
}

#[test]
fn a_killed_process_leaves_a_good_store() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    make(&store, &["mine"], Some("mine"));
    for round in 0..6 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "store::tests::child_that_is_killed", "--nocapture"])
            .env(CHILD, directory.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = std::io::BufReader::new(child.stdout.take().unwrap()).lines();
        // Somewhere in its work, at another place each time.
        let mut ready = 0;
        while ready <= round && lines.next().expect("the child ended").unwrap().contains("ready") || ready == 0 {
            ready += 1;
        }
        std::thread::sleep(std::time::Duration::from_millis(3 * round));
        child.kill().unwrap();
        child.wait().unwrap();
        let store = Store::open(directory.path()).unwrap();
        check_whole(&store);
        store.resolve("mine").unwrap();
        store.remove("app", false).ok();
    }
}
