//! What every guest boots: the kernel, from the cache, and the agent, which is part of this program, as an initramfs.
use std::{
    fs,
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use caisson_guest_kernel::Kernel;
use caisson_machine::config::KvmKind;
use caisson_rootfs::initramfs::{InitramfsError, agent_initramfs};
use sha2::{Digest, Sha256};

use crate::paths::{At, PathError, Paths};

/// The agent's program.
static AGENT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/caisson-agent"));

/// Why a guest has nothing to boot.
#[derive(Debug, thiserror::Error)]
pub enum AssetsError {
    /// The kernel.
    #[error("there is no guest kernel")]
    Kernel(#[from] caisson_guest_kernel::Error),
    /// The initramfs cannot be made.
    #[error(transparent)]
    Initramfs(#[from] InitramfsError),
    /// The initramfs cannot be written.
    #[error(transparent)]
    Path(#[from] PathError),
}

/// Kernel and initramfs.
#[derive(Debug, Clone)]
pub struct Assets {
    /// ELF vmlinux.
    pub kernel: PathBuf,
    /// Stands for all that the kernel was built from.
    pub kernel_key: String,
    /// The agent as an initramfs.
    pub initramfs: PathBuf,
    /// The agent's hash.
    pub agent_hash: String,
}

impl Assets {
    /// Finds what is there and makes what is not; `progress` is told what takes long.
    pub fn prepare(paths: &Paths, progress: impl FnMut(&str)) -> Result<Assets, AssetsError> {
        let kernel = match Kernel::find()? {
            Some(kernel) => kernel,
            None => Kernel::ensure(progress)?,
        };
        let agent_hash = agent_hash();
        let initramfs = paths.cache.join(format!("agent-{agent_hash}.cpio"));
        if !initramfs.exists() {
            write_initramfs(&initramfs)?;
        }
        Ok(Assets { kernel: kernel.vmlinux, kernel_key: kernel.key, initramfs, agent_hash })
    }

    /// What stands for kernel and agent: a snapshot fits only what it was taken of.
    pub fn identity(&self) -> String {
        format!("kernel {} agent {} protocol {}", self.kernel_key, self.agent_hash, caisson_agent_protocol::VERSION)
    }

    /// The kernel's command line.
    pub fn command_line(kind: KvmKind) -> String {
        caisson_guest_kernel::command_line(kind == KvmKind::Software)
    }
}

/// 16 hexadecimal digits of the agent's SHA-256.
pub fn agent_hash() -> String {
    let digest = Sha256::digest(AGENT);
    digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

fn write_initramfs(path: &Path) -> Result<(), AssetsError> {
    let archive = agent_initramfs(AGENT)?;
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).at("create the directory", parent)?;
    }
    let temporary = path.with_extension(format!("tmp{}", std::process::id()));
    let mut file = fs::OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(&temporary)
        .at("create", &temporary)?;
    file.write_all(&archive).at("write", &temporary)?;
    file.sync_data().at("write back", &temporary)?;
    fs::rename(&temporary, path).at("rename into place", path)?;
    Ok(())
}
