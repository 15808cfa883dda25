//! Listing a repository's tags, and checking credentials.

use serde::Deserialize;
use ureq::http::header;

use super::session::{Call, Session};
use super::{Client, Credentials, Quiet, RegistryError, host_of};
use crate::reference::{Reference, ReferenceError};

/// Bytes in one page of tags.
const MAX_PAGE_BYTES: u64 = 4 << 20;
/// Pages that are asked for.
const MAX_PAGES: usize = 1000;
/// Tags that are taken.
const MAX_TAGS: usize = 100_000;

#[derive(Deserialize)]
struct Page {
    tags: Option<Vec<String>>,
}

impl Client {
    /// The tags of a repository, as the registry orders them.
    ///
    /// # Errors
    /// See [`RegistryError`].
    pub fn tags(&self, reference: &Reference) -> Result<Vec<String>, RegistryError> {
        let repository = reference.repository();
        let host = host_of(reference);
        let session = Session::open(&self.options, reference.registry(), host, repository, None, &Quiet)?;
        let scope = format!("repository:{repository}:pull");
        let mut url = format!("{}/v2/{repository}/tags/list", session.base);
        let mut tags = Vec::new();
        for _ in 0..MAX_PAGES {
            let what = format!("tags of {}", reference.familiar_name());
            let (headers, bytes) = session.fetch(&Call::get(&url, &scope), &what, MAX_PAGE_BYTES)?;
            let malformed = |reason: &str| RegistryError::Protocol { url: url.clone(), reason: reason.to_owned() };
            let page: Page = serde_json::from_slice(&bytes).map_err(|_| malformed("it lists no tags"))?;
            for tag in page.tags.unwrap_or_default() {
                // What is no tag can't be asked for, and might not be fit for a terminal.
                if reference.with_tag(&tag).is_ok() {
                    tags.push(tag);
                }
            }
            if tags.len() > MAX_TAGS {
                return Err(malformed(&format!("it lists more than {MAX_TAGS} tags")));
            }
            let link = headers.get(header::LINK).and_then(|value| value.to_str().ok()).unwrap_or_default();
            match next_page(link) {
                // A registry's next page is its own.
                Some(next) if next.starts_with('/') && !next.starts_with("//") => {
                    url = format!("{}{next}", session.base)
                }
                Some(next) if super::session::same_origin(next, &session.base) => url = next.to_owned(),
                _ => return Ok(tags),
            }
        }
        Err(RegistryError::Protocol { url, reason: format!("it has more than {MAX_PAGES} pages of tags") })
    }

    /// Checks credentials with a registry (`HOST[:PORT]`).
    ///
    /// # Errors
    /// The registry refuses them, or can't be reached.
    pub fn check(&self, registry: &str, credentials: &Credentials) -> Result<(), RegistryError> {
        let reference: Reference =
            format!("{registry}/x").parse().map_err(|_: ReferenceError| RegistryError::Protocol {
                url: registry.chars().take(300).collect(),
                reason: "this is no name of a registry: write HOST or HOST:PORT".to_owned(),
            })?;
        let host = host_of(&reference);
        let session = Session::open(&self.options, reference.registry(), host, "", Some(credentials.clone()), &Quiet)?;
        let call = Call::get(format!("{}/v2/", session.base), "");
        session.call(&call, &[], "the credentials", None).map(|_| ())
    }
}

/// The target of `Link: <...>; rel="next"`.
fn next_page(link: &str) -> Option<&str> {
    let (target, parameters) = link.trim().strip_prefix('<')?.split_once('>')?;
    parameters.contains("rel=\"next\"").then_some(target)
}
