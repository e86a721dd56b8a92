//! What this program is.

/// Its version.
pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The commit that it was built from, if the build was told (by the Makefile).
pub(crate) fn commit() -> &'static str {
    option_env!("FLANNEL_COMMIT").filter(|commit| !commit.is_empty()).unwrap_or("unknown")
}
