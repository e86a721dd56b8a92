//! The standard output of commands; its errors say that it is the one that can't be written.

use std::io::{self, Write};

/// The standard output, locked as long as this lives.
pub(crate) fn stdout() -> StandardOutput<io::StdoutLock<'static>> {
    StandardOutput(io::stdout().lock())
}

/// A writer with errors that name the standard output.
pub(crate) struct StandardOutput<W>(W);

fn named<T>(outcome: io::Result<T>) -> io::Result<T> {
    outcome.map_err(|error| match error.kind() {
        // Repeated by those who call.
        io::ErrorKind::Interrupted => error,
        kind => io::Error::new(kind, format!("the standard output can't be written: {error}")),
    })
}

impl<W: Write> Write for StandardOutput<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        named(self.0.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        named(self.0.flush())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_output_is_named_with_the_reason() {
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let error = StandardOutput(full).write_all(b"text\n").unwrap_err();
        let said = error.to_string();
        assert!(said.starts_with("the standard output can't be written: No space left on device"), "{said}");
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    }
}
