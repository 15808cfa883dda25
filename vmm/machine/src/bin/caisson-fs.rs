//! The file server of one virtio-fs device: `caisson-fs --config-fd N --listen-fd M`.
//!
//! N holds a JSON [`ShareConfig`], read to its end; M is a listening Unix stream socket, to which the device connects once.
//! The process ends when the connection does, or its parent.
use caisson_machine::share::{self, Server, ShareConfig};
use rustix::process::{Resource, Rlimit, Signal, getrlimit, set_parent_process_death_signal, setrlimit, umask};
use std::error::Error;
use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::process::ExitCode;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let mut text = error.to_string();
            let mut source = error.source();
            while let Some(error) = source {
                text += &format!(": {error}");
                source = error.source();
            }
            eprintln!("caisson-fs: {text}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let mut config = None;
    let mut listener = None;
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut descriptor = || -> Result<OwnedFd, Box<dyn Error>> {
            let number: i32 = arguments.next().ok_or("a descriptor's number is missing")?.parse()?;
            own(number)
        };
        match argument.as_str() {
            "--config-fd" => config = Some(descriptor()?),
            "--listen-fd" => listener = Some(descriptor()?),
            _ => return Err(format!("unknown argument {argument:?}: caisson-fs --config-fd N --listen-fd M").into()),
        }
    }
    let config = config.ok_or("--config-fd is missing")?;
    let listener = UnixListener::from(listener.ok_or("--listen-fd is missing")?);
    set_parent_process_death_signal(Some(Signal::KILL))?;
    let config: ShareConfig = serde_json::from_reader(io::BufReader::new(File::from(config)))?;
    umask(rustix::fs::Mode::empty());
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })?;
    let mut server = Server::new(&config)?;
    share::jail::enter(&config)?;
    let (connection, _) = listener.accept()?;
    drop(listener);
    share::serve(&mut server, connection)?;
    Ok(())
}

#[allow(unsafe_code, reason = "descriptors come as numbers from whoever started this")]
fn own(number: i32) -> Result<OwnedFd, Box<dyn Error>> {
    if number < 3 {
        return Err(format!("descriptor {number} is not one to take over").into());
    }
    // SAFETY: nothing else was opened yet; an fcntl says whether the number is open at all.
    let valid = unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } == 0;
    if !valid {
        return Err(format!("descriptor {number} is not open").into());
    }
    // SAFETY: it is open, was handed to this process for this, and is taken once.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}
