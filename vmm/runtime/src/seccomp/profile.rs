//! The default profile: what containers get from docker and podman without being asked. Everything is allowed that an ordinary program
//! needs; what manages the machine, its namespaces, keys or modules needs a capability that the container must have been given.
use oci_spec::runtime::{Capability, LinuxSeccomp};
use serde_json::json;

use super::table::SYSCALLS;

/// Never allowed by the default profile, whatever the capabilities.
const DENIED: &[&str] = &[
    "_sysctl",
    "add_key",
    "afs_syscall",
    "clone",
    "clone3",
    "create_module",
    "futex_requeue",
    "futex_wait",
    "futex_wake",
    "get_kernel_syms",
    "getpmsg",
    "io_uring_enter",
    "io_uring_register",
    "io_uring_setup",
    "kexec_file_load",
    "kexec_load",
    "keyctl",
    "map_shadow_stack",
    "migrate_pages",
    "move_pages",
    "nfsservctl",
    "personality",
    "pivot_root",
    "putpmsg",
    "query_module",
    "request_key",
    "security",
    "swapoff",
    "swapon",
    "sysfs",
    "tuxcall",
    "uretprobe",
    "uselib",
    "userfaultfd",
    "ustat",
    "vserver",
    "socket",
];

/// Allowed only with one of these capabilities.
const WITH_CAPABILITY: &[(Capability, &[&str])] = &[
    (
        Capability::SysAdmin,
        &[
            "bpf",
            "clone",
            "clone3",
            "fanotify_init",
            "fsconfig",
            "fsmount",
            "fsopen",
            "fspick",
            "lookup_dcookie",
            "mount",
            "mount_setattr",
            "move_mount",
            "open_tree",
            "open_tree_attr",
            "perf_event_open",
            "quotactl",
            "quotactl_fd",
            "setdomainname",
            "sethostname",
            "setns",
            "syslog",
            "umount2",
            "unshare",
        ],
    ),
    (Capability::SysBoot, &["reboot"]),
    (Capability::SysChroot, &["chroot"]),
    (Capability::SysModule, &["delete_module", "init_module", "finit_module"]),
    (Capability::SysPacct, &["acct"]),
    (Capability::SysRawio, &["iopl", "ioperm"]),
    (Capability::SysTime, &["settimeofday", "clock_settime", "clock_adjtime"]),
    (Capability::SysTtyConfig, &["vhangup"]),
    (Capability::SysNice, &["get_mempolicy", "mbind", "set_mempolicy", "set_mempolicy_home_node"]),
    (Capability::Syslog, &["syslog"]),
    (Capability::DacReadSearch, &["open_by_handle_at"]),
    (Capability::Bpf, &["bpf"]),
    (Capability::Perfmon, &["perf_event_open"]),
];

/// CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET}: clone may not ask for namespaces.
const CLONE_NAMESPACES: u64 = 0x7e02_0000;
/// AF_VSOCK: the way to the agent's host side is not the container's.
const AF_VSOCK: u64 = 40;

/// The default profile for a container with these bounding capabilities.
pub fn default_profile(has: impl Fn(Capability) -> bool) -> LinuxSeccomp {
    let granted: Vec<&str> = WITH_CAPABILITY
        .iter()
        .filter(|(capability, _)| has(*capability))
        .flat_map(|(_, names)| names.iter().copied())
        .collect();
    let conditional: Vec<&str> = WITH_CAPABILITY.iter().flat_map(|(_, names)| names.iter().copied()).collect();
    let allowed: Vec<&str> = SYSCALLS
        .iter()
        .map(|(name, _)| *name)
        .filter(|name| granted.contains(name) || !(DENIED.contains(name) || conditional.contains(name)))
        .collect();
    let mut syscalls = vec![
        json!({"names": allowed, "action": "SCMP_ACT_ALLOW"}),
        json!({"names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": AF_VSOCK, "op": "SCMP_CMP_NE"}]}),
    ];
    for persona in [0x0_u64, 0x8, 0x20000, 0x20008, 0xffff_ffff] {
        syscalls.push(json!({"names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": persona, "op": "SCMP_CMP_EQ"}]}));
    }
    if !has(Capability::SysAdmin) {
        let no_namespaces = json!([{"index": 0, "value": CLONE_NAMESPACES, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]);
        syscalls.push(json!({"names": ["clone"], "action": "SCMP_ACT_ALLOW", "args": no_namespaces}));
        // Its flags are in memory, where no filter can see them: libc falls back on clone.
        syscalls.push(json!({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}));
    }
    let profile = json!({
        "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1, "architectures": ["SCMP_ARCH_X86_64"], "syscalls": syscalls
    });
    serde_json::from_value(profile).unwrap_or_default()
}
