//! Variable expansion and quote removal, with the modifiers of the Dockerfile reference:
//! `$v ${v} ${v:-w} ${v-w} ${v:+w} ${v+w} ${v:?w} ${v?w} ${v#p} ${v##p} ${v%p} ${v%%p} ${v/p/r} ${v//p/r}`.
use std::iter::Peekable;
use std::str::Chars;

/// How deeply `${a:-${b:-...}}` may nest.
const MAX_NESTING: usize = 32;
/// How long an expanded word may grow, in bytes.
const MAX_EXPANDED_BYTES: usize = 1 << 20;

/// Where values come from.
pub type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Why a word cannot be expanded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExpandError {
    /// A quote is never closed.
    #[error("the quote {0} is never closed: close it, or put the escape character before it")]
    Quote(char),
    /// `${` is never closed.
    #[error("${{ is never closed: end it with }}")]
    Brace,
    /// The name between the braces is none.
    #[error("${{{0}}} does not begin with a variable's name")]
    Name(String),
    /// An unknown modifier.
    #[error("${{{name}{modifier}...}}: there is no such modifier; there are :- - :+ + :? ? # ## % %% / //")]
    Modifier {
        /// The variable.
        name: String,
        /// What follows it.
        modifier: String,
    },
    /// `${v:?message}` and the variable is not set.
    #[error("{name}: {message}")]
    Required {
        /// The variable.
        name: String,
        /// The message, or that it is not set.
        message: String,
    },
    /// Too deep, or too long.
    #[error("the expansion is nested too deeply or grows beyond {MAX_EXPANDED_BYTES} bytes")]
    TooLarge,
}

/// Expands variables in `word` and removes its quotes and escapes.
pub fn expand(word: &str, escape: char, lookup: Lookup<'_>) -> Result<String, ExpandError> {
    let words = run(word, escape, lookup, Mode::Word)?;
    Ok(words.into_iter().next().unwrap_or_default())
}

/// Expands and splits at white space outside quotes, that of expanded values included.
pub fn expand_words(text: &str, escape: char, lookup: Lookup<'_>) -> Result<Vec<String>, ExpandError> {
    run(text, escape, lookup, Mode::Words)
}

/// Expands variables in a heredoc's content: quotes stay, and only `$`, the escape character and newline can be escaped.
pub fn expand_heredoc(text: &str, escape: char, lookup: Lookup<'_>) -> Result<String, ExpandError> {
    let words = run(text, escape, lookup, Mode::Heredoc)?;
    Ok(words.into_iter().next().unwrap_or_default())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Word,
    Words,
    Heredoc,
}

fn run(text: &str, escape: char, lookup: Lookup<'_>, mode: Mode) -> Result<Vec<String>, ExpandError> {
    let mut expander = Expander { chars: text.chars().peekable(), escape, lookup, depth: 0 };
    let mut output = Output { mode, ..Output::default() };
    expander.until(&mut output, None)?;
    Ok(output.finish())
}

struct Output {
    mode: Mode,
    words: Vec<String>,
    word: String,
    /// Something was there, be it an empty pair of quotes.
    present: bool,
}

impl Default for Output {
    fn default() -> Self {
        Self { mode: Mode::Word, words: Vec::new(), word: String::new(), present: false }
    }
}

impl Output {
    fn literal(&mut self, text: &str) -> Result<(), ExpandError> {
        if self.word.len() + text.len() > MAX_EXPANDED_BYTES {
            return Err(ExpandError::TooLarge);
        }
        self.present = true;
        self.word.push_str(text);
        Ok(())
    }

    fn character(&mut self, c: char) -> Result<(), ExpandError> {
        self.literal(c.encode_utf8(&mut [0; 4]))
    }

    /// Text outside quotes: splits words.
    fn unquoted(&mut self, text: &str) -> Result<(), ExpandError> {
        if self.mode != Mode::Words {
            return self.literal(text);
        }
        for c in text.chars() {
            if c.is_whitespace() {
                self.end_word();
            } else {
                self.character(c)?;
            }
        }
        Ok(())
    }

    fn end_word(&mut self) {
        if self.present {
            self.words.push(std::mem::take(&mut self.word));
            self.present = false;
        }
    }

    fn finish(mut self) -> Vec<String> {
        self.end_word();
        self.words
    }
}

struct Expander<'a> {
    chars: Peekable<Chars<'a>>,
    escape: char,
    lookup: Lookup<'a>,
    depth: usize,
}

impl Expander<'_> {
    /// Reads to the end, or to `stop` outside quotes, which is consumed.
    fn until(&mut self, out: &mut Output, stop: Option<char>) -> Result<(), ExpandError> {
        while let Some(c) = self.chars.next() {
            if Some(c) == stop {
                return Ok(());
            }
            match c {
                '\'' if out.mode != Mode::Heredoc => self.single_quoted(out)?,
                '"' if out.mode != Mode::Heredoc => self.double_quoted(out)?,
                '$' => {
                    let value = self.dollar()?;
                    out.unquoted(&value)?;
                }
                c if c == self.escape => match (out.mode, self.chars.peek().copied()) {
                    (Mode::Heredoc, Some(next)) if next == '$' || next == self.escape => {
                        self.chars.next();
                        out.character(next)?;
                    }
                    (Mode::Heredoc, Some('\n')) => {
                        self.chars.next();
                    }
                    (Mode::Heredoc, _) => out.character(c)?,
                    (_, Some(next)) => {
                        self.chars.next();
                        out.character(next)?;
                    }
                    (_, None) => out.character(c)?,
                },
                c => out.unquoted(c.encode_utf8(&mut [0; 4]))?,
            }
        }
        match stop {
            Some(_) => Err(ExpandError::Brace),
            None => Ok(()),
        }
    }

    fn single_quoted(&mut self, out: &mut Output) -> Result<(), ExpandError> {
        out.present = true;
        for c in self.chars.by_ref() {
            if c == '\'' {
                return Ok(());
            }
            out.character(c)?;
        }
        Err(ExpandError::Quote('\''))
    }

    fn double_quoted(&mut self, out: &mut Output) -> Result<(), ExpandError> {
        out.present = true;
        while let Some(c) = self.chars.next() {
            match c {
                '"' => return Ok(()),
                '$' => {
                    let value = self.dollar()?;
                    out.literal(&value)?;
                }
                c if c == self.escape => match self.chars.next() {
                    Some(next) if next == '"' || next == '$' || next == self.escape => {
                        out.character(next)?;
                    }
                    Some(next) => {
                        out.character(c)?;
                        out.character(next)?;
                    }
                    None => return Err(ExpandError::Quote('"')),
                },
                c => out.character(c)?,
            }
        }
        Err(ExpandError::Quote('"'))
    }

    /// After a `$`.
    fn dollar(&mut self) -> Result<String, ExpandError> {
        if self.chars.peek() == Some(&'{') {
            self.chars.next();
            self.depth += 1;
            if self.depth > MAX_NESTING {
                return Err(ExpandError::TooLarge);
            }
            let value = self.braced();
            self.depth -= 1;
            return value;
        }
        let name = self.name();
        if name.is_empty() {
            return Ok("$".to_owned());
        }
        Ok((self.lookup)(&name).unwrap_or_default())
    }

    fn name(&mut self) -> String {
        let mut name = String::new();
        if let Some(&c) = self.chars.peek()
            && (c.is_ascii_digit() || "@*#?-!".contains(c))
        {
            // A special parameter: one character, which no build sets.
            if c.is_ascii_digit() || "@*#".contains(c) {
                self.chars.next();
                name.push(c);
            }
            return name;
        }
        while let Some(&c) = self.chars.peek() {
            if !(c.is_ascii_alphanumeric() || c == '_') {
                break;
            }
            self.chars.next();
            name.push(c);
        }
        name
    }

    /// After `${`.
    fn braced(&mut self) -> Result<String, ExpandError> {
        let name = self.name();
        if name.is_empty() {
            let rest: String = self.chars.clone().take_while(|c| *c != '}').collect();
            return Err(ExpandError::Name(rest));
        }
        let value = (self.lookup)(&name);
        let Some(modifier) = self.chars.next() else {
            return Err(ExpandError::Brace);
        };
        match modifier {
            '}' => Ok(value.unwrap_or_default()),
            ':' => {
                let Some(kind) = self.chars.next() else {
                    return Err(ExpandError::Brace);
                };
                if !"-+?".contains(kind) {
                    return Err(ExpandError::Modifier { name, modifier: format!(":{kind}") });
                }
                let value = value.filter(|value| !value.is_empty());
                self.conditional(kind, &name, value)
            }
            '-' | '+' | '?' => self.conditional(modifier, &name, value),
            '#' | '%' => {
                let greedy = self.chars.next_if_eq(&modifier).is_some();
                let pattern = self.operand('}')?;
                let value = value.unwrap_or_default();
                Ok(trim(&value, &pattern, modifier == '#', greedy))
            }
            '/' => {
                let all = self.chars.next_if_eq(&'/').is_some();
                let (pattern, ended) = self.pattern_operand()?;
                let replacement = if ended { String::new() } else { self.operand('}')? };
                Ok(replace(&value.unwrap_or_default(), &pattern, &replacement, all))
            }
            other => Err(ExpandError::Modifier { name, modifier: other.to_string() }),
        }
    }

    fn conditional(&mut self, kind: char, name: &str, value: Option<String>) -> Result<String, ExpandError> {
        let word = self.operand('}')?;
        match (kind, value) {
            ('-', Some(value)) => Ok(value),
            ('-', None) => Ok(word),
            ('+', Some(_)) => Ok(word),
            ('+', None) => Ok(String::new()),
            (_, Some(value)) => Ok(value),
            (_, None) => Err(ExpandError::Required {
                name: name.to_owned(),
                message: if word.is_empty() { "is not set, and must be".to_owned() } else { word },
            }),
        }
    }

    fn operand(&mut self, stop: char) -> Result<String, ExpandError> {
        let mut out = Output::default();
        self.until(&mut out, Some(stop))?;
        Ok(out.word)
    }

    /// A pattern up to `/` (then false) or `}` (then true). Escapes stay, for the matcher.
    fn pattern_operand(&mut self) -> Result<(String, bool), ExpandError> {
        let mut pattern = String::new();
        while let Some(c) = self.chars.next() {
            match c {
                '/' => return Ok((pattern, false)),
                '}' => return Ok((pattern, true)),
                '$' => pattern.push_str(&self.dollar()?),
                c if c == self.escape => match self.chars.next() {
                    Some(next @ ('/' | '}')) => pattern.push(next),
                    Some(next) => {
                        pattern.push('\\');
                        pattern.push(next);
                    }
                    None => return Err(ExpandError::Brace),
                },
                c => pattern.push(c),
            }
        }
        Err(ExpandError::Brace)
    }
}

/// Whether `text` matches a shell pattern of `*`, `?` and `\x`.
fn matches(pattern: &[char], text: &[char]) -> bool {
    // The usual two-pointer matcher: linear but for the last star.
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        let literal = match pattern.get(p) {
            Some('\\') if pattern.get(p + 1).is_some() => Some((pattern.get(p + 1), 2)),
            Some('*') => {
                star = Some((p + 1, t));
                p += 1;
                continue;
            }
            Some('?') => {
                p += 1;
                t += 1;
                continue;
            }
            other => other.map(|_| (other, 1)),
        };
        match (literal, star) {
            (Some((c, width)), _) if c == text.get(t) => {
                p += width;
                t += 1;
            }
            (_, Some((after, at))) => {
                star = Some((after, at + 1));
                p = after;
                t = at + 1;
            }
            _ => return false,
        }
    }
    pattern.get(p..).unwrap_or_default().iter().all(|c| *c == '*')
}

fn trim(value: &str, pattern: &str, front: bool, greedy: bool) -> String {
    let text: Vec<char> = value.chars().collect();
    let pattern: Vec<char> = pattern.chars().collect();
    let mut lengths: Vec<usize> = (0..=text.len()).collect();
    if greedy {
        lengths.reverse();
    }
    for length in lengths {
        let (cut, kept) = if front {
            text.split_at(length)
        } else {
            let (kept, cut) = text.split_at(text.len() - length);
            (cut, kept)
        };
        if matches(&pattern, cut) {
            return kept.iter().collect();
        }
    }
    value.to_owned()
}

fn replace(value: &str, pattern: &str, replacement: &str, all: bool) -> String {
    let text: Vec<char> = value.chars().collect();
    let pattern: Vec<char> = pattern.chars().collect();
    if pattern.is_empty() {
        return value.to_owned();
    }
    let mut result = String::new();
    let mut at = 0;
    let mut done = false;
    while at < text.len() {
        let rest = text.get(at..).unwrap_or_default();
        let longest = (!done)
            .then(|| (1..=rest.len()).rev().find(|length| matches(&pattern, rest.get(..*length).unwrap_or_default())))
            .flatten();
        match longest {
            Some(length) if result.len() <= MAX_EXPANDED_BYTES => {
                result.push_str(replacement);
                at += length;
                done = !all;
            }
            _ => {
                result.extend(rest.first());
                at += 1;
            }
        }
    }
    result
}
