//! What a guest's root file system is made of: layers converted to EROFS blobs, the writable upper, the initramfs.
//!
//! Nothing here needs root, mounts anything, or unpacks a layer on the host.
pub mod erofs;
pub mod initramfs;
pub mod layers;
mod sparse;
pub mod tar;
pub mod upper;
