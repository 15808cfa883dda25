#![allow(clippy::unwrap_used)]
use super::*;

fn config() -> MachineConfig {
    MachineConfig::new("/boot/vmlinux", 128, KvmKind::Software)
}

fn refused(change: impl FnOnce(&mut MachineConfig)) -> String {
    let mut config = config();
    change(&mut config);
    config.validate().unwrap_err().to_string()
}

#[test]
fn json_goes_there_and_back() {
    let mut config = config();
    config.vcpus = 4;
    config.initramfs = Some("/boot/initramfs".into());
    config.command_line = "console=ttyS0 quiet".into();
    config.disks = vec![Disk { path: Some("/d".into()), read_only: true }, Disk { path: None, read_only: false }];
    config.vsock = Some(Vsock { guest_cid: 3, directory: "/run/x".into() });
    config.net = vec![Net { tap: Some("tap0".into()), mac: [2, 0, 0, 0, 0, 1] }];
    config.shares = vec![Share { tag: "root".into(), socket: None }];
    assert_eq!(MachineConfig::from_json(&config.to_json().unwrap()).unwrap(), config);
}

#[test]
fn the_shortest_json_is_a_machine() {
    let json = br#"{"kernel":"/k","memory_mib":64,"vcpus":1,"kvm_kind":"hardware"}"#;
    let config = MachineConfig::from_json(json).unwrap();
    assert_eq!(config, MachineConfig::new("/k", 64, KvmKind::Hardware));
}

#[test]
fn unknown_fields_are_refused() {
    let json = br#"{"kernel":"/k","memory_mib":64,"vcpus":1,"kvm_kind":"hardware","firmware":"/f"}"#;
    assert!(matches!(MachineConfig::from_json(json), Err(ConfigError::Json(_))));
}

#[test]
fn errors_name_the_field() {
    for (message, error) in [
        ("memory_mib is 8, but must be from 32 to 524288", refused(|c| c.memory_mib = 8)),
        ("vcpus is 0, but must be from 1 to 32", refused(|c| c.vcpus = 0)),
        ("vcpus is 33, but must be from 1 to 32", refused(|c| c.vcpus = 33)),
        ("kernel is not an absolute path", refused(|c| c.kernel = "vmlinux".into())),
        ("serial is not an absolute path", refused(|c| c.serial = Some("log".into()))),
        (
            "number of disks is 27, but must be from 0 to 26",
            refused(|c| c.disks = vec![Disk { path: None, read_only: false }; 27]),
        ),
        (
            "number of devices is 18, but must be from 0 to 17",
            refused(|c| c.disks = vec![Disk { path: None, read_only: false }; 17]),
        ),
        (
            "disks[1].path is not an absolute path",
            refused(|c| {
                c.disks =
                    vec![Disk { path: None, read_only: false }, Disk { path: Some("a".into()), read_only: false }];
            }),
        ),
        (
            "vsock.guest_cid is 2, but must be from 3 to 4294967294",
            refused(|c| c.vsock = Some(Vsock { guest_cid: 2, directory: "/r".into() })),
        ),
        (
            "net[0].tap is not the name of a network interface",
            refused(|c| c.net = vec![Net { tap: Some("a/b".into()), mac: [0; 6] }]),
        ),
        ("net[0].mac is a multicast address", refused(|c| c.net = vec![Net { tap: None, mac: [1; 6] }])),
        (
            "shares[1].tag is that of another share",
            refused(|c| c.shares = vec![Share { tag: "a".into(), socket: None }; 2]),
        ),
        ("command_line has a character that is not printable ASCII", refused(|c| c.command_line = "a\nb".into())),
    ] {
        assert_eq!(error, message);
    }
}
