//! From an OCI runtime configuration to what the agent is told. Both ways into this program end here: an engine's bundle brings its
//! config.json, and for an image of the own store [`image`] makes one.
pub mod image;
mod mounts;
mod process;
mod resources;
#[cfg(test)]
mod tests;

pub use mounts::option_names;
pub use process::{all_capabilities, capability_by_name, capability_mask, capability_names, convert_process};
pub use resources::convert_resources;

use std::path::{Path, PathBuf};

use caisson_agent_protocol as agent;
use oci_spec::runtime::{LinuxDeviceType, LinuxNamespaceType, Spec};

use crate::seccomp::SeccompError;

/// Why a configuration cannot be carried out.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// A field that is needed is not there.
    #[error("the configuration has no {0}")]
    Missing(&'static str),
    /// A value that makes no sense, or that no guest can honour.
    #[error("{field}: {problem}")]
    Value {
        /// Which field.
        field: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The seccomp filter.
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
}

impl SpecError {
    fn value(field: impl Into<String>, problem: impl Into<String>) -> SpecError {
        SpecError::Value { field: field.into(), problem: problem.into() }
    }
}

/// A path of the host that a container wants to see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPath {
    /// Absolute path on the host.
    pub path: PathBuf,
    /// Read-only for the container.
    pub read_only: bool,
    /// With what is mounted below it.
    pub recursive: bool,
}

/// What the converter does not find in the configuration.
#[allow(missing_debug_implementations)] // It holds a closure.
pub struct Context<'a> {
    /// The container's id in the guest.
    pub id: &'a str,
    /// Its root file system.
    pub root: agent::Root,
    /// The image's user, to be resolved in the guest, in place of the configuration's numbers.
    pub user: Option<&'a str>,
    /// Files to write.
    pub files: Vec<agent::FileToWrite>,
    /// Streams of the init process.
    pub stdio: agent::Stdio,
    /// The terminal's size, if the configuration does not say.
    pub terminal: Option<agent::TerminalSize>,
    /// Where relative mount sources begin.
    pub bundle: &'a Path,
    /// Makes a path of the host visible in the guest.
    pub host_path: &'a mut dyn FnMut(HostPath) -> Result<agent::MountSource, SpecError>,
}

/// Describes the container to the agent.
pub fn convert(spec: &Spec, context: Context<'_>) -> Result<agent::Container, SpecError> {
    let Context { id, root, user, files, stdio, terminal, bundle, host_path } = context;
    let linux = spec.linux().clone().unwrap_or_default();
    let has = |wanted: LinuxNamespaceType| {
        linux.namespaces().iter().flatten().any(|namespace| namespace.typ() == wanted && namespace.path().is_none())
    };
    let mut process = None;
    if let Some(described) = spec.process() {
        let mut converted = convert_process(described, linux.seccomp().as_ref())?;
        if let Some(user) = user {
            converted.user = agent::User::Name(user.to_owned());
        }
        if let (Some(size), Some(own)) = (terminal, converted.terminal.as_mut())
            && *own == agent::TerminalSize::default()
        {
            *own = size;
        }
        if let Some(personality) = linux.personality() {
            converted.personality = Some(match personality.domain() {
                oci_spec::runtime::LinuxPersonalityDomain::PerLinux => 0,
                oci_spec::runtime::LinuxPersonalityDomain::PerLinux32 => 8,
            });
        }
        process = Some(converted);
    }
    let mut converted_mounts = Vec::new();
    for mount in spec.mounts().iter().flatten() {
        converted_mounts.push(mounts::convert(mount, bundle, host_path)?);
    }
    let mut devices = Vec::new();
    for device in linux.devices().iter().flatten() {
        devices.push(convert_device(device)?);
    }
    let mut sysctl: Vec<_> =
        linux.sysctl().iter().flatten().map(|(name, value)| (name.clone(), value.clone())).collect();
    sysctl.sort();
    Ok(agent::Container {
        id: id.to_owned(),
        root,
        hostname: spec.hostname().clone().unwrap_or_default(),
        domainname: spec.domainname().clone(),
        mounts: converted_mounts,
        root_propagation: linux.rootfs_propagation().clone().unwrap_or_default(),
        devices,
        masked_paths: linux.masked_paths().clone().unwrap_or_default(),
        readonly_paths: linux.readonly_paths().clone().unwrap_or_default(),
        sysctl,
        files,
        resources: linux.resources().as_ref().map(convert_resources).transpose()?.unwrap_or_default(),
        process,
        stdio,
        own_network: has(LinuxNamespaceType::Network),
        own_cgroup_namespace: has(LinuxNamespaceType::Cgroup),
    })
}

fn convert_device(device: &oci_spec::runtime::LinuxDevice) -> Result<agent::DeviceNode, SpecError> {
    let field = || format!("linux.devices {}", device.path().display());
    let number = |value: i64| {
        u32::try_from(value).map_err(|_| SpecError::value(field(), format!("{value} is no device number")))
    };
    let (major, minor) = (device.major(), device.minor());
    let kind = match device.typ() {
        LinuxDeviceType::C | LinuxDeviceType::U => agent::Device::Char { major: number(major)?, minor: number(minor)? },
        LinuxDeviceType::B => agent::Device::Block { major: number(major)?, minor: number(minor)? },
        LinuxDeviceType::P => agent::Device::Fifo,
        LinuxDeviceType::A => return Err(SpecError::value(field(), "type a is for rules, not for devices")),
    };
    Ok(agent::DeviceNode {
        path: utf8(device.path(), "linux.devices path")?,
        device: kind,
        mode: device.file_mode().unwrap_or(0o666) & 0o7777,
        uid: device.uid().unwrap_or(0),
        gid: device.gid().unwrap_or(0),
    })
}

fn utf8(path: &Path, field: &str) -> Result<String, SpecError> {
    path.to_str().map(str::to_owned).ok_or_else(|| SpecError::value(field, format!("{} is not UTF-8", path.display())))
}
