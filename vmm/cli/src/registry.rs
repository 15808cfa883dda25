//! What the verbs that talk to registries have in common: their options, and progress bars.
use std::{
    collections::HashMap,
    io::IsTerminal,
    path::PathBuf,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use caisson_images::{
    Digest,
    registry::{AuthFile, Client, Options, Outcome, Progress, RegistryError},
};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// How registries are reached.
#[derive(Debug, clap::Args)]
pub(crate) struct RegistryArguments {
    /// Registry that may speak plain HTTP, and whose TLS certificate is not checked (again for more)
    #[arg(long, value_name = "HOST[:PORT]", env = "CAISSON_INSECURE_REGISTRIES", value_delimiter = ',')]
    insecure_registry: Vec<String>,
    /// Directory with HOST[:PORT]/*.crt: authorities to trust, before the usual ones
    #[arg(long, value_name = "DIR", env = "CAISSON_CERTIFICATES")]
    cert_dir: Option<PathBuf>,
    /// Where credentials are, in place of docker's and podman's files
    #[arg(long, value_name = "FILE", env = "REGISTRY_AUTH_FILE")]
    authfile: Option<PathBuf>,
}

impl RegistryArguments {
    fn options(&self) -> Options {
        let mut options = Options::default();
        options.insecure.extend(self.insecure_registry.iter().cloned());
        options.certificates.splice(0..0, self.cert_dir.iter().cloned());
        options.auth = self.auth();
        options
    }

    /// A client with these options.
    pub(crate) fn client(&self) -> Client {
        Client::new(self.options())
    }

    /// Where credentials are.
    pub(crate) fn auth(&self) -> AuthFile {
        self.authfile.as_ref().map_or_else(AuthFile::default, AuthFile::at)
    }
}

/// Shows how blobs move: bars on a terminal, else a line for each blob; on stderr.
pub(crate) struct Bars {
    quiet: bool,
    terminal: bool,
    bars: MultiProgress,
    of_blobs: Mutex<HashMap<Digest, ProgressBar>>,
}

impl Bars {
    pub(crate) fn new(quiet: bool) -> Bars {
        Bars {
            quiet,
            terminal: std::io::stderr().is_terminal(),
            bars: MultiProgress::new(),
            of_blobs: Mutex::default(),
        }
    }
}

impl Progress for Bars {
    fn begin(&self, digest: &Digest, total: u64) {
        if self.quiet || !self.terminal {
            return;
        }
        let bar = self.bars.add(ProgressBar::new(total));
        if let Ok(style) = ProgressStyle::with_template("{prefix} {bar:30} {bytes:>10} of {total_bytes:<10} {msg}") {
            bar.set_style(style);
        }
        bar.set_prefix(digest.short());
        self.of_blobs.lock().unwrap_or_else(PoisonError::into_inner).insert(*digest, bar);
    }

    fn advance(&self, digest: &Digest, done: u64) {
        if let Some(bar) = self.of_blobs.lock().unwrap_or_else(PoisonError::into_inner).get(digest) {
            bar.set_position(done);
        }
    }

    fn end(&self, digest: &Digest, how: Outcome) {
        let text = match how {
            Outcome::Moved => "done",
            Outcome::Present => "already there",
            Outcome::Mounted => "taken from another repository",
        };
        if let Some(bar) = self.of_blobs.lock().unwrap_or_else(PoisonError::into_inner).remove(digest) {
            bar.finish_with_message(text);
        } else if !self.quiet {
            eprintln!("{}: {text}", digest.short());
        }
    }

    fn retry(&self, what: &str, pause: Duration, error: &RegistryError) {
        if self.quiet {
            return;
        }
        let text = format!("{what}: {error}; again in {:.1} s", pause.as_secs_f32());
        if self.terminal {
            let _ = self.bars.println(text);
        } else {
            eprintln!("{text}");
        }
    }
}
