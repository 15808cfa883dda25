use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;

use super::{Net, Tap};
use crate::virtio::VirtioDevice;
use crate::virtio::testing::{Driver, conformance_tests};

const RX: usize = 0;
const TX: usize = 1;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const HEADER: usize = 12;
const MERGE: u64 = 1 << 15;

/// A device whose tap is one end of a pair of sockets.
fn wired() -> (Net, UnixDatagram) {
    let (wire, tap) = UnixDatagram::pair().unwrap();
    tap.set_nonblocking(true).unwrap();
    wire.set_nonblocking(true).unwrap();
    (Net::new(Some(Tap::from_socket(OwnedFd::from(tap))), MAC).unwrap(), wire)
}

conformance_tests!({
    let (net, wire) = wired();
    (Box::new(net) as Box<dyn VirtioDevice>, wire)
});

mod stub {
    use super::*;
    conformance_tests!((Box::new(Net::new(None, MAC).unwrap()) as Box<dyn VirtioDevice>, ()));
}

fn packet(len: usize) -> Vec<u8> {
    let mut packet = vec![0; HEADER];
    packet.extend((0..len).map(|i| (i / 7) as u8));
    packet
}

#[test]
fn it_tells_its_address_and_its_link() {
    let (net, _wire) = wired();
    let mut driver = Driver::new(Box::new(net));
    assert_eq!(driver.config(0, 8), [2, 0, 0, 0, 0, 1, 1, 0]);
    let mut driver = Driver::new(Box::new(Net::new(None, MAC).unwrap()));
    assert_eq!(driver.config(0, 8), [2, 0, 0, 0, 0, 1, 0, 0]);
}

#[test]
fn frames_go_out() {
    let (net, wire) = wired();
    let mut driver = Driver::started(Box::new(net));
    let sent = packet(1000);
    let (header, data) = (driver.readable(&sent[..HEADER]), driver.readable(&sent[HEADER..]));
    driver.add(TX, &[header, data]);
    driver.kick(TX);
    assert_eq!(driver.used(TX).len(), 1);
    let mut got = vec![0; 2000];
    let len = wire.recv(&mut got).unwrap();
    assert_eq!(got[..len], sent);
    // What is no frame is dropped.
    let long = driver.readable(&packet(66_000));
    driver.add(TX, &[header]);
    driver.add(TX, &[long]);
    driver.kick(TX);
    driver.settle();
    assert_eq!(driver.used(TX).len(), 2);
    assert!(wire.recv(&mut got).is_err());
}

#[test]
fn frames_come_in_with_one_interrupt() {
    let (net, wire) = wired();
    let mut driver = Driver::started(Box::new(net));
    driver.settle();
    let buffers: Vec<_> = (0..8).map(|_| driver.writable(1600)).collect();
    for buffer in &buffers {
        driver.add(RX, &[*buffer]);
    }
    driver.kick(RX);
    while driver.interrupt().is_some() {}
    for len in [60, 1514, 100] {
        wire.send(&packet(len)).unwrap();
    }
    driver.settle();
    assert_eq!(driver.interrupt(), Some(1));
    assert_eq!(driver.interrupt(), None);
    let used = driver.used(RX);
    assert_eq!(used.iter().map(|u| u.len as usize - HEADER).collect::<Vec<_>>(), [60, 1514, 100]);
    let got = driver.bytes(buffers[1].address, HEADER + 1514);
    assert_eq!(got[10..12], [1, 0]); // num_buffers
    assert_eq!(got[HEADER..], packet(1514)[HEADER..]);
}

#[test]
fn a_great_frame_is_spread_over_buffers_or_waits_for_them() {
    let (net, wire) = wired();
    let mut driver = Driver::started(Box::new(net));
    driver.settle();
    let sent = packet(10_000);
    wire.send(&sent).unwrap();
    let mut buffers = Vec::new();
    for _ in 0..2 {
        buffers.push(driver.writable(4096));
        driver.add(RX, &[buffers[buffers.len() - 1]]);
    }
    driver.kick(RX);
    driver.settle();
    assert!(driver.used(RX).is_empty());
    buffers.push(driver.writable(4096));
    driver.add(RX, &[buffers[2]]);
    driver.kick(RX);
    driver.settle();
    let used = driver.used(RX);
    assert_eq!(used.iter().map(|u| u.len).collect::<Vec<_>>(), [4096, 4096, 10_012 - 8192]);
    let mut got = Vec::new();
    for (buffer, used) in buffers.iter().zip(used) {
        got.extend(driver.bytes(buffer.address, used.len as usize));
    }
    assert_eq!(got[10..12], [3, 0]);
    assert_eq!(got[HEADER..], sent[HEADER..]);
}

#[test]
fn without_merging_a_buffer_takes_a_frame() {
    let (net, wire) = wired();
    let mut driver = Driver::new(Box::new(net));
    driver.start(!MERGE);
    driver.settle();
    for _ in 0..2 {
        let buffer = driver.writable(1526);
        driver.add(RX, &[buffer]);
    }
    driver.kick(RX);
    wire.send(&packet(3000)).unwrap();
    wire.send(&packet(100)).unwrap();
    driver.settle();
    assert_eq!(driver.used(RX).iter().map(|u| u.len).collect::<Vec<_>>(), [1526, 112]);
}

#[test]
fn a_stub_gets_its_link_at_the_restore() {
    let mut template = Driver::started(Box::new(Net::new(None, MAC).unwrap()));
    let lost = template.readable(&packet(100));
    template.add(TX, &[lost]);
    template.kick(TX);
    assert_eq!(template.used(TX).len(), 1);
    while template.interrupt().is_some() {}
    let state = template.transport.save();
    let (net, wire) = wired();
    let mut clone = template.restored(Box::new(net), &state).unwrap();
    assert_eq!(clone.interrupt(), Some(2));
    assert_eq!(clone.config(6, 2), [1, 0]);
    let frame = clone.readable(&packet(100));
    clone.add(TX, &[frame]);
    clone.kick(TX);
    assert_eq!(wire.recv(&mut [0; 200]).unwrap(), 112);
}

#[test]
fn a_real_tap_carries_frames() {
    if !std::path::Path::new("/dev/net/tun").exists() {
        println!("skipped: no /dev/net/tun");
        return;
    }
    let Ok(tap) = Tap::open("cssntest%d") else {
        println!("skipped: no taps for us");
        return;
    };
    let name = tap.name().to_owned();
    assert!(name.starts_with("cssntest"), "{name}");
    let mut driver = Driver::started(Box::new(Net::new(Some(tap), MAC).unwrap()));
    driver.settle();
    let counter = format!("/sys/class/net/{name}/statistics/rx_packets");
    let up = std::process::Command::new("ip").args(["link", "set", &name, "up"]).status();
    if !up.is_ok_and(|status| status.success()) {
        println!("skipped: no ip(8), or not allowed to use it");
        return;
    }
    // From the guest: the host counts it. Frames of an experimental type, which nobody answers.
    let mut frame = packet(60);
    frame[HEADER..HEADER + 14].copy_from_slice(&[255, 255, 255, 255, 255, 255, 2, 0, 0, 0, 0, 1, 0x88, 0xb5]);
    let frame = driver.readable(&frame);
    driver.add(TX, &[frame]);
    driver.kick(TX);
    assert_eq!(driver.used(TX).len(), 1);
    let count = std::fs::read_to_string(counter).unwrap();
    assert_eq!(count.trim(), "1");
}

#[test]
fn a_name_that_is_none_is_refused() {
    for name in ["", "sixteen-letters-", "a\0b"] {
        assert!(Tap::open(name).is_err(), "{name:?}");
    }
}
