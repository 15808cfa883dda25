//! Messages as engines read them: in a file, one line each, the last error being the reason; and on standard error.
use std::{fs::OpenOptions, io::Write, path::PathBuf};

use caisson_runtime::clock;
use serde_json::json;

/// Where messages go.
#[derive(Debug)]
pub(crate) struct Log {
    pub(crate) file: Option<PathBuf>,
    pub(crate) json: bool,
}

impl Log {
    /// Tells an error with its causes.
    pub(crate) fn error(&self, error: &anyhow::Error) {
        let message =
            error.chain().map(ToString::to_string).filter(|cause| !cause.is_empty()).collect::<Vec<_>>().join(": ");
        let message = message.replace('\n', " ");
        let time = clock::now_rfc3339();
        let line = if self.json {
            json!({"level": "error", "msg": message, "time": time}).to_string()
        } else {
            format!("time=\"{time}\" level=error msg={}", json!(message))
        };
        if let Some(path) = &self.file
            && let Ok(mut file) = OpenOptions::new().create(true).append(true).open(path)
        {
            let _ = writeln!(file, "{line}");
            eprintln!("{message}");
        } else {
            eprintln!("{line}");
        }
    }
}
