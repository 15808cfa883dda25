//! What the tests of builds share: a store with the busybox image, the same image in buildah's storage, and a stand-in for
//! the guest that runs commands in a chroot of this host's.
#![allow(dead_code)]
use caisson_build::builder::Images;
use caisson_build::cache::Cache;
use caisson_build::context::Context;
use caisson_build::dockerfile::Dockerfile;
use caisson_build::guest::{Exit, Guest, RunMountSource, RunResult, RunStep, Sink};
use caisson_build::layer;
use caisson_build::progress::{Event, Progress, StepId};
use caisson_build::tree::Changes;
use caisson_build::views::Views;
use caisson_build::{BuildError, Builder, Options};
use caisson_images::import::{ImportOptions, import_path};
use caisson_images::save::Format;
use caisson_images::{Image, Reference, Store};
use caisson_tests::finish;
use std::error::Error;
use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use tempfile::TempDir;

pub const BASE: &str = "localhost/base:latest";

/// A store, a cache, and all that a build needs.
pub struct World {
    pub directory: TempDir,
    pub store: Store,
    pub cache: Cache,
    pub runs: AtomicUsize,
    pub log: Mutex<Vec<String>>,
}

impl World {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path().join("images")).unwrap();
        let options = ImportOptions { reference: Some(BASE.parse().unwrap()), stem: None };
        import_path(&store, &caisson_tests::images::busybox(), &options).unwrap();
        let cache = Cache::open(&directory.path().join("build"), &store).unwrap();
        Self { directory, store, cache, runs: AtomicUsize::new(0), log: Mutex::default() }
    }

    pub fn build(&self, context: &Path, options: &Options) -> Result<Image, BuildError> {
        let text = fs::read_to_string(context.join("Dockerfile")).unwrap();
        let file = Dockerfile::parse("Dockerfile", &text)?;
        let context = Context::open(context, None).unwrap();
        self.log.lock().unwrap().clear();
        let builder = Builder {
            file: &file,
            context: &context,
            store: &self.store,
            cache: &self.cache,
            images: self,
            guest: self,
            progress: self,
            options,
        };
        builder.build(&["localhost/result:latest".parse::<Reference>().unwrap()])
    }

    /// Unpacks an image of the store with umoci; gives the root.
    pub fn unpack(&self, image: &Image, name: &str) -> PathBuf {
        let archive = self.directory.path().join(format!("{name}.tar"));
        self.store.save(&[(image.clone(), None)], Format::OciArchive, File::create(&archive).unwrap()).unwrap();
        unpack_archive(&archive, &self.directory.path().join(name))
    }

    /// What the steps that were not cached are.
    pub fn made(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }
}

fn unpack_archive(archive: &Path, to: &Path) -> PathBuf {
    fs::create_dir_all(to).unwrap();
    sh(&format!(
        "skopeo copy -q oci-archive:'{}' oci:'{1}'/layout:image && umoci unpack --image '{1}'/layout:image '{1}'/bundle",
        archive.display(),
        to.display()
    ));
    to.join("bundle/rootfs")
}

pub fn sh(script: &str) -> String {
    finish(Command::new("sh").args(["-ec", script])).success()
}

/// Every file of a root, with all that counts.
pub fn listing(root: &Path) -> Vec<String> {
    let format = "%P|%y|%m|%U:%G|%s|%l|%T@|%n";
    let script = format!(
        "cd '{}'; find . -mindepth 1 -type d -printf '%P|%y|%m|%U:%G\\n' -o -mindepth 1 -printf '{format}\\n' | LC_ALL=C sort;
         find . -type f -exec sha256sum {{}} + | LC_ALL=C sort -k2; getfattr -R -P -d -m - . 2>/dev/null || true",
        root.display()
    );
    sh(&script).lines().map(str::to_owned).collect()
}

impl Images for World {
    fn image(&self, reference: &str) -> Result<Image, Box<dyn Error + Send + Sync>> {
        Ok(self.store.resolve(reference)?)
    }
}

impl Progress for World {
    fn event(&self, step: StepId<'_>, event: Event<'_>) {
        let mut log = self.log.lock().unwrap();
        match event {
            Event::Started(text) => log.push(format!("{} {}/{} {text}", step.stage, step.number, step.of)),
            Event::Cached => {
                let prefix = format!("{} {}/{} ", step.stage, step.number, step.of);
                log.retain(|line| !line.starts_with(&prefix));
            }
            Event::Output(bytes) => log.push(String::from_utf8_lossy(bytes).into_owned()),
            Event::Done => {}
        }
    }
}

/// Runs in a chroot on an overlay whose upper is an ext4 image on a loop device: a test's stand-in for a guest.
impl Guest for World {
    fn run(&self, step: RunStep<'_>, output: Sink<'_>) -> Result<RunResult, Box<dyn Error + Send + Sync>> {
        self.runs.fetch_add(1, Ordering::SeqCst);
        let work = tempfile::tempdir_in(self.directory.path())?;
        let here = work.path().display().to_string();
        let views = Views::new(&self.store, self.cache.scratch());
        let mut all = Changes::default();
        let view = views.view(step.layers)?;
        for (path, node) in view.below(Path::new("")) {
            all.added.insert(path.to_owned(), std::sync::Arc::clone(node));
        }
        layer::write(&all, None, &mut File::create(work.path().join("lower.tar"))?)?;
        let mut mounts = String::new();
        for (index, mount) in step.mounts.iter().enumerate() {
            let target = format!("merged/{}", mount.target);
            let from = format!("mount-{index}");
            match &mount.source {
                RunMountSource::Tree { tar, path } => {
                    let mut to = File::create(work.path().join(format!("{from}.tar")))?;
                    std::io::copy(&mut tar.try_clone()?, &mut to)?;
                    let path = path.display();
                    mounts += &format!("mkdir {from}; tar -C {from} -xpf {from}.tar; ");
                    mounts += &format!(
                        "if [ -d '{from}/{path}' ]; then mkdir -p '{target}'; else mkdir -p \"$(dirname '{target}')\"; : > '{target}'; fi; "
                    );
                    mounts += &format!("mount --bind -o ro '{from}/{path}' '{target}'\n");
                }
                RunMountSource::Cache { id, .. } => {
                    let cache = self.directory.path().join(format!("cache-{id}"));
                    fs::create_dir_all(&cache)?;
                    mounts += &format!("mkdir -p '{target}'; mount --bind '{}' '{target}'\n", cache.display());
                }
                RunMountSource::Tmpfs { .. } => {
                    mounts += &format!("mkdir -p '{target}'; mount -t tmpfs tmpfs '{target}'\n");
                }
                RunMountSource::File { content, mode, .. } => {
                    fs::write(work.path().join(&from), content)?;
                    mounts += &format!(
                        "chmod {mode:o} {from}; mkdir -p \"$(dirname '{target}')\"; : > '{target}'; mount --bind {from} '{target}'\n"
                    );
                }
            }
        }
        let script = format!(
            "cd '{here}'; mkdir lower merged m; tar -C lower --xattrs --xattrs-include='*' -xpf lower.tar
             truncate -s 256M image; mke2fs -q -F -t ext4 -O ^has_journal image; mount -o loop image m; mkdir m/upper m/work; chmod 755 m/upper
             mount -t overlay overlay -o lowerdir=lower,upperdir=m/upper,workdir=m/work merged
             mount -t tmpfs dev merged/dev; mknod merged/dev/null c 1 3; chmod 666 merged/dev/null
             {mounts}
             set +e; (\"$@\") 2>&1; code=$?; set -e
             umount -R merged; umount m; exit $code"
        );
        let mut command = Command::new("unshare");
        command.args(["-m", "sh", "-ec", &script, "sh", "env", "-i"]);
        command.args(&step.env);
        command.args(["chroot", "merged", "/bin/sh", "-c", "cd \"$0\" && exec \"$@\"", &step.workdir]);
        command.args(&step.arguments);
        let finished = finish(&mut command);
        output(&finished.stdout);
        output(finished.stderr.as_bytes());
        let exit = match (finished.status.code(), finished.status.signal()) {
            (Some(code), _) => Exit::Code(code as u8),
            (None, signal) => Exit::Signal(signal.unwrap_or(0) as u8),
        };
        Ok(RunResult { exit, upper: File::open(work.path().join("image"))?, directory: "upper".into() })
    }
}

/// Builds with buildah; gives the root of what it made, and its configuration.
pub fn buildah(world: &World, context: &Path, extra: &str) -> (PathBuf, serde_json::Value) {
    let there = world.directory.path().display();
    let flags = format!("--root {there}/buildah --runroot {there}/buildah-run --storage-driver vfs");
    sh(&format!(
        "export STORAGE_DRIVER=vfs BUILDAH_ISOLATION=chroot
         skopeo copy -q oci:'{}':latest containers-storage:'[vfs@{there}/buildah+{there}/buildah-run]'{BASE}
         buildah {flags} bud --isolation chroot --layers=false --format docker {extra} -t result '{}' >&2
         buildah {flags} push -q result oci-archive:{there}/buildah.tar
         buildah {flags} push -q result docker-archive:{there}/buildah-docker.tar",
        caisson_tests::images::busybox().display(),
        context.display()
    ));
    let root =
        unpack_archive(&PathBuf::from(format!("{there}/buildah.tar")), &PathBuf::from(format!("{there}/buildah-out")));
    let config = sh(&format!("skopeo inspect --config docker-archive:{there}/buildah-docker.tar"));
    (root, serde_json::from_str(&config).unwrap())
}
