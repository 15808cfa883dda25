use caisson_agent_protocol as agent;
use oci_spec::runtime::Spec;
use serde_json::json;

use super::{
    image::{Options, spec_for},
    *,
};

fn convert_simply(spec: &Spec, user: Option<&str>) -> Result<agent::Container, SpecError> {
    let mut host_path = |_: HostPath| Ok(agent::MountSource::Share { tag: "t".into(), path: "p".into() });
    let context = Context {
        id: "c",
        root: agent::Root::Layers { lower: vec![0], upper: Some(1), readonly: false },
        user,
        files: Vec::new(),
        stdio: agent::Stdio::default(),
        terminal: None,
        bundle: Path::new("/bundle"),
        host_path: &mut host_path,
    };
    convert(spec, context)
}

fn image_config(value: serde_json::Value) -> oci_spec::image::Config {
    serde_json::from_value(value).unwrap()
}

#[test]
fn an_image_becomes_a_container_with_docker_s_defaults() {
    let config = image_config(json!({
        "User": "app:staff", "Env": ["PATH=/bin", "A=1"], "Entrypoint": ["/entry"], "Cmd": ["default"], "WorkingDir": "/srv"
    }));
    let options = Options {
        env: vec!["A=2".into(), "B=3".into()],
        hostname: "h".into(),
        memory_bytes: Some(64 << 20),
        cpus_milli: Some(1500),
        pids: Some(99),
        ..Options::default()
    };
    let (spec, user) = spec_for(Some(&config), &options).unwrap();
    assert_eq!(user, "app:staff");
    let container = convert_simply(&spec, Some(&user)).unwrap();
    let process = container.process.unwrap();
    assert_eq!(process.args, ["/entry", "default"]);
    assert_eq!(process.env, ["PATH=/bin", "HOSTNAME=h", "A=2", "B=3"]);
    assert_eq!(process.cwd, "/srv");
    assert_eq!(process.user, agent::User::Name("app:staff".into()));
    assert!(process.no_new_privileges);
    assert_eq!(process.capabilities.bounding, 0xa804_25fb);
    assert_eq!(process.capabilities.effective, 0);
    assert_eq!(process.seccomp.len(), 1);
    assert_eq!(container.resources.memory_max_bytes, Some(64 << 20));
    assert_eq!(container.resources.swap_max_bytes, Some(0));
    assert_eq!(container.resources.cpu_max_us, Some((150_000, 100_000)));
    assert_eq!(container.resources.pids_max, Some(99));
    assert!(container.own_network && container.own_cgroup_namespace);
    let targets: Vec<_> = container.mounts.iter().map(|mount| mount.destination.as_str()).collect();
    assert_eq!(targets, ["/proc", "/dev", "/dev/pts", "/dev/shm", "/dev/mqueue", "/sys", "/sys/fs/cgroup"]);
    assert_eq!(container.mounts[5].flags & libc::MS_RDONLY, libc::MS_RDONLY);
    assert_eq!(container.mounts[2].data, "newinstance,ptmxmode=0666,mode=0620,gid=5");
    assert!(container.masked_paths.contains(&"/proc/kcore".to_owned()));
}

#[test]
fn the_user_s_words_come_first() {
    let config = image_config(json!({"Entrypoint": ["/entry"], "Cmd": ["default"]}));
    let args = |options: Options| {
        let (spec, _) = spec_for(Some(&config), &options).unwrap();
        spec.process().as_ref().unwrap().args().clone().unwrap()
    };
    assert_eq!(args(Options { command: vec!["x".into()], ..Options::default() }), ["/entry", "x"]);
    assert_eq!(args(Options { entrypoint: Some("/e".into()), ..Options::default() }), ["/e"]);
    assert_eq!(
        args(Options { entrypoint: Some(String::new()), command: vec!["x".into()], ..Options::default() }),
        ["x"]
    );
    assert!(spec_for(None, &Options::default()).is_err());
    let bad = Options { command: vec!["x".into()], cap_add: vec!["CAP_NONSENSE".into()], ..Options::default() };
    assert!(spec_for(None, &bad).unwrap_err().to_string().contains("CAP_NONSENSE"));
}

#[test]
fn capabilities_add_and_drop_as_in_docker() {
    let effective = |add: &[&str], drop: &[&str]| {
        let words = |list: &[&str]| list.iter().map(|word| (*word).to_owned()).collect();
        let options =
            Options { command: vec!["x".into()], cap_add: words(add), cap_drop: words(drop), ..Options::default() };
        let (spec, _) = spec_for(None, &options).unwrap();
        convert_simply(&spec, None).unwrap().process.unwrap().capabilities.effective
    };
    assert_eq!(effective(&[], &[]), 0xa804_25fb);
    assert_eq!(effective(&["all"], &[]), (1 << 41) - 1);
    assert_eq!(effective(&["NET_ADMIN"], &["ALL"]), 1 << 12);
    assert_eq!(effective(&[], &["cap_chown"]), 0xa804_25fa);
}

#[test]
fn a_bundle_s_configuration_is_translated() {
    let spec: Spec = serde_json::from_value(json!({
        "ociVersion": "1.0.2", "unknownField": 1,
        "root": {"path": "rootfs"},
        "process": {
            "terminal": true, "consoleSize": {"height": 24, "width": 80}, "args": ["a"], "cwd": "/",
            "user": {"uid": 1, "gid": 2, "umask": 18, "additionalGids": [3]},
            "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 10, "hard": 20}],
            "oomScoreAdj": 100, "ioPriority": {"class": "IOPRIO_CLASS_IDLE", "priority": 7}
        },
        "mounts": [
            {"destination": "/data", "type": "bind", "source": "d", "options": ["rbind", "ro", "rslave"]},
            {"destination": "/t", "type": "tmpfs", "source": "tmpfs", "options": ["nodev", "dev", "size=1m", "mode=700"]}
        ],
        "linux": {
            "devices": [{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 384}],
            "sysctl": {"net.ipv4.ip_forward": "1"},
            "resources": {
                "devices": [{"allow": false, "access": "rwm"}, {"allow": true, "type": "c", "major": 1, "access": "rw"}],
                "memory": {"limit": 100, "swap": 150, "reservation": 50}, "cpu": {"shares": 1024, "quota": -1},
                "pids": {"limit": -1}, "unified": {"memory.oom.group": "1"}
            },
            "namespaces": [{"type": "pid"}, {"type": "network", "path": "/proc/1/ns/net"}],
            "rootfsPropagation": "slave"
        }
    }))
    .unwrap();
    let container = convert_simply(&spec, None).unwrap();
    let process = container.process.unwrap();
    assert_eq!(process.terminal, Some(agent::TerminalSize { width: 80, height: 24 }));
    assert_eq!(process.user, agent::User::Ids { uid: 1, gid: 2, additional_gids: vec![3], umask: Some(18) });
    assert_eq!(process.rlimits, [agent::Rlimit { resource: 7, soft: 10, hard: 20 }]);
    assert_eq!(process.io_priority, Some((3, 7)));
    assert!(matches!(container.mounts[0].source, agent::MountSource::Share { .. }));
    assert_eq!(container.mounts[0].propagation, [libc::MS_SLAVE | libc::MS_REC]);
    assert_eq!(container.mounts[1].flags, 0);
    assert_eq!(container.mounts[1].data, "size=1m,mode=700");
    assert_eq!(container.devices[0].device, agent::Device::Char { major: 10, minor: 229 });
    let resources = container.resources;
    assert_eq!(
        (resources.memory_max_bytes, resources.swap_max_bytes, resources.memory_low_bytes),
        (Some(100), Some(50), Some(50))
    );
    assert_eq!(
        (resources.cpu_weight, resources.cpu_max_us, resources.pids_max),
        (Some(39), Some((u64::MAX, 100_000)), Some(u64::MAX))
    );
    assert_eq!(
        resources.devices[0],
        agent::DeviceRule { allow: false, kind: b'a', major: None, minor: None, access: 7 }
    );
    assert_eq!(
        resources.devices[1],
        agent::DeviceRule { allow: true, kind: b'c', major: Some(1), minor: None, access: 6 }
    );
    assert!(!container.own_network);
    assert_eq!(container.root_propagation, "slave");
}

#[test]
fn what_cannot_cross_is_refused_with_a_reason() {
    let refuse = |value: serde_json::Value| {
        let mut whole =
            json!({"ociVersion": "1.0.2", "process": {"user": {"uid": 0, "gid": 0}, "args": ["a"], "cwd": "/"}});
        whole.as_object_mut().unwrap().extend(value.as_object().unwrap().clone());
        convert_simply(&serde_json::from_value(whole).unwrap(), None).unwrap_err().to_string()
    };
    assert!(refuse(json!({"mounts": [{"destination": "/x", "type": "ext4", "source": "/dev/sda"}]})).contains("ext4"));
    assert!(refuse(json!({"mounts": [{"destination": "/x", "type": "bind"}]})).contains("without a source"));
    assert!(refuse(json!({"linux": {"resources": {"memory": {"limit": 10, "swap": 5}}}})).contains("swap"));
    assert!(refuse(json!({"linux": {"resources": {"unified": {"../x": "1"}}}})).contains("unified"));
    assert!(refuse(json!({"process": {"user": {"uid": 0, "gid": 0}, "args": [], "cwd": "/"}})).contains("args"));
    assert!(refuse(json!({"process": {"user": {"uid": 0, "gid": 0}, "args": ["a"], "cwd": "x"}})).contains("cwd"));
}
