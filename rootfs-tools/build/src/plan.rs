//! Stages as a graph: what each begins from, what it needs, and which of them the target needs at all.
use crate::dockerfile::{Dockerfile, Instruction, Located, Lookup, ParseError, expand};
use std::collections::{BTreeMap, BTreeSet};

/// What a stage begins from, or what a `--from` names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Base {
    /// Nothing.
    Scratch,
    /// An earlier stage, by its index.
    Stage(usize),
    /// An image, by its reference.
    Image(String),
}

/// A stage in the plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedStage {
    /// Its index in the file.
    pub index: usize,
    /// Its name, or its index.
    pub name: String,
    /// What it begins from.
    pub base: Base,
    /// FROM's `--platform`, expanded.
    pub platform: Option<String>,
    /// The stages that must be built before.
    pub needs: BTreeSet<usize>,
}

/// What is to be built.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The stages that the target needs, by index.
    pub stages: BTreeMap<usize, PlannedStage>,
    /// The target's index.
    pub target: usize,
    /// Values of the arguments before the first FROM.
    pub global_args: BTreeMap<String, String>,
}

/// Arguments that are set in every build, for linux/amd64, which is the only platform.
pub const PLATFORM_ARGS: [(&str, &str); 8] = [
    ("TARGETPLATFORM", "linux/amd64"),
    ("TARGETOS", "linux"),
    ("TARGETARCH", "amd64"),
    ("TARGETVARIANT", ""),
    ("BUILDPLATFORM", "linux/amd64"),
    ("BUILDOS", "linux"),
    ("BUILDARCH", "amd64"),
    ("BUILDVARIANT", ""),
];

/// Whether a platform is one that is built here.
pub fn is_supported(platform: &str) -> bool {
    let mut parts = platform.split('/');
    parts.next() == Some("linux") && matches!(parts.next(), Some("amd64" | "x86_64"))
}

/// Finds a stage among those before `before` by name or index.
pub fn find_stage(file: &Dockerfile, name: &str, before: usize) -> Option<usize> {
    let lower = name.to_ascii_lowercase();
    let earlier = file.stages.iter().take(before);
    earlier
        .enumerate()
        .filter(|(_, stage)| stage.from.value.name.as_ref() == Some(&lower))
        .map(|(index, _)| index)
        .next()
        .or_else(|| name.parse().ok().filter(|index| *index < before))
}

/// Plans a build of `target` (the last stage if None).
pub fn plan(
    file: &Dockerfile,
    target: Option<&str>,
    build_args: &BTreeMap<String, String>,
) -> Result<Plan, ParseError> {
    let global_args = global_args(file, build_args)?;
    let lookup = |name: &str| {
        global_args
            .get(name)
            .cloned()
            .or_else(|| PLATFORM_ARGS.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned()))
    };
    let count = file.stages.len();
    let target = match target {
        None => count.saturating_sub(1),
        Some(name) => find_stage(file, name, count).ok_or_else(|| {
            let names: Vec<&str> = file.stages.iter().filter_map(|stage| stage.from.value.name.as_deref()).collect();
            file.error_at(
                0,
                "",
                format!("there is no stage {name:?}"),
                if names.is_empty() {
                    "no stage has a name: add AS name to a FROM".to_owned()
                } else {
                    format!("the stages are {}", names.join(", "))
                },
            )
        })?,
    };
    let mut all = Vec::new();
    for index in 0..count {
        all.push(stage(file, index, &lookup)?);
    }
    let mut stages = BTreeMap::new();
    let mut wanted = vec![target];
    while let Some(index) = wanted.pop() {
        if stages.contains_key(&index) {
            continue;
        }
        if let Some(found) = all.get(index) {
            wanted.extend(&found.needs);
            stages.insert(index, found.clone());
        }
    }
    for planned in stages.values() {
        if let Some(platform) = &planned.platform
            && !is_supported(platform)
            && let Some(stage) = file.stages.get(planned.index)
        {
            return Err(file.error_at(
                stage.from.line,
                &stage.from.text,
                format!("the platform {platform} cannot be built here"),
                "guests run linux/amd64 only",
            ));
        }
    }
    Ok(Plan { stages, target, global_args })
}

fn global_args(
    file: &Dockerfile,
    build_args: &BTreeMap<String, String>,
) -> Result<BTreeMap<String, String>, ParseError> {
    let mut values: BTreeMap<String, String> = BTreeMap::new();
    for arg in &file.global_args {
        let (name, default) = &arg.value;
        let value = match (build_args.get(name), default) {
            (Some(given), _) => Some(given.clone()),
            (None, Some(default)) => {
                let lookup = |name: &str| values.get(name).cloned();
                Some(expand_at(file, arg, default, &lookup)?)
            }
            (None, None) => None,
        };
        if let Some(value) = value {
            values.insert(name.clone(), value);
        }
    }
    Ok(values)
}

fn stage(file: &Dockerfile, index: usize, lookup: Lookup<'_>) -> Result<PlannedStage, ParseError> {
    let Some(stage) = file.stages.get(index) else {
        return Err(file.error_at(0, "", "there is no such stage", ""));
    };
    let from = &stage.from;
    let image = expand_at(file, from, &from.value.image, lookup)?;
    if image.is_empty() {
        return Err(file.error_at(
            from.line,
            &from.text,
            format!("{} expands to nothing", from.value.image),
            "give the argument a default before FROM, or a value with --build-arg",
        ));
    }
    let base = if image == "scratch" {
        Base::Scratch
    } else {
        match file
            .stages
            .iter()
            .take(index)
            .position(|earlier| earlier.from.value.name.as_deref() == Some(image.to_ascii_lowercase().as_str()))
        {
            Some(earlier) => Base::Stage(earlier),
            None => Base::Image(image),
        }
    };
    let platform = match &from.value.platform {
        Some(platform) => Some(expand_at(file, from, platform, lookup)?),
        None => None,
    };
    let mut needs = BTreeSet::new();
    if let Base::Stage(earlier) = base {
        needs.insert(earlier);
    }
    for instruction in &stage.instructions {
        for name in sources_of(&instruction.value) {
            if let Some(earlier) = find_stage(file, name, index) {
                needs.insert(earlier);
            } else if find_stage(file, name, file.stages.len()).is_some() {
                return Err(file.error_at(
                    instruction.line,
                    &instruction.text,
                    format!("the stage {name} comes later in the file"),
                    "move it before this one",
                ));
            }
        }
    }
    let name = from.value.name.clone().unwrap_or_else(|| index.to_string());
    Ok(PlannedStage { index, name, base, platform, needs })
}

/// What an instruction takes from elsewhere.
fn sources_of(instruction: &Instruction) -> Vec<&str> {
    match instruction {
        Instruction::Copy(copy) => copy.from.as_deref().into_iter().collect(),
        Instruction::Run(run) => {
            let options = run.mounts.iter().flat_map(|mount| &mount.options);
            options.filter(|(key, _)| key == "from").map(|(_, value)| value.as_str()).collect()
        }
        _ => Vec::new(),
    }
}

fn expand_at<T>(file: &Dockerfile, at: &Located<T>, text: &str, lookup: Lookup<'_>) -> Result<String, ParseError> {
    expand(text, file.escape, lookup).map_err(|error| file.error_at(at.line, &at.text, error.to_string(), ""))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const TEXT: &str = "ARG V=12\nARG W=${V}.1\nFROM debian:$W AS base\nFROM base AS build\nRUN make\nFROM other AS unused\n\
        FROM --platform=$BUILDPLATFORM scratch\nCOPY --from=build /a /\nCOPY --from=img:1 /b /\nRUN --mount=type=bind,from=base,target=/x true\n";

    fn planned(target: Option<&str>, args: &[(&str, &str)]) -> Plan {
        let args = args.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        plan(&Dockerfile::parse("D", TEXT).unwrap(), target, &args).unwrap()
    }

    #[test]
    fn only_what_is_needed() {
        let plan = planned(None, &[]);
        assert_eq!(plan.stages.keys().copied().collect::<Vec<_>>(), [0, 1, 3]);
        assert_eq!(plan.stages[&0].base, Base::Image("debian:12.1".into()));
        assert_eq!(plan.stages[&1].base, Base::Stage(0));
        assert_eq!(plan.stages[&3].needs, [0, 1].into());
        assert_eq!(planned(Some("BASE"), &[]).stages.len(), 1);
        assert_eq!(planned(Some("1"), &[]).stages.len(), 2);
        assert_eq!(planned(None, &[("V", "13")]).stages[&0].base, Base::Image("debian:13.1".into()));
    }

    #[test]
    fn errors() {
        let fail = |text: &str, target| {
            plan(&Dockerfile::parse("D", text).unwrap(), target, &BTreeMap::new()).unwrap_err().to_string()
        };
        assert!(fail(TEXT, Some("nope")).contains("base, build, unused"));
        assert!(fail("FROM $X", None).starts_with("D:1: $X expands to nothing"));
        assert!(fail("FROM a\nCOPY --from=late a b\nFROM b AS late", None).contains("comes later"));
        assert!(fail("FROM --platform=linux/arm64 a", None).contains("linux/arm64"));
    }
}
