//! From bytes to logical lines: parser directives, comments, continuations, heredoc bodies.
use super::Problem;
use super::heredoc::{self, Heredoc};

/// An instruction as one line.
#[derive(Debug)]
pub(crate) struct LogicalLine {
    /// Where it begins, from 1.
    pub(crate) line: usize,
    /// The first physical line, for messages.
    pub(crate) first: String,
    /// All of it, continuations joined.
    pub(crate) text: String,
    /// The heredocs that it opens.
    pub(crate) heredocs: Vec<Heredoc>,
}

type LineProblem = (usize, String, Problem);

/// Splits a Dockerfile. Gives the escape character and the logical lines.
pub(crate) fn read(text: &str) -> Result<(char, Vec<LogicalLine>), LineProblem> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let lines: Vec<&str> = text.split('\n').map(|line| line.strip_suffix('\r').unwrap_or(line)).collect();
    let escape = directives(&lines)?;
    let mut result = Vec::new();
    let mut next = 0;
    while let Some(first) = lines.get(next) {
        let start = next;
        next += 1;
        let trimmed = first.trim_start();
        if trimmed.is_empty() || trimmed.starts_with('#') {
            continue;
        }
        let (mut joined, mut continues) = cut_continuation(trimmed, escape);
        while continues {
            let Some(line) = lines.get(next) else { break };
            next += 1;
            let trimmed = line.trim_start();
            if trimmed.starts_with('#') || trimmed.is_empty() {
                continue;
            }
            let (part, more) = cut_continuation(line, escape);
            joined.push_str(&part);
            continues = more;
        }
        let joined = joined.trim_end().to_owned();
        if joined.is_empty() {
            continue;
        }
        let mut heredocs = Vec::new();
        if may_have_heredocs(&joined) {
            for mut heredoc in heredoc::opened_by(&joined, escape) {
                next = body(&mut heredoc, &lines, next).map_err(|problem| (start + 1, trimmed.to_owned(), problem))?;
                heredocs.push(heredoc);
            }
        }
        result.push(LogicalLine { line: start + 1, first: trimmed.to_owned(), text: joined, heredocs });
    }
    Ok((escape, result))
}

/// The instruction's keyword and what follows it.
pub(crate) fn split_keyword(text: &str) -> (&str, &str) {
    match text.split_once(char::is_whitespace) {
        Some((keyword, rest)) => (keyword, rest.trim()),
        None => (text, ""),
    }
}

fn may_have_heredocs(text: &str) -> bool {
    let (mut keyword, mut rest) = split_keyword(text);
    if keyword.eq_ignore_ascii_case("ONBUILD") {
        (keyword, rest) = split_keyword(rest);
    }
    rest.contains("<<") && ["RUN", "COPY", "ADD"].iter().any(|name| keyword.eq_ignore_ascii_case(name))
}

/// Reads a heredoc's body from `lines[next..]`; gives the line after it.
fn body(heredoc: &mut Heredoc, lines: &[&str], mut next: usize) -> Result<usize, Problem> {
    loop {
        let Some(line) = lines.get(next) else {
            return Err(Problem::new(
                format!("the heredoc {} never ends", heredoc.name),
                format!("end it with a line that holds {} and nothing else", heredoc.name),
            ));
        };
        next += 1;
        let line = if heredoc.chomp { line.trim_start_matches('\t') } else { line };
        if line == heredoc.name {
            return Ok(next);
        }
        heredoc.content.push_str(line);
        heredoc.content.push('\n');
    }
}

/// Cuts a trailing escape character (not itself escaped), and says whether there was one.
fn cut_continuation(line: &str, escape: char) -> (String, bool) {
    let end = line.trim_end_matches([' ', '\t']);
    if let Some(before) = end.strip_suffix(escape)
        && !before.ends_with(escape)
    {
        return (before.to_owned(), true);
    }
    (line.to_owned(), false)
}

/// Reads `# directive=value` lines at the top; gives the escape character.
fn directives(lines: &[&str]) -> Result<char, LineProblem> {
    let mut escape = None;
    let mut seen: Vec<String> = Vec::new();
    for (index, line) in lines.iter().enumerate() {
        let Some((key, value)) = directive(line) else {
            break;
        };
        let problem = |message: String, help: &str| (index + 1, (*line).to_owned(), Problem::new(message, help));
        if seen.contains(&key) {
            return Err(problem(format!("the parser directive {key} stands twice"), "keep one of them"));
        }
        match key.as_str() {
            "escape" => {
                escape = Some(match value {
                    "\\" => '\\',
                    "`" => '`',
                    other => {
                        return Err(problem(format!("{other:?} cannot be the escape character"), "use \\ or `"));
                    }
                });
            }
            // Names a BuildKit front end and its checks: this builder is its own.
            "syntax" | "check" => {}
            _ => break,
        }
        seen.push(key);
    }
    Ok(escape.unwrap_or('\\'))
}

fn directive(line: &str) -> Option<(String, &str)> {
    let (key, value) = line.trim_start().strip_prefix('#')?.split_once('=')?;
    let key = key.trim();
    if key.is_empty() || !key.chars().all(|c| c.is_ascii_alphanumeric()) {
        return None;
    }
    Some((key.to_ascii_lowercase(), value.trim()))
}
