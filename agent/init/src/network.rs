//! The sandbox's network interfaces, by rtnetlink(7).
use crate::error::{Context, Result, error};
use alloc::{format, string::String, vec, vec::Vec};
use caisson_agent_protocol::{ErrorKind, Interface, Network, Route};
use rustix::{
    fd::OwnedFd,
    io::Errno,
    net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with},
};

// From linux/netlink.h and linux/rtnetlink.h.
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;
const F_REQUEST: u16 = 1;
const F_ACK: u16 = 4;
const F_DUMP: u16 = 0x300;
const F_REPLACE: u16 = 0x100;
const F_CREATE: u16 = 0x400;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFF_UP: u32 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
/// Without it an IPv6 address could not be used for a second or more, while it is looked for on the link.
const IFA_F_NODAD: u8 = 2;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const TABLE_MAIN: u8 = 254;
const PROTOCOL_STATIC: u8 = 4;
const SCOPE_UNIVERSE: u8 = 0;
const SCOPE_LINK: u8 = 253;
const TYPE_UNICAST: u8 = 1;

/// Bytes of a message's header, of `struct ifinfomsg`, and of an attribute's header.
const HEADER: usize = 16;
const LINK_HEADER: usize = 16;
const ATTRIBUTE_HEADER: usize = 4;
/// What the kernel sends at a time at most.
const RECEIVE_BYTES: usize = 32 * 1024;

/// Names, addresses and brings up interfaces, then sets routes.
pub(crate) fn configure(network: &Network) -> Result<()> {
    let socket = Socket::open()?;
    let links = socket.links()?;
    for interface in &network.interfaces {
        socket.configure(interface, &links)?;
    }
    if network.routes.is_empty() {
        return Ok(());
    }
    // Names may have changed.
    let links = socket.links()?;
    network.routes.iter().try_for_each(|route| socket.add_route(route, &links))
}

/// An interface as the kernel lists it.
#[derive(Debug, PartialEq, Eq)]
struct Link {
    index: u32,
    mac: Vec<u8>,
    name: String,
}

/// A message that is being put together.
struct Message(Vec<u8>);

impl Message {
    /// A request with the family's own header.
    fn new(kind: u16, flags: u16, header: &[u8]) -> Self {
        let mut bytes = vec![0; 4];
        bytes.extend(kind.to_ne_bytes());
        bytes.extend((flags | F_REQUEST).to_ne_bytes());
        // Sequence number and port: one request at a time on a socket of its own needs neither.
        bytes.extend([0; 8]);
        bytes.extend(header);
        Self(bytes)
    }

    fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        let length = u16::try_from(value.len() + ATTRIBUTE_HEADER).unwrap_or(u16::MAX);
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    fn finish(mut self) -> Vec<u8> {
        let length = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        self.0[..4].copy_from_slice(&length.to_ne_bytes());
        self.0
    }
}

/// Splits what the kernel sent into messages: type and content.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    core::iter::from_fn(move || {
        let length = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
        let kind = u16::from_ne_bytes([*bytes.get(4)?, *bytes.get(5)?]);
        let content = bytes.get(HEADER..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, content))
    })
}

fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    core::iter::from_fn(move || {
        let [l0, l1, k0, k1] = *bytes.first_chunk::<ATTRIBUTE_HEADER>()?;
        let length = usize::from(u16::from_ne_bytes([l0, l1]));
        let value = bytes.get(ATTRIBUTE_HEADER..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes([k0, k1]), value))
    })
}

fn parse_link(content: &[u8]) -> Option<Link> {
    let index = u32::from_ne_bytes(*content.get(4..8)?.first_chunk()?);
    let mut link = Link { index, mac: Vec::new(), name: String::new() };
    for (kind, value) in attributes(content.get(LINK_HEADER..)?) {
        match kind {
            IFLA_ADDRESS => link.mac = value.to_vec(),
            IFLA_IFNAME => link.name = String::from_utf8_lossy(value).trim_end_matches('\0').into(),
            _ => {}
        }
    }
    Some(link)
}

/// The family of an address by its length.
fn family(address: &[u8]) -> Result<u8> {
    match address.len() {
        4 => Ok(2),
        16 => Ok(10),
        bytes => Err(error(ErrorKind::Invalid, format!("an address of {bytes} bytes is neither IPv4 nor IPv6"))),
    }
}

/// The address to which all of an IPv4 network listen, if it has one.
fn broadcast(address: &[u8], prefix: u8) -> Option<[u8; 4]> {
    let address = u32::from_be_bytes(address.try_into().ok()?);
    let hosts = u32::MAX.checked_shr(prefix.into()).filter(|hosts| *hosts > 1)?;
    Some((address | hosts).to_be_bytes())
}

/// A connection with the kernel.
struct Socket(OwnedFd);

impl Socket {
    fn open() -> Result<Self> {
        socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)
            .map(Self)
            .context(|| String::from("opening a netlink socket"))
    }

    /// Sends a request and gives the content of the answers of a type, up to the last.
    fn request(&self, message: Message, wanted: u16) -> rustix::io::Result<Vec<Vec<u8>>> {
        send(&self.0, &message.finish(), SendFlags::empty())?;
        let mut found = Vec::new();
        let mut buffer = vec![0; RECEIVE_BYTES];
        loop {
            let (count, _) = recv(&self.0, &mut *buffer, RecvFlags::empty())?;
            for (kind, content) in messages(&buffer[..count]) {
                match kind {
                    NLMSG_DONE => return Ok(found),
                    NLMSG_ERROR => {
                        let code = content.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
                        return if code == 0 {
                            Ok(found)
                        } else {
                            Err(Errno::from_raw_os_error(code.saturating_neg()))
                        };
                    }
                    kind if kind == wanted => found.push(content.to_vec()),
                    _ => {}
                }
            }
        }
    }

    fn links(&self) -> Result<Vec<Link>> {
        let message = Message::new(RTM_GETLINK, F_DUMP, &[0; LINK_HEADER]);
        let answers = self.request(message, RTM_NEWLINK).context(|| String::from("listing the interfaces"))?;
        Ok(answers.iter().filter_map(|answer| parse_link(answer)).collect())
    }

    fn configure(&self, interface: &Interface, links: &[Link]) -> Result<()> {
        let Interface { mac, name, mtu, addresses } = interface;
        let link = links.iter().find(|link| link.mac == mac);
        let link = link.ok_or_else(|| error(ErrorKind::NotFound, format!("no interface has the MAC {mac:02x?}")))?;
        let mut header = [0; LINK_HEADER];
        header[4..8].copy_from_slice(&link.index.to_ne_bytes());
        header[8..12].copy_from_slice(&IFF_UP.to_ne_bytes());
        header[12..].copy_from_slice(&IFF_UP.to_ne_bytes());
        let mut message = Message::new(RTM_NEWLINK, F_ACK, &header);
        if link.name != *name {
            message = message.attribute(IFLA_IFNAME, &[name.as_bytes(), &[0]].concat());
        }
        if *mtu != 0 {
            message = message.attribute(IFLA_MTU, &mtu.to_ne_bytes());
        }
        self.request(message, 0).context(|| format!("bringing up {name} (MTU {mtu})"))?;
        for (address, prefix) in addresses {
            let flags = if address.len() == 16 { IFA_F_NODAD } else { 0 };
            let mut header = vec![family(address)?, *prefix, flags, SCOPE_UNIVERSE];
            header.extend(link.index.to_ne_bytes());
            let mut message = Message::new(RTM_NEWADDR, F_ACK | F_CREATE | F_REPLACE, &header)
                .attribute(IFA_LOCAL, address)
                .attribute(IFA_ADDRESS, address);
            if let Some(broadcast) = broadcast(address, *prefix) {
                message = message.attribute(IFA_BROADCAST, &broadcast);
            }
            self.request(message, 0).context(|| format!("giving {name} the address {address:?}/{prefix}"))?;
        }
        Ok(())
    }

    fn add_route(&self, route: &Route, links: &[Link]) -> Result<()> {
        let Route { destination: (destination, prefix), gateway, interface, metric } = route;
        let link = links.iter().find(|link| link.name == *interface);
        let link = link.ok_or_else(|| error(ErrorKind::NotFound, format!("there is no interface {interface}")))?;
        let family = match (destination.as_slice(), gateway) {
            ([], Some(gateway)) => family(gateway)?,
            ([], None) => family(&[0; 4])?,
            (destination, _) => family(destination)?,
        };
        let scope = if gateway.is_some() { SCOPE_UNIVERSE } else { SCOPE_LINK };
        let header = [family, *prefix, 0, 0, TABLE_MAIN, PROTOCOL_STATIC, scope, TYPE_UNICAST, 0, 0, 0, 0];
        let mut message =
            Message::new(RTM_NEWROUTE, F_ACK | F_CREATE, &header).attribute(RTA_OIF, &link.index.to_ne_bytes());
        if !destination.is_empty() {
            message = message.attribute(RTA_DST, destination);
        }
        if let Some(gateway) = gateway {
            message = message.attribute(RTA_GATEWAY, gateway);
        }
        if let Some(metric) = metric {
            message = message.attribute(RTA_PRIORITY, &metric.to_ne_bytes());
        }
        self.request(message, 0)
            .context(|| format!("adding the route to {destination:?}/{prefix} by {gateway:?} on {interface}"))
            .map(drop)
    }
}

#[cfg(test)]
mod tests;
