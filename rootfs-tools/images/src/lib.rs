//! References, registry client, content-addressed store, OCI layout and docker-archive in and out.
//!
//! The store follows the OCI image layout (image-spec, `image-layout.md`), so that other tools can read
//! it in place. Nothing in here needs root, and nothing that is read from outside is trusted: each length
//! has a named bound in [`limits`], and each blob is checked against its digest before it gets its name.

pub mod builder;
pub mod digest;
pub mod image;
pub mod import;
pub mod layer;
pub mod limits;
pub mod reference;
pub mod registry;
pub mod save;
pub mod store;

pub use digest::Digest;
pub use image::{Image, Layer};
pub use reference::Reference;
pub use store::Store;
