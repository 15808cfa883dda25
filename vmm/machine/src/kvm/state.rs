//! The state of a virtual machine and of its vCPUs, read from KVM and given back to it.

use super::msr::{self, Msr};
use super::vcpu::Vcpu;
use super::{IRQCHIPS, KvmError, Vm, failed};
use kvm_bindings::{
    kvm_clock_data, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_sregs, kvm_vcpu_events,
    kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm};
use serde::{Deserialize, Serialize};

/// Interrupt controllers and clock.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmState {
    /// The two 8259 and the IO-APIC.
    pub irqchips: Vec<kvm_irqchip>,
    /// kvmclock.
    clock: kvm_clock_data,
}

/// One vCPU.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuState {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debugregs: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<Msr>,
    events: kvm_vcpu_events,
    tsc_khz: Option<u32>,
}

impl Vm {
    /// Reads the state.
    ///
    /// # Errors
    /// KVM does not give it.
    pub fn save(&self) -> Result<VmState, KvmError> {
        let mut irqchips = Vec::with_capacity(IRQCHIPS);
        for chip_id in 0..IRQCHIPS as u32 {
            let mut chip = kvm_irqchip { chip_id, ..kvm_irqchip::default() };
            self.fd.get_irqchip(&mut chip).map_err(failed("read an interrupt controller"))?;
            irqchips.push(chip);
        }
        let mut clock = self.fd.get_clock().map_err(failed("read the clock"))?;
        // The flags tell how it was read; given back they would mean something else.
        clock.flags = 0;
        Ok(VmState { irqchips, clock })
    }

    /// Gives it back. The vCPUs come first.
    ///
    /// # Errors
    /// KVM does not take it.
    pub fn restore(&self, state: &VmState) -> Result<(), KvmError> {
        for chip in &state.irqchips {
            self.fd.set_irqchip(chip).map_err(failed("set an interrupt controller"))?;
        }
        let clock = kvm_clock_data { clock: state.clock.clock, ..kvm_clock_data::default() };
        self.fd.set_clock(&clock).map_err(failed("set the clock"))
    }
}

impl Vcpu {
    /// Reads the state of a parked vCPU.
    ///
    /// # Errors
    /// KVM does not give it.
    pub fn save(&self, kvm: &Kvm) -> Result<VcpuState, KvmError> {
        let fd = &self.fd;
        // First: it makes KVM take pending INITs and SIPIs into account.
        let mp_state = fd.get_mp_state().map_err(failed("read the run state"))?;
        Ok(VcpuState {
            mp_state,
            regs: fd.get_regs().map_err(failed("read registers"))?,
            sregs: fd.get_sregs().map_err(failed("read special registers"))?,
            xsave: fd.get_xsave().map_err(failed("read the vector state"))?,
            xcrs: fd.get_xcrs().map_err(failed("read XCR0"))?,
            debugregs: fd.get_debug_regs().map_err(failed("read debug registers"))?,
            lapic: fd.get_lapic().map_err(failed("read a local APIC"))?,
            msrs: msr::get_all(kvm, fd)?,
            events: fd.get_vcpu_events().map_err(failed("read pending events"))?,
            tsc_khz: if kvm.check_extension(Cap::GetTscKhz) { fd.get_tsc_khz().ok() } else { None },
        })
    }

    /// Gives it back to a new vCPU.
    ///
    /// # Errors
    /// KVM does not take it. MSRs that it refuses are listed in `refused_msrs`.
    pub fn restore(&mut self, state: &VcpuState) -> Result<(), KvmError> {
        let fd = &self.fd;
        if let Some(khz) = state.tsc_khz
            && fd.get_tsc_khz().ok() != Some(khz)
        {
            fd.set_tsc_khz(khz).map_err(failed("run the guest's clock at the rate of the snapshot's host"))?;
        }
        fd.set_mp_state(state.mp_state).map_err(failed("set the run state"))?;
        fd.set_regs(&state.regs).map_err(failed("set registers"))?;
        fd.set_sregs(&state.sregs).map_err(failed("set special registers"))?;
        // SAFETY: no feature with a larger area than `kvm_xsave` is enabled: that takes a permission asked of the kernel
        // by arch_prctl, which the monitor does not ask for.
        unsafe { fd.set_xsave(&state.xsave) }.map_err(failed("set the vector state"))?;
        fd.set_xcrs(&state.xcrs).map_err(failed("set XCR0"))?;
        fd.set_debug_regs(&state.debugregs).map_err(failed("set debug registers"))?;
        fd.set_lapic(&state.lapic).map_err(failed("set a local APIC"))?;
        self.refused_msrs = msr::set(fd, &state.msrs)?;
        fd.set_vcpu_events(&state.events).map_err(failed("set pending events"))
    }
}
