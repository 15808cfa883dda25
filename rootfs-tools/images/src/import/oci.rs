//! OCI layouts: which images an `index.json` names, and what they are called.

use std::path::Path;

use oci_spec::image::{Descriptor, ImageIndex};

use super::{Found, Import, ImportError, ImportOptions, open_layout_file};
use crate::digest::Digest;
use crate::image::{Image, select, top_of};
use crate::limits::{MAX_BLOB_BYTES, MAX_MANIFESTS_PER_INDEX};
use crate::reference::Reference;
use crate::store::StoreError;

/// containerd's annotation with the full reference; docker and buildkit write it as well.
const CONTAINERD_NAME: &str = "io.containerd.image.name";
/// OCI's, which tools fill with a full reference or with a mere tag.
const REF_NAME: &str = "org.opencontainers.image.ref.name";

impl Import {
    /// The images of a layout. Its blobs are in the store already, or in `directory`.
    pub(super) fn oci(
        &mut self,
        index: &[u8],
        options: &ImportOptions,
        directory: Option<&Path>,
    ) -> Result<Vec<Found>, ImportError> {
        let what = format!("index.json in {}", self.what);
        let content = self.content();
        let index: ImageIndex = serde_json::from_slice(index).map_err(StoreError::json(&what)).map_err(&content)?;
        if index.manifests().len() > MAX_MANIFESTS_PER_INDEX {
            let reason = format!("it lists more than {MAX_MANIFESTS_PER_INDEX} manifests");
            return Err(content(StoreError::Corrupt { what, reason }));
        }
        let mut groups: Vec<(Option<String>, Vec<&Descriptor>)> = Vec::new();
        for descriptor in index.manifests() {
            let annotations = descriptor.annotations().as_ref();
            let name =
                annotations.and_then(|found| found.get(CONTAINERD_NAME).or_else(|| found.get(REF_NAME))).cloned();
            // A name that comes more than once, or no name at all, means one image for several platforms.
            match groups.iter_mut().find(|(of_group, _)| *of_group == name) {
                Some((_, descriptors)) => descriptors.push(descriptor),
                None => groups.push((name, vec![descriptor])),
            }
        }
        if groups.is_empty() {
            return Err(ImportError::NoImage { what: self.what.clone(), reason: "its index.json is empty".to_owned() });
        }
        let mut all: Vec<Found> = Vec::new();
        for (name, descriptors) in groups {
            let top = match descriptors.as_slice() {
                [descriptor] => top_of(&what, descriptor),
                _ if descriptors.iter().all(|descriptor| descriptor.platform().is_none()) => {
                    return self.oci_each(&descriptors, directory);
                }
                _ => {
                    let mut group = index.clone();
                    group.set_manifests(descriptors.into_iter().cloned().collect());
                    select(&what, &group)
                }
            };
            let image = self.oci_image(&top.map_err(&content)?, directory)?;
            let references: Vec<Reference> = match name {
                // The caller's own name comes instead.
                Some(name) if options.reference.is_none() => self.reference(&name, options)?.into_iter().collect(),
                _ => Vec::new(),
            };
            match all.iter_mut().find(|found| found.image.top.digest == image.top.digest) {
                Some(found) => found.references.extend(references),
                None => all.push(Found { image, references }),
            }
        }
        if let Some(reference) = self.named(options, all.len())?
            && let [only] = all.as_mut_slice()
        {
            only.references = vec![reference];
        }
        Ok(all)
    }

    /// Images without a name and a platform are that many images.
    fn oci_each(&mut self, descriptors: &[&Descriptor], directory: Option<&Path>) -> Result<Vec<Found>, ImportError> {
        let what = format!("index.json in {}", self.what);
        let mut all = Vec::new();
        for descriptor in descriptors {
            let top = top_of(&what, descriptor).map_err(self.content())?;
            all.push(Found { image: self.oci_image(&top, directory)?, references: Vec::new() });
        }
        Ok(all)
    }

    fn oci_image(&mut self, top: &crate::image::Top, directory: Option<&Path>) -> Result<Image, ImportError> {
        let image = Image::read(top, Vec::new(), |digest, document| -> Result<Vec<u8>, Failure> {
            self.bring(digest, None, directory)?;
            Ok(self.transaction.store().read_blob(digest, document.limit())?)
        })
        .map_err(|failure| match failure {
            Failure::Import(error) => error,
            Failure::Store(source) => self.content()(source),
        })?;
        for layer in &image.layers {
            let size = self.bring(&layer.digest, Some(layer.size), directory)?;
            if size != layer.size {
                return Err(self.content()(StoreError::WrongSize {
                    what: format!("the layer {}", layer.digest),
                    expected: layer.size,
                    found: size,
                }));
            }
        }
        self.verify(&image.layers)?;
        Ok(image)
    }

    /// Sees to it that a blob is in the store, and tells its size.
    fn bring(&self, digest: &Digest, size: Option<u64>, directory: Option<&Path>) -> Result<u64, ImportError> {
        if let Some(size) = self.transaction.claim(digest).map_err(self.content())? {
            return Ok(size);
        }
        let name = format!("blobs/sha256/{}", digest.hex());
        let Some(directory) = directory else {
            return Err(ImportError::Incomplete { what: self.what.clone(), missing: name });
        };
        let mut file = open_layout_file(&self.what, directory, &name)?;
        let what = format!("{name} in {}", self.what);
        let size = size.filter(|size| *size <= MAX_BLOB_BYTES);
        let mut writer = self.transaction.writer(what, Some(*digest), size).map_err(self.content())?;
        writer.write_from(&mut file).map_err(self.content())?;
        let (_, size) = writer.finish().map_err(self.content())?;
        Ok(size)
    }

    fn reference(&self, name: &str, options: &ImportOptions) -> Result<Option<Reference>, ImportError> {
        let full = if name.contains(['/', ':']) {
            name.to_owned()
        } else {
            // A mere tag: the file's or directory's name is all that tells what of.
            match options.stem.as_deref().filter(|stem| stem.parse::<Reference>().is_ok()) {
                Some(stem) => format!("{stem}:{name}"),
                None => return Ok(None),
            }
        };
        full.parse().map(Some).map_err(|source| ImportError::Name {
            what: self.what.clone(),
            name: name.chars().take(300).collect(),
            source,
        })
    }
}

/// What [`Image::read`] can fail with here.
enum Failure {
    Import(ImportError),
    Store(StoreError),
}

impl From<StoreError> for Failure {
    fn from(source: StoreError) -> Self {
        Self::Store(source)
    }
}

impl From<ImportError> for Failure {
    fn from(error: ImportError) -> Self {
        Self::Import(error)
    }
}
