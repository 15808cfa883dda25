//! Fetching an image: its documents, then its layers on a few threads, each resumed where a connection broke.

use std::collections::HashSet;
use std::io::Read;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use ureq::http::header;

use super::session::{Call, Session};
use super::{Client, Outcome, Progress, RegistryError, host_of};
use crate::digest::Digest;
use crate::image::{DOCKER_INDEX, DOCKER_MANIFEST, Document, Image, Layer, OCI_INDEX, OCI_MANIFEST, Top};
use crate::limits::{MAX_CONFIG_BYTES, MAX_MANIFEST_BYTES};
use crate::reference::Reference;
use crate::store::{BlobWriter, Store, StoreError, Transaction};

/// Bytes that are read at once.
const CHUNK_BYTES: usize = 128 << 10;
/// Requests for one layer, whatever each of them brings.
const MAX_REQUESTS: u32 = 100;

impl Client {
    /// Fetches an image for this platform into the store, under its reference. Layers that the store has are not fetched.
    ///
    /// The layers' diff ids are checked where the layers are read ([`Store::layer_tar`]), their digests here.
    ///
    /// # Errors
    /// See [`RegistryError`]. Nothing of the image is in the store then.
    pub fn pull(&self, store: &Store, reference: &Reference, progress: &dyn Progress) -> Result<Image, RegistryError> {
        let session = Session::open(
            &self.options,
            reference.registry(),
            host_of(reference),
            reference.repository(),
            None,
            progress,
        )?;
        let pull = Pull {
            session: &session,
            reference,
            scope: format!("repository:{}:pull", reference.repository()),
            transaction: store.begin()?,
        };
        let image = pull.documents()?;
        pull.layers(&image.layers)?;
        let Pull { transaction, .. } = pull;
        transaction.commit(vec![(image.top.clone(), Some(reference.clone()))])?;
        Ok(Image { references: vec![reference.clone()], ..image })
    }
}

struct Pull<'p> {
    session: &'p Session<'p>,
    reference: &'p Reference,
    scope: String,
    transaction: Transaction,
}

impl Pull<'_> {
    fn url(&self, kind: &str, name: &str) -> String {
        format!("{}/v2/{}/{kind}/{name}", self.session.base, self.reference.repository())
    }

    fn manifest(&self, name: &str) -> Result<(Top, Vec<u8>), RegistryError> {
        let accept = [OCI_INDEX, OCI_MANIFEST, DOCKER_INDEX, DOCKER_MANIFEST].join(", ");
        let call = Call::get(self.url("manifests", name), &self.scope).header("accept", accept);
        let what = format!("the manifest of {}", self.reference.familiar());
        let (headers, bytes) = self.session.fetch(&call, &what, MAX_MANIFEST_BYTES)?;
        let media_type = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let media_type = media_type.split(';').next().unwrap_or_default().trim().to_owned();
        let top = Top { media_type, digest: Digest::of(&bytes), size: bytes.len() as u64 };
        let said = headers.get("docker-content-digest").and_then(|value| value.to_str().ok());
        let said = said.and_then(|said| said.parse::<Digest>().ok());
        for expected in said.into_iter().chain(name.parse::<Digest>()) {
            if expected != top.digest {
                return Err(StoreError::WrongDigest { what, expected, found: top.digest }.into());
            }
        }
        Ok((top, bytes))
    }

    /// Manifest and configuration, and the index that the manifest is in: they are in the store then.
    fn documents(&self) -> Result<Image, RegistryError> {
        let (top, bytes) = self.manifest(&self.reference.tag_or_digest())?;
        let mut first = Some(bytes);
        Image::read(&top, Vec::new(), |digest, document| -> Result<Vec<u8>, RegistryError> {
            let bytes = match (document, first.take()) {
                (Document::Manifest, Some(bytes)) => bytes,
                (Document::Manifest, None) => self.manifest(&digest.to_string())?.1,
                (Document::Config, _) => self.config(digest)?,
            };
            self.transaction.add_bytes(&format!("the document {digest}"), &bytes)?;
            Ok(bytes)
        })
    }

    fn config(&self, digest: &Digest) -> Result<Vec<u8>, RegistryError> {
        let call = Call::get(self.url("blobs", &digest.to_string()), &self.scope);
        let what = format!("the configuration {digest}");
        let (_, bytes) = self.session.fetch(&call, &what, MAX_CONFIG_BYTES)?;
        let found = Digest::of(&bytes);
        if found != *digest {
            return Err(StoreError::WrongDigest { what, expected: *digest, found }.into());
        }
        Ok(bytes)
    }

    fn layers(&self, layers: &[Layer]) -> Result<(), RegistryError> {
        let mut seen = HashSet::new();
        let layers: Vec<&Layer> = layers.iter().filter(|layer| seen.insert(layer.digest)).collect();
        in_parallel(self.session.options.threads, layers.len(), |at, stop| self.layer(layers[at], stop))
    }

    fn layer(&self, layer: &Layer, stop: &AtomicBool) -> Result<(), RegistryError> {
        let progress = self.session.progress;
        progress.begin(&layer.digest, layer.size);
        let what = format!("the layer {}", layer.digest);
        match self.transaction.claim(&layer.digest)? {
            Some(size) if size == layer.size => progress.end(&layer.digest, Outcome::Present),
            Some(found) => return Err(StoreError::WrongSize { what, expected: layer.size, found }.into()),
            None => {
                let mut writer = self.transaction.writer(&what, Some(layer.digest), Some(layer.size))?;
                let (mut failures, mut requests) = (0, 0);
                while writer.written() < layer.size || failures == 0 && layer.size == 0 {
                    let before = writer.written();
                    let Err(error) = self.part(layer, &what, &mut writer, stop) else {
                        break;
                    };
                    if !error.is_transient() {
                        return Err(error);
                    }
                    // What got us further is no failure of the same kind again.
                    failures = if writer.written() > before { 1 } else { failures + 1 };
                    requests += 1;
                    if failures >= self.session.options.attempts.max(1) || requests >= MAX_REQUESTS {
                        return Err(RegistryError::GivenUp { what, attempts: requests, source: Box::new(error) });
                    }
                    self.session.pause(&what, failures - 1, &error);
                }
                writer.finish()?;
                progress.end(&layer.digest, Outcome::Moved);
            }
        }
        Ok(())
    }

    /// One request for what is missing of a layer.
    fn part(
        &self,
        layer: &Layer,
        what: &str,
        writer: &mut BlobWriter<'_>,
        stop: &AtomicBool,
    ) -> Result<(), RegistryError> {
        let url = self.url("blobs", &layer.digest.to_string());
        let mut call = Call::get(&url, &self.scope);
        let from = writer.written();
        if from != 0 {
            call = call.header("range", format!("bytes={from}-{}", layer.size.saturating_sub(1)));
        }
        // The failures are counted by our caller.
        let response = self.session.call_part(&call, what)?;
        if from != 0 {
            let range = response.headers().get(header::CONTENT_RANGE).and_then(|value| value.to_str().ok());
            let continues = range.is_some_and(|range| range.trim_start().starts_with(&format!("bytes {from}-")));
            if response.status().as_u16() != 206 {
                // It sends everything again.
                writer.restart()?;
            } else if !continues {
                // It sends we don't know what: the next request is for everything.
                writer.restart()?;
                let source = std::io::Error::other("the registry answers with another range than it was asked for");
                return Err(RegistryError::Broken { url, source });
            }
        }
        let mut reader = response.into_body().into_reader();
        let mut chunk = vec![0; CHUNK_BYTES];
        loop {
            if stop.load(Ordering::Relaxed) {
                return Err(RegistryError::Stopped);
            }
            let count = match reader.read(&mut chunk) {
                Ok(count) => count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(source) => return Err(RegistryError::Broken { url, source }),
            };
            if count == 0 {
                break;
            }
            writer.put(&chunk[..count])?;
            self.session.progress.advance(&layer.digest, writer.written());
        }
        if writer.written() < layer.size {
            return Err(RegistryError::Broken { url, source: std::io::ErrorKind::UnexpectedEof.into() });
        }
        Ok(())
    }
}

/// Does `count` things on a few threads; the first failure stops the others.
pub(super) fn in_parallel(
    threads: usize,
    count: usize,
    work: impl Fn(usize, &AtomicBool) -> Result<(), RegistryError> + Sync,
) -> Result<(), RegistryError> {
    let next = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    let failure = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1).min(count) {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    if at >= count || stop.load(Ordering::Relaxed) {
                        return;
                    }
                    if let Err(error) = work(at, &stop) {
                        stop.store(true, Ordering::Relaxed);
                        let mut failure = failure.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                        failure.get_or_insert(error);
                    }
                }
            });
        }
    });
    match failure.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}
