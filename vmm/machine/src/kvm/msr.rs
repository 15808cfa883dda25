//! Model-specific registers: what is set at boot, and what a snapshot holds.
//!
//! Each one is optional: which ones KVM accepts differs between hosts. Who sets them learns which were refused.

use super::{KvmError, failed};
use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

/// `IA32_MISC_ENABLE`, fast strings.
const MISC_ENABLE: u32 = 0x1a0;
const FAST_STRINGS: u64 = 1;
/// `IA32_MTRR_DEF_TYPE`: MTRRs enabled, all memory write-back.
const MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;
/// Set first when a snapshot is restored: the deadline of the timer is meaningful only with the TSC that it refers to.
const TSC: u32 = 0x10;
/// Set last.
const TSC_DEADLINE: u32 = 0x6e0;
/// The most MSRs that are saved.
pub const MAX_MSRS: usize = 4096;
/// What the wrapper of KVM's calls takes at once.
const BATCH: usize = 256;

/// One register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Msr {
    /// Number.
    pub index: u32,
    /// Value.
    pub value: u64,
}

/// A vCPU's registers before it enters a kernel.
pub fn at_boot() -> [Msr; 2] {
    [Msr { index: MISC_ENABLE, value: FAST_STRINGS }, Msr { index: MTRR_DEF_TYPE, value: MTRR_WRITE_BACK }]
}

/// Sets each register; returns those that KVM refused.
///
/// # Errors
/// KVM takes no list of MSRs at all.
pub fn set(vcpu: &VcpuFd, msrs: &[Msr]) -> Result<Vec<Msr>, KvmError> {
    let mut refused = Vec::new();
    let mut rest = msrs;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(BATCH)];
        let entries: Vec<_> =
            batch.iter().map(|m| kvm_msr_entry { index: m.index, data: m.value, ..kvm_msr_entry::default() }).collect();
        let list = Msrs::from_entries(&entries).map_err(|_| KvmError::TooMany("MSRs"))?;
        // KVM stops at the first that it refuses and says how many it took.
        let taken = vcpu.set_msrs(&list).map_err(failed("set MSRs"))?;
        refused.extend(batch.get(taken));
        rest = rest.get(batch.len().min(taken + 1)..).unwrap_or_default();
    }
    Ok(refused)
}

/// Reads all that KVM lists as the state of a vCPU and that can be read, in the order to set them in.
///
/// # Errors
/// KVM lists none, or takes no list.
pub fn get_all(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Vec<Msr>, KvmError> {
    let indices = kvm.get_msr_index_list().map_err(failed("list its MSRs"))?;
    let mut indices = indices.as_slice().to_vec();
    indices.truncate(MAX_MSRS);
    indices.sort_by_key(|&i| match i {
        TSC => 0,
        TSC_DEADLINE => 2,
        _ => 1,
    });
    let mut values = Vec::with_capacity(indices.len());
    let mut rest = &indices[..];
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(BATCH)];
        let entries: Vec<_> = batch.iter().map(|&index| kvm_msr_entry { index, ..kvm_msr_entry::default() }).collect();
        let mut list = Msrs::from_entries(&entries).map_err(|_| KvmError::TooMany("MSRs"))?;
        let read = vcpu.get_msrs(&mut list).map_err(failed("read MSRs"))?;
        values.extend(list.as_slice().iter().take(read).map(|e| Msr { index: e.index, value: e.data }));
        rest = rest.get(batch.len().min(read + 1)..).unwrap_or_default();
    }
    Ok(values)
}
