//! Heredocs of RUN, COPY and ADD: `<<EOF`, `<<-EOF`, `<<"EOF"`, several in one instruction.

/// The longest heredoc delimiter.
const MAX_DELIMITER_BYTES: usize = 255;

/// A heredoc.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heredoc {
    /// The delimiter without quotes; COPY names the file by it.
    pub name: String,
    /// The word as it stands in the instruction (`<<-"EOF"`, `3<<EOF`).
    pub word: String,
    /// Whether variables in the content are expanded (they are not when the delimiter is quoted).
    pub expand: bool,
    /// `<<-`: leading tabs are cut from each line.
    pub chomp: bool,
    /// The content, each line with its newline.
    pub content: String,
}

/// Reads a word as the start of a heredoc.
pub(crate) fn parse_word(word: &str) -> Option<Heredoc> {
    let after_fd = word.trim_start_matches(|c: char| c.is_ascii_digit());
    let rest = after_fd.strip_prefix("<<")?;
    let (chomp, rest) = match rest.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, rest),
    };
    if rest.is_empty() || rest.len() > MAX_DELIMITER_BYTES || rest.contains('<') {
        return None;
    }
    let mut name = String::new();
    let mut expand = true;
    let mut quote = None;
    for c in rest.chars() {
        match (quote, c) {
            (None, '"' | '\'') => {
                quote = Some(c);
                expand = false;
            }
            (Some(q), c) if q == c => quote = None,
            (_, c) => name.push(c),
        }
    }
    let plain = name.chars().all(|c| !c.is_whitespace() && !";|&()`$".contains(c));
    if quote.is_some() || name.is_empty() || !plain {
        return None;
    }
    Some(Heredoc { name, word: word.to_owned(), expand, chomp, content: String::new() })
}

/// The heredocs that an instruction's line opens, in order.
pub(crate) fn opened_by(line: &str, escape: char) -> Vec<Heredoc> {
    super::words::split_quoted(line, escape).iter().filter_map(|word| parse_word(word)).collect()
}
