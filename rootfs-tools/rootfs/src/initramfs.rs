//! The initramfs: a cpio archive in the `newc` format (Documentation/driver-api/early-userspace/buffer-format.rst of
//! Linux), uncompressed, because every instruction that the guest kernel spends on unpacking is paid at each boot.
//!
//! The same calls give the same bytes: owners are root, times are zero, inode numbers count up.

const S_IFCHR: u32 = 0o020_000;
const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;

/// The archive's name for its own end.
const TRAILER: &str = "TRAILER!!!";

/// Why an archive cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum InitramfsError {
    /// The format has 32-bit sizes.
    #[error("cannot put {path} of {len_bytes} bytes into an initramfs: cpio's newc format ends at 4 GiB")]
    TooLarge {
        /// The file.
        path: String,
        /// Its length.
        len_bytes: usize,
    },
    /// A name that the format or the kernel cannot hold.
    #[error("cannot put {path:?} into an initramfs: a name must be relative, not empty, and hold no NUL")]
    Name {
        /// The name.
        path: String,
    },
}

/// An archive being written. Parents must be added before what is in them: the kernel makes none itself.
#[derive(Debug, Default)]
pub struct Initramfs {
    bytes: Vec<u8>,
    entries: u32,
}

impl Initramfs {
    /// An empty archive.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a directory with these permission bits.
    ///
    /// # Errors
    /// If the name cannot be used.
    pub fn directory(&mut self, path: &str, mode: u32) -> Result<(), InitramfsError> {
        self.entry(path, S_IFDIR | (mode & 0o7777), (0, 0), &[])
    }

    /// Adds a regular file with these permission bits.
    ///
    /// # Errors
    /// If the name cannot be used or the file is 4 GiB or larger.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<(), InitramfsError> {
        self.entry(path, S_IFREG | (mode & 0o7777), (0, 0), content)
    }

    /// Adds a symbolic link.
    ///
    /// # Errors
    /// If the name cannot be used.
    pub fn symlink(&mut self, path: &str, target: &str) -> Result<(), InitramfsError> {
        self.entry(path, S_IFLNK | 0o777, (0, 0), target.as_bytes())
    }

    /// Adds a character device.
    ///
    /// # Errors
    /// If the name cannot be used.
    pub fn char_device(&mut self, path: &str, mode: u32, major: u32, minor: u32) -> Result<(), InitramfsError> {
        self.entry(path, S_IFCHR | (mode & 0o7777), (major, minor), &[])
    }

    /// Ends the archive and gives its bytes, padded to 512 as cpio does.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        self.append(0, TRAILER, 0, (0, 0), &[]);
        while !self.bytes.len().is_multiple_of(512) {
            self.bytes.push(0);
        }
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) -> Result<(), InitramfsError> {
        if path.is_empty() || path.starts_with('/') || path.contains('\0') || path == TRAILER {
            return Err(InitramfsError::Name { path: path.to_owned() });
        }
        if u32::try_from(content.len()).is_err() {
            return Err(InitramfsError::TooLarge { path: path.to_owned(), len_bytes: content.len() });
        }
        self.entries += 1;
        self.append(self.entries, path, mode, device, content);
        Ok(())
    }

    fn append(&mut self, inode: u32, path: &str, mode: u32, (major, minor): (u32, u32), content: &[u8]) {
        let links = if mode & S_IFDIR != 0 && mode & S_IFREG == 0 { 2 } else { 1 };
        let fields = [inode, mode, 0, 0, links, 0, content.len() as u32, 0, 0, major, minor, path.len() as u32 + 1, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        while !self.bytes.len().is_multiple_of(4) {
            self.bytes.push(0);
        }
    }
}

/// The initramfs of every guest: the agent as `/init`, the mount points that it needs, and `/dev/console`.
///
/// # Errors
/// If the agent is 4 GiB or larger.
pub fn agent_initramfs(agent: &[u8]) -> Result<Vec<u8>, InitramfsError> {
    let mut archive = Initramfs::new();
    for (path, mode) in
        [("dev", 0o755), ("proc", 0o555), ("sys", 0o555), ("run", 0o755), ("mnt", 0o755), ("tmp", 0o1777)]
    {
        archive.directory(path, mode)?;
    }
    archive.char_device("dev/console", 0o600, 5, 1)?;
    archive.char_device("dev/null", 0o666, 1, 3)?;
    archive.file("init", 0o755, agent)?;
    Ok(archive.finish())
}

#[cfg(test)]
mod tests;
