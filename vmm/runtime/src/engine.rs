//! Engines' containers: OCI bundles, below `--root`, one directory each.
use std::{
    fs,
    path::{Path, PathBuf},
};

use caisson_agent_protocol as agent;
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use serde_json::{Value, json};

use crate::{
    clock,
    container::{self, shape_for},
    paths::{At, PathError, Paths},
    shares::Shares,
    spec::SpecError,
    state::{Config, Directory, RootSource, State, StateError, Status},
};

/// The version of the specification that this program follows.
pub const OCI_VERSION: &str = "1.2.1";
/// The longest id.
const MAX_ID_BYTES: usize = 1024;

/// Why something cannot be done with an engine's container. Callers match on some of the texts, which are runc's.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// A file operation failed.
    #[error(transparent)]
    Path(#[from] PathError),
    /// Its files cannot be used.
    #[error(transparent)]
    State(#[from] StateError),
    /// The configuration cannot be carried out.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The configuration cannot be read.
    #[error("cannot read the configuration {}", .path.display())]
    Config {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The id is malformed.
    #[error("invalid container ID format: {0:?}")]
    Id(String),
    /// There is one of this id.
    #[error("container with id exists: {0}")]
    Exists(String),
    /// There is none.
    #[error("container does not exist: {0}")]
    NotFound(String),
}

/// An engine's container.
#[derive(Debug, Clone)]
pub struct Engine {
    /// Where its files are.
    pub directory: Directory,
    /// What is fixed.
    pub config: Config,
    /// What changes.
    pub state: State,
}

/// What `create` is told besides the bundle.
#[derive(Debug, Clone, Default)]
pub struct Create {
    /// The id.
    pub id: String,
    /// The bundle.
    pub bundle: PathBuf,
    /// In place of the bundle's config.json.
    pub config: Option<PathBuf>,
    /// The socket that wants the terminal.
    pub console_socket: Option<PathBuf>,
    /// The program starts at once.
    pub auto_start: bool,
}

/// Whether a text can be an id.
fn check_id(id: &str) -> Result<(), EngineError> {
    let good = !id.is_empty()
        && id.len() <= MAX_ID_BYTES
        && id != "."
        && id != ".."
        && !id.starts_with('.')
        && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'+' | b'.' | b'-'));
    if good { Ok(()) } else { Err(EngineError::Id(id.to_owned())) }
}

/// Whether there is an engine's container of this id.
pub fn exists(paths: &Paths, id: &str) -> bool {
    check_id(id).is_ok() && paths.run.join(id).join("state.json").exists()
}

/// Finds a container.
pub fn find(paths: &Paths, id: &str) -> Result<Engine, EngineError> {
    check_id(id)?;
    let directory = Directory::new(paths.run.join(id));
    if !directory.path().join("state.json").exists() {
        return Err(EngineError::NotFound(id.to_owned()));
    }
    let (config, state) = (directory.config()?, directory.state()?);
    Ok(Engine { directory, config, state })
}

/// All containers, by id.
pub fn list(paths: &Paths) -> Result<Vec<Engine>, EngineError> {
    let Ok(entries) = fs::read_dir(&paths.run) else { return Ok(Vec::new()) };
    let mut ids: Vec<String> =
        entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).filter(|id| exists(paths, id)).collect();
    ids.sort();
    // One that is being deleted meanwhile is not there any more.
    Ok(ids.iter().filter_map(|id| find(paths, id).ok()).collect())
}

/// Creates a container of a bundle; its machine is started by its supervisor.
pub fn create(paths: &Paths, create: Create) -> Result<Engine, EngineError> {
    check_id(&create.id)?;
    let bundle = fs::canonicalize(&create.bundle).at("find the bundle", &create.bundle)?;
    let path = create.config.unwrap_or_else(|| bundle.join("config.json"));
    let text = fs::read(&path).at("read", &path)?;
    let spec: Spec = serde_json::from_slice(&text).map_err(|source| EngineError::Config { path, source })?;
    let root = validate(&spec, &bundle, create.console_socket.as_deref())?;
    let linux = spec.linux().clone().unwrap_or_default();
    let resources = linux.resources().clone().unwrap_or_default();
    let memory = resources.memory().as_ref().and_then(|memory| memory.limit()).filter(|limit| *limit > 0);
    let cpus = resources.cpu().as_ref().and_then(|cpu| {
        let quota = u64::try_from(cpu.quota()?).ok().filter(|quota| *quota > 0)?;
        Some(quota * 1000 / cpu.period().filter(|period| *period > 0).unwrap_or(100_000))
    });
    let config = Config {
        id: create.id.clone(),
        name: String::new(),
        created: clock::now_rfc3339(),
        image: String::new(),
        image_id: String::new(),
        bundle,
        shape: shape_for(memory.map(i64::unsigned_abs), cpus),
        user: None,
        root: RootSource::Directory { path: root },
        cold: std::env::var_os("CAISSON_COLD").is_some_and(|value| value == "1"),
        stdin: true,
        log: false,
        auto_remove: false,
        auto_start: create.auto_start,
        stop_signal: None,
        labels: Default::default(),
        extra_hosts: Vec::new(),
        dns: Vec::new(),
        restart: String::new(),
        console_socket: create.console_socket,
        cgroup: linux.cgroups_path().as_ref().map(|path| path.display().to_string()),
        spec,
    };
    // Everything that can be refused is refused before anything is made.
    let nothing = agent::Root::Share { tag: String::new(), path: String::new(), readonly: false };
    let mut shares = Shares::default();
    container::describe(&config, nothing, agent::Stdio::default(), None, &mut |path| shares.add(path))?;
    let directory = match Directory::create(paths.run.join(&create.id)) {
        Err(StateError::Path(PathError { source, .. })) if source.kind() == std::io::ErrorKind::AlreadyExists => {
            let left_over = !paths.run.join(&create.id).join("state.json").exists();
            if !left_over {
                return Err(EngineError::Exists(create.id));
            }
            Directory::new(paths.run.join(&create.id)).remove()?;
            Directory::create(paths.run.join(&create.id))?
        }
        directory => directory?,
    };
    let state = State::new(Status::Creating);
    let written = directory.write_config(&config).and_then(|()| directory.write_state(&state));
    if let Err(error) = written {
        let _ = directory.remove();
        return Err(error.into());
    }
    Ok(Engine { directory, config, state })
}

/// Checks what the specification demands, and what no guest can give; returns the root directory.
fn validate(spec: &Spec, bundle: &Path, console_socket: Option<&Path>) -> Result<PathBuf, SpecError> {
    let refuse = |field: &str, problem: &str| SpecError::Value { field: field.into(), problem: problem.into() };
    let version: Vec<_> = spec.version().split(['.', '-']).take(3).map(str::parse::<u32>).collect();
    if version.len() < 3 || version.iter().any(Result::is_err) || version.first() != Some(&Ok(1)) {
        return Err(refuse(
            "ociVersion",
            &format!("{:?} is not a version 1 of the runtime specification", spec.version()),
        ));
    }
    let root = spec.root().as_ref().ok_or(SpecError::Missing("root"))?;
    let path = bundle.join(root.path());
    let path = fs::canonicalize(&path).map_err(|error| refuse("root.path", &format!("{}: {error}", path.display())))?;
    if !path.is_dir() {
        return Err(refuse("root.path", &format!("{} is not a directory", path.display())));
    }
    let terminal = spec.process().as_ref().and_then(|process| process.terminal()).unwrap_or(false);
    if console_socket.is_some() && !terminal {
        return Err(refuse("process.terminal", "cannot use console socket if runc will not detach or allocate tty"));
    }
    let linux = spec.linux().clone().unwrap_or_default();
    let namespaces = linux.namespaces().clone().unwrap_or_default();
    for namespace in &namespaces {
        let kind = namespace.typ();
        let joined = namespace.path().as_ref().filter(|path| !path.as_os_str().is_empty());
        if let Some(path) = joined
            && kind != LinuxNamespaceType::Network
        {
            return Err(refuse(
                "linux.namespaces",
                &format!("the namespace {} of the host cannot be joined by a container in a guest", path.display()),
            ));
        }
        if namespaces.iter().filter(|other| other.typ() == kind).count() > 1 {
            return Err(refuse("linux.namespaces", "a type is there twice"));
        }
    }
    let identity = |mappings: &Option<Vec<oci_spec::runtime::LinuxIdMapping>>| {
        mappings.iter().flatten().all(|mapping| mapping.container_id() == mapping.host_id())
    };
    if !identity(linux.uid_mappings()) || !identity(linux.gid_mappings()) {
        return Err(refuse(
            "linux.uidMappings",
            "user namespaces with shifted ids are not available: the guest is the boundary",
        ));
    }
    Ok(path)
}

impl Engine {
    /// The state, as the specification has it and runc extends it.
    pub fn describe(&self) -> Value {
        self.describe_as(self.state.status())
    }

    /// The same with another status, for hooks.
    pub fn describe_as(&self, status: Status) -> Value {
        let pid =
            self.state.supervisor.filter(|supervisor| supervisor.is_alive()).map_or(0, |supervisor| supervisor.pid);
        let root = match &self.config.root {
            RootSource::Directory { path } => path.clone(),
            RootSource::Image { .. } => PathBuf::new(),
        };
        let mut state = json!({
            "ociVersion": OCI_VERSION,
            "id": self.config.id,
            "pid": pid,
            "status": status.name(),
            "bundle": self.config.bundle,
            "rootfs": root,
            "created": self.config.created,
            "owner": "",
        });
        if let Some(annotations) = self.config.spec.annotations() {
            state["annotations"] = json!(annotations);
        }
        state
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle(directory: &Path, change: impl FnOnce(&mut Value)) -> PathBuf {
        let bundle = directory.join("bundle");
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        let mut config = json!({
            "ociVersion": "1.0.2",
            "root": {"path": "rootfs"},
            "process": {"user": {"uid": 0, "gid": 0}, "args": ["true"], "cwd": "/"},
            "annotations": {"a": "b"},
            "linux": {"resources": {"memory": {"limit": 67_108_864}, "cpu": {"quota": 150_000, "period": 100_000}}}
        });
        change(&mut config);
        fs::write(bundle.join("config.json"), config.to_string()).unwrap();
        bundle
    }

    #[test]
    fn a_bundle_becomes_a_container_with_a_state() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let paths = Paths { store: path("store"), run: path("run"), cache: path("cache") };
        let bundle = bundle(directory.path(), |_| {});
        let options = |id: &str| Create { id: id.into(), bundle: bundle.clone(), ..Create::default() };
        let made = create(&paths, options("one")).unwrap();
        assert_eq!((made.config.shape.memory_mib, made.config.shape.vcpus), (128, 2));
        assert!(matches!(create(&paths, options("one")), Err(EngineError::Exists(_))));
        for id in ["", ".", "..", ".s", "a/b", "ä"] {
            assert!(matches!(create(&paths, options(id)), Err(EngineError::Id(_))), "{id}");
        }
        let found = find(&paths, "one").unwrap();
        let state = found.describe_as(Status::Created);
        assert_eq!(
            (state["status"].as_str(), state["id"].as_str(), state["annotations"]["a"].as_str()),
            (Some("created"), Some("one"), Some("b"))
        );
        assert_eq!(found.describe()["status"], "stopped");
        assert!(Path::new(state["bundle"].as_str().unwrap()).is_absolute());
        assert_eq!(list(&paths).unwrap().len(), 1);
        found.directory.remove().unwrap();
        assert!(matches!(find(&paths, "one"), Err(EngineError::NotFound(_))));
    }

    #[test]
    fn what_cannot_be_done_is_refused_and_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let paths = Paths { store: path("store"), run: path("run"), cache: path("cache") };
        let refused = |change: fn(&mut Value)| {
            let bundle = bundle(directory.path(), change);
            let error = create(&paths, Create { id: "x".into(), bundle, ..Create::default() }).unwrap_err();
            assert!(!exists(&paths, "x") && !paths.run.join("x").exists());
            error.to_string()
        };
        assert!(refused(|config| config["ociVersion"] = json!("invalid")).contains("ociVersion"));
        assert!(refused(|config| config["root"]["path"] = json!("nowhere")).contains("nowhere"));
        assert!(
            refused(|config| config["linux"]["namespaces"] = json!([{"type": "pid", "path": "/proc/1/ns/pid"}]))
                .contains("/proc/1/ns/pid")
        );
        assert!(
            refused(|config| config["linux"]["namespaces"] = json!([{"type": "pid"}, {"type": "pid"}]))
                .contains("twice")
        );
        assert!(
            refused(|config| config["mounts"] = json!([{"destination": "/x", "type": "bind", "source": "/nowhere"}]))
                .contains("/nowhere")
        );
        assert!(
            refused(|config| config["linux"]["uidMappings"] = json!([{"containerID": 0, "hostID": 1000, "size": 1}]))
                .contains("user namespaces")
        );
    }
}
