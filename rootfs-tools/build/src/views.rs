//! Views of layers in the image store: each layer is indexed once, and what it holds stays in its blob, or, if that is
//! compressed, in an unnamed temporary file.
use crate::layer::{self, LayerError};
use crate::tree::{Changes, View};
use caisson_images::layer::Compression;
use caisson_images::store::StoreError;
use caisson_images::{Digest, Layer, Store};
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

/// Why a layer's files cannot be seen.
#[derive(Debug, thiserror::Error)]
pub enum ViewError {
    /// The store.
    #[error("cannot open the layer {layer}")]
    Store {
        /// Its diff id.
        layer: Digest,
        /// Why.
        #[source]
        source: StoreError,
    },
    /// Unpacking.
    #[error("cannot unpack the layer {layer}")]
    Unpack {
        /// Its diff id.
        layer: Digest,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Its tar.
    #[error("cannot read the layer {layer}")]
    Read {
        /// Its diff id.
        layer: Digest,
        /// Why.
        #[source]
        source: LayerError,
    },
}

/// Indexes of layers, for the time of a build.
#[derive(Debug)]
pub struct Views {
    store: Store,
    scratch: PathBuf,
    layers: Mutex<HashMap<Digest, Arc<Changes>>>,
    views: Mutex<HashMap<Vec<Digest>, Arc<View>>>,
}

/// How many views are kept: the builder comes back to the last ones only.
const KEPT_VIEWS: usize = 16;

impl Views {
    /// For layers of `store`; compressed ones are unpacked in `scratch`.
    pub fn new(store: &Store, scratch: PathBuf) -> Self {
        Self { store: store.clone(), scratch, layers: Mutex::new(HashMap::new()), views: Mutex::new(HashMap::new()) }
    }

    /// What a stack of layers shows, the lowest first.
    pub fn view(&self, layers: &[Layer]) -> Result<Arc<View>, ViewError> {
        let chain: Vec<Digest> = layers.iter().map(|layer| layer.diff_id).collect();
        if let Some(view) = self.views.lock().unwrap_or_else(PoisonError::into_inner).get(&chain) {
            return Ok(Arc::clone(view));
        }
        let mut view = match layers.split_last() {
            Some((_, below)) if !below.is_empty() => {
                let kept = self.views.lock().unwrap_or_else(PoisonError::into_inner);
                let known = chain.split_last().and_then(|(_, below)| kept.get(below)).map(Arc::clone);
                drop(kept);
                match known {
                    Some(view) => view.as_ref().clone(),
                    None => self.stack(below)?,
                }
            }
            _ => View::default(),
        };
        if let Some(top) = layers.last() {
            view.apply(self.changes(top)?.as_ref());
        }
        let view = Arc::new(view);
        let mut views = self.views.lock().unwrap_or_else(PoisonError::into_inner);
        if views.len() >= KEPT_VIEWS {
            views.clear();
        }
        views.insert(chain, Arc::clone(&view));
        Ok(view)
    }

    fn stack(&self, layers: &[Layer]) -> Result<View, ViewError> {
        let mut view = View::default();
        for layer in layers {
            view.apply(self.changes(layer)?.as_ref());
        }
        Ok(view)
    }

    /// What a layer changes.
    pub fn changes(&self, layer: &Layer) -> Result<Arc<Changes>, ViewError> {
        if let Some(known) = self.layers.lock().unwrap_or_else(PoisonError::into_inner).get(&layer.diff_id) {
            return Ok(Arc::clone(known));
        }
        let file = self.tar(layer)?;
        let changes = layer::read(file).map_err(|source| ViewError::Read { layer: layer.diff_id, source })?;
        let changes = Arc::new(changes);
        self.layers.lock().unwrap_or_else(PoisonError::into_inner).insert(layer.diff_id, Arc::clone(&changes));
        Ok(changes)
    }

    /// The layer's tar, uncompressed.
    fn tar(&self, layer: &Layer) -> Result<File, ViewError> {
        let store = |source| ViewError::Store { layer: layer.diff_id, source };
        let unpack = |source| ViewError::Unpack { layer: layer.diff_id, source };
        let mut blob = self.store.blob(&layer.digest).map_err(store)?;
        let mut head = Vec::new();
        (&mut blob).take(4).read_to_end(&mut head).map_err(unpack)?;
        blob.rewind().map_err(unpack)?;
        if Compression::detect(&head) == Compression::None {
            return Ok(blob);
        }
        let mut reader = self.store.layer_tar(layer).map_err(store)?;
        let mut file = tempfile::tempfile_in(&self.scratch).map_err(unpack)?;
        io::copy(&mut reader, &mut file).map_err(unpack)?;
        file.rewind().map_err(unpack)?;
        Ok(file)
    }
}
