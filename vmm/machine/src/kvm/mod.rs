//! The virtual machine as KVM knows it: set-up of the VM, its interrupt controllers and its memory slots.

pub mod cpuid;
pub mod msr;
pub mod state;
pub mod vcpu;

use crate::boot::layout;
use crate::config::KvmKind;
use crate::memory::GuestMemory;
use kvm_bindings::{KVM_CAP_EXIT_ON_EMULATION_FAILURE, kvm_enable_cap, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VmFd};
use std::io;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

/// The character device.
pub const DEVICE: &str = "/dev/kvm";
/// The one version of the API there ever was.
const API_VERSION: i32 = 12;

/// Interrupt controllers in the kernel: two 8259 and the IO-APIC.
pub const IRQCHIPS: usize = 3;

/// What KVM refused.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// The device cannot be opened.
    #[error("cannot open {DEVICE}: {hint}")]
    Open {
        /// What to do.
        hint: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Not the API that everybody has.
    #[error("{DEVICE} has API version {0}, not {API_VERSION}")]
    Version(i32),
    /// It lacks something that the machine stands on.
    #[error("KVM on this host lacks {0}")]
    Lacks(&'static str),
    /// A call failed.
    #[error("KVM cannot {what}")]
    Call {
        /// What was asked of it.
        what: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A list is longer than KVM takes.
    #[error("too many {0} for KVM")]
    TooMany(&'static str),
}

/// Turns KVM's errno into an error that says what was tried.
pub fn failed(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> KvmError {
    move |error| KvmError::Call { what, source: io::Error::from_raw_os_error(error.errno()) }
}

/// Opens `/dev/kvm`.
///
/// # Errors
/// It is not there, not ours, or not what it should be; the message says what to do.
pub fn open() -> Result<Kvm, KvmError> {
    let kvm = Kvm::new().map_err(|error| {
        let hint = match error.errno() {
            libc::ENOENT => {
                "load the module kvm_intel or kvm_amd, enable virtualisation in the firmware, or use a host with KVM"
            }
            libc::EACCES | libc::EPERM => "run as root or as a member of the group kvm",
            libc::ENODEV | libc::ENXIO => "the device is there, but no KVM module is behind it",
            libc::EBUSY => "another hypervisor uses the processor's virtualisation",
            _ => "see the cause",
        };
        KvmError::Open { hint, source: io::Error::from_raw_os_error(error.errno()) }
    })?;
    match kvm.get_api_version() {
        API_VERSION => Ok(kvm),
        other => Err(KvmError::Version(other)),
    }
}

/// A virtual machine without vCPUs yet.
#[derive(Debug)]
pub struct Vm {
    /// KVM itself.
    pub kvm: Kvm,
    /// The machine.
    pub fd: VmFd,
    /// What executes the guest.
    pub kind: KvmKind,
}

impl Vm {
    /// Creates a machine with local APICs and an IO-APIC in the kernel.
    ///
    /// # Errors
    /// KVM refuses, or lacks what is needed.
    pub fn new(kvm: Kvm, kind: KvmKind) -> Result<Self, KvmError> {
        let needed = [
            (Cap::Irqchip, "in-kernel interrupt controllers"),
            (Cap::Irqfd, "irqfd"),
            (Cap::Ioeventfd, "ioeventfd"),
            (Cap::UserMemory, "user memory"),
            (Cap::ImmediateExit, "immediate exit"),
            (Cap::ExtCpuid, "CPUID configuration"),
        ];
        for (cap, name) in needed {
            if !kvm.check_extension(cap) {
                return Err(KvmError::Lacks(name));
            }
        }
        let fd = kvm.create_vm().map_err(failed("create a virtual machine"))?;
        fd.set_tss_address(layout::KVM_TSS).map_err(failed("set the TSS address"))?;
        fd.set_identity_map_address(layout::KVM_IDENTITY_MAP).map_err(failed("set the identity map address"))?;
        fd.create_irq_chip().map_err(failed("create the interrupt controllers"))?;
        if kind == KvmKind::Software {
            let mut cap = kvm_enable_cap { cap: KVM_CAP_EXIT_ON_EMULATION_FAILURE, ..kvm_enable_cap::default() };
            cap.args[0] = 1;
            fd.enable_cap(&cap).map_err(failed("hand over instructions that it cannot emulate"))?;
        }
        Ok(Self { kvm, fd, kind })
    }

    /// Makes `memory` the guest's. It must stay mapped as long as the machine is.
    ///
    /// # Errors
    /// KVM refuses a slot.
    pub fn set_memory(&self, memory: &GuestMemory) -> Result<(), KvmError> {
        for (slot, region) in (0..).zip(memory.iter()) {
            let slot = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the region is mapped as long as `memory` is, which the monitor keeps until its exit; guest
            // memory is only ever accessed by volatile copies, so that the guest's writes break no reference.
            unsafe { self.fd.set_user_memory_region(slot) }.map_err(failed("set the guest's memory"))?;
        }
        Ok(())
    }
}
