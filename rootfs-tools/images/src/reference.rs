//! Image references as people write them: `busybox`, `user/app:1.2`, `localhost:5000/app@sha256:...`.
//!
//! The grammar is that of the distribution project's `reference` package; short names mean `docker.io`, and one component
//! there means `library/`, as docker does it. What is kept and shown by [`Display`](fmt::Display) is always the full name.

use std::fmt;
use std::str::FromStr;

use crate::digest::{Digest, DigestError};

/// The registry that a name without one belongs to.
pub const DEFAULT_REGISTRY: &str = "docker.io";
/// The tag that a name without tag and digest has.
pub const DEFAULT_TAG: &str = "latest";
/// Bytes in a registry and a repository together.
const MAX_NAME_BYTES: usize = 255;
/// Bytes in a tag.
const MAX_TAG_BYTES: usize = 128;

/// A full image reference. It has a tag, or a digest, or both.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// A text that is not an image reference.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ReferenceError {
    /// Nothing, or nothing before the tag.
    #[error("the image reference {0:?} has no name: write NAME[:TAG] or NAME@sha256:...")]
    Empty(String),
    /// Longer than 255 bytes.
    #[error("the image name {0:?}... is longer than {MAX_NAME_BYTES} bytes")]
    TooLong(String),
    /// The part before the first slash looks like a host but is none.
    #[error("in the image reference {reference:?}, {registry:?} is not a registry: write HOST or HOST:PORT")]
    Registry {
        /// The whole text.
        reference: String,
        /// The part that is refused.
        registry: String,
    },
    /// A part of the repository is malformed.
    #[error(
        "in the image reference {reference:?}, {component:?} is not a repository name: it is made of lower-case letters and digits, separated by one of . _ __ or dashes"
    )]
    Repository {
        /// The whole text.
        reference: String,
        /// The part that is refused.
        component: String,
    },
    /// The tag is malformed.
    #[error(
        "in the image reference {reference:?}, {tag:?} is not a tag: up to {MAX_TAG_BYTES} letters, digits, and . _ - (not first)"
    )]
    Tag {
        /// The whole text.
        reference: String,
        /// The part that is refused.
        tag: String,
    },
    /// The part after `@` is not a digest.
    #[error("the image reference {reference:?} ends in no digest")]
    Digest {
        /// The whole text.
        reference: String,
        /// Why.
        #[source]
        source: DigestError,
    },
}

impl Reference {
    /// The registry's host, and port if there is one.
    #[must_use]
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The path in the registry, `library/` included.
    #[must_use]
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag, if there is one. A reference without a digest always has one.
    #[must_use]
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, if there is one.
    #[must_use]
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// What a registry is asked for: the digest, or else the tag.
    #[must_use]
    pub fn tag_or_digest(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.clone(),
            (None, None) => DEFAULT_TAG.to_owned(),
        }
    }

    /// The name without tag and digest, in full.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }

    /// The name as people write it: without `docker.io/` and `library/`.
    #[must_use]
    pub fn familiar_name(&self) -> String {
        if self.registry != DEFAULT_REGISTRY {
            return self.name();
        }
        match self.repository.strip_prefix("library/") {
            Some(short) if !short.contains('/') => short.to_owned(),
            _ => self.repository.clone(),
        }
    }

    /// The shortest text that reads as this reference, but with its tag.
    #[must_use]
    pub fn familiar(&self) -> String {
        self.with_suffix(self.familiar_name())
    }

    /// The same name with another tag and no digest.
    ///
    /// # Errors
    /// `tag` is malformed.
    pub fn with_tag(&self, tag: &str) -> Result<Self, ReferenceError> {
        check_tag(tag, tag)?;
        Ok(Self { tag: Some(tag.to_owned()), digest: None, ..self.clone() })
    }

    /// The same name with a digest and no tag.
    #[must_use]
    pub fn with_digest(&self, digest: Digest) -> Self {
        Self { tag: None, digest: Some(digest), ..self.clone() }
    }

    fn with_suffix(&self, mut text: String) -> String {
        if let Some(tag) = &self.tag {
            text.push(':');
            text.push_str(tag);
        }
        if let Some(digest) = &self.digest {
            text.push('@');
            text.push_str(&digest.to_string());
        }
        text
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.with_suffix(self.name()))
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        let shown = || -> String { text.chars().take(300).collect() };
        let (rest, digest) = match text.split_once('@') {
            None => (text, None),
            Some((rest, digest)) => {
                let digest = digest.parse().map_err(|source| ReferenceError::Digest { reference: shown(), source })?;
                (rest, Some(digest))
            }
        };
        // A colon after the last slash starts a tag; one before it, a port.
        let (name, tag) = match rest.rsplit_once(':') {
            Some((name, tag)) if !tag.contains('/') && !(tag.contains(']')) => {
                check_tag(text, tag)?;
                (name, Some(tag.to_owned()))
            }
            _ => (rest, None),
        };
        if name.is_empty() {
            return Err(ReferenceError::Empty(shown()));
        }
        let (registry, path) = match name.split_once('/') {
            Some((first, rest)) if is_registry(first) => (first, rest),
            _ => (DEFAULT_REGISTRY, name),
        };
        let registry = if registry == "index.docker.io" { DEFAULT_REGISTRY } else { registry };
        check_registry(&shown(), registry)?;
        for component in path.split('/') {
            if !is_path_component(component) {
                return Err(ReferenceError::Repository {
                    reference: shown(),
                    component: component.chars().take(300).collect(),
                });
            }
        }
        let repository = if registry == DEFAULT_REGISTRY && !path.contains('/') {
            format!("library/{path}")
        } else {
            path.to_owned()
        };
        if registry.len() + 1 + repository.len() > MAX_NAME_BYTES {
            return Err(ReferenceError::TooLong(name.chars().take(60).collect()));
        }
        let tag = match (tag, &digest) {
            (None, None) => Some(DEFAULT_TAG.to_owned()),
            (tag, _) => tag,
        };
        Ok(Self { registry: registry.to_owned(), repository, tag, digest })
    }
}

fn is_registry(first: &str) -> bool {
    first.contains(['.', ':', '[']) || first == "localhost" || first.bytes().any(|byte| byte.is_ascii_uppercase())
}

fn check_registry(reference: &str, registry: &str) -> Result<(), ReferenceError> {
    let refused = || ReferenceError::Registry { reference: reference.to_owned(), registry: registry.to_owned() };
    let (host, port) = match registry.strip_prefix('[') {
        Some(rest) => {
            let (address, port) = rest.split_once(']').ok_or_else(refused)?;
            address.parse::<std::net::Ipv6Addr>().map_err(|_| refused())?;
            match port {
                "" => (None, None),
                port => (None, Some(port.strip_prefix(':').ok_or_else(refused)?)),
            }
        }
        None => match registry.split_once(':') {
            Some((host, port)) => (Some(host), Some(port)),
            None => (Some(registry), None),
        },
    };
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    let good_host = host.is_none_or(|host| host.split('.').all(label));
    let good_port = port.is_none_or(|port| {
        port.bytes().all(|byte| byte.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|port| port != 0)
    });
    if good_host && good_port { Ok(()) } else { Err(refused()) }
}

fn is_path_component(component: &str) -> bool {
    let bytes = component.as_bytes();
    let alphanumeric = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let ends = |byte: Option<&u8>| byte.is_some_and(|byte| alphanumeric(*byte));
    if !ends(bytes.first()) || !ends(bytes.last()) {
        return false;
    }
    // What is between two runs of letters and digits is one separator.
    bytes
        .split(|byte| alphanumeric(*byte))
        .all(|separator| matches!(separator, b"" | b"." | b"_" | b"__") || separator.iter().all(|byte| *byte == b'-'))
}

fn check_tag(reference: &str, tag: &str) -> Result<(), ReferenceError> {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let bytes = tag.as_bytes();
    let good = bytes.len() <= MAX_TAG_BYTES
        && bytes.first().is_some_and(|byte| word(*byte))
        && bytes.iter().all(|byte| word(*byte) || matches!(byte, b'.' | b'-'));
    if good {
        return Ok(());
    }
    Err(ReferenceError::Tag { reference: reference.chars().take(300).collect(), tag: tag.chars().take(300).collect() })
}

#[cfg(test)]
mod tests;
