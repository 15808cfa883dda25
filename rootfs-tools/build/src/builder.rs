//! Builds an image: the plan's stages, independent ones in parallel, then the target's layers and configuration as an image.
use crate::cache::{Cache, CacheError};
use crate::context::Context;
use crate::copy::CopyError;
use crate::dockerfile::{Dockerfile, ExpandError, ParseError};
use crate::ext4::Ext4Error;
use crate::guest::{Exit, Guest};
use crate::layer::WriteError;
use crate::pattern::PatternError;
use crate::plan::{Plan, plan};
use crate::progress::Progress;
use crate::stage::{self, StageResult};
use crate::users::UserError;
use crate::views::{ViewError, Views};
use caisson_images::image::OCI_LAYER;
use caisson_images::layer::Compression;
use caisson_images::store::{StoreError, Transaction};
use caisson_images::{Image, Layer, Reference, Store};
use std::collections::BTreeMap;
use std::error::Error;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

/// What is asked for.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// `--build-arg`s.
    pub build_args: BTreeMap<String, String>,
    /// `--target`.
    pub target: Option<String>,
    /// `--no-cache`: nothing is taken from the cache (what is made is still put into it).
    pub no_cache: bool,
    /// `SOURCE_DATE_EPOCH`: no time in the image is later, and the image's own times are that.
    pub source_date_epoch: Option<i64>,
    /// Secrets by id.
    pub secrets: BTreeMap<String, Vec<u8>>,
    /// How the layers that the build makes are stored in the image.
    pub compression: Option<Compression>,
    /// How many stages are built at once; 0 means two.
    pub jobs: usize,
}

/// Finds images that a Dockerfile names.
pub trait Images: Sync {
    /// Finds the image, in the store or elsewhere; afterwards it is in the store.
    ///
    /// # Errors
    /// There is no such image, or it cannot be brought here.
    fn image(&self, reference: &str) -> Result<Image, Box<dyn Error + Send + Sync>>;
}

/// Why a build fails.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The Dockerfile is wrong.
    #[error(transparent)]
    Parse(#[from] ParseError),
    /// A step failed.
    #[error("{file}:{line}: this step failed\n  {line} | {text}")]
    Step {
        /// The Dockerfile.
        file: String,
        /// The line.
        line: usize,
        /// The instruction.
        text: String,
        /// Why.
        #[source]
        source: Box<StepError>,
    },
    /// The store cannot take the image.
    #[error("cannot put the image into the store")]
    Store(#[from] StoreError),
    /// Another stage failed first.
    #[error("the build was given up")]
    GivenUp,
}

/// Why a step fails.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// A base image.
    #[error("cannot get the image {reference}")]
    Image {
        /// Its reference.
        reference: String,
        /// Why.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// Expansion of variables.
    #[error(transparent)]
    Expand(#[from] ExpandError),
    /// COPY, ADD, WORKDIR.
    #[error(transparent)]
    Copy(#[from] CopyError),
    /// A pattern.
    #[error(transparent)]
    Pattern(#[from] PatternError),
    /// An owner.
    #[error(transparent)]
    User(#[from] UserError),
    /// The files below.
    #[error(transparent)]
    View(#[from] ViewError),
    /// The cache.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The layer that it makes.
    #[error(transparent)]
    Layer(#[from] WriteError),
    /// The store.
    #[error("cannot put the layer into the store")]
    Store(#[from] StoreError),
    /// A trigger of the base image.
    #[error(transparent)]
    Trigger(#[from] ParseError),
    /// A mistake in the operands.
    #[error("{0}")]
    Operand(String),
    /// A temporary file.
    #[error("cannot prepare the step's files")]
    Scratch(#[source] std::io::Error),
    /// The guest.
    #[error("the guest could not run it")]
    Guest(#[source] Box<dyn Error + Send + Sync>),
    /// What the guest left.
    #[error("cannot read what it wrote")]
    Upper(#[from] Ext4Error),
    /// The command failed.
    #[error("{command}: {}", match .exit { Exit::Code(code) => format!("exit code {code}"), Exit::Signal(signal) => format!("killed by signal {signal}") })]
    Exit {
        /// What ran.
        command: String,
        /// How it ended.
        exit: Exit,
    },
}

/// A build's surroundings.
pub struct Builder<'a> {
    /// What to build.
    pub file: &'a Dockerfile,
    /// From what.
    pub context: &'a Context,
    /// Where images are.
    pub store: &'a Store,
    /// What was built before.
    pub cache: &'a Cache,
    /// Finds base images.
    pub images: &'a dyn Images,
    /// Runs RUN steps.
    pub guest: &'a dyn Guest,
    /// Is told how it goes.
    pub progress: &'a dyn Progress,
    /// The options.
    pub options: &'a Options,
}

impl std::fmt::Debug for Builder<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Builder").field("options", self.options).finish_non_exhaustive()
    }
}

/// What all stages of a build share.
pub(crate) struct Shared<'a> {
    pub(crate) builder: &'a Builder<'a>,
    pub(crate) plan: Plan,
    pub(crate) views: Views,
    pub(crate) transaction: Transaction,
    /// The time of the build.
    pub(crate) now_s: i64,
    pub(crate) done: Mutex<BTreeMap<usize, Arc<StageResult>>>,
}

impl Builder<'_> {
    /// Builds the target and gives it these references.
    ///
    /// # Errors
    /// The Dockerfile is wrong, a step fails, or the store cannot be written.
    pub fn build(&self, references: &[Reference]) -> Result<Image, BuildError> {
        let plan = plan(self.file, self.options.target.as_deref(), &self.options.build_args)?;
        let clock = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs() as i64);
        let shared = Shared {
            builder: self,
            views: Views::new(self.store, self.cache.scratch()),
            transaction: self.store.begin()?,
            now_s: self.options.source_date_epoch.unwrap_or(clock),
            done: Mutex::new(BTreeMap::new()),
            plan,
        };
        self.stages(&shared)?;
        let target = shared.plan.target;
        let Some(result) = shared.done.lock().unwrap_or_else(PoisonError::into_inner).remove(&target) else {
            return Err(BuildError::GivenUp);
        };
        let image = self.image(&result, references)?;
        // What the cache holds is pinned, what the image holds is referred to: the rest may go.
        shared.transaction.commit(Vec::new())?;
        Ok(image)
    }

    fn image(&self, result: &StageResult, references: &[Reference]) -> Result<Image, BuildError> {
        let mut image = self.store.create_image()?;
        for layer in &result.layers {
            match self.options.compression {
                Some(compression) if layer.media_type == OCI_LAYER && compression != Compression::None => {
                    image.add_layer_tar(&mut self.store.layer_tar(layer)?, compression)?;
                }
                _ => image.add_layer(layer)?,
            }
        }
        Ok(image.finish(&result.config.json(), references)?)
    }

    /// Builds all stages of the plan, each after those that it needs.
    fn stages(&self, shared: &Shared<'_>) -> Result<(), BuildError> {
        let schedule = Mutex::new(Schedule { waiting: shared.plan.stages.keys().copied().collect(), error: None });
        let changed = Condvar::new();
        let jobs = if self.options.jobs == 0 { 2 } else { self.options.jobs };
        std::thread::scope(|scope| {
            for _ in 0..jobs.min(shared.plan.stages.len()) {
                scope.spawn(|| worker(shared, &schedule, &changed));
            }
        });
        let schedule = schedule.into_inner().unwrap_or_else(PoisonError::into_inner);
        match schedule.error {
            Some(error) => Err(error),
            None if schedule.waiting.is_empty() => Ok(()),
            None => Err(BuildError::GivenUp),
        }
    }
}

struct Schedule {
    waiting: Vec<usize>,
    error: Option<BuildError>,
}

fn worker(shared: &Shared<'_>, schedule: &Mutex<Schedule>, changed: &Condvar) {
    loop {
        let mut now = schedule.lock().unwrap_or_else(PoisonError::into_inner);
        let index = loop {
            if now.error.is_some() || now.waiting.is_empty() {
                return;
            }
            let done = shared.done.lock().unwrap_or_else(PoisonError::into_inner);
            let ready = now.waiting.iter().position(|index| {
                let stage = shared.plan.stages.get(index);
                stage.is_none_or(|stage| stage.needs.iter().all(|need| done.contains_key(need)))
            });
            drop(done);
            match ready {
                Some(position) => break now.waiting.remove(position),
                None => now = changed.wait(now).unwrap_or_else(PoisonError::into_inner),
            }
        };
        drop(now);
        let built =
            stage::build(shared, index, &|| schedule.lock().unwrap_or_else(PoisonError::into_inner).error.is_some());
        let mut now = schedule.lock().unwrap_or_else(PoisonError::into_inner);
        match built {
            Ok(result) => {
                shared.done.lock().unwrap_or_else(PoisonError::into_inner).insert(index, Arc::new(result));
            }
            Err(error) => {
                now.error.get_or_insert(error);
            }
        }
        changed.notify_all();
    }
}

impl Shared<'_> {
    /// Finds the layers that a `--from` names: a stage before this one, or an image.
    pub(crate) fn layers_of(&self, name: &str, index: usize) -> Result<Vec<Layer>, StepError> {
        if let Some(stage) = crate::plan::find_stage(self.builder.file, name, index) {
            let done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
            return match done.get(&stage) {
                Some(result) => Ok(result.layers.clone()),
                None => {
                    Err(StepError::Operand(format!("the stage {name} is not built yet: name it outside of ONBUILD")))
                }
            };
        }
        Ok(self.image(name)?.layers)
    }

    pub(crate) fn image(&self, reference: &str) -> Result<Image, StepError> {
        let image = self
            .builder
            .images
            .image(reference)
            .map_err(|source| StepError::Image { reference: reference.to_owned(), source })?;
        for layer in &image.layers {
            self.transaction.claim(&layer.digest)?;
        }
        Ok(image)
    }
}
