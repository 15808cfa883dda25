//! One stage: its instructions in order, each changing the configuration, or adding a layer, or both.
use crate::builder::{BuildError, Shared, StepError};
use crate::cache::{Key, Made};
use crate::config::{Config, rfc3339};
use crate::copy::{self, Request, Source};
use crate::dockerfile::{
    self, Copy, CopySource, Instruction, Located, expand, expand_heredoc, expand_words, parse_trigger,
};
use crate::layer;
use crate::pattern::Ignore;
use crate::plan::{Base, PLATFORM_ARGS};
use crate::progress::{Event, StepId};
use crate::tree::Changes;
use crate::{run, users};
use caisson_images::Layer;
use caisson_images::image::OCI_LAYER;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What a stage came to.
#[derive(Debug, Clone)]
pub(crate) struct StageResult {
    /// Its layers, lowest first.
    pub(crate) layers: Vec<Layer>,
    /// Its configuration.
    pub(crate) config: Config,
}

/// Arguments that are never part of a key or of the history: where to find a proxy does not change what is built.
const PROXY_ARGS: [&str; 10] = [
    "HTTP_PROXY",
    "http_proxy",
    "HTTPS_PROXY",
    "https_proxy",
    "FTP_PROXY",
    "ftp_proxy",
    "NO_PROXY",
    "no_proxy",
    "ALL_PROXY",
    "all_proxy",
];

/// A stage while it is built.
pub(crate) struct Stage<'a> {
    pub(crate) shared: &'a Shared<'a>,
    pub(crate) index: usize,
    pub(crate) layers: Vec<Layer>,
    pub(crate) config: Config,
    /// Arguments in scope that have a value.
    pub(crate) args: BTreeMap<String, String>,
    /// Whether CMD was set by this Dockerfile.
    cmd_is_ours: bool,
}

/// Builds the stage at `index` of the file; `given_up` says whether the build goes on at all.
pub(crate) fn build(shared: &Shared<'_>, index: usize, given_up: &dyn Fn() -> bool) -> Result<StageResult, BuildError> {
    let file = shared.builder.file;
    let (Some(parsed), Some(planned)) = (file.stages.get(index), shared.plan.stages.get(&index)) else {
        return Err(BuildError::GivenUp);
    };
    let fail = |line: usize, text: &str, source: StepError| BuildError::Step {
        file: file.file.clone(),
        line,
        text: text.to_owned(),
        source: Box::new(source),
    };
    let of = parsed.instructions.len() + 1;
    let step = |number| StepId { stage: &planned.name, number, of };
    let tell = |number, event: Event<'_>| shared.builder.progress.event(step(number), event);
    tell(1, Event::Started(&parsed.from.text));
    let from = |source| fail(parsed.from.line, &parsed.from.text, source);
    let mut stage = Stage::begin(shared, index, &planned.base).map_err(from)?;
    for trigger in stage.config.take_triggers() {
        let instruction = parse_trigger(&trigger).map_err(|error| from(error.into()))?;
        let located = Located { line: parsed.from.line, text: trigger, value: instruction };
        stage.step(&located, step(1)).map_err(from)?;
    }
    tell(1, Event::Done);
    for (number, instruction) in parsed.instructions.iter().enumerate() {
        if given_up() {
            return Err(BuildError::GivenUp);
        }
        let number = number + 2;
        tell(number, Event::Started(&instruction.text));
        stage.step(instruction, step(number)).map_err(|source| fail(instruction.line, &instruction.text, source))?;
        tell(number, Event::Done);
    }
    Ok(StageResult { layers: stage.layers, config: stage.config })
}

impl<'a> Stage<'a> {
    fn begin(shared: &'a Shared<'a>, index: usize, base: &Base) -> Result<Self, StepError> {
        let (layers, config) = match base {
            Base::Scratch => (Vec::new(), Config::scratch()),
            Base::Stage(earlier) => {
                let done = shared.done.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                match done.get(earlier) {
                    Some(result) => (result.layers.clone(), result.config.clone()),
                    None => return Err(StepError::Operand("the stage that it begins from is not built".to_owned())),
                }
            }
            Base::Image(reference) => {
                let image = shared.image(reference)?;
                let config = Config::parse(&image.config_json)
                    .ok_or_else(|| StepError::Operand(format!("the configuration of {reference} is no JSON object")))?;
                (image.layers, config)
            }
        };
        Ok(Self { shared, index, layers, config, args: BTreeMap::new(), cmd_is_ours: false })
    }

    /// The value of a variable: the environment counts before arguments.
    pub(crate) fn variable(&self, name: &str) -> Option<String> {
        self.config.env(name).or_else(|| self.args.get(name).cloned())
    }

    pub(crate) fn expand(&self, text: &str) -> Result<String, StepError> {
        Ok(expand(text, self.shared.builder.file.escape, &|name| self.variable(name))?)
    }

    pub(crate) fn workdir(&self) -> PathBuf {
        match self.config.workdir() {
            "" => PathBuf::from("/"),
            path => Path::new("/").join(path),
        }
    }

    fn step(&mut self, located: &Located<Instruction>, id: StepId<'_>) -> Result<(), StepError> {
        let text = &located.text;
        match &located.value {
            Instruction::Run(run) => return run::run(self, run, text, id),
            Instruction::Copy(copy) => return self.copy(copy, text, id),
            Instruction::Workdir(path) => return self.make_workdir(path, text, id),
            Instruction::Env(pairs) => {
                // All values see the environment as it was before.
                let mut expanded = Vec::new();
                for (name, value) in pairs {
                    expanded.push((self.expand(name)?, self.expand(value)?));
                }
                for (name, value) in expanded {
                    self.config.set_env(&name, &value);
                }
            }
            Instruction::Arg(args) => {
                for (name, default) in args {
                    if let Some(value) = self.argument(name, default.as_deref())? {
                        self.args.insert(name.clone(), value);
                    }
                }
            }
            Instruction::User(user) => {
                let user = self.expand(user)?;
                self.config.set_user(&user);
            }
            Instruction::Cmd(command) => {
                self.config.set_cmd(command);
                self.cmd_is_ours = true;
            }
            Instruction::Entrypoint(command) => self.config.set_entrypoint(command, self.cmd_is_ours),
            Instruction::Expose(ports) => {
                let escape = self.shared.builder.file.escape;
                for port in expand_words(ports, escape, &|name| self.variable(name))? {
                    self.config.expose(&port).map_err(StepError::Operand)?;
                }
            }
            Instruction::Volume(paths) => {
                for path in paths {
                    let path = self.expand(path)?;
                    self.config.add_volume(&path);
                }
            }
            Instruction::Label(pairs) => {
                for (name, value) in pairs {
                    let (name, value) = (self.expand(name)?, self.expand(value)?);
                    self.config.set_label(&name, &value);
                }
            }
            Instruction::StopSignal(signal) => {
                let signal = self.expand(signal)?;
                if !is_signal(&signal) {
                    return Err(StepError::Operand(format!(
                        "{signal:?} is not a signal: write a name such as SIGTERM, or a number from 1 to 64"
                    )));
                }
                self.config.set_stop_signal(&signal);
            }
            Instruction::Shell(shell) => self.config.set_shell(shell),
            Instruction::Healthcheck(check) => self.config.set_healthcheck(check),
            Instruction::OnBuild(trigger) => self.config.add_trigger(trigger),
            Instruction::Maintainer(author) => {
                let author = self.expand(author)?;
                self.config.set_author(&author);
            }
        }
        // A step that adds no layer is as old as what it stands on, so that building again makes the same image.
        let created = match self.shared.builder.options.source_date_epoch {
            Some(epoch) => rfc3339(epoch),
            None if self.config.created().is_empty() => rfc3339(0),
            None => self.config.created().to_owned(),
        };
        self.config.add_history(text, &created, true);
        Ok(())
    }

    fn argument(&self, name: &str, default: Option<&str>) -> Result<Option<String>, StepError> {
        if let Some(given) = self.shared.builder.options.build_args.get(name) {
            return Ok(Some(given.clone()));
        }
        if let Some(default) = default {
            return self.expand(default).map(Some);
        }
        if let Some(global) = self.shared.plan.global_args.get(name) {
            return Ok(Some(global.clone()));
        }
        Ok(PLATFORM_ARGS.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned()))
    }

    /// Proxies given with `--build-arg`, which RUN steps see without an ARG.
    pub(crate) fn proxies(&self) -> impl Iterator<Item = (&String, &String)> {
        self.shared
            .builder
            .options
            .build_args
            .iter()
            .filter(|(name, _)| PROXY_ARGS.contains(&name.as_str()) && !self.args.contains_key(*name))
    }

    /// Takes a step's result from the cache, or makes it.
    pub(crate) fn cached(
        &mut self,
        parts: &[&[u8]],
        history: &str,
        id: StepId<'_>,
        make: impl FnOnce(&Self) -> Result<Changes, StepError>,
    ) -> Result<(), StepError> {
        let builder = self.shared.builder;
        let epoch = builder.options.source_date_epoch;
        let mut all = parts.to_vec();
        let epoch_text = epoch.map(|epoch| epoch.to_string()).unwrap_or_default();
        all.push(epoch_text.as_bytes());
        let key = Key::new(&self.layers, &all);
        let mut known = if builder.options.no_cache { None } else { builder.cache.get(&key) };
        if let Some(layer) = known.as_ref().and_then(|made| made.layer.as_ref())
            && self.shared.transaction.claim(&layer.digest)?.is_none()
        {
            known = None;
        }
        let made = match known {
            Some(made) => {
                builder.progress.event(id, Event::Cached);
                made
            }
            None => {
                let changes = make(self)?;
                let layer = if changes.is_empty() { None } else { Some(self.write(&changes, history)?) };
                let made = Made { layer, created_s: self.shared.now_s };
                builder.cache.put(&key, &made)?;
                made
            }
        };
        self.config.add_history(history, &rfc3339(epoch.unwrap_or(made.created_s)), made.layer.is_none());
        self.layers.extend(made.layer);
        Ok(())
    }

    fn write(&self, changes: &Changes, what: &str) -> Result<Layer, StepError> {
        let shown: String = what.chars().take(60).collect();
        let writer = self.shared.transaction.writer(format!("the layer of {shown}"), None, None)?;
        let mut writer = std::io::BufWriter::with_capacity(1 << 18, writer);
        layer::write(changes, self.shared.builder.options.source_date_epoch, &mut writer)?;
        let writer = writer.into_inner().map_err(|error| StepError::Scratch(error.into_error()))?;
        // Not compressed, so the blob is the tar, and files in it can be read in place.
        let (digest, size) = writer.finish()?;
        Ok(Layer { digest, size, diff_id: digest, media_type: OCI_LAYER.to_owned() })
    }

    fn make_workdir(&mut self, path: &str, text: &str, id: StepId<'_>) -> Result<(), StepError> {
        let path = self.expand(path)?;
        let full = Path::new("/").join(crate::tree::normalized(&self.workdir().join(&path)));
        let full_text = full.to_string_lossy().into_owned();
        self.config.set_workdir(&full_text);
        let user = self.config.user().to_owned();
        self.cached(&[b"workdir", full_text.as_bytes(), user.as_bytes()], text, id, |stage| {
            let base = stage.shared.views.view(&stage.layers)?;
            // A user that only the running container will know owns nothing yet.
            let owner = users::owner(&base, &user).unwrap_or((0, 0));
            Ok(copy::make_directory(&base, &full, owner, stage.shared.now_s)?)
        })
    }

    fn copy(&mut self, copy: &Copy, text: &str, id: StepId<'_>) -> Result<(), StepError> {
        let shared = self.shared;
        let destination = self.expand(&copy.destination)?;
        let chown = copy.chown.as_deref().map(|text| self.expand(text)).transpose()?;
        let mode_text = copy.chmod.as_deref().map(|text| self.expand(text)).transpose()?;
        let mode = match &mode_text {
            None => None,
            Some(text) => match u32::from_str_radix(text, 8) {
                Ok(mode) if mode <= 0o7777 => Some(mode),
                _ => return Err(StepError::Operand(format!("--chmod={text} is not an octal mode such as 0755"))),
            },
        };
        let mut patterns = Vec::new();
        for pattern in &copy.exclude {
            patterns.push(self.expand(pattern)?);
        }
        let exclude = Ignore::new(patterns.iter().map(String::as_str))?;
        let mut paths = Vec::new();
        for source in &copy.sources {
            paths.push(match source {
                CopySource::Heredoc(heredoc) => {
                    let escape = shared.builder.file.escape;
                    let content = if heredoc.expand {
                        expand_heredoc(&heredoc.content, escape, &|name| self.variable(name))?
                    } else {
                        heredoc.content.clone()
                    };
                    Piece::File(heredoc.name.clone(), content.into_bytes())
                }
                CopySource::Path(path) => {
                    let path = self.expand(path)?;
                    if copy.add && is_remote(&path) {
                        return Err(StepError::Operand(format!(
                            "ADD {path}: sources are not downloaded here; fetch it in a RUN step, or put it into the build context"
                        )));
                    }
                    Piece::Path(path)
                }
            });
        }
        if copy.checksum.is_some() {
            return Err(StepError::Operand("--checksum is for downloads, which are not done here".to_owned()));
        }

        // The key: what is copied from the context by its content, what comes from elsewhere by the layers there.
        let mut hasher = Sha256::new();
        let from = match &copy.from {
            None => None,
            Some(name) => Some(shared.layers_of(&self.expand(name)?, self.index)?),
        };
        if let Some(layers) = &from {
            hasher.update(b"layers");
            for layer in layers {
                hasher.update(layer.diff_id.hex());
            }
        }
        let mut selected = Vec::new();
        for piece in &paths {
            match piece {
                Piece::File(name, bytes) => {
                    hasher.update(format!("file {} {} {name}", name.len(), bytes.len()));
                    hasher.update(bytes);
                    selected.push(Vec::new());
                }
                Piece::Path(path) => {
                    hasher.update(format!("path {} {path}", path.len()));
                    if from.is_none() {
                        let view = &shared.builder.context.view;
                        let found = copy::select(view, "the build context", path)?;
                        copy::hash(view, &found, &exclude, &mut hasher)?;
                        selected.push(found);
                    }
                }
            }
        }
        let hash = hasher.finalize();
        let workdir = self.workdir();
        let flags = [copy.add, copy.link, copy.parents, copy.unpack == Some(false)].map(u8::from);
        let excluded = patterns.join("\n");
        let workdir_bytes = workdir.to_string_lossy().into_owned();
        let parts: [&[u8]; 8] = [
            b"copy",
            &hash,
            destination.as_bytes(),
            workdir_bytes.as_bytes(),
            chown.as_deref().unwrap_or_default().as_bytes(),
            mode_text.as_deref().unwrap_or_default().as_bytes(),
            &flags,
            excluded.as_bytes(),
        ];
        self.cached(&parts, text, id, |stage| {
            let base = shared.views.view(&stage.layers)?;
            let there = from.as_deref().map(|layers| shared.views.view(layers)).transpose()?;
            let owner = chown.as_deref().map(|text| users::owner(&base, text)).transpose()?;
            let mut sources = Vec::new();
            for (piece, found) in paths.into_iter().zip(selected.into_iter().map(Some).chain(std::iter::repeat(None))) {
                sources.push(match (piece, &there) {
                    (Piece::File(name, bytes), _) => Source::File(name, bytes),
                    (Piece::Path(path), Some(view)) => {
                        let tree = copy.from.as_deref().unwrap_or_default();
                        Source::Tree(view, copy::select(view, tree, &path)?)
                    }
                    (Piece::Path(_), None) => Source::Tree(&shared.builder.context.view, found.unwrap_or_default()),
                });
            }
            let scratch = shared.builder.cache.scratch();
            Ok(copy::copy(
                &base,
                &Request {
                    sources,
                    destination: &destination,
                    workdir: &workdir,
                    owner,
                    mode,
                    unpack: copy.add && copy.unpack != Some(false),
                    link: copy.link,
                    parents: copy.parents,
                    exclude: &exclude,
                    now_s: shared.now_s,
                    scratch: &scratch,
                },
            )?)
        })
    }
}

enum Piece {
    Path(String),
    File(String, Vec<u8>),
}

fn is_remote(source: &str) -> bool {
    ["http://", "https://", "git://", "ssh://", "git@"].iter().any(|prefix| source.starts_with(prefix))
}

/// Whether a text names a signal, as far as that can be said without a table of names.
fn is_signal(text: &str) -> bool {
    if let Ok(number) = text.parse::<u8>() {
        return (1..=64).contains(&number);
    }
    let name = text.strip_prefix("SIG").unwrap_or(text);
    (2..=9).contains(&name.len())
        && name.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '+' || c == '-')
        && name.starts_with(|c: char| c.is_ascii_uppercase())
}

/// Whether an instruction of a Dockerfile runs code.
pub fn needs_guest(instruction: &dockerfile::Instruction) -> bool {
    matches!(instruction, Instruction::Run(_))
}
