//! Limits (config-linux.md, "Control groups"): the values of cgroup v1 that the specification speaks in, as cgroup v2 has them.
use super::BundleError;
use caisson_agent_protocol::{DeviceRule, Resources};
use oci_spec::runtime::{LinuxCpu, LinuxDeviceCgroup, LinuxDeviceType, LinuxMemory, LinuxResources};

/// The period of a quota without one, microseconds.
const DEFAULT_PERIOD_US: u64 = 100_000;

/// For the guest's cgroup, and the CPUs of the host that the machine is to run on.
pub fn resources(of: Option<&LinuxResources>) -> Result<(Resources, Option<String>), BundleError> {
    let mut found = Resources::default();
    let Some(of) = of else { return Ok((found, None)) };
    if let Some(memory) = of.memory() {
        self::memory(memory, &mut found)?;
    }
    let mut host_cpus = None;
    if let Some(cpu) = of.cpu() {
        self::cpu(cpu, &mut found)?;
        host_cpus = cpu.cpus().clone().filter(|cpus| !cpus.is_empty());
        if cpu.mems().as_ref().is_some_and(|mems| !mems.is_empty() && mems != "0") {
            return Err(BundleError::refused("linux.resources.cpu.mems", "the guest has one memory node"));
        }
    }
    if let Some(pids) = of.pids() {
        found.pids_max = Some(if pids.limit() > 0 { pids.limit().unsigned_abs() } else { u64::MAX });
    }
    let limited = of.hugepage_limits().iter().flatten().any(|limit| limit.limit() > 0);
    let named = |present: bool, field: &str, reason: &str| {
        if present { Err(BundleError::refused(format!("linux.resources.{field}"), reason)) } else { Ok(()) }
    };
    named(limited, "hugepageLimits", "the guest's kernel has no huge page pools")?;
    named(of.rdma().as_ref().is_some_and(|rdma| !rdma.is_empty()), "rdma", "the guest has no RDMA devices")?;
    if let Some(network) = of.network() {
        let classes = network.class_id().is_some() || network.priorities().as_ref().is_some_and(|all| !all.is_empty());
        named(classes, "network", "cgroup v2 has neither net_cls nor net_prio")?;
    }
    if let Some(io) = of.block_io() {
        let devices = io.weight_device().as_ref().is_some_and(|all| !all.is_empty())
            || io.throttle_read_bps_device().as_ref().is_some_and(|all| !all.is_empty())
            || io.throttle_write_bps_device().as_ref().is_some_and(|all| !all.is_empty())
            || io.throttle_read_iops_device().as_ref().is_some_and(|all| !all.is_empty())
            || io.throttle_write_iops_device().as_ref().is_some_and(|all| !all.is_empty());
        named(devices, "blockIO", "devices of the host are not the guest's")?;
        named(io.weight().is_some_and(|weight| weight != 0), "blockIO.weight", "the guest has one user of its disks")?;
    }
    found.devices = of.devices().iter().flatten().map(device_rule).collect::<Result<_, _>>()?;
    let mut unified: Vec<_> =
        of.unified().iter().flatten().map(|(file, value)| (file.clone(), value.clone())).collect();
    unified.sort();
    if let Some((file, _)) =
        unified.iter().find(|(file, _)| file.is_empty() || file.contains('/') || file.starts_with("cgroup."))
    {
        return Err(BundleError::invalid("linux.resources.unified", format!("{file:?} is no file of a controller")));
    }
    found.unified.extend(unified);
    Ok((found, host_cpus))
}

fn bytes(value: i64) -> Option<u64> {
    match value {
        0 => None,
        1.. => Some(value.unsigned_abs()),
        _ => Some(u64::MAX),
    }
}

fn memory(of: &LinuxMemory, found: &mut Resources) -> Result<(), BundleError> {
    found.memory_max_bytes = of.limit().and_then(bytes);
    found.memory_low_bytes = of.reservation().and_then(bytes);
    // In v1 the value is memory and swap together.
    if let Some(both) = of.swap().and_then(bytes) {
        let memory = found.memory_max_bytes.unwrap_or(0);
        found.swap_max_bytes = Some(match both {
            u64::MAX => u64::MAX,
            _ => both.checked_sub(memory).filter(|_| memory != u64::MAX).ok_or_else(|| {
                BundleError::invalid(
                    "linux.resources.memory.swap",
                    "is memory and swap together: it cannot be less than the memory limit",
                )
            })?,
        });
    }
    if of.disable_oom_killer().unwrap_or(false) {
        return Err(BundleError::refused("linux.resources.memory.disableOOMKiller", "cgroup v2 has no such switch"));
    }
    Ok(())
}

fn cpu(of: &LinuxCpu, found: &mut Resources) -> Result<(), BundleError> {
    // The mapping of runc and crun: 2..=262144 shares to a weight of 1..=10000; 0 is not set.
    if let Some(shares) = of.shares().filter(|shares| *shares != 0) {
        found.cpu_weight = Some(1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142);
    }
    if of.quota().is_some() || of.period().is_some() {
        let quota = of.quota().filter(|quota| *quota > 0).map_or(u64::MAX, i64::unsigned_abs);
        let period = of.period().filter(|period| *period != 0).unwrap_or(DEFAULT_PERIOD_US);
        found.cpu_max_us = Some((quota, period));
    }
    if let Some(burst) = of.burst() {
        found.unified.push(("cpu.max.burst".into(), burst.to_string()));
    }
    if let Some(idle) = of.idle() {
        found.unified.push(("cpu.idle".into(), idle.to_string()));
    }
    let realtime =
        of.realtime_runtime().is_some_and(|value| value != 0) || of.realtime_period().is_some_and(|value| value != 0);
    if realtime {
        return Err(BundleError::refused("linux.resources.cpu.realtimeRuntime", "cgroup v2 has no real-time budgets"));
    }
    Ok(())
}

fn device_rule(of: &LinuxDeviceCgroup) -> Result<DeviceRule, BundleError> {
    let field = "linux.resources.devices";
    let kind = match of.typ() {
        None | Some(LinuxDeviceType::A) => b'a',
        Some(LinuxDeviceType::C | LinuxDeviceType::U) => b'c',
        Some(LinuxDeviceType::B) => b'b',
        Some(LinuxDeviceType::P) => return Err(BundleError::invalid(field, "there are no rules for pipes")),
    };
    // -1 and absence are any.
    let number = |value: Option<i64>| value.and_then(|value| u32::try_from(value).ok());
    let mut access = 0;
    for letter in of.access().as_deref().unwrap_or("rwm").chars() {
        access |= match letter {
            'm' => 1,
            'r' => 2,
            'w' => 4,
            _ => return Err(BundleError::invalid(field, format!("access {letter:?} is none of r, w, m"))),
        };
    }
    Ok(DeviceRule { allow: of.allow(), kind, major: number(of.major()), minor: number(of.minor()), access })
}
