//! RUN steps in guests: layers become EROFS disks, the writable layer an ext4 disk, mounts disks or files.
use std::{
    error::Error,
    fs::{self, File, OpenOptions},
    io,
    path::Path,
};

use caisson_build::guest::{Exit, Guest, RunMountSource, RunResult, RunStep, Sink};
use caisson_images::Store;
use caisson_rootfs::{
    erofs,
    layers::{LayerCache, Stream},
    upper::{DEFAULT_SIZE_BYTES, Kind, UpperCache},
};
use caisson_runtime::{
    container::{TEMPLATE_LAYERS, shape_for},
    paths::Paths,
    state::{Exit as StepExit, Shape},
    step::{self, DiskMount, FileToWrite, Step, Tmpfs},
};
use rustix::fs::{FlockOperation, flock};

use super::progress::Shown;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Runs steps.
pub(super) struct Guests<'a> {
    paths: &'a Paths,
    store: &'a Store,
    shape: Shape,
    shown: &'a Shown,
}

/// Where the guest's overlay keeps its changes, in the writable disk.
const UPPER: &str = "upper";

impl<'a> Guests<'a> {
    pub(super) fn new(
        paths: &'a Paths,
        store: &'a Store,
        memory: Option<u64>,
        cpus: Option<u64>,
        shown: &'a Shown,
    ) -> Self {
        Self { paths, store, shape: shape_for(memory, cpus), shown }
    }

    fn prepare(&self, step: &RunStep<'_>, directory: &Path, held: &mut Vec<File>) -> Result<Step> {
        let mut disks = Vec::new();
        let mut tmpfs = Vec::new();
        let mut files = Vec::new();
        for (number, mount) in step.mounts.iter().enumerate() {
            match &mount.source {
                RunMountSource::Tree { tar, path } => {
                    let image = directory.join(format!("mount-{number}.erofs"));
                    let to = OpenOptions::new().create_new(true).read(true).write(true).open(&image)?;
                    let spool = tempfile_in(directory, number)?;
                    // Each file system has a UUID of its own.
                    let mut uuid = [0; 16];
                    uuid[0] = number as u8 + 1;
                    let options = erofs::Options { uuid, ..erofs::Options::default() };
                    erofs::convert(io::BufReader::new(tar), &to, &spool, &options, &mut |_| {})?;
                    let path = path.to_string_lossy().into_owned();
                    let destination = mount.target.clone();
                    disks.push(DiskMount { image, fs_type: "erofs", path, destination, readonly: true });
                }
                RunMountSource::Cache { id, .. } => {
                    let caches = self.paths.store.join("build/caches");
                    fs::create_dir_all(&caches)?;
                    let lock = OpenOptions::new()
                        .create(true)
                        .truncate(false)
                        .write(true)
                        .open(caches.join(format!("{id}.lock")))?;
                    // One guest at a time: a file system on a disk has one writer.
                    flock(&lock, FlockOperation::LockExclusive)?;
                    held.push(lock);
                    let image = caches.join(format!("{id}.ext4"));
                    if !image.exists() {
                        self.uppers()?.create(Kind::Kept, DEFAULT_SIZE_BYTES, &image)?;
                    }
                    disks.push(DiskMount {
                        image,
                        fs_type: "ext4",
                        path: "cache".to_owned(),
                        destination: mount.target.clone(),
                        readonly: mount.readonly,
                    });
                }
                RunMountSource::Tmpfs { size_bytes } => {
                    tmpfs.push(Tmpfs { destination: mount.target.clone(), size_bytes: *size_bytes });
                }
                RunMountSource::File { content, mode, .. } => files.push(FileToWrite {
                    path: mount.target.clone(),
                    content: content.clone(),
                    mode: *mode,
                    bind: true,
                }),
            }
        }
        let binds = disks.iter().filter(|disk| disk.fs_type == "erofs").count();
        let upper = directory.join("upper.ext4");
        self.uppers()?.create(Kind::Throwaway, DEFAULT_SIZE_BYTES, &upper)?;
        Ok(Step {
            directory: directory.to_owned(),
            layers: self.layers(step, TEMPLATE_LAYERS.saturating_sub(binds).max(1))?,
            upper,
            arguments: step.arguments.clone(),
            env: step.env.clone(),
            user: step.user.clone(),
            workdir: step.workdir.clone(),
            disks,
            tmpfs,
            files,
            shape: self.shape,
        })
    }

    fn uppers(&self) -> Result<UpperCache> {
        Ok(UpperCache::open(self.paths.cache.join("uppers"))?)
    }

    fn layers(&self, step: &RunStep<'_>, most: usize) -> Result<Vec<std::path::PathBuf>> {
        let cache = LayerCache::open(self.paths.store.join("layers"))?;
        let ids: Vec<String> = step.layers.iter().map(|layer| layer.diff_id.to_string()).collect();
        let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
        let mut open = |at: usize| {
            let layer = step.layers.get(at).ok_or_else(|| io::Error::other("no such layer"))?;
            self.store.layer_tar(layer).map(|tar| Box::new(tar) as Stream).map_err(io::Error::other)
        };
        Ok(cache.stack(&ids, most, &mut open, &mut |_| {})?)
    }
}

fn tempfile_in(directory: &Path, number: usize) -> io::Result<File> {
    let path = directory.join(format!("spool-{number}"));
    let file = OpenOptions::new().create_new(true).read(true).write(true).open(&path)?;
    fs::remove_file(&path)?;
    Ok(file)
}

impl Guest for Guests<'_> {
    fn run(&self, step: RunStep<'_>, output: Sink<'_>) -> Result<RunResult> {
        let work = WorkDirectory::new(&self.paths.store.join("build/tmp"))?;
        let mut held = Vec::new();
        let prepared = self.prepare(&step, &work.0, &mut held)?;
        let exit = step::run(self.paths, &prepared, output, |what| self.shown.say(what))?;
        // The directory goes; the open file stays until it has been read.
        let upper = File::open(&prepared.upper)?;
        let exit = match exit {
            StepExit::Code(code) => Exit::Code(code),
            StepExit::Signal(signal) => Exit::Signal(signal),
        };
        Ok(RunResult { exit, upper, directory: UPPER.into() })
    }
}

/// A directory that is removed in the end.
struct WorkDirectory(std::path::PathBuf);

impl WorkDirectory {
    fn new(below: &Path) -> io::Result<Self> {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        fs::create_dir_all(below)?;
        loop {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let path = below.join(format!("run-{}-{number}", std::process::id()));
            match fs::create_dir(&path) {
                // Left by a process that was killed and had this one's number.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                result => return result.map(|()| Self(path)),
            }
        }
    }
}

impl Drop for WorkDirectory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
