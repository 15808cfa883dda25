//! Where the time of a start goes: marks on the monotonic clock, which all processes of a host share.
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::clock::monotonic_ns;

/// The marks of a start in the order in which they happen; zero for one that did not.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Timing {
    /// The command began.
    pub request_ns: u64,
    /// The supervisor began.
    pub supervisor_ns: u64,
    /// The monitor was executed.
    pub monitor_ns: u64,
    /// The machine is about to run for the first time.
    pub first_run_ns: u64,
    /// The agent answered.
    pub agent_ready_ns: u64,
    /// The agent has set the container up.
    pub created_ns: u64,
    /// The agent has started the program.
    pub started_ns: u64,
    /// The first byte of the program's output arrived.
    pub first_output_ns: u64,
    /// The agent reported the program's end.
    pub exit_ns: u64,
    /// The monitor is gone.
    pub ended_ns: u64,
    /// Whether a template was restored.
    pub template: bool,
    /// Time within KVM_RUN, as the monitor reports it at its end.
    pub kvm_run_ns: u64,
    /// Time that vCPU threads spent outside KVM_RUN.
    pub vcpu_host_ns: u64,
    /// Exits by kind.
    pub exits: BTreeMap<String, u64>,
    /// Instructions supplied for software KVM, by mnemonic.
    pub assists: BTreeMap<String, u64>,
}

impl Timing {
    /// Sets a mark that is not set yet.
    pub fn mark(mark: &mut u64) {
        if *mark == 0 {
            *mark = monotonic_ns();
        }
    }

    /// The phases by name, each with the nanoseconds from the request to its end.
    pub fn phases(&self) -> Vec<(&'static str, u64)> {
        let marks = [
            ("supervisor runs", self.supervisor_ns),
            ("monitor executed", self.monitor_ns),
            ("first KVM_RUN", self.first_run_ns),
            ("agent ready", self.agent_ready_ns),
            ("container created", self.created_ns),
            ("program started", self.started_ns),
            ("first output byte", self.first_output_ns),
            ("program ended", self.exit_ns),
            ("machine gone", self.ended_ns),
        ];
        marks
            .into_iter()
            .filter(|(_, at)| *at != 0)
            .map(|(name, at)| (name, at.saturating_sub(self.request_ns)))
            .collect()
    }
}
