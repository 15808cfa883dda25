//! The barrier at which all vCPUs stop and start.
//!
//! ```text
//!            ┌── release ──┐
//!            ▼             │
//!   closed (parked)     running ── end ──► ended: every thread returns
//!            ▲             │
//!            └─── close ───┘   (kick: a signal ends KVM_RUN; close returns when all are parked)
//! ```

use std::cell::Cell;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, Once, PoisonError};

use kvm_bindings::kvm_run;

thread_local! {
    /// What the signal handler of this thread sets `immediate_exit` in.
    static RUN: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}
/// Keeps the handler's installation to one.
static HANDLER: Once = Once::new();

/// What the vCPUs shall do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Parked,
    Running,
    Ended,
}

#[derive(Debug)]
struct State {
    wanted: Wanted,
    /// Threads that wait at the gate or have returned.
    parked: usize,
    /// Kernel's ids of the threads that entered.
    threads: Vec<libc::pid_t>,
}

/// The gate of one machine.
#[derive(Debug)]
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
    attention: AtomicBool,
    vcpus: usize,
}

impl Gate {
    /// A closed gate for so many vCPUs.
    pub fn new(vcpus: usize) -> Self {
        HANDLER.call_once(install_handler);
        let state = State { wanted: Wanted::Parked, parked: 0, threads: Vec::new() };
        Self { state: Mutex::new(state), changed: Condvar::new(), attention: AtomicBool::new(true), vcpus }
    }

    /// Whether the vCPUs shall stop.
    pub fn attention(&self) -> bool {
        self.attention.load(Ordering::SeqCst)
    }

    /// Called once by each vCPU's thread, with the page that it shares with KVM.
    pub fn enter(&self, run: *mut kvm_run) {
        RUN.set(run);
        // SAFETY: gettid has no arguments and cannot fail.
        let thread = unsafe { libc::gettid() };
        self.lock().threads.push(thread);
    }

    /// Waits at the gate. False when the machine has ended.
    pub fn wait(&self) -> bool {
        let mut state = self.lock();
        state.parked += 1;
        self.changed.notify_all();
        loop {
            match state.wanted {
                Wanted::Running => {
                    state.parked -= 1;
                    return true;
                }
                Wanted::Ended => {
                    RUN.set(ptr::null_mut());
                    return false;
                }
                Wanted::Parked => state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Counts as parked from now on: the thread does not run its vCPU again, and only waits for the end.
    pub fn retire(&self) {
        let mut state = self.lock();
        state.parked += 1;
        self.changed.notify_all();
        while state.wanted != Wanted::Ended {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        RUN.set(ptr::null_mut());
    }

    /// Lets the vCPUs run.
    pub fn release(&self) {
        self.want(Wanted::Running);
    }

    /// Stops the vCPUs, and returns when all are parked.
    pub fn close(&self) {
        self.want(Wanted::Parked);
        self.wait_parked();
    }

    /// Makes every thread return, and returns when all have, or will without touching a device again.
    pub fn end(&self) {
        self.want(Wanted::Ended);
        self.wait_parked();
    }

    fn want(&self, wanted: Wanted) {
        let mut state = self.lock();
        if state.wanted == Wanted::Ended {
            return;
        }
        state.wanted = wanted;
        self.attention.store(wanted != Wanted::Running, Ordering::SeqCst);
        if wanted != Wanted::Running {
            for &thread in &state.threads {
                // SAFETY: a signal to a thread of this process, which exists until it was joined after `end`.
                unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, kick_signal()) };
            }
        }
        self.changed.notify_all();
    }

    fn wait_parked(&self) {
        let mut state = self.lock();
        while state.parked < self.vcpus {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The signal that kicks a vCPU out of the guest.
fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

fn install_handler() {
    // SAFETY: the handler only touches a thread-local cell without lazy initialisation, and memory that KVM shares
    // with the thread; both are safe to use in a signal handler. The action is zero but for what is set.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_kick as *const () as usize;
        libc::sigaction(kick_signal(), &raw const action, ptr::null_mut());
    }
}

extern "C" fn on_kick(_: libc::c_int) {
    let run = RUN.get();
    if !run.is_null() {
        // A KVM_RUN that is entered after this returns at once; the one that was interrupted returns anyway.
        // SAFETY: the pointer is that of the running vCPU's shared page, mapped until after `wait` returned false.
        unsafe { ptr::write_volatile(&raw mut (*run).immediate_exit, 1) };
    }
}
