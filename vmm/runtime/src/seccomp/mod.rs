//! seccomp for containers: the OCI's description of a filter compiled to classic BPF on the host, and the default profile.
//!
//! The guest kernel runs a new filter once for every system call to learn which ones it always allows, and software KVM interprets guest
//! kernel code, so the shape of the program matters: it is a binary search over ranges of numbers, not a list.
mod bpf;
mod profile;
mod table;
#[cfg(test)]
mod tests;

pub use profile::default_profile;

use caisson_agent_protocol::SeccompFilter;
use oci_spec::runtime::{Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompFilterFlag, LinuxSyscall};

/// seccomp(2) SECCOMP_FILTER_FLAG_LOG.
const FLAG_LOG: u32 = 1 << 1;
/// seccomp(2) SECCOMP_FILTER_FLAG_SPEC_ALLOW.
const FLAG_SPEC_ALLOW: u32 = 1 << 2;
/// SECCOMP_RET_ERRNO | ENOSYS.
const RET_ENOSYS: u32 = 0x0005_0000 | 38;
/// BPF_MAXINSNS.
const MAX_INSTRUCTIONS: usize = 4096;

/// Why a filter cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// SCMP_ACT_NOTIFY and its listener: no descriptor can leave the guest.
    #[error("linux.seccomp asks for SCMP_ACT_NOTIFY, but a listener's descriptor cannot leave the guest")]
    Notify,
    /// A filter for other architectures only.
    #[error(
        "linux.seccomp.architectures holds neither SCMP_ARCH_X86_64 nor SCMP_ARCH_NATIVE: every system call would be killed"
    )]
    Architecture,
    /// An argument index beyond the sixth.
    #[error("linux.seccomp: system call {name}: argument index {index} is not within 0..=5")]
    ArgumentIndex {
        /// The system call.
        name: String,
        /// The index.
        index: usize,
    },
    /// The kernel takes 4096 instructions.
    #[error("linux.seccomp compiles to {0} BPF instructions; the kernel takes {MAX_INSTRUCTIONS}")]
    TooLong(usize),
}

/// Compiles an OCI filter for x86-64. Names that the architecture does not have are skipped, as runc does.
pub fn compile(seccomp: &LinuxSeccomp) -> Result<SeccompFilter, SeccompError> {
    if let Some(architectures) = seccomp.architectures()
        && !architectures.is_empty()
        && !architectures.iter().any(|arch| matches!(arch, Arch::ScmpArchNative | Arch::ScmpArchX86_64))
    {
        return Err(SeccompError::Architecture);
    }
    let default = action(seccomp.default_action(), seccomp.default_errno_ret())?;
    let mut rules = bpf::Rules::new(default);
    for entry in seccomp.syscalls().iter().flatten() {
        let verdict = action(entry.action(), entry.errno_ret())?;
        for name in entry.names() {
            let Some(number) = table::number(name) else { continue };
            if verdict == default && entry.args().as_ref().is_none_or(Vec::is_empty) {
                continue;
            }
            for conditions in conditions(name, entry)? {
                rules.add(number, conditions, verdict);
            }
        }
    }
    // A program that probes for newer system calls falls back on ENOSYS, not on EPERM.
    let beyond = if default & 0xffff_0000 == 0x0005_0000 { RET_ENOSYS } else { default };
    let program = rules.compile(table::SYSCALLS.iter().map(|(_, number)| *number).max().unwrap_or(0), beyond);
    if program.len() > MAX_INSTRUCTIONS {
        return Err(SeccompError::TooLong(program.len()));
    }
    let mut flags = 0;
    for flag in seccomp.flags().iter().flatten() {
        match flag {
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => flags |= FLAG_LOG,
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => flags |= FLAG_SPEC_ALLOW,
            // The program has one thread when the filter is installed; the other is about listeners.
            LinuxSeccompFilterFlag::SeccompFilterFlagTsync
            | LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => {}
        }
    }
    Ok(SeccompFilter { flags, program })
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<u32, SeccompError> {
    match action {
        LinuxSeccompAction::ScmpActNotify => Err(SeccompError::Notify),
        other => Ok(other.as_u32(errno.map(|errno| errno & 0xffff))),
    }
}

/// The conditions of an entry: usually one conjunction; when one argument is named twice, each condition is a rule of its own, as in runc.
fn conditions(name: &str, entry: &LinuxSyscall) -> Result<Vec<Vec<bpf::Condition>>, SeccompError> {
    let mut all = Vec::new();
    let mut seen = [false; 6];
    let mut twice = false;
    for arg in entry.args().iter().flatten() {
        let slot = seen
            .get_mut(arg.index())
            .ok_or_else(|| SeccompError::ArgumentIndex { name: name.to_owned(), index: arg.index() })?;
        twice |= std::mem::replace(slot, true);
        all.push(bpf::Condition {
            index: arg.index() as u32,
            operator: arg.op(),
            value: arg.value(),
            value_two: arg.value_two().unwrap_or(0),
        });
    }
    Ok(if twice { all.into_iter().map(|one| vec![one]).collect() } else { vec![all] })
}
