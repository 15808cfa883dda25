//! All connections of the device, and which of them has something for the guest.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::event::epoll::EventFlags;
use vm_memory::GuestMemoryMmap;

use super::connection::{Connection, Fate, Phase, Read};
use super::host::{Greeting, Host, greeting};
use super::packet::{
    HEADER_BYTES, HOST_CID, Header, OP_CREDIT_REQUEST, OP_CREDIT_UPDATE, OP_REQUEST, OP_RESPONSE, OP_RST, OP_RW,
    OP_SHUTDOWN, Ports, TYPE_STREAM,
};
use crate::virtio::poller::Poller;
use crate::virtio::{Buffers, QueueError, Virtqueue};

/// The most connections at once, those of clients that have not said where to included. Each may
/// hold [`super::connection::BUFFER_BYTES`] of the guest's data.
pub(super) const MAX_CONNECTIONS: usize = if cfg!(test) { 64 } else { 512 };
/// The most refusals that wait for a buffer of the guest; then no more of its packets are taken.
const MAX_REFUSALS: usize = 256;
/// The most packets to the guest in one turn of the event loop.
const PACKET_BUDGET: usize = 128;
/// The most packets of one connection before the others have their turn.
const CONNECTION_BUDGET: usize = 16;
/// The most bytes of data in a packet: what Linux allows.
const MAX_DATA_BYTES: u64 = 64 << 10;
/// The host's ports of clients' connections begin here: above those that people listen on.
const FIRST_PORT: u32 = 1 << 30;
const LAST_PORT: u32 = (1 << 31) - 1;

const LISTENER: u64 = 0;
/// Part of a first line stays in the socket: it is looked at again when more comes.
const CLIENT_EVENTS: EventFlags = EventFlags::IN.union(EventFlags::ET);

pub(super) struct Mux {
    pub(super) poller: Poller,
    host: Host,
    guest_cid: u64,
    connections: HashMap<u64, Connection>,
    /// The connections that the guest knows of.
    by_ports: HashMap<Ports, u64>,
    /// Clients that have not said where they want to go.
    clients: HashMap<u64, UnixStream>,
    /// Connections that have something for the guest, or may have.
    ready: VecDeque<u64>,
    /// Connections that the guest is to be told are no more, or never were.
    refusals: VecDeque<Ports>,
    next_token: u64,
    next_port: u32,
}

/// Any: the guest of a restored machine may not have closed its side yet of connections from before the snapshot, and
/// must not take a new one for one of those.
fn first_port() -> u32 {
    let mut bytes = [0; 4];
    // Without random numbers it is the first one.
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::NONBLOCK);
    FIRST_PORT | u32::from_le_bytes(bytes) & LAST_PORT
}

impl Mux {
    pub(super) fn new(guest_cid: u32, directory: &Path) -> io::Result<Self> {
        let poller = Poller::new()?;
        let host = Host::new(directory)?;
        poller.add(host.listener(), LISTENER, EventFlags::IN)?;
        Ok(Self {
            poller,
            host,
            guest_cid: guest_cid.into(),
            connections: HashMap::new(),
            by_ports: HashMap::new(),
            clients: HashMap::new(),
            ready: VecDeque::new(),
            refusals: VecDeque::new(),
            next_token: LISTENER + 1,
            next_port: first_port(),
        })
    }

    /// Whether the guest has connections that are not in a snapshot.
    pub(super) fn is_idle(&self) -> bool {
        self.by_ports.is_empty() && self.refusals.is_empty()
    }

    /// Drops all connections: the guest does not know of them any more.
    pub(super) fn clear(&mut self) {
        self.connections.clear();
        self.by_ports.clear();
        self.ready.clear();
        self.refusals.clear();
    }

    /// Whether packets of the guest can be taken: each may need a refusal.
    pub(super) fn accepts_packets(&self) -> bool {
        self.refusals.len() < MAX_REFUSALS
    }

    /// Takes what happened on the host.
    pub(super) fn host_events(&mut self) {
        for (token, events) in self.poller.take() {
            if token == LISTENER {
                self.accept();
            } else if self.clients.contains_key(&token) {
                self.greet(token);
            } else if let Some(connection) = self.connections.get_mut(&token) {
                let fate = connection.host_event(events);
                self.settle(token, fate);
            }
        }
    }

    fn accept(&mut self) {
        // The event comes again if more wait than fit in a turn.
        for _ in 0..PACKET_BUDGET {
            let Some(client) = self.host.accept() else {
                return;
            };
            if self.clients.len() + self.connections.len() >= MAX_CONNECTIONS {
                continue;
            }
            let token = self.new_token();
            if (self.poller).add(&client, token, CLIENT_EVENTS).is_ok() {
                self.clients.insert(token, client);
                // It has said where to before it was accepted, as a rule.
                self.greet(token);
            }
        }
    }

    fn greet(&mut self, token: u64) {
        let Some(client) = self.clients.get(&token) else {
            return;
        };
        let guest = match greeting(client) {
            Greeting::Incomplete => return,
            Greeting::Wrong => {
                self.clients.remove(&token);
                return;
            }
            Greeting::Connect(port) => port,
        };
        let Some(client) = self.clients.remove(&token) else {
            return;
        };
        let ports = Ports { host: self.free_port(guest), guest };
        let mut connection = Connection::from_host(ports, client);
        connection.armed = Some(CLIENT_EVENTS);
        self.insert(token, connection);
    }

    /// A port of the host that has no connection with `guest`. There are far more than connections.
    fn free_port(&mut self, guest: u32) -> u32 {
        loop {
            let host = self.next_port;
            self.next_port = if host == LAST_PORT { FIRST_PORT } else { host + 1 };
            if !self.by_ports.contains_key(&Ports { host, guest }) {
                return host;
            }
        }
    }

    fn new_token(&mut self) -> u64 {
        let token = self.next_token;
        self.next_token += 1;
        token
    }

    fn insert(&mut self, token: u64, connection: Connection) {
        self.by_ports.insert(connection.ports, token);
        self.connections.insert(token, connection);
        self.settle(token, Fate::Alive);
    }

    /// Takes the packet of the guest whose header was read; `data` is what follows it.
    pub(super) fn guest_packet(
        &mut self,
        memory: &GuestMemoryMmap,
        header: &Header,
        mut data: Buffers,
    ) -> Result<(), QueueError> {
        if header.src_cid != self.guest_cid {
            return Ok(());
        }
        let ports = Ports { host: header.dst_port, guest: header.src_port };
        let data = data.split_front(header.len.into())?;
        let known = header.dst_cid == HOST_CID && header.kind == TYPE_STREAM;
        let token = self.by_ports.get(&ports).copied().filter(|_| known);
        let Some((token, connection)) = token.and_then(|token| Some((token, self.connections.get_mut(&token)?))) else {
            match header.op {
                OP_RST => {}
                OP_REQUEST if known => self.guest_connects(ports, header),
                _ => self.refusals.push_back(ports),
            }
            return Ok(());
        };
        connection.update_credit(header);
        let fate = match header.op {
            OP_RESPONSE => connection.accepted(),
            OP_RW => connection.receive(memory, data)?,
            OP_SHUTDOWN => {
                let fate = connection.guest_shutdown(header.flags);
                if connection.phase == Phase::Detached {
                    self.by_ports.remove(&ports);
                    self.refusals.push_back(ports);
                }
                fate
            }
            OP_RST => {
                self.by_ports.remove(&ports);
                connection.guest_reset()
            }
            OP_CREDIT_UPDATE => Fate::Alive,
            OP_CREDIT_REQUEST => {
                connection.credit_requested();
                Fate::Alive
            }
            // A request for what is there, or an operation that is none.
            _ => Fate::Reset,
        };
        self.settle(token, fate);
        Ok(())
    }

    fn guest_connects(&mut self, ports: Ports, request: &Header) {
        let full = self.clients.len() + self.connections.len() >= MAX_CONNECTIONS;
        let stream = if full { Err(io::ErrorKind::QuotaExceeded.into()) } else { self.host.connect(ports.host) };
        match stream {
            Ok(stream) => {
                let token = self.new_token();
                self.insert(token, Connection::from_guest(ports, stream, request));
            }
            Err(_) => self.refusals.push_back(ports),
        }
    }

    /// Does what follows from an event of a connection.
    fn settle(&mut self, token: u64, fate: Fate) {
        let Some(connection) = self.connections.get_mut(&token) else {
            return;
        };
        if fate == Fate::Alive {
            if !connection.queued && connection.wants_service() {
                connection.queued = true;
                self.ready.push_back(token);
            } else if arm(&self.poller, token, connection).is_err() {
                self.settle(token, Fate::Reset);
            }
            return;
        }
        if let Some(mut connection) = self.connections.remove(&token) {
            connection.drain();
            if connection.queued {
                self.ready.retain(|ready| *ready != token);
            }
            let known = self.by_ports.remove(&connection.ports).is_some();
            if fate == Fate::Reset && known {
                self.refusals.push_back(connection.ports);
            }
        }
    }

    /// Sends the guest what there is for it, as far as it has buffers and the budget goes.
    pub(super) fn send_to_guest(&mut self, memory: &GuestMemoryMmap, queue: &mut Virtqueue) -> Result<(), QueueError> {
        let mut budget = PACKET_BUDGET;
        loop {
            let starved = self.send_some(memory, queue, &mut budget)?;
            if !starved {
                break;
            }
            // Wait for buffers; unless they came just now.
            if !queue.enable_notification(memory)? {
                break;
            }
        }
        // Those that wait are known: their events would only repeat it.
        for token in self.ready.clone() {
            if let Some(connection) = self.connections.get_mut(&token) {
                let _ = arm(&self.poller, token, connection);
            }
        }
        Ok(())
    }

    /// True if it stopped for want of the guest's buffers.
    fn send_some(
        &mut self,
        memory: &GuestMemoryMmap,
        queue: &mut Virtqueue,
        budget: &mut usize,
    ) -> Result<bool, QueueError> {
        if self.send_refusals(memory, queue, budget)? {
            return Ok(true);
        }
        for _ in 0..self.ready.len() {
            let Some(token) = self.ready.pop_front() else {
                break;
            };
            match self.serve(token, memory, queue, budget)? {
                Served::Starved => {
                    self.ready.push_front(token);
                    return Ok(true);
                }
                Served::More => self.ready.push_back(token),
                Served::Done(fate) => {
                    if let Some(connection) = self.connections.get_mut(&token) {
                        connection.queued = false;
                    }
                    self.settle(token, fate);
                }
            }
        }
        // Of connections that just ended.
        if self.send_refusals(memory, queue, budget)? {
            return Ok(true);
        }
        if !self.ready.is_empty() || !self.refusals.is_empty() {
            self.poller.wake();
        }
        Ok(false)
    }

    /// True if it stopped for want of the guest's buffers.
    fn send_refusals(
        &mut self,
        memory: &GuestMemoryMmap,
        queue: &mut Virtqueue,
        budget: &mut usize,
    ) -> Result<bool, QueueError> {
        while *budget > 0
            && let Some(ports) = self.refusals.front().copied()
        {
            let Some(chain) = queue.pop(memory)? else {
                return Ok(true);
            };
            let header = new_header(self.guest_cid, ports, OP_RST);
            chain.writable.write(memory, &header.to_bytes())?;
            queue.push(memory, chain.head, HEADER_BYTES as u32)?;
            self.refusals.pop_front();
            *budget -= 1;
        }
        Ok(false)
    }

    /// Sends some of what one connection has.
    fn serve(
        &mut self,
        token: u64,
        memory: &GuestMemoryMmap,
        queue: &mut Virtqueue,
        budget: &mut usize,
    ) -> Result<Served, QueueError> {
        let guest_cid = self.guest_cid;
        let Some(connection) = self.connections.get_mut(&token) else {
            return Ok(Served::Done(Fate::Gone));
        };
        for _ in 0..CONNECTION_BUDGET {
            let control = connection.next_control();
            if control.is_none() && !connection.wants_read() {
                return Ok(Served::Done(Fate::Alive));
            }
            if *budget == 0 {
                return Ok(Served::More);
            }
            let Some(mut chain) = queue.pop(memory)? else {
                return Ok(Served::Starved);
            };
            let room = chain.writable.len_bytes();
            let place = chain.writable.split_front(HEADER_BYTES as u64)?;
            let mut header = new_header(guest_cid, connection.ports, 0);
            if let Some((op, flags)) = control {
                header.op = op;
                header.flags = flags;
            } else {
                let len = (room - HEADER_BYTES as u64).min(connection.credit().into()).min(MAX_DATA_BYTES);
                let data = chain.writable.split_front(len)?;
                if data.is_empty() {
                    // A buffer that takes no data breaks the rules (virtio 1.2 §5.10.6.4).
                    return Err(QueueError::Short { len: room, wanted: HEADER_BYTES as u64 + 1 });
                }
                match connection.read(memory, &data) {
                    Read::Data(len) => {
                        header.op = OP_RW;
                        header.len = len;
                    }
                    Read::Nothing => {
                        queue.undo_pop();
                        continue;
                    }
                    Read::Over => {
                        queue.undo_pop();
                        return Ok(Served::Done(Fate::Reset));
                    }
                }
            }
            connection.stamp(&mut header);
            place.write(memory, &header.to_bytes())?;
            queue.push(memory, chain.head, HEADER_BYTES as u32 + header.len)?;
            *budget -= 1;
        }
        Ok(Served::More)
    }
}

/// The header of a packet to the guest.
fn new_header(guest_cid: u64, ports: Ports, op: u16) -> Header {
    Header {
        src_cid: HOST_CID,
        dst_cid: guest_cid,
        src_port: ports.host,
        dst_port: ports.guest,
        kind: TYPE_STREAM,
        op,
        ..Header::default()
    }
}

/// What came of [`Mux::serve`].
enum Served {
    /// The guest has no buffer for the next packet.
    Starved,
    /// There may be more.
    More,
    /// That was all, for now or for ever.
    Done(Fate),
}

/// Registers a connection for what it waits for, if that changed.
fn arm(poller: &Poller, token: u64, connection: &mut Connection) -> io::Result<()> {
    let wanted = connection.interest();
    match (connection.armed, wanted) {
        (before, now) if before == now => {}
        (None, Some(events)) => poller.add(&connection.stream, token, events)?,
        (Some(_), Some(events)) => poller.modify(&connection.stream, token, events)?,
        (_, None) => poller.remove(&connection.stream),
    }
    connection.armed = wanted;
    Ok(())
}
