//! Layers as tar archives (OCI image specification, layer.md): read into [`Changes`](crate::tree::Changes), and written
//! from them, the same bytes for the same changes.
mod read;
#[cfg(test)]
mod tests;
mod write;

pub use read::{Archive, LayerError, archive_kind, read, read_archive, uncompressed};
pub use write::{WriteError, write};

/// Prefix of a whiteout's name.
const WHITEOUT: &str = ".wh.";
/// The name that makes its directory opaque.
const OPAQUE: &str = ".wh..wh..opq";
/// Where extended attributes are among PAX records.
const XATTR: &str = "SCHILY.xattr.";
/// Files that one layer may have: an index in memory must have an end.
const MAX_FILES: usize = 4_000_000;
