//! An image: its manifest for this platform, its configuration and its layers, checked against each other.
//!
//! Read from a store, an archive and a registry alike (image-spec, `manifest.md`, `image-index.md`, `config.md`; docker's
//! schema 2 documents are the same but for their media types).

use oci_spec::image::{Arch, ImageConfiguration, ImageIndex, ImageManifest, Os};
use serde::Deserialize;

use crate::digest::Digest;
use crate::limits::{MAX_CONFIG_BYTES, MAX_INDEX_DEPTH, MAX_LAYERS, MAX_MANIFEST_BYTES, MAX_MANIFESTS_PER_INDEX};
use crate::reference::Reference;
use crate::store::StoreError;

/// OCI's media type of a manifest.
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// OCI's media type of an index.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// OCI's media type of an image configuration.
pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// OCI's media type of an uncompressed layer; with `+gzip` or `+zstd` for compressed ones.
pub const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
/// Docker's media type of a manifest.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// Docker's media type of an index.
pub const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
const DOCKER_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar";

/// What an image's reference points to: a manifest, or an index of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Top {
    /// Its media type.
    pub media_type: String,
    /// Its digest.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
}

/// A layer of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// The digest of the blob as it is stored, compressed or not.
    pub digest: Digest,
    /// The blob's length in bytes.
    pub size: u64,
    /// The digest of the tar stream in it.
    pub diff_id: Digest,
    /// Its media type, as the manifest has it.
    pub media_type: String,
}

/// An image for linux/amd64.
#[derive(Debug, Clone)]
pub struct Image {
    /// The digest of the manifest for this platform.
    pub digest: Digest,
    /// What the references point to: that manifest, or the index that it is in.
    pub top: Top,
    /// All of its references.
    pub references: Vec<Reference>,
    /// The manifest.
    pub manifest: ImageManifest,
    /// The manifest as it is stored.
    pub manifest_json: Vec<u8>,
    /// The digest of the configuration: what people know as the image's id.
    pub config_digest: Digest,
    /// The configuration.
    pub config: ImageConfiguration,
    /// The configuration as it is stored: it may have what OCI does not know, such as docker's `Healthcheck`.
    pub config_json: Vec<u8>,
    /// The layers, lowest first.
    pub layers: Vec<Layer>,
}

/// The documents that an image is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Document {
    Manifest,
    Config,
}

impl Document {
    pub(crate) fn limit(self) -> u64 {
        match self {
            Self::Manifest => MAX_MANIFEST_BYTES,
            Self::Config => MAX_CONFIG_BYTES,
        }
    }
}

/// What tells a manifest from an index.
#[derive(Deserialize)]
struct Shape {
    #[serde(rename = "schemaVersion")]
    schema_version: Option<u32>,
    #[serde(rename = "mediaType")]
    media_type: Option<String>,
    manifests: Option<serde::de::IgnoredAny>,
    layers: Option<serde::de::IgnoredAny>,
    config: Option<serde::de::IgnoredAny>,
}

impl Image {
    /// The configuration's digest, which people know as the image's id.
    #[must_use]
    pub fn id(&self) -> Digest {
        self.config_digest
    }

    /// Bytes of all that the image is made of, as it is stored.
    #[must_use]
    pub fn size(&self) -> u64 {
        let documents = self.manifest_json.len() as u64 + self.config_json.len() as u64;
        self.layers.iter().fold(documents, |sum, layer| sum.saturating_add(layer.size))
    }

    /// All about it, for people and scripts.
    #[must_use]
    pub fn inspect(&self) -> serde_json::Value {
        let config: serde_json::Value = serde_json::from_slice(&self.config_json).unwrap_or_default();
        let layers = self.layers.iter().map(|layer| {
            serde_json::json!({
                "Digest": layer.digest.to_string(), "DiffID": layer.diff_id.to_string(),
                "Size": layer.size, "MediaType": layer.media_type,
            })
        });
        serde_json::json!({
            "Id": self.config_digest.to_string(),
            "Digest": self.top.digest.to_string(),
            "ManifestDigest": self.digest.to_string(),
            "RepoTags": self.references.iter().map(Reference::familiar).collect::<Vec<_>>(),
            "Created": config["created"],
            "Author": config["author"],
            "Architecture": config["architecture"],
            "Os": config["os"],
            "Size": self.size(),
            "Config": config["config"],
            "RootFS": { "Type": "layers", "Layers": self.layers.iter().map(|layer| layer.diff_id.to_string()).collect::<Vec<_>>() },
            "Layers": layers.collect::<Vec<_>>(),
            "History": config["history"],
        })
    }

    /// Reads the image that `top` points to. `fetch` brings a document, which is checked here again.
    pub(crate) fn read<E: From<StoreError>>(
        top: &Top,
        references: Vec<Reference>,
        mut fetch: impl FnMut(&Digest, Document) -> Result<Vec<u8>, E>,
    ) -> Result<Self, E> {
        let mut at = top.clone();
        for _ in 0..=MAX_INDEX_DEPTH {
            let bytes = fetch(&at.digest, Document::Manifest)?;
            check(&format!("the manifest {}", at.digest), &bytes, &at.digest, at.size)?;
            match parse(&at, &bytes)? {
                Parsed::Index(index) => at = select(&format!("the index {}", at.digest), &index)?,
                Parsed::Manifest(manifest) => {
                    let what = format!("the manifest {}", at.digest);
                    let (config_digest, size) = config_of(&what, &manifest)?;
                    let config_json = fetch(&config_digest, Document::Config)?;
                    let config_name = format!("the configuration {config_digest}");
                    check(&config_name, &config_json, &config_digest, size)?;
                    let config: ImageConfiguration =
                        serde_json::from_slice(&config_json).map_err(StoreError::json(&config_name))?;
                    if *config.os() != Os::Linux || *config.architecture() != Arch::Amd64 {
                        return Err(StoreError::NoPlatform {
                            what: format!("the image {config_digest}"),
                            available: format!("{}/{}", config.os(), config.architecture()),
                        }
                        .into());
                    }
                    let layers = layers_of(&what, &manifest, &config)?;
                    return Ok(Self {
                        digest: at.digest,
                        top: top.clone(),
                        references,
                        manifest: *manifest,
                        manifest_json: bytes,
                        config_digest,
                        config,
                        config_json,
                        layers,
                    });
                }
            }
        }
        Err(StoreError::Corrupt {
            what: format!("the index {}", top.digest),
            reason: format!("indexes are nested in it more than {MAX_INDEX_DEPTH} deep"),
        }
        .into())
    }
}

pub(crate) enum Parsed {
    Index(Box<ImageIndex>),
    Manifest(Box<ImageManifest>),
}

/// Reads a manifest or an index, as `at.media_type` (or, if that is empty, its own content) says.
pub(crate) fn parse(at: &Top, bytes: &[u8]) -> Result<Parsed, StoreError> {
    let what = format!("the manifest {}", at.digest);
    let shape: Shape = serde_json::from_slice(bytes).map_err(StoreError::json(&what))?;
    let inner = shape.media_type.as_deref().unwrap_or_default();
    if !at.media_type.is_empty() && !inner.is_empty() && inner != at.media_type {
        return Err(StoreError::Corrupt {
            what,
            reason: format!("its descriptor calls it {:?}, and it calls itself {inner:?}", at.media_type),
        });
    }
    let media_type = if at.media_type.is_empty() { inner } else { &at.media_type };
    let is_index = match media_type {
        OCI_INDEX | DOCKER_INDEX => true,
        OCI_MANIFEST | DOCKER_MANIFEST => false,
        "" if shape.schema_version == Some(2) => shape.manifests.is_some(),
        _ => {
            let schema1 = shape.schema_version == Some(1) || media_type.contains("manifest.v1+");
            return Err(StoreError::MediaType {
                what,
                media_type: media_type.chars().take(200).collect(),
                reason: if schema1 {
                    "docker's schema 1 is obsolete and has no digests to check; push the image again with a current tool"
                } else {
                    "it is neither an image manifest nor an index"
                },
            });
        }
    };
    // A document that reads both ways could mean one image to us and another to whoever checked it.
    if shape.manifests.is_some() && (shape.layers.is_some() || shape.config.is_some()) {
        return Err(StoreError::Corrupt { what, reason: "it is a manifest and an index at once".to_owned() });
    }
    if is_index {
        let index: ImageIndex = serde_json::from_slice(bytes).map_err(StoreError::json(&what))?;
        if index.manifests().len() > MAX_MANIFESTS_PER_INDEX {
            return Err(StoreError::Corrupt {
                what,
                reason: format!("it lists more than {MAX_MANIFESTS_PER_INDEX} manifests"),
            });
        }
        Ok(Parsed::Index(Box::new(index)))
    } else {
        serde_json::from_slice(bytes).map(Box::new).map(Parsed::Manifest).map_err(StoreError::json(&what))
    }
}

/// The entry of an index that this platform runs: linux/amd64, the plain variant before others.
pub(crate) fn select(what: &str, index: &ImageIndex) -> Result<Top, StoreError> {
    let mut best = None;
    let mut available = Vec::new();
    for descriptor in index.manifests() {
        let rank = match descriptor.platform() {
            // The specification leaves the platform out where there is no choice.
            None => 3,
            Some(platform) => {
                available.push(format!("{}/{}", platform.os(), platform.architecture()));
                if *platform.os() != Os::Linux || *platform.architecture() != Arch::Amd64 {
                    continue;
                }
                match platform.variant().as_deref() {
                    None | Some("") => 0,
                    Some("v1") => 1,
                    // Built for newer processors than we know to be here.
                    Some(_) => 2,
                }
            }
        };
        if best.as_ref().is_none_or(|(of_best, _)| rank < *of_best) {
            best = Some((rank, descriptor));
        }
    }
    let Some((_, descriptor)) = best else {
        available.truncate(20);
        return Err(StoreError::NoPlatform {
            what: what.to_owned(),
            available: if available.is_empty() { "nothing".to_owned() } else { available.join(", ") },
        });
    };
    top_of(what, descriptor)
}

/// A descriptor, with its digest checked.
pub(crate) fn top_of(what: &str, descriptor: &oci_spec::image::Descriptor) -> Result<Top, StoreError> {
    let digest =
        Digest::try_from(descriptor.digest()).map_err(|source| StoreError::Digest { what: what.to_owned(), source })?;
    Ok(Top { media_type: descriptor.media_type().to_string(), digest, size: descriptor.size() })
}

fn check(what: &str, bytes: &[u8], expected: &Digest, size: u64) -> Result<(), StoreError> {
    if bytes.len() as u64 != size {
        return Err(StoreError::WrongSize { what: what.to_owned(), expected: size, found: bytes.len() as u64 });
    }
    let found = Digest::of(bytes);
    if found != *expected {
        return Err(StoreError::WrongDigest { what: what.to_owned(), expected: *expected, found });
    }
    Ok(())
}

fn config_of(what: &str, manifest: &ImageManifest) -> Result<(Digest, u64), StoreError> {
    let config = manifest.config();
    let media_type = config.media_type().to_string();
    if media_type != OCI_CONFIG && media_type != DOCKER_CONFIG {
        return Err(StoreError::MediaType {
            what: format!("the configuration in {what}"),
            media_type,
            reason: "this is an artifact of another kind, not a container image",
        });
    }
    let top = top_of(what, config)?;
    Ok((top.digest, top.size))
}

fn layers_of(what: &str, manifest: &ImageManifest, config: &ImageConfiguration) -> Result<Vec<Layer>, StoreError> {
    let diff_ids = config.rootfs().diff_ids();
    let descriptors = manifest.layers();
    let corrupt = |reason: String| StoreError::Corrupt { what: what.to_owned(), reason };
    if descriptors.len() > MAX_LAYERS {
        return Err(corrupt(format!(
            "it has {} layers, and {MAX_LAYERS} are the most that can be stacked",
            descriptors.len()
        )));
    }
    if descriptors.len() != diff_ids.len() {
        return Err(corrupt(format!(
            "it has {} layers, but its configuration has {} diff ids",
            descriptors.len(),
            diff_ids.len()
        )));
    }
    let mut layers = Vec::with_capacity(descriptors.len());
    for (descriptor, diff_id) in descriptors.iter().zip(diff_ids) {
        let top = top_of(what, descriptor)?;
        check_layer_type(&top)?;
        let diff_id = diff_id.parse().map_err(|source| StoreError::Digest { what: what.to_owned(), source })?;
        layers.push(Layer { digest: top.digest, size: top.size, diff_id, media_type: top.media_type });
    }
    Ok(layers)
}

fn check_layer_type(layer: &Top) -> Result<(), StoreError> {
    let media_type = layer.media_type.as_str();
    let compression = media_type.strip_prefix(OCI_LAYER).or_else(|| media_type.strip_prefix(DOCKER_LAYER));
    if matches!(compression, Some("" | "+gzip" | ".gzip" | "+zstd" | ".zstd")) {
        return Ok(());
    }
    let reason = if media_type.contains("foreign") || media_type.contains("nondistributable") {
        "foreign layers are not in the registry or archive, but somewhere else, and are not followed"
    } else if media_type.contains("encrypted") {
        "encrypted layers are not supported: decrypt the image first (skopeo copy --decryption-key)"
    } else {
        "only tar layers, plain or compressed with gzip or zstd, are supported"
    };
    Err(StoreError::MediaType {
        what: format!("the layer {}", layer.digest),
        media_type: media_type.to_owned(),
        reason,
    })
}

#[cfg(test)]
mod tests;
