//! Networks of our own, for people without an engine: a bridge on the host, a subnet, and a tap for each guest.
//!
//! Guests reach each other over the bridge, and the world through the host (masquerading, by `nft`). Published ports are forwarded by the
//! supervisor ([`super::ports`]).
use super::{MAX_INTERFACES, Netlink, NetworkError};
use crate::state::{self, StateError};
use caisson_agent_protocol::{Interface, Network, Route};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read, Write},
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// The network that containers are in when nobody says otherwise.
pub const DEFAULT: &str = "default";
/// Names are so long that "csn-NAME" is an interface's name (IFNAMSIZ).
const MAX_NAME_BYTES: usize = 11;
/// The first of the subnets that are given out, each of 256 addresses.
const FIRST_SUBNET: Ipv4Addr = Ipv4Addr::new(10, 90, 0, 0);
/// The prefix of every subnet.
const PREFIX: u8 = 24;
/// The bridge is .1, guests are .2 to .254.
const LAST_HOST: u8 = 254;

/// Why something could not be done to a network.
#[derive(Debug, thiserror::Error)]
pub enum NetworksError {
    /// A name that cannot be one.
    #[error(
        "{0:?} is no network name: it begins with a letter, and goes on with letters, digits and '-', up to {MAX_NAME_BYTES}"
    )]
    Name(String),
    /// There is none of this name.
    #[error("there is no network {0}; `caisson network ls` lists them, `caisson network create {0}` makes it")]
    NotFound(String),
    /// There is one of this name.
    #[error("there is a network {0} already")]
    Exists(String),
    /// Containers are in it.
    #[error("network {name} is in use by {containers}; remove them first")]
    InUse {
        /// Which network.
        name: String,
        /// Whose.
        containers: String,
    },
    /// All subnets or addresses are given out.
    #[error("network {0} has no address left")]
    Full(String),
    /// A file could not be handled.
    #[error("cannot {what} {path}")]
    File {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The lock or the descriptions could not be handled.
    #[error(transparent)]
    State(#[from] StateError),
    /// The kernel refuses.
    #[error(transparent)]
    Kernel(#[from] NetworkError),
    /// nft refuses, or is not there.
    #[error(
        "cannot set up address translation for network {name}: {reason} (nft comes with Debian's package nftables)"
    )]
    Firewall {
        /// Which network.
        name: String,
        /// What it says.
        reason: String,
    },
}

fn file(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> NetworksError {
    let path = path.to_owned();
    move |source| NetworksError::File { what, path, source }
}

/// A network and who has which of its addresses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Described {
    /// Its name.
    pub name: String,
    /// The subnet's first address; it has 256.
    pub subnet: Ipv4Addr,
    /// Addresses by container.
    pub containers: BTreeMap<String, Ipv4Addr>,
}

impl Described {
    /// The host's bridge.
    pub fn bridge(&self) -> String {
        format!("csn-{}", self.name)
    }

    fn host(&self, number: u8) -> Ipv4Addr {
        let [a, b, c, _] = self.subnet.octets();
        Ipv4Addr::new(a, b, c, number)
    }

    /// The bridge's address: the guests' gateway.
    pub fn gateway(&self) -> Ipv4Addr {
        self.host(1)
    }
}

/// A container's place in a network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The tap that the monitor is to make.
    pub tap: String,
    /// The bridge that it belongs to.
    pub bridge: String,
    /// The guest's address.
    pub address: Ipv4Addr,
    /// For the agent.
    pub network: Network,
}

impl Place {
    /// Makes the tap, which the monitor has made by now, a port of the bridge.
    pub fn connect(&self) -> Result<(), NetworkError> {
        let mut netlink = Netlink::open()?;
        let (tap, bridge) = (netlink.index(&self.tap)?, netlink.index(&self.bridge)?);
        netlink.set_master(tap, bridge)?;
        netlink.set_up(tap)
    }
}

/// The networks of a store.
#[derive(Debug, Clone)]
pub struct Networks {
    directory: PathBuf,
}

impl Networks {
    /// Opens the networks in `directory`, which is made as it comes to be needed.
    pub fn open(directory: impl Into<PathBuf>) -> Self {
        Self { directory: directory.into() }
    }

    fn check(name: &str) -> Result<(), NetworksError> {
        let mut bytes = name.bytes();
        let first = bytes.next().is_some_and(|byte| byte.is_ascii_alphabetic());
        let ok =
            first && bytes.all(|byte| byte.is_ascii_alphanumeric() || byte == b'-') && name.len() <= MAX_NAME_BYTES;
        if ok { Ok(()) } else { Err(NetworksError::Name(name.to_owned())) }
    }

    /// All descriptions are one file, so that one lock orders everything.
    fn with<T>(
        &self,
        change: impl FnOnce(&mut Vec<Described>) -> Result<T, NetworksError>,
    ) -> Result<T, NetworksError> {
        fs::create_dir_all(&self.directory).map_err(file("make the directory", &self.directory))?;
        let path = self.directory.join("networks.json");
        let _lock = state::lock_file(&self.directory.join("lock"))?;
        let mut all: Vec<Described> = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            other => {
                let mut text = Vec::new();
                other.and_then(|mut opened| opened.read_to_end(&mut text)).map_err(file("read", &path))?;
                serde_json::from_slice(&text).map_err(|error| file("read", &path)(error.into()))?
            }
        };
        let before = all.clone();
        let result = change(&mut all)?;
        if all != before {
            state::write(&path, &all)?;
        }
        Ok(result)
    }

    /// All networks.
    pub fn list(&self) -> Result<Vec<Described>, NetworksError> {
        self.with(|all| Ok(all.clone()))
    }

    /// One network.
    pub fn inspect(&self, name: &str) -> Result<Described, NetworksError> {
        self.with(|all| {
            all.iter().find(|one| one.name == name).cloned().ok_or_else(|| NetworksError::NotFound(name.to_owned()))
        })
    }

    /// Makes a network. Its bridge is made when the first container joins.
    pub fn create(&self, name: &str) -> Result<Described, NetworksError> {
        Self::check(name)?;
        self.with(|all| create(all, name))
    }

    /// Removes a network that nobody is in, and its bridge.
    pub fn remove(&self, name: &str) -> Result<(), NetworksError> {
        self.with(|all| {
            let at =
                all.iter().position(|one| one.name == name).ok_or_else(|| NetworksError::NotFound(name.to_owned()))?;
            if !all[at].containers.is_empty() {
                let containers = all[at].containers.keys().cloned().collect::<Vec<_>>().join(", ");
                return Err(NetworksError::InUse { name: name.to_owned(), containers });
            }
            let removed = all.remove(at);
            if let Ok(mut netlink) = Netlink::open()
                && let Ok(index) = netlink.index(&removed.bridge())
            {
                netlink.delete(index)?;
                nft(name, &format!("delete table ip {}\n", removed.bridge()))?;
            }
            Ok(())
        })
    }

    /// Gives a container an address in a network, and sets up the bridge if it is not there. The default network is made if need be.
    pub fn join(&self, name: &str, container: &str, mac: [u8; 6]) -> Result<Place, NetworksError> {
        let (described, address) = self.with(|all| {
            if name == DEFAULT && !all.iter().any(|one| one.name == name) {
                create(all, name)?;
            }
            let one =
                all.iter_mut().find(|one| one.name == name).ok_or_else(|| NetworksError::NotFound(name.to_owned()))?;
            let taken: Vec<Ipv4Addr> =
                one.containers.iter().filter(|(id, _)| *id != container).map(|(_, address)| *address).collect();
            let free = (2..=LAST_HOST).map(|number| one.host(number)).find(|address| !taken.contains(address));
            let address = free.ok_or_else(|| NetworksError::Full(name.to_owned()))?;
            one.containers.insert(container.to_owned(), address);
            set_up(one)?;
            Ok((one.clone(), address))
        })?;
        let [.., third, fourth] = address.octets();
        let interface =
            Interface { mac, name: "eth0".into(), mtu: 1500, addresses: vec![(address.octets().to_vec(), PREFIX)] };
        let gateway = described.gateway().octets().to_vec();
        let route =
            Route { destination: (Vec::new(), 0), gateway: Some(gateway), interface: "eth0".into(), metric: None };
        const { assert!(MAX_INTERFACES >= 1) };
        Ok(Place {
            tap: format!("cst-{third}-{fourth}"),
            bridge: described.bridge(),
            address,
            network: Network { interfaces: vec![interface], routes: vec![route] },
        })
    }

    /// Takes the container's addresses back.
    pub fn leave(&self, container: &str) -> Result<(), NetworksError> {
        self.with(|all| {
            for one in all {
                one.containers.remove(container);
            }
            Ok(())
        })
    }
}

fn create(all: &mut Vec<Described>, name: &str) -> Result<Described, NetworksError> {
    if all.iter().any(|one| one.name == name) {
        return Err(NetworksError::Exists(name.to_owned()));
    }
    let [a, b, _, d] = FIRST_SUBNET.octets();
    let subnets = (0..=u8::MAX).map(|third| Ipv4Addr::new(a, b, third, d));
    let subnet = subnets.into_iter().find(|subnet| all.iter().all(|one| one.subnet != *subnet));
    let subnet = subnet.ok_or_else(|| NetworksError::Full(name.to_owned()))?;
    let described = Described { name: name.to_owned(), subnet, containers: BTreeMap::new() };
    all.push(described.clone());
    Ok(described)
}

/// The bridge, its address, forwarding and translation; what is there already stays.
fn set_up(of: &Described) -> Result<(), NetworksError> {
    let bridge = of.bridge();
    let mut netlink = Netlink::open()?;
    if netlink.index(&bridge).is_ok() {
        return Ok(());
    }
    netlink.add_bridge(&bridge)?;
    let index = netlink.index(&bridge)?;
    netlink.add_address(index, of.gateway(), PREFIX)?;
    netlink.set_up(index)?;
    let forwarding = Path::new("/proc/sys/net/ipv4/ip_forward");
    fs::write(forwarding, "1").map_err(file("write to", forwarding))?;
    let subnet = format!("{}/{PREFIX}", of.subnet);
    let rules = format!(
        "table ip {bridge} {{}}\ndelete table ip {bridge}\ntable ip {bridge} {{\n\
         chain postrouting {{ type nat hook postrouting priority srcnat; ip saddr {subnet} oifname != \"{bridge}\" masquerade; }}\n}}\n"
    );
    let made = nft(&of.name, &rules);
    if made.is_err() {
        // A bridge without its rules would be taken for a whole one the next time.
        netlink.delete(index)?;
    }
    made
}

fn nft(name: &str, rules: &str) -> Result<(), NetworksError> {
    let failed = |reason: String| NetworksError::Firewall { name: name.to_owned(), reason };
    let spawned = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = spawned.map_err(|error| failed(format!("nft: {error}")))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(rules.as_bytes()).map_err(|error| failed(error.to_string()))?;
    }
    let output = child.wait_with_output().map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        Ok(())
    } else {
        Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
    }
}
