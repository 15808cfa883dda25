//! Bounds on what images from outside may ask for. What exceeds one is refused with a message that names it.

/// Bytes in a manifest or an index: the distribution-spec's own recommendation.
pub const MAX_MANIFEST_BYTES: u64 = 4 << 20;
/// Bytes in an image configuration. The largest in the wild (long histories) stay under a tenth of it.
pub const MAX_CONFIG_BYTES: u64 = 4 << 20;
/// Layers of an image: the kernel's overlayfs stacks at most 500.
pub const MAX_LAYERS: usize = 500;
/// Bytes in a blob as it is stored.
pub const MAX_BLOB_BYTES: u64 = 64 << 30;
/// Bytes in a layer's tar stream once decompressed: it bounds what a compression bomb can make us read.
pub const MAX_LAYER_TAR_BYTES: u64 = 128 << 30;
/// Images in one archive or layout, and manifests in one index.
pub const MAX_MANIFESTS_PER_INDEX: usize = 4096;
/// Members of an archive: 4096 images could not have more blobs that are of use.
pub const MAX_ARCHIVE_MEMBERS: usize = 65_536;
/// Bytes in the name of an archive's member, or in the target of a link.
pub const MAX_ARCHIVE_NAME_BYTES: u64 = 4096;
/// Indexes inside indexes that are followed to find a platform's manifest.
pub const MAX_INDEX_DEPTH: usize = 4;
/// Bytes in the store's own `index.json`.
pub const MAX_STORE_INDEX_BYTES: u64 = 64 << 20;
