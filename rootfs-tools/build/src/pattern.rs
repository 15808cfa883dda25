//! Path patterns: those of COPY and ADD (Go's `filepath.Match`: `*` and `?` stop at `/`, `[a-z]`, `\x`), and those of
//! `.dockerignore` (the same with `**`, exceptions by `!`, and a match of a directory counting for all below it).
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

/// Longest pattern; a file name of Linux with room for classes.
const MAX_PATTERN_BYTES: usize = 4096;
/// Most lines that a `.dockerignore` may have.
const MAX_RULES: usize = 10_000;

/// Why a pattern cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the pattern {pattern:?} cannot be used: {problem}")]
pub struct PatternError {
    /// The pattern.
    pub pattern: String,
    /// What is wrong.
    pub problem: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    Byte(u8),
    /// `?`
    One,
    /// `*`
    Star,
    /// `**` at the end: anything, slashes too.
    Globstar,
    /// `**/`: nothing, or anything that ends with a slash.
    Directories,
    /// `[...]`: whether negated, and the ranges.
    Class(bool, Vec<(u8, u8)>),
}

/// A compiled pattern.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern {
    tokens: Vec<Token>,
}

impl Pattern {
    /// Compiles a pattern of COPY or ADD; `**` means what `*` does.
    pub fn glob(text: &str) -> Result<Self, PatternError> {
        Self::compile(text, false)
    }

    /// Compiles a pattern in which `**` crosses directories.
    pub fn globstar(text: &str) -> Result<Self, PatternError> {
        Self::compile(text, true)
    }

    /// Whether a text has anything of a pattern in it.
    pub fn is_glob(text: &str) -> bool {
        text.contains(['*', '?', '[', '\\'])
    }

    fn compile(text: &str, globstar: bool) -> Result<Self, PatternError> {
        let fail = |problem| PatternError { pattern: text.to_owned(), problem };
        if text.len() > MAX_PATTERN_BYTES {
            return Err(PatternError { pattern: String::new(), problem: "it is longer than 4096 bytes" });
        }
        let bytes = text.as_bytes();
        let mut tokens = Vec::new();
        let mut at = 0;
        while let Some(&byte) = bytes.get(at) {
            at += 1;
            match byte {
                b'*' => {
                    let mut stars = 1;
                    while bytes.get(at) == Some(&b'*') {
                        stars += 1;
                        at += 1;
                    }
                    if !globstar || stars == 1 {
                        tokens.push(Token::Star);
                    } else if bytes.get(at) == Some(&b'/') {
                        at += 1;
                        tokens.push(Token::Directories);
                    } else {
                        tokens.push(Token::Globstar);
                    }
                }
                b'?' => tokens.push(Token::One),
                b'\\' => match bytes.get(at) {
                    Some(&next) => {
                        at += 1;
                        tokens.push(Token::Byte(next));
                    }
                    None => return Err(fail("it ends with a backslash")),
                },
                b'[' => tokens.push(class(bytes, &mut at).ok_or_else(|| fail("a [ without its ]"))?),
                byte => tokens.push(Token::Byte(byte)),
            }
        }
        Ok(Self { tokens })
    }

    /// Whether it matches all of a path.
    pub fn matches(&self, path: &Path) -> bool {
        // A simulation of the automaton: linear in the path for any pattern. State 2i: before token i; 2i + 1: within a
        // `**/` that has taken something.
        let mut now = vec![false; 2 * self.tokens.len() + 2];
        self.enter(&mut now, 0);
        for &byte in path.as_os_str().as_bytes() {
            let mut next = vec![false; now.len()];
            for (index, token) in self.tokens.iter().enumerate() {
                let before = now.get(2 * index) == Some(&true);
                let within = now.get(2 * index + 1) == Some(&true);
                match token {
                    Token::Byte(expected) if before && byte == *expected => self.enter(&mut next, index + 1),
                    Token::One if before && byte != b'/' => self.enter(&mut next, index + 1),
                    Token::Star if before && byte != b'/' => self.enter(&mut next, index),
                    Token::Globstar if before => self.enter(&mut next, index),
                    Token::Directories if before || within => {
                        if let Some(state) = next.get_mut(2 * index + 1) {
                            *state = true;
                        }
                        if byte == b'/' {
                            self.enter(&mut next, index + 1);
                        }
                    }
                    Token::Class(negated, ranges)
                        if before
                            && byte != b'/'
                            && ranges.iter().any(|(low, high)| (*low..=*high).contains(&byte)) != *negated =>
                    {
                        self.enter(&mut next, index + 1);
                    }
                    _ => {}
                }
            }
            now = next;
        }
        now.get(2 * self.tokens.len()) == Some(&true)
    }

    /// Adds the state before a token, and those that need no byte to be reached from it.
    fn enter(&self, states: &mut [bool], mut index: usize) {
        loop {
            if let Some(state) = states.get_mut(2 * index) {
                *state = true;
            }
            match self.tokens.get(index) {
                Some(Token::Star | Token::Globstar | Token::Directories) => index += 1,
                _ => return,
            }
        }
    }
}

fn class(bytes: &[u8], at: &mut usize) -> Option<Token> {
    let negated = matches!(bytes.get(*at), Some(b'^' | b'!'));
    if negated {
        *at += 1;
    }
    let mut ranges = Vec::new();
    let one = |at: &mut usize| -> Option<u8> {
        let mut byte = *bytes.get(*at)?;
        *at += 1;
        if byte == b'\\' {
            byte = *bytes.get(*at)?;
            *at += 1;
        }
        Some(byte)
    };
    loop {
        if bytes.get(*at) == Some(&b']') && !ranges.is_empty() {
            *at += 1;
            return Some(Token::Class(negated, ranges));
        }
        let low = one(at)?;
        let high = if bytes.get(*at) == Some(&b'-') && bytes.get(*at + 1) != Some(&b']') {
            *at += 1;
            one(at)?
        } else {
            low
        };
        ranges.push((low, high));
    }
}

/// The rules of a `.dockerignore` file, or of `--exclude`.
#[derive(Debug, Clone, Default)]
pub struct Ignore {
    rules: Vec<(bool, Pattern)>,
}

impl Ignore {
    /// Reads the file's lines: comments begin with `#`, exceptions with `!`.
    pub fn parse(text: &str) -> Result<Self, PatternError> {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let lines = text.lines().filter(|line| !line.starts_with('#')).map(str::trim).filter(|line| !line.is_empty());
        Self::new(lines)
    }

    /// Makes rules of patterns.
    pub fn new<'a>(lines: impl IntoIterator<Item = &'a str>) -> Result<Self, PatternError> {
        let mut rules = Vec::new();
        for line in lines {
            let (keep, pattern) = match line.strip_prefix('!') {
                Some(rest) => (true, rest.trim()),
                None => (false, line),
            };
            let pattern = clean(pattern);
            if pattern.is_empty() {
                continue;
            }
            if rules.len() == MAX_RULES {
                return Err(PatternError { pattern, problem: "more than 10000 patterns" });
            }
            rules.push((keep, Pattern::globstar(&pattern)?));
        }
        Ok(Self { rules })
    }

    /// Whether nothing is ever ignored.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// Whether something below an ignored directory may be kept.
    pub fn has_exceptions(&self) -> bool {
        self.rules.iter().any(|(keep, _)| *keep)
    }

    /// Whether a path, relative to the context, is ignored: the last rule that matches it or a directory above counts.
    pub fn ignores(&self, path: &Path) -> bool {
        let mut ignored = false;
        for (keep, pattern) in &self.rules {
            if ignored == *keep
                && path.ancestors().filter(|part| !part.as_os_str().is_empty()).any(|part| pattern.matches(part))
            {
                ignored = !keep;
            }
        }
        ignored
    }
}

/// What Go's `filepath.Clean` makes of a pattern, without the slash in front.
fn clean(pattern: &str) -> String {
    let mut result = PathBuf::new();
    for component in Path::new(pattern).components() {
        match component {
            Component::Normal(name) => result.push(name),
            Component::ParentDir => {
                result.pop();
            }
            _ => {}
        }
    }
    result.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn globs() {
        for (pattern, yes, no) in [
            ("*.go", vec!["a.go", ".go"], vec!["a/b.go", "a.gox"]),
            ("h?m*.txt", vec!["home.txt", "ham.txt"], vec!["hm.txt", "h/m.txt"]),
            ("a[b-d^]e", vec!["abe", "a^e"], vec!["aee", "a/e"]),
            ("a[^b]e", vec!["ace"], vec!["abe", "a/e"]),
            ("dir/*/f", vec!["dir/x/f"], vec!["dir/f", "dir/x/y/f"]),
            ("arr[[]0].txt", vec!["arr[0].txt"], vec!["arr0.txt"]),
            ("a\\*", vec!["a*"], vec!["ab"]),
            ("**", vec!["a"], vec!["a/b"]),
            ("", vec![""], vec!["a"]),
        ] {
            let compiled = Pattern::glob(pattern).unwrap();
            for path in yes {
                assert!(compiled.matches(Path::new(path)), "{pattern} {path}");
            }
            for path in no {
                assert!(!compiled.matches(Path::new(path)), "{pattern} {path}");
            }
        }
        assert!(Pattern::glob("[a").is_err());
        assert!(Pattern::glob("a\\").is_err());
    }

    #[test]
    fn ignore_rules() {
        let ignores = |rules: &str, path: &str| Ignore::parse(rules).unwrap().ignores(Path::new(path));
        for (rules, path, expected) in [
            ("*.o", "a.o", true),
            ("*.o", "d/a.o", false),
            ("**/*.o", "a.o", true),
            ("**/*.o", "d/e/a.o", true),
            ("*/*.o", "d/a.o", true),
            ("d", "d/e/f", true),
            ("/d/", "d/e/f", true),
            ("./d/../e", "e", true),
            ("d/**", "d/e/f", true),
            ("d/**", "d", false),
            ("**/node_modules", "a/b/node_modules/c", true),
            ("**/foo/**/bar", "x/foo/y/z/bar", true),
            ("**/foo/**/bar", "foo/bar", true),
            ("a**z", "a/b/z", true),
            ("*\n!README.md", "README.md", false),
            ("*\n!README.md", "other", true),
            ("*.md\n!README*.md\nREADME-secret.md", "README-secret.md", true),
            ("*.md\n!README*.md\nREADME-secret.md", "README-open.md", false),
            ("d\n!d/keep", "d/keep", false),
            ("d\n!d/keep", "d/other", true),
            ("# comment\n\n  x  ", "x", true),
            ("# comment", "# comment", false),
            ("!x\n*", "x", true),
        ] {
            assert_eq!(ignores(rules, path), expected, "{rules:?} {path}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { rng_seed: proptest::test_runner::RngSeed::Fixed(5), failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn never_panics(pattern in "[-a/*?!^\\[\\]\\\\é]{0,16}", path in "[a/é]{0,12}") {
            if let Ok(pattern) = Pattern::globstar(&pattern) {
                pattern.matches(Path::new(&path));
            }
            if let Ok(rules) = Ignore::parse(&pattern) {
                rules.ignores(Path::new(&path));
            }
        }
    }
}
