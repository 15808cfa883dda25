//! Signals of this process, as a supervisor wants them: blocked, and taken one at a time by a thread.
use std::{io, mem::MaybeUninit, ptr};

/// What is passed on to the container: everything that people and engines send, but not what the kernel sends for faults.
const FORWARDED: [i32; 11] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTERM,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGALRM,
    libc::SIGCONT,
    libc::SIGTSTP,
    libc::SIGWINCH,
    libc::SIGIO,
];

fn set() -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set, sigaddset is given one and valid numbers.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        let mut set = set.assume_init();
        for signal in FORWARDED {
            libc::sigaddset(&raw mut set, signal);
        }
        set
    }
}

/// Blocks them in this thread and all that it will start.
pub fn block() -> io::Result<()> {
    let set = set();
    // SAFETY: the set is initialised, no old set is asked for.
    match unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// Waits for the next.
pub fn wait() -> io::Result<i32> {
    let set = set();
    // SAFETY: the set is initialised, no details are asked for.
    let signal = unsafe { libc::sigwaitinfo(&raw const set, ptr::null_mut()) };
    if signal < 0 { Err(io::Error::last_os_error()) } else { Ok(signal) }
}

/// Ends this process by a signal, as the container's program ended. Returns if the signal does not end it.
pub fn die_of(signal: u8) {
    let signal = i32::from(signal);
    // SAFETY: system calls on this process with initialised arguments; nothing here runs afterwards.
    unsafe {
        // The program's core is not in this process.
        libc::prctl(libc::PR_SET_DUMPABLE, 0);
        libc::signal(signal, libc::SIG_DFL);
        let mut set = MaybeUninit::uninit();
        libc::sigemptyset(set.as_mut_ptr());
        let mut set = set.assume_init();
        libc::sigaddset(&raw mut set, signal);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, ptr::null_mut());
        libc::raise(signal);
    }
}

/// Takes over a descriptor that this process inherited under this number.
pub fn inherited(number: i32) -> io::Result<std::os::fd::OwnedFd> {
    use std::os::fd::FromRawFd;
    // SAFETY: fcntl checks the number.
    if number < 3 || unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
        return Err(io::Error::other(format!("descriptor {number} was not passed")));
    }
    // SAFETY: it is open, and by the contract of the hidden verb nobody else's.
    Ok(unsafe { std::os::fd::OwnedFd::from_raw_fd(number) })
}

/// Leaves /dev/null in the place of stdin, stdout and stderr.
pub fn drop_stdio() -> io::Result<()> {
    let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    Ok(())
}
