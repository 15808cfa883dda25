//! What `runc spec` writes, and what engines and people put into it.
use super::{Bundle, BundleError, Export, NetworkNamespace, ROOT_EXPORT, SHARE_TAG};
use caisson_agent_protocol::{Device, MountSource, Root, User};
use serde_json::{Value, json};
use std::{fs, path::PathBuf, process::Command};
use tempfile::TempDir;

/// The bundle that `runc spec` makes, after this change.
fn bundle(change: impl FnOnce(&mut Value)) -> (TempDir, Bundle) {
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("rootfs")).unwrap();
    let made = Command::new("runc").arg("spec").current_dir(&directory).output().expect("runc is installed");
    assert!(made.status.success());
    let path = directory.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut config);
    fs::write(&path, config.to_string()).unwrap();
    let bundle = Bundle::load(directory.path()).unwrap();
    (directory, bundle)
}

#[track_caller]
fn refused(change: impl FnOnce(&mut Value), field: &str) {
    let (_directory, bundle) = bundle(change);
    match bundle.translate("c", 0) {
        Err(BundleError::Refused { field: found, .. } | BundleError::Invalid { field: found, .. }) => {
            assert!(found.starts_with(field), "{found}")
        }
        other => panic!("{field}: {other:?}"),
    }
}

#[test]
fn the_default_configuration_of_runc_is_translated() {
    let (directory, bundle) = bundle(|_| {});
    let translated = bundle.translate("c", 0).unwrap();
    let container = translated.container;
    let root = Export { name: ROOT_EXPORT.into(), path: directory.path().join("rootfs"), read_only: false };
    assert_eq!(translated.exports, [root]);
    assert_eq!(translated.network, NetworkNamespace::New);
    assert!(container.own_network);
    assert_eq!(container.root, Root::Share { tag: SHARE_TAG.into(), path: "root".into(), readonly: true });
    assert_eq!(container.hostname, "runc");
    let mounts: Vec<_> = container.mounts.iter().map(|mount| mount.destination.as_str()).collect();
    assert_eq!(mounts, ["/proc", "/dev", "/dev/pts", "/dev/shm", "/dev/mqueue", "/sys", "/sys/fs/cgroup"]);
    assert_eq!(container.mounts[1].flags, 2 | 1 << 24); // nosuid, strictatime
    assert_eq!(container.mounts[1].data, "mode=755,size=65536k");
    assert_eq!(container.mounts[6].source, MountSource::Kernel { fs_type: "cgroup2".into() });
    let process = container.process.unwrap();
    assert_eq!(process.args, ["sh"]);
    assert_eq!(process.cwd, "/");
    assert_eq!(process.user, User::Ids { uid: 0, gid: 0, additional_gids: vec![], umask: None });
    assert_eq!(process.capabilities.bounding, 1 << 29 | 1 << 5 | 1 << 10);
    assert!(process.no_new_privileges && process.terminal.is_some());
    assert_eq!((process.rlimits[0].resource, process.rlimits[0].soft), (7, 1024));
    assert_eq!(container.resources.devices.len(), 1);
    assert!(!container.resources.devices[0].allow && container.resources.devices[0].access == 7);
}

#[test]
fn what_cannot_cross_into_a_guest_is_refused() {
    let without = |wanted: &'static str| {
        move |config: &mut Value| {
            config["linux"]["namespaces"].as_array_mut().unwrap().retain(|namespace| namespace["type"] != wanted);
        }
    };
    refused(without("pid"), "linux.namespaces");
    refused(without("network"), "linux.namespaces");
    refused(|config| config["linux"]["namespaces"][0]["path"] = json!("/proc/1/ns/pid"), "linux.namespaces: pid");
    refused(
        |config| config["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"})),
        "linux.namespaces: user",
    );
    refused(|config| config["linux"]["intelRdt"] = json!({"closID": "x"}), "linux.intelRdt");
    refused(|config| config["linux"]["sysctl"] = json!({"vm.swappiness": "1"}), "linux.sysctl: vm.swappiness");
    let gpu = json!([{"path": "/dev/dri/card0", "type": "c", "major": 226, "minor": 0}]);
    refused(|config| config["linux"]["devices"] = gpu, "linux.devices: /dev/dri/card0");
    let nfs = json!({"destination": "/n", "type": "nfs", "source": "server:/", "options": []});
    refused(|config| config["mounts"].as_array_mut().unwrap().push(nfs), "mounts: /n");
    let socket = json!({"destination": "/s", "type": "bind", "source": "/dev/null", "options": ["bind"]});
    refused(|config| config["mounts"].as_array_mut().unwrap().push(socket), "mounts: /s");
    let kernel = json!({"kernel": {"path": "/boot/vmlinuz"}});
    refused(|config| config["vm"] = kernel, "vm.kernel.path");
    refused(|config| config["process"]["args"] = json!([]), "process.args");
    refused(|config| config["process"]["cwd"] = json!("relative"), "process.cwd");
    let rates = json!({"throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 1}]});
    refused(|config| config["linux"]["resources"]["blockIO"] = rates, "linux.resources.blockIO");
    refused(|config| config["root"]["path"] = json!("missing"), "root.path");
}

#[test]
fn binds_become_exports_and_shared_memory_stays_in_the_guest() {
    let outside = tempfile::tempdir().unwrap();
    let file = outside.path().join("hosts");
    fs::write(&file, "x").unwrap();
    let (_directory, bundle) = bundle(|config| {
        let mounts = config["mounts"].as_array_mut().unwrap();
        let bind = |destination: &str, source: PathBuf, options: &[&str]| json!({"destination": destination, "type": "bind", "source": source, "options": options});
        mounts.push(bind("/data", outside.path().to_owned(), &["rbind", "rw", "rprivate"]));
        mounts.push(bind("/etc/hosts", file.clone(), &["bind", "ro", "nosuid"]));
        mounts.push(bind("/dev/shm", outside.path().to_owned(), &["bind", "nodev"]));
    });
    let translated = bundle.translate("c", 0).unwrap();
    let export = |name: &str, path: PathBuf, read_only| Export { name: name.into(), path, read_only };
    assert_eq!(
        translated.exports[1..],
        [export("mount-1", outside.path().to_owned(), false), export("mount-2", file, true)]
    );
    let mounts = &translated.container.mounts[7..];
    assert_eq!(mounts[0].source, MountSource::Share { tag: SHARE_TAG.into(), path: "mount-1".into() });
    assert_eq!(mounts[0].propagation, [1 << 18 | 16384]);
    assert_eq!(mounts[1].flags, 1 | 2);
    assert_eq!(mounts[2].source, MountSource::Kernel { fs_type: "tmpfs".into() });
    assert!(mounts[2].data.starts_with("mode=1777,size="));
}

#[test]
fn limits_are_those_of_cgroup_v2() {
    let (_directory, bundle) = bundle(|config| {
        config["linux"]["resources"] = json!({
            "memory": {"limit": 1000, "swap": 1500, "reservation": 500},
            "cpu": {"shares": 1024, "quota": 50000, "period": 200000, "cpus": "0-1", "burst": 7},
            "pids": {"limit": 9},
            "unified": {"memory.high": "900"},
            "blockIO": {},
            "devices": [{"allow": true, "type": "c", "major": 1, "minor": -1, "access": "rw"}],
        });
    });
    let translated = bundle.translate("c", 0).unwrap();
    let resources = translated.container.resources;
    assert_eq!(resources.memory_max_bytes, Some(1000));
    assert_eq!(resources.memory_low_bytes, Some(500));
    assert_eq!(resources.swap_max_bytes, Some(500));
    assert_eq!(resources.cpu_weight, Some(39));
    assert_eq!(resources.cpu_max_us, Some((50_000, 200_000)));
    assert_eq!(resources.pids_max, Some(9));
    assert_eq!(translated.host_cpus.as_deref(), Some("0-1"));
    let pair = |file: &str, value: &str| (file.to_owned(), value.to_owned());
    assert_eq!(resources.unified, [pair("cpu.max.burst", "7"), pair("memory.high", "900")]);
    let rule = &resources.devices[0];
    assert_eq!((rule.allow, rule.kind, rule.major, rule.minor, rule.access), (true, b'c', Some(1), None, 6));
}

#[test]
fn devices_joined_networks_and_block_devices_are_told_apart() {
    let (_directory, bundle) = bundle(|config| {
        config["linux"]["devices"] = json!([
            {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 384, "uid": 1},
            {"path": "/dev/disk", "type": "b", "major": 7, "minor": 0},
        ]);
        for namespace in config["linux"]["namespaces"].as_array_mut().unwrap() {
            if namespace["type"] == "network" {
                namespace["path"] = json!("/run/netns/x");
            }
        }
        config["domainname"] = json!("example");
    });
    let translated = bundle.translate("c", 3).unwrap();
    assert_eq!(translated.network, NetworkNamespace::Join("/run/netns/x".into()));
    assert_eq!(translated.block_devices, [PathBuf::from("/dev/block/7:0")]);
    let container = translated.container;
    assert!(!container.own_network);
    assert_eq!(container.domainname.as_deref(), Some("example"));
    assert_eq!(container.devices[0].device, Device::Char { major: 10, minor: 229 });
    assert_eq!((container.devices[0].mode, container.devices[0].uid), (0o600, 1));
    assert_eq!(container.devices[1].device, Device::Disk { disk: 3 });
}

#[test]
fn files_that_are_no_configuration_are_told_with_their_path() {
    let directory = tempfile::tempdir().unwrap();
    assert!(matches!(Bundle::load(directory.path()), Err(BundleError::Read { .. })));
    for text in ["", "{", "7", r#"{"ociVersion": 1}"#] {
        fs::write(directory.path().join("config.json"), text).unwrap();
        let error = Bundle::load(directory.path()).unwrap_err();
        assert!(error.to_string().contains("config.json"), "{error}");
    }
    for version in ["invalid", "2.0.0", "1", "1.x.0"] {
        fs::write(directory.path().join("config.json"), json!({"ociVersion": version}).to_string()).unwrap();
        let error = Bundle::load(directory.path()).unwrap_err();
        assert!(error.to_string().starts_with("ociVersion"), "{version}: {error}");
    }
}

#[test]
fn the_example_is_translated_and_the_features_are_what_the_specification_says() {
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("rootfs")).unwrap();
    fs::write(directory.path().join("config.json"), super::example().to_string()).unwrap();
    let container = Bundle::load(directory.path()).unwrap().translate("c", 0).unwrap().container;
    assert_eq!(container.process.unwrap().capabilities.effective, 1 << 29 | 1 << 5 | 1 << 10);

    let features: oci_spec::runtime::Features = serde_json::from_value(super::features()).unwrap();
    assert_eq!(features.oci_version_max(), super::OCI_VERSION);
    let capabilities = features.linux().as_ref().unwrap().capabilities().as_ref().unwrap();
    assert_eq!(capabilities.len(), 41, "each name is one that the specification knows");
}
