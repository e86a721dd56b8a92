//! What the measurements of this crate have in common.

pub mod figure;
pub mod monitor;
pub mod process;
pub mod progress;

use std::path::PathBuf;

use anyhow::Context;

/// The directory of the release programs: beside that of the program `own`, which asks, whatever its profile.
pub fn release_programs(own: &str) -> anyhow::Result<PathBuf> {
    let own = backends::testing::program(own);
    let own = own.context("this program is not where cargo puts it: give --programs")?;
    let profiles = own.parent().and_then(|directory| directory.parent());
    Ok(profiles.context("no directory of profiles: give --programs")?.join("release"))
}
