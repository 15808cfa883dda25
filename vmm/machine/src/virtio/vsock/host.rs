//! The host's side: the socket that clients connect to, and those that the guest reaches.

use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, open};
use rustix::net::{AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType};

/// The socket in the directory; `_<port>` is added for the guest's connections.
const SOCKET_NAME: &str = "vsock.sock";
/// The longest path that fits in a `sockaddr_un` with its zero.
const MAX_PATH_BYTES: usize = 107;
/// The longest first line of a client: `CONNECT 4294967295\n` and some.
const MAX_LINE_BYTES: usize = 32;

/// The directory with the sockets.
pub(super) struct Host {
    directory: PathBuf,
    /// Holds the directory open, for paths by way of it that are always short.
    directory_fd: OwnedFd,
    listener: UnixListener,
}

/// What a client said so far.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Greeting {
    /// Not yet a whole line.
    Incomplete,
    /// It wants to connect to this port of the guest.
    Connect(u32),
    /// It went away, or said something else.
    Wrong,
}

impl Host {
    /// Listens in `directory`. A socket that is left there from an earlier machine is replaced.
    pub(super) fn new(directory: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory_fd = open(directory, flags, Mode::empty())?;
        let path = short_path(directory, &directory_fd, SOCKET_NAME);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        listener.set_nonblocking(true)?;
        Ok(Self { directory: directory.to_path_buf(), directory_fd, listener })
    }

    pub(super) fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// The next client, if one waits.
    pub(super) fn accept(&self) -> Option<UnixStream> {
        let (client, _) = self.listener.accept().ok()?;
        client.set_nonblocking(true).ok()?;
        Some(client)
    }

    /// Connects to who listens for the guest on `port`, without waiting.
    pub(super) fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let name = format!("{SOCKET_NAME}_{port}");
        let path = short_path(&self.directory, &self.directory_fd, &name);
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
            None,
        )?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(UnixStream::from(socket))
    }
}

/// The path of `name` in the directory, such that it fits in the address of a socket.
fn short_path(directory: &Path, fd: &OwnedFd, name: &str) -> PathBuf {
    let path = directory.join(name);
    if path.as_os_str().len() <= MAX_PATH_BYTES {
        path
    } else {
        format!("/proc/self/fd/{}/{name}", fd.as_raw_fd()).into()
    }
}

/// Reads a client's first line, and not a byte more: what follows is for the guest.
pub(super) fn greeting(mut client: &UnixStream) -> Greeting {
    let mut line = [0; MAX_LINE_BYTES];
    let peeked = rustix::net::recv(client.as_fd(), &mut line, RecvFlags::PEEK);
    let len = match peeked {
        Ok((len, _)) => len,
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Greeting::Incomplete,
        Err(_) => return Greeting::Wrong,
    };
    let Some(end) = line[..len].iter().position(|byte| *byte == b'\n') else {
        // At the end of the stream nothing more comes, and a full line has an end.
        return if len == 0 || len == line.len() { Greeting::Wrong } else { Greeting::Incomplete };
    };
    let port = (line[..end].strip_prefix(b"CONNECT "))
        .and_then(|port| std::str::from_utf8(port).ok()?.trim_end().parse().ok());
    match (client.read_exact(&mut line[..=end]), port) {
        (Ok(()), Some(port)) => Greeting::Connect(port),
        _ => Greeting::Wrong,
    }
}
