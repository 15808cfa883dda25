//! The server's jail: Landlock lets it reach nothing but its exports, whatever it may be talked into.
use super::ShareConfig;
use landlock::{
    ABI, Access, AccessFs, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetError,
};

/// Why the jail could not be shut.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// Landlock refused the rules.
    #[error("cannot restrict the file server to its exports with Landlock")]
    Landlock(#[from] RulesetError),
    /// An export cannot be opened.
    #[error("cannot restrict the file server to {path}")]
    Path {
        /// Which.
        path: String,
        /// Why.
        #[source]
        source: landlock::PathFdError,
    },
}

/// Confines the calling thread, and what it starts, to the exports; as far as the kernel can.
///
/// # Errors
/// If an export is gone, or the kernel refuses rules that it should know.
pub fn enter(config: &ShareConfig) -> Result<(), JailError> {
    let all = AccessFs::from_all(ABI::V5);
    let mut rules = Ruleset::default().set_compatibility(CompatLevel::BestEffort).handle_access(all)?.create()?;
    for export in &config.exports {
        let fd = PathFd::new(&export.path)
            .map_err(|source| JailError::Path { path: export.path.display().to_string(), source })?;
        let access = if export.read_only { AccessFs::from_read(ABI::V5) } else { all };
        let access = if export.path.is_dir() { access } else { access & AccessFs::from_file(ABI::V5) };
        rules = rules.add_rule(PathBeneath::new(fd, access))?;
    }
    rules.restrict_self()?;
    Ok(())
}
