//! Archives in the format `ustar` (POSIX.1-1988): files of text, one after the other.

use std::io::{self, Write};

const BLOCK: usize = 512;

/// Writes an archive.
pub(super) struct Archive<W> {
    out: W,
    /// Seconds since 1970, for all files.
    time: u64,
}

impl<W: Write> Archive<W> {
    pub(super) fn new(out: W, time: u64) -> Self {
        Self { out, time }
    }

    /// Adds a file. `path` has less than 100 bytes.
    ///
    /// # Errors
    /// When it can't be written.
    pub(super) fn add(&mut self, path: &str, content: &[u8]) -> io::Result<()> {
        self.out.write_all(&header(path, content.len() as u64, self.time)?)?;
        self.out.write_all(content)?;
        self.out.write_all(&[0; BLOCK][..(BLOCK - content.len() % BLOCK) % BLOCK])
    }

    /// Writes the end of the archive.
    ///
    /// # Errors
    /// When it can't be written.
    pub(super) fn finish(mut self) -> io::Result<()> {
        self.out.write_all(&[0; 2 * BLOCK])?;
        self.out.flush()
    }
}

/// The header of a plain file, of which only its owner may read the copy.
fn header(path: &str, size: u64, time: u64) -> io::Result<[u8; BLOCK]> {
    let mut header = [0; BLOCK];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    if path.len() >= 100 {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "the name of a file in the archive is too long",
        ));
    }
    put(0, path.as_bytes());
    put(100, b"0000600\0");
    put(108, b"0000000\0");
    put(116, b"0000000\0");
    put(124, format!("{size:011o}\0").as_bytes());
    put(136, format!("{time:011o}\0").as_bytes());
    // The checksum counts as blanks while it is computed.
    put(148, b"        ");
    put(156, b"0");
    put(257, b"ustar\x0000");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    Ok(header)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn the_program_tar_reads_what_was_written() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.tar");
        let mut archive = Archive::new(std::fs::File::create(&path).unwrap(), 1_800_000_000);
        let long = "x".repeat(513);
        for (name, content) in [
            ("d/empty.txt", ""),
            ("d/one.txt", "one\n"),
            ("d/block.txt", &long[..512]),
            ("d/long.txt", &long),
        ] {
            archive.add(name, content.as_bytes()).unwrap();
        }
        archive.finish().unwrap();
        let run = |args: &[&str]| {
            let output = Command::new("tar").args(args).arg(&path).current_dir(&directory).output().unwrap();
            assert!(output.status.success(), "{output:?}");
            String::from_utf8(output.stdout).unwrap()
        };
        assert_eq!(run(&["-tf"]), "d/empty.txt\nd/one.txt\nd/block.txt\nd/long.txt\n");
        run(&["-xf"]);
        assert_eq!(std::fs::read_to_string(directory.path().join("d/long.txt")).unwrap(), long);
        assert_eq!(std::fs::read_to_string(directory.path().join("d/one.txt")).unwrap(), "one\n");
    }

    #[test]
    fn a_name_that_does_not_fit_is_refused() {
        assert!(Archive::new(Vec::new(), 0).add(&"n".repeat(100), b"").is_err());
    }
}
