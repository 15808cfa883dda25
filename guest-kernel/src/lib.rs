//! The guest kernel: finds the one that was built from this crate's recipe, or builds it, and says how to start it.
//!
//! The recipe (kconfig fragments, patches and the build script beside this crate) is embedded, so that an installed
//! binary can build too: all that it needs is Debian's `linux-source-6.12` and a C toolchain. What was built stays in the
//! cache, where it is found by the recipe's hash, without source or compiler.

mod cache;
mod command_line;
mod recipe;

use std::path::PathBuf;

pub use cache::Error;
pub use command_line::{HARDWARE, SOFTWARE, command_line};

/// A built guest kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// The ELF image, to be entered at its 64-bit entry point.
    pub vmlinux: PathBuf,
    /// 16 hexadecimal digits that stand for everything the kernel was built from: recipe, source and compiler.
    pub key: String,
    /// What `uname -r` says in the guest.
    pub release: String,
}

impl Kernel {
    /// The kernel that was built from this recipe, or `None` if there is none in the cache yet. Reads two small files.
    ///
    /// # Errors
    /// [`Error`] if the cache cannot be read or what is in it is damaged.
    pub fn find() -> Result<Option<Self>, Error> {
        cache::Cache::of_the_user()?.find()
    }

    /// The kernel that was built from this recipe and the source that is installed now; builds it if need be (minutes,
    /// all processors). A kernel that is there is used as it is when no source is installed, or the same as it was built from.
    ///
    /// `progress` is told what is being done, a short line at a time; it is not called if there is nothing to do.
    ///
    /// # Errors
    /// [`Error::MissingPackages`] names what has to be installed first; the others say what failed.
    pub fn ensure(progress: impl FnMut(&str)) -> Result<Self, Error> {
        cache::Cache::of_the_user()?.ensure(progress)
    }

    /// What `Cache` would have to have installed for [`Kernel::ensure`] to build: Debian packages, none if all are there.
    ///
    /// # Errors
    /// [`Error`] if the build script cannot be run.
    pub fn missing_packages() -> Result<Vec<String>, Error> {
        cache::missing_packages()
    }
}
