//! What the programs of this crate have in common: figures, progress, witnesses.

pub mod figure;
pub mod monitor;
pub mod process;
pub mod progress;
