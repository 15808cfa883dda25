//! RUN: the command, its environment and mounts, handed to a guest; and what is kept of what it wrote.
use crate::builder::StepError;
use crate::copy;
use crate::dockerfile::{Command, MountOptions, NetworkMode, Run};
use crate::ext4;
use crate::guest::{Exit, RunMount, RunMountSource, RunStep};
use crate::layer;
use crate::pattern::Ignore;
use crate::progress::{Event, StepId};
use crate::stage::Stage;
use crate::tree::{Changes, Kind, Node, View, normalized};
use caisson_images::Layer;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Seek;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Where scripts of heredocs are while they run. It is in /dev, which no layer has.
const SCRIPTS: &str = "/dev/pipes";
/// Where secrets are unless they say otherwise.
const SECRETS: &str = "/run/secrets";
/// What a container's runtime puts into its root: if a step leaves one of these empty, it did not make it.
const RUNTIME_PATHS: [&str; 7] = ["dev", "proc", "sys", "etc/hosts", "etc/hostname", "etc/resolv.conf", "run/secrets"];

/// A mount whose words are expanded.
struct Prepared {
    target: String,
    readonly: bool,
    source: PreparedSource,
}

enum PreparedSource {
    /// From the context, or from layers; and the path there.
    Bind(Option<Vec<Layer>>, PathBuf),
    Ready(RunMountSource),
}

/// Runs a RUN step.
pub(crate) fn run(stage: &mut Stage<'_>, run: &Run, text: &str, id: StepId<'_>) -> Result<(), StepError> {
    if stage.layers.is_empty() {
        return Err(StepError::Operand(
            "there are no files yet, so no program to run: begin from an image that has a shell, or copy one in"
                .to_owned(),
        ));
    }
    let mut env = stage.config.environment();
    let mut shown = Vec::new();
    for (name, value) in &stage.args {
        if stage.config.env(name).is_none() {
            shown.push(format!("{name}={value}"));
        }
    }
    env.extend(shown.iter().cloned());
    let mut hasher = Sha256::new();
    let mut secret_env = Vec::new();
    let mut mounts = Vec::new();
    for mount in &run.mounts {
        mounts.extend(prepare(stage, mount, &mut hasher, &mut secret_env)?);
    }
    let (arguments, script) = command(stage, run);
    let workdir = stage.workdir().to_string_lossy().into_owned();
    let user = stage.config.user().to_owned();
    let network = run.network != NetworkMode::None;
    let mounts_hash = hasher.finalize();
    let (arguments_key, env_key) = (arguments.join("\0"), env.join("\0"));
    let script_key = script.as_ref().map(|(_, content)| content.clone()).unwrap_or_default();
    let parts: [&[u8]; 8] = [
        b"run",
        arguments_key.as_bytes(),
        script_key.as_bytes(),
        env_key.as_bytes(),
        workdir.as_bytes(),
        user.as_bytes(),
        &mounts_hash,
        &[u8::from(network)],
    ];
    let prefix = if shown.is_empty() { String::new() } else { format!("|{} {} ", shown.len(), shown.join(" ")) };
    let history = format!("RUN {prefix}{}", arguments.join(" "));
    stage.cached(&parts, &history, id, |stage| {
        let proxies = stage.proxies().map(|(name, value)| format!("{name}={value}"));
        env.extend(proxies);
        env.extend(secret_env);
        let mut targets: Vec<String> = mounts.iter().map(|mount| mount.target.clone()).collect();
        let mut ready = Vec::new();
        for mount in mounts {
            let source = match mount.source {
                PreparedSource::Ready(source) => source,
                PreparedSource::Bind(layers, path) => tree(stage, layers.as_deref(), &path)?,
            };
            ready.push(RunMount { target: mount.target, source, readonly: mount.readonly });
        }
        if let Some((path, content)) = script {
            let source = RunMountSource::File { content: content.into_bytes(), mode: 0o755, uid: 0, gid: 0 };
            ready.push(RunMount { target: path, source, readonly: true });
        }
        targets.extend(RUNTIME_PATHS.map(str::to_owned));
        let builder = stage.shared.builder;
        let (user, workdir) = (user.clone(), workdir.clone());
        let step = RunStep { layers: &stage.layers, arguments, env, user, workdir, mounts: ready, network };
        let result = builder
            .guest
            .run(step, &|bytes| builder.progress.event(id, Event::Output(bytes)))
            .map_err(StepError::Guest)?;
        if result.exit != Exit::Code(0) {
            return Err(StepError::Exit { command: text.to_owned(), exit: result.exit });
        }
        let mut changes = ext4::read(result.upper, &result.directory)?;
        let base = stage.shared.views.view(&stage.layers)?;
        tidy(&mut changes, &base, &targets);
        Ok(changes)
    })
}

/// The arguments, and a script that must be in place.
fn command(stage: &Stage<'_>, run: &Run) -> (Vec<String>, Option<(String, String)>) {
    let line = match &run.command {
        Command::Exec(arguments) => return (arguments.clone(), None),
        Command::Shell(line) => line,
    };
    if let [only] = run.heredocs.as_slice()
        && line.trim() == only.word
    {
        if only.content.starts_with("#!") {
            let path = format!("{SCRIPTS}/{}", only.name);
            return (vec![path.clone()], Some((path, only.content.clone())));
        }
        return (stage.config.arguments(&Command::Shell(only.content.clone())), None);
    }
    let mut script = line.clone();
    for heredoc in &run.heredocs {
        script.push('\n');
        script.push_str(&heredoc.content);
        script.push_str(&heredoc.name);
    }
    (stage.config.arguments(&Command::Shell(script)), None)
}

fn prepare(
    stage: &Stage<'_>,
    mount: &MountOptions,
    hasher: &mut Sha256,
    secret_env: &mut Vec<String>,
) -> Result<Option<Prepared>, StepError> {
    let mut options: BTreeMap<&str, String> = BTreeMap::new();
    for (key, value) in &mount.options {
        options.insert(key, stage.expand(value)?);
    }
    hasher.update(format!("{} {}", mount.kind, options.len()));
    for (key, value) in &options {
        hasher.update(format!(" {key} {} {value}", value.len()));
    }
    let flag = |key: &str| -> Result<bool, StepError> {
        match options.get(key).map(String::as_str) {
            None => Ok(false),
            Some("true" | "1") => Ok(true),
            Some("false" | "0") => Ok(false),
            Some(other) => Err(StepError::Operand(format!("--mount: {key} is true or false, not {other:?}"))),
        }
    };
    let number = |key: &str, radix: u32, default: u32| match options.get(key) {
        None => Ok(default),
        Some(text) => u32::from_str_radix(text, radix)
            .map_err(|_| StepError::Operand(format!("--mount: {key}={text} is not a number"))),
    };
    let target = options.get("target").map(|path| stage.workdir().join(path).to_string_lossy().into_owned());
    let required = || {
        let target = target.clone().filter(|target| !normalized(Path::new(target)).as_os_str().is_empty());
        target.ok_or_else(|| StepError::Operand("--mount: the target is missing, or is the root itself".to_owned()))
    };
    let prepared = match mount.kind.as_str() {
        "bind" => {
            if flag("rw")? {
                return Err(StepError::Operand(
                    "--mount=type=bind,rw is not supported: what is written there is lost anyway; use a tmpfs, or COPY"
                        .to_owned(),
                ));
            }
            let layers = match options.get("from") {
                Some(from) => Some(stage.shared.layers_of(from, stage.index)?),
                None => None,
            };
            let path = normalized(Path::new(options.get("source").map_or("", String::as_str)));
            match &layers {
                Some(layers) => layers.iter().for_each(|layer| hasher.update(layer.diff_id.hex())),
                None => {
                    let view = &stage.shared.builder.context.view;
                    let selected = copy::select(view, "the build context", &path.to_string_lossy())?;
                    copy::hash(view, &selected, &Ignore::default(), hasher)?;
                }
            }
            Prepared { target: required()?, readonly: true, source: PreparedSource::Bind(layers, path) }
        }
        "cache" => {
            if options.contains_key("from") {
                return Err(StepError::Operand(
                    "--mount=type=cache,from= is not supported: fill it in a RUN step".to_owned(),
                ));
            }
            let target = required()?;
            let id = options.get("id").unwrap_or(&target);
            let id: String = Sha256::digest(id).iter().take(16).map(|byte| format!("{byte:02x}")).collect();
            let source = RunMountSource::Cache {
                id,
                uid: number("uid", 10, 0)?,
                gid: number("gid", 10, 0)?,
                mode: number("mode", 8, 0o755)?,
            };
            Prepared { target, readonly: flag("ro")?, source: PreparedSource::Ready(source) }
        }
        "tmpfs" => {
            let size_bytes = match options.get("size") {
                None => None,
                Some(text) => Some(text.parse().map_err(|_| {
                    StepError::Operand(format!("--mount=type=tmpfs,size={text}: give the size in bytes"))
                })?),
            };
            let source = RunMountSource::Tmpfs { size_bytes };
            Prepared { target: required()?, readonly: false, source: PreparedSource::Ready(source) }
        }
        _ => {
            let base = target
                .as_deref()
                .and_then(|path| Path::new(path).file_name())
                .map(|name| name.to_string_lossy().into_owned());
            let Some(id) = options.get("id").or(options.get("source")).cloned().or(base) else {
                return Err(StepError::Operand("--mount=type=secret needs an id or a target".to_owned()));
            };
            let Some(content) = stage.shared.builder.options.secrets.get(&id) else {
                if flag("required")? {
                    return Err(StepError::Operand(format!(
                        "the secret {id} is required: give it with --secret id={id},src=FILE"
                    )));
                }
                return Ok(None);
            };
            if let Some(name) = options.get("env") {
                secret_env.push(format!("{name}={}", String::from_utf8_lossy(content)));
                if target.is_none() {
                    return Ok(None);
                }
            }
            let source = RunMountSource::File {
                content: content.clone(),
                mode: number("mode", 8, 0o400)?,
                uid: number("uid", 10, 0)?,
                gid: number("gid", 10, 0)?,
            };
            let target = target.unwrap_or_else(|| format!("{SECRETS}/{id}"));
            Prepared { target, readonly: true, source: PreparedSource::Ready(source) }
        }
    };
    Ok(Some(prepared))
}

/// The files of a bind mount as a tar.
fn tree(stage: &Stage<'_>, layers: Option<&[Layer]>, path: &Path) -> Result<RunMountSource, StepError> {
    let view: Arc<View>;
    let view: &View = match layers {
        None => &stage.shared.builder.context.view,
        Some(layers) => {
            view = stage.shared.views.view(layers)?;
            &view
        }
    };
    let selected = copy::select(view, "the mount's source", &path.to_string_lossy())?;
    let mut changes = Changes::default();
    let mut inner = PathBuf::new();
    for one in &selected {
        for (at, node) in view.below(&one.path) {
            let relative = at.strip_prefix(&one.path).unwrap_or(at);
            if relative.as_os_str().is_empty() {
                if !node.is_directory() {
                    inner = PathBuf::from(at.file_name().unwrap_or_default());
                    changes.added.insert(inner.clone(), Arc::clone(node));
                }
                continue;
            }
            changes.added.insert(relative.to_owned(), Arc::clone(node));
        }
    }
    let scratch = stage.shared.builder.cache.scratch();
    let mut tar: File = tempfile::tempfile_in(scratch).map_err(StepError::Scratch)?;
    let mut writer = std::io::BufWriter::new(&mut tar);
    layer::write(&changes, None, &mut writer)?;
    writer.into_inner().map_err(|error| StepError::Scratch(error.into_error()))?;
    tar.rewind().map_err(StepError::Scratch)?;
    Ok(RunMountSource::Tree { tar, path: inner })
}

/// Drops what the guest's runtime left rather than the command: empty targets of mounts, and directories that are in the
/// upper layer for nothing but their time.
fn tidy(changes: &mut Changes, base: &View, targets: &[String]) {
    for target in targets {
        let mut path = normalized(Path::new(target));
        let mut first = true;
        while !path.as_os_str().is_empty() {
            let Some(node) = changes.added.get(&path) else { break };
            let empty = match &node.kind {
                Kind::Directory => !has_children(changes, &path),
                Kind::File { size, .. } => first && *size == 0,
                _ => false,
            };
            if !empty || base.get(&path).is_some() {
                break;
            }
            changes.added.remove(&path);
            changes.opaque.remove(&path);
            first = false;
            path.pop();
        }
    }
    // The deepest first: a directory may be left empty by this.
    let directories: Vec<PathBuf> =
        changes.added.iter().rev().filter(|(_, node)| node.is_directory()).map(|(path, _)| path.clone()).collect();
    for path in directories {
        let same = match (changes.added.get(&path), base.get(&path)) {
            (Some(new), Some(old)) => same_but_time(new, old),
            _ => false,
        };
        if same && !changes.opaque.contains(&path) && !has_children(changes, &path) {
            changes.added.remove(&path);
        }
    }
}

fn same_but_time(new: &Node, old: &Node) -> bool {
    old.is_directory() && (new.mode, new.uid, new.gid, &new.xattrs) == (old.mode, old.uid, old.gid, &old.xattrs)
}

fn has_children(changes: &Changes, path: &Path) -> bool {
    let child = |at: &PathBuf| at != path && at.starts_with(path);
    changes.added.range(path.to_owned()..).take(2).any(|(at, _)| child(at))
        || changes.removed.range(path.to_owned()..).take(2).any(child)
        || changes.opaque.range(path.to_owned()..).take(2).any(child)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leftovers_of_the_runtime_go() {
        let directory = |mode| Arc::new(Node { mtime_s: 9, ..Node::directory(mode) });
        let empty = Arc::new(Node {
            kind: Kind::File { size: 0, content: crate::tree::Content::Bytes(Arc::from([])) },
            ..Node::directory(0o644)
        });
        let mut base = View::default();
        for path in ["etc", "var", "opt"] {
            base.insert(Path::new(path), &directory(0o755));
        }
        let mut changes = Changes::default();
        for path in ["dev", "etc", "var", "opt", "root", "root/.cache", "root/.cache/pip", "kept"] {
            changes.added.insert(path.into(), directory(if path == "opt" { 0o700 } else { 0o755 }));
        }
        changes.added.insert("etc/resolv.conf".into(), Arc::clone(&empty));
        changes.added.insert("var/made".into(), empty);
        tidy(&mut changes, &base, &["/root/.cache/pip".to_owned(), "dev".to_owned(), "etc/resolv.conf".to_owned()]);
        let left: Vec<_> = changes.added.keys().map(|path| path.display().to_string()).collect();
        assert_eq!(left, ["kept", "opt", "var", "var/made"]);
    }
}
