//! Container logs: docker's json-file format, one object a line, rotated once so that a container's log never exceeds twice its bound.
use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufRead, BufReader, Seek, SeekFrom, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::clock;

/// A file's bound; when it is reached the file becomes `.1` and a new one is begun.
pub const MAX_LOG_BYTES: u64 = 10 << 20;
/// The longest line that is kept together, as in docker.
const MAX_LINE_BYTES: usize = 16 * 1024;
/// How often a follower looks for more.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(100);

/// One entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The text, with its newline if the program wrote one.
    pub log: String,
    /// stdout or stderr.
    pub stream: String,
    /// When, RFC 3339.
    pub time: String,
}

/// Writes a log.
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    file: File,
    length: u64,
    limit: u64,
}

impl Writer {
    /// Opens a log to append to it.
    pub fn open(path: &Path, limit: u64) -> io::Result<Writer> {
        let file = OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
        let length = file.metadata()?.len();
        Ok(Writer { path: path.to_owned(), file, length, limit })
    }

    fn append(&mut self, stream: &str, text: &[u8]) -> io::Result<()> {
        let entry = Entry {
            log: String::from_utf8_lossy(text).into_owned(),
            stream: stream.to_owned(),
            time: clock::now_rfc3339(),
        };
        let mut line = serde_json::to_vec(&entry)?;
        line.push(b'\n');
        if self.length > 0 && self.length + line.len() as u64 > self.limit {
            fs::rename(&self.path, rotated(&self.path))?;
            self.file = OpenOptions::new().create(true).append(true).mode(0o600).open(&self.path)?;
            self.length = 0;
        }
        self.file.write_all(&line)?;
        self.length += line.len() as u64;
        Ok(())
    }
}

fn rotated(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

/// Cuts one stream's bytes into entries.
#[derive(Debug, Default)]
pub struct Lines {
    partial: Vec<u8>,
}

impl Lines {
    /// Writes the whole lines of what came so far.
    pub fn push(&mut self, bytes: &[u8], stream: &str, writer: &mut Writer) -> io::Result<()> {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            for part in piece.chunks(MAX_LINE_BYTES) {
                self.partial.extend_from_slice(part);
                if part.ends_with(b"\n") || self.partial.len() >= MAX_LINE_BYTES {
                    writer.append(stream, &self.partial)?;
                    self.partial.clear();
                }
            }
        }
        Ok(())
    }

    /// Writes what came without a newline.
    pub fn finish(&mut self, stream: &str, writer: &mut Writer) -> io::Result<()> {
        if !self.partial.is_empty() {
            writer.append(stream, &self.partial)?;
            self.partial.clear();
        }
        Ok(())
    }
}

/// What to read of a log.
#[derive(Debug, Clone, Default)]
pub struct Query {
    /// Only this many entries at the end.
    pub tail: Option<usize>,
    /// Only what is not older, in nanoseconds since the Epoch.
    pub since_ns: Option<u64>,
    /// Only what is older.
    pub until_ns: Option<u64>,
}

/// Reads a log, its rotated part first. With `follow`, goes on until it says that nothing more will come.
pub fn read(
    path: &Path,
    query: &Query,
    mut follow: Option<&mut dyn FnMut() -> bool>,
    mut each: impl FnMut(Entry) -> io::Result<()>,
) -> io::Result<()> {
    let wanted = |entry: &Entry| {
        let time = clock::parse_rfc3339(&entry.time).unwrap_or(0);
        query.since_ns.is_none_or(|since| time >= since) && query.until_ns.is_none_or(|until| time < until)
    };
    let mut last = std::collections::VecDeque::new();
    if let Ok(old) = File::open(rotated(path)) {
        let mut reader = BufReader::new(old);
        while let Some(entry) = next(&mut reader)? {
            keep(&mut last, entry, query, &wanted, &mut each)?;
        }
    }
    let mut reader = match File::open(path) {
        Ok(file) => BufReader::new(file),
        Err(error) if error.kind() == io::ErrorKind::NotFound && follow.is_none() => {
            return last.into_iter().try_for_each(each);
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            BufReader::new(OpenOptions::new().create(true).append(true).read(true).mode(0o600).open(path)?)
        }
        Err(error) => return Err(error),
    };
    while let Some(entry) = next(&mut reader)? {
        keep(&mut last, entry, query, &wanted, &mut each)?;
    }
    last.into_iter().try_for_each(&mut each)?;
    let Some(more) = follow.as_mut() else { return Ok(()) };
    let mut drain = |reader: &mut BufReader<File>| -> io::Result<()> {
        while let Some(entry) = next(reader)? {
            if wanted(&entry) {
                each(entry)?;
            }
        }
        Ok(())
    };
    loop {
        // Asked before reading: what was written until then is read below.
        let more = more();
        drain(&mut reader)?;
        while let Ok(file) = File::open(path) {
            if file.metadata()?.ino() == reader.get_ref().metadata()?.ino() {
                break;
            }
            // It was rotated: nothing is written to the old file any more, but something may have been until then.
            drain(&mut reader)?;
            reader = BufReader::new(file);
            drain(&mut reader)?;
        }
        if !more {
            return Ok(());
        }
        thread::sleep(FOLLOW_INTERVAL);
    }
}

fn keep(
    last: &mut std::collections::VecDeque<Entry>,
    entry: Entry,
    query: &Query,
    wanted: &impl Fn(&Entry) -> bool,
    each: &mut impl FnMut(Entry) -> io::Result<()>,
) -> io::Result<()> {
    if !wanted(&entry) {
        return Ok(());
    }
    match query.tail {
        None => each(entry),
        Some(count) => {
            last.push_back(entry);
            if last.len() > count {
                last.pop_front();
            }
            Ok(())
        }
    }
}

/// The next whole entry; a line that is still being written is left for later, one that is damaged is skipped.
fn next(reader: &mut BufReader<File>) -> io::Result<Option<Entry>> {
    loop {
        let mut line = Vec::new();
        let count = reader.read_until(b'\n', &mut line)?;
        if !line.ends_with(b"\n") {
            reader.seek(SeekFrom::Current(-(count as i64)))?;
            return Ok(None);
        }
        if let Ok(entry) = serde_json::from_slice(&line) {
            return Ok(Some(entry));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(path: &Path, query: &Query) -> Vec<String> {
        let mut all = Vec::new();
        read(path, query, None, |entry| {
            all.push(entry.log);
            Ok(())
        })
        .unwrap();
        all
    }

    #[test]
    fn lines_are_entries_and_tails_are_counted() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        assert!(texts(&path, &Query::default()).is_empty());
        let mut writer = Writer::open(&path, 1 << 20).unwrap();
        let mut lines = Lines::default();
        lines.push(b"one\ntw", "stdout", &mut writer).unwrap();
        lines.push(b"o\n\xff", "stdout", &mut writer).unwrap();
        assert_eq!(texts(&path, &Query::default()), ["one\n", "two\n"]);
        lines.finish("stdout", &mut writer).unwrap();
        assert_eq!(texts(&path, &Query { tail: Some(1), ..Query::default() }), ["\u{fffd}"]);
        assert_eq!(texts(&path, &Query { tail: Some(0), ..Query::default() }).len(), 0);
        assert_eq!(texts(&path, &Query { since_ns: Some(u64::MAX), ..Query::default() }).len(), 0);
        assert_eq!(texts(&path, &Query { until_ns: Some(1), ..Query::default() }).len(), 0);
    }

    #[test]
    fn a_log_is_bounded_and_rotation_is_followed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let mut writer = Writer::open(&path, 1000).unwrap();
        let mut lines = Lines::default();
        let mut count = 0;
        let mut seen = Vec::new();
        let mut more = || {
            count += 1;
            lines.push(format!("line {count}\n").as_bytes(), "stderr", &mut writer).unwrap();
            count < 50
        };
        read(&path, &Query::default(), Some(&mut more), |entry| {
            seen.push(entry.log);
            Ok(())
        })
        .unwrap();
        assert_eq!(seen.len(), 50);
        assert!(fs::metadata(&path).unwrap().len() <= 1000 && fs::metadata(rotated(&path)).unwrap().len() <= 1000);
        let long = vec![b'x'; 3 * MAX_LINE_BYTES];
        let other = directory.path().join("long");
        let mut writer = Writer::open(&other, 1 << 20).unwrap();
        Lines::default().push(&long, "stdout", &mut writer).unwrap();
        assert_eq!(texts(&other, &Query::default()).len(), 3);
    }
}
