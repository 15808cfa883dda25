//! docker-archives (`docker save`, `podman save`, `skopeo copy docker-archive:`): a `manifest.json` that names files.
//!
//! They have no manifests of their own, so an OCI manifest is made, always the same for the same configuration and layers.

use std::io::Read;

use serde::Deserialize;

use super::{Found, Import, ImportError, ImportOptions};
use crate::builder::manifest;
use crate::digest::Digest;
use crate::image::{Image, Layer, OCI_MANIFEST, Top};
use crate::layer::Compression;
use crate::limits::{MAX_CONFIG_BYTES, MAX_LAYERS, MAX_MANIFESTS_PER_INDEX};
use crate::store::StoreError;

/// Links on the way to a file: docker writes one.
const MAX_LINKS: usize = 8;

/// One image in a `manifest.json`.
#[derive(Deserialize)]
struct Item {
    #[serde(rename = "Config")]
    config: String,
    #[serde(rename = "RepoTags", default)]
    repo_tags: Option<Vec<String>>,
    #[serde(rename = "Layers", default)]
    layers: Option<Vec<String>>,
}

/// What of a configuration counts here.
#[derive(Deserialize)]
struct Config {
    rootfs: RootFs,
}

#[derive(Deserialize)]
struct RootFs {
    #[serde(default)]
    diff_ids: Vec<String>,
}

impl Import {
    /// The images of a docker-archive, whose files are in the store already.
    pub(super) fn docker(&mut self, manifest: &[u8], options: &ImportOptions) -> Result<Vec<Found>, ImportError> {
        let what = format!("manifest.json in {}", self.what);
        let items: Vec<Item> =
            serde_json::from_slice(manifest).map_err(StoreError::json(&what)).map_err(self.content())?;
        if items.is_empty() || items.len() > MAX_MANIFESTS_PER_INDEX {
            let reason =
                format!("its manifest.json lists {} images (1 to {MAX_MANIFESTS_PER_INDEX} are accepted)", items.len());
            return Err(ImportError::NoImage { what: self.what.clone(), reason });
        }
        let named = self.named(options, items.len())?;
        let mut all = Vec::new();
        for item in items {
            let image = self.docker_image(&what, &item)?;
            let references = match &named {
                Some(reference) => vec![reference.clone()],
                None => {
                    let parse = |name: &String| {
                        name.parse().map_err(|source| ImportError::Name {
                            what: self.what.clone(),
                            name: name.chars().take(300).collect(),
                            source,
                        })
                    };
                    item.repo_tags.unwrap_or_default().iter().map(parse).collect::<Result<_, _>>()?
                }
            };
            all.push(Found { image, references });
        }
        Ok(all)
    }

    fn docker_image(&mut self, what: &str, item: &Item) -> Result<Image, ImportError> {
        let content = self.content();
        let (config_digest, config_len) = self.file(&item.config)?;
        let stem = item.config.rsplit('/').next().unwrap_or_default().trim_end_matches(".json");
        if let Ok(expected) = Digest::from_hex(stem)
            && expected != config_digest
        {
            let what = format!("{} in {}", item.config, self.what);
            return Err(content(StoreError::WrongDigest { what, expected, found: config_digest }));
        }
        let store = self.transaction.store().clone();
        let config_json = store.read_blob(&config_digest, MAX_CONFIG_BYTES).map_err(&content)?;
        let config: Config = serde_json::from_slice(&config_json)
            .map_err(StoreError::json(&format!("{} in {}", item.config, self.what)))
            .map_err(&content)?;
        let paths = item.layers.as_deref().unwrap_or_default();
        let diff_ids = &config.rootfs.diff_ids;
        if paths.len() != diff_ids.len() || paths.len() > MAX_LAYERS {
            let reason = format!(
                "it lists {} layers for an image whose configuration has {} (at most {MAX_LAYERS} are accepted)",
                paths.len(),
                diff_ids.len()
            );
            return Err(content(StoreError::Corrupt { what: what.to_owned(), reason }));
        }
        let mut layers = Vec::new();
        for (path, diff_id) in paths.iter().zip(diff_ids) {
            let (digest, size) = self.file(path)?;
            let diff_id: Digest =
                diff_id.parse().map_err(|source| content(StoreError::Digest { what: item.config.clone(), source }))?;
            let mut beginning = Vec::new();
            let path = store.blob_path(&digest);
            let file = store.blob(&digest).map_err(&content)?;
            file.take(4).read_to_end(&mut beginning).map_err(StoreError::io("read", &path)).map_err(&content)?;
            let compression = Compression::detect(&beginning);
            let layer = Layer { digest, size, diff_id, media_type: compression.media_type() };
            if compression == Compression::None && digest == diff_id {
                self.verified.insert((digest, diff_id));
            }
            layers.push(layer);
        }
        self.verify(&layers)?;
        let manifest = manifest(&config_digest, config_len, &layers).map_err(&content)?;
        let digest = self.transaction.add_bytes("the manifest", &manifest).map_err(&content)?;
        let top = Top { media_type: OCI_MANIFEST.to_owned(), digest, size: manifest.len() as u64 };
        Image::read(&top, Vec::new(), |digest, document| store.read_blob(digest, document.limit())).map_err(content)
    }

    /// The file that a `manifest.json` names, through the archive's links.
    fn file(&self, name: &str) -> Result<(Digest, u64), ImportError> {
        let mut at = name.strip_prefix("./").unwrap_or(name);
        for _ in 0..MAX_LINKS {
            if let Some(file) = self.files.get(at) {
                return Ok(*file);
            }
            match self.links.get(at) {
                Some(target) => at = target,
                None => break,
            }
        }
        Err(ImportError::Incomplete { what: self.what.clone(), missing: name.chars().take(300).collect() })
    }
}
