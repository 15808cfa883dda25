//! Networks on the host's side.
//!
//! An engine hands over a network namespace in which it has configured an interface. The guest gets that interface's identity: its MAC, MTU,
//! addresses and routes are mirrored by the agent, and every frame that reaches the engine's interface is redirected to the machine's
//! tap and back ([`Mirror::connect`]). The interface itself stays where it is and as it is.
//!
//! Everything here is about the network namespace that the calling thread is in; the supervisor enters the container's before it has threads.
mod netlink;
pub mod networks;
pub mod ports;
#[cfg(test)]
mod tests;

pub(crate) use netlink::Netlink;

use caisson_agent_protocol::{Interface, Network, Route};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::{fs::File, os::fd::AsFd, path::Path};

/// More interfaces of one namespace are not mirrored: a machine has so many network devices.
pub const MAX_INTERFACES: usize = 2;

/// Why a network could not be had.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The namespace cannot be entered.
    #[error("cannot enter the network namespace {path}")]
    Enter {
        /// Its file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// The kernel refuses a request.
    #[error("cannot {what}")]
    Netlink {
        /// What was tried.
        what: String,
        /// Why.
        source: std::io::Error,
    },
    /// The kernel's answer makes no sense.
    #[error("cannot {what}: the kernel's answer cannot be read: {reason}")]
    Answer {
        /// What was tried.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// There are more interfaces than a machine can have.
    #[error("the network namespace has {0} interfaces; a guest can have {MAX_INTERFACES}")]
    TooMany(usize),
}

/// Moves the calling thread into the network namespace behind this file.
pub fn enter(path: &Path) -> Result<(), NetworkError> {
    let failed = |source| NetworkError::Enter { path: path.display().to_string(), source };
    let file = File::open(path).map_err(failed)?;
    move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).map_err(|error| failed(error.into()))
}

/// The interfaces that a guest is to have.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mirror {
    /// The interfaces' indexes here, in the order of `network.interfaces`.
    indexes: Vec<u32>,
    /// For the agent.
    pub network: Network,
}

impl Mirror {
    /// Reads what the current namespace has.
    pub fn read() -> Result<Self, NetworkError> {
        let mut netlink = Netlink::open()?;
        let links = netlink.links()?;
        if links.len() > MAX_INTERFACES {
            return Err(NetworkError::TooMany(links.len()));
        }
        let mut mirror = Self::default();
        for link in links {
            let addresses = netlink.addresses(link.index)?;
            let interface = Interface { mac: link.mac, name: link.name, mtu: link.mtu, addresses };
            mirror.indexes.push(link.index);
            mirror.network.interfaces.push(interface);
        }
        for route in netlink.routes()? {
            let Some(at) = mirror.indexes.iter().position(|index| *index == route.index) else { continue };
            mirror.network.routes.push(Route {
                destination: route.destination,
                gateway: route.gateway,
                interface: mirror.network.interfaces[at].name.clone(),
                metric: route.metric,
            });
        }
        Ok(mirror)
    }

    /// The name of the tap that stands for this interface.
    pub fn tap(interface: usize) -> String {
        format!("caisson{interface}")
    }

    /// Joins each interface with its tap, which the monitor has made by now: what the one receives, the other sends.
    pub fn connect(&self) -> Result<(), NetworkError> {
        let mut netlink = Netlink::open()?;
        for (at, (index, interface)) in self.indexes.iter().zip(&self.network.interfaces).enumerate() {
            let tap = netlink.index(&Self::tap(at))?;
            netlink.set_mtu(tap, interface.mtu)?;
            netlink.set_up(tap)?;
            netlink.redirect(*index, tap)?;
            netlink.redirect(tap, *index)?;
        }
        Ok(())
    }

    /// Undoes what [`connect`](Self::connect) did to the engine's interfaces; the taps go with the monitor.
    pub fn disconnect(&self) -> Result<(), NetworkError> {
        let mut netlink = Netlink::open()?;
        self.indexes.iter().try_for_each(|index| netlink.stop_redirecting(*index))
    }
}
