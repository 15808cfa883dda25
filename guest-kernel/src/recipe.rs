//! The files that a build is made from, as they were when this crate was compiled.

use std::fmt::Write as _;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use sha2::{Digest as _, Sha256};

/// A file of the recipe: its path beside the script, and its content.
pub(crate) type File = (&'static str, &'static str);

/// Names a file once, for both its path and its content.
macro_rules! files {
    ($($path:literal),* $(,)?) => { &[$(($path, include_str!(concat!("../", $path)))),*] };
}

/// The recipe, sorted as the shell sorts it in the C locale: the script, the fragments, the patches. A test compares this
/// list with the directories.
pub(crate) const FILES: &[File] = files![
    "build",
    "config/00-base.config",
    "config/10-virtio.config",
    "config/20-containers.config",
    "config/30-filesystems.config",
    "config/40-mitigations.config",
    "patches/0001-x86-syscall-under-software-kvm.patch",
    "patches/0002-x86-alternatives-with-fewer-decoded-instructions.patch",
    "patches/0003-x86-mm-look-up-e820-only-for-mapped-slots.patch",
    "patches/0004-strlen-by-words.patch",
    "patches/0005-tick-less-often-under-software-kvm.patch",
];

/// 16 hexadecimal digits that stand for `files`; `build --recipe` computes the same.
pub(crate) fn hash(files: &[File]) -> String {
    let mut listing = String::new();
    for (path, content) in files {
        let _ = writeln!(listing, "{} {path}", hex(&Sha256::digest(content)));
    }
    let mut hash = hex(&Sha256::digest(listing));
    hash.truncate(16);
    hash
}

/// Writes the recipe into `directory`, which must be there.
pub(crate) fn write(directory: &Path) -> io::Result<()> {
    for (path, content) in FILES {
        let path = directory.join(path);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        std::fs::write(&path, content)?;
    }
    let script = directory.join("build");
    std::fs::set_permissions(script, std::fs::Permissions::from_mode(0o755))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
