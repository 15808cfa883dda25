//! Splitting an instruction's operands: builder flags, JSON arrays, words with and without quotes, name=value pairs.
use super::Problem;

/// Splits at white space outside quotes, keeping quotes and escapes as they are.
pub(crate) fn split_quoted(text: &str, escape: char) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut quote = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match quote {
            None if c.is_whitespace() => {
                if !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
                continue;
            }
            None if c == '"' || c == '\'' => quote = Some(c),
            Some(q) if q == c => quote = None,
            _ => {}
        }
        word.push(c);
        if c == escape
            && quote != Some('\'')
            && let Some(next) = chars.next()
        {
            word.push(next);
        }
    }
    if !word.is_empty() {
        words.push(word);
    }
    words
}

/// Splits at white space, whatever the quotes: how COPY, ADD, EXPOSE and VOLUME read their short form.
pub(crate) fn split_plain(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

/// Reads a JSON array of strings. None: it is not one, so the instruction has its shell form.
pub(crate) fn json_strings(text: &str) -> Option<Vec<String>> {
    if !text.starts_with('[') {
        return None;
    }
    serde_json::from_str(text).ok()
}

/// A builder flag: `--name` or `--name=value`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Flag {
    pub(crate) name: String,
    pub(crate) value: Option<String>,
}

impl Flag {
    /// The value, which must be there.
    pub(crate) fn required(self) -> Result<String, Problem> {
        match self.value {
            Some(value) if !value.is_empty() => Ok(value),
            _ => Err(Problem::new(format!("--{} has no value", self.name), format!("write --{}=VALUE", self.name))),
        }
    }

    /// A switch: there, or with true or false.
    pub(crate) fn switch(&self) -> Result<bool, Problem> {
        match self.value.as_deref() {
            None | Some("true") => Ok(true),
            Some("false") => Ok(false),
            Some(other) => Err(Problem::new(format!("--{} is true or false, not {other:?}", self.name), "")),
        }
    }
}

/// Takes the `--flags` at the front; gives them and the rest.
pub(crate) fn flags(text: &str, escape: char) -> (Vec<Flag>, &str) {
    let mut found = Vec::new();
    let mut rest = text.trim_start();
    while rest.starts_with("--") {
        let mut flag = String::new();
        let mut quote = None;
        let mut end = rest.len();
        let mut chars = rest.char_indices();
        while let Some((at, c)) = chars.next() {
            match quote {
                None if c.is_whitespace() => {
                    end = at;
                    break;
                }
                None if c == '"' || c == '\'' => {
                    quote = Some(c);
                    continue;
                }
                Some(q) if q == c => {
                    quote = None;
                    continue;
                }
                _ => {}
            }
            if c == escape && quote != Some('\'') {
                if let Some((_, next)) = chars.next() {
                    flag.push(next);
                }
                continue;
            }
            flag.push(c);
        }
        let after = rest.get(end..).unwrap_or_default().trim_start();
        if flag == "--" {
            return (found, after);
        }
        let body = flag.get(2..).unwrap_or_default();
        found.push(match body.split_once('=') {
            Some((name, value)) => Flag { name: name.to_ascii_lowercase(), value: Some(value.to_owned()) },
            None => Flag { name: body.to_ascii_lowercase(), value: None },
        });
        rest = after;
    }
    (found, rest)
}

/// Reads `k=v k2="v 2"`, or the old form `k the rest`. Values keep their quotes, for the expansion to remove.
pub(crate) fn pairs(text: &str, keyword: &str, escape: char) -> Result<Vec<(String, String)>, Problem> {
    let words = split_quoted(text, escape);
    let Some(first) = words.first() else {
        return Err(Problem::new(
            format!("{keyword} needs at least one operand"),
            format!("write {keyword} name=value"),
        ));
    };
    if !first.contains('=') {
        let rest = text.trim_start().get(first.len()..).unwrap_or_default().trim();
        if rest.is_empty() {
            return Err(Problem::new(
                format!("{keyword} {first} has no value"),
                format!("write {keyword} {first}=value"),
            ));
        }
        return Ok(vec![(first.clone(), rest.to_owned())]);
    }
    words
        .into_iter()
        .map(|word| match word.split_once('=') {
            Some(("", _)) => {
                Err(Problem::new(format!("{word} has no name before the ="), format!("write {keyword} name=value")))
            }
            Some((name, value)) => Ok((name.to_owned(), value.to_owned())),
            None => Err(Problem::new(
                format!("{word} has no = and value"),
                format!("quote values with spaces: {keyword} name=\"two words\""),
            )),
        })
        .collect()
}
