//! What makes a machine a sandbox of its own, cloned or booted.
use crate::{
    error::{Context, Result, error},
    sys,
};
use alloc::{format, string::String};
use caisson_agent_protocol::{ErrorKind, Sandbox};
use rustix::{
    fs::{Mode, OFlags},
    time::{ClockId, Timespec, clock_settime},
};

/// The least entropy that is accepted, in bytes: the kernel's generator has a key of that length.
const MIN_ENTROPY_BYTES: usize = 32;
/// And the most.
const MAX_ENTROPY_BYTES: usize = 4096;

/// Gives the machine its own randomness, time and name. If it fails, the machine must not be used.
pub(crate) fn make_own(sandbox: &Sandbox) -> Result<()> {
    let bytes = sandbox.entropy.len();
    if !(MIN_ENTROPY_BYTES..=MAX_ENTROPY_BYTES).contains(&bytes) {
        return Err(error(ErrorKind::Invalid, format!("{bytes} bytes of entropy: too few or too many")));
    }
    let doing = || String::from("seeding the kernel's random number generator");
    let random = rustix::fs::open("/dev/urandom", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).context(doing)?;
    sys::add_entropy(&random, &sandbox.entropy).context(doing)?;
    let time = Timespec {
        tv_sec: i64::try_from(sandbox.realtime_ns / 1_000_000_000).unwrap_or(i64::MAX),
        tv_nsec: i64::try_from(sandbox.realtime_ns % 1_000_000_000).unwrap_or(0),
    };
    clock_settime(ClockId::Realtime, time).context(|| format!("setting the clock to {} ns", sandbox.realtime_ns))?;
    rustix::system::sethostname(sandbox.hostname.as_bytes())
        .context(|| format!("setting the hostname {:?}", sandbox.hostname))
}
