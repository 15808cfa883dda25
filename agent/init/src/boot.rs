//! From the kernel's entry of PID 1 to the loop that serves the host.
use crate::{
    cgroup,
    error::{Context, Result},
    server::{Machine, Server},
    sys,
};
use alloc::{format, string::String};
use caisson_agent_protocol::{CONTROL_PORT, DOORBELL_PORT, STREAM_PORT};
use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
    mount::{MountFlags, MountPropagationFlags, mount, mount_bind, mount_change, mount_move},
};

/// Directories of the initramfs that are made if it lacks them: mount points of the agent's own, and [`STAGE`] for those of containers.
const DIRECTORIES: [&str; 4] = ["/dev", "/proc", "/cgroup", STAGE];
/// Those below the stage.
const STAGE_DIRECTORIES: [&str; 4] = ["/mnt/root", "/mnt/upper", "/mnt/mount", "/mnt/files"];
/// Where a container's file systems are mounted in its own mount namespace before its root becomes the root.
pub(crate) const STAGE: &str = "/mnt";
/// How many streams can wait for the request that names them.
const STREAM_BACKLOG: i32 = 64;

/// Runs the agent as PID 1 of a machine. Ends the machine if it cannot.
pub fn run() -> ! {
    let failure = match start().and_then(|mut server| server.run()) {
        Ok(never) => match never {},
        Err(failure) => failure,
    };
    log(&format!("caisson-agent: {}", failure.message));
    sys::end_machine()
}

/// Makes what the kernel has started PID 1 in a machine that containers can run in.
///
/// # Errors
/// If the kernel lacks something that is needed.
pub fn machine() -> Result<Machine> {
    rustix::process::umask(Mode::empty());
    let _ = sys::prctl(sys::pr::PR_SET_DUMPABLE, 0, 0);
    make_root_replaceable()?;
    for directory in DIRECTORIES {
        directory_exists(directory)?;
    }
    make_stage()?;
    let flags = MountFlags::NOSUID;
    mount("dev", "/dev", "devtmpfs", flags, None).context(|| String::from("mounting /dev"))?;
    mount("proc", "/proc", "proc", flags, None).context(|| String::from("mounting /proc"))?;
    mount("cgroup", "/cgroup", "cgroup2", flags, None).context(|| String::from("mounting cgroup2"))?;
    if let Ok(socket) = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None) {
        // A machine without a network still has its own address.
        let _ = sys::set_interface_up(&socket, "lo");
    }
    Machine::own(cgroup::Root::open("/cgroup")?)
}

fn start() -> Result<Server> {
    let machine = machine()?;
    let control = sys::listen_vsock(CONTROL_PORT, 4).context(|| format!("listening on vsock port {CONTROL_PORT}"))?;
    let streams =
        sys::listen_vsock(STREAM_PORT, STREAM_BACKLOG).context(|| format!("listening on vsock port {STREAM_PORT}"))?;
    let mut server = Server::new(machine, control, streams)?;
    // Nobody may be listening; then the host finds out in another way.
    if let Ok(doorbell) = sys::connect_vsock_host(DOORBELL_PORT) {
        server.ring(doorbell)?;
    }
    Ok(server)
}

/// Makes the mount points below the stage.
pub(crate) fn make_stage() -> Result<()> {
    STAGE_DIRECTORIES.iter().try_for_each(|directory| directory_exists(directory))
}

/// Gives the calling process's mount namespace a stage, on a machine that is not the agent's.
pub(crate) fn borrow_stage() -> Result<()> {
    let doing = || format!("mounting a tmpfs on {STAGE}");
    // Nothing of a container may be seen outside.
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).context(doing)?;
    mount("tmpfs", STAGE, "tmpfs", MountFlags::empty(), None).context(doing)?;
    make_stage()
}

fn directory_exists(path: &str) -> Result<()> {
    match rustix::fs::mkdir(path, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(errno).context(|| format!("making {path}")),
    }
}

/// The initramfs cannot be left with pivot_root(2), because nothing is below it. So a second mount of it becomes the root.
fn make_root_replaceable() -> Result<()> {
    let doing = || String::from("mounting the initramfs over itself");
    directory_exists(STAGE)?;
    mount_bind("/", STAGE).context(doing)?;
    rustix::process::chdir(STAGE).context(doing)?;
    mount_move(".", "/").context(doing)?;
    rustix::process::chroot(".").context(doing)
}

/// Tells people, by the kernel's log.
pub fn log(message: &str) {
    for path in ["/dev/kmsg", "/dev/ttyS0"] {
        let flags = OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        if let Ok(file) = rustix::fs::open(path, flags, Mode::empty())
            && rustix::io::write(file, format!("{message}\n").as_bytes()).is_ok()
        {
            return;
        }
    }
}
