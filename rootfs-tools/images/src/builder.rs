//! Making images: layers from tar streams, a configuration, a manifest.

use std::io::{self, Read, Write};

use serde::Serialize;

use crate::digest::{Digest, Hashing};
use crate::image::{Image, Layer, OCI_CONFIG, OCI_MANIFEST, Top};
use crate::layer::Compression;
use crate::limits::{MAX_LAYER_TAR_BYTES, MAX_LAYERS};
use crate::reference::Reference;
use crate::store::{BlobWriter, Store, StoreError, Transaction};

/// gzip's level: what docker and buildah use.
const GZIP_LEVEL: u32 = 6;
/// zstd's level: its own default.
const ZSTD_LEVEL: i32 = 3;

/// An image in the making. Nothing of it stays without [`finish`](Self::finish).
#[derive(Debug)]
pub struct ImageBuilder {
    transaction: Transaction,
    layers: Vec<Layer>,
}

impl Store {
    /// Starts an image.
    ///
    /// # Errors
    /// The store can't be written.
    pub fn create_image(&self) -> Result<ImageBuilder, StoreError> {
        Ok(ImageBuilder { transaction: self.begin()?, layers: Vec::new() })
    }
}

impl ImageBuilder {
    /// The layers so far, lowest first.
    #[must_use]
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// Adds a layer that the store has, such as those of a base image.
    ///
    /// # Errors
    /// The store does not have it, or there are too many.
    pub fn add_layer(&mut self, layer: &Layer) -> Result<(), StoreError> {
        match self.transaction.claim(&layer.digest)? {
            Some(_) => self.push(layer.clone()),
            None => Err(StoreError::MissingBlob {
                digest: layer.digest,
                store: self.transaction.store().directory().to_owned(),
            }),
        }
    }

    /// Adds a layer from an uncompressed tar stream. The same stream makes the same blob, always.
    ///
    /// # Errors
    /// Reading or writing fails, or it is too long.
    pub fn add_layer_tar(&mut self, tar: &mut impl Read, compression: Compression) -> Result<Layer, StoreError> {
        let number = self.layers.len();
        let writer = self.transaction.writer(format!("layer {number} of the new image"), None, None)?;
        let mut encoder = Hashing::new(Encoder::new(writer, compression)?);
        let mut chunk = vec![0; 128 << 10];
        let what = format!("the tar stream of layer {number}");
        loop {
            let count = match tar.read(&mut chunk) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => {
                    return Err(StoreError::Io { action: "read", path: what.into(), source });
                }
            };
            if encoder.count() + count as u64 > MAX_LAYER_TAR_BYTES {
                return Err(StoreError::TooLong { what, limit: MAX_LAYER_TAR_BYTES });
            }
            encoder.write_all(&chunk[..count]).map_err(|source| StoreError::Io {
                action: "write the blob of",
                path: what.clone().into(),
                source,
            })?;
        }
        let (encoder, diff_id, _) = encoder.finish();
        let writer = encoder.finish().map_err(|source| StoreError::Io {
            action: "write the blob of",
            path: what.into(),
            source,
        })?;
        let (digest, size) = writer.finish()?;
        let layer = Layer { digest, size, diff_id, media_type: compression.media_type() };
        self.push(layer.clone())?;
        Ok(layer)
    }

    /// Adds configuration and manifest, and puts the image into the store, with these references; without any it stays
    /// until the next prune, unless it is pinned.
    ///
    /// `config` is an [`ImageConfiguration`](oci_spec::image::ImageConfiguration), or JSON of that shape with more in it; its
    /// `rootfs` is set here.
    ///
    /// # Errors
    /// The configuration is no JSON object or not for linux/amd64, or the store can't be written.
    pub fn finish(self, config: &impl Serialize, references: &[Reference]) -> Result<Image, StoreError> {
        let what = "the new image's configuration";
        let mut config = serde_json::to_value(config).map_err(StoreError::json(what))?;
        let Some(object) = config.as_object_mut() else {
            return Err(StoreError::Corrupt { what: what.to_owned(), reason: "it is no JSON object".to_owned() });
        };
        let diff_ids: Vec<String> = self.layers.iter().map(|layer| layer.diff_id.to_string()).collect();
        object.insert("rootfs".to_owned(), serde_json::json!({ "type": "layers", "diff_ids": diff_ids }));
        let config_json = serde_json::to_vec(&config).map_err(StoreError::json(what))?;
        let config_digest = self.transaction.add_bytes(what, &config_json)?;
        let manifest_json = manifest(&config_digest, config_json.len() as u64, &self.layers)?;
        let digest = self.transaction.add_bytes("the new image's manifest", &manifest_json)?;
        let top = Top { media_type: OCI_MANIFEST.to_owned(), digest, size: manifest_json.len() as u64 };
        let store = self.transaction.store().clone();
        let image =
            Image::read(&top, references.to_vec(), |digest, document| store.read_blob(digest, document.limit()))?;
        let entries = match references {
            [] => vec![(top, None)],
            references => references.iter().map(|reference| (top.clone(), Some(reference.clone()))).collect(),
        };
        self.transaction.commit(entries)?;
        Ok(image)
    }

    fn push(&mut self, layer: Layer) -> Result<(), StoreError> {
        if self.layers.len() >= MAX_LAYERS {
            return Err(StoreError::Corrupt {
                what: "the new image".to_owned(),
                reason: format!("it would have more than {MAX_LAYERS} layers, the most that can be stacked"),
            });
        }
        self.layers.push(layer);
        Ok(())
    }
}

/// An OCI manifest.
pub(crate) fn manifest(config: &Digest, config_len: u64, layers: &[Layer]) -> Result<Vec<u8>, StoreError> {
    let layers = layers.iter().map(|layer| {
        serde_json::json!({ "mediaType": layer.media_type, "digest": layer.digest.to_string(), "size": layer.size })
    });
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": { "mediaType": OCI_CONFIG, "digest": config.to_string(), "size": config_len },
        "layers": layers.collect::<Vec<_>>(),
    });
    serde_json::to_vec(&manifest).map_err(StoreError::json("the new image's manifest"))
}

enum Encoder<'t> {
    None(BlobWriter<'t>),
    Gzip(flate2::write::GzEncoder<BlobWriter<'t>>),
    Zstd(zstd::stream::write::Encoder<'static, BlobWriter<'t>>),
}

impl<'t> Encoder<'t> {
    fn new(writer: BlobWriter<'t>, compression: Compression) -> Result<Self, StoreError> {
        Ok(match compression {
            Compression::None => Self::None(writer),
            // flate2 writes neither a time nor a name into the header.
            Compression::Gzip => {
                Self::Gzip(flate2::write::GzEncoder::new(writer, flate2::Compression::new(GZIP_LEVEL)))
            }
            Compression::Zstd => {
                let encoder = zstd::stream::write::Encoder::new(writer, ZSTD_LEVEL);
                Self::Zstd(encoder.map_err(|source| StoreError::Io {
                    action: "set up the encoder of",
                    path: "the new layer".into(),
                    source,
                })?)
            }
        })
    }

    fn finish(self) -> io::Result<BlobWriter<'t>> {
        match self {
            Self::None(writer) => Ok(writer),
            Self::Gzip(encoder) => encoder.finish(),
            Self::Zstd(encoder) => encoder.finish(),
        }
    }
}

impl Write for Encoder<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::None(writer) => writer.write(bytes),
            Self::Gzip(encoder) => encoder.write(bytes),
            Self::Zstd(encoder) => encoder.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::None(writer) => writer.flush(),
            Self::Gzip(encoder) => encoder.flush(),
            Self::Zstd(encoder) => encoder.flush(),
        }
    }
}
