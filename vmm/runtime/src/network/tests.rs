//! In network namespaces of the test's own.
use super::{
    Mirror, Netlink, enter,
    networks::{DEFAULT, Networks, NetworksError},
};
use std::{path::PathBuf, process::Command, thread};

struct Namespace(String);

impl Namespace {
    fn new(name: &str) -> Self {
        let namespace = Self(format!("caisson-test-{name}-{}", std::process::id()));
        ip(&["netns", "add", &namespace.0]);
        namespace
    }

    fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.0)
    }

    fn ip(&self, arguments: &[&str]) {
        let mut all = vec!["-n", &self.0];
        all.extend(arguments);
        ip(&all);
    }

    /// In a thread of its own, which is in the namespace.
    fn inside<T: Send>(&self, run: impl FnOnce() -> T + Send) -> T {
        let path = self.path();
        thread::scope(|scope| {
            scope
                .spawn(move || {
                    enter(&path).unwrap();
                    run()
                })
                .join()
                .unwrap()
        })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        drop(Command::new("ip").args(["netns", "del", &self.0]).status());
    }
}

fn ip(arguments: &[&str]) {
    let output = Command::new("ip").args(arguments).output().expect("iproute2 is installed");
    assert!(output.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn what_an_engine_configured_is_mirrored() {
    let namespace = Namespace::new("mirror");
    namespace.ip(&["link", "add", "eth0", "address", "02:00:00:00:00:07", "type", "veth", "peer", "name", "peer0"]);
    namespace.ip(&["link", "set", "eth0", "mtu", "1400", "up"]);
    namespace.ip(&["addr", "add", "10.88.0.5/16", "dev", "eth0"]);
    namespace.ip(&["addr", "add", "fd00::5/64", "dev", "eth0", "nodad"]);
    namespace.ip(&["route", "add", "192.168.7.0/24", "dev", "eth0"]);
    namespace.ip(&["route", "add", "default", "via", "10.88.0.1", "metric", "100"]);
    let mirror = namespace.inside(|| Mirror::read().unwrap());
    let [interface] = &mirror.network.interfaces[..] else { panic!("{mirror:?}") };
    assert_eq!(interface.name, "eth0");
    assert_eq!(interface.mac, [2, 0, 0, 0, 0, 7]);
    assert_eq!(interface.mtu, 1400);
    let mut v6 = vec![0; 16];
    (v6[0], v6[15]) = (0xfd, 5);
    assert_eq!(interface.addresses, [(vec![10, 88, 0, 5], 16), (v6, 64)]);
    let routes: Vec<_> = mirror
        .network
        .routes
        .iter()
        .map(|route| (route.destination.clone(), route.gateway.clone(), route.metric))
        .collect();
    assert_eq!(routes, [((vec![192, 168, 7, 0], 24), None, None), ((vec![], 0), Some(vec![10, 88, 0, 1]), Some(100))]);
    assert!(mirror.network.routes.iter().all(|route| route.interface == "eth0"));
}

#[test]
fn frames_go_from_the_interface_to_the_tap_and_back_and_all_is_undone() {
    let namespace = Namespace::new("redirect");
    namespace.ip(&["link", "add", "eth0", "type", "veth", "peer", "name", "peer0"]);
    namespace.ip(&["link", "set", "eth0", "up"]);
    namespace.ip(&["link", "set", "peer0", "up"]);
    // Another veth stands for the tap: what is redirected to its one end comes out of the other.
    namespace.ip(&["link", "add", "caisson0", "type", "veth", "peer", "name", "guest0"]);
    namespace.ip(&["link", "set", "guest0", "up"]);
    let filters = |interface: &str| {
        let output = Command::new("tc")
            .args(["-n", &namespace.0, "filter", "show", "dev", interface, "parent", "ffff:"])
            .output()
            .unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    namespace.inside(|| {
        let mut netlink = Netlink::open().unwrap();
        let links = netlink.links().unwrap();
        let index = links.iter().find(|link| link.name == "eth0").unwrap().index;
        let tap = netlink.index("caisson0").unwrap();
        assert!(links.iter().all(|link| link.index != tap), "taps are not mirrored");
        netlink.set_mtu(tap, 1300).unwrap();
        netlink.set_up(tap).unwrap();
        netlink.redirect(index, tap).unwrap();
        netlink.redirect(index, tap).unwrap();
        netlink.redirect(tap, index).unwrap();
    });
    assert!(filters("eth0").contains("Redirect to device caisson0"), "{}", filters("eth0"));
    assert!(filters("caisson0").contains("Redirect to device eth0"), "{}", filters("caisson0"));

    namespace.inside(|| {
        let mut netlink = Netlink::open().unwrap();
        let index = netlink.index("eth0").unwrap();
        netlink.stop_redirecting(index).unwrap();
        netlink.stop_redirecting(index).unwrap();
        netlink.index("nothing0").unwrap_err();
    });
    assert!(!filters("eth0").contains("Redirect"));
}

#[test]
fn a_file_that_is_no_namespace_is_refused_with_its_path() {
    let error = enter(&PathBuf::from("/etc/passwd")).unwrap_err();
    assert!(error.to_string().contains("/etc/passwd"), "{error}");
}

#[test]
fn networks_of_our_own_give_out_addresses_and_make_their_bridge() {
    let namespace = Namespace::new("own");
    let directory = tempfile::tempdir().unwrap();
    let networks = Networks::open(directory.path());
    let shown = |arguments: &[&str]| {
        let output = Command::new("ip").args(["netns", "exec", &namespace.0]).args(arguments).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    namespace.inside(|| {
        let one = networks.join(DEFAULT, "one", [2, 0, 0, 0, 0, 1]).unwrap();
        let two = networks.join(DEFAULT, "two", [2, 0, 0, 0, 0, 2]).unwrap();
        assert_eq!((one.address.octets(), two.address.octets()), ([10, 90, 0, 2], [10, 90, 0, 3]));
        assert_eq!(one.network.routes[0].gateway, Some(vec![10, 90, 0, 1]));
        assert!(matches!(networks.remove(DEFAULT), Err(NetworksError::InUse { .. })));
        networks.leave("one").unwrap();
        assert_eq!(networks.join(DEFAULT, "three", [2, 0, 0, 0, 0, 3]).unwrap().address, one.address);
        assert_eq!(networks.create("other").unwrap().subnet.octets(), [10, 90, 1, 0]);
        assert!(matches!(networks.create("other"), Err(NetworksError::Exists(_))));
        assert!(matches!(networks.create("../x"), Err(NetworksError::Name(_))));
        assert!(matches!(networks.join("missing", "c", [0; 6]), Err(NetworksError::NotFound(_))));
    });
    assert!(shown(&["ip", "-4", "addr", "show", "csn-default"]).contains("10.90.0.1/24"));
    assert!(shown(&["nft", "list", "ruleset"]).contains("masquerade"));

    // A tap, for which a veth stands, becomes a port of the bridge.
    namespace.ip(&["link", "add", "cst-0-2", "type", "veth", "peer", "name", "guest0"]);
    namespace.inside(|| networks.join(DEFAULT, "three", [0; 6]).unwrap().connect().unwrap());
    assert!(shown(&["ip", "link", "show", "cst-0-2"]).contains("master csn-default"));

    namespace.inside(|| {
        networks.leave("two").unwrap();
        networks.leave("three").unwrap();
        networks.remove(DEFAULT).unwrap();
        assert_eq!(networks.list().unwrap().len(), 1);
    });
    assert!(!shown(&["ip", "link"]).contains("csn-default"));
    assert_eq!(shown(&["nft", "list", "ruleset"]), "");
}
