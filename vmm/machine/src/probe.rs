//! What `/dev/kvm` is: with hardware virtualisation, or software KVM that emulates the guest's kernel.
//!
//! A micro-guest spins in long mode at CPL 0, and is timed: microseconds on hardware, some 20 ms on software KVM. The
//! answer is the same until the host is booted again or has another device, so it is cached under those.

use crate::boot::entry;
use crate::config::KvmKind;
use crate::kvm::{self, KvmError, failed};
use crate::memory::{self, MemoryError};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VcpuExit;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

/// Iterations of the loop, two instructions each.
const ITERATIONS: u32 = 20_000;
/// Between what hardware needs (tens of microseconds) and what software KVM does (20 ms).
const THRESHOLD: Duration = Duration::from_millis(2);
/// The least of so many runs counts: a busy host makes some of them slow.
const RUNS: usize = 3;
/// Where the code lies in the micro-guest, above the page tables of a boot.
const CODE: u64 = 0x10_0000;
/// The cache file's name, and the most that is read of it.
const CACHE_NAME: &str = "kvm-kind";
const MAX_CACHE_BYTES: u64 = 1024;

/// Why the question has no answer.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// There is no memory for the micro-guest.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The micro-guest cannot be set up.
    #[error("cannot prepare the guest that probes {}", kvm::DEVICE)]
    Boot(#[from] crate::boot::BootError),
    /// The micro-guest did something else.
    #[error("the guest that probes {} ended with {exit}", kvm::DEVICE)]
    Guest {
        /// What it did.
        exit: String,
    },
}

/// Finds out, or reads it from the cache in `cache_directory` if that is given. A cache that cannot be used is ignored.
///
/// # Errors
/// `/dev/kvm` cannot be used; the message says what to do.
pub fn kvm_kind(cache_directory: Option<&Path>) -> Result<KvmKind, ProbeError> {
    let Some((path, key)) = cache_directory.and_then(|d| cache_key().map(|k| (d.join(CACHE_NAME), k))) else {
        return measure();
    };
    if let Some(kind) = read_cache(&path, &key) {
        return Ok(kind);
    }
    let kind = measure()?;
    // Without a cache it is only slower.
    let _ = write_cache(&path, &key, kind);
    Ok(kind)
}

/// Times the micro-guest.
///
/// # Errors
/// `/dev/kvm` cannot be used.
pub fn measure() -> Result<KvmKind, ProbeError> {
    let memory = memory::map(2, None)?;
    entry::write_tables(&memory)?;
    // mov ecx, ITERATIONS; 1: dec ecx; jnz 1b; out 0x80, al
    let [a, b, c, d] = ITERATIONS.to_le_bytes();
    let code = [0xb9, a, b, c, d, 0xff, 0xc9, 0x75, 0xfc, 0xe6, 0x80];
    memory
        .write_slice(&code, GuestAddress(CODE))
        .map_err(|source| crate::boot::BootError::Memory { what: "the probe", source })?;
    let kvm = kvm::open()?;
    let vm = kvm.create_vm().map_err(failed("create a virtual machine"))?;
    for region in memory.iter() {
        let slot = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the memory outlives the machine, which ends with this function.
        unsafe { vm.set_user_memory_region(slot) }.map_err(failed("set the guest's memory"))?;
    }
    let mut vcpu = vm.create_vcpu(0).map_err(failed("create a vCPU"))?;
    let cpuid = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).map_err(failed("list CPUID"))?;
    vcpu.set_cpuid2(&cpuid).map_err(failed("set CPUID"))?;
    let mut sregs = vcpu.get_sregs().map_err(failed("read special registers"))?;
    entry::set_long_mode(&mut sregs);
    vcpu.set_sregs(&sregs).map_err(failed("set special registers"))?;
    let mut least = Duration::MAX;
    for _ in 0..RUNS {
        vcpu.set_regs(&entry::registers(CODE)).map_err(failed("set registers"))?;
        let start = Instant::now();
        match vcpu.run() {
            Ok(VcpuExit::IoOut(0x80, _)) => least = least.min(start.elapsed()),
            // A signal of the caller's.
            Err(error) if error.errno() == libc::EINTR => {}
            other => return Err(ProbeError::Guest { exit: format!("{other:?}") }),
        }
    }
    Ok(if least > THRESHOLD { KvmKind::Software } else { KvmKind::Hardware })
}

/// What the answer depends on: the host's boot, and the device.
fn cache_key() -> Option<String> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let device = fs::metadata(kvm::DEVICE).ok()?;
    Some(format!("{} {:x} {:x}", boot.trim(), device.rdev(), device.ino()))
}

fn read_cache(path: &Path, key: &str) -> Option<KvmKind> {
    use io::Read;
    let file = fs::OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(path).ok()?;
    let mut text = String::new();
    file.take(MAX_CACHE_BYTES).read_to_string(&mut text).ok()?;
    match text.strip_prefix(key)?.trim() {
        "hardware" => Some(KvmKind::Hardware),
        "software" => Some(KvmKind::Software),
        _ => None,
    }
}

/// Whole or not at all: written beside and renamed.
fn write_cache(path: &Path, key: &str, kind: KvmKind) -> io::Result<()> {
    let name = match kind {
        KvmKind::Hardware => "hardware",
        KvmKind::Software => "software",
    };
    let directory = path.parent().map_or_else(PathBuf::new, Path::to_owned);
    fs::create_dir_all(&directory)?;
    let beside = directory.join(format!(".{CACHE_NAME}.{}", std::process::id()));
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
    let written = writeln!(file, "{key} {name}").and_then(|()| fs::rename(&beside, path));
    if written.is_err() {
        let _ = fs::remove_file(&beside);
    }
    written
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_answer_is_cached_and_a_bad_cache_is_ignored() {
        if !Path::new(kvm::DEVICE).exists() {
            println!("skipped: no {}", kvm::DEVICE);
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(CACHE_NAME);
        let kind = kvm_kind(Some(directory.path())).unwrap();
        assert_eq!(read_cache(&path, &cache_key().unwrap()), Some(kind));
        assert_eq!(kvm_kind(Some(directory.path())).unwrap(), kind);
        assert_eq!(read_cache(&path, "another boot"), None);
        fs::write(&path, "rubbish").unwrap();
        assert_eq!(kvm_kind(Some(directory.path())).unwrap(), kind);
        assert_eq!(read_cache(&path, &cache_key().unwrap()), Some(kind));
    }
}
