//! Images that umoci, skopeo and podman write are imported, and they read what we write.
#![allow(clippy::unwrap_used, clippy::expect_used, unreachable_pub, dead_code)]

mod common;

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};

use caisson_images::import::{ImportError, ImportOptions, import_path, import_stream};
use caisson_images::save::Format;
use caisson_images::{Image, Store};
use common::{run, skopeo_copy, try_run, umoci_layout};

fn greeting(store: &Store, image: &Image) -> String {
    let mut archive = tar::Archive::new(store.layer_tar(&image.layers[1]).unwrap());
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        if entry.path().unwrap().ends_with("etc/greeting") {
            let mut text = String::new();
            entry.read_to_string(&mut text).unwrap();
            return text;
        }
    }
    panic!("the second layer has no greeting");
}

fn check(store: &Store, image: &Image) {
    assert_eq!(image.layers.len(), 2);
    assert_eq!(greeting(store, image), "hello\n");
    let config = image.config.config().as_ref().unwrap();
    assert_eq!(config.cmd().as_deref(), Some(["/bin/sh".to_owned()].as_slice()));
    assert_eq!(config.working_dir().as_deref(), Some("/etc"));
    for layer in &image.layers {
        store.verify_layer(layer).unwrap();
    }
}

fn is_empty(store: &Store) -> bool {
    let count = |sub: &str| fs::read_dir(store.directory().join(sub)).unwrap().count();
    count("blobs/sha256") == 0 && count("tmp") == 0
}

#[test]
fn what_the_tools_write_is_imported_and_they_read_it_back() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).display().to_string();
    let layout = umoci_layout(directory.path());
    let source = format!("oci:{layout}:latest");
    skopeo_copy(&[], &source, &format!("oci-archive:{}:example.test/app:oci", at("app-oci.tar")));
    skopeo_copy(&[], &source, &format!("docker-archive:{}:example.test/app:docker", at("app-docker.tar")));
    skopeo_copy(&["--dest-compress-format", "zstd"], &source, &format!("oci:{}:v2", at("zstd")));

    let store = Store::open(directory.path().join("store")).unwrap();
    let import = |name: &str| {
        let images = import_path(&store, Path::new(name), &ImportOptions::default()).unwrap();
        assert_eq!(images.len(), 1);
        images.into_iter().next().unwrap()
    };
    for (name, reference) in [
        (layout.as_str(), "busybox:latest"),
        (&at("app-oci.tar"), "example.test/app:oci"),
        (&at("app-docker.tar"), "example.test/app:docker"),
        (&at("zstd"), "zstd:v2"),
    ] {
        let image = import(name);
        assert_eq!(image.references.iter().map(|name| name.familiar()).collect::<Vec<_>>(), [reference], "{name}");
        check(&store, &image);
        check(&store, &store.resolve(reference).unwrap());
    }
    // The same image by any way has the same id.
    let id = store.resolve("busybox").unwrap().id();
    assert_eq!(store.resolve("example.test/app:docker").unwrap().id(), id);

    // Again, from a pipe.
    let mut cat = Command::new("cat").arg(at("app-docker.tar")).stdout(Stdio::piped()).spawn().unwrap();
    let options = ImportOptions { reference: Some("piped:1".parse().unwrap()), stem: None };
    let images = import_stream(&store, cat.stdout.take().unwrap(), "the standard input", &options).unwrap();
    assert_eq!(images[0].references, [options.reference.unwrap()]);
    assert!(cat.wait().unwrap().success());

    // skopeo reads the store in place, and what we save.
    let in_place = format!("oci:{}:docker.io/library/busybox:latest", store.directory().display());
    let inspected: serde_json::Value = serde_json::from_str(&run("skopeo", &["inspect", &in_place])).unwrap();
    assert_eq!(inspected["Layers"].as_array().unwrap().len(), 2);
    let images: Vec<_> =
        ["busybox", "zstd:v2", "example.test/app:docker"].map(|name| (store.resolve(name).unwrap(), None)).into();
    for (format, transport, file, name) in [
        (Format::DockerArchive, "docker-archive", "saved-docker.tar", "zstd:v2"),
        (Format::OciArchive, "oci-archive", "saved-oci.tar", "docker.io/library/zstd:v2"),
    ] {
        store.save(&images, format, File::create(at(file)).unwrap()).unwrap();
        let from = format!("{transport}:{}:{name}", at(file));
        let inspected: serde_json::Value =
            serde_json::from_str(&run("skopeo", &["inspect", "--config", &from])).unwrap();
        assert_eq!(inspected["config"]["WorkingDir"], "/etc");
        skopeo_copy(&[], &from, &format!("dir:{}", at(&format!("copied-{file}"))));
        // And so do we, several images at once.
        let other = Store::open(directory.path().join(format!("store-{file}"))).unwrap();
        let images = import_path(&other, Path::new(&at(file)), &ImportOptions::default()).unwrap();
        assert_eq!(images.len(), 3);
        for image in other.list().unwrap() {
            check(&other, &image);
        }
        let refused = import_path(
            &other,
            Path::new(&at(file)),
            &ImportOptions { reference: Some("x".parse().unwrap()), stem: None },
        );
        assert!(matches!(refused, Err(ImportError::Several { count: 3, .. })));
    }
    // Saving is reproducible.
    let again = at("again.tar");
    store.save(&images, Format::DockerArchive, File::create(&again).unwrap()).unwrap();
    assert!(fs::read(again).unwrap() == fs::read(at("saved-docker.tar")).unwrap());
}

#[test]
fn podman_writes_and_reads() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).display().to_string();
    let layout = umoci_layout(directory.path());
    let (root, runroot) = (at("podman"), at("podman-run"));
    let podman = |arguments: &[&str]| {
        let mut all = vec!["--root", &root, "--runroot", &runroot, "--storage-driver", "vfs"];
        all.extend(arguments);
        run("podman", &all)
    };
    skopeo_copy(&[], &format!("oci:{layout}:latest"), &format!("docker-archive:{}:localhost/app:1", at("app.tar")));
    podman(&["load", "-q", "-i", &at("app.tar")]);
    podman(&["tag", "localhost/app:1", "localhost/app:2"]);
    podman(&["save", "-q", "-o", &at("podman.tar"), "localhost/app:1"]);
    podman(&["save", "-q", "--format", "oci-archive", "-o", &at("podman-oci.tar"), "localhost/app:1"]);
    podman(&["save", "-q", "-m", "-o", &at("podman-several.tar"), "localhost/app:1", "localhost/app:2"]);
    for name in ["podman.tar", "podman-oci.tar", "podman-several.tar"] {
        let store = Store::open(at(&format!("store-{name}"))).unwrap();
        let images = import_path(&store, Path::new(&at(name)), &ImportOptions::default()).unwrap();
        assert!(!images.is_empty());
        check(&store, &store.resolve("localhost/app:1").unwrap());
        let back = at(&format!("back-{name}"));
        let image = store.resolve("localhost/app:1").unwrap();
        store
            .save(
                &[(image, Some(vec!["localhost/back:1".parse().unwrap()]))],
                Format::DockerArchive,
                File::create(&back).unwrap(),
            )
            .unwrap();
        podman(&["load", "-q", "-i", &back]);
        podman(&["image", "exists", "localhost/back:1"]);
    }
    try_run("podman", &["--root", &root, "--runroot", &runroot, "--storage-driver", "vfs", "rmi", "-fa"]);
}

#[test]
fn damaged_archives_leave_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let layout = umoci_layout(directory.path());
    let source = format!("oci:{layout}:latest");
    for (transport, name) in [("oci-archive", "oci.tar"), ("docker-archive", "docker.tar")] {
        skopeo_copy(&[], &source, &format!("{transport}:{}:example.test/app:1", at(name).display()));
        let good = fs::read(at(name)).unwrap();
        let store = Store::open(at(&format!("store-{name}"))).unwrap();
        // Cut short, at many places; and with one byte changed, at as many.
        for part in 1..24 {
            let cut = good.len() * part / 24 / 512 * 512 + 7;
            let failure =
                import_stream(&store, std::io::Cursor::new(good[..cut].to_vec()), "cut", &ImportOptions::default());
            // The last part may be what follows the end.
            if cut + 12_000 < good.len() {
                failure.unwrap_err();
                assert!(is_empty(&store), "cut at {cut}");
            }
            let mut bad = good.clone();
            bad[cut] ^= 0x55;
            if import_stream(&store, std::io::Cursor::new(bad), "bad", &ImportOptions::default()).is_ok() {
                // Where nobody looks: padding, times, owners.
                store.remove("example.test/app:1", false).unwrap();
            }
            assert!(is_empty(&store), "damaged at {cut}");
        }
    }
    // A layout with a blob that is missing, a pipe for a blob, a wrong size, and no index.
    let blobs = format!("{layout}/blobs/sha256");
    let store = Store::open(at("store-dir")).unwrap();
    let import = || import_path(&store, Path::new(&layout), &ImportOptions::default());
    let largest = fs::read_dir(&blobs)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .max_by_key(|path| path.metadata().unwrap().len())
        .unwrap();
    let good = fs::read(&largest).unwrap();
    fs::write(&largest, &good[1..]).unwrap();
    import().unwrap_err();
    fs::remove_file(&largest).unwrap();
    assert!(matches!(import(), Err(ImportError::Incomplete { .. })));
    run("mkfifo", &[largest.to_str().unwrap()]);
    assert!(matches!(import(), Err(ImportError::Read { .. })));
    fs::remove_file(&largest).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", &largest).unwrap();
    assert!(matches!(import(), Err(ImportError::Read { .. })));
    fs::remove_file(format!("{layout}/index.json")).unwrap();
    assert!(matches!(import(), Err(ImportError::NoImage { .. })));
    assert!(is_empty(&store));
}
