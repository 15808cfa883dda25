//! The instructions and their operands, still unexpanded.
use super::heredoc::Heredoc;
use super::words::{self, Flag};
use super::{From, Problem};

/// An instruction after FROM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Instruction {
    /// RUN.
    Run(Run),
    /// COPY and ADD.
    Copy(Copy),
    /// ENV: names and values.
    Env(Vec<(String, String)>),
    /// ARG: names and defaults.
    Arg(Vec<(String, Option<String>)>),
    /// WORKDIR.
    Workdir(String),
    /// USER.
    User(String),
    /// CMD.
    Cmd(Command),
    /// ENTRYPOINT.
    Entrypoint(Command),
    /// EXPOSE, to be expanded into words.
    Expose(String),
    /// VOLUME.
    Volume(Vec<String>),
    /// LABEL: names and values.
    Label(Vec<(String, String)>),
    /// STOPSIGNAL.
    StopSignal(String),
    /// SHELL.
    Shell(Vec<String>),
    /// HEALTHCHECK.
    Healthcheck(Healthcheck),
    /// ONBUILD: the trigger's text, checked.
    OnBuild(String),
    /// MAINTAINER.
    Maintainer(String),
}

/// The two forms of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// A JSON array: the arguments as they are.
    Exec(Vec<String>),
    /// A line for the shell.
    Shell(String),
}

/// RUN's operands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// What to run.
    pub command: Command,
    /// The heredocs that its line opens.
    pub heredocs: Vec<Heredoc>,
    /// `--mount`s.
    pub mounts: Vec<MountOptions>,
    /// `--network`.
    pub network: NetworkMode,
}

/// `--network` of RUN.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum NetworkMode {
    /// What the builder gives.
    #[default]
    Default,
    /// Nothing but a loopback interface.
    None,
    /// The host's: there is none in a guest, so it is as the default.
    Host,
}

/// `--mount` of RUN: its `key=value` pairs, keys checked and put into canonical form, values unexpanded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountOptions {
    /// bind, cache, tmpfs, secret or ssh.
    pub kind: String,
    /// In the order in which they stand.
    pub options: Vec<(String, String)>,
}

/// COPY's and ADD's operands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Copy {
    /// ADD rather than COPY.
    pub add: bool,
    /// What.
    pub sources: Vec<CopySource>,
    /// Where to.
    pub destination: String,
    /// `--from`.
    pub from: Option<String>,
    /// `--chown`.
    pub chown: Option<String>,
    /// `--chmod`.
    pub chmod: Option<String>,
    /// `--link`: what is copied does not depend on what is below, so links in the destination are not followed.
    pub link: bool,
    /// `--parents`: keep the sources' parent directories.
    pub parents: bool,
    /// `--exclude` patterns.
    pub exclude: Vec<String>,
    /// ADD's `--checksum`.
    pub checksum: Option<String>,
    /// ADD's `--unpack`.
    pub unpack: Option<bool>,
}

/// A source of COPY or ADD.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CopySource {
    /// A path or pattern.
    Path(String),
    /// A file given in the Dockerfile itself.
    Heredoc(Heredoc),
}

/// HEALTHCHECK's operands. Times are in nanoseconds, as images store them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Healthcheck {
    /// None: NONE, which switches a base image's check off.
    pub command: Option<Command>,
    /// `--interval`.
    pub interval_ns: Option<u64>,
    /// `--timeout`.
    pub timeout_ns: Option<u64>,
    /// `--start-period`.
    pub start_period_ns: Option<u64>,
    /// `--start-interval`.
    pub start_interval_ns: Option<u64>,
    /// `--retries`.
    pub retries: Option<u32>,
}

const KEYWORDS: [&str; 18] = [
    "FROM",
    "RUN",
    "COPY",
    "ADD",
    "ENV",
    "ARG",
    "WORKDIR",
    "USER",
    "CMD",
    "ENTRYPOINT",
    "EXPOSE",
    "VOLUME",
    "LABEL",
    "STOPSIGNAL",
    "SHELL",
    "HEALTHCHECK",
    "ONBUILD",
    "MAINTAINER",
];

/// Parses an instruction other than FROM.
pub(super) fn parse(keyword: &str, rest: &str, heredocs: &[Heredoc], escape: char) -> Result<Instruction, Problem> {
    let name = keyword.to_ascii_uppercase();
    if !KEYWORDS.contains(&name.as_str()) {
        return Err(unknown(keyword));
    }
    let (flags, rest) = if ["RUN", "COPY", "ADD", "HEALTHCHECK"].contains(&name.as_str()) {
        words::flags(rest, escape)
    } else {
        (Vec::new(), rest)
    };
    if rest.is_empty() {
        return Err(Problem::new(format!("{name} needs at least one operand"), ""));
    }
    Ok(match name.as_str() {
        "RUN" => Instruction::Run(run(flags, rest, heredocs)?),
        "COPY" | "ADD" => Instruction::Copy(copy(name == "ADD", flags, rest, heredocs, escape)?),
        "ENV" => Instruction::Env(words::pairs(rest, "ENV", escape)?),
        "LABEL" => Instruction::Label(words::pairs(rest, "LABEL", escape)?),
        "ARG" => Instruction::Arg(args(rest, escape)?),
        "WORKDIR" => Instruction::Workdir(rest.to_owned()),
        "USER" => Instruction::User(rest.to_owned()),
        "CMD" => Instruction::Cmd(command(rest)),
        "ENTRYPOINT" => Instruction::Entrypoint(command(rest)),
        "EXPOSE" => Instruction::Expose(rest.to_owned()),
        "VOLUME" => {
            let paths = words::json_strings(rest).unwrap_or_else(|| words::split_plain(rest));
            if paths.iter().any(|path| path.trim().is_empty()) {
                return Err(Problem::new("VOLUME has an empty path", "name a directory"));
            }
            Instruction::Volume(paths)
        }
        "STOPSIGNAL" => Instruction::StopSignal(rest.to_owned()),
        "SHELL" => match words::json_strings(rest) {
            Some(argv) if !argv.is_empty() => Instruction::Shell(argv),
            _ => {
                return Err(Problem::new(
                    "SHELL takes a JSON array of strings",
                    "for example SHELL [\"/bin/bash\", \"-c\"]",
                ));
            }
        },
        "HEALTHCHECK" => Instruction::Healthcheck(healthcheck(flags, rest)?),
        "MAINTAINER" => Instruction::Maintainer(rest.to_owned()),
        // ONBUILD; FROM is not parsed here.
        _ => {
            let (inner, operands) = super::lines::split_keyword(rest);
            check_trigger(inner)?;
            parse(inner, operands, heredocs, escape)?;
            let mut text = rest.to_owned();
            for heredoc in heredocs {
                text.push('\n');
                text.push_str(&heredoc.content);
                text.push_str(&heredoc.name);
            }
            Instruction::OnBuild(text)
        }
    })
}

/// Checks that an instruction may stand after ONBUILD.
pub(super) fn check_trigger(keyword: &str) -> Result<(), Problem> {
    for refused in ["ONBUILD", "FROM", "MAINTAINER"] {
        if keyword.eq_ignore_ascii_case(refused) {
            return Err(Problem::new(format!("{refused} cannot be a trigger of ONBUILD"), "use any other instruction"));
        }
    }
    Ok(())
}

fn unknown(keyword: &str) -> Problem {
    let upper = keyword.to_ascii_uppercase();
    let near = KEYWORDS.iter().map(|known| (distance(&upper, known), known)).min();
    let help = match near {
        Some((1..=2, known)) => format!("did you mean {known}?"),
        _ => format!("the instructions are {}", KEYWORDS.join(", ")),
    };
    let shown: String = keyword.chars().take(40).collect();
    Problem::new(format!("unknown instruction {shown}"), help)
}

/// Edits between two short words (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().take(32).enumerate() {
        let mut previous = i;
        let mut left = i + 1;
        for (cell, y) in row.iter_mut().skip(1).zip(&b) {
            let best = (previous + usize::from(x != *y)).min(left + 1).min(*cell + 1);
            previous = *cell;
            *cell = best;
            left = best;
        }
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
    }
    row.last().copied().unwrap_or(usize::MAX)
}

/// FROM's operands.
pub(super) fn from(rest: &str, escape: char) -> Result<From, Problem> {
    let (flags, rest) = words::flags(rest, escape);
    let mut platform = None;
    for flag in flags {
        match flag.name.as_str() {
            "platform" => platform = Some(flag.required()?),
            _ => return Err(unknown_flag("FROM", &flag, "--platform")),
        }
    }
    let operands = words::split_plain(rest);
    let (image, name) = match operands.as_slice() {
        [image] => (image, None),
        [image, keyword, name] if keyword.eq_ignore_ascii_case("as") => (image, Some(name)),
        _ => {
            return Err(Problem::new(
                "FROM takes an image, and AS with a name if it is to have one",
                "write FROM image AS name",
            ));
        }
    };
    let name = name.map(|name| name.to_ascii_lowercase());
    if let Some(name) = &name {
        let mut chars = name.chars();
        let sound = chars.next().is_some_and(|c| c.is_ascii_lowercase())
            && chars.all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
        if !sound {
            return Err(Problem::new(
                format!("{name:?} cannot name a stage"),
                "a name begins with a letter; letters, digits, - _ and . follow",
            ));
        }
    }
    Ok(From { image: image.clone(), platform, name })
}

fn unknown_flag(keyword: &str, flag: &Flag, known: &str) -> Problem {
    Problem::new(format!("{keyword} has no flag --{}", flag.name), format!("it has {known}"))
}

fn command(rest: &str) -> Command {
    match words::json_strings(rest) {
        Some(argv) => Command::Exec(argv),
        None => Command::Shell(rest.to_owned()),
    }
}

fn run(flags: Vec<Flag>, rest: &str, heredocs: &[Heredoc]) -> Result<Run, Problem> {
    let mut mounts = Vec::new();
    let mut network = NetworkMode::Default;
    for flag in flags {
        match flag.name.as_str() {
            "mount" => mounts.push(mount(&flag.required()?)?),
            "network" => {
                network = match flag.required()?.as_str() {
                    "default" => NetworkMode::Default,
                    "none" => NetworkMode::None,
                    "host" => NetworkMode::Host,
                    other => {
                        return Err(Problem::new(
                            format!("--network={other}: there is no such network"),
                            "use default or none",
                        ));
                    }
                }
            }
            // Every RUN has a kernel of its own: there is nothing to open or to close here.
            "security" => {
                flag.required()?;
            }
            _ => {
                return Err(unknown_flag("RUN", &flag, "--mount, --network and --security"));
            }
        }
    }
    let command = command(rest);
    if let Command::Exec(argv) = &command
        && argv.is_empty()
    {
        return Err(Problem::new("RUN [] runs nothing", "name a program"));
    }
    Ok(Run { command, heredocs: heredocs.to_vec(), mounts, network })
}

fn mount(text: &str) -> Result<MountOptions, Problem> {
    let mut kind = "bind".to_owned();
    let mut options: Vec<(String, String)> = Vec::new();
    for part in text.split(',') {
        let part = part.trim().trim_matches('"');
        let (key, value) = match part.split_once('=') {
            Some((key, value)) => (key.to_ascii_lowercase(), value.to_owned()),
            None => (part.to_ascii_lowercase(), "true".to_owned()),
        };
        let canonical = match key.as_str() {
            "type" => {
                kind = value;
                continue;
            }
            "target" | "dst" | "destination" => "target",
            "source" | "src" => "source",
            "from" => "from",
            "rw" | "readwrite" => "rw",
            "ro" | "readonly" => "ro",
            "id" => "id",
            "sharing" => "sharing",
            "mode" => "mode",
            "uid" => "uid",
            "gid" => "gid",
            "required" => "required",
            "size" => "size",
            "env" => "env",
            _ => {
                return Err(Problem::new(
                    format!("--mount has no option {key:?}"),
                    "it has type, target, source, from, ro, rw, id, sharing, mode, uid, gid, required, size and env",
                ));
            }
        };
        options.push((canonical.to_owned(), value));
    }
    if !["bind", "cache", "tmpfs", "secret", "ssh"].contains(&kind.as_str()) {
        return Err(Problem::new(
            format!("--mount=type={kind}: there is no such type"),
            "the types are bind, cache, tmpfs and secret",
        ));
    }
    if kind == "ssh" {
        return Err(Problem::new(
            "--mount=type=ssh is not supported: a guest has no way to the host's agent",
            "use a deploy key with --mount=type=secret",
        ));
    }
    let has_target = options.iter().any(|(key, _)| key == "target" || key == "env");
    if !has_target && kind != "secret" {
        return Err(Problem::new(format!("--mount=type={kind} has no target"), "add target=/path"));
    }
    Ok(MountOptions { kind, options })
}

fn copy(add: bool, flags: Vec<Flag>, rest: &str, heredocs: &[Heredoc], escape: char) -> Result<Copy, Problem> {
    let keyword = if add { "ADD" } else { "COPY" };
    let mut copy = Copy {
        add,
        sources: Vec::new(),
        destination: String::new(),
        from: None,
        chown: None,
        chmod: None,
        link: false,
        parents: false,
        exclude: Vec::new(),
        checksum: None,
        unpack: None,
    };
    for flag in flags {
        match (flag.name.as_str(), add) {
            ("chown", _) => copy.chown = Some(flag.required()?),
            ("chmod", _) => copy.chmod = Some(flag.required()?),
            ("link", _) => copy.link = flag.switch()?,
            ("exclude", _) => copy.exclude.push(flag.required()?),
            ("from", false) => copy.from = Some(flag.required()?),
            ("parents", false) => copy.parents = flag.switch()?,
            ("checksum", true) => copy.checksum = Some(flag.required()?),
            ("unpack", true) => copy.unpack = Some(flag.switch()?),
            ("keep-git-dir", true) => {
                flag.switch()?;
            }
            _ => {
                let known = if add {
                    "--chown, --chmod, --link, --exclude, --checksum, --unpack and --keep-git-dir"
                } else {
                    "--from, --chown, --chmod, --link, --parents and --exclude"
                };
                return Err(unknown_flag(keyword, &flag, known));
            }
        }
    }
    let mut operands = match words::json_strings(rest) {
        Some(operands) => operands,
        None if heredocs.is_empty() => words::split_plain(rest),
        None => words::split_quoted(rest, escape),
    };
    let destination = operands.pop();
    let Some(destination) = destination.filter(|_| !operands.is_empty()) else {
        return Err(Problem::new(
            format!("{keyword} needs a source and a destination"),
            format!("write {keyword} SOURCE... DESTINATION"),
        ));
    };
    let mut bodies = heredocs.iter();
    for operand in operands {
        let source = match super::heredoc::parse_word(&operand) {
            Some(_) => match bodies.next() {
                Some(body) if body.word == operand => CopySource::Heredoc(body.clone()),
                _ => {
                    return Err(Problem::new(
                        format!("the heredoc {operand} has no content"),
                        "write its content on the lines that follow",
                    ));
                }
            },
            None => CopySource::Path(operand),
        };
        copy.sources.push(source);
    }
    copy.destination = destination;
    if copy.from.is_some() && copy.sources.iter().any(|source| matches!(source, CopySource::Heredoc(_))) {
        return Err(Problem::new("a heredoc cannot be copied --from elsewhere", "use two COPY instructions"));
    }
    Ok(copy)
}

fn args(rest: &str, escape: char) -> Result<Vec<(String, Option<String>)>, Problem> {
    words::split_quoted(rest, escape)
        .into_iter()
        .map(|word| {
            let (name, default) = match word.split_once('=') {
                Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
                None => (word, None),
            };
            if name.is_empty() || name.contains(['"', '\'', '$']) {
                return Err(Problem::new(format!("{name:?} cannot name an argument"), "write ARG name=default"));
            }
            Ok((name, default))
        })
        .collect()
}

fn healthcheck(flags: Vec<Flag>, rest: &str) -> Result<Healthcheck, Problem> {
    let mut check = Healthcheck::default();
    for flag in flags {
        let name = flag.name.clone();
        match name.as_str() {
            "interval" => check.interval_ns = Some(duration(&name, &flag.required()?)?),
            "timeout" => check.timeout_ns = Some(duration(&name, &flag.required()?)?),
            "start-period" => check.start_period_ns = Some(duration(&name, &flag.required()?)?),
            "start-interval" => check.start_interval_ns = Some(duration(&name, &flag.required()?)?),
            "retries" => {
                let value = flag.required()?;
                check.retries = Some(
                    value.parse().map_err(|_| Problem::new(format!("--retries={value} is not a whole number"), ""))?,
                );
            }
            _ => {
                let known = "--interval, --timeout, --start-period, --start-interval and --retries";
                return Err(unknown_flag("HEALTHCHECK", &flag, known));
            }
        }
    }
    let (kind, operands) = super::lines::split_keyword(rest);
    if kind.eq_ignore_ascii_case("NONE") && operands.is_empty() {
        return Ok(Healthcheck::default());
    }
    if !kind.eq_ignore_ascii_case("CMD") || operands.is_empty() {
        return Err(Problem::new("HEALTHCHECK takes NONE, or CMD and a command", "write HEALTHCHECK CMD command"));
    }
    check.command = Some(command(operands));
    Ok(check)
}

/// Reads a duration as Go writes it (`1m30s`, `500ms`), in nanoseconds.
fn duration(name: &str, text: &str) -> Result<u64, Problem> {
    let wrong = || Problem::new(format!("--{name}={text} is not a duration"), "write it as 30s, 1m30s or 500ms");
    let mut rest = text;
    let mut total = 0f64;
    if rest.is_empty() {
        return Err(wrong());
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !(c.is_ascii_digit() || c == '.')).ok_or_else(wrong)?;
        let (number, after) = rest.split_at(digits);
        let letters = after.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(after.len());
        let (unit, after) = after.split_at(letters);
        let factor = match unit {
            "ns" => 1.0,
            "us" | "µs" | "μs" => 1e3,
            "ms" => 1e6,
            "s" => 1e9,
            "m" => 60e9,
            "h" => 3600e9,
            _ => return Err(wrong()),
        };
        total += number.parse::<f64>().map_err(|_| wrong())? * factor;
        rest = after;
    }
    // Beyond this a JSON number of nanoseconds is no i64 any more.
    if !(0.0..9.0e18).contains(&total) {
        return Err(wrong());
    }
    Ok(total as u64)
}
