//! Mounts (config.md, "Mounts"; options as runc and mount(8) have them).
use super::{BundleError, Export, SHARE_TAG};
use caisson_agent_protocol::{Mount, MountSource};
use rustix::fs::{StatVfs, statvfs};
use std::path::Path;

// mount(2).
const RDONLY: u64 = 1;
const NOSUID: u64 = 2;
const NODEV: u64 = 4;
const NOEXEC: u64 = 8;
const SYNCHRONOUS: u64 = 16;
const MANDLOCK: u64 = 64;
const DIRSYNC: u64 = 128;
const NOSYMFOLLOW: u64 = 256;
const NOATIME: u64 = 1024;
const NODIRATIME: u64 = 2048;
const REC: u64 = 16384;
const SILENT: u64 = 32768;
const UNBINDABLE: u64 = 1 << 17;
const PRIVATE: u64 = 1 << 18;
const SLAVE: u64 = 1 << 19;
const SHARED: u64 = 1 << 20;
const RELATIME: u64 = 1 << 21;
const I_VERSION: u64 = 1 << 23;
const STRICTATIME: u64 = 1 << 24;
const LAZYTIME: u64 = 1 << 25;

/// What an option does.
#[derive(Debug, Clone, Copy)]
enum Effect {
    Set(u64),
    Clear(u64),
    Propagation(u64),
    /// It asks for nothing more: a bind is told by its type and an export holds what is mounted below it either way (so that rro is ro);
    /// what lies below a new tmpfs is copied up by runc, and a root of an image has nothing there that a caller would miss.
    Nothing,
}
use Effect::{Clear, Nothing, Propagation, Set};

/// Every option that is not the file system's own, as runc and mount(8) have them.
#[rustfmt::skip]
const OPTIONS: &[(&str, Effect)] = &[
    ("ro", Set(RDONLY)), ("rro", Set(RDONLY)), ("rw", Clear(RDONLY)), ("rrw", Clear(RDONLY)),
    ("nosuid", Set(NOSUID)), ("rnosuid", Set(NOSUID)), ("suid", Clear(NOSUID)), ("rsuid", Clear(NOSUID)),
    ("nodev", Set(NODEV)), ("rnodev", Set(NODEV)), ("dev", Clear(NODEV)), ("rdev", Clear(NODEV)),
    ("noexec", Set(NOEXEC)), ("rnoexec", Set(NOEXEC)), ("exec", Clear(NOEXEC)), ("rexec", Clear(NOEXEC)),
    ("sync", Set(SYNCHRONOUS)), ("async", Clear(SYNCHRONOUS)), ("mand", Set(MANDLOCK)), ("nomand", Clear(MANDLOCK)),
    ("dirsync", Set(DIRSYNC)), ("nosymfollow", Set(NOSYMFOLLOW)), ("rnosymfollow", Set(NOSYMFOLLOW)),
    ("symfollow", Clear(NOSYMFOLLOW)), ("rsymfollow", Clear(NOSYMFOLLOW)), ("noatime", Set(NOATIME)),
    ("rnoatime", Set(NOATIME)), ("atime", Clear(NOATIME)), ("ratime", Clear(NOATIME)),
    ("nodiratime", Set(NODIRATIME)), ("rnodiratime", Set(NODIRATIME)), ("diratime", Clear(NODIRATIME)),
    ("rdiratime", Clear(NODIRATIME)), ("relatime", Set(RELATIME)), ("rrelatime", Set(RELATIME)),
    ("norelatime", Clear(RELATIME)), ("rnorelatime", Clear(RELATIME)), ("strictatime", Set(STRICTATIME)),
    ("rstrictatime", Set(STRICTATIME)), ("nostrictatime", Clear(STRICTATIME)),
    ("rnostrictatime", Clear(STRICTATIME)), ("iversion", Set(I_VERSION)), ("noiversion", Clear(I_VERSION)),
    ("lazytime", Set(LAZYTIME)), ("nolazytime", Clear(LAZYTIME)), ("silent", Set(SILENT)), ("loud", Clear(SILENT)),
    ("private", Propagation(PRIVATE)), ("rprivate", Propagation(PRIVATE | REC)), ("slave", Propagation(SLAVE)),
    ("rslave", Propagation(SLAVE | REC)), ("shared", Propagation(SHARED)), ("rshared", Propagation(SHARED | REC)),
    ("unbindable", Propagation(UNBINDABLE)), ("runbindable", Propagation(UNBINDABLE | REC)), ("bind", Nothing),
    ("rbind", Nothing), ("defaults", Nothing), ("remount", Nothing), ("tmpcopyup", Nothing),
];

/// Options that a guest cannot honour.
const REFUSED: &[(&str, &str)] =
    &[("idmap", "id-mapped mounts are not supported yet"), ("ridmap", "id-mapped mounts are not supported yet")];

/// The options that are understood, sorted: for `features`.
pub(crate) fn options() -> Vec<&'static str> {
    let mut all: Vec<_> = OPTIONS.iter().map(|(option, _)| *option).collect();
    all.sort_unstable();
    all
}

/// Translates mounts; sources on the host become exports.
pub(super) fn mounts(
    bundle: &Path,
    all: &[oci_spec::runtime::Mount],
    exports: &mut Vec<Export>,
) -> Result<Vec<Mount>, BundleError> {
    all.iter().map(|of| mount(bundle, of, exports)).collect()
}

fn mount(bundle: &Path, of: &oci_spec::runtime::Mount, exports: &mut Vec<Export>) -> Result<Mount, BundleError> {
    let destination = of.destination().to_string_lossy().into_owned();
    let field = format!("mounts: {destination}");
    let mapped = |mappings: &Option<Vec<_>>| mappings.as_ref().is_some_and(|mappings| !mappings.is_empty());
    if mapped(of.uid_mappings()) || mapped(of.gid_mappings()) {
        return Err(BundleError::refused(field, "id-mapped mounts are not supported yet"));
    }
    // The specification wants absolute destinations; runc takes a relative one as relative to /.
    let destination = if destination.starts_with('/') { destination } else { format!("/{destination}") };

    let (mut flags, mut propagation, mut data, mut bind) = (0, Vec::new(), Vec::new(), false);
    for option in of.options().iter().flatten() {
        bind |= option == "bind" || option == "rbind";
        if let Some((_, reason)) = REFUSED.iter().find(|(refused, _)| refused == option) {
            return Err(BundleError::refused(field, *reason));
        }
        match OPTIONS.iter().find(|(known, _)| known == option).map(|(_, effect)| *effect) {
            Some(Set(flag)) => flags |= flag,
            Some(Clear(flag)) => flags &= !flag,
            Some(Propagation(flag)) => propagation.push(flag),
            Some(Nothing) => {}
            None => data.push(option.as_str()),
        }
    }

    let fs_type = of.typ().as_deref().unwrap_or("none");
    if bind || fs_type == "bind" {
        let Some(source) = of.source() else {
            return Err(BundleError::invalid(field, "a bind mount without a source"));
        };
        let source = bundle.join(source);
        let metadata = std::fs::metadata(&source)
            .map_err(|error| BundleError::invalid(field.clone(), format!("{}: {error}", source.display())))?;
        if destination == "/dev/shm" {
            return Ok(shared_memory(&source, destination, flags, propagation));
        }
        if !metadata.is_dir() && !metadata.is_file() {
            return Err(BundleError::refused(
                field,
                format!(
                    "{} is neither a directory nor a regular file: what is behind it cannot cross into a guest",
                    source.display()
                ),
            ));
        }
        let name = format!("mount-{}", exports.len());
        exports.push(Export { name: name.clone(), path: source, read_only: flags & RDONLY != 0 });
        let source = MountSource::Share { tag: SHARE_TAG.into(), path: name };
        // Options of other file systems mean nothing to a bind mount: mount(2) ignores them.
        return Ok(Mount { destination, source, flags, propagation, data: String::new() });
    }

    let fs_type = match fs_type {
        "proc" | "sysfs" | "tmpfs" | "devpts" | "mqueue" | "cgroup2" => fs_type,
        "cgroup" => "cgroup2",
        other => {
            return Err(BundleError::refused(
                field,
                format!("type {other:?} is no file system that a guest can mount"),
            ));
        }
    };
    if fs_type == "cgroup2" {
        data.clear();
    }
    let source = MountSource::Kernel { fs_type: fs_type.to_owned() };
    Ok(Mount { destination, source, flags, propagation, data: data.join(",") })
}

/// Engines make /dev/shm as a tmpfs on the host and bind it. Memory that is shared through a file server is slow and does not
/// count as the container's; a tmpfs of the same size in the guest is what the container expects.
fn shared_memory(source: &Path, destination: String, flags: u64, propagation: Vec<u64>) -> Mount {
    let size = statvfs(source).map_or(64 << 20, |found: StatVfs| found.f_blocks.saturating_mul(found.f_frsize));
    Mount {
        destination,
        source: MountSource::Kernel { fs_type: "tmpfs".into() },
        flags,
        propagation,
        data: format!("mode=1777,size={size}"),
    }
}
