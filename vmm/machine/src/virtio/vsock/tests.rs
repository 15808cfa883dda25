use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use super::Vsock;
use super::connection::BUFFER_BYTES;
use super::mux::MAX_CONNECTIONS;
use super::packet::*;
use crate::virtio::VirtioDevice;
use crate::virtio::testing::{Desc, Driver, SECOND_REGION, conformance_tests};

const CID: u64 = 3;
const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;
const RX_BUFFER_BYTES: usize = 4096 - 320;
/// What the tests' guest can take by default.
const GUEST_BUFFER: u32 = 256 << 10;

conformance_tests!({
    let directory = tempfile::tempdir().unwrap();
    (Box::new(Vsock::new(3, directory.path()).unwrap()) as Box<dyn VirtioDevice>, directory)
});

/// The guest's side: packets in and out.
struct Guest {
    driver: Driver,
    directory: tempfile::TempDir,
    rx: HashMap<u16, u64>,
    /// Addresses of buffers to receive into that are not in the queue.
    free: Vec<u64>,
    /// Packets that came and were not looked at.
    packets: Vec<(Header, Vec<u8>)>,
    tx_in_flight: usize,
    interrupts: usize,
}

impl Guest {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut driver = Driver::started(Box::new(Vsock::new(3, directory.path()).unwrap()));
        driver.settle();
        let mut guest = Self {
            driver,
            directory,
            rx: HashMap::new(),
            free: free(),
            packets: Vec::new(),
            tx_in_flight: 0,
            interrupts: 0,
        };
        guest.fill_rx(64);
        guest
    }

    /// The same guest after a restore of another machine.
    fn restored(&mut self) -> Self {
        let state = self.driver.transport.save();
        let directory = tempfile::tempdir().unwrap();
        let device = Box::new(Vsock::new(3, directory.path()).unwrap());
        let driver = self.driver.restored(device, &state).unwrap();
        Self {
            driver,
            directory,
            rx: self.rx.clone(),
            free: self.free.clone(),
            packets: Vec::new(),
            tx_in_flight: self.tx_in_flight,
            interrupts: 0,
        }
    }

    fn fill_rx(&mut self, count: usize) {
        for _ in 0..count {
            let address = self.free.pop().unwrap();
            let head = self.driver.add(RX, &[Desc { address, len: RX_BUFFER_BYTES as u32, writable: true }]);
            self.rx.insert(head, address);
        }
        self.driver.kick(RX);
    }

    /// After a reset.
    fn forget_rx(&mut self) {
        self.rx.clear();
        self.free = free();
    }

    fn header(&self, ports: Ports, op: u16) -> Header {
        Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: ports.guest,
            dst_port: ports.host,
            kind: TYPE_STREAM,
            op,
            buf_alloc: GUEST_BUFFER,
            ..Header::default()
        }
    }

    fn send_packet(&mut self, header: Header, data: &[u8]) {
        let used = self.driver.used(TX).len();
        self.tx_in_flight -= used;
        let header = self.driver.readable(&header.to_bytes());
        if data.is_empty() {
            self.driver.add(TX, &[header]);
        } else {
            let data = self.driver.readable(data);
            self.driver.add(TX, &[header, data]);
        }
        self.tx_in_flight += 1;
        assert!(self.tx_in_flight < 60, "the device does not give the packets' buffers back");
        self.driver.kick(TX);
    }

    fn send(&mut self, ports: Ports, op: u16, flags: u32) {
        let header = Header { flags, ..self.header(ports, op) };
        self.send_packet(header, &[]);
    }

    fn send_data(&mut self, ports: Ports, data: &[u8]) {
        let header = Header { len: data.len() as u32, ..self.header(ports, OP_RW) };
        self.send_packet(header, data);
    }

    /// Tells how much was taken of what came.
    fn send_credit(&mut self, ports: Ports, buf_alloc: u32, fwd_cnt: u32) {
        let header = Header { buf_alloc, fwd_cnt, ..self.header(ports, OP_CREDIT_UPDATE) };
        self.send_packet(header, &[]);
    }

    /// Takes what came; gives the buffers back to the device if `refill`.
    fn collect(&mut self, refill: bool) {
        while self.driver.interrupt().is_some() {
            self.interrupts += 1;
        }
        let used = self.driver.used(RX);
        for used in &used {
            let address = self.rx.remove(&used.head).unwrap();
            self.free.push(address);
            let bytes = self.driver.bytes(address, used.len as usize);
            let header = Header::from_bytes(bytes[..HEADER_BYTES].try_into().unwrap());
            assert_eq!(header.len as usize, bytes.len() - HEADER_BYTES);
            assert_eq!((header.src_cid, header.dst_cid, header.kind), (HOST_CID, CID, TYPE_STREAM));
            self.packets.push((header, bytes[HEADER_BYTES..].to_vec()));
        }
        if refill && !used.is_empty() {
            self.fill_rx(used.len());
        }
    }

    /// Waits for the next packet.
    fn packet(&mut self) -> (Header, Vec<u8>) {
        for _ in 0..12_000 {
            self.collect(true);
            if !self.packets.is_empty() {
                return self.packets.remove(0);
            }
            self.driver.turn_within(10);
        }
        panic!("no packet came");
    }

    fn expect(&mut self, op: u16) -> Header {
        let (header, _) = self.packet();
        assert_eq!(header.op, op, "{header:?}");
        header
    }

    fn expect_silence(&mut self) {
        self.driver.settle();
        self.collect(true);
        assert_eq!(self.packets, []);
    }

    /// Collects `len` bytes of data, and whatever else comes until then is dropped.
    fn read(&mut self, len: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while all.len() < len {
            let (header, data) = self.packet();
            assert_eq!(header.op, OP_RW, "{header:?}");
            all.extend(data);
        }
        all
    }

    fn client(&self) -> UnixStream {
        UnixStream::connect(self.directory.path().join("vsock.sock")).unwrap()
    }

    /// A client that is connected to `port` of the guest.
    fn connect(&mut self, port: u32) -> (UnixStream, Ports) {
        let mut client = self.client();
        client.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
        let request = self.expect(OP_REQUEST);
        assert_eq!(request.dst_port, port);
        let ports = Ports { host: request.src_port, guest: port };
        self.send(ports, OP_RESPONSE, 0);
        assert_eq!(line(&mut client), format!("OK {}\n", ports.host));
        client.set_nonblocking(true).unwrap();
        (client, ports)
    }

    /// A connection of the guest to `port` of the host.
    fn connect_out(&mut self, port: u32) -> (UnixStream, Ports) {
        let listener = listen(self.directory.path(), port);
        let ports = Ports { host: port, guest: 5000 + port };
        self.send(ports, OP_REQUEST, 0);
        self.expect(OP_RESPONSE);
        let (server, _) = listener.accept().unwrap();
        server.set_nonblocking(true).unwrap();
        (server, ports)
    }

    /// Reads from a socket on the host while the device works; `None` at the end.
    fn host_read(&mut self, mut stream: &UnixStream) -> Option<Vec<u8>> {
        let mut bytes = vec![0; 64 << 10];
        self.driver.wait_for("data on the host", |_| match stream.read(&mut bytes) {
            Ok(0) => Some(None),
            Ok(len) => Some(Some(bytes[..len].to_vec())),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => None,
            Err(error) => panic!("{error}"),
        })
    }

    fn host_read_all(&mut self, stream: &UnixStream) -> Vec<u8> {
        let mut all = Vec::new();
        while let Some(bytes) = self.host_read(stream) {
            all.extend(bytes);
        }
        all
    }
}

fn free() -> Vec<u64> {
    (0..128).map(|i| SECOND_REGION + i * 4096).collect()
}

fn listen(directory: &Path, port: u32) -> UnixListener {
    UnixListener::bind(directory.join(format!("vsock.sock_{port}"))).unwrap()
}

fn line(stream: &mut UnixStream) -> String {
    let mut line = Vec::new();
    let mut byte = [0];
    while !line.ends_with(b"\n") && stream.read(&mut byte).unwrap() == 1 {
        line.push(byte[0]);
    }
    String::from_utf8(line).unwrap()
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i.wrapping_mul(31) >> 3) as u8).collect()
}

#[test]
fn the_configuration_is_the_context_id() {
    let mut guest = Guest::new();
    assert_eq!(guest.driver.config(0, 8), CID.to_le_bytes());
}

#[test]
fn a_client_talks_with_the_guest() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.connect(1024);
    client.write_all(b"ping").unwrap();
    assert_eq!(guest.read(4), b"ping");
    guest.send_data(ports, b"pong");
    assert_eq!(guest.host_read(&client).unwrap(), b"pong");
}

#[test]
fn the_guest_talks_with_a_server() {
    let mut guest = Guest::new();
    let (mut server, ports) = guest.connect_out(1026);
    guest.send_data(ports, b"ping");
    assert_eq!(guest.host_read(&server).unwrap(), b"ping");
    server.write_all(b"pong").unwrap();
    assert_eq!(guest.read(4), b"pong");
}

#[test]
fn what_a_client_sends_with_its_first_line_is_for_the_guest() {
    let mut guest = Guest::new();
    let mut client = guest.client();
    client.write_all(b"CONNECT 1025\n\x01\x02\x03\x04").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let request = guest.expect(OP_REQUEST);
    let ports = Ports { host: request.src_port, guest: 1025 };
    guest.expect_silence();
    guest.send(ports, OP_RESPONSE, 0);
    assert_eq!(guest.read(4), [1, 2, 3, 4]);
    assert_eq!(guest.expect(OP_SHUTDOWN).flags, SHUTDOWN_SEND);
    assert!(line(&mut client).starts_with("OK "));
}

#[test]
fn a_first_line_may_come_in_pieces() {
    let mut guest = Guest::new();
    let mut client = guest.client();
    for piece in ["CON", "NECT 77", "\n"] {
        guest.expect_silence();
        client.write_all(piece.as_bytes()).unwrap();
    }
    assert_eq!(guest.expect(OP_REQUEST).dst_port, 77);
}

#[test]
fn a_client_that_says_something_else_is_dropped() {
    for words in [
        "GET / HTTP/1.1\r\n",
        "CONNECT\n",
        "CONNECT x\n",
        "CONNECT 4294967296\n",
        "\n",
        &"x".repeat(32),
        "CONNECT -1\n",
    ] {
        let mut guest = Guest::new();
        let mut client = guest.client();
        client.write_all(words.as_bytes()).unwrap();
        guest.driver.turn();
        guest.expect_silence();
        assert!(matches!(client.read(&mut [0]), Ok(0) | Err(_)), "{words}");
    }
}

#[test]
fn a_port_that_nobody_listens_on_is_refused() {
    let mut guest = Guest::new();
    // In the guest:
    let mut client = guest.client();
    client.write_all(b"CONNECT 9\n").unwrap();
    let request = guest.expect(OP_REQUEST);
    guest.send(Ports { host: request.src_port, guest: 9 }, OP_RST, 0);
    assert_eq!(line(&mut client), "");
    guest.expect_silence();
    // On the host:
    guest.send(Ports { host: 9, guest: 1 }, OP_REQUEST, 0);
    let refusal = guest.expect(OP_RST);
    assert_eq!((refusal.src_port, refusal.dst_port), (9, 1));
    // And where a socket was, but nobody is any more.
    drop(listen(guest.directory.path(), 10));
    guest.send(Ports { host: 10, guest: 1 }, OP_REQUEST, 0);
    guest.expect(OP_RST);
}

#[test]
fn a_client_that_gives_up_before_the_answer() {
    let mut guest = Guest::new();
    let mut client = guest.client();
    client.write_all(b"CONNECT 9\n").unwrap();
    let request = guest.expect(OP_REQUEST);
    drop(client);
    guest.expect(OP_RST);
    // The answer is too late.
    guest.send(Ports { host: request.src_port, guest: 9 }, OP_RESPONSE, 0);
    guest.expect(OP_RST);
    guest.expect_silence();
}

#[test]
fn each_direction_ends_on_its_own() {
    // First the host's:
    let mut guest = Guest::new();
    let (mut client, ports) = guest.connect(1);
    client.write_all(b"all").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.read(3), b"all");
    assert_eq!(guest.expect(OP_SHUTDOWN).flags, SHUTDOWN_SEND);
    guest.expect_silence();
    guest.send_data(ports, b"answer");
    assert_eq!(guest.host_read(&client).unwrap(), b"answer");
    guest.send(ports, OP_SHUTDOWN, SHUTDOWN_SEND);
    assert_eq!(guest.host_read(&client), None);
    guest.expect(OP_RST);
    guest.expect_silence();

    // First the guest's:
    let (mut client, ports) = guest.connect(2);
    guest.send_data(ports, b"all");
    guest.send(ports, OP_SHUTDOWN, SHUTDOWN_SEND);
    assert_eq!(guest.host_read_all(&client), b"all");
    guest.expect_silence();
    client.write_all(b"answer").unwrap();
    assert_eq!(guest.read(6), b"answer");
    drop(client);
    guest.expect(OP_RST);
    guest.expect_silence();
}

#[test]
fn data_and_a_close_come_in_one_interrupt() {
    let mut guest = Guest::new();
    let (mut client, _) = guest.connect(1);
    guest.expect_silence();
    let before = guest.interrupts;
    client.write_all(b"all").unwrap();
    drop(client);
    assert_eq!(guest.read(3), b"all");
    guest.expect(OP_RST);
    guest.expect_silence();
    assert_eq!(guest.interrupts, before + 1);
}

#[test]
fn transmitted_packets_alone_interrupt_seldom() {
    let mut guest = Guest::new();
    let (client, ports) = guest.connect(1);
    guest.expect_silence();
    let before = guest.interrupts;
    for _ in 0..100 {
        guest.send_data(ports, b"x");
    }
    guest.collect(true);
    assert!(guest.interrupts - before <= 8, "{}", guest.interrupts - before);
    let mut all = Vec::new();
    while all.len() < 100 {
        all.extend(guest.host_read(&client).unwrap());
    }
}

#[test]
fn a_guest_that_closes_is_let_go_at_once() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.connect(1);
    guest.send_data(ports, b"last words");
    guest.send(ports, OP_SHUTDOWN, SHUTDOWN_BOTH);
    guest.expect(OP_RST);
    assert_eq!(guest.host_read_all(&client), b"last words");
    client.write_all(b"x").unwrap_err();
    guest.send(ports, OP_RST, 0);
    guest.expect_silence();
}

#[test]
fn a_guest_that_closes_leaves_all_its_data() {
    for with_reset in [false, true] {
        let mut guest = Guest::new();
        let (client, ports) = guest.connect(1);
        // Fill the socket on the host, and then the device's buffer.
        let data = pattern(4000);
        let mut sent: Vec<u8> = Vec::new();
        let mut credit = BUFFER_BYTES as usize;
        while credit >= data.len() {
            guest.send_data(ports, &data);
            sent.extend(&data);
            credit -= data.len();
            guest.driver.settle();
            guest.collect(true);
            for (header, _) in std::mem::take(&mut guest.packets) {
                assert_eq!(header.op, OP_CREDIT_UPDATE);
                credit = BUFFER_BYTES as usize - (sent.len() - header.fwd_cnt as usize);
            }
        }
        guest.send(ports, OP_SHUTDOWN, if with_reset { SHUTDOWN_SEND } else { SHUTDOWN_BOTH });
        if with_reset {
            guest.send(ports, OP_RST, 0);
            guest.expect_silence();
        } else {
            guest.expect(OP_RST);
        }
        assert_eq!(guest.host_read_all(&client).len(), sent.len());
        guest.expect_silence();
    }
}

#[test]
fn the_guest_will_not_receive() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.connect(1);
    guest.send(ports, OP_SHUTDOWN, SHUTDOWN_RECEIVE);
    guest.driver.wait_for("a broken pipe", |_| client.write_all(b"x").err());
    guest.expect_silence();
    guest.send_data(ports, b"but sends");
    assert_eq!(guest.host_read(&client).unwrap(), b"but sends");
    guest.send(ports, OP_SHUTDOWN, SHUTDOWN_SEND);
    guest.expect(OP_RST);
    assert_eq!(guest.host_read(&client), None);
}

#[test]
fn the_host_will_not_receive() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.connect(1);
    client.shutdown(Shutdown::Read).unwrap();
    guest.send_data(ports, b"in vain");
    assert_eq!(guest.expect(OP_SHUTDOWN).flags, SHUTDOWN_RECEIVE);
    guest.send_data(ports, b"in vain");
    guest.expect_silence();
    client.write_all(b"but sends").unwrap();
    assert_eq!(guest.read(9), b"but sends");
    drop(client);
    guest.expect(OP_RST);
    guest.expect_silence();
}

#[test]
fn a_host_that_goes_away_ends_the_connection() {
    let mut guest = Guest::new();
    let (client, ports) = guest.connect(1);
    drop(client);
    let reset = guest.expect(OP_RST);
    assert_eq!((reset.src_port, reset.dst_port), (ports.host, ports.guest));
    // What was on its way meanwhile is refused, the guest's own reset is not.
    guest.send_data(ports, b"late");
    guest.expect(OP_RST);
    guest.send(ports, OP_RST, 0);
    guest.expect_silence();
}

#[test]
fn much_data_gets_through_to_the_guest() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.connect(1);
    client.set_nonblocking(false).unwrap();
    let data = pattern(3 << 20);
    let copy = data.clone();
    let writer = std::thread::spawn(move || {
        client.write_all(&copy).unwrap();
    });
    let mut all = Vec::new();
    let mut told = 0;
    loop {
        let (header, bytes) = guest.packet();
        if header.op == OP_RST {
            break;
        }
        assert_eq!(header.op, OP_RW);
        all.extend(bytes);
        assert!(all.len() - told <= GUEST_BUFFER as usize, "more than the guest can take");
        if all.len() - told > GUEST_BUFFER as usize / 2 {
            told = all.len();
            guest.send_credit(ports, GUEST_BUFFER, told as u32);
        }
    }
    assert!(all == data);
    writer.join().unwrap();
}

#[test]
fn much_data_gets_through_to_the_host() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.connect(1);
    client.set_nonblocking(false).unwrap();
    let data = pattern(3 << 20);
    let copy = data.clone();
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        client.read_to_end(&mut all).unwrap();
        assert!(all == copy);
    });
    let mut credit = BUFFER_BYTES as usize;
    let mut sent = 0;
    while sent < data.len() {
        let len = credit.min(30_000).min(data.len() - sent);
        if len == 0 {
            let header = guest.expect(OP_CREDIT_UPDATE);
            assert_eq!(header.buf_alloc, BUFFER_BYTES);
            credit = BUFFER_BYTES as usize - (sent - header.fwd_cnt as usize);
            continue;
        }
        guest.send_data(ports, &data[sent..sent + len]);
        sent += len;
        credit -= len;
    }
    guest.send(ports, OP_SHUTDOWN, SHUTDOWN_SEND);
    // The reader ends when all is there, and goes away.
    guest.driver.settle();
    loop {
        let (header, _) = guest.packet();
        if header.op == OP_RST {
            break;
        }
        assert_eq!(header.op, OP_CREDIT_UPDATE);
    }
    reader.join().unwrap();
}

#[test]
fn the_guests_credit_is_respected() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.connect(1);
    guest.send_credit(ports, 10, 0);
    client.write_all(&pattern(25)).unwrap();
    assert_eq!(guest.read(10), pattern(25)[..10]);
    guest.expect_silence();
    guest.send_credit(ports, 10, 4);
    assert_eq!(guest.read(4), pattern(25)[10..14]);
    guest.expect_silence();
    // It may take back what it promised.
    guest.send_credit(ports, 1, 4);
    guest.expect_silence();
    guest.send_credit(ports, 1000, 14);
    assert_eq!(guest.read(11), pattern(25)[14..]);
    // The end needs no credit.
    guest.send_credit(ports, 0, 25);
    drop(client);
    guest.driver.settle();
    guest.expect_silence();
    guest.send_credit(ports, 1, 25);
    guest.expect(OP_RST);
}

#[test]
fn a_guest_that_ignores_its_credit_is_cut_off() {
    let mut guest = Guest::new();
    let (client, ports) = guest.connect(1);
    let data = pattern(60_000);
    for _ in 0..1000 {
        guest.send_data(ports, &data);
        guest.driver.settle();
        guest.collect(true);
        if guest.packets.iter().any(|(header, _)| header.op == OP_RST) {
            drop(client);
            return;
        }
    }
    panic!("the device took 60 MB that nobody reads");
}

#[test]
fn the_guest_asks_for_its_credit() {
    let mut guest = Guest::new();
    let (_client, ports) = guest.connect(1);
    guest.send_data(ports, b"12345");
    guest.send(ports, OP_CREDIT_REQUEST, 0);
    let update = guest.expect(OP_CREDIT_UPDATE);
    assert_eq!((update.buf_alloc, update.fwd_cnt), (BUFFER_BYTES, 5));
    guest.expect_silence();
}

#[test]
fn without_buffers_of_the_guest_nothing_is_lost_and_nothing_spins() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.connect(1);
    // Use the buffers up.
    let data = pattern(64 * (RX_BUFFER_BYTES - HEADER_BYTES));
    client.write_all(&data[..120_000]).unwrap();
    guest.driver.settle();
    guest.collect(false);
    let mut all: Vec<u8> = Vec::new();
    // The second client is served if its turn comes before the buffers are used up.
    let is_of_second = |header: &Header| header.dst_port == 2 && [OP_REQUEST, OP_RST].contains(&header.op);
    let mut take = |guest: &mut Guest| {
        for (header, bytes) in std::mem::take(&mut guest.packets) {
            if !is_of_second(&header) {
                assert_eq!(header.op, OP_RW);
                all.extend(bytes);
            }
        }
        all.len()
    };
    let first = take(&mut guest);
    guest.send_credit(ports, GUEST_BUFFER, first as u32);
    client.write_all(&data[120_000..]).unwrap();
    // One more connection waits with it, and its client goes away.
    let mut second = guest.client();
    second.write_all(b"CONNECT 2\n").unwrap();
    drop(client);
    drop(second);
    guest.driver.settle();
    guest.collect(false);
    take(&mut guest);
    guest.driver.settle();
    guest.fill_rx(10);
    guest.driver.settle();
    // All that was written, and then the end.
    let mut ended = false;
    while !ended {
        let (header, bytes) = guest.packet();
        match header.op {
            _ if is_of_second(&header) => {}
            OP_RW => {
                all.extend(bytes);
                let len = all.len() as u32;
                guest.send_credit(ports, GUEST_BUFFER, len);
            }
            OP_RST => ended = true,
            _ => panic!("{header:?}"),
        }
    }
    assert!(all == data);
}

#[test]
fn refusals_wait_for_buffers_and_hold_the_guest_back() {
    let mut guest = Guest::new();
    guest.driver.start(u64::MAX);
    guest.forget_rx();
    guest.tx_in_flight = 0;
    // No buffers at all, and packets for nobody.
    let mut sent: u32 = 0;
    let mut taken = 0;
    for round in 0..20 {
        while sent - taken < 40 {
            let ports = Ports { host: 7, guest: sent };
            let header = guest.header(ports, OP_RW);
            let header = guest.driver.readable(&header.to_bytes());
            guest.driver.add(TX, &[header]);
            sent += 1;
        }
        guest.driver.kick(TX);
        guest.driver.settle();
        taken += guest.driver.used(TX).len() as u32;
        if round > 15 {
            assert!(taken < 400, "packets are taken though no refusal can be sent");
        }
    }
    let mut refused = 0;
    guest.fill_rx(64);
    while refused < sent {
        let (header, _) = guest.packet();
        assert_eq!((header.op, header.dst_port), (OP_RST, refused));
        refused += 1;
    }
    guest.expect_silence();
}

#[test]
fn connections_are_bounded() {
    let mut guest = Guest::new();
    let listener = listen(guest.directory.path(), 5);
    listener.set_nonblocking(true).unwrap();
    let mut servers = Vec::new();
    let mut refused = 0;
    for guest_port in 0..MAX_CONNECTIONS as u32 + 10 {
        guest.send(Ports { host: 5, guest: guest_port }, OP_REQUEST, 0);
        match guest.packet().0.op {
            OP_RESPONSE => servers.extend(listener.accept()),
            OP_RST => refused += 1,
            op => panic!("{op}"),
        }
    }
    assert_eq!((servers.len(), refused), (MAX_CONNECTIONS, 10));
    let mut client = guest.client();
    client.write_all(b"CONNECT 1\n").unwrap();
    guest.expect_silence();
    assert!(matches!(client.read(&mut [0]), Ok(0) | Err(_)));
    // And there is room again.
    drop(servers);
    for _ in 0..MAX_CONNECTIONS {
        guest.expect(OP_RST);
    }
    let (_client, _) = guest.connect(1);
}

#[test]
fn a_client_that_waits_for_the_guest_to_start_is_served() {
    let directory = tempfile::tempdir().unwrap();
    let driver = Driver::new(Box::new(Vsock::new(3, directory.path()).unwrap()));
    let mut guest = Guest {
        driver,
        directory,
        rx: HashMap::new(),
        free: free(),
        packets: Vec::new(),
        tx_in_flight: 0,
        interrupts: 0,
    };
    let mut client = guest.client();
    client.write_all(b"CONNECT 1\n").unwrap();
    guest.driver.settle();
    guest.driver.start(u64::MAX);
    guest.driver.settle();
    guest.fill_rx(8);
    assert_eq!(guest.expect(OP_REQUEST).dst_port, 1);
}

#[test]
fn nonsense_of_the_guest_is_answered_with_a_reset_or_not_at_all() {
    let mut guest = Guest::new();
    let ports = Ports { host: 1, guest: 2 };
    let good = guest.header(ports, OP_RW);
    for header in [
        Header { op: 0, ..good },
        Header { op: 99, ..good },
        Header { op: OP_CREDIT_UPDATE, ..good },
        Header { op: OP_RESPONSE, ..good },
        Header { op: OP_REQUEST, kind: 2, ..good },
        Header { op: OP_REQUEST, dst_cid: 1, ..good },
    ] {
        guest.send_packet(header, &[]);
        guest.expect(OP_RST);
    }
    guest.send_packet(Header { src_cid: 4, ..good }, &[]);
    guest.expect_silence();
    // In a connection.
    let (mut client, ports) = guest.connect(1);
    guest.send(ports, OP_REQUEST, 0);
    guest.expect(OP_RST);
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    // Data that is not there breaks the driver.
    guest.send_packet(Header { len: 10, ..good }, &[1, 2, 3]);
    assert!(guest.driver.needs_reset());
    // After a reset all is well, and nothing is left.
    guest.driver.start(u64::MAX);
    guest.forget_rx();
    guest.tx_in_flight = 0;
    guest.driver.settle();
    guest.fill_rx(64);
    guest.expect_silence();
    let _ = guest.connect(1);
}

#[test]
fn a_reset_of_the_device_drops_the_connections() {
    let mut guest = Guest::new();
    let (mut client, _) = guest.connect(1);
    guest.driver.write(0x70, 0);
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
}

#[test]
fn connections_outlive_a_pause() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.connect(1);
    guest.driver.transport.pause();
    client.write_all(b"meanwhile").unwrap();
    guest.expect_silence();
    let _ = guest.driver.transport.save();
    guest.driver.transport.resume().unwrap();
    assert_eq!(guest.read(9), b"meanwhile");
    guest.send_data(ports, b"on");
    assert_eq!(guest.host_read(&client).unwrap(), b"on");
}

#[test]
fn a_restored_guest_without_connections_is_not_disturbed() {
    let mut template = Guest::new();
    let (client, _) = template.connect(1);
    drop(client);
    template.expect(OP_RST);
    template.expect_silence();
    let mut guest = template.restored();
    guest.driver.settle();
    assert!(guest.driver.used(EVENT).is_empty());
    let (mut client, _) = guest.connect(1);
    client.write_all(b"hello").unwrap();
    assert_eq!(guest.read(5), b"hello");
}

#[test]
fn a_client_that_closes_right_before_the_snapshot_is_not_in_it() {
    let mut template = Guest::new();
    let (client, _) = template.connect(1);
    drop(client);
    let mut guest = template.restored();
    guest.expect(OP_RST);
    assert!(guest.driver.used(EVENT).is_empty());
    let _ = guest.connect(1);
}

#[test]
fn a_restored_guest_learns_that_its_connections_are_gone() {
    for event_idx in [true, false] {
        let mut template = Guest::new();
        if !event_idx {
            template.driver.start(!(1 << 29));
            template.forget_rx();
            template.tx_in_flight = 0;
            template.driver.settle();
            template.fill_rx(64);
        }
        let mut events = Vec::new();
        for _ in 0..8 {
            let buffer = template.driver.writable(4);
            template.driver.add(EVENT, &[buffer]);
            events.push(buffer);
        }
        template.driver.kick(EVENT);
        let (_client, ports) = template.connect(1);
        let mut guest = template.restored();
        let mut client = guest.client();
        client.write_all(b"CONNECT 1\n").unwrap();
        guest.driver.settle();
        assert_eq!(guest.driver.interrupt(), Some(1));
        let used = guest.driver.used(EVENT);
        assert_eq!(used.len(), 1);
        assert_eq!(guest.driver.bytes(events[0].address, 4), 0_u32.to_le_bytes());
        // No packet before the driver has handled it, as it would drop new connections too.
        guest.expect_silence();
        guest.driver.add(EVENT, &[events[0]]);
        guest.driver.kick(EVENT);
        assert_eq!(guest.expect(OP_REQUEST).dst_port, 1);
        // What it still had on the old connection is refused.
        guest.send_data(ports, b"old");
        guest.expect(OP_RST);
        assert!(guest.driver.used(EVENT).is_empty());
    }
}

#[test]
fn the_driver_is_asked_to_notify_of_the_answer_to_the_event() {
    // Linux notifies with EVENT_IDX only when it passes avail_event: see that it would.
    let mut template = Guest::new();
    for _ in 0..8 {
        let buffer = template.driver.writable(4);
        template.driver.add(EVENT, &[buffer]);
    }
    template.driver.kick(EVENT);
    let (_client, _) = template.connect(1);
    let mut guest = template.restored();
    guest.driver.settle();
    assert_eq!(guest.driver.avail_event(EVENT), 8);
}

#[test]
fn sockets_in_a_directory_with_a_long_name() {
    let root = tempfile::tempdir().unwrap();
    let directory = root.path().join("x".repeat(120));
    std::fs::create_dir(&directory).unwrap();
    let _ = Vsock::new(3, &directory).unwrap();
    assert!(directory.join("vsock.sock").exists());
    // And again, over the socket that is left.
    let mut driver = Driver::started(Box::new(Vsock::new(3, &directory).unwrap()));
    driver.settle();
    let error = Vsock::new(3, &root.path().join("absent")).err().unwrap();
    assert!(error.to_string().contains("absent"), "{error}");
}

/// Something that the guest or the host does.
#[derive(Clone, Debug)]
enum Step {
    Packet { op: u16, flags: u32, port: u32, len: usize, buf_alloc: u32, fwd_cnt: u32 },
    Refill(usize),
    Connect(u32),
    Write(usize, usize),
    Shutdown(usize, u8),
    Drop(usize),
    Pause,
}

fn step() -> impl proptest::strategy::Strategy<Value = Step> {
    use proptest::prelude::*;
    let credit = prop_oneof![Just(GUEST_BUFFER), 0_u32..100, any::<u32>()];
    let packet = (0_u16..9, 0_u32..4, 0_u32..4, 0_usize..5000, credit, prop_oneof![0_u32..100, any::<u32>()]);
    prop_oneof![
        8 => packet.prop_map(|(op, flags, port, len, buf_alloc, fwd_cnt)| Step::Packet { op, flags, port, len, buf_alloc, fwd_cnt }),
        2 => (0_usize..16).prop_map(Step::Refill),
        3 => (0_u32..4).prop_map(Step::Connect),
        3 => (any::<usize>(), 1_usize..20_000).prop_map(|(which, len)| Step::Write(which, len)),
        1 => (any::<usize>(), 0_u8..3).prop_map(|(which, how)| Step::Shutdown(which, how)),
        1 => any::<usize>().prop_map(Step::Drop),
        1 => Just(Step::Pause),
    ]
}

/// Whatever both sides do, the device comes to rest, and lets go of everything at a reset.
#[test]
fn bears_any_sequence_of_packets_and_clients() {
    use proptest::prelude::*;
    let config = ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(steps in prop::collection::vec(step(), 1..60))| {
        let mut guest = Guest::new();
        let listener = listen(guest.directory.path(), 1);
        listener.set_nonblocking(true).unwrap();
        let mut hosts: Vec<UnixStream> = Vec::new();
        // The ports of connections that the guest heard of, and some that it makes up.
        let mut ports = vec![Ports { host: 1, guest: 1 }, Ports { host: 1, guest: 2 }, Ports { host: 2, guest: 1 }];
        for step in steps {
            match step {
                Step::Packet { op, flags, port, len, buf_alloc, fwd_cnt } => {
                    let ports = ports[ports.len() - 1 - port as usize % ports.len()];
                    let data = if op == OP_RW { pattern(len) } else { Vec::new() };
                    let header = Header { op, flags, buf_alloc, fwd_cnt, len: data.len() as u32, ..guest.header(ports, op) };
                    guest.send_packet(header, &data);
                }
                Step::Refill(count) => {
                    let count = count.min(guest.free.len());
                    guest.fill_rx(count);
                }
                Step::Connect(port) => {
                    let mut client = guest.client();
                    client.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
                    client.set_nonblocking(true).unwrap();
                    hosts.push(client);
                }
                Step::Write(which, len) if !hosts.is_empty() => {
                    let which = which % hosts.len();
                    let _ = hosts[which].write(&pattern(len));
                }
                Step::Shutdown(which, how) if !hosts.is_empty() => {
                    let which = which % hosts.len();
                    let how = [Shutdown::Read, Shutdown::Write, Shutdown::Both][how as usize];
                    let _ = hosts[which].shutdown(how);
                }
                Step::Drop(which) if !hosts.is_empty() => {
                    let which = which % hosts.len();
                    hosts.remove(which);
                }
                Step::Pause => {
                    guest.driver.transport.pause();
                    guest.driver.settle();
                    guest.driver.transport.resume().unwrap();
                }
                _ => {}
            }
            guest.driver.settle();
            guest.collect(false);
            prop_assert!(!guest.driver.needs_reset());
            for (header, _) in std::mem::take(&mut guest.packets) {
                if header.op == OP_REQUEST {
                    ports.push(Ports { host: header.src_port, guest: header.dst_port });
                }
            }
            while let Ok((server, _)) = listener.accept() {
                server.set_nonblocking(true).unwrap();
                hosts.push(server);
            }
        }
        guest.driver.settle();
        guest.driver.write(0x70, 0);
        drop(listener);
        for mut host in hosts {
            host.set_nonblocking(false).unwrap();
            let mut rest = Vec::new();
            // An end or an error, but an end.
            let _ = host.read_to_end(&mut rest);
        }
    });
}
