//! How large the image is: it has both programs and links to one of them, and nothing else.

use std::fs;

use anyhow::Context;
use bench::figure::{Figure, Limit, Record};

use crate::Stage;

/// Measures the files of the image. `make image` fails if there is more in it, or if it is larger.
pub(crate) fn measure(stage: &Stage, record: &mut Record) -> anyhow::Result<()> {
    let mut size = Figure::new("size: files of the image", "MB", Limit::Each(15.0));
    let mut bytes = 0;
    for path in [stage.flanneld(), stage.plugin()] {
        bytes += fs::metadata(&path).with_context(|| format!("can't look at {}", path.display()))?.len();
    }
    size.rounds.push(bytes as f64 / 1e6);
    stage.progress.step(&format!("size: {:.2} MB", size.rounds[0]))?;
    record.put(&size)
}
