//! What is compared: each subject runs a command in a container of the same root, in the foreground or idle.
use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};
use tempfile::TempDir;

/// The image that everything runs: the built-in one.
const IMAGE: &str = "busybox";
/// podman's and runc's default of a million open files cannot be raised everywhere.
const LIMITS: [&str; 4] = ["--ulimit", "nofile=1000:1000", "--ulimit", "nproc=1000:1000"];

/// Files of this run; removed with it.
pub(crate) struct Workspace {
    directory: TempDir,
    caisson: PathBuf,
    root: PathBuf,
}

impl Workspace {
    /// Makes a root directory with what the image holds.
    pub(crate) fn prepare(root: &Path, say: &dyn Fn(&str)) -> Result<Self> {
        say("preparing the image");
        let directory = tempfile::Builder::new().prefix("caisson-bench-").tempdir()?;
        let caisson = std::env::current_exe().context("cannot find this program's own file")?;
        let workspace = Self { directory, caisson, root: root.to_owned() };
        // The first run makes what is missing: the image, the guest kernel, the template.
        let first = workspace.caisson().args(["run", "--rm", IMAGE, "true"]).stdin(Stdio::null()).output()?;
        ensure!(first.status.success(), "caisson run failed: {}", String::from_utf8_lossy(&first.stderr).trim());
        workspace.unpack()?;
        Ok(workspace)
    }

    fn caisson(&self) -> Command {
        let mut command = Command::new(&self.caisson);
        command.arg("--root").arg(&self.root);
        command
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The image's layers as a directory: the built-in image has no whiteouts.
    fn unpack(&self) -> Result<()> {
        let archive = self.path("image.tar");
        let saved = self.caisson().arg("save").arg("-o").arg(&archive).arg(IMAGE).output()?;
        ensure!(saved.status.success(), "caisson save failed: {}", String::from_utf8_lossy(&saved.stderr).trim());
        let layers = self.path("layers");
        tar::Archive::new(fs::File::open(&archive)?).unpack(&layers)?;
        let manifest: serde_json::Value = serde_json::from_slice(&fs::read(layers.join("manifest.json"))?)?;
        for layer in manifest[0]["Layers"].as_array().context("the saved image has no layers")? {
            let path = layers.join(layer.as_str().unwrap_or_default());
            let unpacked = Command::new("tar").arg("-xf").arg(path).arg("-C").arg(make(&self.path("rootfs"))?).output()?;
            ensure!(unpacked.status.success(), "tar failed: {}", String::from_utf8_lossy(&unpacked.stderr).trim());
        }
        Ok(())
    }

    /// A bundle of the root that runs this command.
    fn bundle(&self, name: &str, command: &[&str]) -> Result<PathBuf> {
        let mut config = caisson_runtime::bundle::example();
        // What the oldest runc that is still met understands.
        config["ociVersion"] = json!("1.0.2");
        config["process"]["terminal"] = json!(false);
        config["process"]["args"] = json!(command);
        config["root"] = json!({ "path": self.path("rootfs"), "readonly": false });
        let bundle = self.path(name);
        make(&bundle)?;
        fs::write(bundle.join("config.json"), config.to_string())?;
        Ok(bundle)
    }
}

fn make(directory: &Path) -> Result<&Path> {
    fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
    Ok(directory)
}

/// How a subject is driven.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Caisson { cold: bool },
    Runtime,
    Podman,
}

/// One of the compared.
pub(crate) struct Subject<'a> {
    pub(crate) name: String,
    pub(crate) version: String,
    kind: Kind,
    program: PathBuf,
    workspace: &'a Workspace,
}

/// Those that are installed and wanted; and the names of the absent.
pub(crate) fn all<'a>(workspace: &'a Workspace, wanted: &[String], say: &dyn Fn(&str)) -> Result<(Vec<Subject<'a>>, Vec<String>)> {
    let known = [
        ("caisson", Kind::Caisson { cold: false }),
        ("caisson --cold", Kind::Caisson { cold: true }),
        ("runc", Kind::Runtime),
        ("crun", Kind::Runtime),
        ("runsc", Kind::Runtime),
        ("kata-runtime", Kind::Runtime),
        ("podman", Kind::Podman),
    ];
    for name in wanted {
        if !known.iter().any(|(known, _)| known == name) {
            bail!("there is no subject {name:?}; there are: {}", known.map(|(name, _)| name).join(", "));
        }
    }
    let (mut subjects, mut absent) = (Vec::new(), Vec::new());
    for (name, kind) in known {
        if !wanted.is_empty() && !wanted.iter().any(|wanted| wanted == name) {
            continue;
        }
        let program = match kind {
            Kind::Caisson { .. } => Some(workspace.caisson.clone()),
            _ => find(name),
        };
        let Some(program) = program else {
            absent.push(format!("{name} (not installed)"));
            continue;
        };
        let version = version(&program);
        let subject = Subject { name: name.to_owned(), version, kind, program, workspace };
        match subject.check() {
            Ok(()) => subjects.push(subject),
            Err(error) => {
                say(&format!("{name} does not work here: {error:#}"));
                absent.push(format!("{name} (does not work here: {error:#})"));
            }
        }
    }
    Ok((subjects, absent))
}

fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join(program)).find(|path| path.is_file())
}

fn version(program: &Path) -> String {
    let output = Command::new(program).arg("--version").output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    text.lines().next().unwrap_or_default().to_owned()
}

impl Subject<'_> {
    /// Runs `true` once; for podman, gives it the image before.
    fn check(&self) -> Result<()> {
        if self.kind == Kind::Podman {
            let loaded = self.podman().args(["load", "-q", "-i"]).arg(self.workspace.path("image.tar")).output()?;
            ensure!(loaded.status.success(), "podman load: {}", String::from_utf8_lossy(&loaded.stderr).trim());
        }
        let output = self.run("check", &["true"])?.stdin(Stdio::null()).output()?;
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "{}", error.lines().last().unwrap_or("it says nothing"));
        Ok(())
    }

    fn podman(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--root").arg(self.workspace.path("podman")).arg("--runroot").arg(self.workspace.path("podman-run"));
        command.args(["--storage-driver", "vfs", "--cgroup-manager", "cgroupfs", "--events-backend", "none"]);
        command
    }

    fn runtime(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--root").arg(self.workspace.path(&format!("{}-state", self.name)));
        command
    }

    /// The command that runs this in a new container of this name, in the foreground, and removes it.
    pub(crate) fn run(&self, name: &str, command: &[&str]) -> Result<Command> {
        let name = format!("bench-{}-{name}", std::process::id());
        Ok(match self.kind {
            Kind::Caisson { cold } => {
                let mut run = self.workspace.caisson();
                run.args(["run", "--rm", "--name", &name]).args(cold.then_some("--cold")).arg(IMAGE).args(command);
                run
            }
            Kind::Runtime => {
                let bundle = self.workspace.bundle(&format!("{}-{name}", self.name), command)?;
                let mut run = self.runtime();
                run.arg("run").arg("--bundle").arg(bundle).arg(&name);
                run
            }
            Kind::Podman => {
                let mut run = self.podman();
                run.args(["run", "--rm", "--network", "none", "--name", &name]).args(LIMITS).arg(IMAGE).args(command);
                run
            }
        })
    }

    /// Starts a container that does nothing; it ends when the value is dropped.
    pub(crate) fn idle(&self, name: &str) -> Result<Idle<'_>> {
        let id = format!("bench-{}-{name}", std::process::id());
        let mut start = match self.kind {
            Kind::Caisson { .. } => {
                let mut start = self.workspace.caisson();
                start.args(["run", "-d", "--rm", "--name", &id, IMAGE, "sleep", "100000"]);
                start
            }
            Kind::Runtime => {
                let bundle = self.workspace.bundle(&format!("{}-{name}", self.name), &["sleep", "100000"])?;
                let mut start = self.runtime();
                start.args(["run", "--detach", "--bundle"]).arg(bundle).arg(&id);
                start
            }
            Kind::Podman => {
                let mut start = self.podman();
                start.args(["run", "-d", "--rm", "--network", "none", "--name", &id]).args(LIMITS);
                start.args([IMAGE, "sleep", "100000"]);
                start
            }
        };
        let status = start.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status()?;
        let idle = Idle { subject: self, id };
        ensure!(status.success(), "{} could not start an idle container ({status})", self.name);
        Ok(idle)
    }
}

/// A container that does nothing.
pub(crate) struct Idle<'a> {
    subject: &'a Subject<'a>,
    id: String,
}

impl Idle<'_> {
    /// The command that runs another process in it.
    pub(crate) fn exec(&self, command: &[&str]) -> Command {
        let mut exec = match self.subject.kind {
            Kind::Caisson { .. } => self.subject.workspace.caisson(),
            Kind::Runtime => self.subject.runtime(),
            Kind::Podman => self.subject.podman(),
        };
        exec.arg("exec").arg(&self.id).args(command);
        exec
    }

    /// The processes on the host that are there for it.
    pub(crate) fn processes(&self) -> Vec<u32> {
        let mut found = Vec::new();
        let mut parents = Vec::new();
        let Ok(entries) = fs::read_dir("/proc") else { return found };
        for entry in entries.flatten() {
            let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
            let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
            let parent = stat.rsplit(") ").next().and_then(|rest| rest.split(' ').nth(1)).and_then(|pid| pid.parse().ok());
            if String::from_utf8_lossy(&command).contains(&self.id) && pid != std::process::id() {
                found.push(pid);
            }
            parents.push((pid, parent.unwrap_or(0)));
        }
        if let Kind::Runtime | Kind::Podman = self.subject.kind {
            found.extend(self.init());
        }
        // And whatever they started: monitors, file servers, the container's own processes.
        let mut next = 0;
        while next < found.len() {
            let children: Vec<u32> = parents.iter().filter(|(_, parent)| *parent == found[next]).map(|(pid, _)| *pid).collect();
            for child in children {
                if !found.contains(&child) {
                    found.push(child);
                }
            }
            next += 1;
        }
        found.sort_unstable();
        found.dedup();
        found
    }

    fn init(&self) -> Option<u32> {
        let output = match self.subject.kind {
            Kind::Caisson { .. } => return None,
            Kind::Runtime => self.subject.runtime().arg("state").arg(&self.id).output().ok()?,
            Kind::Podman => self.subject.podman().args(["inspect", "--format", "{\"pid\":{{.State.Pid}}}", &self.id]).output().ok()?,
        };
        let state: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
        u32::try_from(state["pid"].as_u64()?).ok()
    }
}

impl Drop for Idle<'_> {
    fn drop(&mut self) {
        let mut remove = match self.subject.kind {
            Kind::Caisson { .. } => self.subject.workspace.caisson(),
            Kind::Runtime => self.subject.runtime(),
            Kind::Podman => self.subject.podman(),
        };
        match self.subject.kind {
            Kind::Runtime => remove.args(["delete", "--force", &self.id]),
            Kind::Caisson { .. } | Kind::Podman => remove.args(["rm", "-f", &self.id]),
        };
        // What cannot be removed is gone already.
        drop(remove.stdout(Stdio::null()).stderr(Stdio::null()).status());
    }
}

impl Drop for Workspace {
    fn drop(&mut self) {
        // podman leaves mounts of its storage behind where it was interrupted; the directory could not be removed with them.
        let storage = self.path("podman");
        if storage.exists() {
            drop(Command::new("umount").arg("-q").arg("-R").arg(storage.join("vfs")).stderr(Stdio::null()).status());
        }
    }
}
