//! A process: user, capabilities, limits, scheduling.
use caisson_agent_protocol as agent;
use oci_spec::runtime::{
    Capabilities, Capability, IOPriorityClass, LinuxSchedulerFlag, LinuxSchedulerPolicy, LinuxSeccomp, PosixRlimitType,
    Process,
};

use super::{SpecError, utf8};
use crate::seccomp;

/// Capabilities by number (<linux/capability.h>).
const CAPABILITIES: [Capability; 41] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::DacReadSearch,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setpcap,
    Capability::LinuxImmutable,
    Capability::NetBindService,
    Capability::NetBroadcast,
    Capability::NetAdmin,
    Capability::NetRaw,
    Capability::IpcLock,
    Capability::IpcOwner,
    Capability::SysModule,
    Capability::SysRawio,
    Capability::SysChroot,
    Capability::SysPtrace,
    Capability::SysPacct,
    Capability::SysAdmin,
    Capability::SysBoot,
    Capability::SysNice,
    Capability::SysResource,
    Capability::SysTime,
    Capability::SysTtyConfig,
    Capability::Mknod,
    Capability::Lease,
    Capability::AuditWrite,
    Capability::AuditControl,
    Capability::Setfcap,
    Capability::MacOverride,
    Capability::MacAdmin,
    Capability::Syslog,
    Capability::WakeAlarm,
    Capability::BlockSuspend,
    Capability::AuditRead,
    Capability::Perfmon,
    Capability::Bpf,
    Capability::CheckpointRestore,
];

/// All capabilities, by name, for `features`.
pub fn capability_names() -> Vec<String> {
    CAPABILITIES.iter().map(|capability| format!("CAP_{capability}")).collect()
}

/// A capability by its name, with or without CAP_, in any case.
pub fn capability_by_name(name: &str) -> Option<Capability> {
    let upper = name.to_ascii_uppercase();
    let short = upper.strip_prefix("CAP_").unwrap_or(&upper);
    CAPABILITIES.into_iter().find(|capability| capability.to_string() == short)
}

/// All capabilities.
pub fn all_capabilities() -> Capabilities {
    CAPABILITIES.into_iter().collect()
}

/// A set as a mask.
pub fn capability_mask(set: Option<&Capabilities>) -> u64 {
    CAPABILITIES
        .iter()
        .enumerate()
        .filter(|(_, capability)| set.is_some_and(|set| set.contains(capability)))
        .map(|(bit, _)| 1 << bit)
        .sum()
}

/// Describes a process to the agent.
pub fn convert_process(process: &Process, filter: Option<&LinuxSeccomp>) -> Result<agent::Process, SpecError> {
    let args = process.args().clone().unwrap_or_default();
    if args.is_empty() {
        return Err(SpecError::value("process.args", "must not be empty"));
    }
    let cwd = utf8(process.cwd(), "process.cwd")?;
    if !cwd.starts_with('/') {
        return Err(SpecError::value("process.cwd", format!("{cwd} is not absolute")));
    }
    let user = process.user();
    let sets = process.capabilities().as_ref();
    let capabilities = sets.map_or_else(agent::Capabilities::default, |sets| agent::Capabilities {
        bounding: capability_mask(sets.bounding().as_ref()),
        effective: capability_mask(sets.effective().as_ref()),
        inheritable: capability_mask(sets.inheritable().as_ref()),
        permitted: capability_mask(sets.permitted().as_ref()),
        ambient: capability_mask(sets.ambient().as_ref()),
    });
    let mut rlimits: Vec<agent::Rlimit> = Vec::new();
    for rlimit in process.rlimits().iter().flatten() {
        let resource = rlimit_number(rlimit.typ());
        if rlimits.iter().any(|known| known.resource == resource) {
            return Err(SpecError::value("process.rlimits", format!("{} is there twice", rlimit.typ())));
        }
        rlimits.push(agent::Rlimit { resource, soft: rlimit.soft(), hard: rlimit.hard() });
    }
    let terminal = process.terminal().unwrap_or(false).then(|| {
        let characters = |value: u64| u16::try_from(value).unwrap_or(u16::MAX);
        process.console_size().map_or_else(agent::TerminalSize::default, |size| agent::TerminalSize {
            width: characters(size.width()),
            height: characters(size.height()),
        })
    });
    Ok(agent::Process {
        args,
        env: process.env().clone().unwrap_or_default(),
        cwd,
        user: agent::User::Ids {
            uid: user.uid(),
            gid: user.gid(),
            additional_gids: user.additional_gids().clone().unwrap_or_default(),
            umask: user.umask(),
        },
        capabilities,
        no_new_privileges: process.no_new_privileges().unwrap_or(false),
        rlimits,
        oom_score_adj: process.oom_score_adj(),
        terminal,
        seccomp: filter.map(seccomp::compile).transpose()?.into_iter().collect(),
        scheduler: process.scheduler().as_ref().map(scheduler),
        io_priority: process
            .io_priority()
            .map(|priority| {
                let class = match priority.class() {
                    IOPriorityClass::IoprioClassRt => 1,
                    IOPriorityClass::IoprioClassBe => 2,
                    IOPriorityClass::IoprioClassIdle => 3,
                };
                let level = u8::try_from(priority.priority()).ok().filter(|level| *level <= 7);
                level
                    .map(|level| (class, level))
                    .ok_or_else(|| SpecError::value("process.ioPriority", "priority is not within 0..=7"))
            })
            .transpose()?,
        personality: None,
    })
}

/// RLIMIT_* of x86-64.
fn rlimit_number(kind: PosixRlimitType) -> u8 {
    let number = match kind {
        PosixRlimitType::RlimitCpu => libc::RLIMIT_CPU,
        PosixRlimitType::RlimitFsize => libc::RLIMIT_FSIZE,
        PosixRlimitType::RlimitData => libc::RLIMIT_DATA,
        PosixRlimitType::RlimitStack => libc::RLIMIT_STACK,
        PosixRlimitType::RlimitCore => libc::RLIMIT_CORE,
        PosixRlimitType::RlimitRss => libc::RLIMIT_RSS,
        PosixRlimitType::RlimitNproc => libc::RLIMIT_NPROC,
        PosixRlimitType::RlimitNofile => libc::RLIMIT_NOFILE,
        PosixRlimitType::RlimitMemlock => libc::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitAs => libc::RLIMIT_AS,
        PosixRlimitType::RlimitLocks => libc::RLIMIT_LOCKS,
        PosixRlimitType::RlimitSigpending => libc::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitMsgqueue => libc::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => libc::RLIMIT_NICE,
        PosixRlimitType::RlimitRtprio => libc::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => libc::RLIMIT_RTTIME,
    };
    number as u8
}

fn scheduler(scheduler: &oci_spec::runtime::Scheduler) -> agent::Scheduler {
    let policy = match scheduler.policy() {
        LinuxSchedulerPolicy::SchedOther => 0,
        LinuxSchedulerPolicy::SchedFifo => 1,
        LinuxSchedulerPolicy::SchedRr => 2,
        LinuxSchedulerPolicy::SchedBatch => 3,
        LinuxSchedulerPolicy::SchedIso => 4,
        LinuxSchedulerPolicy::SchedIdle => 5,
        LinuxSchedulerPolicy::SchedDeadline => 6,
    };
    let flag = |flag: &LinuxSchedulerFlag| match flag {
        LinuxSchedulerFlag::SchedResetOnFork => 0x01,
        LinuxSchedulerFlag::SchedFlagReclaim => 0x02,
        LinuxSchedulerFlag::SchedFlagDLOverrun => 0x04,
        LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x08,
        LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
        LinuxSchedulerFlag::SchedFlagUtilClampMin => 0x20,
        LinuxSchedulerFlag::SchedFlagUtilClampMax => 0x40,
    };
    agent::Scheduler {
        policy,
        flags: scheduler.flags().iter().flatten().map(flag).fold(0, |flags, bit: u64| flags | bit),
        nice: scheduler.nice().unwrap_or(0),
        priority: u32::try_from(scheduler.priority().unwrap_or(0)).unwrap_or(0),
        runtime: scheduler.runtime().unwrap_or(0),
        deadline: scheduler.deadline().unwrap_or(0),
        period: scheduler.period().unwrap_or(0),
    }
}
