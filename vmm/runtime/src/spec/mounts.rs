//! Mounts: the option names of mount(8), as runc takes them, and where the sources are.
use std::path::Path;

use caisson_agent_protocol as agent;
use oci_spec::runtime::Mount;

use super::{HostPath, SpecError, utf8};

/// An option's name, the MS_* flags that it stands for, and whether it clears them.
const FLAGS: &[(&str, u64, bool)] = &[
    ("async", libc::MS_SYNCHRONOUS, true),
    ("atime", libc::MS_NOATIME, true),
    ("defaults", 0, false),
    ("dev", libc::MS_NODEV, true),
    ("diratime", libc::MS_NODIRATIME, true),
    ("dirsync", libc::MS_DIRSYNC, false),
    ("exec", libc::MS_NOEXEC, true),
    ("iversion", libc::MS_I_VERSION, false),
    ("lazytime", MS_LAZYTIME, false),
    ("loud", libc::MS_SILENT, true),
    ("mand", libc::MS_MANDLOCK, false),
    ("noatime", libc::MS_NOATIME, false),
    ("nodev", libc::MS_NODEV, false),
    ("nodiratime", libc::MS_NODIRATIME, false),
    ("noexec", libc::MS_NOEXEC, false),
    ("noiversion", libc::MS_I_VERSION, true),
    ("nolazytime", MS_LAZYTIME, true),
    ("nomand", libc::MS_MANDLOCK, true),
    ("norelatime", libc::MS_RELATIME, true),
    ("nostrictatime", libc::MS_STRICTATIME, true),
    ("nosuid", libc::MS_NOSUID, false),
    ("nosymfollow", MS_NOSYMFOLLOW, false),
    ("relatime", libc::MS_RELATIME, false),
    ("ro", libc::MS_RDONLY, false),
    ("rro", libc::MS_RDONLY, false),
    ("rw", libc::MS_RDONLY, true),
    ("rrw", libc::MS_RDONLY, true),
    ("silent", libc::MS_SILENT, false),
    ("strictatime", libc::MS_STRICTATIME, false),
    ("suid", libc::MS_NOSUID, true),
    ("symfollow", MS_NOSYMFOLLOW, true),
    ("sync", libc::MS_SYNCHRONOUS, false),
];

/// Propagation by name.
const PROPAGATION: &[(&str, u64)] = &[
    ("private", libc::MS_PRIVATE),
    ("rprivate", libc::MS_PRIVATE | libc::MS_REC),
    ("rshared", libc::MS_SHARED | libc::MS_REC),
    ("rslave", libc::MS_SLAVE | libc::MS_REC),
    ("runbindable", libc::MS_UNBINDABLE | libc::MS_REC),
    ("shared", libc::MS_SHARED),
    ("slave", libc::MS_SLAVE),
    ("unbindable", libc::MS_UNBINDABLE),
];

/// <linux/mount.h>; not in libc.
const MS_LAZYTIME: u64 = 1 << 25;
const MS_NOSYMFOLLOW: u64 = 1 << 8;

/// Names of options that mean something on a host and nothing in a guest of one container.
const IGNORED: &[&str] = &["bind", "rbind", "remount", "tmpcopyup", "copy", "nocopy", "z", "Z", "U", "exact"];

/// The names of all options that are understood, for `features`.
pub fn option_names() -> Vec<&'static str> {
    let mut names: Vec<_> = FLAGS.iter().map(|entry| entry.0).chain(PROPAGATION.iter().map(|entry| entry.0)).collect();
    names.extend(["bind", "rbind", "remount"]);
    names.sort_unstable();
    names
}

pub(super) fn convert(
    mount: &Mount,
    bundle: &Path,
    host_path: &mut dyn FnMut(HostPath) -> Result<agent::MountSource, SpecError>,
) -> Result<agent::Mount, SpecError> {
    let destination = utf8(mount.destination(), "mounts destination")?;
    // runc takes a relative destination as one below the root.
    let destination = if destination.starts_with('/') { destination } else { format!("/{destination}") };
    let field = || format!("mounts {destination}");
    let mut flags = 0;
    let mut propagation = Vec::new();
    let mut data = Vec::new();
    let options = mount.options().as_deref().unwrap_or_default();
    for option in options {
        if let Some((_, bits, clear)) = FLAGS.iter().find(|entry| entry.0 == option) {
            flags = if *clear { flags & !bits } else { flags | bits };
        } else if let Some((_, bits)) = PROPAGATION.iter().find(|entry| entry.0 == option) {
            propagation.push(*bits);
        } else if option == "idmap" || option == "ridmap" {
            return Err(SpecError::value(field(), "id-mapped mounts cannot cross into a guest"));
        } else if !IGNORED.contains(&option.as_str()) && !option.is_empty() {
            data.push(option.as_str());
        }
    }
    let recursive = options.iter().any(|option| option == "rbind");
    let fs_type = mount.typ().as_deref().unwrap_or_default();
    let bind = recursive || fs_type == "bind" || options.iter().any(|option| option == "bind");
    let source = if bind && destination == "/dev/shm" {
        // Engines make a tmpfs of the host for it; memory that programs share is the guest's own.
        data = vec!["mode=1777"];
        agent::MountSource::Kernel { fs_type: "tmpfs".into() }
    } else if bind {
        let source =
            mount.source().as_ref().ok_or_else(|| SpecError::value(field(), "a bind mount without a source"))?;
        data.clear();
        host_path(HostPath { path: bundle.join(source), read_only: flags & libc::MS_RDONLY != 0, recursive })?
    } else {
        match fs_type {
            "proc" | "sysfs" | "tmpfs" | "devpts" | "mqueue" | "cgroup" | "cgroup2" | "ramfs" => {
                agent::MountSource::Kernel { fs_type: fs_type.to_owned() }
            }
            "" | "none" => return Err(SpecError::value(field(), "neither a type nor a bind mount")),
            other => {
                return Err(SpecError::value(
                    field(),
                    format!(
                        "file system {other} is not offered in a guest (proc, sysfs, tmpfs, devpts, mqueue, cgroup and bind are)"
                    ),
                ));
            }
        }
    };
    Ok(agent::Mount { destination, source, flags, propagation, data: data.join(",") })
}
