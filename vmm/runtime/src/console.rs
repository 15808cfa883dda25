//! A terminal of the host for a container's: an engine's console socket gets the master, the supervisor keeps the slave, raw, and the
//! guest's own terminal does the work.
use std::{
    fs::OpenOptions,
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
};

use rustix::{
    net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg},
    process::ioctl_tiocsctty,
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{OptionalActions, tcgetattr, tcgetwinsize, tcsetattr},
};

use crate::paths::{At, PathError};

/// Makes a terminal, sends its master to the socket, and returns the slave. It becomes this process's controlling terminal if that has
/// none and leads a session: then SIGWINCH tells of a new size.
pub fn open(socket: &Path) -> Result<OwnedFd, PathError> {
    let make = || -> io::Result<OwnedFd> {
        let stream = UnixStream::connect(socket)?;
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let name = ptsname(&master, Vec::new())?;
        let slave: OwnedFd = OpenOptions::new().read(true).write(true).open(name.to_string_lossy().as_ref())?.into();
        let mut settings = tcgetattr(&slave)?;
        settings.make_raw();
        tcsetattr(&slave, OptionalActions::Now, &settings)?;
        let descriptors = [master.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&descriptors));
        sendmsg(&stream, &[IoSlice::new(name.to_bytes())], &mut control, SendFlags::NOSIGNAL)?;
        let _ = ioctl_tiocsctty(&slave);
        Ok(slave)
    };
    make().at("give a terminal to", socket)
}

/// A terminal's size: columns and rows.
pub fn size(terminal: impl AsFd) -> Option<(u16, u16)> {
    tcgetwinsize(terminal)
        .ok()
        .map(|size| (size.ws_col, size.ws_row))
        .filter(|(columns, rows)| *columns != 0 && *rows != 0)
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::unix::net::UnixListener, thread};

    use super::*;
    use crate::supervisor::wire::Receiver;

    #[test]
    fn the_socket_gets_the_master_of_a_raw_terminal() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console");
        let listener = UnixListener::bind(&path).unwrap();
        let engine = thread::spawn(move || {
            let mut receiver = Receiver::new(listener.accept().unwrap().0);
            // What it sends is a name, not a message; its end makes that an error.
            assert!(receiver.receive::<String>().is_err());
            std::fs::File::from(receiver.take_descriptor().unwrap())
        });
        let slave = std::fs::File::from(open(&path).unwrap());
        let mut master = engine.join().unwrap();
        master.write_all(b"\x03raw").unwrap();
        let mut bytes = [0; 4];
        io::Read::read_exact(&mut &slave, &mut bytes).unwrap();
        assert_eq!(&bytes, b"\x03raw");
        assert!(open(&directory.path().join("none")).is_err());
    }
}
