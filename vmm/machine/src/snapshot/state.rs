//! What the state file holds.

use crate::config::Shape;
use crate::devices::serial;
use crate::kvm::state::{VcpuState, VmState};
use crate::virtio::TransportState;
use kvm_bindings::CpuId;
use serde::{Deserialize, Serialize};

/// All of a machine but its memory.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineState {
    /// The machine's shape.
    pub shape: Shape,
    /// What the guest is made of.
    pub identity: String,
    /// The processor that it ran on.
    pub cpu: HostCpu,
    /// Each vCPU.
    pub vcpus: Vec<VcpuState>,
    /// Interrupt controllers and clock.
    pub vm: VmState,
    /// The serial port.
    pub serial: serial::State,
    /// The virtio devices, in their order.
    pub devices: Vec<TransportState>,
}

/// The features of a processor that a guest may have come to rely on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostCpu {
    /// CPUID leaf, subleaf, and the registers that are compared.
    leaves: Vec<(u32, u32, [u32; 4])>,
}

/// Leaf, subleaf, and which bits of EAX, EBX, ECX, EDX tell features. Left out are the APIC ids and counts, and what
/// depends on the state of the vCPU.
const COMPARED: &[(u32, u32, [u32; 4])] = &[
    (0, 0, [0, !0, !0, !0]),         // Vendor
    (1, 0, [!0, 0, !(1 << 27), !0]), // Family, model, stepping, features without OSXSAVE
    (7, 0, [0, !0, !(1 << 4), !0]),  // Features without OSPKE
    (7, 1, [!0, !0, !0, !0]),
    (0xd, 0, [!0, 0, !0, !0]), // XCR0, size of all components
    (0xd, 1, [!0, 0, !0, !0]),
    (0x8000_0001, 0, [0, 0, !0, !0]),
    (0x8000_0007, 0, [0, 0, 0, !0]),
    (0x8000_0008, 0, [!0, !0, 0, 0]),
];

impl HostCpu {
    /// What KVM supports of the host's processor.
    pub fn of(supported: &CpuId) -> Self {
        let leaves = supported.as_slice().iter().filter_map(|entry| {
            let (function, index) = (entry.function, entry.index);
            let (_, _, mask) = COMPARED.iter().find(|(f, i, _)| (*f, *i) == (function, index))?;
            let registers = [entry.eax, entry.ebx, entry.ecx, entry.edx];
            let masked = std::array::from_fn(|i| registers[i] & mask[i]);
            Some((function, index, masked))
        });
        Self { leaves: leaves.collect() }
    }

    /// The first leaf that differs, as this one and the other have it.
    pub fn difference(&self, other: &Self) -> Option<(String, String)> {
        let text = |leaf: Option<&(u32, u32, [u32; 4])>| match leaf {
            Some((function, index, registers)) => format!("CPUID {function:#x}.{index} {registers:08x?}"),
            None => "fewer CPUID leaves".to_owned(),
        };
        let longest = self.leaves.len().max(other.leaves.len());
        (0..longest)
            .map(|i| (self.leaves.get(i), other.leaves.get(i)))
            .find(|(mine, theirs)| mine != theirs)
            .map(|(mine, theirs)| (text(mine), text(theirs)))
    }
}
