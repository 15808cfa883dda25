//! Dockerfiles: from text to stages of instructions, after the Dockerfile reference. Nothing is expanded here: variables
//! get their values when a stage is built, through [`expand`]. What is wrong is reported with its line.
mod expand;
mod heredoc;
mod instruction;
mod lines;
mod words;

#[cfg(test)]
mod tests;

pub use expand::{ExpandError, Lookup, expand, expand_heredoc, expand_words};
pub use heredoc::Heredoc;
pub use instruction::{Command, Copy, CopySource, Healthcheck, Instruction, MountOptions, NetworkMode, Run};

use lines::LogicalLine;

/// The longest Dockerfile that is read, in bytes: far beyond any that people write, small beside the memory of a host.
pub const MAX_DOCKERFILE_BYTES: usize = 4 << 20;

/// What is wrong in a Dockerfile, where, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{file}:{line}: {message}{}{}", self.excerpt(), self.advice())]
pub struct ParseError {
    /// The file as the user named it.
    pub file: String,
    /// Line number, from 1; 0 when the file as a whole is meant.
    pub line: usize,
    /// The line itself.
    pub text: String,
    /// What is wrong.
    pub message: String,
    /// What to do about it; may be empty.
    pub help: String,
}

impl ParseError {
    fn excerpt(&self) -> String {
        if self.text.is_empty() {
            return String::new();
        }
        format!("\n  {} | {}", self.line, self.text)
    }

    fn advice(&self) -> String {
        if self.help.is_empty() {
            return String::new();
        }
        format!("\n  help: {}", self.help)
    }
}

/// What an instruction's parser says; the caller knows the line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Problem {
    pub(crate) message: String,
    pub(crate) help: String,
}

impl Problem {
    pub(crate) fn new(message: impl Into<String>, help: impl Into<String>) -> Self {
        Self { message: message.into(), help: help.into() }
    }
}

/// A parsed Dockerfile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dockerfile {
    /// The file as the user named it, for messages.
    pub file: String,
    /// The escape character: `\` or `` ` ``.
    pub escape: char,
    /// ARG instructions before the first FROM, in order, each name with its default if it has one.
    pub global_args: Vec<Located<(String, Option<String>)>>,
    /// At least one.
    pub stages: Vec<Stage>,
}

/// A thing with its place in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Located<T> {
    /// The line on which it begins, from 1.
    pub line: usize,
    /// The instruction as one line, continuations joined, for people and for the image's history.
    pub text: String,
    /// The thing.
    pub value: T,
}

/// A build stage: FROM and what follows up to the next one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stage {
    /// The FROM line.
    pub from: Located<From>,
    /// The instructions in order.
    pub instructions: Vec<Located<Instruction>>,
}

/// FROM's operands, unexpanded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct From {
    /// An image, an earlier stage's name, or `scratch`.
    pub image: String,
    /// `--platform`.
    pub platform: Option<String>,
    /// The stage's name, in lower case.
    pub name: Option<String>,
}

impl Dockerfile {
    /// Parses `text`; `file` is what messages call it.
    pub fn parse(file: &str, text: &str) -> Result<Self, ParseError> {
        let at = |line: usize, text: &str, problem: Problem| ParseError {
            file: file.to_owned(),
            line,
            text: text.to_owned(),
            message: problem.message,
            help: problem.help,
        };
        if text.len() > MAX_DOCKERFILE_BYTES {
            let message = format!("the file has {} bytes, more than {MAX_DOCKERFILE_BYTES}", text.len());
            return Err(at(0, "", Problem::new(message, "is this a Dockerfile? choose another with -f")));
        }
        let (escape, lines) = lines::read(text).map_err(|(line, text, problem)| at(line, &text, problem))?;
        let mut file_ = Dockerfile { file: file.to_owned(), escape, global_args: Vec::new(), stages: Vec::new() };
        for line in &lines {
            file_.add(line).map_err(|problem| at(line.line, &line.first, problem))?;
        }
        if file_.stages.is_empty() {
            return Err(at(
                0,
                "",
                Problem::new(
                    "there is no FROM, so nothing to build",
                    "begin with a line such as `FROM debian:12` or `FROM scratch`",
                ),
            ));
        }
        Ok(file_)
    }

    /// An error at an instruction of this file.
    pub fn error_at(&self, line: usize, text: &str, message: impl Into<String>, help: impl Into<String>) -> ParseError {
        ParseError { file: self.file.clone(), line, text: text.to_owned(), message: message.into(), help: help.into() }
    }

    fn add(&mut self, line: &LogicalLine) -> Result<(), Problem> {
        let located = |value| Located { line: line.line, text: line.text.clone(), value };
        let (keyword, rest) = lines::split_keyword(&line.text);
        if keyword.eq_ignore_ascii_case("FROM") {
            let from = instruction::from(rest, self.escape)?;
            if let Some(name) = &from.name
                && self.stages.iter().any(|stage| stage.from.value.name.as_ref() == Some(name))
            {
                return Err(Problem::new(
                    format!("a stage named {name} exists already"),
                    "give each stage its own name",
                ));
            }
            self.stages.push(Stage {
                from: Located { line: line.line, text: line.text.clone(), value: from },
                instructions: Vec::new(),
            });
            return Ok(());
        }
        let parsed = instruction::parse(keyword, rest, &line.heredocs, self.escape)?;
        match self.stages.last_mut() {
            Some(stage) => stage.instructions.push(located(parsed)),
            None => match parsed {
                Instruction::Arg(args) => {
                    for arg in args {
                        self.global_args.push(Located { line: line.line, text: line.text.clone(), value: arg });
                    }
                }
                _ => {
                    return Err(Problem::new(
                        format!("{} comes before the first FROM", keyword.to_uppercase()),
                        "only ARG, comments and parser directives may stand before FROM",
                    ));
                }
            },
        }
        Ok(())
    }
}

/// Parses the one instruction of an ONBUILD trigger, as base images carry it in their configuration.
pub fn parse_trigger(text: &str) -> Result<Instruction, ParseError> {
    let fail = |problem: Problem| ParseError {
        file: "ONBUILD trigger".to_owned(),
        line: 1,
        text: text.to_owned(),
        message: problem.message,
        help: problem.help,
    };
    let (_, lines) = lines::read(text).map_err(|(_, _, problem)| fail(problem))?;
    let [line] = lines.as_slice() else {
        return Err(fail(Problem::new("a trigger is exactly one instruction", "rebuild the base image")));
    };
    let (keyword, rest) = lines::split_keyword(&line.text);
    instruction::check_trigger(keyword).map_err(fail)?;
    instruction::parse(keyword, rest, &line.heredocs, '\\').map_err(fail)
}
