use std::os::unix::fs::symlink;

use super::*;

/// A cache with a kernel of this recipe, and that kernel's directory.
fn cache_with(manifest: &str) -> (tempfile::TempDir, Cache, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let kernel = directory.path().join("kernel-0123456789abcdef");
    std::fs::create_dir(&kernel).unwrap();
    std::fs::write(kernel.join("vmlinux"), "ELF").unwrap();
    std::fs::write(kernel.join("manifest"), manifest).unwrap();
    symlink("kernel-0123456789abcdef", directory.path().join(format!("kernel-of-{}", recipe::hash(recipe::FILES))))
        .unwrap();
    let cache = Cache { directory: directory.path().to_owned() };
    (directory, cache, kernel)
}

#[test]
fn an_empty_cache_has_no_kernel() {
    let directory = tempfile::tempdir().unwrap();
    let cache = Cache { directory: directory.path().join("not/there") };
    assert_eq!(cache.find().unwrap(), None);
}

#[test]
fn a_cached_kernel_is_found_and_described() {
    let (_keep, cache, directory) = cache_with("key=0123456789abcdef\nrelease=6.12.1-caisson\nsource=/nonexistent\n");
    let kernel = cache.find().unwrap().unwrap();
    assert_eq!(kernel.vmlinux, directory.canonicalize().unwrap().join("vmlinux"));
    assert_eq!(kernel.key, "0123456789abcdef");
    assert_eq!(kernel.release, "6.12.1-caisson");
    // No source is installed: what is there is used, and nothing is done.
    assert_eq!(cache.ensure(|line| panic!("did something: {line}")).unwrap(), kernel);
}

#[test]
fn damage_is_reported_with_the_directory() {
    let (_keep, cache, directory) = cache_with("release=6.12.1-caisson\n");
    let message = cache.find().unwrap_err().to_string();
    assert!(message.contains("has no key") && message.contains("kernel-0123456789abcdef"), "{message}");

    std::fs::write(directory.join("manifest"), "key=1\nrelease=2\n").unwrap();
    std::fs::remove_file(directory.join("vmlinux")).unwrap();
    assert!(cache.find().unwrap_err().to_string().contains("no vmlinux"));
}

#[test]
fn an_upgraded_source_is_noticed() {
    let source = tempfile::NamedTempFile::new().unwrap();
    let metadata = source.as_file().metadata().unwrap();
    let manifest = |size: u64| {
        parse_manifest(&format!(
            "source={}\nsource_size={size}\nsource_mtime={}\n",
            source.path().display(),
            metadata.mtime()
        ))
    };
    assert!(!source_changed(&manifest(0)));
    assert!(source_changed(&manifest(17)));
    assert!(!source_changed(&parse_manifest("source=/nonexistent\nsource_size=1\n")));
}

#[test]
fn messages_are_bounded() {
    assert_eq!(message(b"guest-kernel/build: no\n"), "no");
    assert!(message(&vec![b'x'; 100_000]).len() <= MAX_MESSAGE_BYTES);
}
