//! The client of registries: distribution-spec 1.1, and docker's token authentication.
//!
//! It blocks; layers move on a few threads. What a registry says is bounded and checked: documents by [`limits`](crate::limits),
//! blobs by their descriptors while they stream. Credentials go to the registry and to the token service that it names, and
//! nowhere else: redirects to other hosts are followed without them, and never from TLS to plain HTTP.

pub mod auth;
mod challenge;
mod pull;
mod push;
mod session;
mod tags;

use std::path::PathBuf;
use std::time::Duration;

use crate::digest::Digest;
use crate::reference::Reference;
use crate::store::StoreError;
pub use auth::{AuthError, AuthFile, Credentials};
pub use push::Pushed;

/// How registries are talked to.
#[derive(Debug, Clone)]
pub struct Options {
    /// Registries (`HOST[:PORT]`) whose TLS certificate is not checked, and that may speak plain HTTP. Loopback may always
    /// speak plain HTTP.
    pub insecure: Vec<String>,
    /// Directories with one directory `HOST[:PORT]` for each registry, with `*.crt`: further authorities for this registry,
    /// as docker and podman have them.
    pub certificates: Vec<PathBuf>,
    /// Where credentials are.
    pub auth: AuthFile,
    /// How often something is tried before it is given up: at most so many failures one after the other.
    pub attempts: u32,
    /// The pause after the first failure; it doubles with each one after it, up to [`MAX_PAUSE`].
    pub pause: Duration,
    /// How long a registry may say nothing at all before it counts as a failure.
    pub stall: Duration,
    /// How many layers move at once.
    pub threads: usize,
}

/// The longest pause between two attempts, whatever the registry asks for.
pub const MAX_PAUSE: Duration = Duration::from_secs(30);

impl Default for Options {
    fn default() -> Self {
        Self {
            insecure: Vec::new(),
            certificates: vec![
                "/etc/caisson/certs.d".into(),
                "/etc/containers/certs.d".into(),
                "/etc/docker/certs.d".into(),
            ],
            auth: AuthFile::default(),
            attempts: 5,
            pause: Duration::from_millis(500),
            stall: Duration::from_secs(60),
            threads: 3,
        }
    }
}

/// A client. It holds no connection: each operation has its own.
#[derive(Debug, Clone, Default)]
pub struct Client {
    options: Options,
}

impl Client {
    /// A client with these options.
    #[must_use]
    pub fn new(options: Options) -> Self {
        Self { options }
    }
}

/// Is told how blobs move; from several threads.
pub trait Progress: Sync {
    /// A blob begins, of so many bytes.
    fn begin(&self, _digest: &Digest, _total: u64) {}
    /// So many of its bytes have moved; after a failure it may be less than before.
    fn advance(&self, _digest: &Digest, _done: u64) {}
    /// It has moved, or did not need to.
    fn end(&self, _digest: &Digest, _how: Outcome) {}
    /// Something failed and is tried again after a pause.
    fn retry(&self, _what: &str, _pause: Duration, _error: &RegistryError) {}
}

/// Tells nobody.
#[derive(Debug, Clone, Copy, Default)]
pub struct Quiet;

impl Progress for Quiet {}

/// How a blob got to where it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It was moved.
    Moved,
    /// It was there.
    Present,
    /// The registry had it in another repository, and took it from there.
    Mounted,
}

/// Why a registry could not be used.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// No connection, or none that works.
    #[error("cannot reach {url}")]
    Transport {
        /// What was asked for.
        url: String,
        /// Why not.
        #[source]
        source: Box<ureq::Error>,
    },
    /// The connection broke in the middle.
    #[error("the connection broke while reading {url}")]
    Broken {
        /// What was asked for.
        url: String,
        /// How.
        #[source]
        source: std::io::Error,
    },
    /// A TLS certificate that we don't trust.
    #[error(
        "{registry} has no TLS certificate that is trusted: put its authority's certificate into /etc/caisson/certs.d/{registry}/ca.crt, or name it with --insecure-registry"
    )]
    Certificate {
        /// The registry.
        registry: String,
        /// Why.
        #[source]
        source: Box<ureq::Error>,
    },
    /// The registry wants credentials, or others.
    #[error("{registry} denies access to {what}: it may not exist, or `caisson login {registry}` may help{detail}")]
    Denied {
        /// The registry.
        registry: String,
        /// What was asked for.
        what: String,
        /// What the registry says.
        detail: String,
    },
    /// Not there.
    #[error("{registry} has no {what}{detail}")]
    NotFound {
        /// The registry.
        registry: String,
        /// What was asked for.
        what: String,
        /// What the registry says.
        detail: String,
    },
    /// Any other answer that is not what we need.
    #[error("{url} answers with status {status}{detail}")]
    Status {
        /// What was asked for.
        url: String,
        /// The HTTP status.
        status: u16,
        /// What the registry says.
        detail: String,
    },
    /// Not what the protocol says.
    #[error("{url} does not answer as a registry does: {reason}")]
    Protocol {
        /// What was asked for.
        url: String,
        /// What is wrong.
        reason: String,
    },
    /// A redirect that is not followed.
    #[error("{url} redirects to {target:?}, which is not followed: {reason}")]
    Redirect {
        /// What was asked for.
        url: String,
        /// Where to.
        target: String,
        /// Why not.
        reason: &'static str,
    },
    /// It failed too often.
    #[error("gave up on {what} after {attempts} attempts")]
    GivenUp {
        /// What was tried.
        what: String,
        /// How often.
        attempts: u32,
        /// The last failure.
        #[source]
        source: Box<RegistryError>,
    },
    /// Credentials can't be read or stored.
    #[error(transparent)]
    Auth(#[from] AuthError),
    /// What came is not right, or the store can't be written.
    #[error("{what}")]
    Content {
        /// What was done.
        what: String,
        /// Why it failed.
        #[source]
        source: StoreError,
    },
    /// A certificate in one of the directories.
    #[error("cannot use the certificate {path}")]
    CertificateFile {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<ureq::Error>,
    },
    /// Another thread failed first.
    #[error("stopped, because another layer failed")]
    Stopped,
}

impl From<StoreError> for RegistryError {
    fn from(source: StoreError) -> Self {
        Self::Content { what: "the image can't be used".to_owned(), source }
    }
}

impl RegistryError {
    /// Whether it is worth to try again.
    fn is_transient(&self) -> bool {
        match self {
            Self::Transport { source, .. } => matches!(
                **source,
                ureq::Error::Io(_)
                    | ureq::Error::Timeout(_)
                    | ureq::Error::ConnectionFailed
                    | ureq::Error::HostNotFound
                    | ureq::Error::Protocol(_)
            ),
            Self::Broken { .. } => true,
            Self::Status { status, .. } => matches!(status, 408 | 429 | 500 | 502 | 503 | 504),
            _ => false,
        }
    }
}

/// The host that speaks for a registry's name.
fn host_of(reference: &Reference) -> &str {
    match reference.registry() {
        "docker.io" => "registry-1.docker.io",
        registry => registry,
    }
}

#[cfg(test)]
mod tests;
