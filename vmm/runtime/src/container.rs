//! From a container's frozen configuration to its machine's disks and what the agent is told.
use std::path::{Path, PathBuf};

use caisson_agent_protocol as agent;
use caisson_machine::config::{Disk, Share};

use crate::{
    shares,
    spec::{self, Context, HostPath, SpecError},
    state::{Config, Directory, RootSource, Shape},
};

/// What the guest's kernel and agent need for themselves: it is added to a container's memory limit.
pub const OVERHEAD_MIB: u32 = 64;
/// Guest memory of a container without a limit.
pub const DEFAULT_MEMORY_MIB: u32 = 512;
/// Memory sizes that machines come in: a template is kept for each one that is used.
const MEMORY_STEPS_MIB: [u32; 12] = [128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192, 16384];
/// Read-only disks of a template.
pub const TEMPLATE_LAYERS: usize = 10;
/// Writable disks of a template.
pub const TEMPLATE_WRITABLE: usize = 2;
/// The largest machine, in MiB: a multiple of what memory is rounded up to.
const MAX_MEMORY_MIB: u32 = 512 * 1024;
/// Layers that a machine can take.
const MAX_LAYERS: usize = 14;

/// The machine for a container with these limits: its memory and CPUs, and the guest's own needs on top.
pub fn shape_for(memory_bytes: Option<u64>, cpus_milli: Option<u64>) -> Shape {
    let wanted = match memory_bytes {
        Some(bytes) => u32::try_from(bytes.div_ceil(1 << 20)).unwrap_or(u32::MAX).saturating_add(OVERHEAD_MIB),
        None => DEFAULT_MEMORY_MIB,
    }
    .min(MAX_MEMORY_MIB);
    let memory_mib =
        MEMORY_STEPS_MIB.into_iter().find(|step| *step >= wanted).unwrap_or_else(|| wanted.next_multiple_of(1024));
    let vcpus = cpus_milli.map_or(1, |milli| u8::try_from(milli.div_ceil(1000)).unwrap_or(32).clamp(1, 32));
    Shape { memory_mib, vcpus }
}

/// The disks of a container's machine, and the root that the agent makes of them.
pub fn disks(config: &Config, directory: &Directory, template: bool) -> Result<(Vec<Disk>, agent::Root), SpecError> {
    let readonly = config.spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or(false);
    match &config.root {
        RootSource::Image { layers, upper_bytes } => {
            let limit = if template { TEMPLATE_LAYERS } else { MAX_LAYERS };
            if layers.is_empty() || layers.len() > limit {
                return Err(SpecError::Value {
                    field: "the image".into(),
                    problem: format!("it has {} layers, and a machine takes 1 to {limit} of them", layers.len()),
                });
            }
            let mut disks: Vec<Disk> =
                layers.iter().map(|path| Disk { path: Some(path.clone()), read_only: true }).collect();
            if template {
                disks.resize(TEMPLATE_LAYERS, stub(true));
            }
            let upper = (*upper_bytes > 0).then(|| {
                disks.push(Disk { path: Some(directory.upper()), read_only: false });
                (disks.len() - 1) as u8
            });
            if template {
                disks.resize(TEMPLATE_LAYERS + TEMPLATE_WRITABLE, stub(false));
            }
            let lower = (0..layers.len()).map(|index| index as u8).collect();
            Ok((disks, agent::Root::Layers { lower, upper, readonly }))
        }
        RootSource::Directory { .. } => {
            let disks = if template { template_disks() } else { Vec::new() };
            Ok((disks, agent::Root::Share { tag: shares::TAG.into(), path: shares::ROOT.into(), readonly }))
        }
    }
}

/// The disks of a template.
pub fn template_disks() -> Vec<Disk> {
    [vec![stub(true); TEMPLATE_LAYERS], vec![stub(false); TEMPLATE_WRITABLE]].concat()
}

/// The shares of a template, or of a machine whose file server listens on `socket`.
pub fn share(socket: Option<PathBuf>) -> Share {
    Share { tag: shares::TAG.into(), socket }
}

fn stub(read_only: bool) -> Disk {
    Disk { path: None, read_only }
}

/// What the agent is told of the container.
pub fn describe(
    config: &Config,
    root: agent::Root,
    stdio: agent::Stdio,
    terminal: Option<agent::TerminalSize>,
    host_path: &mut dyn FnMut(HostPath) -> Result<agent::MountSource, SpecError>,
) -> Result<agent::Container, SpecError> {
    let files = if config.image.is_empty() { Vec::new() } else { network_files(config) };
    let bundle: &Path = if config.bundle.as_os_str().is_empty() { Path::new("/") } else { &config.bundle };
    let context =
        Context { id: GUEST_ID, root, user: config.user.as_deref(), files, stdio, terminal, bundle, host_path };
    spec::convert(&config.spec, context)
}

/// The container's id within its own machine, which no one else sees.
pub const GUEST_ID: &str = "c";

/// /etc/hostname, /etc/hosts and /etc/resolv.conf, as docker has them.
fn network_files(config: &Config) -> Vec<agent::FileToWrite> {
    let hostname = config.spec.hostname().clone().unwrap_or_default();
    let mut hosts = String::from(
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n",
    );
    for (address, name) in &config.extra_hosts {
        hosts.push_str(&format!("{address}\t{name}\n"));
    }
    let resolv: String = config.dns.iter().map(|address| format!("nameserver {address}\n")).collect();
    [("/etc/hostname", format!("{hostname}\n")), ("/etc/hosts", hosts), ("/etc/resolv.conf", resolv)]
        .into_iter()
        .map(|(path, content)| agent::FileToWrite {
            path: path.into(),
            content: content.into_bytes(),
            mode: 0o644,
            bind: true,
        })
        .collect()
}

/// Where a container's sockets are: below the run directory, in a path short enough for a unix socket's address.
pub fn run_directory(run: &Path, directory: &Path) -> PathBuf {
    use sha2::{Digest, Sha256};
    use std::os::unix::ffi::OsStrExt;
    let digest = Sha256::digest(directory.as_os_str().as_bytes());
    let name: String = digest.iter().take(12).map(|byte| format!("{byte:02x}")).collect();
    let path = run.join(".s").join(&name);
    // sockaddr_un holds 108 bytes; the longest name in the directory takes 24.
    if path.as_os_str().len() <= 80 { path } else { Path::new("/run/caisson/.s").join(name) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_has_room_for_the_limit_and_the_guest() {
        assert_eq!(shape_for(None, None), Shape { memory_mib: 512, vcpus: 1 });
        assert_eq!(shape_for(Some(64 << 20), Some(1500)), Shape { memory_mib: 128, vcpus: 2 });
        assert_eq!(shape_for(Some((64 << 20) + 1), None).memory_mib, 192);
        assert_eq!(shape_for(Some(20 << 30), None).memory_mib, 21 * 1024);
        assert_eq!(shape_for(Some(u64::MAX), Some(u64::MAX)), Shape { memory_mib: 512 * 1024, vcpus: 32 });
    }

    #[test]
    fn sockets_have_short_paths() {
        let long = "x".repeat(200);
        assert!(run_directory(Path::new(&format!("/{long}")), Path::new("/a")).as_os_str().len() < 80);
        let (one, two) =
            (run_directory(Path::new("/run"), Path::new("/a")), run_directory(Path::new("/run"), Path::new("/b")));
        assert!(one != two && one.starts_with("/run/.s"));
    }
}
