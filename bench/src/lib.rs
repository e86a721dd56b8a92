//! What the programs of this crate have in common: clusters, figures, progress, witnesses.

pub mod bed;
pub mod figure;
pub mod iperf;
pub mod monitor;
pub mod peer;
pub mod ping;
pub mod process;
pub mod progress;
