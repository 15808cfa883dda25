//! Limits: the OCI's values, which are those of cgroup v1, as cgroup v2 values for the guest.
use caisson_agent_protocol as agent;
use oci_spec::runtime::{LinuxDeviceType, LinuxResources};

use super::SpecError;

/// cpu.cfs_period_us when none is given.
const DEFAULT_PERIOD_US: u64 = 100_000;

/// Translates limits.
pub fn convert_resources(resources: &LinuxResources) -> Result<agent::Resources, SpecError> {
    let mut converted = agent::Resources::default();
    if let Some(memory) = resources.memory() {
        converted.memory_max_bytes = memory.limit().and_then(limit);
        converted.memory_low_bytes = memory.reservation().and_then(limit).filter(|bytes| *bytes != u64::MAX);
        converted.swap_max_bytes = match (memory.swap(), memory.limit()) {
            (Some(-1), _) => Some(u64::MAX),
            (Some(swap @ 1..), Some(limit @ 1..)) => Some(u64::try_from(swap - limit).map_err(|_| {
                SpecError::value(
                    "linux.resources.memory.swap",
                    format!("{swap} is memory and swap together, less than the memory limit {limit}"),
                )
            })?),
            _ => None,
        };
    }
    if let Some(cpu) = resources.cpu() {
        converted.cpu_weight = cpu.shares().filter(|shares| *shares != 0).map(weight);
        let period = cpu.period().filter(|period| *period != 0);
        converted.cpu_max_us = match (cpu.quota(), period) {
            (Some(quota @ 1..), period) => Some((quota as u64, period.unwrap_or(DEFAULT_PERIOD_US))),
            (Some(_), period) => Some((u64::MAX, period.unwrap_or(DEFAULT_PERIOD_US))),
            (None, Some(period)) => Some((u64::MAX, period)),
            (None, None) => None,
        };
        if cpu.idle() == Some(1) {
            converted.unified.push(("cpu.idle".into(), "1".into()));
        }
        if let Some(burst) = cpu.burst() {
            converted.unified.push(("cpu.max.burst".into(), burst.to_string()));
        }
    }
    if let Some(pids) = resources.pids() {
        converted.pids_max = limit(pids.limit());
    }
    for rule in resources.devices().iter().flatten() {
        let number = |value: Option<i64>| match value {
            None | Some(-1) => Ok(None),
            Some(value) => u32::try_from(value)
                .map(Some)
                .map_err(|_| SpecError::value("linux.resources.devices", format!("{value} is no device number"))),
        };
        let access = rule.access().as_deref().unwrap_or("rwm");
        converted.devices.push(agent::DeviceRule {
            allow: rule.allow(),
            kind: match rule.typ().unwrap_or(LinuxDeviceType::A) {
                LinuxDeviceType::B => b'b',
                LinuxDeviceType::C | LinuxDeviceType::U => b'c',
                LinuxDeviceType::A | LinuxDeviceType::P => b'a',
            },
            major: number(rule.major())?,
            minor: number(rule.minor())?,
            access: u8::from(access.contains('m'))
                | u8::from(access.contains('r')) << 1
                | u8::from(access.contains('w')) << 2,
        });
    }
    let mut unified: Vec<_> =
        resources.unified().iter().flatten().map(|(name, value)| (name.clone(), value.clone())).collect();
    unified.sort();
    for (name, value) in unified {
        if name.contains('/') || name.starts_with("cgroup.") {
            return Err(SpecError::value("linux.resources.unified", format!("{name} is no limit")));
        }
        converted.unified.push((name, value));
    }
    Ok(converted)
}

/// A limit in the OCI's way: 0 is unset, negative is unlimited.
fn limit(value: i64) -> Option<u64> {
    match value {
        0 => None,
        1.. => Some(value as u64),
        _ => Some(u64::MAX),
    }
}

/// cpu.shares (2..=262144) as cpu.weight (1..=10000), as runc and systemd have it.
fn weight(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}
