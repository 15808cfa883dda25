//! The few rtnetlink(7) requests that are needed.
use super::NetworkError;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressMessage, AddressScope},
    link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage},
    route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteType},
    tc::{
        TcAction, TcActionAttribute, TcActionGeneric, TcActionMirrorOption, TcActionOption, TcActionType, TcAttribute,
        TcFilterU32Option, TcHandle, TcMessage, TcMirror, TcMirrorActionType, TcOption, TcU32Key, TcU32Selector,
        TcU32SelectorFlags,
    },
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use std::{
    io,
    net::{IpAddr, Ipv4Addr},
};

/// A dump's datagrams are at most this long (the kernel's NLMSG_GOODSIZE limit is 32 KiB).
const RECEIVE_BYTES: usize = 64 * 1024;
/// ETH_P_ALL, as tc's header wants it: in network byte order.
const ALL_PROTOCOLS: u32 = (0x0003_u16).to_be() as u32;
/// The priority of our filter.
const PRIORITY: u32 = 1 << 16;

/// An Ethernet interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) mac: [u8; 6],
    pub(crate) mtu: u32,
}

/// A route of the main table that somebody made (the kernel's own follow from the addresses).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) index: u32,
    pub(crate) destination: (Vec<u8>, u8),
    pub(crate) gateway: Option<Vec<u8>>,
    pub(crate) metric: Option<u32>,
}

/// A socket in the network namespace that its thread was in.
pub(crate) struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    pub(crate) fn open() -> Result<Self, NetworkError> {
        let open = || {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            Ok(socket)
        };
        let socket = open().map_err(|source| NetworkError::Netlink { what: "open a netlink socket".into(), source })?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Sends one request and reads to the end of its answer.
    fn request(
        &mut self,
        what: &str,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<Vec<RouteNetlinkMessage>, NetworkError> {
        let failed = |source| NetworkError::Netlink { what: what.to_owned(), source };
        self.sequence += 1;
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut request = NetlinkMessage::new(header, NetlinkPayload::from(message));
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0).map_err(failed)?;
        let mut answers = Vec::new();
        loop {
            let mut buffer = Vec::with_capacity(RECEIVE_BYTES);
            self.socket.recv(&mut buffer, 0).map_err(failed)?;
            let mut rest = &buffer[..];
            while !rest.is_empty() {
                let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                    .map_err(|error| NetworkError::Answer { what: what.to_owned(), reason: error.to_string() })?;
                // Messages are aligned to four bytes.
                let length = (answer.header.length as usize).next_multiple_of(4).clamp(4, rest.len());
                rest = &rest[length..];
                if answer.header.sequence_number != self.sequence {
                    continue;
                }
                match answer.payload {
                    NetlinkPayload::Done(_) => return Ok(answers),
                    NetlinkPayload::Error(error) if error.code.is_none() => return Ok(answers),
                    NetlinkPayload::Error(error) => return Err(failed(error.to_io())),
                    NetlinkPayload::InnerMessage(message) => answers.push(message),
                    _ => {}
                }
            }
        }
    }

    fn change(&mut self, what: &str, message: RouteNetlinkMessage, flags: u16) -> Result<(), NetworkError> {
        self.request(what, message, NLM_F_ACK | flags).map(drop)
    }

    /// The Ethernet interfaces that are up, taps of ours aside.
    pub(crate) fn links(&mut self) -> Result<Vec<Link>, NetworkError> {
        let answers =
            self.request("list interfaces", RouteNetlinkMessage::GetLink(LinkMessage::default()), NLM_F_DUMP)?;
        let mut links = Vec::new();
        for answer in answers {
            let RouteNetlinkMessage::NewLink(link) = answer else { continue };
            if link.header.link_layer_type != LinkLayerType::Ether || !link.header.flags.contains(LinkFlags::Up) {
                continue;
            }
            let mut found = Link { index: link.header.index, name: String::new(), mac: [0; 6], mtu: 1500 };
            for attribute in link.attributes {
                match attribute {
                    LinkAttribute::IfName(name) => found.name = name,
                    LinkAttribute::Mtu(mtu) => found.mtu = mtu,
                    LinkAttribute::Address(mac) => found.mac = mac.try_into().unwrap_or_default(),
                    _ => {}
                }
            }
            if !found.name.starts_with("caisson") {
                links.push(found);
            }
        }
        Ok(links)
    }

    /// The addresses of an interface, those of IPv6's link scope aside: the guest makes them from the same MAC.
    pub(crate) fn addresses(&mut self, index: u32) -> Result<Vec<(Vec<u8>, u8)>, NetworkError> {
        let answers =
            self.request("list addresses", RouteNetlinkMessage::GetAddress(AddressMessage::default()), NLM_F_DUMP)?;
        let mut addresses = Vec::new();
        for answer in answers {
            let RouteNetlinkMessage::NewAddress(message) = answer else { continue };
            let link_scope =
                message.header.family == AddressFamily::Inet6 && message.header.scope == AddressScope::Link;
            if message.header.index != index || link_scope {
                continue;
            }
            // On a point-to-point interface Address is the peer's; Local is ours in any case where it is there.
            let of = |local: bool| {
                message.attributes.iter().find_map(|attribute| match attribute {
                    AddressAttribute::Local(address) if local => Some(*address),
                    AddressAttribute::Address(address) if !local => Some(*address),
                    _ => None,
                })
            };
            if let Some(address) = of(true).or(of(false)) {
                addresses.push((octets(address), message.header.prefix_len));
            }
        }
        Ok(addresses)
    }

    /// The routes of the main table that are not the kernel's own.
    pub(crate) fn routes(&mut self) -> Result<Vec<Found>, NetworkError> {
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            for answer in self.request("list routes", RouteNetlinkMessage::GetRoute(message), NLM_F_DUMP)? {
                let RouteNetlinkMessage::NewRoute(route) = answer else { continue };
                let header = &route.header;
                let ours = header.table == RouteHeader::RT_TABLE_MAIN && header.kind == RouteType::Unicast;
                if !ours || header.protocol == RouteProtocol::Kernel {
                    continue;
                }
                routes.extend(found(&route));
            }
        }
        // A gateway must be reachable before a route can use it: direct routes come first.
        routes.sort_by_key(|route| route.gateway.is_some());
        Ok(routes)
    }

    /// The index of the interface of this name.
    pub(crate) fn index(&mut self, name: &str) -> Result<u32, NetworkError> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        let what = format!("find the interface {name}");
        let answers = self.request(&what, RouteNetlinkMessage::GetLink(message), NLM_F_ACK)?;
        let index = answers.iter().find_map(|answer| match answer {
            RouteNetlinkMessage::NewLink(link) => Some(link.header.index),
            _ => None,
        });
        index.ok_or_else(|| NetworkError::Netlink { what, source: io::ErrorKind::NotFound.into() })
    }

    fn set(&mut self, what: &str, mut message: LinkMessage, index: u32) -> Result<(), NetworkError> {
        message.header.index = index;
        self.change(what, RouteNetlinkMessage::SetLink(message), 0)
    }

    pub(crate) fn set_up(&mut self, index: u32) -> Result<(), NetworkError> {
        let mut message = LinkMessage::default();
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        self.set("set an interface up", message, index)
    }

    pub(crate) fn set_mtu(&mut self, index: u32, mtu: u32) -> Result<(), NetworkError> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::Mtu(mtu));
        self.set("set an interface's MTU", message, index)
    }

    pub(crate) fn set_master(&mut self, index: u32, bridge: u32) -> Result<(), NetworkError> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::Controller(bridge));
        self.set("add an interface to a bridge", message, index)
    }

    pub(crate) fn add_bridge(&mut self, name: &str) -> Result<(), NetworkError> {
        let mut message = LinkMessage::default();
        message.attributes = vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge)]),
        ];
        self.change(
            &format!("make the bridge {name}"),
            RouteNetlinkMessage::NewLink(message),
            NLM_F_CREATE | NLM_F_EXCL,
        )
    }

    pub(crate) fn add_address(&mut self, index: u32, address: Ipv4Addr, prefix: u8) -> Result<(), NetworkError> {
        let mut message = AddressMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.prefix_len = prefix;
        message.header.index = index;
        message.attributes = vec![AddressAttribute::Local(address.into()), AddressAttribute::Address(address.into())];
        let what = format!("give an interface the address {address}");
        self.change(&what, RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_EXCL)
    }

    pub(crate) fn delete(&mut self, index: u32) -> Result<(), NetworkError> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        self.change("remove an interface", RouteNetlinkMessage::DelLink(message), 0)
    }

    /// Sends whatever `from` receives out of `to` instead of up the host's stack.
    pub(crate) fn redirect(&mut self, from: u32, to: u32) -> Result<(), NetworkError> {
        let mut queue = traffic_control(from);
        queue.header.parent = TcHandle::INGRESS;
        queue.header.handle = TcHandle { major: 0xffff, minor: 0 };
        queue.attributes.push(TcAttribute::Kind("ingress".into()));
        match self.change(
            "receive for a guest",
            RouteNetlinkMessage::NewQueueDiscipline(queue),
            NLM_F_CREATE | NLM_F_EXCL,
        ) {
            // The bandwidth plug-in may have made one: our filter joins it.
            Err(NetworkError::Netlink { source, .. }) if source.kind() == io::ErrorKind::AlreadyExists => {}
            other => other?,
        }

        let mut parameters = TcMirror::default();
        parameters.generic = TcActionGeneric::default();
        parameters.generic.action = TcActionType::Stolen;
        parameters.eaction = TcMirrorActionType::EgressRedir;
        parameters.ifindex = to;
        let mut action = TcAction::default();
        action.tab = 1;
        action.attributes = vec![
            TcActionAttribute::Kind("mirred".into()),
            TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(parameters))]),
        ];
        // One key that masks everything away: every frame matches.
        let mut selector = TcU32Selector::default();
        selector.flags = TcU32SelectorFlags::Terminal;
        selector.nkeys = 1;
        selector.keys = vec![TcU32Key::default()];
        let mut filter = traffic_control(from);
        filter.header.parent = TcHandle { major: 0xffff, minor: 0 };
        filter.header.info = PRIORITY | ALL_PROTOCOLS;
        filter.attributes = vec![
            TcAttribute::Kind("u32".into()),
            TcAttribute::Options(vec![
                TcOption::U32(TcFilterU32Option::Selector(selector)),
                TcOption::U32(TcFilterU32Option::Action(vec![action])),
            ]),
        ];
        self.change(
            "redirect an interface's frames",
            RouteNetlinkMessage::NewTrafficFilter(filter),
            NLM_F_CREATE | NLM_F_REPLACE,
        )
    }

    /// Undoes [`redirect`](Self::redirect); that there is nothing to undo is no error.
    pub(crate) fn stop_redirecting(&mut self, from: u32) -> Result<(), NetworkError> {
        let mut queue = traffic_control(from);
        queue.header.parent = TcHandle::INGRESS;
        queue.header.handle = TcHandle { major: 0xffff, minor: 0 };
        match self.change("stop redirecting an interface's frames", RouteNetlinkMessage::DelQueueDiscipline(queue), 0) {
            Err(NetworkError::Netlink { source, .. })
                if source.kind() == io::ErrorKind::NotFound
                    || matches!(source.raw_os_error(), Some(libc::ENODEV | libc::EINVAL)) =>
            {
                Ok(())
            }
            other => other,
        }
    }
}

fn traffic_control(index: u32) -> TcMessage {
    // An index is a positive int in the kernel.
    TcMessage::with_index(i32::try_from(index).unwrap_or(0))
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn found(route: &RouteMessage) -> Option<Found> {
    let bytes = |address: &RouteAddress| match address {
        RouteAddress::Inet(address) => Some(address.octets().to_vec()),
        RouteAddress::Inet6(address) => Some(address.octets().to_vec()),
        _ => None,
    };
    let (mut index, mut destination, mut gateway, mut metric) = (None, Vec::new(), None, None);
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(oif) => index = Some(*oif),
            RouteAttribute::Destination(address) => destination = bytes(address)?,
            RouteAttribute::Gateway(address) => gateway = Some(bytes(address)?),
            RouteAttribute::Priority(value) => metric = Some(*value),
            _ => {}
        }
    }
    // A default route has no destination: its family is the gateway's, or told by zeros.
    if destination.is_empty() && gateway.is_none() {
        destination = vec![0; if route.header.address_family == AddressFamily::Inet { 4 } else { 16 }];
    }
    Some(Found { index: index?, destination: (destination, route.header.destination_prefix_length), gateway, metric })
}
