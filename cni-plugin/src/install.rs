//! `flannel install DIRECTORY`: this program as `flannel`, and under the names of the common plugins where they are
//! installed them. A node that has the containernetworking plugins keeps them.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::copy;
use crate::note;
use crate::plugin::Plugin;

/// What tells this program's files from those of others.
const MARK: &[u8] = b"flannel-rs: a file that `flannel install` may replace";

const USAGE: &str = "usage: flannel install DIRECTORY, such as /opt/cni/bin";

/// Runs it.
///
/// # Errors
/// Sentences for standard error.
pub(crate) fn run(arguments: &[OsString]) -> Result<(), Vec<String>> {
    let [directory] = arguments else {
        return Err(vec![format!("install: it takes one directory, not {}; {USAGE}", arguments.len())]);
    };
    let directory = Path::new(directory);
    if !directory.is_dir() {
        return Err(vec![format!("install: {directory:?} is no directory; {USAGE}")]);
    }
    let failed = |error: String| vec![format!("install: {error}")];
    let flannel = directory.join(Plugin::Flannel.name());
    copy::copy(Path::new("/proc/self/exe"), &flannel).map_err(failed)?;
    let mut failures = Vec::new();
    for plugin in Plugin::COMMON {
        let file = directory.join(plugin.name());
        match whose(&file, &flannel) {
            Whose::Nobodys | Whose::AnOlderOne => {
                failures.extend(link(&flannel, &file).err().map(|error| format!("install: {error}")));
            }
            Whose::ThisOne => {}
            Whose::Others => note(&format!("{}: another one is installed, and stays", file.display())),
        }
    }
    if failures.is_empty() { Ok(()) } else { Err(failures) }
}

/// Whose program a file is.
#[derive(Debug, PartialEq, Eq)]
enum Whose {
    Nobodys,
    ThisOne,
    /// Of an earlier installation.
    AnOlderOne,
    Others,
}

fn whose(file: &Path, flannel: &Path) -> Whose {
    let meta = match fs::symlink_metadata(file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Whose::Nobodys,
        Err(_) => return Whose::Others,
        Ok(meta) => meta,
    };
    let identity = |meta: &fs::Metadata| (meta.dev(), meta.ino());
    if fs::symlink_metadata(flannel).is_ok_and(|flannel| identity(&flannel) == identity(&meta)) {
        return Whose::ThisOne;
    }
    let marked = || fs::read(file).is_ok_and(|content| content.windows(MARK.len()).any(|part| part == MARK));
    if meta.is_file() && marked() { Whose::AnOlderOne } else { Whose::Others }
}

/// Makes `file` another name of `flannel`, or a copy where that can't be.
fn link(flannel: &Path, file: &Path) -> Result<(), String> {
    let temporary = copy::temporary(file);
    let linked = fs::hard_link(flannel, &temporary).and_then(|()| fs::rename(&temporary, file));
    if linked.is_ok() {
        return Ok(());
    }
    let _ = fs::remove_file(&temporary);
    copy::copy(flannel, file)
}
