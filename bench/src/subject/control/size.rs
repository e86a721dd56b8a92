//! How large the programs are, and whether they need anything else to run.

use std::fs;

use anyhow::{Context, ensure};

use bench::figure::{Limit, Row};

use crate::Stage;

/// A program header that names a dynamic linker.
const PT_INTERP: u32 = 3;

/// Measures both programs.
pub(crate) fn measure(stage: &Stage) -> anyhow::Result<()> {
    for (path, limit) in [(stage.flanneld(), 10.0), (stage.plugin(), 1.5)] {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let bytes = fs::read(&path).with_context(|| format!("can't read {}", path.display()))?;
        let linkers = dynamic_linkers(&bytes).with_context(|| path.display().to_string())?;
        let rows: [Row<'_>; 2] = [
            (&name, "MB", Limit::Median(limit)),
            (&format!("{name}: dynamic linkers"), "", Limit::Each(0.0)),
        ];
        stage.measure("size", rows, 1, |_| Ok([bytes.len() as f64 / 1e6, linkers as f64]))?;
    }
    Ok(())
}

/// How many program headers of an ELF file name a dynamic linker; a static program has none.
fn dynamic_linkers(elf: &[u8]) -> anyhow::Result<usize> {
    ensure!(elf.starts_with(b"\x7fELF\x02\x01"), "not a 64-bit little-endian ELF file");
    let number = |at: usize, len: usize| -> anyhow::Result<usize> {
        let bytes = elf.get(at..at + len).context("the ELF file is cut off")?;
        Ok(bytes.iter().rev().fold(0, |number, &byte| number << 8 | usize::from(byte)))
    };
    // e_phoff, e_phentsize, e_phnum of the header; p_type is first in an entry.
    let (offset, size, count) = (number(0x20, 8)?, number(0x36, 2)?, number(0x38, 2)?);
    let kinds = (0..count).map(|index| number(offset + index * size, 4));
    let kinds = kinds.collect::<anyhow::Result<Vec<_>>>()?;
    Ok(kinds.into_iter().filter(|&kind| kind == PT_INTERP as usize).count())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn a_program_of_the_distribution_has_a_dynamic_linker_and_ours_has_none() {
        let linkers = |path: &Path| dynamic_linkers(&fs::read(path).unwrap()).unwrap();
        assert_eq!(linkers(Path::new("/bin/sh")), 1);
        assert_eq!(linkers(&std::env::current_exe().unwrap()), 0);
        assert!(dynamic_linkers(b"#!/bin/sh").is_err());
    }
}
