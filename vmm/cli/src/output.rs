//! Tables, ages and sizes, as docker prints them; progress on a terminal.
use std::{
    fmt::Write as _,
    io::{IsTerminal, Write as _},
    time::Duration,
};

use caisson_runtime::clock;
use indicatif::{ProgressBar, ProgressStyle};

/// Prints rows under headings, each column as wide as its widest cell.
pub(crate) fn table(headings: &[&str], rows: &[Vec<String>]) {
    print(&format_table(headings, rows));
}

/// Prints to stdout; a reader that has gone is no error.
pub(crate) fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

fn format_table(headings: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = headings.iter().map(|heading| heading.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    let headings: Vec<String> = headings.iter().map(|heading| (*heading).to_owned()).collect();
    for row in std::iter::once(&headings).chain(rows) {
        let mut line = String::new();
        for (width, cell) in widths.iter().zip(row) {
            let _ = write!(line, "{cell:<width$}   ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// How long ago a time was, in docker's words without the "ago".
pub(crate) fn age(rfc3339: &str) -> String {
    let then = clock::parse_rfc3339(rfc3339).unwrap_or(0);
    span(Duration::from_nanos(clock::realtime_ns().saturating_sub(then)))
}

fn span(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0 => "Less than a second".into(),
        1 => "1 second".into(),
        2..60 => format!("{seconds} seconds"),
        60..120 => "About a minute".into(),
        120..3600 => format!("{} minutes", seconds / 60),
        3600..7200 => "About an hour".into(),
        7200..172_800 => format!("{} hours", seconds / 3600),
        172_800..1_209_600 => format!("{} days", seconds / 86_400),
        1_209_600..5_184_000 => format!("{} weeks", seconds / 604_800),
        5_184_000..63_072_000 => format!("{} months", seconds / 2_592_000),
        _ => format!("{} years", seconds / 31_536_000),
    }
}

/// Bytes in docker's way: decimal units, three digits.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["B", "kB", "MB", "GB", "TB", "PB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    let digits = if unit == 0 || value >= 100.0 {
        0
    } else if value >= 10.0 {
        1
    } else {
        2
    };
    format!("{value:.digits$}{}", UNITS[unit])
}

/// Something that takes time, shown only on a terminal.
pub(crate) struct Progress {
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Nothing is shown yet.
    pub(crate) fn new() -> Progress {
        Progress { bar: None }
    }

    /// Says what is being done.
    pub(crate) fn say(&mut self, what: &str) {
        if !std::io::stderr().is_terminal() {
            return;
        }
        let bar = self.bar.get_or_insert_with(|| {
            let bar = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed:>4} {wide_msg}") {
                bar.set_style(style);
            }
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        bar.set_message(what.to_owned());
    }

    /// Wipes it.
    pub(crate) fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_ages_and_sizes_read_as_docker_s() {
        let text = format_table(&["ID", "NAME"], &[vec!["1234".into(), "a".into()]]);
        assert_eq!(text, "ID     NAME\n1234   a\n");
        assert_eq!([size(0), size(1500), size(12_345_678), size(999_000_000)], ["0B", "1.50kB", "12.3MB", "999MB"]);
        let spans: Vec<_> =
            [0, 1, 59, 60, 7199, 90_000, 1_300_000].map(|seconds| span(Duration::from_secs(seconds))).into();
        assert_eq!(
            spans,
            ["Less than a second", "1 second", "59 seconds", "About a minute", "About an hour", "25 hours", "2 weeks"]
        );
    }
}
