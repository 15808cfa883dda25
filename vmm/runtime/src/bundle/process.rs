//! A process (config.md, "Process" and "Linux Process").
use super::BundleError;
use caisson_agent_protocol::{Capabilities, Process, Rlimit, Scheduler, TerminalSize, User};
use oci_spec::runtime::{
    IOPriorityClass, Linux, LinuxPersonalityDomain, LinuxSchedulerFlag, LinuxSchedulerPolicy, PosixRlimitType,
};

/// Translates a process of a container with this `linux` section (which holds its filter and personality).
pub fn process(of: &oci_spec::runtime::Process, linux: &Linux) -> Result<Process, BundleError> {
    let args = of.args().clone().unwrap_or_default();
    if args.first().is_none_or(String::is_empty) {
        return Err(BundleError::invalid("process.args", "is empty"));
    }
    let cwd = of.cwd().to_string_lossy().into_owned();
    if !cwd.starts_with('/') {
        return Err(BundleError::invalid("process.cwd", format!("{cwd:?} is not absolute")));
    }
    let env = of.env().clone().unwrap_or_default();
    if args.iter().chain(&env).chain([&cwd]).any(|text| text.contains('\0')) {
        return Err(BundleError::invalid("process", "a string holds a NUL"));
    }
    if of.exec_cpu_affinity().is_some() {
        return Err(BundleError::refused("process.execCPUAffinity", "the host's CPUs are not the guest's"));
    }
    let user = of.user();
    Ok(Process {
        args,
        env,
        cwd,
        user: User::Ids {
            uid: user.uid(),
            gid: user.gid(),
            additional_gids: user.additional_gids().clone().unwrap_or_default(),
            umask: user.umask(),
        },
        capabilities: of.capabilities().as_ref().map(capabilities).unwrap_or_default(),
        no_new_privileges: of.no_new_privileges().unwrap_or(false),
        rlimits: rlimits(of.rlimits().as_deref().unwrap_or_default())?,
        oom_score_adj: of.oom_score_adj().map(|value| value.clamp(-1000, 1000)),
        terminal: of.terminal().unwrap_or(false).then(|| {
            let side = |side: u64| u16::try_from(side).unwrap_or(u16::MAX);
            of.console_size()
                .map(|size| TerminalSize { width: side(size.width()), height: side(size.height()) })
                .unwrap_or_default()
        }),
        seccomp: linux.seccomp().as_ref().map(crate::seccomp::compile).transpose()?.into_iter().collect(),
        scheduler: of.scheduler().as_ref().map(scheduler),
        io_priority: of.io_priority().as_ref().map(|of| io_priority(of.class(), of.priority())).transpose()?,
        personality: linux.personality().as_ref().map(|of| match of.domain() {
            LinuxPersonalityDomain::PerLinux => 0,
            LinuxPersonalityDomain::PerLinux32 => 8,
        }),
    })
}

fn capabilities(of: &oci_spec::runtime::LinuxCapabilities) -> Capabilities {
    let mask = |set: &Option<oci_spec::runtime::Capabilities>| {
        let names = set.iter().flatten().map(ToString::to_string);
        let numbers = names.filter_map(|name| CAPABILITIES.iter().position(|known| *known == name));
        numbers.fold(0, |mask, number| mask | 1 << number)
    };
    Capabilities {
        bounding: mask(of.bounding()),
        effective: mask(of.effective()),
        inheritable: mask(of.inheritable()),
        permitted: mask(of.permitted()),
        ambient: mask(of.ambient()),
    }
}

/// The capabilities of Linux, each at its number (include/uapi/linux/capability.h), without `CAP_`.
#[rustfmt::skip]
pub(crate) const CAPABILITIES: &[&str] = &[
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP", "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER", "SYS_MODULE", "SYS_RAWIO",
    "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE", "SYS_RESOURCE", "SYS_TIME",
    "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP", "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG",
    "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF", "CHECKPOINT_RESTORE",
];

fn rlimits(all: &[oci_spec::runtime::PosixRlimit]) -> Result<Vec<Rlimit>, BundleError> {
    let mut found: Vec<Rlimit> = Vec::new();
    for limit in all {
        let resource = rlimit_number(limit.typ());
        if found.iter().any(|other| other.resource == resource) {
            return Err(BundleError::invalid("process.rlimits", format!("{} is there twice", limit.typ())));
        }
        if limit.soft() > limit.hard() {
            return Err(BundleError::invalid(
                "process.rlimits",
                format!("{}: the soft limit is above the hard one", limit.typ()),
            ));
        }
        found.push(Rlimit { resource, soft: limit.soft(), hard: limit.hard() });
    }
    Ok(found)
}

/// include/uapi/asm-generic/resource.h.
fn rlimit_number(of: PosixRlimitType) -> u8 {
    use PosixRlimitType::*;
    match of {
        RlimitCpu => 0,
        RlimitFsize => 1,
        RlimitData => 2,
        RlimitStack => 3,
        RlimitCore => 4,
        RlimitRss => 5,
        RlimitNproc => 6,
        RlimitNofile => 7,
        RlimitMemlock => 8,
        RlimitAs => 9,
        RlimitLocks => 10,
        RlimitSigpending => 11,
        RlimitMsgqueue => 12,
        RlimitNice => 13,
        RlimitRtprio => 14,
        RlimitRttime => 15,
    }
}

/// sched_setattr(2).
fn scheduler(of: &oci_spec::runtime::Scheduler) -> Scheduler {
    let policy = match of.policy() {
        LinuxSchedulerPolicy::SchedOther => 0,
        LinuxSchedulerPolicy::SchedFifo => 1,
        LinuxSchedulerPolicy::SchedRr => 2,
        LinuxSchedulerPolicy::SchedBatch => 3,
        LinuxSchedulerPolicy::SchedIso => 4,
        LinuxSchedulerPolicy::SchedIdle => 5,
        LinuxSchedulerPolicy::SchedDeadline => 6,
    };
    let flags = of.flags().iter().flatten().fold(0, |flags, flag| {
        flags
            | match flag {
                LinuxSchedulerFlag::SchedResetOnFork => 0x01,
                LinuxSchedulerFlag::SchedFlagReclaim => 0x02,
                LinuxSchedulerFlag::SchedFlagDLOverrun => 0x04,
                LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x08,
                LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
                LinuxSchedulerFlag::SchedFlagUtilClampMin => 0x20,
                LinuxSchedulerFlag::SchedFlagUtilClampMax => 0x40,
            }
    });
    Scheduler {
        policy,
        flags,
        nice: of.nice().unwrap_or(0),
        priority: of.priority().and_then(|priority| u32::try_from(priority).ok()).unwrap_or(0),
        runtime: of.runtime().unwrap_or(0),
        deadline: of.deadline().unwrap_or(0),
        period: of.period().unwrap_or(0),
    }
}

/// ioprio_set(2).
fn io_priority(class: IOPriorityClass, priority: i64) -> Result<(u8, u8), BundleError> {
    let class = match class {
        IOPriorityClass::IoprioClassRt => 1,
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
    };
    match u8::try_from(priority) {
        Ok(priority @ 0..=7) => Ok((class, priority)),
        _ => Err(BundleError::invalid("process.ioPriority.priority", format!("{priority} is not within 0..=7"))),
    }
}
