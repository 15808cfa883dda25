//! Moves bytes between a program's pipe or terminal and the host's stream, one direction each.
use alloc::vec::Vec;
use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    io::Errno,
    net::{Shutdown, shutdown},
};

/// How many times a pump reads before the others have their turn.
const TURNS: usize = 16;

/// Which way a pump moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From the host's stream to the program.
    In,
    /// From the program to the host's stream.
    Out,
}

/// How far a pump came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Progress {
    /// It could go on at once.
    Busy,
    /// There is nothing to read now.
    Empty,
    /// What was read cannot be written now.
    Full,
    /// One of the sides has ended, and the other side was told so.
    Done,
}

/// A pump. Both descriptors are non-blocking.
pub(crate) struct Pump {
    from: OwnedFd,
    to: OwnedFd,
    pub(crate) direction: Direction,
    /// Read and not yet written.
    left: Vec<u8>,
    /// Whether somebody watches `to`.
    pub(crate) watches_to: bool,
}

impl Pump {
    pub(crate) const fn new(from: OwnedFd, to: OwnedFd, direction: Direction) -> Self {
        Self { from, to, direction, left: Vec::new(), watches_to: false }
    }

    pub(crate) fn from(&self) -> BorrowedFd<'_> {
        self.from.as_fd()
    }

    pub(crate) fn to(&self) -> BorrowedFd<'_> {
        self.to.as_fd()
    }

    /// Moves what can be moved. `buffer` is scratch space.
    pub(crate) fn run(&mut self, buffer: &mut [u8]) -> Progress {
        for _ in 0..TURNS {
            if !self.left.is_empty() {
                let left = core::mem::take(&mut self.left);
                if let Some(progress) = self.write(&left) {
                    return progress;
                }
            }
            let count = match rustix::io::read(&self.from, &mut *buffer) {
                Ok(count) if count > 0 => count,
                Err(Errno::AGAIN) => return Progress::Empty,
                Err(Errno::INTR) => continue,
                // Its end, or a terminal whose last user is gone, or a connection that was reset.
                _ => return self.end(),
            };
            if let Some(progress) = self.write(&buffer[..count]) {
                return progress;
            }
        }
        Progress::Busy
    }

    fn write(&mut self, mut bytes: &[u8]) -> Option<Progress> {
        while !bytes.is_empty() {
            match rustix::io::write(&self.to, bytes) {
                Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    self.left = bytes.to_vec();
                    return Some(Progress::Full);
                }
                Err(_) => return Some(self.end()),
            }
        }
        None
    }

    /// Tells both sides that no more is moved: the pipe by being closed, which the caller does; the stream here.
    pub(crate) fn end(&self) -> Progress {
        let _ = match self.direction {
            Direction::In => shutdown(&self.from, Shutdown::Read),
            Direction::Out => shutdown(&self.to, Shutdown::Write),
        };
        Progress::Done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::{
        io::{ioctl_fionbio, read, write},
        net::{AddressFamily, SocketFlags, SocketType, socketpair},
        pipe::{PipeFlags, pipe_with},
    };

    fn pair() -> (OwnedFd, OwnedFd) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap()
    }

    fn pipe() -> (OwnedFd, OwnedFd) {
        pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap()
    }

    #[test]
    fn output_goes_to_the_stream_and_ends_it() {
        let ((reader, program), (stream, host)) = (pipe(), pair());
        let mut pump = Pump::new(reader, stream, Direction::Out);
        let mut buffer = [0; 100];
        assert_eq!(pump.run(&mut buffer), Progress::Empty);
        write(&program, b"hello").unwrap();
        assert_eq!(pump.run(&mut buffer), Progress::Empty);
        drop(program);
        assert_eq!(pump.run(&mut buffer), Progress::Done);
        assert_eq!(read(&host, &mut buffer), Ok(5));
        assert_eq!(read(&host, &mut buffer), Ok(0));
    }

    #[test]
    fn input_ends_when_the_host_ends_it_or_the_program_does_not_want_it() {
        let ((program, writer), (stream, host)) = (pipe(), pair());
        let mut pump = Pump::new(stream, writer, Direction::In);
        let mut buffer = [0; 100];
        write(&host, b"abc").unwrap();
        shutdown(&host, Shutdown::Write).unwrap();
        assert_eq!(pump.run(&mut buffer), Progress::Done);
        drop(pump);
        assert_eq!(read(&program, &mut buffer), Ok(3));
        assert_eq!(read(&program, &mut buffer), Ok(0));

        let ((program, writer), (stream, host)) = (pipe(), pair());
        let mut pump = Pump::new(stream, writer, Direction::In);
        drop(program);
        write(&host, b"abc").unwrap();
        assert_eq!(pump.run(&mut buffer), Progress::Done);
    }

    #[test]
    fn what_cannot_be_written_is_kept_in_order() {
        let ((reader, program), (stream, host)) = (pipe(), pair());
        let mut pump = Pump::new(reader, stream, Direction::Out);
        let mut buffer = vec![0; 4096];
        let (mut sent, mut got) = (Vec::<u8>::new(), Vec::<u8>::new());
        let mut was_full = false;
        while sent.len() < 2_000_000 {
            let bytes: Vec<u8> = (0..60_000_u32).map(|n| (n.wrapping_mul(n) >> 7) as u8 ^ sent.len() as u8).collect();
            if let Ok(count) = write(&program, &bytes) {
                sent.extend(&bytes[..count]);
            }
            if pump.run(&mut buffer) == Progress::Full {
                was_full = true;
                let mut chunk = [0; 50_000];
                let count = read(&host, &mut chunk).unwrap();
                got.extend(&chunk[..count]);
            }
        }
        assert!(was_full);
        drop(program);
        ioctl_fionbio(&host, true).unwrap();
        while pump.run(&mut buffer) != Progress::Done {
            let mut chunk = [0; 50_000];
            while let Ok(count @ 1..) = read(&host, &mut chunk) {
                got.extend(&chunk[..count]);
            }
        }
        let mut chunk = [0; 50_000];
        while let Ok(count @ 1..) = read(&host, &mut chunk) {
            got.extend(&chunk[..count]);
        }
        assert!(got == sent);
    }
}
