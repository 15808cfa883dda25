//! A running server; a raw client of it; and a mount through /dev/fuse.
use caisson_machine::share::{Export, FileServer, ShareConfig};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::JoinHandle;

/// A server process and the device's end of its connection.
pub(crate) struct Served {
    server: FileServer,
    pub(crate) connection: UnixStream,
}

impl Served {
    pub(crate) fn start(exports: &[(&str, &Path, bool)]) -> Self {
        let exports = exports
            .iter()
            .map(|(name, path, read_only)| Export {
                name: (*name).to_owned(),
                path: path.to_path_buf(),
                read_only: *read_only,
            })
            .collect();
        let config = ShareConfig { exports, attribute_timeout_ms: 0, entry_timeout_ms: 0 };
        let work = tempfile::tempdir().unwrap();
        let socket = work.path().join("socket");
        let server = FileServer::spawn(env!("CARGO_BIN_EXE_caisson-fs").as_ref(), &config, &socket, None).unwrap();
        let connection = UnixStream::connect(&socket).unwrap();
        Self { server, connection }
    }

    /// Sends a request as it is.
    pub(crate) fn send(&mut self, request: &[u8]) {
        self.connection.write_all(&(request.len() as u32).to_le_bytes()).unwrap();
        self.connection.write_all(request).unwrap();
    }

    pub(crate) fn receive(&mut self) -> Vec<u8> {
        let mut prefix = [0; 4];
        self.connection.read_exact(&mut prefix).unwrap();
        let mut response = vec![0; u32::from_le_bytes(prefix) as usize];
        self.connection.read_exact(&mut response).unwrap();
        response
    }

    /// An operation on a node: the response's body, or the error number.
    pub(crate) fn call(&mut self, code: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        self.send(&request(code, node, body));
        let response = self.receive();
        assert_eq!(u32::from_le_bytes(response[..4].try_into().unwrap()) as usize, response.len());
        assert_eq!(&response[8..16], &77u64.to_le_bytes());
        match i32::from_le_bytes(response[4..8].try_into().unwrap()) {
            0 => Ok(response[16..].to_vec()),
            error => {
                assert_eq!(response.len(), 16);
                Err(-error)
            }
        }
    }

    /// Hangs up; the server must end well.
    pub(crate) fn finish(self) {
        let pid = rustix::process::Pid::from_raw(self.server.pid() as i32).unwrap();
        self.connection.shutdown(std::net::Shutdown::Both).unwrap();
        let status = rustix::process::waitid(
            rustix::process::WaitId::Pid(pid),
            rustix::process::WaitIdOptions::EXITED | rustix::process::WaitIdOptions::NOWAIT,
        );
        assert_eq!(status.unwrap().unwrap().exit_status(), Some(0));
    }
}

/// A request with the number 77.
pub(crate) fn request(code: u32, node: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend_from_slice(&((40 + body.len()) as u32).to_le_bytes());
    bytes.extend_from_slice(&code.to_le_bytes());
    bytes.extend_from_slice(&77u64.to_le_bytes());
    bytes.extend_from_slice(&node.to_le_bytes());
    bytes.extend_from_slice(&[0; 16]);
    bytes.extend_from_slice(body);
    bytes
}

/// The exports, mounted with the host's FUSE client; unmounted when dropped, also by a failing test.
pub(crate) struct Mounted {
    pub(crate) directory: tempfile::TempDir,
    bridge: Option<JoinHandle<()>>,
}

impl Mounted {
    /// None where there is no /dev/fuse or no right to mount.
    pub(crate) fn new(exports: &[(&str, &Path, bool)]) -> Option<Self> {
        let Ok(device) = OpenOptions::new().read(true).write(true).open("/dev/fuse") else {
            println!("skipped: no /dev/fuse");
            return None;
        };
        let directory = tempfile::tempdir().unwrap();
        let options =
            format!("fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other", device.as_raw_fd());
        let options = CString::new(options).unwrap();
        mount("caisson-fs", directory.path(), "fuse", MountFlags::empty(), Some(options.as_c_str())).unwrap();
        let served = Served::start(exports);
        let bridge = std::thread::spawn(move || pump(&device, served));
        Some(Self { directory, bridge: Some(bridge) })
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = unmount(self.directory.path(), UnmountFlags::DETACH);
        if let Some(bridge) = self.bridge.take() {
            let _ = bridge.join();
        }
    }
}

/// Carries requests and responses until the mount is gone.
fn pump(mut device: &File, mut served: Served) {
    let mut buffer = vec![0; (1 << 20) + 8192];
    loop {
        let len = match device.read(&mut buffer) {
            Ok(len) => len,
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::ENOENT)) => continue,
            // The mount is gone.
            Err(_) => break,
        };
        served.send(&buffer[..len]);
        let code = u32::from_le_bytes(buffer[4..8].try_into().unwrap());
        if caisson_machine::share::has_response(code) {
            let response = served.receive();
            // ENOENT: the request was interrupted meanwhile.
            let _ = device.write(&response);
        }
    }
    served.finish();
}
