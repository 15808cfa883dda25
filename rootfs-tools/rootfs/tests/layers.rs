//! The cache of converted layers.
#![allow(clippy::unwrap_used)]
mod support;
use caisson_rootfs::layers::{LayerCache, LayerError, Stream};
use sha2::{Digest, Sha256};
use std::fs;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use support::{Tar, fsck};

fn diff_id(stream: &[u8]) -> String {
    let digits: String = Sha256::digest(stream).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{digits}")
}

fn open(stream: &[u8]) -> io::Result<Stream> {
    Ok(Box::new(io::Cursor::new(stream.to_vec())))
}

fn names(directory: &std::path::Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != "locks")
        .collect();
    names.sort();
    names
}

#[test]
fn a_layer_is_converted_once_listed_and_removed() {
    let directory = tempfile::tempdir().unwrap();
    let cache = LayerCache::open(directory.path()).unwrap();
    let stream = Tar::new().file("f", b"content").end();
    let id = diff_id(&stream);
    let mut told = 0;
    let path = cache.ensure(&id, || open(&stream), &mut |bytes| told = bytes).unwrap();
    assert_eq!(told, stream.len() as u64);
    fsck(&path);
    let again = cache.ensure(&id, || panic!("it is there"), &mut |_| {}).unwrap();
    assert_eq!(path, again);
    let list = cache.list().unwrap();
    assert_eq!(list.len(), 1);
    assert_eq!((list[0].diff_id.as_ref(), &list[0].path), (Some(&id), &path));
    assert!(cache.disk_bytes().unwrap() > 0);
    cache.remove(&id).unwrap();
    cache.remove(&id).unwrap();
    assert!(names(directory.path()).is_empty());
}

#[test]
fn many_at_once_convert_once() {
    let directory = tempfile::tempdir().unwrap();
    let stream = Tar::new().file("f", &[5; 100_000]).end();
    let id = diff_id(&stream);
    let opened = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let cache = LayerCache::open(directory.path()).unwrap();
                let counted = || {
                    opened.fetch_add(1, Ordering::SeqCst);
                    open(&stream)
                };
                fsck(&cache.ensure(&id, counted, &mut |_| {}).unwrap());
            });
        }
    });
    assert_eq!(opened.load(Ordering::SeqCst), 1);
    assert_eq!(names(directory.path()).len(), 1);
}

#[test]
fn wrong_digests_and_bad_streams_leave_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let cache = LayerCache::open(directory.path()).unwrap();
    let stream = Tar::new().file("f", b"content").end();
    let other = diff_id(b"other");
    let error = cache.ensure(&other, || open(&stream), &mut |_| {}).unwrap_err();
    let mut text = String::new();
    let mut source: Option<&dyn std::error::Error> = Some(&error);
    while let Some(error) = source {
        text += &error.to_string();
        source = error.source();
    }
    assert!(text.contains(&other) && text.contains(&diff_id(&stream)), "{text}");
    assert!(cache.ensure(&other, || open(&stream[..700]), &mut |_| {}).is_err());
    assert!(cache.ensure(&other, || Err(io::Error::other("gone")), &mut |_| {}).is_err());
    assert!(names(directory.path()).is_empty());
    for bad in ["", "sha256:", "sha256:../../etc/passwd", "md5:00", &other.to_uppercase(), &format!("{other}0")] {
        assert!(matches!(cache.ensure(bad, || open(&stream), &mut |_| {}), Err(LayerError::DiffId(_))), "{bad}");
    }
}

#[test]
fn what_a_killed_conversion_left_is_removed_and_a_running_ones_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let cache = LayerCache::open(directory.path()).unwrap();
    let stream = Tar::new().file("f", b"content").end();
    let id = diff_id(&stream);
    let during = || {
        assert_eq!(names(directory.path()).iter().filter(|name| name.ends_with(".tmp")).count(), 1);
        LayerCache::open(directory.path()).unwrap();
        assert_eq!(names(directory.path()).iter().filter(|name| name.ends_with(".tmp")).count(), 1);
        open(&stream)
    };
    cache.ensure(&id, during, &mut |_| {}).unwrap();
    fs::write(directory.path().join("sha256-00-v1.erofs.tmp"), b"half").unwrap();
    LayerCache::open(directory.path()).unwrap();
    assert_eq!(names(directory.path()).len(), 1);
}

#[test]
fn layers_are_stacked_or_merged() {
    let directory = tempfile::tempdir().unwrap();
    let cache = LayerCache::open(directory.path()).unwrap();
    let plain: Vec<Vec<u8>> = (0..4).map(|index| Tar::new().file(&format!("f{index}"), b"x").end()).collect();
    let ids: Vec<String> = plain.iter().map(|stream| diff_id(stream)).collect();
    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    let stack = |ids: &[&str], most, streams: &[Vec<u8>]| {
        cache.stack(ids, most, &mut |at| open(&streams[at]), &mut |_| {}).unwrap()
    };
    assert_eq!(stack(&ids, 4, &plain).len(), 4);
    let merged = stack(&ids, 3, &plain);
    assert_eq!(merged.len(), 1);
    fsck(&merged[0]);
    assert_eq!(stack(&ids, 3, &plain), merged);
    // The upper layer has something in a directory that only the lower one describes.
    let dependent = [Tar::new().directory("tmp").end(), Tar::new().file("tmp/x", b"").end()];
    let ids = [diff_id(&dependent[0]), diff_id(&dependent[1])];
    assert_eq!(stack(&[&ids[0], &ids[1]], 8, &dependent).len(), 1);
    assert!(matches!(cache.stack(&[], 8, &mut |_| open(b""), &mut |_| {}), Err(LayerError::NoLayers)));
}
