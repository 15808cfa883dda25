//! The messages themselves. They speak of sandbox, container and process; they know the guest's view only: disks by
//! index, shares by tag. Names follow the OCI runtime specification where it has one.
use alloc::{string::String, vec::Vec};
use serde::{Deserialize, Serialize};

/// Names a container within its sandbox.
pub type ContainerId = String;
/// Names a process of a container: empty for its init process, the exec's id otherwise.
pub type ProcessId = String;
/// Joins a stream connection to the stdio of a process; chosen by the host, never zero.
pub type StreamToken = u32;

/// What the host sends: a request, to be answered by a [`FromAgent::Reply`] with the same number.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ToAgent {
    /// Chosen by the host; replies carry it.
    pub id: u32,
    /// What to do.
    pub request: Request,
}

/// What the agent sends.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum FromAgent {
    /// The answer to the request of that number.
    Reply {
        /// The request's number.
        id: u32,
        /// What came of it.
        result: Result<Reply, AgentError>,
    },
    /// Something that happened.
    Event(Event),
}

/// A request to the agent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Request {
    /// The first request on a connection.
    Hello {
        /// The host's [`VERSION`](crate::VERSION).
        version: u32,
    },
    /// Does, before a template is taken, what every container would have to do after it: allocates, mounts, warms. May take long.
    Prepare,
    /// Makes this machine a sandbox of its own: entropy, clock, names. The first request after Hello in every machine, booted or cloned.
    CreateSandbox(Sandbox),
    /// Sets up a container up to the point where its program would be executed.
    CreateContainer(alloc::boxed::Box<Container>),
    /// Executes the created container's program.
    Start {
        /// Which container.
        container: ContainerId,
    },
    /// Runs another process in a running container.
    Exec {
        /// Which container.
        container: ContainerId,
        /// The new process's name, unused so far and not empty.
        process: ProcessId,
        /// What to run.
        spec: alloc::boxed::Box<Process>,
        /// Its standard streams.
        stdio: Stdio,
    },
    /// Sends a signal.
    Signal {
        /// Which container.
        container: ContainerId,
        /// Which process.
        process: ProcessId,
        /// The signal's number on Linux x86-64.
        signal: u8,
        /// To every process of the container instead.
        all: bool,
    },
    /// Sets a terminal's size.
    Resize {
        /// Which container.
        container: ContainerId,
        /// Which process.
        process: ProcessId,
        /// The new size.
        size: TerminalSize,
    },
    /// Changes a container's limits.
    Update {
        /// Which container.
        container: ContainerId,
        /// The values to change.
        resources: Resources,
    },
    /// Freezes a container's processes.
    Pause {
        /// Which container.
        container: ContainerId,
    },
    /// Thaws them.
    Resume {
        /// Which container.
        container: ContainerId,
    },
    /// Reads a container's usage.
    Stats {
        /// Which container.
        container: ContainerId,
    },
    /// Lists a container's processes.
    Processes {
        /// Which container.
        container: ContainerId,
    },
    /// Kills what is left of a container, unmounts and forgets it.
    Remove {
        /// Which container.
        container: ContainerId,
    },
    /// Configures network interfaces of the sandbox.
    ConfigureNetwork(Network),
    /// Writes back, unmounts and powers off. No reply: the machine ends.
    Shutdown,
    /// Prepare, and keep a container like this one half made, as far as that does not depend on its root, processes and limits. The next
    /// container whose namespaces, devices, masked and read-only paths and first mounts are the same begins with it.
    PrepareContainer(alloc::boxed::Box<Container>),
}

/// A positive answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Reply {
    /// Done.
    Done,
    /// To Hello.
    Hello {
        /// The agent's version.
        version: u32,
    },
    /// To CreateContainer and Exec.
    Process {
        /// The process's PID as the container sees it.
        pid: u32,
    },
    /// To Stats.
    Stats(Stats),
    /// To Processes.
    Processes(Vec<ProcessInfo>),
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentError {
    /// What kind, for the host to act on.
    pub kind: ErrorKind,
    /// What was tried, on what, and why it failed: for people.
    pub message: String,
}

/// Kinds of failure that the host acts on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ErrorKind {
    /// The other side speaks another version.
    Version,
    /// The request makes no sense in the present state.
    State,
    /// No such container or process.
    NotFound,
    /// The program does not exist (exit code 127 for people).
    ProgramNotFound,
    /// The program cannot be executed (exit code 126 for people).
    ProgramNotExecutable,
    /// The request holds a value that cannot be used.
    Invalid,
    /// A system call failed; everything else.
    System,
}

/// Something that happened in the guest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Event {
    /// A process ended. Its output streams have been closed before.
    Exit {
        /// Which container.
        container: ContainerId,
        /// Which process.
        process: ProcessId,
        /// How.
        status: ExitStatus,
    },
    /// The kernel killed a process of the container for want of memory. Comes before the Exit that follows from it.
    Oom {
        /// Which container.
        container: ContainerId,
    },
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitStatus {
    /// It exited with this code.
    Code(u8),
    /// This signal killed it.
    Signal(u8),
}

/// What makes a machine a sandbox of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sandbox {
    /// Random bytes to reseed the kernel's generator with, at least 32.
    pub entropy: Vec<u8>,
    /// The time since the Epoch, in nanoseconds.
    pub realtime_ns: u64,
    /// The guest's own hostname (containers have theirs).
    pub hostname: String,
}

/// A container.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Container {
    /// Its name within the sandbox.
    pub id: ContainerId,
    /// Where its root file system is.
    pub root: Root,
    /// Its hostname.
    pub hostname: String,
    /// Its NIS domain name, if any.
    pub domainname: Option<String>,
    /// Mounts in order, those of the specification's defaults included.
    pub mounts: Vec<Mount>,
    /// Propagation of the root mount, as in the OCI's rootfsPropagation: "private", "rprivate", "slave", ... Empty means rprivate.
    pub root_propagation: String,
    /// Device nodes to make, besides the specification's default ones.
    pub devices: Vec<DeviceNode>,
    /// Paths to make inaccessible.
    pub masked_paths: Vec<String>,
    /// Paths to make read-only.
    pub readonly_paths: Vec<String>,
    /// Kernel parameters of the container's namespaces, by dotted name.
    pub sysctl: Vec<(String, String)>,
    /// Files to write into the root before the program starts, such as /etc/hosts. Their parents exist or are made.
    pub files: Vec<FileToWrite>,
    /// Limits.
    pub resources: Resources,
    /// The init process. None: the container can be created, not started.
    pub process: Option<Process>,
    /// Its standard streams.
    pub stdio: Stdio,
    /// Whether the container has a network namespace of its own (with nothing but lo), or the sandbox's, which has its interfaces.
    pub own_network: bool,
    /// Whether the cgroup namespace is its own.
    pub own_cgroup_namespace: bool,
}

/// Where a root file system is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Root {
    /// EROFS disks, the lowest first, overlaid; and a writable ext4 disk above, if any (without one, the root is a read-only overlay).
    Layers {
        /// The read-only layers' disk indexes, lowest first. At least one.
        lower: Vec<u8>,
        /// The writable disk's index. Directories `upper` and `work` are made in it.
        upper: Option<u8>,
        /// Mount the overlay read-only in the end.
        readonly: bool,
    },
    /// A virtio-fs share.
    Share {
        /// The device's tag.
        tag: String,
        /// The directory within it, "" or relative.
        path: String,
        /// Mount it read-only.
        readonly: bool,
    },
}

/// A mount of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// Where: absolute, in the container's root. Resolved within it, whatever links it holds; made if it does not exist.
    pub destination: String,
    /// What.
    pub source: MountSource,
    /// MS_* flags as mount(2) takes them.
    pub flags: u64,
    /// Propagation flags (MS_PRIVATE, MS_SLAVE|MS_REC, ...) to be set afterwards, each in its turn.
    pub propagation: Vec<u64>,
    /// File-system-specific options, comma-separated.
    pub data: String,
}

/// What is mounted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum MountSource {
    /// A kernel file system by type: proc, sysfs, tmpfs, devpts, mqueue, cgroup2 (`cgroup` means it too).
    Kernel {
        /// The type.
        fs_type: String,
    },
    /// A directory or file of the container's own root (a bind within).
    Inside {
        /// Absolute path in the container's root.
        path: String,
    },
    /// A disk's file system.
    Disk {
        /// The disk's index.
        disk: u8,
        /// Its type: "ext4" or "erofs".
        fs_type: String,
        /// The directory within it, "" for its root; made if the disk is writable.
        path: String,
    },
    /// A directory or file of a virtio-fs share.
    Share {
        /// The device's tag.
        tag: String,
        /// Relative path within it.
        path: String,
    },
}

/// A device node to make in the container's /dev, or elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceNode {
    /// Absolute path in the container.
    pub path: String,
    /// What device.
    pub device: Device,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// What a device node stands for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Device {
    /// A character device by its numbers.
    Char {
        /// Major.
        major: u32,
        /// Minor.
        minor: u32,
    },
    /// A block device by its numbers.
    Block {
        /// Major.
        major: u32,
        /// Minor.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
    /// One of the machine's disks, passed through.
    Disk {
        /// Its index.
        disk: u8,
    },
}

/// A file that the host wants in the container's root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileToWrite {
    /// Absolute path, resolved within the root.
    pub path: String,
    /// Its content.
    pub content: Vec<u8>,
    /// Permission bits.
    pub mode: u32,
    /// Bind-mount it (so that a read-only root can have it, and no image file is changed) instead of writing it into the root.
    pub bind: bool,
}

/// A process.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Process {
    /// The program and its arguments; the program is looked up in the PATH of `env` within the root.
    pub args: Vec<String>,
    /// Environment, as K=V.
    pub env: Vec<String>,
    /// Working directory, absolute; made if it does not exist.
    pub cwd: String,
    /// Who it runs as.
    pub user: User,
    /// Capability sets.
    pub capabilities: Capabilities,
    /// Set no_new_privs.
    pub no_new_privileges: bool,
    /// Resource limits.
    pub rlimits: Vec<Rlimit>,
    /// oom_score_adj, if it is to be set.
    pub oom_score_adj: Option<i32>,
    /// A terminal for its standard streams, of this size.
    pub terminal: Option<TerminalSize>,
    /// seccomp filters, in the order in which they are installed; each a classic BPF program compiled by the host for x86-64.
    pub seccomp: Vec<SeccompFilter>,
    /// sched_setattr(2) values.
    pub scheduler: Option<Scheduler>,
    /// ioprio_set(2): class (0..=3) and priority (0..=7).
    pub io_priority: Option<(u8, u8)>,
    /// personality(2), if it is to be set.
    pub personality: Option<u32>,
}

/// Who a process runs as. Names are resolved by the agent in the root's /etc/passwd and /etc/group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum User {
    /// By numbers, as the OCI runtime specification has it.
    Ids {
        /// User id.
        uid: u32,
        /// Group id.
        gid: u32,
        /// Additional group ids.
        additional_gids: Vec<u32>,
        /// umask, if it is to be set.
        umask: Option<u32>,
    },
    /// By the image's `user[:group]`, each a name or a number; empty means root.
    Name(String),
}

/// Capability sets, each a mask with bit n for capability n.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// Bounding set.
    pub bounding: u64,
    /// Effective set.
    pub effective: u64,
    /// Inheritable set.
    pub inheritable: u64,
    /// Permitted set.
    pub permitted: u64,
    /// Ambient set.
    pub ambient: u64,
}

/// A resource limit of setrlimit(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rlimit {
    /// RLIMIT_* number.
    pub resource: u8,
    /// Soft limit.
    pub soft: u64,
    /// Hard limit.
    pub hard: u64,
}

/// A terminal's size in characters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    /// Columns; 0 if unknown.
    pub width: u16,
    /// Rows; 0 if unknown.
    pub height: u16,
}

/// A seccomp filter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeccompFilter {
    /// SECCOMP_FILTER_FLAG_* bits.
    pub flags: u32,
    /// `struct sock_filter`s: code, jt, jf, k.
    pub program: Vec<(u16, u8, u8, u32)>,
}

/// Values for sched_setattr(2), by its names.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scheduler {
    /// SCHED_* policy.
    pub policy: u32,
    /// SCHED_FLAG_* bits.
    pub flags: u64,
    /// Nice value.
    pub nice: i32,
    /// Static priority.
    pub priority: u32,
    /// SCHED_DEADLINE runtime, ns.
    pub runtime: u64,
    /// SCHED_DEADLINE deadline, ns.
    pub deadline: u64,
    /// SCHED_DEADLINE period, ns.
    pub period: u64,
}

/// The standard streams of a process. A stream without a token is /dev/null. With a terminal, stdin's token carries both
/// directions and the other two are None.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stdio {
    /// Host to process.
    pub stdin: Option<StreamToken>,
    /// Process to host.
    pub stdout: Option<StreamToken>,
    /// Process to host.
    pub stderr: Option<StreamToken>,
}

/// cgroup v2 limits. None leaves a value as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    /// memory.max, bytes; u64::MAX means max.
    pub memory_max_bytes: Option<u64>,
    /// memory.high, bytes.
    pub memory_high_bytes: Option<u64>,
    /// memory.low, bytes.
    pub memory_low_bytes: Option<u64>,
    /// memory.swap.max, bytes.
    pub swap_max_bytes: Option<u64>,
    /// cpu.max: quota in microseconds (u64::MAX for max) and period in microseconds.
    pub cpu_max_us: Option<(u64, u64)>,
    /// cpu.weight.
    pub cpu_weight: Option<u64>,
    /// cpuset.cpus.
    pub cpuset_cpus: Option<String>,
    /// pids.max; u64::MAX means max.
    pub pids_max: Option<u64>,
    /// Any other cgroup v2 file of the container's cgroup and the value to write, in order (OCI `unified`).
    pub unified: Vec<(String, String)>,
    /// Device rules, in order, to be enforced by a BPF_PROG_TYPE_CGROUP_DEVICE program. Empty: none is loaded.
    pub devices: Vec<DeviceRule>,
}

/// A rule about devices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceRule {
    /// Allow or deny.
    pub allow: bool,
    /// b'c', b'b' or b'a' for all.
    pub kind: u8,
    /// None for any.
    pub major: Option<u32>,
    /// None for any.
    pub minor: Option<u32>,
    /// Bits: 1 mknod, 2 read, 4 write.
    pub access: u8,
}

/// A container's usage, from its cgroup.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// cpu.stat usage_usec.
    pub cpu_usage_us: u64,
    /// cpu.stat user_usec.
    pub cpu_user_us: u64,
    /// cpu.stat system_usec.
    pub cpu_system_us: u64,
    /// cpu.stat nr_periods, nr_throttled, throttled_usec.
    pub cpu_throttling: (u64, u64, u64),
    /// memory.current.
    pub memory_current_bytes: u64,
    /// memory.max; u64::MAX when there is none.
    pub memory_max_bytes: u64,
    /// memory.peak.
    pub memory_peak_bytes: u64,
    /// memory.stat anon, file, inactive_file, kernel.
    pub memory_anon_bytes: u64,
    /// memory.stat file.
    pub memory_file_bytes: u64,
    /// memory.stat inactive_file.
    pub memory_inactive_file_bytes: u64,
    /// memory.events oom_kill.
    pub oom_kills: u64,
    /// pids.current.
    pub pids_current: u64,
    /// pids.max; u64::MAX when there is none.
    pub pids_max: u64,
    /// io.stat read and written bytes, over all disks.
    pub io_read_bytes: u64,
    /// io.stat wbytes.
    pub io_written_bytes: u64,
}

/// One process of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessInfo {
    /// PID in the container's namespace.
    pub pid: u32,
    /// Parent's PID in the container's namespace; 0 for its init.
    pub ppid: u32,
    /// Real user id.
    pub uid: u32,
    /// CPU time used, in milliseconds.
    pub cpu_ms: u64,
    /// Start time, since the guest's boot, in milliseconds.
    pub started_ms: u64,
    /// Command line, arguments joined by spaces; the name in brackets when there is none.
    pub command: String,
}

/// Network configuration of a sandbox.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Interfaces.
    pub interfaces: Vec<Interface>,
    /// Routes, in order.
    pub routes: Vec<Route>,
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// The MAC by which it is found in the guest.
    pub mac: [u8; 6],
    /// The name to give it.
    pub name: String,
    /// MTU in bytes.
    pub mtu: u32,
    /// Addresses with their prefix lengths; 4 or 16 bytes each.
    pub addresses: Vec<(Vec<u8>, u8)>,
}

/// A route.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Destination and prefix length; empty for the default route of the gateway's family.
    pub destination: (Vec<u8>, u8),
    /// Gateway, if any; 4 or 16 bytes.
    pub gateway: Option<Vec<u8>>,
    /// Interface name.
    pub interface: String,
    /// Scope is link (no gateway) or universe.
    pub metric: Option<u32>,
}
