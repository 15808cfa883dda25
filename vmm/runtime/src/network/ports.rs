//! Published ports: the supervisor listens on the host and carries bytes to the guest's address and back.
use std::{
    fmt,
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

/// Connections of one published port that are carried at once; more are refused.
const MAX_CONNECTIONS: usize = 256;
/// How long a guest may take to answer a connection.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
/// The bytes that are carried at once.
const CHUNK_BYTES: usize = 64 * 1024;
/// UDP conversations that are remembered; a new one displaces all of them.
const MAX_PEERS: usize = 256;

/// TCP or UDP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A port of the host that leads to one of a container, as `-p [IP:][HOST:]CONTAINER[/tcp|udp]` has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Published {
    /// Where the host listens.
    pub host_address: IpAddr,
    /// On which port; 0 for any free one.
    pub host_port: u16,
    /// Where it leads.
    pub container_port: u16,
    /// How.
    pub transport: Transport,
}

/// A text that is no published port.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no published port: it is [IP:][HOSTPORT:]PORT[/tcp|/udp], as 8080:80")]
pub struct NotPublished(String);

impl FromStr for Published {
    type Err = NotPublished;

    fn from_str(text: &str) -> Result<Self, NotPublished> {
        let bad = || NotPublished(text.to_owned());
        let (rest, transport) = match text.split_once('/') {
            None | Some((_, "tcp")) => (text.trim_end_matches("/tcp"), Transport::Tcp),
            Some((rest, "udp")) => (rest, Transport::Udp),
            Some(_) => return Err(bad()),
        };
        let port = |text: &str| text.parse::<u16>().map_err(|_| bad());
        let (rest, container_port) = match rest.rsplit_once(':') {
            Some((rest, container)) => (Some(rest), port(container)?),
            None => (None, port(rest)?),
        };
        let (address, host_port) = match rest {
            None => (None, 0),
            Some(rest) => match rest.rsplit_once(':') {
                Some((address, host)) => (Some(address), if host.is_empty() { 0 } else { port(host)? }),
                None => (None, port(rest)?),
            },
        };
        let host_address = match address {
            None | Some("") => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            Some(address) => address.trim_matches(['[', ']']).parse().map_err(|_| bad())?,
        };
        if container_port == 0 {
            return Err(bad());
        }
        Ok(Self { host_address, host_port, container_port, transport })
    }
}

impl fmt::Display for Published {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let transport = match self.transport {
            Transport::Tcp => "tcp",
            Transport::Udp => "udp",
        };
        write!(f, "{}->{}/{transport}", SocketAddr::new(self.host_address, self.host_port), self.container_port)
    }
}

/// Listens on the published port from now on, for as long as the process lives; returns it with the port that was got.
///
/// # Errors
/// If the port cannot be listened on.
pub fn publish(published: Published, guest: IpAddr) -> io::Result<Published> {
    let at = SocketAddr::new(published.host_address, published.host_port);
    let to = SocketAddr::new(guest, published.container_port);
    let host_port = match published.transport {
        Transport::Tcp => {
            let listener = TcpListener::bind(at)?;
            let port = listener.local_addr()?.port();
            thread::Builder::new().name("published".into()).spawn(move || serve_tcp(&listener, to))?;
            port
        }
        Transport::Udp => {
            let socket = UdpSocket::bind(at)?;
            let port = socket.local_addr()?.port();
            thread::Builder::new().name("published".into()).spawn(move || serve_udp(&Arc::new(socket), to))?;
            port
        }
    };
    Ok(Published { host_port, ..published })
}

fn serve_tcp(listener: &TcpListener, to: SocketAddr) {
    let connections = Arc::new(AtomicUsize::new(0));
    loop {
        let Ok((client, _)) = listener.accept() else {
            // Out of descriptors, or the client is gone already: neither is for ever.
            thread::sleep(Duration::from_millis(10));
            continue;
        };
        if connections.fetch_add(1, Ordering::Relaxed) >= MAX_CONNECTIONS {
            connections.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        let of = Arc::clone(&connections);
        let spawned = thread::Builder::new().name("published".into()).spawn(move || {
            // A connection that fails is the client's to see: it ends.
            drop(carry(&client, to));
            of.fetch_sub(1, Ordering::Relaxed);
        });
        if spawned.is_err() {
            connections.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Both directions, each to its end.
fn carry(client: &TcpStream, to: SocketAddr) -> io::Result<()> {
    let guest = TcpStream::connect_timeout(&to, CONNECT_DEADLINE)?;
    thread::scope(|scope| {
        scope.spawn(|| copy(client, &guest));
        copy(&guest, client);
    });
    Ok(())
}

fn copy(mut from: &TcpStream, mut to: &TcpStream) {
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        match from.read(&mut chunk) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(read @ 1..) => {
                if to.write_all(&chunk[..read]).is_err() {
                    // Nobody reads any more: the sender is to know.
                    drop(from.shutdown(Shutdown::Read));
                    break;
                }
            }
            Ok(0) | Err(_) => break,
        }
    }
    drop(to.shutdown(Shutdown::Write));
}

/// Each peer has a socket of its own towards the guest, so that answers find back.
fn serve_udp(socket: &Arc<UdpSocket>, to: SocketAddr) {
    let mut peers: Vec<(SocketAddr, UdpSocket)> = Vec::new();
    let mut datagram = vec![0; CHUNK_BYTES];
    loop {
        let Ok((length, from)) = socket.recv_from(&mut datagram) else {
            thread::sleep(Duration::from_millis(10));
            continue;
        };
        if !peers.iter().any(|(peer, _)| *peer == from) {
            let Ok(towards) = towards_guest(socket, from, to) else { continue };
            if peers.len() >= MAX_PEERS {
                peers.clear();
            }
            peers.push((from, towards));
        }
        if let Some((_, towards)) = peers.iter().find(|(peer, _)| *peer == from) {
            // A datagram may be lost at any time.
            drop(towards.send(&datagram[..length]));
        }
    }
}

/// A conversation ends when the guest has said nothing for so long.
const SILENCE: Duration = Duration::from_secs(60);

fn towards_guest(socket: &Arc<UdpSocket>, peer: SocketAddr, to: SocketAddr) -> io::Result<UdpSocket> {
    let any: IpAddr =
        if to.is_ipv4() { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED) };
    let towards = UdpSocket::bind(SocketAddr::new(any, 0))?;
    towards.connect(to)?;
    towards.set_read_timeout(Some(SILENCE))?;
    let (answers, socket) = (towards.try_clone()?, Arc::clone(socket));
    thread::Builder::new().name("published".into()).spawn(move || {
        let mut datagram = vec![0; CHUNK_BYTES];
        while let Ok(length) = answers.recv(&mut datagram) {
            drop(socket.send_to(&datagram[..length], peer));
        }
    })?;
    Ok(towards)
}

#[cfg(test)]
mod tests {
    use super::{Published, Transport, publish};
    use std::{
        io::{Read, Write},
        net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
        thread,
        time::Duration,
    };

    #[test]
    fn ports_are_written_as_docker_has_them() {
        let any = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        let parse = |text: &str| {
            text.parse::<Published>().map(|p| (p.host_address, p.host_port, p.container_port, p.transport))
        };
        assert_eq!(parse("80").unwrap(), (any, 0, 80, Transport::Tcp));
        assert_eq!(parse("8080:80").unwrap(), (any, 8080, 80, Transport::Tcp));
        assert_eq!(parse("8080:80/tcp").unwrap(), (any, 8080, 80, Transport::Tcp));
        assert_eq!(parse("127.0.0.1:8080:80/udp").unwrap(), (Ipv4Addr::LOCALHOST.into(), 8080, 80, Transport::Udp));
        assert_eq!(parse("127.0.0.1::80").unwrap(), (Ipv4Addr::LOCALHOST.into(), 0, 80, Transport::Tcp));
        assert_eq!(parse("[::1]:8080:80").unwrap().0, "::1".parse::<IpAddr>().unwrap());
        for bad in ["", "x", "80/sctp", "0", "8080:0", "70000", "a:b:c", "1.2.3:1:1"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        assert_eq!("127.0.0.1:8080:80".parse::<Published>().unwrap().to_string(), "127.0.0.1:8080->80/tcp");
    }

    fn published(transport: Transport, container_port: u16) -> Published {
        Published { host_address: Ipv4Addr::LOCALHOST.into(), host_port: 0, container_port, transport }
    }

    #[test]
    fn bytes_go_both_ways_and_each_ends_on_its_own() {
        let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = server.local_addr().unwrap().port();
        let got = publish(published(Transport::Tcp, port), Ipv4Addr::LOCALHOST.into()).unwrap();
        let answering = thread::spawn(move || {
            let (mut connection, _) = server.accept().unwrap();
            let mut all = Vec::new();
            connection.read_to_end(&mut all).unwrap();
            all.reverse();
            connection.write_all(&all).unwrap();
        });
        let mut client = TcpStream::connect(SocketAddr::new(got.host_address, got.host_port)).unwrap();
        let sent: Vec<u8> = (0..300_000_u32).map(|number| (number % 251) as u8).collect();
        client.write_all(&sent).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut back = Vec::new();
        client.read_to_end(&mut back).unwrap();
        back.reverse();
        assert!(back == sent);
        answering.join().unwrap();
    }

    #[test]
    fn datagrams_find_back() {
        let server = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = server.local_addr().unwrap().port();
        let got = publish(published(Transport::Udp, port), Ipv4Addr::LOCALHOST.into()).unwrap();
        thread::spawn(move || {
            let mut datagram = [0; 100];
            while let Ok((length, from)) = server.recv_from(&mut datagram) {
                server.send_to(&datagram[..length], from).unwrap();
            }
        });
        for text in ["one", "two"] {
            let client = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            client.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
            client.connect(SocketAddr::new(got.host_address, got.host_port)).unwrap();
            client.send(text.as_bytes()).unwrap();
            let mut answer = [0; 100];
            let length = client.recv(&mut answer).unwrap();
            assert_eq!(&answer[..length], text.as_bytes());
        }
    }
}
