//! One command in a guest of its own, whose writable layer is kept: a step of an image's build. It has no state on disk and no
//! supervisor; the caller waits for it, and when the caller dies the monitor does.
use std::{
    error::Error,
    fs, io,
    io::Read,
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
    time::Duration,
};

pub use caisson_agent_protocol::FileToWrite;
use caisson_agent_protocol::{self as agent, Event, ExitStatus, Mount, MountSource, Reply, Request};
use caisson_machine::config::Disk;

use crate::{
    agent::{AgentEvent, RequestError},
    assets::{Assets, AssetsError},
    container::{self, TEMPLATE_LAYERS, TEMPLATE_WRITABLE},
    paths::Paths,
    sandbox::{Description, REQUEST_DEADLINE, Sandbox, SandboxError, kvm_kind},
    spec::{self, Context, SpecError, image::Options},
    state::{Exit, Shape},
    supervisor::timing::Timing,
    template,
};

/// MS_RDONLY of mount(2).
const MS_RDONLY: u64 = 1;
/// Bytes of output that are passed on at once.
const OUTPUT_BYTES: usize = 32 << 10;
/// How long the agent has to set up a container with disks that must be mounted.
const CREATE_DEADLINE: Duration = Duration::from_secs(120);

/// A disk that the command sees at a path.
#[derive(Debug)]
pub struct DiskMount {
    /// The image.
    pub image: PathBuf,
    /// `erofs` or `ext4`.
    pub fs_type: &'static str,
    /// What of it; empty for its root.
    pub path: String,
    /// Where in the container.
    pub destination: String,
    /// Read-only, for the mount; an EROFS disk always is.
    pub readonly: bool,
}

/// Memory at a path.
#[derive(Debug)]
pub struct Tmpfs {
    /// Where in the container.
    pub destination: String,
    /// Its limit in bytes.
    pub size_bytes: Option<u64>,
}

/// What to run, on what.
#[derive(Debug)]
pub struct Step {
    /// A directory of its own, for what the run needs.
    pub directory: PathBuf,
    /// EROFS images, lowest first.
    pub layers: Vec<PathBuf>,
    /// The writable layer.
    pub upper: PathBuf,
    /// Program and arguments.
    pub arguments: Vec<String>,
    /// `NAME=value`.
    pub env: Vec<String>,
    /// The user in the image's terms.
    pub user: String,
    /// Working directory.
    pub workdir: String,
    /// Disks.
    pub disks: Vec<DiskMount>,
    /// Memory.
    pub tmpfs: Vec<Tmpfs>,
    /// Files that are there while it runs and get into no layer.
    pub files: Vec<FileToWrite>,
    /// The machine.
    pub shape: Shape,
}

/// Why a step could not be run to its end.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// Nothing to boot.
    #[error(transparent)]
    Assets(#[from] AssetsError),
    /// `/dev/kvm`.
    #[error("there is no KVM")]
    Kvm(#[source] Box<dyn Error + Send + Sync>),
    /// The guest.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// The command's description.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The agent refused.
    #[error("the guest cannot run {program}")]
    Agent {
        /// What was to be run.
        program: String,
        /// Why not.
        #[source]
        source: RequestError,
    },
    /// More disks than a machine can have.
    #[error("the step needs {0} disks, and a machine has at most 20: use fewer mounts")]
    Disks(usize),
    /// A thread.
    #[error("cannot read the step's output")]
    Output(#[source] io::Error),
    /// The guest ended first.
    #[error("the guest ended before the command did: {0}")]
    Died(String),
}

/// The most disks of a machine that is booted for a step.
const MAX_DISKS: usize = 20;

/// Runs a command to its end. `output` takes what it prints, both streams in the order in which they come. Afterwards the
/// guest is gone and the writable layer is complete.
pub fn run(
    paths: &Paths,
    step: &Step,
    output: &(dyn Fn(&[u8]) + Sync),
    mut progress: impl FnMut(&str),
) -> Result<Exit, StepError> {
    let assets = Assets::prepare(paths, &mut progress)?;
    let kvm_kind = kvm_kind(Some(&paths.cache)).map_err(|error| StepError::Kvm(Box::new(error)))?;
    let plan = plan_disks(step)?;
    let restore = if plan.fits_template {
        template::ensure(paths, &assets, kvm_kind, step.shape, &mut progress).ok()
    } else {
        None
    };
    let run_directory = container::run_directory(&paths.run, &step.directory);
    let _ = fs::remove_dir_all(&run_directory);
    let description = Description {
        directory: &run_directory,
        assets: &assets,
        kvm_kind,
        shape: step.shape,
        disks: plan.disks,
        net: Vec::new(),
        // A machine that restores a template has the template's devices.
        shares: restore.iter().map(|_| container::share(None)).collect(),
        restore,
        hostname: "build".to_owned(),
    };
    let (events, inbox) = mpsc::channel();
    let result = Sandbox::start(&description, &mut Timing::default(), move |event| {
        let _ = events.send(event);
    })
    .map_err(StepError::from)
    .and_then(|sandbox| in_sandbox(&sandbox, step, plan.root, plan.mounts, output, &inbox));
    let _ = fs::remove_dir_all(&run_directory);
    result
}

struct DiskPlan {
    disks: Vec<Disk>,
    root: agent::Root,
    mounts: Vec<Mount>,
    fits_template: bool,
}

/// Read-only disks first, then writable ones: as a template has them, if they fit into one.
fn plan_disks(step: &Step) -> Result<DiskPlan, StepError> {
    let mut readonly = step.layers.clone();
    let mut writable = vec![step.upper.clone()];
    let mut places = Vec::new();
    for disk in &step.disks {
        let list = if disk.fs_type == "erofs" { &mut readonly } else { &mut writable };
        places.push(list.len());
        list.push(disk.image.clone());
    }
    let fits_template = readonly.len() <= TEMPLATE_LAYERS && writable.len() <= TEMPLATE_WRITABLE;
    if readonly.len() + writable.len() > MAX_DISKS {
        return Err(StepError::Disks(readonly.len() + writable.len()));
    }
    let disk = |read_only| move |path| Disk { path: Some(path), read_only };
    let mut disks: Vec<Disk> = readonly.into_iter().map(disk(true)).collect();
    if fits_template {
        disks.resize(TEMPLATE_LAYERS, Disk { path: None, read_only: true });
    }
    let first_writable = disks.len();
    disks.extend(writable.into_iter().map(disk(false)));
    if fits_template {
        disks.resize(TEMPLATE_LAYERS + TEMPLATE_WRITABLE, Disk { path: None, read_only: false });
    }
    let mounts = step.disks.iter().zip(places).map(|(disk, place)| {
        let erofs = disk.fs_type == "erofs";
        let index = if erofs { place } else { first_writable + place };
        Mount {
            destination: disk.destination.clone(),
            source: MountSource::Disk { disk: index as u8, fs_type: disk.fs_type.to_owned(), path: disk.path.clone() },
            flags: if disk.readonly || erofs { MS_RDONLY } else { 0 },
            propagation: Vec::new(),
            data: String::new(),
        }
    });
    let mut mounts: Vec<Mount> = mounts.collect();
    for tmpfs in &step.tmpfs {
        mounts.push(Mount {
            destination: tmpfs.destination.clone(),
            source: MountSource::Kernel { fs_type: "tmpfs".to_owned() },
            flags: 0,
            propagation: Vec::new(),
            data: tmpfs.size_bytes.map(|bytes| format!("size={bytes}")).unwrap_or_default(),
        });
    }
    let lower = (0..step.layers.len()).map(|index| index as u8).collect();
    let root = agent::Root::Layers { lower, upper: Some(first_writable as u8), readonly: false };
    Ok(DiskPlan { disks, root, mounts, fits_template })
}

fn in_sandbox(
    sandbox: &Sandbox,
    step: &Step,
    root: agent::Root,
    mounts: Vec<Mount>,
    output: &(dyn Fn(&[u8]) + Sync),
    inbox: &mpsc::Receiver<AgentEvent>,
) -> Result<Exit, StepError> {
    sandbox.identify("build")?;
    let (out_token, out) = sandbox.stream()?;
    let (err_token, err) = sandbox.stream()?;
    let stdio = agent::Stdio { stdin: None, stdout: Some(out_token), stderr: Some(err_token) };
    let described = describe(step, root, mounts, stdio)?;
    let agent_error =
        |source| StepError::Agent { program: step.arguments.first().cloned().unwrap_or_default(), source };
    let created = sandbox.agent().request(Request::CreateContainer(Box::new(described)), CREATE_DEADLINE);
    match created.map_err(agent_error)? {
        Reply::Process { .. } | Reply::Done => {}
        _ => return Err(agent_error(RequestError::Answer { request: "CreateContainer" })),
    }
    let exit = thread::scope(|scope| {
        let pumps = [out, err].map(|stream| scope.spawn(move || pump(stream, output)));
        let exit = start_and_wait(sandbox, inbox).map_err(|error| match error {
            Ended::Refused(source) => agent_error(source),
            Ended::Died(reason) => StepError::Died(reason),
        });
        if exit.is_err() {
            // Nothing more will come.
            let _ = sandbox.stop();
        }
        for pump in pumps {
            if let Ok(result) = pump.join() {
                result.map_err(StepError::Output)?;
            }
        }
        exit
    })?;
    // Writes back and unmounts; what was not written back is found missing by whoever reads the layer.
    sandbox.shutdown();
    Ok(exit)
}

enum Ended {
    Refused(RequestError),
    Died(String),
}

fn start_and_wait(sandbox: &Sandbox, inbox: &mpsc::Receiver<AgentEvent>) -> Result<Exit, Ended> {
    let start = Request::Start { container: container::GUEST_ID.into() };
    sandbox.agent().done(start, REQUEST_DEADLINE).map_err(Ended::Refused)?;
    loop {
        match inbox.recv() {
            Ok(AgentEvent::Event(Event::Exit { process, status, .. })) if process.is_empty() => {
                return Ok(match status {
                    ExitStatus::Code(code) => Exit::Code(code),
                    ExitStatus::Signal(signal) => Exit::Signal(signal.clamp(1, 64)),
                });
            }
            Ok(AgentEvent::Event(_)) => {}
            Ok(AgentEvent::Ended(reason)) => {
                let end = sandbox.post_mortem();
                return Err(Ended::Died(match reason {
                    Some(reason) => format!("{reason}; {}", end.reason),
                    None => end.reason,
                }));
            }
            Err(_) => return Err(Ended::Died("its agent is gone".to_owned())),
        }
    }
}

fn pump(mut stream: impl Read, output: &(dyn Fn(&[u8]) + Sync)) -> io::Result<()> {
    let mut buffer = vec![0; OUTPUT_BYTES];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => output(&buffer[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // The guest has died; the caller learns that elsewhere.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

fn describe(
    step: &Step,
    root: agent::Root,
    mounts: Vec<Mount>,
    stdio: agent::Stdio,
) -> Result<agent::Container, SpecError> {
    let options = Options {
        command: step.arguments.clone(),
        entrypoint: Some(String::new()),
        env: step.env.clone(),
        workdir: Some(step.workdir.clone()),
        user: Some(step.user.clone()),
        hostname: "build".to_owned(),
        // Package managers and su are setuid; and the guest, which is thrown away, is what isolates.
        new_privileges: true,
        no_seccomp: true,
        ..Options::default()
    };
    let (spec, user) = spec::image::spec_for(None, &options)?;
    let mut no_host_paths = |path: spec::HostPath| {
        Err(SpecError::Value {
            field: format!("mount of {}", path.path.display()),
            problem: "a build has none of the host's files".into(),
        })
    };
    let mut files = step.files.clone();
    files.push(FileToWrite {
        path: "/etc/hosts".into(),
        content: b"127.0.0.1\tlocalhost build\n::1\tlocalhost\n".to_vec(),
        mode: 0o644,
        bind: true,
    });
    let context = Context {
        id: container::GUEST_ID,
        root,
        user: Some(&user),
        files,
        stdio,
        terminal: None,
        bundle: Path::new("/"),
        host_path: &mut no_host_paths,
    };
    let mut described = spec::convert(&spec, context)?;
    described.mounts.extend(mounts);
    Ok(described)
}
