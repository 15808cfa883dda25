//! System calls that rustix does not wrap, made directly. The ABI is Linux's on x86-64.
#![allow(unsafe_code)] // Raw system calls.
use alloc::{ffi::CString, vec::Vec};
use core::{
    arch::asm,
    ffi::{CStr, c_int, c_void},
    ptr,
};
use linux_raw_sys::{general as uapi, prctl as prctl_numbers};
use rustix::{
    fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    io::{Errno, Result},
};

/// Makes a system call.
///
/// # Safety
/// The arguments are what the call expects; memory that they point to may be used by it as it documents.
pub(crate) unsafe fn call(number: u32, arguments: [usize; 6]) -> Result<usize> {
    let [a, b, c, d, e, f] = arguments;
    let result: isize;
    // SAFETY: the kernel keeps all registers but rax, rcx and r11; the rest is the caller's promise.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number as usize => result,
            in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d, in("r8") e, in("r9") f,
            lateout("rcx") _, lateout("r11") _,
            options(nostack)
        );
    }
    check(result)
}

fn check(result: isize) -> Result<usize> {
    // The kernel's errors are the last page of the address space.
    if (-4095..0).contains(&result) {
        #[allow(clippy::cast_possible_truncation)]
        return Err(Errno::from_raw_os_error(-result as i32));
    }
    Ok(result.cast_unsigned())
}

#[allow(clippy::cast_sign_loss)]
fn fd(fd: impl AsFd) -> usize {
    fd.as_fd().as_raw_fd() as usize
}

#[allow(clippy::cast_possible_truncation, clippy::cast_possible_wrap)]
fn owned(result: usize) -> OwnedFd {
    // SAFETY: called with a descriptor that the kernel has just made for us.
    unsafe { OwnedFd::from_raw_fd(result as RawFd) }
}

/// The descriptor argument that means the working directory.
pub(crate) const CWD: BorrowedFd<'static> = rustix::fs::CWD;

/// New anonymous memory, zeroed; null if there is none.
pub(crate) fn map_memory(bytes: usize) -> *mut u8 {
    let (protection, flags) = (uapi::PROT_READ | uapi::PROT_WRITE, uapi::MAP_PRIVATE | uapi::MAP_ANONYMOUS);
    // SAFETY: a new mapping at an address that the kernel chooses.
    let result = unsafe { call(uapi::__NR_mmap, [0, bytes, protection as usize, flags as usize, usize::MAX, 0]) };
    result.map_or(ptr::null_mut(), |address| address as *mut u8)
}

/// Gives memory of [`map_memory`] back.
pub(crate) fn unmap_memory(address: *mut u8, bytes: usize) {
    // SAFETY: the allocator's own mapping, no longer used.
    let _ = unsafe { call(uapi::__NR_munmap, [address as usize, bytes, 0, 0, 0, 0]) };
}

/// Ends the machine at once, or this process where that is not allowed. What was not synced is lost.
pub fn end_machine() -> ! {
    const MAGIC: (usize, usize) = (0xfee1_dead, 672_274_793);
    const AUTOBOOT: usize = 0x0123_4567;
    // SAFETY: no memory is involved.
    unsafe {
        let _ = call(uapi::__NR_reboot, [MAGIC.0, MAGIC.1, AUTOBOOT, 0, 0, 0]);
        let _ = call(uapi::__NR_exit_group, [1, 0, 0, 0, 0, 0]);
    }
    loop {
        core::hint::spin_loop();
    }
}

/// Ends this process.
pub(crate) fn exit(code: u8) -> ! {
    // SAFETY: no memory is involved.
    let _ = unsafe { call(uapi::__NR_exit_group, [usize::from(code), 0, 0, 0, 0, 0]) };
    end_machine()
}

/// Makes a child process that shares this one's memory, runs `entry(argument)` on `stack`, and is a member of `cgroup`, if one is given.
/// Gives a descriptor of it.
///
/// # Safety
/// Until the child has ended or executed a program, `stack` and what `argument` points to stay valid, and neither process uses
/// memory while the other one does so.
pub(crate) unsafe fn clone_child(
    flags: u64,
    cgroup: Option<BorrowedFd<'_>>,
    stack: (*mut u8, usize),
    entry: extern "C" fn(*mut c_void) -> !,
    argument: *mut c_void,
) -> Result<OwnedFd> {
    let mut pidfd: c_int = -1;
    // SAFETY: plain integers, for which zero is valid.
    let mut clone: uapi::clone_args = unsafe { core::mem::zeroed() };
    clone.flags = flags | u64::from(uapi::CLONE_VM | uapi::CLONE_PIDFD);
    clone.pidfd = &raw mut pidfd as u64;
    clone.exit_signal = u64::from(uapi::SIGCHLD);
    clone.stack = stack.0 as u64;
    clone.stack_size = stack.1 as u64;
    if let Some(cgroup) = cgroup {
        clone.flags |= uapi::CLONE_INTO_CGROUP;
        clone.cgroup = fd(cgroup) as u64;
    }
    let result: isize;
    // SAFETY: the parent comes out as from any system call. The child has the same registers but rax and rsp, an empty stack, and
    // never leaves `entry`.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r12",
            "call r13",
            "ud2",
            "2:",
            inlateout("rax") uapi::__NR_clone3 as usize => result,
            in("rdi") &raw mut clone, in("rsi") size_of::<uapi::clone_args>(),
            in("r12") argument, in("r13") entry,
            lateout("rcx") _, lateout("r11") _,
        );
    }
    check(result)?;
    // SAFETY: the kernel made it with the child.
    Ok(unsafe { OwnedFd::from_raw_fd(pidfd) })
}

/// Strings as execve(2) takes them. They must outlive it.
pub(crate) struct StringArray {
    _strings: Vec<CString>,
    pointers: Vec<*const u8>,
}

impl StringArray {
    /// # Errors
    /// `EINVAL` if a string holds a NUL.
    pub(crate) fn new<S: AsRef<[u8]>>(strings: impl IntoIterator<Item = S>) -> Result<Self> {
        let strings: Vec<CString> = strings
            .into_iter()
            .map(|string| CString::new(string.as_ref()).map_err(|_| Errno::INVAL))
            .collect::<Result<_>>()?;
        let pointers = strings.iter().map(|string| string.as_ptr().cast()).chain([ptr::null()]).collect();
        Ok(Self { _strings: strings, pointers })
    }
}

/// Executes a program. Returns only to say why it could not.
pub(crate) fn execve(path: &CStr, arguments: &StringArray, environment: &StringArray) -> Errno {
    let (path, arguments, environment) =
        (path.as_ptr() as usize, arguments.pointers.as_ptr() as usize, environment.pointers.as_ptr() as usize);
    // SAFETY: strings and null-terminated arrays of strings, all alive.
    match unsafe { call(uapi::__NR_execve, [path, arguments, environment, 0, 0, 0]) } {
        Err(errno) => errno,
        Ok(_) => Errno::NOSYS,
    }
}

/// setns(2) into some of the namespaces of a process.
pub(crate) fn set_namespaces(process: impl AsFd, kinds: u32) -> Result<()> {
    // SAFETY: no memory is involved.
    unsafe { call(uapi::__NR_setns, [fd(process), kinds as usize, 0, 0, 0, 0]) }.map(drop)
}

/// unshare(2).
pub(crate) fn unshare(kinds: u32) -> Result<()> {
    // SAFETY: no memory is involved; memory, files and threads are not unshared.
    unsafe { call(uapi::__NR_unshare, [kinds as usize, 0, 0, 0, 0, 0]) }.map(drop)
}

/// Sends a signal to a process, by number. Zero sends none, and tells whether it is there.
pub(crate) fn send_signal(process: impl AsFd, signal: u8) -> Result<()> {
    // SAFETY: no siginfo is given.
    unsafe { call(uapi::__NR_pidfd_send_signal, [fd(process), usize::from(signal), 0, 0, 0, 0]) }.map(drop)
}

/// kill(2) by number.
pub(crate) fn kill(pid: u32, signal: u8) -> Result<()> {
    // SAFETY: no memory is involved.
    unsafe { call(uapi::__NR_kill, [pid as usize, usize::from(signal), 0, 0, 0, 0]) }.map(drop)
}

/// prctl(2) with numbers only.
pub(crate) fn prctl(option: u32, a: usize, b: usize) -> Result<usize> {
    // SAFETY: the options used take no pointers.
    unsafe { call(uapi::__NR_prctl, [option as usize, a, b, 0, 0, 0]) }
}

/// PR_SET_NO_NEW_PRIVS and others by their names.
pub(crate) mod pr {
    pub(crate) use super::prctl_numbers::{
        PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, PR_CAPBSET_DROP, PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_SET_NO_NEW_PRIVS,
    };
}

/// Sets a resource limit of the calling process, by number.
pub(crate) fn set_rlimit(resource: u8, soft: u64, hard: u64) -> Result<()> {
    let limit = uapi::rlimit64 { rlim_cur: soft, rlim_max: hard };
    // SAFETY: reads the limit; no old one is asked for.
    unsafe { call(uapi::__NR_prlimit64, [0, usize::from(resource), &raw const limit as usize, 0, 0, 0]) }.map(drop)
}

/// personality(2).
pub(crate) fn personality(persona: u32) -> Result<()> {
    // SAFETY: no memory is involved.
    unsafe { call(uapi::__NR_personality, [persona as usize, 0, 0, 0, 0, 0]) }.map(drop)
}

/// ioprio_set(2) for the calling process.
pub(crate) fn set_io_priority(class: u8, priority: u8) -> Result<()> {
    const WHO_PROCESS: usize = 1;
    let value = usize::from(class) << 13 | usize::from(priority);
    // SAFETY: no memory is involved.
    unsafe { call(uapi::__NR_ioprio_set, [WHO_PROCESS, 0, value, 0, 0, 0]) }.map(drop)
}

/// sched_setattr(2) for the calling process.
pub(crate) fn set_scheduler(scheduler: &caisson_agent_protocol::Scheduler) -> Result<()> {
    /// `struct sched_attr`, its first version.
    #[repr(C)]
    struct Attributes {
        size: u32,
        policy: u32,
        flags: u64,
        nice: i32,
        priority: u32,
        runtime: u64,
        deadline: u64,
        period: u64,
    }
    let attributes = Attributes {
        size: 48,
        policy: scheduler.policy,
        flags: scheduler.flags,
        nice: scheduler.nice,
        priority: scheduler.priority,
        runtime: scheduler.runtime,
        deadline: scheduler.deadline,
        period: scheduler.period,
    };
    // SAFETY: reads the structure.
    unsafe { call(uapi::__NR_sched_setattr, [0, &raw const attributes as usize, 0, 0, 0, 0]) }.map(drop)
}

/// Sets the attributes of a mount, of those below it too if `recursive`, and its propagation (0: leave it).
pub(crate) fn set_mount_attributes(
    mount: impl AsFd,
    set: u64,
    clear: u64,
    propagation: u64,
    recursive: bool,
) -> Result<()> {
    let attributes = uapi::mount_attr { attr_set: set, attr_clr: clear, propagation, userns_fd: 0 };
    let flags = uapi::AT_EMPTY_PATH | if recursive { uapi::AT_RECURSIVE } else { 0 };
    // SAFETY: reads the empty path and the structure.
    unsafe {
        call(
            uapi::__NR_mount_setattr,
            [
                fd(mount),
                c"".as_ptr() as usize,
                flags as usize,
                &raw const attributes as usize,
                size_of::<uapi::mount_attr>(),
                0,
            ],
        )
    }
    .map(drop)
}

/// Installs a seccomp filter for the calling process.
pub(crate) fn set_seccomp_filter(filter: &caisson_agent_protocol::SeccompFilter) -> Result<()> {
    #[repr(C)]
    struct Instruction(u16, u8, u8, u32);
    #[repr(C)]
    struct Program {
        length: u16,
        instructions: *const Instruction,
    }
    const SET_MODE_FILTER: usize = 1;
    let instructions: Vec<Instruction> =
        filter.program.iter().map(|(code, jt, jf, k)| Instruction(*code, *jt, *jf, *k)).collect();
    let length = u16::try_from(instructions.len()).map_err(|_| Errno::INVAL)?;
    let program = Program { length, instructions: instructions.as_ptr() };
    // SAFETY: reads the program, which is as long as it says.
    unsafe { call(uapi::__NR_seccomp, [SET_MODE_FILTER, filter.flags as usize, &raw const program as usize, 0, 0, 0]) }
        .map(drop)
}

/// bpf(2) with an attribute structure given as words.
///
/// # Safety
/// The attributes are what the command expects, and pointers in them are valid for it.
pub(crate) unsafe fn bpf(command: u32, attributes: &[u64]) -> Result<usize> {
    // SAFETY: reads the attributes; the rest is the caller's promise.
    unsafe { call(uapi::__NR_bpf, [command as usize, attributes.as_ptr() as usize, size_of_val(attributes), 0, 0, 0]) }
}

/// [`bpf`] for commands that make a descriptor.
///
/// # Safety
/// As for [`bpf`].
pub(crate) unsafe fn bpf_open(command: u32, attributes: &[u64]) -> Result<OwnedFd> {
    // SAFETY: the caller's promise.
    unsafe { bpf(command, attributes) }.map(owned)
}

/// Adds entropy to the kernel's generator, credits it, and has all of its outputs depend on it.
pub(crate) fn add_entropy(random: impl AsFd, entropy: &[u8]) -> Result<()> {
    const RNDADDENTROPY: usize = 0x4008_5203;
    const RNDRESEEDCRNG: usize = 0x5207;
    let bytes = i32::try_from(entropy.len()).map_err(|_| Errno::INVAL)?;
    let bits = bytes.checked_mul(8).ok_or(Errno::INVAL)?;
    let mut request = Vec::with_capacity(8 + entropy.len());
    request.extend(bits.to_ne_bytes());
    request.extend(bytes.to_ne_bytes());
    request.extend(entropy);
    // SAFETY: reads the request, which says how long it is.
    unsafe {
        call(uapi::__NR_ioctl, [fd(&random), RNDADDENTROPY, request.as_ptr() as usize, 0, 0, 0])?;
        call(uapi::__NR_ioctl, [fd(&random), RNDRESEEDCRNG, 0, 0, 0, 0])?;
    }
    Ok(())
}

/// `struct ifreq` with flags, for [`set_interface_up`].
#[repr(C)]
struct InterfaceFlags {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

/// Brings an interface up, by ioctl(2): two system calls where netlink would take three and a parser.
pub(crate) fn set_interface_up(socket: impl AsFd, name: &str) -> Result<()> {
    const SIOCSIFFLAGS: usize = 0x8914;
    const IFF_UP: u16 = 1;
    let mut request = InterfaceFlags { name: [0; 16], flags: IFF_UP, rest: [0; 22] };
    let name = name.as_bytes();
    request.name.get_mut(..name.len()).filter(|_| name.len() < 16).ok_or(Errno::INVAL)?.copy_from_slice(name);
    // SAFETY: reads the structure.
    unsafe { call(uapi::__NR_ioctl, [fd(socket), SIOCSIFFLAGS, &raw const request as usize, 0, 0, 0]) }.map(drop)
}

/// `struct sockaddr_vm`.
#[repr(C)]
struct VsockAddress {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    flags: u8,
    zero: [u8; 3],
}

fn vsock(cid: u32, port: u32, number: u32) -> Result<(OwnedFd, Result<()>)> {
    const AF_VSOCK: u16 = 40;
    let kind = linux_raw_sys::net::SOCK_STREAM | uapi::O_CLOEXEC | uapi::O_NONBLOCK;
    let address = VsockAddress { family: AF_VSOCK, reserved: 0, port, cid, flags: 0, zero: [0; 3] };
    // SAFETY: bind and connect read the address.
    unsafe {
        let socket = owned(call(uapi::__NR_socket, [usize::from(AF_VSOCK), kind as usize, 0, 0, 0, 0])?);
        let result = call(number, [fd(&socket), &raw const address as usize, size_of::<VsockAddress>(), 0, 0, 0]);
        Ok((socket, result.map(drop)))
    }
}

/// A vsock socket that listens on a port, non-blocking.
pub(crate) fn listen_vsock(port: u32, backlog: i32) -> Result<OwnedFd> {
    const ANY: u32 = u32::MAX;
    let (socket, result) = vsock(ANY, port, uapi::__NR_bind)?;
    result?;
    rustix::net::listen(&socket, backlog)?;
    Ok(socket)
}

/// A vsock socket that is being connected to a port of the host, non-blocking.
pub(crate) fn connect_vsock_host(port: u32) -> Result<OwnedFd> {
    const HOST: u32 = 2;
    let (socket, result) = vsock(HOST, port, uapi::__NR_connect)?;
    match result {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(errno) => Err(errno),
    }
}

/// Makes a descriptor be number `number`, across execve(2).
pub(crate) fn duplicate_as(source: impl AsFd, number: u32) -> Result<()> {
    // dup3 with equal descriptors fails; then only close-on-exec is to be cleared.
    if fd(&source) == number as usize {
        return rustix::io::fcntl_setfd(source, rustix::io::FdFlags::empty());
    }
    // SAFETY: no memory is involved; whoever had the number loses it, which the one caller, about to execute, knows.
    unsafe { call(uapi::__NR_dup3, [fd(source), number as usize, 0, 0, 0, 0]) }.map(drop)
}
