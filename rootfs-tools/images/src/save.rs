//! Images into files: OCI layouts in a tar, and docker-archives, for `skopeo`, `podman load` and `docker load`.
//!
//! The same image makes the same bytes: no times, no owners.

use std::collections::HashSet;
use std::io::{self, Read, Write};

use serde_json::json;
use tar::{Builder, EntryType, Header};

use crate::digest::Digest;
use crate::image::{Image, OCI_INDEX, Top};
use crate::reference::Reference;
use crate::store::{Store, StoreError};

/// What is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// `docker save`'s: a `manifest.json` and uncompressed layers.
    #[default]
    DockerArchive,
    /// A tar of an OCI layout, with manifests and layers as they are.
    OciArchive,
}

/// Why saving failed.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// A blob is missing or damaged.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The output can't be written, or a layer not be read.
    #[error("cannot write {what} to the archive")]
    Write {
        /// The member.
        what: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Some document can't be made.
    #[error("cannot write the archive's index")]
    Json(#[from] serde_json::Error),
}

impl Store {
    /// Writes images, each with the references given (by default all that it has), to one archive.
    ///
    /// # Errors
    /// A blob is missing or damaged, or the output can't be written.
    pub fn save(
        &self,
        images: &[(Image, Option<Vec<Reference>>)],
        format: Format,
        output: impl Write,
    ) -> Result<(), SaveError> {
        let mut archive = Archive { tar: Builder::new(output), written: HashSet::new() };
        match format {
            Format::DockerArchive => self.save_docker(images, &mut archive)?,
            Format::OciArchive => self.save_oci(images, &mut archive)?,
        }
        let finished = archive.tar.into_inner().and_then(|mut output| output.flush());
        finished.map_err(|source| SaveError::Write { what: "the end".to_owned(), source })
    }

    fn save_oci(
        &self,
        images: &[(Image, Option<Vec<Reference>>)],
        archive: &mut Archive<impl Write>,
    ) -> Result<(), SaveError> {
        archive.bytes("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        let mut manifests = Vec::new();
        for (image, references) in images {
            // The platform's manifest alone: the others that an index names are not here.
            let media_type = image.manifest.media_type().as_ref().map(ToString::to_string);
            let media_type = media_type.unwrap_or_else(|| crate::image::OCI_MANIFEST.to_owned());
            let top = Top { media_type, digest: image.digest, size: image.manifest_json.len() as u64 };
            let descriptor = |name: Option<&Reference>| {
                let mut descriptor = json!({
                    "mediaType": top.media_type, "digest": top.digest.to_string(), "size": top.size,
                    "platform": { "os": "linux", "architecture": "amd64" },
                });
                if let Some(name) = name {
                    descriptor["annotations"] = json!({
                        "org.opencontainers.image.ref.name": name.to_string(), "io.containerd.image.name": name.to_string(),
                    });
                }
                descriptor
            };
            match references.as_ref().unwrap_or(&image.references).as_slice() {
                [] => manifests.push(descriptor(None)),
                references => manifests.extend(references.iter().map(|name| descriptor(Some(name)))),
            }
            archive.bytes(&blob_name(&image.digest), &image.manifest_json)?;
            archive.bytes(&blob_name(&image.config_digest), &image.config_json)?;
            for layer in &image.layers {
                archive.stream(&blob_name(&layer.digest), layer.size, self.blob(&layer.digest)?)?;
            }
        }
        let index = json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests });
        archive.bytes("index.json", &serde_json::to_vec(&index)?)
    }

    fn save_docker(
        &self,
        images: &[(Image, Option<Vec<Reference>>)],
        archive: &mut Archive<impl Write>,
    ) -> Result<(), SaveError> {
        let mut items = Vec::new();
        for (image, references) in images {
            let config = format!("{}.json", image.config_digest.hex());
            archive.bytes(&config, &image.config_json)?;
            let mut layers = Vec::new();
            for layer in &image.layers {
                let name = format!("{}.tar", layer.diff_id.hex());
                if !archive.written.contains(&name) {
                    // A tar header has the length first, and the compressed layer does not tell it.
                    let mut length = 0;
                    let failed = |source| SaveError::Write { what: name.clone(), source };
                    let mut reader = self.layer_tar(layer)?;
                    let mut chunk = vec![0; 128 << 10];
                    loop {
                        match reader.read(&mut chunk).map_err(failed)? {
                            0 => break,
                            count => length += count as u64,
                        }
                    }
                    archive.stream(&name, length, self.layer_tar(layer)?)?;
                }
                layers.push(name);
            }
            let references = references.as_ref().unwrap_or(&image.references);
            // docker's archives have tags alone.
            let tags = references
                .iter()
                .filter_map(|reference| reference.tag().map(|tag| format!("{}:{tag}", reference.familiar_name())));
            items.push(json!({ "Config": config, "RepoTags": tags.collect::<Vec<_>>(), "Layers": layers }));
        }
        archive.bytes("manifest.json", &serde_json::to_vec(&items)?)
    }
}

fn blob_name(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

struct Archive<W: Write> {
    tar: Builder<W>,
    written: HashSet<String>,
}

impl<W: Write> Archive<W> {
    fn bytes(&mut self, name: &str, bytes: &[u8]) -> Result<(), SaveError> {
        self.stream(name, bytes.len() as u64, bytes)
    }

    fn stream(&mut self, name: &str, len_bytes: u64, content: impl Read) -> Result<(), SaveError> {
        if !self.written.insert(name.to_owned()) {
            return Ok(());
        }
        let mut header = Header::new_ustar();
        header.set_entry_type(EntryType::Regular);
        header.set_mode(0o644);
        header.set_mtime(0);
        header.set_size(len_bytes);
        self.tar
            .append_data(&mut header, name, content)
            .map_err(|source| SaveError::Write { what: name.to_owned(), source })
    }
}
