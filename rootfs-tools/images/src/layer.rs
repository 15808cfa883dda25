//! A layer's tar stream, decompressed and verified.

use std::fs::File;
use std::io::{self, BufReader, Read};

use crate::digest::{Digest, Hashing};
use crate::image::Layer;
use crate::limits::MAX_LAYER_TAR_BYTES;
use crate::store::{Store, StoreError};

/// How a layer's tar stream is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// Not compressed: the fastest to write and to convert.
    None,
    /// gzip: what every tool and registry reads.
    #[default]
    Gzip,
    /// zstd: smaller and faster than gzip; older tools don't read it.
    Zstd,
}

const GZIP_MAGIC: &[u8] = &[0x1f, 0x8b];
const ZSTD_MAGIC: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];

impl Compression {
    /// Tells it by the first bytes: writers are known to label layers wrongly.
    #[must_use]
    pub fn detect(beginning: &[u8]) -> Self {
        if beginning.starts_with(GZIP_MAGIC) {
            Self::Gzip
        } else if beginning.starts_with(ZSTD_MAGIC) {
            Self::Zstd
        } else {
            Self::None
        }
    }

    /// The OCI media type of a layer that is stored so.
    #[must_use]
    pub fn media_type(self) -> String {
        let suffix = match self {
            Self::None => "",
            Self::Gzip => "+gzip",
            Self::Zstd => "+zstd",
        };
        format!("{}{suffix}", crate::image::OCI_LAYER)
    }
}

/// Decompresses `source`, of whichever compression it is.
///
/// # Errors
/// Its beginning can't be read, or the decoder can't be set up.
pub fn decompress(source: impl Read + Send + 'static) -> io::Result<Box<dyn Read + Send>> {
    let mut source = BufReader::with_capacity(128 << 10, source);
    let mut beginning = Vec::with_capacity(4);
    source.by_ref().take(4).read_to_end(&mut beginning)?;
    let compression = Compression::detect(&beginning);
    let whole = io::Cursor::new(beginning).chain(source);
    Ok(match compression {
        Compression::None => Box::new(whole),
        // pigz and estargz write several members.
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(whole)),
        Compression::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(whole)?;
            // RFC 8878 asks decoders for 8 MiB; 128 MiB (zstd --ultra --long) is what containerd takes.
            decoder.window_log_max(27)?;
            Box::new(decoder)
        }
    })
}

/// Reads a layer's tar stream. Where it ends, it has been checked against the diff id: an error comes instead of the end
/// if it is another one, so that a reader that has seen the end has seen the right content.
pub struct LayerReader {
    stream: Hashing<Box<dyn Read + Send>>,
    digest: Digest,
    diff_id: Digest,
    checked: bool,
}

impl std::fmt::Debug for LayerReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LayerReader").field("digest", &self.digest).finish_non_exhaustive()
    }
}

impl Store {
    /// Opens a layer's tar stream.
    ///
    /// # Errors
    /// The blob is missing or can't be read.
    pub fn layer_tar(&self, layer: &Layer) -> Result<LayerReader, StoreError> {
        let path = self.blob_path(&layer.digest);
        let file: File = self.blob(&layer.digest)?;
        let stream = decompress(file).map_err(StoreError::io("decompress", &path))?;
        Ok(LayerReader { stream: Hashing::new(stream), digest: layer.digest, diff_id: layer.diff_id, checked: false })
    }

    /// Reads a layer to its end, so that its diff id is checked.
    ///
    /// # Errors
    /// It can't be decompressed, or its content has another diff id.
    pub fn verify_layer(&self, layer: &Layer) -> Result<(), StoreError> {
        let path = self.blob_path(&layer.digest);
        let mut reader = self.layer_tar(layer)?;
        reader.drain().map_err(StoreError::io("read the layer", &path))
    }
}

impl LayerReader {
    /// Reads on to the end, and so checks the diff id: for readers of tar streams, which stop before the padding.
    ///
    /// # Errors
    /// As for reading.
    pub fn drain(&mut self) -> io::Result<()> {
        let mut chunk = vec![0; 128 << 10];
        while self.read(&mut chunk)? != 0 {}
        Ok(())
    }
}

impl Read for LayerReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        let refused = |reason: String| io::Error::new(io::ErrorKind::InvalidData, reason);
        let count = self.stream.read(buffer).map_err(|error| {
            io::Error::new(error.kind(), format!("the layer {} can't be decompressed: {error}", self.digest))
        })?;
        if self.stream.count() > MAX_LAYER_TAR_BYTES {
            return Err(refused(format!(
                "the layer {} is longer than {MAX_LAYER_TAR_BYTES} bytes when it is decompressed, the most that is accepted",
                self.digest
            )));
        }
        if count == 0 && !self.checked {
            let found = self.stream.digest();
            if found != self.diff_id {
                return Err(refused(format!(
                    "the layer {} has the diff id {found}, and its image's configuration says {}: it was damaged or tampered with",
                    self.digest, self.diff_id
                )));
            }
            self.checked = true;
        }
        Ok(count)
    }
}
