//! Children that share the agent's memory until they execute a program, and the hand-off between them and the agent.
//!
//! Only one of the two runs at a time: the agent makes a child and waits for its word; the child gives it and waits to be told to
//! go on; the agent tells it, and waits again until the child has executed its program or has died. Nothing else in the memory that they
//! share is synchronised, and nothing needs to be. Their descriptor tables are not shared: what a job opens must not outlive the call in
//! which it does so, and descriptors of the agent's that it is to use are in it by number.
#![allow(unsafe_code)] // Shared memory between processes.
use crate::{
    error::{Context, Result, error},
    sys,
};
use alloc::{boxed::Box, string::String};
use caisson_agent_protocol::{AgentError, ErrorKind};
use core::ffi::c_void;
use rustix::{
    fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    io::Errno,
    net::{AddressFamily, SocketFlags, SocketType, socketpair},
    process::{WaitId, WaitIdOptions, waitid},
};

/// A child's stack. Its deepest users are rustix's path buffers (256 bytes each) and formatting; pages that are not touched cost nothing.
const STACK_BYTES: usize = 128 * 1024;
/// What a child says when it waits to be told to go on, and what the agent says then.
const WORD: u8 = b'.';

/// What a child does. All that it needs is in here, and what the agent is to know afterwards too.
pub(crate) trait Job {
    /// Goes up to the next point where the child waits. The last step ends in execve(2), and fails otherwise.
    fn step(&mut self) -> Result<()>;
}

/// What parent and child share.
struct Shared<J> {
    job: J,
    /// The child's end of the link.
    link: RawFd,
    failure: Option<AgentError>,
}

/// A child that has not executed its program yet.
pub(crate) struct Child<J> {
    /// None once it needs no longer be ended before the memory is given back.
    pidfd: Option<OwnedFd>,
    link: OwnedFd,
    shared: Box<Shared<J>>,
    // The child runs on it.
    _stack: Stack,
}

impl<J: Job> Child<J> {
    /// Makes a child, in new namespaces of the kinds in `flags`, and waits until the first step is done.
    pub(crate) fn spawn(job: J, flags: u64, cgroup: Option<BorrowedFd<'_>>) -> Result<Self> {
        let doing = || String::from("making a process");
        let (link, end) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).context(doing)?;
        let mut shared = Box::new(Shared { job, link: end.as_raw_fd(), failure: None });
        let stack = Stack::new()?;
        // SAFETY: stack and shared memory belong to the Child, which ends the child process before it gives them back, and the
        // hand-off of this module lets only one of the two run at a time.
        let made = unsafe {
            sys::clone_child(flags, cgroup, (stack.0, STACK_BYTES), run::<J>, (&raw mut *shared).cast::<c_void>())
        };
        let pidfd = made.context(doing)?;
        let child = Self { pidfd: Some(pidfd), link, shared, _stack: stack };
        // The child has its own copy; without ours, its end is the link's end.
        drop(end);
        child.done()
    }

    /// Has the child do the next step, which is not its last.
    pub(crate) fn advance(self) -> Result<Self> {
        rustix::io::write(&self.link, &[WORD]).context(|| String::from("setting up a process"))?;
        self.done()
    }

    fn done(mut self) -> Result<Self> {
        if self.heard()? {
            return Ok(self);
        }
        let failure = self.shared.failure.take();
        Err(failure.unwrap_or_else(|| error(ErrorKind::System, "a process died while it was being set up")))
    }

    /// The job, as the child left it when it spoke last.
    pub(crate) fn job(&mut self) -> &mut J {
        &mut self.shared.job
    }

    /// A descriptor of the process.
    pub(crate) fn pidfd(&self) -> Option<BorrowedFd<'_>> {
        self.pidfd.as_ref().map(AsFd::as_fd)
    }

    /// Has the child execute its program, and gives its descriptor.
    pub(crate) fn execute(mut self) -> Result<OwnedFd> {
        let doing = || String::from("starting a process");
        rustix::io::write(&self.link, &[WORD]).context(doing)?;
        // The end of the link says that the child has executed its program, or has died before.
        self.heard()?;
        if let Some(failure) = self.shared.failure.take() {
            return Err(failure);
        }
        self.pidfd.take().ok_or(Errno::SRCH).context(doing)
    }

    /// Waits for the child's word: true for its word, false for its end or its program's start.
    fn heard(&self) -> Result<bool> {
        let mut word = [0];
        loop {
            match rustix::io::read(&self.link, &mut word) {
                Ok(count) => return Ok(count == 1),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno).context(|| String::from("waiting for a new process")),
            }
        }
    }
}

/// A stack: memory of its own, of which only those pages cost something that are used.
struct Stack(*mut u8);

impl Stack {
    fn new() -> Result<Self> {
        match sys::map_memory(STACK_BYTES) {
            memory if memory.is_null() => Err(Errno::NOMEM).context(|| String::from("making a process")),
            memory => Ok(Self(memory)),
        }
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        sys::unmap_memory(self.0, STACK_BYTES);
    }
}

impl<J> Drop for Child<J> {
    fn drop(&mut self) {
        if let Some(pidfd) = &self.pidfd {
            let _ = sys::send_signal(pidfd, 9);
            let _ = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED);
        }
    }
}

/// The child's life.
extern "C" fn run<J: Job>(shared: *mut c_void) -> ! {
    // SAFETY: spawn passed it; the parent does not use it while the child runs.
    let shared = unsafe { &mut *shared.cast::<Shared<J>>() };
    // SAFETY: open in this process until it executes its program.
    let link = unsafe { BorrowedFd::borrow_raw(shared.link) };
    loop {
        if let Err(failure) = shared.job.step() {
            shared.failure = Some(failure);
            sys::exit(1);
        }
        let mut word = [0];
        if rustix::io::write(link, &[WORD]) != Ok(1) || rustix::io::read(link, &mut word) != Ok(1) {
            sys::exit(1);
        }
    }
}
