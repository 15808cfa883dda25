//! Snapshots: a paused machine as two files in a directory, and a machine built from them.
//!
//! `state` holds the processors, interrupt controllers, clock and devices, guarded by a checksum; `memory` is the guest's
//! memory, sparse, mapped privately by each machine that is restored. Both are readable by their owner only.

pub mod file;
mod memory;
mod state;

pub use file::FormatError;
pub use state::{HostCpu, MachineState};

use crate::config::MachineConfig;
use crate::kvm::cpuid;
use crate::memory::fits;
use crate::monitor::{Machine, lock};
use rustix::fs::{Mode, OFlags};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// Names of the two files.
pub const STATE_NAME: &str = "state";
/// See [`STATE_NAME`].
pub const MEMORY_NAME: &str = "memory";

/// Why a snapshot cannot be written or used.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// A file cannot be read or written.
    #[error("cannot {action} {}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The state file is not one, or is damaged.
    #[error("{} cannot be used", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: FormatError,
    },
    /// It is of another machine, guest or host.
    #[error("the snapshot is of another {what}: it has {saved}, this is {here}")]
    Foreign {
        /// What differs.
        what: &'static str,
        /// What the snapshot says.
        saved: String,
        /// What is here.
        here: String,
    },
    /// The memory file has the wrong length.
    #[error("{} is not the memory of a machine with {mib} MiB", path.display())]
    Memory {
        /// The file.
        path: PathBuf,
        /// Memory of the machine.
        mib: u32,
    },
    /// The machine's state cannot be read.
    #[error("cannot read the machine's state")]
    Read(#[from] crate::kvm::KvmError),
    /// A part of the state is missing.
    #[error("the snapshot has the state of {saved} {what}, the machine has {here}")]
    Count {
        /// Of what.
        what: &'static str,
        /// How many are saved.
        saved: usize,
        /// How many there are.
        here: usize,
    },
}

/// Where a snapshot goes: two empty files, which whoever asked for it has created.
#[derive(Debug)]
pub struct Target {
    /// For the state.
    pub state: File,
    /// For the memory.
    pub memory: File,
}

/// Writes a paused machine.
///
/// # Errors
/// Its state cannot be read, or a file cannot be written.
pub fn save(machine: &Machine, config: &MachineConfig, mut target: Target) -> Result<(), SnapshotError> {
    let written = |name: &str| {
        let path = PathBuf::from(name);
        move |source| SnapshotError::File { action: "write", path: path.clone(), source }
    };
    let mut state = MachineState {
        shape: config.shape(),
        identity: config.identity.clone(),
        cpu: HostCpu::of(&cpuid::supported(&machine.vm.kvm, machine.vm.kind)?),
        vcpus: Vec::new(),
        vm: machine.vm.save()?,
        serial: lock(&machine.serial).save(),
        devices: Vec::new(),
    };
    for vcpu in &machine.vcpus {
        state.vcpus.push(lock(vcpu).save(&machine.vm.kvm)?);
    }
    for slot in &machine.slots {
        state.devices.push(slot.lock().save());
    }
    memory::write(&machine.memory, &target.memory).map_err(written(MEMORY_NAME))?;
    file::write(&mut target.state, &state).map_err(written(STATE_NAME))
}

/// A snapshot that fits the configuration and this host: what [`Machine::restore`] takes.
#[derive(Debug)]
pub struct Snapshot {
    /// The state.
    pub state: MachineState,
    /// The memory.
    pub memory: File,
}

/// Opens a snapshot, and refuses it if it is damaged or does not fit.
///
/// # Errors
/// Says what is wrong with it.
pub fn open(directory: &Path, config: &MachineConfig, cpu: &HostCpu) -> Result<Snapshot, SnapshotError> {
    let error = |name: &str| {
        let path = directory.join(name);
        move |source: io::Error| SnapshotError::File { action: "open", path: path.clone(), source }
    };
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let dir = rustix::fs::open(directory, flags | OFlags::DIRECTORY, Mode::empty()).map_err(|e| error("")(e.into()))?;
    let open = |name: &str| -> Result<File, SnapshotError> {
        let fd = rustix::fs::openat(&dir, name, flags, Mode::empty()).map_err(|e| error(name)(e.into()))?;
        Ok(File::from(fd))
    };
    let path = directory.join(STATE_NAME);
    let mut bytes = Vec::new();
    let limit = file::MAX_FILE_BYTES + 1;
    open(STATE_NAME)?.take(limit).read_to_end(&mut bytes).map_err(error(STATE_NAME))?;
    let state: MachineState = file::decode(&bytes).map_err(|source| SnapshotError::Format { path, source })?;
    check(&state, config, cpu)?;
    let memory = open(MEMORY_NAME)?;
    if !fits(config.memory_mib, &memory).map_err(error(MEMORY_NAME))? {
        return Err(SnapshotError::Memory { path: directory.join(MEMORY_NAME), mib: config.memory_mib });
    }
    Ok(Snapshot { state, memory })
}

/// Whether the state is of the same shape of machine, the same guest, and the same processor.
fn check(state: &MachineState, config: &MachineConfig, cpu: &HostCpu) -> Result<(), SnapshotError> {
    let foreign = |what, saved: String, here: String| Err(SnapshotError::Foreign { what, saved, here });
    let shape = config.shape();
    if state.shape != shape {
        return foreign("shape of machine", format!("{:?}", state.shape), format!("{shape:?}"));
    }
    if state.identity != config.identity {
        return foreign("kernel or agent", state.identity.clone(), config.identity.clone());
    }
    if let Some((saved, here)) = state.cpu.difference(cpu) {
        return foreign("processor", saved, here);
    }
    let count = |what, saved: usize, here: usize| {
        if saved == here { Ok(()) } else { Err(SnapshotError::Count { what, saved, here }) }
    };
    count("vCPUs", state.vcpus.len(), config.vcpus.into())?;
    count("interrupt controllers", state.vm.irqchips.len(), crate::kvm::IRQCHIPS)
}

#[cfg(test)]
mod tests;
