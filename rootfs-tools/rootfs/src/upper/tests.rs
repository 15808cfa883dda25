#![allow(clippy::unwrap_used)]
use super::*;
use std::os::unix::fs::MetadataExt;

fn fsck(image: &Path) {
    let output = Command::new("/usr/sbin/e2fsck").args(["-f", "-n"]).arg(image).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

fn features(image: &Path) -> String {
    let output = Command::new("/usr/sbin/dumpe2fs").arg("-h").arg(image).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn both_kinds_are_sound_sparse_and_have_their_directories() {
    let directory = tempfile::tempdir().unwrap();
    let cache = UpperCache::open(directory.path().join("cache")).unwrap();
    for kind in [Kind::Throwaway, Kind::Kept] {
        let image = directory.path().join(kind.name());
        cache.create(kind, DEFAULT_SIZE_BYTES, &image).unwrap();
        fsck(&image);
        let metadata = fs::metadata(&image).unwrap();
        assert_eq!(metadata.len(), DEFAULT_SIZE_BYTES);
        assert!(metadata.blocks() * 512 < 4 << 20, "{kind:?}: {} bytes are allocated", metadata.blocks() * 512);
        let listing = Command::new("/usr/sbin/debugfs").args(["-R", "ls -p /"]).arg(&image).output().unwrap();
        let listing = String::from_utf8(listing.stdout).unwrap();
        assert!(listing.contains("/040755/0/0/upper/") && listing.contains("/040755/0/0/work/"), "{listing}");
        let about = features(&image);
        assert_eq!(about.contains("has_journal"), kind == Kind::Kept);
        assert!(!about.contains("metadata_csum") && !about.contains("uninit_bg"));
        assert!(about.contains("no_prefetch_block_bitmaps"), "{about}");
    }
}

#[test]
fn the_formatted_image_is_made_once_and_copies_are_apart() {
    let directory = tempfile::tempdir().unwrap();
    let cache = UpperCache::open(directory.path().join("cache")).unwrap();
    let (first, second) = (directory.path().join("first"), directory.path().join("second"));
    cache.create(Kind::Throwaway, 64 << 20, &first).unwrap();
    let made = fs::metadata(directory.path().join("cache/throwaway-67108864-v1.ext4")).unwrap();
    fs::write(&first, b"spoilt").unwrap();
    cache.create(Kind::Throwaway, 64 << 20, &second).unwrap();
    fsck(&second);
    let again = fs::metadata(directory.path().join("cache/throwaway-67108864-v1.ext4")).unwrap();
    assert_eq!(made.ino(), again.ino());
}

#[test]
fn the_smallest_size_works_and_others_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let cache = UpperCache::open(directory.path()).unwrap();
    for kind in [Kind::Throwaway, Kind::Kept] {
        let image = directory.path().join(format!("small-{}", kind.name()));
        cache.create(kind, MIN_SIZE_BYTES, &image).unwrap();
        fsck(&image);
    }
    let image = directory.path().join("none");
    for size in [0, MIN_SIZE_BYTES - 1, MAX_SIZE_BYTES + 1, u64::MAX] {
        assert!(matches!(cache.create(Kind::Kept, size, &image), Err(UpperError::Size(_))));
        assert!(!image.exists());
    }
}

#[test]
fn an_existing_destination_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let cache = UpperCache::open(directory.path()).unwrap();
    let image = directory.path().join("mine");
    fs::write(&image, b"mine").unwrap();
    assert!(cache.create(Kind::Throwaway, MIN_SIZE_BYTES, &image).is_err());
    assert_eq!(fs::read(&image).unwrap(), b"mine");
}
