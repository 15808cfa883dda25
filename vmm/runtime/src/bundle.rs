//! An OCI bundle (runtime-spec 1.3, bundle.md and config.md) and what it means for a guest.
//!
//! What can be done in a guest is translated to the agent's messages; what the host has to do (share a directory, join a network
//! namespace, run a hook) is told apart. What cannot cross into a guest is refused with the reason, never ignored.
mod features;
mod mounts;
mod process;
mod resources;
#[cfg(test)]
mod tests;

pub use features::{OCI_VERSION, example, features};
pub use process::process;
pub use resources::resources;

use caisson_agent_protocol::{Container, Device, DeviceNode, Root, Stdio};
use oci_spec::runtime::{Linux, LinuxDevice, LinuxDeviceType, LinuxNamespaceType, Spec};
use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

/// The tag of the one virtio-fs share that holds all exports.
pub const SHARE_TAG: &str = "caisson";
/// The name of the export that is the container's root.
pub const ROOT_EXPORT: &str = "root";
/// A config.json larger than this is refused.
const MAX_CONFIG_BYTES: u64 = 8 << 20;
/// File mode of a device that states none.
const DEVICE_MODE: u32 = 0o666;

/// Why a bundle cannot become a container.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// A file of the bundle cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// config.json is larger than 8 MiB.
    #[error("{path} is larger than 8 MiB", path = .0.display())]
    TooLarge(PathBuf),
    /// config.json is not the JSON that the specification describes.
    #[error("{path} is not an OCI runtime configuration")]
    Parse {
        /// Which file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A value that makes no sense.
    #[error("{field}: {reason}")]
    Invalid {
        /// Its name in config.json.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A value that a guest cannot honour.
    #[error("{field} is not possible here: {reason}")]
    Refused {
        /// Its name in config.json.
        field: String,
        /// Why a guest cannot do it.
        reason: String,
    },
    /// The seccomp filter.
    #[error(transparent)]
    Seccomp(#[from] crate::seccomp::SeccompError),
}

impl BundleError {
    fn invalid(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Invalid { field: field.into(), reason: reason.into() }
    }

    fn refused(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Refused { field: field.into(), reason: reason.into() }
    }
}

/// A bundle: its directory, and its configuration as it was when it was read.
#[derive(Debug, Clone)]
pub struct Bundle {
    /// Absolute.
    pub directory: PathBuf,
    /// config.json, parsed.
    pub spec: Spec,
    /// config.json as it was found: create keeps this copy, for what is changed afterwards has no effect.
    pub config: Vec<u8>,
}

/// A host path that the guest is to see through virtio-fs, under this name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Export {
    /// One path component, unique in the share.
    pub name: String,
    /// A directory or a file on the host.
    pub path: PathBuf,
    /// Whether the file server refuses every change.
    pub read_only: bool,
}

/// Where a container's network interfaces come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetworkNamespace {
    /// It has none but lo.
    New,
    /// What is in this network namespace of the host is mirrored.
    Join(PathBuf),
}

/// What a bundle asks for.
#[derive(Debug, Clone)]
pub struct Translated {
    /// For the agent. Its streams have no tokens yet.
    pub container: Container,
    /// For the file server; the root is the first.
    pub exports: Vec<Export>,
    /// Host block devices to attach as disks, after the disks that the machine has anyway; `Device::Disk` counts from `first_disk`.
    pub block_devices: Vec<PathBuf>,
    /// For the network.
    pub network: NetworkNamespace,
    /// CPUs of the host to run the vCPUs on, as a cpuset list.
    pub host_cpus: Option<String>,
    /// vm.kernel.parameters.
    pub kernel_parameters: Vec<String>,
}

impl Bundle {
    /// Reads the configuration of the bundle in this directory.
    pub fn load(directory: &Path) -> Result<Self, BundleError> {
        let read = |path: &Path, source| BundleError::Read { path: path.to_owned(), source };
        let directory = std::path::absolute(directory).map_err(|source| read(directory, source))?;
        let path = directory.join("config.json");
        let mut config = Vec::new();
        let file = File::open(&path).map_err(|source| read(&path, source))?;
        file.take(MAX_CONFIG_BYTES + 1).read_to_end(&mut config).map_err(|source| read(&path, source))?;
        if config.len() as u64 > MAX_CONFIG_BYTES {
            return Err(BundleError::TooLarge(path));
        }
        let spec: Spec = serde_json::from_slice(&config).map_err(|source| BundleError::Parse { path, source })?;
        let version = spec.version();
        if !version.starts_with("1.") || version.split(['.', '-', '+']).take(3).any(|part| part.parse::<u32>().is_err())
        {
            return Err(BundleError::invalid(
                "ociVersion",
                format!("{version:?} is no version 1.x of the specification"),
            ));
        }
        Ok(Self { directory, spec, config })
    }

    /// The directory of the container's root, absolute.
    pub fn root(&self) -> Result<PathBuf, BundleError> {
        let Some(root) = self.spec.root() else { return Err(BundleError::invalid("root", "is missing")) };
        let path = self.directory.join(root.path());
        if !path.is_dir() {
            return Err(BundleError::invalid("root.path", format!("{} is no directory", path.display())));
        }
        Ok(path)
    }

    /// Translates the whole configuration for the container of this name. Disks of the machine that come first are `first_disk`.
    pub fn translate(&self, id: &str, first_disk: u8) -> Result<Translated, BundleError> {
        let spec = &self.spec;
        let Some(linux) = spec.linux() else { return Err(BundleError::invalid("linux", "is missing")) };
        refuse_the_impossible(spec, linux)?;
        let namespaces = namespaces(linux)?;
        let read_only = spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or(false);
        let mut exports = vec![Export { name: ROOT_EXPORT.into(), path: self.root()?, read_only: false }];
        let mounts = mounts::mounts(&self.directory, spec.mounts().as_deref().unwrap_or_default(), &mut exports)?;
        let mut block_devices = Vec::new();
        let devices = devices(linux.devices().as_deref().unwrap_or_default(), first_disk, &mut block_devices)?;
        let (resources, host_cpus) = resources(linux.resources().as_ref())?;
        let container = Container {
            id: id.to_owned(),
            root: Root::Share { tag: SHARE_TAG.into(), path: ROOT_EXPORT.into(), readonly: read_only },
            hostname: spec.hostname().clone().unwrap_or_default(),
            domainname: spec.domainname().clone(),
            mounts,
            root_propagation: root_propagation(linux)?,
            devices,
            masked_paths: linux.masked_paths().clone().unwrap_or_default(),
            readonly_paths: linux.readonly_paths().clone().unwrap_or_default(),
            sysctl: sysctl(linux)?,
            files: Vec::new(),
            resources,
            process: spec.process().as_ref().map(|of| process(of, linux)).transpose()?,
            stdio: Stdio::default(),
            own_network: namespaces.network == NetworkNamespace::New,
            own_cgroup_namespace: namespaces.cgroup,
        };
        let kernel_parameters = kernel_parameters(spec)?;
        Ok(Translated { container, exports, block_devices, network: namespaces.network, host_cpus, kernel_parameters })
    }
}

struct Namespaces {
    network: NetworkNamespace,
    cgroup: bool,
}

/// The guest's kernel is the container's own, so that a namespace of its own is always there; one of the host's never is, but for the network.
fn namespaces(linux: &Linux) -> Result<Namespaces, BundleError> {
    let mut found = Namespaces { network: NetworkNamespace::New, cgroup: false };
    let mut new = Vec::new();
    for namespace in linux.namespaces().iter().flatten() {
        let field = || format!("linux.namespaces: {}", namespace.typ());
        if new.contains(&namespace.typ()) {
            return Err(BundleError::invalid(field(), "is there twice"));
        }
        new.push(namespace.typ());
        match (namespace.typ(), namespace.path()) {
            (LinuxNamespaceType::Network, Some(path)) => found.network = NetworkNamespace::Join(path.clone()),
            (_, Some(_)) => {
                return Err(BundleError::refused(
                    field(),
                    "a namespace of the host's kernel cannot be joined from another kernel",
                ));
            }
            (LinuxNamespaceType::User, None) => {
                return Err(BundleError::refused(
                    field(),
                    "the guest's kernel separates already; id mappings are not supported yet",
                ));
            }
            (LinuxNamespaceType::Time, None) => {
                return Err(BundleError::refused(field(), "clocks are the guest's; offsets are not supported"));
            }
            (LinuxNamespaceType::Cgroup, None) => found.cgroup = true,
            (_, None) => {}
        }
    }
    for wanted in [LinuxNamespaceType::Pid, LinuxNamespaceType::Mount, LinuxNamespaceType::Ipc, LinuxNamespaceType::Uts]
    {
        if !new.contains(&wanted) {
            let reason = format!(
                "without a new {wanted} namespace the container would have the host's, and its kernel is another"
            );
            return Err(BundleError::refused("linux.namespaces", reason));
        }
    }
    if !new.contains(&LinuxNamespaceType::Network) {
        return Err(BundleError::refused(
            "linux.namespaces",
            "without a network namespace the container would have the host's interfaces (--network host), and its kernel is another",
        ));
    }
    Ok(found)
}

fn refuse_the_impossible(spec: &Spec, linux: &Linux) -> Result<(), BundleError> {
    let some = |present: bool, field: &str, reason: &str| {
        if present { Err(BundleError::refused(field, reason)) } else { Ok(()) }
    };
    let mapped = |mappings: &Option<Vec<_>>| mappings.as_ref().is_some_and(|mappings| !mappings.is_empty());
    some(mapped(linux.uid_mappings()), "linux.uidMappings", "user namespaces are not supported yet")?;
    some(mapped(linux.gid_mappings()), "linux.gidMappings", "user namespaces are not supported yet")?;
    some(linux.intel_rdt().is_some(), "linux.intelRdt", "cache allocation classes are the host CPU's")?;
    some(linux.memory_policy().is_some(), "linux.memoryPolicy", "the guest has one memory node")?;
    some(
        linux.time_offsets().as_ref().is_some_and(|offsets| !offsets.is_empty()),
        "linux.timeOffsets",
        "clocks are the guest's",
    )?;
    some(
        linux.net_devices().as_ref().is_some_and(|devices| !devices.is_empty()),
        "linux.netDevices",
        "an interface of the host cannot move into another kernel",
    )?;
    if let Some(vm) = spec.vm() {
        some(vm.hypervisor().is_some(), "vm.hypervisor", "the monitor is caisson's own")?;
        some(vm.image().is_some(), "vm.image", "the guest's root is the container's")?;
    }
    Ok(())
}

/// vm.kernel.parameters; the kernel itself is never the caller's to choose.
fn kernel_parameters(spec: &Spec) -> Result<Vec<String>, BundleError> {
    let Some(vm) = spec.vm() else { return Ok(Vec::new()) };
    if !vm.kernel().path().as_os_str().is_empty() || vm.kernel().initrd().is_some() {
        return Err(BundleError::refused(
            "vm.kernel.path",
            "guests run caisson's own kernel and agent; leave it empty",
        ));
    }
    let parameters = vm.kernel().parameters().clone().unwrap_or_default();
    if let Some(bad) =
        parameters.iter().find(|parameter| parameter.chars().any(|c| c.is_whitespace() || c.is_control()))
    {
        return Err(BundleError::invalid("vm.kernel.parameters", format!("{bad:?} holds white space")));
    }
    Ok(parameters)
}

fn root_propagation(linux: &Linux) -> Result<String, BundleError> {
    let value = linux.rootfs_propagation().clone().unwrap_or_default();
    match value.as_str() {
        "" | "private" | "rprivate" | "slave" | "rslave" | "shared" | "rshared" | "unbindable" | "runbindable" => {
            Ok(value)
        }
        _ => Err(BundleError::invalid("linux.rootfsPropagation", format!("{value:?} is no propagation"))),
    }
}

/// The parameters that belong to a namespace, as runc has it; the others would be the host's there, and are refused likewise here.
fn sysctl(linux: &Linux) -> Result<Vec<(String, String)>, BundleError> {
    const IPC: &[&str] = &[
        "kernel.msgmax",
        "kernel.msgmnb",
        "kernel.msgmni",
        "kernel.sem",
        "kernel.shmall",
        "kernel.shmmax",
        "kernel.shmmni",
        "kernel.shm_rmid_forced",
    ];
    let mut all = Vec::new();
    for (name, value) in linux.sysctl().iter().flatten() {
        // Slashes and dots both separate; the agent is told dots.
        let dotted = name.replace('/', ".");
        let ok = IPC.contains(&dotted.as_str())
            || dotted.starts_with("fs.mqueue.")
            || dotted.starts_with("net.")
            || dotted == "kernel.domainname"
            || dotted == "kernel.hostname";
        let plain =
            dotted.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte)) && !dotted.contains("..");
        if !ok || !plain {
            return Err(BundleError::refused(
                format!("linux.sysctl: {name}"),
                "it is not in a separate kernel namespace",
            ));
        }
        all.push((dotted, value.clone()));
    }
    all.sort();
    Ok(all)
}

/// Character devices of the host that are the same in every Linux kernel; by major and minor.
const KNOWN: &[(i64, i64)] =
    &[(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (1, 11), (5, 0), (5, 1), (5, 2), (10, 200), (10, 229)];

fn devices(all: &[LinuxDevice], first_disk: u8, disks: &mut Vec<PathBuf>) -> Result<Vec<DeviceNode>, BundleError> {
    let mut nodes = Vec::new();
    for device in all {
        let path = device.path().to_string_lossy().into_owned();
        let field = format!("linux.devices: {path}");
        if !path.starts_with('/') {
            return Err(BundleError::invalid(field, "the path is not absolute"));
        }
        let number = |value: i64| {
            u32::try_from(value)
                .map_err(|_| BundleError::invalid(field.clone(), format!("{value} is no device number")))
        };
        let (major, minor) = (device.major(), device.minor());
        let what = match device.typ() {
            LinuxDeviceType::P => Device::Fifo,
            LinuxDeviceType::C | LinuxDeviceType::U
                if KNOWN.contains(&(major, minor)) || (136..144).contains(&major) =>
            {
                Device::Char { major: number(major)?, minor: number(minor)? }
            }
            LinuxDeviceType::B => {
                let disk = u8::try_from(disks.len()).ok().and_then(|index| first_disk.checked_add(index));
                let disk =
                    disk.ok_or_else(|| BundleError::refused(field.clone(), "there are too many block devices"))?;
                disks.push(PathBuf::from(format!("/dev/block/{}:{}", number(major)?, number(minor)?)));
                Device::Disk { disk }
            }
            LinuxDeviceType::C | LinuxDeviceType::U => {
                let reason = format!("the host's device {major}:{minor} is no device of the guest's kernel");
                return Err(BundleError::refused(field, reason));
            }
            LinuxDeviceType::A => return Err(BundleError::invalid(field, "type a is for cgroup rules only")),
        };
        nodes.push(DeviceNode {
            path,
            device: what,
            mode: device.file_mode().unwrap_or(DEVICE_MODE) & 0o7777,
            uid: device.uid().unwrap_or(0),
            gid: device.gid().unwrap_or(0),
        });
    }
    Ok(nodes)
}
