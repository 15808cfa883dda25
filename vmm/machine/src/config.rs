//! What machine to build: read by the monitor as one JSON object from a file descriptor.
//!
//! The order of the virtio-mmio devices follows from it and is fixed: vsock, rng, disks, nets, shares. So a snapshot
//! and a configuration fit together if they have the same [shape](MachineConfig::shape).

use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// The least memory in which the guest kernel and the agent start.
pub const MIN_MEMORY_MIB: u32 = 32;
/// The most memory that a machine may have: 512 GiB, which one level-4 page-table entry maps.
pub const MAX_MEMORY_MIB: u32 = 512 * 1024;
/// The most vCPUs: what fits in the MP table's kilobyte below the EBDA.
pub const MAX_VCPUS: u8 = 32;
/// The most disks: `vda` to `vdz`.
pub const MAX_DISKS: usize = 26;
/// The most network interfaces.
pub const MAX_NETS: usize = 8;
/// The most shared directories.
pub const MAX_SHARES: usize = 16;
/// The most virtio devices together: one interrupt line of the IO-APIC each (5 to 23, 8 and 13 left out).
pub const MAX_DEVICES: usize = 17;
/// The longest kernel command line: x86 `COMMAND_LINE_SIZE` less the terminating zero and what the monitor adds.
pub const MAX_COMMAND_LINE_BYTES: usize = 1200;
/// The longest tag of a share (virtio 1.3, 5.11.4).
pub const MAX_TAG_BYTES: usize = 36;
/// The longest identity.
pub const MAX_IDENTITY_BYTES: usize = 1024;
/// The longest configuration that the monitor reads.
pub const MAX_CONFIG_BYTES: usize = 256 * 1024;

/// How `/dev/kvm` executes a guest; see [`crate::probe`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KvmKind {
    /// With VMX or SVM.
    Hardware,
    /// Guest kernel code is emulated by the host's KVM, and the monitor supplies the instructions that it lacks.
    Software,
}

/// A virtual machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// ELF `vmlinux`. It is not read when the machine is restored from a snapshot.
    pub kernel: PathBuf,
    /// Initial RAM file system. It is not read when the machine is restored.
    #[serde(default)]
    pub initramfs: Option<PathBuf>,
    /// Kernel command line. The monitor appends `virtio_mmio.device=...` for each device.
    #[serde(default)]
    pub command_line: String,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// What `/dev/kvm` is; [`crate::probe::kvm_kind`] finds out.
    pub kvm_kind: KvmKind,
    /// Block devices: `vda`, `vdb`, ... in this order.
    #[serde(default)]
    pub disks: Vec<Disk>,
    /// Vsock device.
    #[serde(default)]
    pub vsock: Option<Vsock>,
    /// Network interfaces.
    #[serde(default)]
    pub net: Vec<Net>,
    /// virtio-fs shares.
    #[serde(default)]
    pub shares: Vec<Share>,
    /// Log file for what the guest writes to its serial port: created (0600) or appended to, and bounded.
    #[serde(default)]
    pub serial: Option<PathBuf>,
    /// Snapshot directory to restore from instead of booting.
    #[serde(default)]
    pub restore: Option<PathBuf>,
    /// What the guest is made of (hashes of kernel and agent, say). A snapshot restores only into the same identity.
    #[serde(default)]
    pub identity: String,
    /// Leave out the jail (seccomp, landlock, capabilities): for debugging only.
    #[serde(default)]
    pub unjailed: bool,
}

/// A block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// File or block device behind it. `None` is a stub without a medium: capacity 0, and every request fails.
    #[serde(default)]
    pub path: Option<PathBuf>,
    /// Opened read-only, and offered with `VIRTIO_BLK_F_RO`.
    #[serde(default)]
    pub read_only: bool,
}

/// A vsock device, answered by unix sockets as Firecracker does it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// The guest's context id, 3 or more.
    pub guest_cid: u32,
    /// Directory of the sockets: the monitor listens on `vsock.sock`; a guest's connection to host port P goes to
    /// `vsock.sock_P`.
    pub directory: PathBuf,
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Net {
    /// Name of the tap device on the host. `None` is a stub without a carrier.
    #[serde(default)]
    pub tap: Option<String>,
    /// Hardware address.
    pub mac: [u8; 6],
}

/// A directory shared over virtio-fs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Share {
    /// What the guest mounts it by.
    pub tag: String,
    /// Socket of its server. `None` is a stub.
    #[serde(default)]
    pub socket: Option<PathBuf>,
}

/// What of a configuration a snapshot fixes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// Kind of KVM: the two offer a guest different CPUs.
    pub kvm_kind: KvmKind,
    /// For each disk, whether it is read-only.
    pub disks: Vec<bool>,
    /// Whether there is a vsock device.
    pub vsock: bool,
    /// Number of network interfaces.
    pub net: usize,
    /// Tags of the shares.
    pub shares: Vec<String>,
}

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A number is out of its range.
    #[error("{field} is {value}, but must be from {min} to {max}")]
    Range {
        /// The field.
        field: &'static str,
        /// What it is.
        value: u64,
        /// Least value allowed.
        min: u64,
        /// Greatest value allowed.
        max: u64,
    },
    /// A text field is malformed.
    #[error("{field} {problem}")]
    Text {
        /// The field.
        field: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// It is not the JSON of a configuration.
    #[error("the configuration is not valid JSON for a machine")]
    Json(#[from] serde_json::Error),
    /// It is too long.
    #[error("the configuration is longer than {MAX_CONFIG_BYTES} bytes")]
    TooLong,
}

impl MachineConfig {
    /// A machine with one vCPU and no devices but the random number generator.
    pub fn new(kernel: impl Into<PathBuf>, memory_mib: u32, kvm_kind: KvmKind) -> Self {
        Self {
            kernel: kernel.into(),
            initramfs: None,
            command_line: String::new(),
            memory_mib,
            vcpus: 1,
            kvm_kind,
            disks: Vec::new(),
            vsock: None,
            net: Vec::new(),
            shares: Vec::new(),
            serial: None,
            restore: None,
            identity: String::new(),
            unjailed: false,
        }
    }

    /// Parses and validates.
    ///
    /// # Errors
    /// It is too long, not JSON of this type, or invalid.
    pub fn from_json(json: &[u8]) -> Result<Self, ConfigError> {
        if json.len() > MAX_CONFIG_BYTES {
            return Err(ConfigError::TooLong);
        }
        let config: Self = serde_json::from_slice(json)?;
        config.validate()?;
        Ok(config)
    }

    /// As JSON, validated.
    ///
    /// # Errors
    /// It is invalid, or a path in it is not UTF-8.
    pub fn to_json(&self) -> Result<Vec<u8>, ConfigError> {
        self.validate()?;
        let json = serde_json::to_vec(self)?;
        if json.len() > MAX_CONFIG_BYTES {
            return Err(ConfigError::TooLong);
        }
        Ok(json)
    }

    /// What of it a snapshot fixes.
    pub fn shape(&self) -> Shape {
        Shape {
            memory_mib: self.memory_mib,
            vcpus: self.vcpus,
            kvm_kind: self.kvm_kind,
            disks: self.disks.iter().map(|d| d.read_only).collect(),
            vsock: self.vsock.is_some(),
            net: self.net.len(),
            shares: self.shares.iter().map(|s| s.tag.clone()).collect(),
        }
    }

    /// Checks every field against its bounds.
    ///
    /// # Errors
    /// Names the first field that is out of them.
    pub fn validate(&self) -> Result<(), ConfigError> {
        range("memory_mib", self.memory_mib.into(), MIN_MEMORY_MIB.into(), MAX_MEMORY_MIB.into())?;
        range("vcpus", self.vcpus.into(), 1, MAX_VCPUS.into())?;
        range("number of disks", self.disks.len() as u64, 0, MAX_DISKS as u64)?;
        range("number of network interfaces", self.net.len() as u64, 0, MAX_NETS as u64)?;
        range("number of shares", self.shares.len() as u64, 0, MAX_SHARES as u64)?;
        let devices = 1 + usize::from(self.vsock.is_some()) + self.disks.len() + self.net.len() + self.shares.len();
        range("number of devices", devices as u64, 0, MAX_DEVICES as u64)?;
        range("length of command_line", self.command_line.len() as u64, 0, MAX_COMMAND_LINE_BYTES as u64)?;
        if self.command_line.bytes().any(|b| !(0x20..0x7f).contains(&b)) {
            return Err(text("command_line", "has a character that is not printable ASCII"));
        }
        range("length of identity", self.identity.len() as u64, 0, MAX_IDENTITY_BYTES as u64)?;
        path("kernel", &self.kernel)?;
        for (field, value) in [("initramfs", &self.initramfs), ("serial", &self.serial), ("restore", &self.restore)] {
            value.as_deref().map_or(Ok(()), |v| path(field, v))?;
        }
        for (index, disk) in self.disks.iter().enumerate() {
            disk.path.as_deref().map_or(Ok(()), |v| path(&format!("disks[{index}].path"), v))?;
        }
        if let Some(vsock) = &self.vsock {
            range("vsock.guest_cid", vsock.guest_cid.into(), 3, u64::from(u32::MAX) - 1)?;
            path("vsock.directory", &vsock.directory)?;
        }
        for (index, net) in self.net.iter().enumerate() {
            if let Some(tap) = &net.tap
                && (tap.is_empty() || tap.len() > 15 || tap.bytes().any(|b| b == b'/' || !b.is_ascii_graphic()))
            {
                return Err(text(format!("net[{index}].tap"), "is not the name of a network interface"));
            }
            if net.mac[0] & 1 != 0 {
                return Err(text(format!("net[{index}].mac"), "is a multicast address"));
            }
        }
        for (index, share) in self.shares.iter().enumerate() {
            if share.tag.is_empty() || share.tag.len() > MAX_TAG_BYTES || share.tag.contains('\0') {
                return Err(text(format!("shares[{index}].tag"), "must have 1 to 36 bytes and no zero"));
            }
            if self.shares[..index].iter().any(|s| s.tag == share.tag) {
                return Err(text(format!("shares[{index}].tag"), "is that of another share"));
            }
            share.socket.as_deref().map_or(Ok(()), |v| path(&format!("shares[{index}].socket"), v))?;
        }
        Ok(())
    }
}

fn range(field: &'static str, value: u64, min: u64, max: u64) -> Result<(), ConfigError> {
    if (min..=max).contains(&value) { Ok(()) } else { Err(ConfigError::Range { field, value, min, max }) }
}

fn text(field: impl Into<String>, problem: &'static str) -> ConfigError {
    ConfigError::Text { field: field.into(), problem }
}

/// The monitor runs in another directory than who configures it: only absolute paths mean the same to both.
fn path(field: &str, value: &Path) -> Result<(), ConfigError> {
    if !value.is_absolute() {
        return Err(text(field, "is not an absolute path"));
    }
    if value.to_str().is_none_or(|s| s.contains('\0')) {
        return Err(text(field, "is not UTF-8 or has a zero byte"));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
