//! The store's `index.json`: which images there are, and their references.

use std::fs::File;
use std::io;

use serde::{Deserialize, Serialize};

use super::{Store, StoreError, read_bounded};
use crate::digest::Digest;
use crate::image::{Document, Image, Top};
use crate::limits::{MAX_LAYERS, MAX_STORE_INDEX_BYTES};
use crate::reference::Reference;

/// The annotation that carries a reference (image-spec, `annotations.md`).
pub(crate) const REF_NAME: &str = "org.opencontainers.image.ref.name";

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct LayoutHeader {
    #[serde(rename = "imageLayoutVersion")]
    pub(crate) version: String,
}

/// One reference of an image, or an image without any.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) descriptor: Top,
    pub(crate) reference: Option<Reference>,
}

#[derive(Debug, Default)]
pub(crate) struct Index {
    entries: Vec<Entry>,
}

#[derive(Serialize, Deserialize)]
struct FileIndex {
    #[serde(rename = "schemaVersion")]
    schema_version: u32,
    manifests: Vec<FileEntry>,
}

#[derive(Serialize, Deserialize)]
struct FileEntry {
    #[serde(rename = "mediaType")]
    media_type: String,
    digest: String,
    size: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    annotations: Option<std::collections::BTreeMap<String, String>>,
}

impl Index {
    /// One entry for each image.
    pub(crate) fn images(&self) -> impl Iterator<Item = &Entry> {
        let mut seen = std::collections::HashSet::new();
        self.entries.iter().filter(move |entry| seen.insert(entry.descriptor.digest))
    }

    pub(crate) fn by_reference(&self, reference: &Reference) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.reference.as_ref() == Some(reference))
    }

    pub(crate) fn references(&self, digest: &Digest) -> Vec<Reference> {
        let of_image = self.entries.iter().filter(|entry| entry.descriptor.digest == *digest);
        of_image.filter_map(|entry| entry.reference.clone()).collect()
    }

    pub(crate) fn holds(&self, digest: &Digest) -> bool {
        self.entries.iter().any(|entry| entry.descriptor.digest == *digest)
    }

    /// Adds an image or a reference of it; the reference leaves the image that had it.
    pub(crate) fn add(&mut self, descriptor: Top, reference: Option<Reference>) {
        if let Some(reference) = &reference {
            if self.by_reference(reference).is_some_and(|entry| entry.descriptor.digest == descriptor.digest) {
                return;
            }
            self.untag(reference);
            self.entries.retain(|entry| entry.reference.is_some() || entry.descriptor.digest != descriptor.digest);
        } else if self.holds(&descriptor.digest) {
            return;
        }
        self.entries.push(Entry { descriptor, reference });
    }

    /// Takes a reference away; its image stays, without one if it was the last.
    pub(crate) fn untag(&mut self, reference: &Reference) {
        let Some(at) = self.entries.iter().position(|entry| entry.reference.as_ref() == Some(reference)) else {
            return;
        };
        let digest = self.entries[at].descriptor.digest;
        if self.entries.iter().filter(|entry| entry.descriptor.digest == digest).count() > 1 {
            self.entries.remove(at);
        } else {
            self.entries[at].reference = None;
        }
    }

    pub(crate) fn drop_image(&mut self, digest: &Digest) {
        self.entries.retain(|entry| entry.descriptor.digest != *digest);
    }
}

impl Store {
    /// Reads the index. It is replaced as a whole, so that this needs no lock; that its blobs stay, does.
    pub(crate) fn load_index(&self) -> Result<Index, StoreError> {
        let path = self.directory.join("index.json");
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Index::default()),
            Err(source) => return Err(StoreError::io("open", &path)(source)),
        };
        let bytes = read_bounded(file, MAX_STORE_INDEX_BYTES, &path)?;
        let what = path.display().to_string();
        let read: FileIndex = serde_json::from_slice(&bytes).map_err(StoreError::json(&what))?;
        let mut index = Index::default();
        for entry in read.manifests {
            let digest: Digest =
                entry.digest.parse().map_err(|source| StoreError::Digest { what: what.clone(), source })?;
            let name = entry.annotations.and_then(|mut annotations| annotations.remove(REF_NAME));
            let reference = name.map(|name| name.parse()).transpose()?;
            let descriptor = Top { media_type: entry.media_type, digest, size: entry.size };
            index.entries.push(Entry { descriptor, reference });
        }
        Ok(index)
    }

    /// Writes the index. The caller holds the exclusive lock.
    pub(crate) fn save_index(&self, index: &Index) -> Result<(), StoreError> {
        let manifests = index.entries.iter().map(|entry| FileEntry {
            media_type: entry.descriptor.media_type.clone(),
            digest: entry.descriptor.digest.to_string(),
            size: entry.descriptor.size,
            annotations: entry.reference.as_ref().map(|name| [(REF_NAME.to_owned(), name.to_string())].into()),
        });
        let file = FileIndex { schema_version: 2, manifests: manifests.collect() };
        let path = self.directory.join("index.json");
        let bytes = serde_json::to_vec(&file).map_err(StoreError::json(&path.display().to_string()))?;
        self.replace(&path, &bytes)
    }

    /// All images. The caller holds the shared lock.
    pub(super) fn images(&self) -> Result<Vec<Image>, StoreError> {
        let index = self.load_index()?;
        index.images().map(|entry| self.read_with(entry, &index)).collect()
    }

    /// One image. The caller holds the shared lock.
    pub(super) fn read_image(&self, entry: &Entry) -> Result<Image, StoreError> {
        self.read_with(entry, &self.load_index()?)
    }

    fn read_with(&self, entry: &Entry, index: &Index) -> Result<Image, StoreError> {
        let references = index.references(&entry.descriptor.digest);
        let image = Image::read(&entry.descriptor, references, |digest, document: Document| {
            self.read_blob(digest, document.limit())
        })?;
        debug_assert!(image.layers.len() <= MAX_LAYERS);
        Ok(image)
    }
}
