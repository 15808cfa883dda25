//! From an image's configuration and what the user asks for to an OCI runtime configuration, with docker's defaults.
use oci_spec::{
    image,
    runtime::{Capabilities, Capability, Spec},
};
use serde_json::{Value, json};

use super::{
    SpecError,
    process::{all_capabilities, capability_by_name},
};
use crate::seccomp::default_profile;

/// The PATH of images that set none.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What docker leaves to a container's root user.
const DEFAULT_CAPABILITIES: [Capability; 14] = [
    Capability::AuditWrite,
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Mknod,
    Capability::NetBindService,
    Capability::NetRaw,
    Capability::Setfcap,
    Capability::Setgid,
    Capability::Setpcap,
    Capability::Setuid,
    Capability::SysChroot,
];

/// What the user asks for, over what the image says.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// In place of the image's command.
    pub command: Vec<String>,
    /// In place of the image's entrypoint; it drops the image's command too. Empty resets it.
    pub entrypoint: Option<String>,
    /// K=V, or K to take the value from this process's environment.
    pub env: Vec<String>,
    /// In place of the image's working directory.
    pub workdir: Option<String>,
    /// In place of the image's user.
    pub user: Option<String>,
    /// Of the container.
    pub hostname: String,
    /// The root cannot be written.
    pub read_only: bool,
    /// With a terminal.
    pub terminal: bool,
    /// memory.max in bytes.
    pub memory_bytes: Option<u64>,
    /// CPUs' worth of time, in thousandths.
    pub cpus_milli: Option<u64>,
    /// pids.max.
    pub pids: Option<i64>,
    /// Capabilities to add; ALL for all.
    pub cap_add: Vec<String>,
    /// Capabilities to drop; ALL for all.
    pub cap_drop: Vec<String>,
    /// Everything that the guest can give: all capabilities, no seccomp, nothing masked.
    pub privileged: bool,
    /// Do not set no_new_privs.
    pub new_privileges: bool,
    /// No seccomp filter.
    pub no_seccomp: bool,
    /// NAME=SOFT[:HARD].
    pub ulimits: Vec<String>,
    /// NAME=VALUE.
    pub sysctls: Vec<String>,
    /// PATH[:OPTIONS].
    pub tmpfs: Vec<String>,
    /// Size of /dev/shm in bytes.
    pub shm_bytes: Option<u64>,
}

/// The configuration, and the user in the image's terms.
pub fn spec_for(config: Option<&image::Config>, options: &Options) -> Result<(Spec, String), SpecError> {
    let empty = image::Config::default();
    let config = config.unwrap_or(&empty);
    let args = arguments(config, options)?;
    let user = options.user.clone().or_else(|| config.user().clone()).unwrap_or_default();
    let cwd = options
        .workdir
        .clone()
        .or_else(|| config.working_dir().clone())
        .filter(|dir| !dir.is_empty())
        .unwrap_or_else(|| "/".into());
    let cwd = if cwd.starts_with('/') { cwd } else { format!("/{cwd}") };
    let bounding = capabilities(options)?;
    // Others than root start without effective capabilities, as in docker; setuid programs still can gain those of the bounding set.
    let root = matches!(user.split(':').next().unwrap_or_default(), "" | "0" | "root");
    let effective = if root || options.privileged { bounding.clone() } else { Capabilities::new() };
    let mut process = json!({
        "terminal": options.terminal,
        "user": {"uid": 0, "gid": 0},
        "args": args,
        "env": environment(config, options),
        "cwd": cwd,
        "capabilities": {"bounding": bounding, "effective": effective, "permitted": effective},
        "noNewPrivileges": !(options.privileged || options.new_privileges),
    });
    if !options.ulimits.is_empty() {
        process["rlimits"] = Value::Array(options.ulimits.iter().map(|text| ulimit(text)).collect::<Result<_, _>>()?);
    }
    let mut linux = json!({
        "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "uts"}, {"type": "ipc"}, {"type": "network"}, {"type": "cgroup"}],
        "resources": resources(options),
        "maskedPaths": [],
        "readonlyPaths": [],
    });
    if !options.privileged {
        linux["maskedPaths"] = json!([
            "/proc/acpi",
            "/proc/asound",
            "/proc/interrupts",
            "/proc/kcore",
            "/proc/keys",
            "/proc/latency_stats",
            "/proc/sched_debug",
            "/proc/scsi",
            "/proc/timer_list",
            "/proc/timer_stats",
            "/sys/devices/virtual/powercap",
            "/sys/firmware"
        ]);
        linux["readonlyPaths"] = json!(["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]);
        if !options.no_seccomp {
            linux["seccomp"] = json!(default_profile(|capability| bounding.contains(&capability)));
        }
    }
    let sysctl: serde_json::Map<String, Value> = options
        .sysctls
        .iter()
        .map(|text| text.split_once('=').map(|(name, value)| (name.to_owned(), value.into())))
        .collect::<Option<_>>()
        .ok_or_else(|| SpecError::value("--sysctl", "must be NAME=VALUE"))?;
    linux["sysctl"] = Value::Object(sysctl);
    let spec = json!({
        "ociVersion": "1.2.1",
        "process": process,
        "root": {"path": "rootfs", "readonly": options.read_only},
        "hostname": options.hostname,
        "mounts": mounts(options),
        "linux": linux,
    });
    let spec = serde_json::from_value(spec)
        .map_err(|error| SpecError::value("the configuration made for the image", error.to_string()))?;
    Ok((spec, user))
}

fn arguments(config: &image::Config, options: &Options) -> Result<Vec<String>, SpecError> {
    let mut args = match &options.entrypoint {
        Some(entrypoint) => Some(entrypoint.clone()).filter(|text| !text.is_empty()).into_iter().collect(),
        None => config.entrypoint().clone().unwrap_or_default(),
    };
    if !options.command.is_empty() {
        args.extend(options.command.iter().cloned());
    } else if options.entrypoint.is_none() {
        args.extend(config.cmd().iter().flatten().cloned());
    }
    if args.is_empty() {
        return Err(SpecError::Missing("command: the image names none, so give one after the image's name"));
    }
    Ok(args)
}

/// The image's variables and the user's; a later one replaces an earlier one of the same name.
fn environment(config: &image::Config, options: &Options) -> Vec<String> {
    let mut env: Vec<String> = vec![format!("PATH={DEFAULT_PATH}"), format!("HOSTNAME={}", options.hostname)];
    if options.terminal {
        env.push("TERM=xterm".into());
    }
    let mut set = |variable: String| {
        let name = variable.split('=').next().unwrap_or_default();
        match env.iter_mut().find(|known| known.split('=').next() == Some(name)) {
            Some(known) => *known = variable,
            None => env.push(variable),
        }
    };
    config.env().iter().flatten().for_each(|variable| set(variable.clone()));
    for variable in &options.env {
        if variable.contains('=') {
            set(variable.clone());
        } else if let Ok(value) = std::env::var(variable) {
            set(format!("{variable}={value}"));
        }
    }
    env
}

fn capabilities(options: &Options) -> Result<Capabilities, SpecError> {
    let is_all = |name: &String| name.eq_ignore_ascii_case("all");
    let named = |name: &String| {
        capability_by_name(name).ok_or_else(|| SpecError::value("capability", format!("there is none named {name}")))
    };
    if options.privileged {
        return Ok(all_capabilities());
    }
    let mut set: Capabilities = if options.cap_add.iter().any(is_all) {
        all_capabilities()
    } else if options.cap_drop.iter().any(is_all) {
        Capabilities::new()
    } else {
        DEFAULT_CAPABILITIES.into_iter().collect()
    };
    for name in options.cap_drop.iter().filter(|name| !is_all(name)) {
        set.remove(&named(name)?);
    }
    for name in options.cap_add.iter().filter(|name| !is_all(name)) {
        set.insert(named(name)?);
    }
    Ok(set)
}

fn resources(options: &Options) -> Value {
    let mut resources = json!({});
    if let Some(bytes) = options.memory_bytes {
        resources["memory"] = json!({"limit": bytes, "swap": bytes});
    }
    if let Some(milli) = options.cpus_milli {
        resources["cpu"] = json!({"period": 100_000, "quota": milli * 100});
    }
    if let Some(pids) = options.pids {
        resources["pids"] = json!({"limit": pids});
    }
    resources
}

fn ulimit(text: &str) -> Result<Value, SpecError> {
    let wrong = || SpecError::value("--ulimit", format!("{text} is not NAME=SOFT[:HARD]"));
    let (name, values) = text.split_once('=').ok_or_else(wrong)?;
    let number = |value: &str| match value {
        "-1" | "unlimited" => Some(u64::MAX),
        value => value.parse().ok(),
    };
    let (soft, hard) = values.split_once(':').unwrap_or((values, values));
    let (soft, hard) = (number(soft).ok_or_else(wrong)?, number(hard).ok_or_else(wrong)?);
    Ok(json!({"type": format!("RLIMIT_{}", name.to_ascii_uppercase()), "soft": soft, "hard": hard}))
}

fn mounts(options: &Options) -> Value {
    let access = if options.privileged { "rw" } else { "ro" };
    let shm = format!("size={}", options.shm_bytes.unwrap_or(64 << 20));
    let mut mounts = vec![
        json!({"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]}),
        json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]}),
        json!({"destination": "/dev/pts", "type": "devpts", "source": "devpts",
               "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]}),
        json!({"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev", "mode=1777", shm]}),
        json!({"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]}),
        json!({"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", access]}),
        json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "noexec", "nodev", access]}),
    ];
    for tmpfs in &options.tmpfs {
        let (path, given) = tmpfs.split_once(':').unwrap_or((tmpfs, ""));
        let mut mount_options = vec!["nosuid", "nodev", "noexec"];
        mount_options.extend(given.split(',').filter(|option| !option.is_empty()));
        mounts.push(json!({"destination": path, "type": "tmpfs", "source": "tmpfs", "options": mount_options}));
    }
    Value::Array(mounts)
}
