//! The files for the CNI plugin and the container runtime, written when a pod can be added and not before.

use std::io;
use std::path::Path;

use subnet::env_file::{FileStanding, SubnetEnv, write_atomically};
use subnet::regular;

use super::Settings;

/// What came of writing the files.
pub(super) struct Written {
    pub(super) env: SubnetEnv,
    /// Another program rewrote `subnet.env`, which was left alone.
    pub(super) rewritten: bool,
    /// Whether `subnet.env` was written.
    pub(super) written: io::Result<bool>,
    /// Whether the CNI configuration was copied, if one is asked for.
    pub(super) copied: Option<io::Result<bool>>,
}

/// Makes `subnet.env` say what is so, and then lets the container runtime know that there is a network. `current`: this
/// process wrote the same before.
pub(super) fn write(settings: &Settings, env: SubnetEnv, current: bool) -> Written {
    let path = &settings.subnet_file;
    // Another program may make something of the file that it needs at its own start; it has to be written again only
    // when it would say something else, or nothing.
    let rewritten = current && env.standing(path) == FileStanding::Rewritten;
    let written = if rewritten { Ok(false) } else { env.write(path) };
    let conf = settings.cni_conf.as_ref().filter(|_| written.is_ok());
    let copied = conf.map(|(from, to)| copy(from, to));
    Written { env, rewritten, written, copied }
}

/// Makes `to` have the content of `from`, in one step. Says whether anything was written.
fn copy(from: &Path, to: &Path) -> io::Result<bool> {
    let content = regular::read(from)
        .map_err(|error| io::Error::new(error.kind(), format!("--cni-conf: {}: {error}", from.display())))?;
    if regular::read(to).is_ok_and(|current| current == content) {
        return Ok(false);
    }
    write_atomically(to, &content, 0o644)?;
    Ok(true)
}
