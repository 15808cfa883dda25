//! The image that is built in: `busybox`, assembled when it is asked for from Debian's static busybox, so that the first command needs
//! no registry and no image is kept in the repository.
use std::{fs, io, path::Path, process::Command};

use caisson_images::{Image, Reference, Store, layer::Compression, store::StoreError};
use serde_json::json;

/// Where Debian's busybox-static installs it.
const BUSYBOX: &str = "/bin/busybox";
/// The names under which the image is known.
const NAMES: [&str; 2] = ["busybox", "busybox:latest"];

/// Why the built-in image cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum BuiltinError {
    /// There is no busybox.
    #[error("the built-in image is made of a static {BUSYBOX}, which is not there: apt-get install busybox-static")]
    NoBusybox(#[source] io::Error),
    /// It is not static.
    #[error("{BUSYBOX} is not statically linked, so it cannot run alone: apt-get install busybox-static")]
    NotStatic,
    /// The layer cannot be written.
    #[error("cannot assemble the built-in image")]
    Assemble(#[source] io::Error),
    /// The store refuses it.
    #[error("cannot store the built-in image")]
    Store(#[from] StoreError),
}

/// Whether a name means the built-in image, if the store has none of that name.
pub fn is_builtin(name: &str) -> bool {
    NAMES.contains(&name)
}

/// Assembles the image and puts it into the store.
pub fn make(store: &Store) -> Result<Image, BuiltinError> {
    let binary = fs::read(BUSYBOX).map_err(BuiltinError::NoBusybox)?;
    if !is_static(&binary) {
        return Err(BuiltinError::NotStatic);
    }
    let applets = Command::new(BUSYBOX).arg("--list").output().map_err(BuiltinError::NoBusybox)?;
    let applets = String::from_utf8_lossy(&applets.stdout).into_owned();
    let layer = layer(&binary, applets.lines()).map_err(BuiltinError::Assemble)?;
    let mut builder = store.create_image()?;
    builder.add_layer_tar(&mut layer.as_slice(), Compression::None)?;
    let config = json!({
        "created": "1970-01-01T00:00:00Z",
        "architecture": "amd64",
        "os": "linux",
        "config": {"Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"], "Cmd": ["sh"]},
        "history": [{"created": "1970-01-01T00:00:00Z", "created_by": "caisson: built-in image of Debian's busybox-static"}],
    });
    let reference: Reference = "busybox:latest".parse().map_err(StoreError::Reference)?;
    Ok(builder.finish(&config, &[reference])?)
}

/// Whether an ELF file has no PT_INTERP program header.
fn is_static(binary: &[u8]) -> bool {
    let number = |at: usize, length: usize| {
        binary
            .get(at..at + length)
            .map(|bytes| bytes.iter().rev().fold(0_usize, |sum, byte| sum << 8 | usize::from(*byte)))
    };
    let header = || Some((number(32, 8)?, number(54, 2)?, number(56, 2)?));
    let Some((offset, size, count)) = header().filter(|_| binary.starts_with(b"\x7fELF\x02\x01")) else { return false };
    // PT_INTERP is 3.
    (0..count).all(|index| {
        index
            .checked_mul(size)
            .and_then(|at| at.checked_add(offset))
            .and_then(|at| number(at, 4))
            .is_some_and(|kind| kind != 3)
    })
}

fn layer<'a>(binary: &[u8], applets: impl Iterator<Item = &'a str>) -> io::Result<Vec<u8>> {
    let mut archive = tar::Builder::new(Vec::new());
    archive.mode(tar::HeaderMode::Deterministic);
    let header = |kind, mode, size| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(size);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header
    };
    let directories = [
        ("bin", 0o755),
        ("dev", 0o755),
        ("etc", 0o755),
        ("home", 0o755),
        ("proc", 0o755),
        ("root", 0o700),
        ("sys", 0o755),
        ("tmp", 0o1777),
        ("usr", 0o755),
        ("usr/bin", 0o755),
        ("usr/sbin", 0o755),
        ("var", 0o755),
        ("var/tmp", 0o1777),
        ("sbin", 0o755),
        ("lib", 0o755),
        ("run", 0o755),
    ];
    for (path, mode) in directories {
        archive.append_data(&mut header(tar::EntryType::Directory, mode, 0), path, io::empty())?;
    }
    archive.append_data(&mut header(tar::EntryType::Regular, 0o755, binary.len() as u64), "bin/busybox", binary)?;
    for applet in applets.filter(|name| !name.is_empty() && !name.contains('/') && *name != "busybox") {
        archive.append_link(
            &mut header(tar::EntryType::Link, 0o755, 0),
            Path::new("bin").join(applet),
            "bin/busybox",
        )?;
    }
    let files = [
        (
            "etc/passwd",
            "root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1:daemon:/usr/sbin:/bin/false\nbin:x:2:2:bin:/bin:/bin/false\nsys:x:3:3:sys:/dev:/bin/false\nwww-data:x:33:33:www-data:/var/www:/bin/false\nnobody:x:65534:65534:nobody:/home:/bin/false\n",
        ),
        ("etc/group", "root:x:0:\ndaemon:x:1:\nbin:x:2:\nsys:x:3:\ntty:x:5:\nwww-data:x:33:\nnogroup:x:65534:\n"),
        ("etc/shadow", "root:*:10000:0:99999:7:::\nnobody:*:10000:0:99999:7:::\n"),
        ("etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n"),
    ];
    for (path, content) in files {
        let mode = if path.ends_with("shadow") { 0o640 } else { 0o644 };
        archive.append_data(
            &mut header(tar::EntryType::Regular, mode, content.len() as u64),
            path,
            content.as_bytes(),
        )?;
    }
    archive.into_inner()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_static_program_is_told_from_others() {
        assert!(!is_static(b"#!/bin/sh\n"));
        assert!(!is_static(&fs::read("/bin/sh").unwrap()));
        assert!(!is_static(&[0x7f, b'E', b'L', b'F', 2, 1]));
    }

    #[test]
    fn the_image_is_the_same_each_time() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let image = make(&store).unwrap();
        assert_eq!(make(&store).unwrap().id(), image.id());
        assert_eq!(store.resolve("busybox").unwrap().id(), image.id());
        assert!(is_builtin("busybox") && !is_builtin("debian"));
    }
}
