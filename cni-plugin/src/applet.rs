//! `cp` and `install-conf`: the two helpers that manifests call in Flannel's images, for an image without a
//! shell. Which one is meant is told by the name that the program is called by (contract §8.1).

use std::ffi::OsString;
use std::path::Path;

use crate::copy::copy;
use crate::install;

/// Runs the helper that `arguments` name, beginning with the program's own name. `None` if that is no
/// helper's.
///
/// # Errors
/// Sentences for standard error.
pub(crate) fn run(arguments: &[OsString]) -> Option<Result<(), Vec<String>>> {
    let (program, arguments) = arguments.split_first()?;
    let program = Path::new(program);
    let helper = match (program.file_name()?.to_str()?, arguments.first().and_then(|first| first.to_str())) {
        ("cp", _) => cp,
        ("install-conf", _) => install_conf,
        (_, Some("install")) => return Some(install::run(&arguments[1..])),
        _ => return None,
    };
    Some(helper(arguments))
}

/// `cp [-f] SOURCE... DESTINATION`
fn cp(arguments: &[OsString]) -> Result<(), Vec<String>> {
    let refused = |what: &str| Err(vec![format!("cp: {what}; usage: cp [-f] SOURCE... DESTINATION")]);
    let mut files = Vec::new();
    let mut options = true;
    for argument in arguments {
        match argument.to_str() {
            Some("--") if options => options = false,
            Some("-f" | "--force") if options => {}
            Some(option) if options && option.len() > 1 && option.starts_with('-') => {
                return refused(&format!("the option {option:?} is not known here, only -f is"));
            }
            _ => files.push(Path::new(argument)),
        }
    }
    let Some((destination, sources)) = files.split_last().filter(|(_, sources)| !sources.is_empty()) else {
        return refused("it takes at least two files");
    };
    let into = destination.is_dir();
    if sources.len() > 1 && !into {
        return refused(&format!("several files go into a directory, and {destination:?} is none"));
    }
    let target = |source: &Path| match source.file_name() {
        Some(name) if into => destination.join(name),
        _ => destination.to_path_buf(),
    };
    let failures: Vec<_> = sources
        .iter()
        .filter_map(|source| copy(source, &target(source)).err())
        .map(|error| format!("cp: {error}"))
        .collect();
    if failures.is_empty() { Ok(()) } else { Err(failures) }
}

/// `install-conf SOURCE DESTINATION`
fn install_conf(arguments: &[OsString]) -> Result<(), Vec<String>> {
    let [source, destination] = arguments else {
        return Err(vec![format!(
            "install-conf: it takes two files, not {}; usage: install-conf SOURCE DESTINATION",
            arguments.len()
        )]);
    };
    copy(Path::new(source), Path::new(destination)).map_err(|error| vec![format!("install-conf: {error}")])
}
