//! The 16550 serial port: what the guest writes goes to a bounded log file; there is no input.

use super::reset::EventTrigger;
use crate::bus::BusDevice;
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use vm_superio::Serial;
use vm_superio::serial::{NoEvents, SerialState};
use vmm_sys_util::eventfd::EventFd;

/// COM1: first port, how many, and its interrupt line.
pub const PORT: u64 = 0x3f8;
/// See [`PORT`].
pub const PORTS: u64 = 8;
/// See [`PORT`].
pub const IRQ: u32 = 4;

/// How much of the guest's output is kept: the first MiB. A guest that writes more is not stopped, only not heard.
pub const MAX_LOG_BYTES: u64 = 1 << 20;
/// A line is written out at its end, or when it is this long.
const MAX_LINE_BYTES: usize = 512;
/// The input fifo of a 16550.
const MAX_FIFO_BYTES: usize = 64;

/// The file that the output goes to.
#[derive(Debug)]
pub struct Log {
    file: Option<File>,
    line: Vec<u8>,
    left: u64,
}

impl Log {
    /// Opens a log file for appending, or makes one that only its owner may read. `None` drops everything.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn open(path: Option<&Path>) -> io::Result<Self> {
        let open =
            |path| OpenOptions::new().append(true).create(true).mode(0o600).custom_flags(libc::O_NOFOLLOW).open(path);
        let file = path.map(open).transpose()?;
        let written = file.as_ref().map(File::metadata).transpose()?.map_or(0, |m| m.len());
        Ok(Self { file, line: Vec::new(), left: MAX_LOG_BYTES.saturating_sub(written) })
    }

    /// Writes out what there is of a line.
    pub fn flush_line(&mut self) {
        if let Some(file) = &mut self.file {
            let len = self.line.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
            self.left -= len as u64;
            // A full disk must not stop the guest.
            let _ = file.write_all(&self.line[..len]);
        }
        self.line.clear();
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            self.line.push(byte);
            if byte == b'\n' || self.line.len() >= MAX_LINE_BYTES {
                self.flush_line();
            }
        }
        Ok(bytes.len())
    }

    /// Does nothing: the port flushes after each byte.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The port's registers, as a snapshot holds them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    registers: [u8; 9],
    fifo: Vec<u8>,
}

/// The port.
#[derive(Debug)]
pub struct SerialPort(Serial<EventTrigger, NoEvents, Log>);

impl SerialPort {
    /// Rings `interrupt` for the guest.
    pub fn new(interrupt: EventFd, log: Log) -> Self {
        Self(Serial::new(EventTrigger(interrupt), log))
    }

    /// As it was when saved.
    ///
    /// # Errors
    /// The state is not one that a port can have.
    pub fn restore(state: &State, interrupt: EventFd, log: Log) -> io::Result<Self> {
        let invalid = |problem: String| io::Error::new(io::ErrorKind::InvalidData, problem);
        if state.fifo.len() > MAX_FIFO_BYTES {
            return Err(invalid(format!("{} bytes in the serial fifo", state.fifo.len())));
        }
        let r = state.registers;
        let state = SerialState {
            baud_divisor_low: r[0],
            baud_divisor_high: r[1],
            interrupt_enable: r[2],
            interrupt_identification: r[3],
            line_control: r[4],
            line_status: r[5],
            modem_control: r[6],
            modem_status: r[7],
            scratch: r[8],
            in_buffer: state.fifo.clone(),
        };
        let port = Serial::from_state(&state, EventTrigger(interrupt), NoEvents, log);
        port.map(Self).map_err(|e| invalid(format!("serial port: {e:?}")))
    }

    /// The registers.
    pub fn save(&self) -> State {
        let s = self.0.state();
        State {
            registers: [
                s.baud_divisor_low,
                s.baud_divisor_high,
                s.interrupt_enable,
                s.interrupt_identification,
                s.line_control,
                s.line_status,
                s.modem_control,
                s.modem_status,
                s.scratch,
            ],
            fifo: s.in_buffer,
        }
    }

    /// The event that interrupts the guest.
    pub fn interrupt(&self) -> &EventFd {
        &self.0.interrupt_evt().0
    }

    /// Writes out an unfinished line.
    pub fn flush(&mut self) {
        self.0.writer_mut().flush_line();
    }
}

impl BusDevice for SerialPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            *byte = self.0.read(offset);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            // The log never fails, and a lost interrupt has no one to tell.
            let _ = self.0.write(offset, *byte);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn port(path: &Path) -> SerialPort {
        SerialPort::new(EventFd::new(0).unwrap(), Log::open(Some(path)).unwrap())
    }

    #[test]
    fn what_the_guest_writes_is_in_the_log() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut port = port(&path);
        for byte in b"hello\nun" {
            port.write(0, &[*byte]);
        }
        assert_eq!(std::fs::read(&path).unwrap(), b"hello\n");
        port.flush();
        assert_eq!(std::fs::read(&path).unwrap(), b"hello\nun");
    }

    #[test]
    fn the_log_is_bounded_also_when_it_is_opened_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        for _ in 0..2 {
            let mut log = Log::open(Some(&path)).unwrap();
            for _ in 0..3 {
                log.write_all(&vec![b'x'; usize::try_from(MAX_LOG_BYTES).unwrap() / 2]).unwrap();
            }
            log.flush_line();
            assert_eq!(std::fs::metadata(&path).unwrap().len(), MAX_LOG_BYTES);
        }
    }

    #[test]
    fn the_log_is_not_written_through_a_link() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(dir.path().join("target"), dir.path().join("link")).unwrap();
        assert!(Log::open(Some(&dir.path().join("link"))).is_err());
    }

    #[test]
    fn registers_are_saved_and_restored() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut saved = port(&path);
        saved.write(7, &[0x5a]);
        saved.write(3, &[3]);
        let state = saved.save();
        let log = Log::open(Some(&path)).unwrap();
        let mut restored = SerialPort::restore(&state, EventFd::new(0).unwrap(), log).unwrap();
        let mut byte = [0];
        restored.read(7, &mut byte);
        assert_eq!(byte, [0x5a]);
        assert_eq!(restored.save(), state);
    }
}
