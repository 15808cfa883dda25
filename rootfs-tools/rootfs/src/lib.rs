//! Layers to EROFS, the writable upper, the initramfs.
