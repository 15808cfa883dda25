//! What a container's processes do between their birth and their program: the jobs of [`child`](crate::child).
use crate::{
    child::Job,
    error::{Context, Result},
    identity::{self, Identity},
    program, root, sys,
};
use alloc::{boxed::Box, ffi::CString, format, string::String};
use caisson_agent_protocol::{AgentError, Capabilities, Container, ErrorKind, Process};
use linux_raw_sys::general as uapi;
use rustix::{
    fd::{AsFd, BorrowedFd, IntoRawFd, RawFd},
    fs::{Gid, Mode, OFlags, Uid},
    io::Errno,
    process::{PidfdGetfdFlags, RawPid},
    pty::OpenptFlags,
    thread::{CapabilitySet, CapabilitySets},
};

/// A process's program and all that is to be arranged for it.
pub(crate) struct Program {
    pub(crate) process: Process,
    /// The agent's descriptors that become the program's standard streams; without one it is `null`. With a terminal they are not used.
    pub(crate) stdio: [Option<RawFd>; 3],
    /// The agent's descriptor of /dev/null.
    pub(crate) null: RawFd,
    /// The process's descriptor of its terminal's master side, for the agent to take.
    pub(crate) master: Option<RawFd>,
    /// Its PID as it sees it.
    pub(crate) pid: RawPid,
    /// The process's descriptor of the agent, if it was made before the agent's descriptors in `stdio`, and has to take them.
    pub(crate) agent: Option<RawFd>,
    ready: Option<Ready>,
}

/// What is found out about a program before it may start.
struct Ready {
    path: CString,
    arguments: sys::StringArray,
    environment: sys::StringArray,
    identity: Identity,
}

impl Program {
    pub(crate) fn new(process: Process, stdio: [Option<RawFd>; 3], null: RawFd) -> Self {
        Self { process, stdio, null, master: None, pid: 0, agent: None, ready: None }
    }

    /// In the container's namespaces and root already: does all that does not take rights away.
    fn prepare(&mut self, console: bool) -> Result<()> {
        self.pid = rustix::process::getpid().as_raw_nonzero().get();
        rustix::process::setsid().context(|| String::from("making a session"))?;
        if let Some(agent) = self.agent {
            for fd in self.stdio.iter_mut().flatten() {
                let taken = rustix::process::pidfd_getfd(borrow(&agent), *fd, PidfdGetfdFlags::empty());
                // It stays open until the program is executed.
                *fd = taken.context(|| String::from("taking a standard stream from the agent"))?.into_raw_fd();
            }
        }
        let process = &self.process;
        let identity = identity::resolve(&process.user, identity::read_database)?;
        if process.cwd != "/" {
            root::make_working_directory(&process.cwd)?;
        }
        let path = program::find(process)?;
        if let Some(adjustment) = process.oom_score_adj {
            let doing = || format!("setting oom_score_adj to {adjustment}");
            let file = rustix::fs::open("/proc/self/oom_score_adj", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty());
            rustix::io::write(file.context(doing)?, format!("{adjustment}").as_bytes()).context(doing)?;
        }
        let nul = || format!("preparing to execute {path:?}: an argument or variable holds a NUL");
        let home = program::variable(&process.env, "HOME").is_none().then(|| format!("HOME={}", identity.home));
        let ready = Ready {
            arguments: sys::StringArray::new(&process.args).context(nul)?,
            environment: sys::StringArray::new(process.env.iter().chain(&home)).context(nul)?,
            path: CString::new(&*path).map_err(|_| Errno::INVAL).context(nul)?,
            identity,
        };
        if self.process.terminal.is_some() {
            self.open_terminal(&ready.identity, console)?;
        } else if ready.identity.uid != 0 {
            // So that the program can open /dev/stdout and its like, which are links to these.
            for fd in self.stdio.into_iter().flatten() {
                rustix::fs::fchown(borrow(&fd), Some(Uid::from_raw(ready.identity.uid)), None)
                    .context(|| String::from("giving the standard streams to the user"))?;
            }
        }
        self.ready = Some(ready);
        Ok(())
    }

    fn open_terminal(&mut self, identity: &Identity, console: bool) -> Result<()> {
        let doing = || String::from("making a terminal");
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let master = rustix::fs::open("/dev/pts/ptmx", flags, Mode::empty())
            .context(|| String::from("opening /dev/pts/ptmx: a terminal needs a devpts mounted on /dev/pts"))?;
        rustix::pty::unlockpt(&master).context(doing)?;
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let terminal = rustix::pty::ioctl_tiocgptpeer(&master, flags).context(doing)?;
        if let Some(size) = self.process.terminal.filter(|size| size.width != 0 && size.height != 0) {
            set_terminal_size(&terminal, size).context(doing)?;
        }
        if identity.uid != 0 {
            rustix::fs::fchown(&terminal, Some(Uid::from_raw(identity.uid)), None).context(doing)?;
        }
        rustix::process::ioctl_tiocsctty(&terminal).context(doing)?;
        if console {
            root::devices::bind_console(terminal.as_fd())?;
        }
        // Both stay open until the program is executed.
        self.stdio = [Some(terminal.into_raw_fd()); 3];
        self.master = Some(master.into_raw_fd());
        Ok(())
    }

    fn execute(&mut self) -> AgentError {
        let Some(ready) = self.ready.take() else {
            return crate::error::error(ErrorKind::State, "the program was not prepared");
        };
        match self.give_up_rights(&ready.identity) {
            Ok(()) => {
                let errno = sys::execve(&ready.path, &ready.arguments, &ready.environment);
                program::failure(&ready.path.to_string_lossy(), errno)
            }
            Err(failure) => failure,
        }
    }

    fn give_up_rights(&self, identity: &Identity) -> Result<()> {
        let process = &self.process;
        for limit in &process.rlimits {
            sys::set_rlimit(limit.resource, limit.soft, limit.hard)
                .context(|| format!("setting resource limit {} to {}:{}", limit.resource, limit.soft, limit.hard))?;
        }
        if let Some(scheduler) = &process.scheduler {
            sys::set_scheduler(scheduler).context(|| format!("setting the scheduler {scheduler:?}"))?;
        }
        if let Some((class, priority)) = process.io_priority {
            sys::set_io_priority(class, priority).context(|| format!("setting I/O priority {class}:{priority}"))?;
        }
        if let Some(persona) = process.personality {
            sys::personality(persona).context(|| format!("setting personality {persona:#x}"))?;
        }
        for (number, fd) in (0..).zip(self.stdio) {
            let fd = fd.unwrap_or(self.null);
            sys::duplicate_as(borrow(&fd), number).context(|| String::from("setting the standard streams"))?;
        }
        if !process.no_new_privileges {
            // Installing a filter takes a right that is about to be given up.
            self.install_filters()?;
        }
        let entered = rustix::process::chdir(&*process.cwd);
        set_identity(identity, &process.capabilities)?;
        if entered.is_err() {
            // The user may be allowed what root is not, on a share.
            rustix::process::chdir(&*process.cwd).context(|| format!("entering {:?}", process.cwd))?;
        }
        rustix::process::umask(Mode::from_raw_mode(identity.umask.unwrap_or(0o022)));
        if process.no_new_privileges {
            sys::prctl(sys::pr::PR_SET_NO_NEW_PRIVS, 1, 0).context(|| String::from("setting no_new_privs"))?;
            self.install_filters()?;
        }
        Ok(())
    }

    fn install_filters(&self) -> Result<()> {
        self.process.seccomp.iter().try_for_each(|filter| {
            sys::set_seccomp_filter(filter)
                .context(|| format!("installing a seccomp filter of {} instructions", filter.program.len()))
        })
    }
}

#[allow(unsafe_code)]
fn borrow(fd: &RawFd) -> BorrowedFd<'_> {
    // SAFETY: the agent's or the process's own descriptors, which stay open until its program is executed.
    unsafe { BorrowedFd::borrow_raw(*fd) }
}

/// Sets a terminal's size.
pub(crate) fn set_terminal_size(
    terminal: impl AsFd,
    size: caisson_agent_protocol::TerminalSize,
) -> rustix::io::Result<()> {
    let size = rustix::termios::Winsize { ws_row: size.height, ws_col: size.width, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(terminal, size)
}

/// The last capability that a set of ours has room for.
const LAST_CAPABILITY: u32 = 63;

fn bits(set: u64) -> impl Iterator<Item = u32> {
    (0..=LAST_CAPABILITY).filter(move |bit| set >> bit & 1 == 1)
}

fn set_identity(identity: &Identity, capabilities: &Capabilities) -> Result<()> {
    for capability in bits(!capabilities.bounding) {
        match sys::prctl(sys::pr::PR_CAPBSET_DROP, capability as usize, 0) {
            Ok(_) => {}
            // There are no more.
            Err(Errno::INVAL) => break,
            Err(errno) => {
                return Err(errno).context(|| format!("dropping capability {capability} from the bounding set"));
            }
        }
    }
    let user = || format!("becoming user {}:{}", identity.uid, identity.gid);
    let groups: alloc::vec::Vec<Gid> = identity.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
    if (identity.uid, identity.gid) != (0, 0) {
        sys::prctl(sys::pr::PR_SET_KEEPCAPS, 1, 0).context(user)?;
    }
    rustix::thread::set_thread_groups(&groups).context(user)?;
    if (identity.uid, identity.gid) != (0, 0) {
        let (uid, gid) = (Uid::from_raw(identity.uid), Gid::from_raw(identity.gid));
        rustix::thread::set_thread_res_gid(gid, gid, gid).context(user)?;
        rustix::thread::set_thread_res_uid(uid, uid, uid).context(user)?;
    }
    let sets = CapabilitySets {
        effective: CapabilitySet::from_bits_retain(capabilities.effective),
        permitted: CapabilitySet::from_bits_retain(capabilities.permitted),
        inheritable: CapabilitySet::from_bits_retain(capabilities.inheritable),
    };
    rustix::thread::set_capabilities(None, sets).context(|| format!("setting the capabilities {capabilities:x?}"))?;
    for capability in bits(capabilities.ambient) {
        // Those that are not permitted and inheritable are refused; as in runc, that is no reason not to start.
        let _ = sys::prctl(sys::pr::PR_CAP_AMBIENT, sys::pr::PR_CAP_AMBIENT_RAISE as usize, capability as usize);
    }
    Ok(())
}

/// The job of a container's init process.
pub(crate) struct Init {
    pub(crate) container: Box<Container>,
    pub(crate) share_directory: Option<String>,
    /// Whether the agent has the machine to itself. Otherwise it has no cgroups in it, and has to borrow a stage.
    pub(crate) is_own_machine: bool,
    /// None for a container that has no process yet.
    pub(crate) program: Option<Program>,
    pub(crate) stage: Stage,
    /// What the container was made like, if it began as a spare one.
    pub(crate) sample: Option<Box<Container>>,
}

/// What a container's init process does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Become the beginning of a container like the one given.
    Spare,
    /// Become the container.
    Container,
    /// Become the program.
    Program,
}

impl Init {
    /// The namespaces that the process is made in.
    pub(crate) fn namespaces(container: &Container) -> u64 {
        let base = uapi::CLONE_NEWPID | uapi::CLONE_NEWNS | uapi::CLONE_NEWUTS | uapi::CLONE_NEWIPC;
        u64::from(if container.own_network { base | uapi::CLONE_NEWNET } else { base })
    }
}

impl Init {
    fn make_namespaces(&self) -> Result<()> {
        if self.container.own_cgroup_namespace && self.is_own_machine {
            // Not by clone3: the namespace's root would be the agent's group instead of the container's.
            sys::unshare(uapi::CLONE_NEWCGROUP).context(|| String::from("making a cgroup namespace"))?;
        }
        if self.container.own_network {
            let doing = || String::from("bringing up lo");
            let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None);
            sys::set_interface_up(&socket.context(doing)?, "lo").context(doing)?;
        }
        if !self.is_own_machine {
            crate::boot::borrow_stage()?;
        }
        Ok(())
    }

    fn make_container(&mut self) -> Result<()> {
        if self.sample.is_none() {
            self.make_namespaces()?;
        }
        let container = &self.container;
        if !container.hostname.is_empty() {
            rustix::system::sethostname(container.hostname.as_bytes())
                .context(|| format!("setting the hostname {:?}", container.hostname))?;
        }
        if let Some(name) = &container.domainname {
            rustix::system::setdomainname(name.as_bytes()).context(|| format!("setting the domainname {name:?}"))?;
        }
        root::set_up(container, self.sample.as_deref(), self.share_directory.as_deref())?;
        if let Some(program) = &mut self.program {
            program.prepare(true)?;
        }
        root::close_off(container, self.sample.is_some())
    }
}

impl Job for Init {
    fn step(&mut self) -> Result<()> {
        match self.stage {
            Stage::Spare => {
                self.make_namespaces()?;
                root::set_up_spare(&self.container)?;
                self.stage = Stage::Container;
                Ok(())
            }
            Stage::Container => {
                self.make_container()?;
                self.stage = Stage::Program;
                Ok(())
            }
            Stage::Program => Err(match &mut self.program {
                Some(program) => program.execute(),
                None => crate::error::error(ErrorKind::State, "the container has no process to start"),
            }),
        }
    }
}

/// The job of a further process of a container.
pub(crate) struct Exec {
    /// The agent's descriptor of the container's init process.
    pub(crate) init: RawFd,
    pub(crate) program: Program,
}

impl Job for Exec {
    fn step(&mut self) -> Result<()> {
        if self.program.ready.is_some() {
            return Err(self.program.execute());
        }
        // The PID namespace is the agent's affair: it is the one that children are made in.
        let kinds =
            uapi::CLONE_NEWNS | uapi::CLONE_NEWUTS | uapi::CLONE_NEWIPC | uapi::CLONE_NEWNET | uapi::CLONE_NEWCGROUP;
        sys::set_namespaces(borrow(&self.init), kinds)
            .context(|| String::from("entering the container's namespaces"))?;
        self.program.prepare(false)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use caisson_agent_protocol::User;

    /// A process that does nothing special.
    pub(crate) fn process() -> Process {
        Process {
            args: vec!["true".into()],
            env: Vec::new(),
            cwd: "/".into(),
            user: User::Name(String::new()),
            capabilities: Capabilities::default(),
            no_new_privileges: true,
            rlimits: Vec::new(),
            oom_score_adj: None,
            terminal: None,
            seccomp: Vec::new(),
            scheduler: None,
            io_priority: None,
            personality: None,
        }
    }

    #[test]
    fn capability_masks_name_capabilities() {
        assert_eq!(bits(0b1001).collect::<Vec<_>>(), [0, 3]);
        assert_eq!(bits(u64::MAX).count(), 64);
        assert_eq!(bits(1 << 63).collect::<Vec<_>>(), [63]);
        assert_eq!(bits(0).count(), 0);
    }
}
