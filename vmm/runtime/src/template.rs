//! Templates: machines that were booted once, until their agent waited, and written to disk. A container restores one instead of booting.
//!
//! ```text
//! templates/<key>/          a template: `snapshot/` as the monitor wrote it, and `template.json`
//! templates/<key>.lock      held by who builds it
//! templates/<key>.building/ a build that is under way, or was killed
//! ```
//! The key stands for all that the machine was made of: kernel, agent, monitor, shape, kind of KVM, CPU. When any of it changes the key is
//! another one. Nothing of anyone's is ever in a template: it is taken before the first request about a container.
use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use caisson_agent_protocol::{self as agent, Request};
use caisson_machine::{client::ClientError, config::KvmKind};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{
    agent::RequestError,
    assets::Assets,
    clock, container,
    paths::{At, PathError, Paths},
    sandbox::{Description, Sandbox, SandboxError, monitor_program},
    spec::{self, Context, SpecError, image},
    state::{self, Shape, StateError},
    supervisor::timing::Timing,
};

/// How long the agent may prepare.
const PREPARE_DEADLINE: Duration = Duration::from_secs(300);
/// How long the monitor may take to stop the machine and to write it down.
const SNAPSHOT_DEADLINE: Duration = Duration::from_secs(300);
/// The guest puts away the control connection that was used.
const SETTLE: Duration = Duration::from_secs(1);

/// Why there is no template.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// A file operation failed.
    #[error(transparent)]
    Path(#[from] PathError),
    /// Its files or its lock cannot be used.
    #[error(transparent)]
    State(#[from] StateError),
    /// The machine did not start.
    #[error("cannot boot the machine that a template is made of")]
    Sandbox(#[from] SandboxError),
    /// The agent did not prepare.
    #[error("the agent cannot prepare itself for a template")]
    Prepare(#[from] RequestError),
    /// There is no example of a container.
    #[error("cannot describe a container for the agent to prepare for")]
    Spec(#[from] SpecError),
    /// The monitor did not write it.
    #[error("cannot write the template")]
    Snapshot(#[from] ClientError),
    /// Someone else could have changed it.
    #[error("{} belongs to another user or can be written by others: a template is as trusted as the kernel in it, so it is not used; remove it", .0.display())]
    Untrusted(PathBuf),
    /// There is none of this key.
    #[error("there is no template {0}")]
    NotFound(String),
}

/// What is written beside the snapshot.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Template {
    /// Its key.
    pub key: String,
    /// When it was made, RFC 3339.
    pub created: String,
    /// Memory and CPUs.
    pub shape: Shape,
    /// Kernel and agent.
    pub identity: String,
    /// How long the boot and the snapshot took, in milliseconds.
    pub build_ms: u64,
}

/// Finds the template for a machine, or makes it; `progress` is told when it takes long. Returns the snapshot's directory.
pub fn ensure(
    paths: &Paths,
    assets: &Assets,
    kind: KvmKind,
    shape: Shape,
    mut progress: impl FnMut(&str),
) -> Result<PathBuf, TemplateError> {
    let key = key(assets, kind, shape)?;
    let directory = paths.templates().join(&key);
    if let Some(snapshot) = find(&directory)? {
        return Ok(snapshot);
    }
    fs::create_dir_all(paths.templates()).at("create the directory", paths.templates())?;
    refuse_untrusted(&paths.templates())?;
    let _lock = state::lock_file(&paths.templates().join(format!("{key}.lock")))?;
    // Someone else may have made it while this one waited.
    if let Some(snapshot) = find(&directory)? {
        return Ok(snapshot);
    }
    progress(&format!("making a template of a machine with {} MiB and {} CPU, once", shape.memory_mib, shape.vcpus));
    let building = paths.templates().join(format!("{key}.building"));
    remove(&building)?;
    let built = build(&building, assets, kind, shape, &key);
    match built {
        Ok(()) => fs::rename(&building, &directory).at("rename into place", &directory)?,
        Err(error) => {
            let _ = remove(&building);
            return Err(error);
        }
    }
    Ok(directory.join("snapshot"))
}

/// The snapshot of a template that is whole and trusted.
fn find(directory: &Path) -> Result<Option<PathBuf>, TemplateError> {
    let snapshot = directory.join("snapshot");
    if !snapshot.exists() {
        return Ok(None);
    }
    if let Some(parent) = directory.parent() {
        refuse_untrusted(parent)?;
    }
    refuse_untrusted(directory)?;
    refuse_untrusted(&snapshot)?;
    for entry in fs::read_dir(&snapshot).at("read the directory", &snapshot)? {
        refuse_untrusted(&entry.at("read the directory", &snapshot)?.path())?;
    }
    Ok(Some(snapshot))
}

/// What others can write, or own, or point elsewhere, is not used.
fn refuse_untrusted(path: &Path) -> Result<(), TemplateError> {
    let metadata = fs::symlink_metadata(path).at("look at", path)?;
    let own = metadata.uid() == rustix::process::geteuid().as_raw();
    if own && metadata.mode() & 0o022 == 0 && !metadata.file_type().is_symlink() {
        return Ok(());
    }
    Err(TemplateError::Untrusted(path.to_owned()))
}

/// A container as most are. The agent begins one like it before it knows of its root and process.
fn typical() -> Result<agent::Container, SpecError> {
    let options = image::Options { command: vec!["true".into()], ..image::Options::default() };
    let (spec, _) = image::spec_for(None, &options)?;
    let context = Context {
        id: container::GUEST_ID,
        root: agent::Root::Layers { lower: vec![0], upper: None, readonly: true },
        user: None,
        files: Vec::new(),
        stdio: agent::Stdio::default(),
        terminal: None,
        bundle: Path::new("/"),
        host_path: &mut |_| Err(SpecError::Missing("path of the host that could be in a template")),
    };
    Ok(agent::Container { process: None, ..spec::convert(&spec, context)? })
}

fn build(directory: &Path, assets: &Assets, kind: KvmKind, shape: Shape, key: &str) -> Result<(), TemplateError> {
    let began = Instant::now();
    let snapshot = directory.join("snapshot");
    state::make_directory(directory)?;
    // Sockets need a short path.
    let run = Path::new("/run/caisson/.s").join(format!("t{}-{}", std::process::id(), key.get(..8).unwrap_or(key)));
    remove(&run)?;
    let made = (|| {
        let description = Description {
            directory: &run,
            assets,
            kvm_kind: kind,
            shape,
            disks: container::template_disks(),
            net: Vec::new(),
            shares: vec![container::share(None)],
            restore: None,
            hostname: String::new(),
        };
        let sandbox = Sandbox::start(&description, &mut Timing::default(), |_| {})?;
        // If the agent cannot, containers take longer to start, no more; the second request tells whether it still answers.
        let begun = sandbox.agent().done(Request::PrepareContainer(Box::new(typical()?)), PREPARE_DEADLINE);
        if begun.is_err() {
            sandbox.agent().done(Request::Prepare, PREPARE_DEADLINE)?;
        }
        let monitor = sandbox.disconnect();
        thread::sleep(SETTLE);
        monitor.pause(Instant::now() + SNAPSHOT_DEADLINE)?;
        monitor.snapshot(&snapshot, Instant::now() + SNAPSHOT_DEADLINE)?;
        let _ = monitor.quit();
        let template = Template {
            key: key.to_owned(),
            created: clock::now_rfc3339(),
            shape,
            identity: assets.identity(),
            build_ms: began.elapsed().as_millis() as u64,
        };
        Ok(state::write(&directory.join("template.json"), &template)?)
    })();
    let _ = remove(&run);
    made
}

/// Stands for all that a machine is made of.
fn key(assets: &Assets, kind: KvmKind, shape: Shape) -> Result<String, TemplateError> {
    let program = monitor_program()?;
    let monitor = fs::metadata(&program).at("look at", &program)?;
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpu: Vec<&str> = cpu
        .lines()
        .take_while(|line| !line.is_empty())
        .filter(|line| {
            ["vendor_id", "cpu family", "model", "stepping", "flags", "microcode"]
                .iter()
                .any(|name| line.starts_with(name))
        })
        .collect();
    let text = format!(
        "{}\n{kind:?}\n{} {}\n{:?}\n{} {} {}\n{}\n{}",
        assets.identity(),
        shape.memory_mib,
        shape.vcpus,
        (container::template_disks(), container::share(None)),
        monitor.len(),
        monitor.mtime(),
        monitor.mtime_nsec(),
        Assets::command_line(kind),
        cpu.join("\n"),
    );
    Ok(Sha256::digest(text).iter().take(8).map(|byte| format!("{byte:02x}")).collect())
}

/// All templates, and what each takes on the disk.
pub fn list(paths: &Paths) -> Result<Vec<(Template, u64)>, TemplateError> {
    let directory = paths.templates();
    let entries = match fs::read_dir(&directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.at("read the directory", &directory)?,
    };
    let mut all = Vec::new();
    for entry in entries {
        let path = entry.at("read the directory", &directory)?.path();
        let template =
            fs::read(path.join("template.json")).ok().and_then(|text| serde_json::from_slice::<Template>(&text).ok());
        if let Some(template) = template {
            let files = fs::read_dir(path.join("snapshot")).into_iter().flatten().flatten();
            let bytes = files.filter_map(|file| file.metadata().ok()).map(|metadata| metadata.blocks() * 512).sum();
            all.push((template, bytes));
        }
    }
    all.sort_by(|one, other| one.0.created.cmp(&other.0.created));
    Ok(all)
}

/// Removes a template. Machines that were made of it keep it until they end.
pub fn remove_key(paths: &Paths, key: &str) -> Result<(), TemplateError> {
    let known = key.len() == 16 && key.bytes().all(|byte| byte.is_ascii_hexdigit());
    let directory = paths.templates().join(key);
    if !known || !directory.exists() {
        return Err(TemplateError::NotFound(key.to_owned()));
    }
    let lock = paths.templates().join(format!("{key}.lock"));
    let _lock = state::lock_file(&lock)?;
    remove(&directory)?;
    let _ = fs::remove_file(lock);
    Ok(())
}

fn remove(path: &Path) -> Result<(), PathError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.at("remove", path),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn what_others_can_write_is_not_trusted() {
        let temporary = tempfile::tempdir().unwrap();
        let directory = temporary.path().join("template");
        let snapshot = directory.join("snapshot");
        fs::create_dir_all(&snapshot).unwrap();
        fs::write(snapshot.join("memory"), "").unwrap();
        let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        for path in [temporary.path(), &directory, &snapshot] {
            mode(path, 0o755);
        }
        mode(&snapshot.join("memory"), 0o600);
        assert_eq!(find(&directory).unwrap(), Some(snapshot.clone()));
        for path in [temporary.path(), &directory, &snapshot, &snapshot.join("memory")] {
            mode(path, 0o775);
            assert!(matches!(find(&directory), Err(TemplateError::Untrusted(_))), "{}", path.display());
            mode(path, 0o755);
        }
        std::os::unix::fs::symlink("/etc/passwd", snapshot.join("state")).unwrap();
        assert!(matches!(find(&directory), Err(TemplateError::Untrusted(_))));
        assert_eq!(find(&temporary.path().join("none")).unwrap(), None);
    }

    #[test]
    fn only_keys_are_removed() {
        let temporary = tempfile::tempdir().unwrap();
        let path = |name: &str| temporary.path().join(name);
        let paths = Paths { store: path("store"), run: path("run"), cache: path("cache") };
        assert!(list(&paths).unwrap().is_empty());
        for key in ["", "..", "../../etc", "0123456789abcdef"] {
            assert!(matches!(remove_key(&paths, key), Err(TemplateError::NotFound(_))), "{key}");
        }
    }
}
