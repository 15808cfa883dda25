//! People's containers: created from images of the store, found by name or id, kept until they are removed.
//!
//! ```text
//! containers/<id>/    a container's directory (see `state`)
//! containers/names/   a symbolic link per name: two containers cannot have one
//! ```
use std::{fs, io, path::PathBuf};

use caisson_images::{Image, Store, store::StoreError};
use caisson_rootfs::{
    layers::{LayerCache, LayerError},
    upper::{Kind, UpperCache, UpperError},
};

use crate::{
    clock,
    container::{TEMPLATE_LAYERS, shape_for},
    paths::{At, PathError, Paths},
    spec::{
        SpecError,
        image::{Options, spec_for},
    },
    state::{Config, Directory, RootSource, State, StateError, Status},
    supervisor,
};

/// Size of a container's writable layer, which is sparse on the host.
pub const DEFAULT_UPPER_BYTES: u64 = 8 << 30;
/// Digits of an id that people see.
pub const SHORT_ID: usize = 12;

/// Why something cannot be done with a container.
#[derive(Debug, thiserror::Error)]
pub enum ContainersError {
    /// A file operation failed.
    #[error(transparent)]
    Path(#[from] PathError),
    /// Its files cannot be used.
    #[error(transparent)]
    State(#[from] StateError),
    /// The image store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A layer.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// The writable layer.
    #[error(transparent)]
    Upper(#[from] UpperError),
    /// What was asked for.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// There is none.
    #[error("no such container: {0}")]
    NotFound(String),
    /// Several ids begin so.
    #[error("several containers' ids begin with {0}")]
    Ambiguous(String),
    /// The name is in use.
    #[error("the name {name} is in use by container {id}: remove or rename that one")]
    NameTaken {
        /// Which name.
        name: String,
        /// Whose it is.
        id: String,
    },
    /// The name is malformed.
    #[error("{0:?} is not a container's name: letters, digits, and _ . - (not first)")]
    Name(String),
    /// It runs.
    #[error("container {0} is running: stop it first, or use --force")]
    Running(String),
}

/// A container.
#[derive(Debug, Clone)]
pub struct Container {
    /// Where its files are.
    pub directory: Directory,
    /// What is fixed.
    pub config: Config,
    /// What changes.
    pub state: State,
}

impl Container {
    /// The id as people see it.
    pub fn short_id(&self) -> &str {
        self.config.id.get(..SHORT_ID).unwrap_or(&self.config.id)
    }

    /// Reads the state again.
    pub fn refresh(&mut self) -> Result<(), StateError> {
        self.state = self.directory.state()?;
        Ok(())
    }
}

/// What to create.
#[derive(Debug, Clone, Default)]
pub struct Create {
    /// A name, or one is made up.
    pub name: Option<String>,
    /// The image as the user named it.
    pub image: String,
    /// Over the image's configuration.
    pub options: Options,
    /// The rest.
    pub cold: bool,
    /// Standard input is a stream.
    pub stdin: bool,
    /// Keep a log.
    pub log: bool,
    /// Remove everything at its end.
    pub auto_remove: bool,
    /// Labels.
    pub labels: std::collections::BTreeMap<String, String>,
    /// For /etc/hosts.
    pub extra_hosts: Vec<(String, String)>,
    /// For /etc/resolv.conf.
    pub dns: Vec<String>,
    /// Restart policy.
    pub restart: String,
    /// What `stop` sends; the image's otherwise.
    pub stop_signal: Option<u8>,
    /// Size of the writable layer.
    pub upper_bytes: Option<u64>,
}

/// All of people's containers.
#[derive(Debug, Clone)]
pub struct Containers {
    paths: Paths,
}

impl Containers {
    /// Of this store.
    pub fn new(paths: &Paths) -> Containers {
        Containers { paths: paths.clone() }
    }

    fn names(&self) -> PathBuf {
        self.paths.containers().join("names")
    }

    /// All that can be read, newest first.
    pub fn list(&self) -> Result<Vec<Container>, ContainersError> {
        let mut all = Vec::new();
        for id in self.ids()? {
            if let Ok(container) = self.open(&id) {
                all.push(container);
            }
        }
        all.sort_by(|one, other| other.config.created.cmp(&one.config.created));
        Ok(all)
    }

    fn ids(&self) -> Result<Vec<String>, ContainersError> {
        let directory = self.paths.containers();
        let entries = match fs::read_dir(&directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.at("read the directory", &directory)?,
        };
        let name = |entry: io::Result<fs::DirEntry>| entry.ok()?.file_name().into_string().ok();
        Ok(entries.filter_map(name).filter(|name| name.len() == 64).collect())
    }

    fn open(&self, id: &str) -> Result<Container, ContainersError> {
        let directory = Directory::new(self.paths.containers().join(id));
        let config = directory.config()?;
        let state = directory.state()?;
        Ok(Container { directory, config, state })
    }

    /// Finds a container by its name, its id, or the beginning of its id.
    pub fn find(&self, name: &str) -> Result<Container, ContainersError> {
        let not_found = || ContainersError::NotFound(name.to_owned());
        if is_name(name)
            && let Ok(target) = fs::read_link(self.names().join(name))
            && let Some(id) = target.file_name().and_then(|id| id.to_str())
            && let Ok(container) = self.open(id)
        {
            return Ok(container);
        }
        if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(not_found());
        }
        let mut matching = self.ids()?;
        matching.retain(|id| id.starts_with(name));
        match matching.as_slice() {
            [] => Err(not_found()),
            [id] => self.open(id),
            _ => Err(ContainersError::Ambiguous(name.to_owned())),
        }
    }

    /// Creates a container of an image; nothing runs yet. `progress` is told the bytes of layers converted so far.
    pub fn create(
        &self,
        image: &Image,
        store: &Store,
        create: Create,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Container, ContainersError> {
        if let Some(name) = &create.name
            && !is_name(name)
        {
            return Err(ContainersError::Name(name.clone()));
        }
        let layers = self.layers(image, store, progress)?;
        let id = new_id()?;
        let mut options = create.options;
        if options.hostname.is_empty() {
            options.hostname = id[..SHORT_ID].to_owned();
        }
        let image_config = image.config.config().as_ref();
        let (spec, user) = spec_for(image_config, &options)?;
        let upper_bytes = create.upper_bytes.unwrap_or(DEFAULT_UPPER_BYTES);
        let image_stop_signal =
            || image_config.and_then(|config| config.stop_signal().as_deref()).and_then(signal_number);
        let directory = Directory::create(self.paths.containers().join(&id))?;
        let made = (|| {
            // Later than this, the image can be removed only by force.
            store.pin(&id, &[image.top.digest])?;
            let kind = if create.auto_remove { Kind::Throwaway } else { Kind::Kept };
            UpperCache::open(self.paths.cache.join("uppers"))?.create(kind, upper_bytes, &directory.upper())?;
            let config = Config {
                id: id.clone(),
                name: self.take_name(create.name.as_deref(), &id)?,
                created: clock::now_rfc3339(),
                image: create.image,
                image_id: image.id().to_string(),
                bundle: PathBuf::new(),
                shape: shape_for(options.memory_bytes, options.cpus_milli),
                spec,
                user: Some(user),
                root: RootSource::Image { layers, upper_bytes },
                cold: create.cold,
                stdin: create.stdin,
                log: create.log,
                auto_remove: create.auto_remove,
                auto_start: true,
                stop_signal: create.stop_signal.or_else(image_stop_signal),
                labels: create.labels,
                extra_hosts: create.extra_hosts,
                dns: create.dns,
                restart: create.restart,
                console_socket: None,
                cgroup: None,
            };
            directory.write_config(&config)?;
            let state = State::new(Status::Created);
            directory.write_state(&state)?;
            Ok(Container { directory: directory.clone(), config, state })
        })();
        if made.is_err() {
            let _ = directory.remove();
            let _ = store.unpin(&id);
        }
        made
    }

    fn layers(
        &self,
        image: &Image,
        store: &Store,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Vec<PathBuf>, ContainersError> {
        let cache = LayerCache::open(self.paths.store.join("layers"))?;
        let ids: Vec<String> = image.layers.iter().map(|layer| layer.diff_id.to_string()).collect();
        let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
        let mut open = |at: usize| {
            let layer = image.layers.get(at).ok_or_else(|| io::Error::other("no such layer"))?;
            store.layer_tar(layer).map(|tar| Box::new(tar) as Box<dyn io::Read>).map_err(io::Error::other)
        };
        Ok(cache.stack(&ids, TEMPLATE_LAYERS, &mut open, progress)?)
    }

    /// Takes a name for a container; makes one up if none is given.
    fn take_name(&self, name: Option<&str>, id: &str) -> Result<String, ContainersError> {
        let names = self.names();
        fs::create_dir_all(&names).at("create the directory", &names)?;
        let mut attempt = 0;
        loop {
            let candidate = name.map_or_else(|| made_up_name(id, attempt), str::to_owned);
            let link = names.join(&candidate);
            match std::os::unix::fs::symlink(format!("../{id}"), &link) {
                Ok(()) => return Ok(candidate),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    let target = fs::read_link(&link).unwrap_or_default();
                    let other = target.file_name().unwrap_or_default().to_string_lossy().into_owned();
                    if !self.paths.containers().join(&other).exists() {
                        // Left by a container that was removed in the middle.
                        let _ = fs::remove_file(&link);
                    } else if name.is_some() {
                        let id = other.chars().take(SHORT_ID).collect();
                        return Err(ContainersError::NameTaken { name: candidate, id });
                    } else {
                        attempt += 1;
                    }
                }
                Err(source) => return Err(PathError { action: "create", path: link, source }.into()),
            }
        }
    }

    /// Gives a container another name.
    pub fn rename(&self, container: &mut Container, name: &str) -> Result<(), ContainersError> {
        if !is_name(name) {
            return Err(ContainersError::Name(name.to_owned()));
        }
        let _lock = container.directory.lock()?;
        self.take_name(Some(name), &container.config.id)?;
        let old = std::mem::replace(&mut container.config.name, name.to_owned());
        container.directory.write_config(&container.config)?;
        let _ = fs::remove_file(self.names().join(old));
        Ok(())
    }

    /// Removes a container that does not run, and all that it has.
    pub fn remove(&self, container: &Container) -> Result<(), ContainersError> {
        let state = container.directory.state();
        if state.is_ok_and(|state| state.is_alive()) {
            return Err(ContainersError::Running(container.config.name.clone()));
        }
        supervisor::clear(&self.paths, &container.directory)?;
        self.forget(&container.config)?;
        container.directory.remove()?;
        Ok(())
    }

    /// Gives back a container's name and its hold on its image.
    pub(crate) fn forget(&self, config: &Config) -> Result<(), ContainersError> {
        if !config.name.is_empty() {
            let link = self.names().join(&config.name);
            let own = fs::read_link(&link).is_ok_and(|target| target.file_name().is_some_and(|id| *id == *config.id));
            if own {
                let _ = fs::remove_file(link);
            }
        }
        Store::open(self.paths.store.join("images"))?.unpin(&config.id)?;
        Ok(())
    }
}

/// Whether a text can be a container's name.
pub fn is_name(name: &str) -> bool {
    let mut bytes = name.bytes();
    bytes.next().is_some_and(|first| first.is_ascii_alphanumeric())
        && name.len() <= 128
        && name != "names"
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'))
}

/// A signal by number or name, with or without SIG.
pub fn signal_number(name: &str) -> Option<u8> {
    const NAMES: [&str; 31] = [
        "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE", "ALRM",
        "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ", "VTALRM", "PROF",
        "WINCH", "IO", "PWR", "SYS",
    ];
    if let Ok(number) = name.parse::<u8>() {
        return (number <= 64).then_some(number);
    }
    let upper = name.to_ascii_uppercase();
    let short = upper.strip_prefix("SIG").unwrap_or(&upper);
    let plus = |offset: &str, from: u8| {
        offset.parse::<u8>().ok().map(|offset| from.saturating_add(offset)).filter(|number| *number <= 64)
    };
    match short {
        "RTMIN" => Some(34),
        "RTMAX" => Some(64),
        "IOT" => Some(6),
        "POLL" => Some(29),
        _ => NAMES
            .iter()
            .position(|known| *known == short)
            .map(|at| at as u8 + 1)
            .or_else(|| plus(short.strip_prefix("RTMIN+")?, 34)),
    }
}

fn new_id() -> Result<String, PathError> {
    let mut bytes = [0; 32];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).at("read", "the kernel's entropy")?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// A name out of the id's digits.
fn made_up_name(id: &str, attempt: usize) -> String {
    const FIRST: [&str; 16] = [
        "bold", "brisk", "calm", "clear", "deep", "eager", "fair", "firm", "keen", "light", "mild", "quick", "quiet",
        "sound", "steady", "swift",
    ];
    const SECOND: [&str; 16] = [
        "anchor", "bell", "bridge", "buoy", "caisson", "dock", "harbour", "keel", "lock", "mole", "pier", "pontoon",
        "quay", "sluice", "tide", "weir",
    ];
    let digit = |at: usize| id.as_bytes().get(at).map_or(0, |digit| usize::from(*digit) % 16);
    let suffix = if attempt == 0 { String::new() } else { format!("_{}", id.get(..4 + attempt.min(8)).unwrap_or(id)) };
    format!("{}_{}{suffix}", FIRST[digit(attempt)], SECOND[digit(attempt + 1)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_by_any_name() {
        for name in ["9", "KILL", "SIGKILL", "sigkill"] {
            assert_eq!(signal_number(name), Some(9), "{name}");
        }
        assert_eq!(signal_number("SIGRTMIN+3"), Some(37));
        assert_eq!(signal_number("SYS"), Some(31));
        assert_eq!(signal_number("0"), Some(0));
        for name in ["", "65", "SIG", "NONSENSE", "RTMIN+90"] {
            assert_eq!(signal_number(name), None, "{name}");
        }
    }

    #[test]
    fn containers_are_created_found_renamed_and_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let paths = Paths { store: path("store"), run: path("run"), cache: path("cache") };
        let store = Store::open(paths.store.join("images")).unwrap();
        let image = crate::builtin::make(&store).unwrap();
        let containers = Containers::new(&paths);
        assert!(containers.list().unwrap().is_empty());
        let create = |name: Option<&str>| {
            let create = Create { name: name.map(str::to_owned), image: "busybox".into(), ..Create::default() };
            containers.create(&image, &store, create, &mut |_| {})
        };
        let mut one = create(Some("one")).unwrap();
        assert!(matches!(create(Some("one")), Err(ContainersError::NameTaken { .. })));
        assert!(matches!(create(Some("../x")), Err(ContainersError::Name(_))));
        let two = create(None).unwrap();
        assert_eq!(containers.list().unwrap().len(), 2);
        assert_eq!(containers.find("one").unwrap().config.id, one.config.id);
        assert_eq!(containers.find(two.short_id()).unwrap().config.name, two.config.name);
        assert!(matches!(containers.find("nobody"), Err(ContainersError::NotFound(_))));
        containers.rename(&mut one, "eins").unwrap();
        assert!(containers.find("one").is_err());
        let one = containers.find("eins").unwrap();
        assert_eq!(one.state.status(), Status::Created);
        assert!(store.remove("busybox", false).is_err(), "it is in use");
        containers.remove(&one).unwrap();
        containers.remove(&two).unwrap();
        assert!(containers.list().unwrap().is_empty());
        assert_eq!(fs::read_dir(paths.containers().join("names")).unwrap().count(), 0);
        store.remove("busybox", false).unwrap();
    }
}
