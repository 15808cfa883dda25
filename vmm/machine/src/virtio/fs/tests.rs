#![allow(clippy::unwrap_used)]
use super::Fs;
use crate::share::{Export, Server, ShareConfig, serve};
use crate::virtio::VirtioDevice;
use crate::virtio::testing::{Driver, conformance_tests};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::JoinHandle;

const FORGETS: usize = 0;
const REQUESTS: usize = 1;
const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const WRITE: u32 = 16;

/// A device with a real server on a directory of its own.
struct Kept {
    _directory: tempfile::TempDir,
    server: Option<JoinHandle<()>>,
    hang_up: UnixStream,
}

impl Drop for Kept {
    fn drop(&mut self) {
        let _ = self.hang_up.shutdown(std::net::Shutdown::Both);
        let _ = self.server.take().unwrap().join();
    }
}

fn config(path: &Path) -> ShareConfig {
    let export = Export { name: "root".into(), path: path.into(), read_only: true };
    ShareConfig { exports: vec![export], attribute_timeout_ms: 0, entry_timeout_ms: 0 }
}

fn served() -> (Box<dyn VirtioDevice>, Kept) {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("file"), b"x").unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let hang_up = ours.try_clone().unwrap();
    let mut server = Server::new(&config(directory.path())).unwrap();
    let server = std::thread::spawn(move || drop(serve(&mut server, theirs)));
    let device = Fs::new("share", Some(ours)).unwrap();
    (Box::new(device), Kept { _directory: directory, server: Some(server), hang_up })
}

conformance_tests!(served());

mod stub {
    use super::*;
    conformance_tests!((Box::new(Fs::new("share", None).unwrap()) as Box<dyn VirtioDevice>, ()));
}

fn request(code: u32, node: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = ((40 + body.len()) as u32).to_le_bytes().to_vec();
    bytes.extend_from_slice(&code.to_le_bytes());
    bytes.extend_from_slice(&99u64.to_le_bytes());
    bytes.extend_from_slice(&node.to_le_bytes());
    bytes.extend_from_slice(&[0; 16]);
    bytes.extend_from_slice(body);
    bytes
}

/// Sends a request and waits for its response: the error, and the body.
fn call(driver: &mut Driver, bytes: &[u8], room: usize) -> (i32, Vec<u8>) {
    let (question, answer) = (driver.readable(bytes), driver.writable(room));
    let head = driver.add(REQUESTS, &[question, answer]);
    driver.kick(REQUESTS);
    let used = driver.wait_for("a response", |driver| driver.used(REQUESTS).pop());
    assert_eq!(u32::from(head), used.head as u32);
    let response = driver.bytes(answer.address, used.len as usize);
    assert_eq!(u32::from_le_bytes(response[..4].try_into().unwrap()), used.len);
    assert_eq!(response[8..16], 99u64.to_le_bytes());
    (i32::from_le_bytes(response[4..8].try_into().unwrap()), response[16..].to_vec())
}

#[test]
fn it_tells_its_tag_and_its_queues() {
    let mut driver = Driver::new(Box::new(Fs::new("share", None).unwrap()));
    let mut expected = b"share".to_vec();
    expected.resize(36, 0);
    expected.extend_from_slice(&[1, 0, 0, 0]);
    assert_eq!(driver.config(0, 40), expected);
}

#[test]
fn requests_are_answered_by_the_server() {
    let (device, _kept) = served();
    let mut driver = Driver::started(device);
    let (error, body) = call(&mut driver, &request(LOOKUP, 1, b"root\0"), 200);
    assert_eq!((error, body.len()), (0, 128));
    let root = u64::from_le_bytes(body[..8].try_into().unwrap());
    assert_eq!(call(&mut driver, &request(LOOKUP, root, b"file\0"), 200).0, 0);
    assert_eq!(call(&mut driver, &request(LOOKUP, root, b"none\0"), 200), (-libc::ENOENT, vec![]));
    // No room for the answer, and a request that is too long.
    assert_eq!(call(&mut driver, &request(LOOKUP, 1, b"root\0"), 100).0, -libc::EIO);
    let long = request(WRITE, 1, &vec![0; (1 << 20) + 5000]);
    assert_eq!(call(&mut driver, &long, 100).0, -libc::EINVAL);
    // No answer to this one, but its buffer comes back.
    let forget = driver.readable(&request(FORGET, root, &[1, 0, 0, 0, 0, 0, 0, 0]));
    driver.add(FORGETS, &[forget]);
    driver.kick(FORGETS);
    driver.wait_for("the buffer", |driver| driver.used(FORGETS).pop());
    assert!(!driver.needs_reset());
}

#[test]
fn a_stub_answers_with_errors() {
    let mut driver = Driver::started(Box::new(Fs::new("share", None).unwrap()));
    assert_eq!(call(&mut driver, &request(GETATTR, 1, &[0; 16]), 200), (-libc::ENOTCONN, vec![]));
}

#[test]
fn a_server_that_dies_or_lies_fails_what_it_was_asked() {
    for lie in [&b""[..], &u32::MAX.to_le_bytes(), &[16, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0]] {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut driver = Driver::started(Box::new(Fs::new("share", Some(ours)).unwrap()));
        let (question, answer) = (driver.readable(&request(GETATTR, 1, &[0; 16])), driver.writable(200));
        driver.add(REQUESTS, &[question, answer]);
        driver.kick(REQUESTS);
        let mut asked = [0; 60];
        theirs.read_exact(&mut asked).unwrap();
        theirs.write_all(lie).unwrap();
        drop(theirs);
        driver.wait_for("the error", |driver| driver.used(REQUESTS).pop());
        assert_eq!(driver.bytes(answer.address, 8)[4..], (-libc::EIO).to_le_bytes());
        assert_eq!(call(&mut driver, &request(GETATTR, 1, &[0; 16]), 200).0, -libc::ENOTCONN);
    }
}

#[test]
fn a_stop_waits_for_what_is_under_way() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let mut driver = Driver::started(Box::new(Fs::new("share", Some(ours)).unwrap()));
    let (question, answer) = (driver.readable(&request(GETATTR, 1, &[0; 16])), driver.writable(200));
    driver.add(REQUESTS, &[question, answer]);
    driver.kick(REQUESTS);
    let server = std::thread::spawn(move || {
        let mut asked = [0; 60];
        theirs.read_exact(&mut asked).unwrap();
        let mut response = 16u32.to_le_bytes().to_vec();
        response.extend_from_slice(&16u32.to_le_bytes());
        response.extend_from_slice(&0u32.to_le_bytes());
        response.extend_from_slice(&99u64.to_le_bytes());
        theirs.write_all(&response).unwrap();
        theirs
    });
    let state = driver.transport.save();
    assert_eq!(driver.used(REQUESTS).len(), 1);
    assert_eq!(driver.bytes(answer.address, 4), 16u32.to_le_bytes());
    drop((state, server.join().unwrap()));
}

#[test]
fn more_than_the_socket_takes_waits_its_turn() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let mut driver = Driver::started(Box::new(Fs::new("share", Some(ours)).unwrap()));
    let bytes = request(WRITE, 1, &vec![7; 300_000]);
    let question = driver.readable(&bytes);
    let count = 40;
    for _ in 0..count {
        let answer = driver.writable(100);
        driver.add(REQUESTS, &[question, answer]);
    }
    let server = std::thread::spawn(move || {
        for _ in 0..count {
            let mut prefix = [0; 4];
            theirs.read_exact(&mut prefix).unwrap();
            let mut asked = vec![0; u32::from_le_bytes(prefix) as usize];
            theirs.read_exact(&mut asked).unwrap();
            assert_eq!(asked, bytes);
            let mut response = 16u32.to_le_bytes().to_vec();
            response.extend_from_slice(&16u32.to_le_bytes());
            response.extend_from_slice(&0u32.to_le_bytes());
            response.extend_from_slice(&99u64.to_le_bytes());
            theirs.write_all(&response).unwrap();
        }
        theirs
    });
    driver.kick(REQUESTS);
    let mut answered = 0;
    driver.wait_for("all responses", |driver| {
        answered += driver.used(REQUESTS).len();
        (answered == count).then_some(())
    });
    drop(server.join().unwrap());
}
