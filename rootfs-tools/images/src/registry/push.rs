//! Storing an image in a registry: blobs that it lacks, then the manifest.

use std::collections::HashSet;
use std::io::{self, Read};
use std::sync::atomic::{AtomicBool, Ordering};

use ureq::http::Method;

use super::pull::in_parallel;
use super::session::{Call, Session, encode, location};
use super::{Client, Outcome, Progress, RegistryError, host_of};
use crate::digest::Digest;
use crate::image::{Image, OCI_MANIFEST};
use crate::reference::Reference;
use crate::store::{Store, StoreError};

/// What a push did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pushed {
    /// The manifest's digest: how others can ask for exactly this.
    pub digest: Digest,
    /// The manifest's length in bytes.
    pub size: u64,
}

impl Client {
    /// Stores an image in a registry, under `reference`, which needs a tag or no more than the image's own digest.
    ///
    /// # Errors
    /// See [`RegistryError`].
    pub fn push(
        &self,
        store: &Store,
        image: &Image,
        reference: &Reference,
        progress: &dyn Progress,
    ) -> Result<Pushed, RegistryError> {
        let repository = reference.repository();
        let session =
            Session::open(&self.options, reference.registry(), host_of(reference), repository, None, progress)?;
        if let Some(expected) = reference.digest()
            && expected != image.digest
        {
            let what = format!("the manifest to be pushed as {}", reference.familiar());
            return Err(StoreError::WrongDigest { what, expected, found: image.digest }.into());
        }
        let sources = image
            .references
            .iter()
            .filter(|other| other.registry() == reference.registry() && other.repository() != repository);
        let push = Push {
            session: &session,
            store,
            repository,
            scope: format!("repository:{repository}:pull,push"),
            sources: sources.map(|other| other.repository().to_owned()).collect(),
        };
        let mut seen = HashSet::new();
        let mut blobs: Vec<(Digest, u64)> = image.layers.iter().map(|layer| (layer.digest, layer.size)).collect();
        blobs.push((image.config_digest, image.config_json.len() as u64));
        blobs.retain(|(digest, _)| seen.insert(*digest));
        in_parallel(self.options.threads, blobs.len(), |at, stop| push.blob(blobs[at], stop))?;
        push.manifest(image, reference)
    }
}

struct Push<'p> {
    session: &'p Session<'p>,
    store: &'p Store,
    repository: &'p str,
    scope: String,
    /// Repositories of the same registry that may have the blobs.
    sources: HashSet<String>,
}

impl Push<'_> {
    fn blob(&self, (digest, size): (Digest, u64), stop: &AtomicBool) -> Result<(), RegistryError> {
        let progress = self.session.progress;
        progress.begin(&digest, size);
        let what = format!("the blob {digest} in {}", self.repository);
        let base = format!("{}/v2/{}/blobs", self.session.base, self.repository);
        let head = Call::get(format!("{base}/{digest}"), &self.scope).method(Method::HEAD);
        if self.session.call(&head, &[404], &what, None)?.status().is_success() {
            progress.end(&digest, Outcome::Present);
            return Ok(());
        }
        let mut upload = None;
        for source in &self.sources {
            let url = format!("{base}/uploads/?mount={}&from={}", encode(&digest.to_string()), encode(source));
            let scope = format!("{} repository:{source}:pull", self.scope);
            let call = Call::get(&url, &scope).method(Method::POST);
            // Registries that can't, or won't, start an upload instead, or refuse.
            let response = self.session.call(&call, &[400, 401, 403, 404, 405], &what, None)?;
            match response.status().as_u16() {
                201 => {
                    progress.end(&digest, Outcome::Mounted);
                    return Ok(());
                }
                202 => {
                    upload = Some(location(&url, &response)?);
                    break;
                }
                _ => (),
            }
        }
        self.session.trying(&what, |_| {
            let target = match upload.take() {
                Some(target) => target,
                None => {
                    let url = format!("{base}/uploads/");
                    let call = Call::get(&url, &self.scope).method(Method::POST);
                    location(&url, &self.session.call_part(&call, &what)?)?
                }
            };
            self.upload(&target, digest, size, &what, stop)
        })?;
        progress.end(&digest, Outcome::Moved);
        Ok(())
    }

    /// One attempt to send a blob whole.
    fn upload(
        &self,
        target: &str,
        digest: Digest,
        size: u64,
        what: &str,
        stop: &AtomicBool,
    ) -> Result<(), RegistryError> {
        let file = self.store.blob(&digest)?;
        let found = file.metadata().map_err(StoreError::io("look up", &self.store.blob_path(&digest)))?.len();
        if found != size {
            return Err(StoreError::WrongSize { what: what.to_owned(), expected: size, found }.into());
        }
        let separator = if target.contains('?') { '&' } else { '?' };
        let url = format!("{target}{separator}digest={}", encode(&digest.to_string()));
        let call = Call::get(url, &self.scope).method(Method::PUT).header("content-type", "application/octet-stream");
        let content = || -> Result<(Box<dyn Read + '_>, u64), RegistryError> {
            let file = self.store.blob(&digest)?;
            let progress = self.session.progress;
            Ok((Box::new(Sending { file, sent: 0, digest, progress, stop }), size))
        };
        self.session.call_with(&call, what, &content)?;
        Ok(())
    }

    fn manifest(&self, image: &Image, reference: &Reference) -> Result<Pushed, RegistryError> {
        let media_type = image.manifest.media_type().as_ref().map(ToString::to_string);
        let media_type = media_type.unwrap_or_else(|| OCI_MANIFEST.to_owned());
        let name = match reference.tag() {
            Some(tag) => tag.to_owned(),
            None => image.digest.to_string(),
        };
        let url = format!("{}/v2/{}/manifests/{name}", self.session.base, self.repository);
        let call = Call::get(&url, &self.scope).method(Method::PUT).header("content-type", media_type);
        let what = format!("the manifest {name} in {}", self.repository);
        let bytes = image.manifest_json.as_slice();
        let content =
            || -> Result<(Box<dyn Read + '_>, u64), RegistryError> { Ok((Box::new(bytes), bytes.len() as u64)) };
        let response = self.session.call(&call, &[], &what, Some(&content))?;
        let said = response.headers().get("docker-content-digest").and_then(|value| value.to_str().ok());
        if let Some(found) = said.and_then(|said| said.parse::<Digest>().ok())
            && found != image.digest
        {
            return Err(StoreError::WrongDigest { what, expected: image.digest, found }.into());
        }
        Ok(Pushed { digest: image.digest, size: bytes.len() as u64 })
    }
}

/// A blob on its way out.
struct Sending<'s> {
    file: std::fs::File,
    sent: u64,
    digest: Digest,
    progress: &'s dyn Progress,
    stop: &'s AtomicBool,
}

impl Read for Sending<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(io::Error::other("stopped, because another layer failed"));
        }
        let count = self.file.read(buffer)?;
        self.sent += count as u64;
        self.progress.advance(&self.digest, self.sent);
        Ok(count)
    }
}
