//! What every verb needs: where things are, and how errors get their exit codes.
use std::path::PathBuf;

use anyhow::Context as _;
use caisson_images::Store;
use caisson_runtime::{
    containers::{Container, Containers},
    paths::Paths,
    supervisor::ClientError,
};

/// The surroundings of a verb.
#[derive(Debug)]
pub(crate) struct Context {
    /// Where things are.
    pub(crate) paths: Paths,
    /// When the command began, on the monotonic clock.
    pub(crate) request_ns: u64,
}

/// An error with an exit code of its own.
#[derive(Debug, thiserror::Error)]
#[error("")]
pub(crate) struct Coded {
    pub(crate) code: u8,
    #[source]
    source: anyhow::Error,
}

/// Gives an error docker's exit code: what the supervisor says, or `code`.
pub(crate) fn coded(error: impl Into<anyhow::Error>, code: u8) -> anyhow::Error {
    let source = error.into();
    let code = match source.downcast_ref::<ClientError>() {
        Some(ClientError::Refused { code, .. }) => *code,
        _ => code,
    };
    Coded { code, source }.into()
}

impl Context {
    pub(crate) fn new(root: Option<PathBuf>, request_ns: u64) -> anyhow::Result<Context> {
        Ok(Context { paths: Paths::new(root).context("cannot tell where this program's directories are")?, request_ns })
    }

    /// The image store.
    pub(crate) fn store(&self) -> anyhow::Result<Store> {
        Ok(Store::open(self.paths.store.join("images"))?)
    }

    /// People's containers.
    pub(crate) fn containers(&self) -> Containers {
        Containers::new(&self.paths)
    }

    /// A container by name or id.
    pub(crate) fn container(&self, name: &str) -> anyhow::Result<Container> {
        Ok(self.containers().find(name)?)
    }
}

/// Does the same to several containers; all are tried, the first failure is returned after the others were printed.
pub(crate) fn each(names: &[String], mut act: impl FnMut(&str) -> anyhow::Result<()>) -> anyhow::Result<u8> {
    let mut failed = None;
    for name in names {
        match act(name) {
            Ok(()) => {}
            Err(error) if failed.is_none() => failed = Some(error),
            Err(error) => eprintln!("error: {error:#}"),
        }
    }
    failed.map_or(Ok(0), Err)
}
