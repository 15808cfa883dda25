use super::*;
use proptest::prelude::*;

#[test]
fn networks_are_configured() {
    // In a network namespace of this thread's own, with a pair of interfaces.
    std::thread::spawn(|| {
        if let Err(errno) = crate::sys::unshare(linux_raw_sys::general::CLONE_NEWNET) {
            println!("skipped: no network namespace: {errno}");
            return;
        }
        let socket = Socket::open().unwrap();
        let mac = [2, 0, 0, 0, 0, 7];
        let kind = Message(Vec::new()).attribute(1, b"veth\0").0;
        let message = Message::new(RTM_NEWLINK, F_ACK | F_CREATE, &[0; LINK_HEADER])
            .attribute(IFLA_IFNAME, b"test0\0")
            .attribute(IFLA_ADDRESS, &mac)
            .attribute(18, &kind);
        if let Err(errno) = socket.request(message, 0) {
            println!("skipped: no veth: {errno}");
            return;
        }
        let route = |destination: &[u8], prefix, gateway: Option<&[u8]>| Route {
            destination: (destination.to_vec(), prefix),
            gateway: gateway.map(<[u8]>::to_vec),
            interface: "eth0".into(),
            metric: Some(100),
        };
        let mut network = Network {
            interfaces: vec![Interface {
                mac,
                name: "eth0".into(),
                mtu: 1400,
                addresses: vec![(vec![10, 1, 2, 3], 24), (vec![0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9], 64)],
            }],
            routes: vec![
                route(&[], 0, Some(&[10, 1, 2, 1])),
                route(&[192, 168, 0, 0], 16, None),
                route(&[], 0, Some(&[0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1])),
            ],
        };
        configure(&network).unwrap();
        let links = socket.links().unwrap();
        assert!(links.iter().any(|link| link.name == "eth0" && link.mac == mac), "{links:?}");
        let routes = std::fs::read_to_string("/proc/thread-self/net/route").unwrap();
        assert!(routes.contains("eth0\t00000000\t0102010A"), "{routes}");
        assert!(routes.contains("eth0\t0000A8C0\t00000000"), "{routes}");
        let addresses = std::fs::read_to_string("/proc/thread-self/net/if_inet6").unwrap();
        assert!(addresses.contains("fd000000000000000000000000000009"), "{addresses}");
        network.interfaces[0].mac = [3; 6];
        assert_eq!(configure(&network).unwrap_err().kind, ErrorKind::NotFound);
    })
    .join()
    .unwrap();
}

#[test]
fn networks_have_broadcast_addresses_if_they_have_hosts() {
    assert_eq!(broadcast(&[10, 1, 2, 3], 24), Some([10, 1, 2, 255]));
    assert_eq!(broadcast(&[10, 1, 2, 3], 0), Some([255; 4]));
    assert_eq!(broadcast(&[10, 1, 2, 3], 31), None);
    assert_eq!(broadcast(&[10, 1, 2, 3], 32), None);
    assert_eq!(broadcast(&[0; 16], 64), None);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_can_be_split(bytes in prop::collection::vec(0..40_u8, 0..300)) {
        for (_, content) in messages(&bytes).take(1000) {
            let _ = parse_link(content);
        }
    }
}
