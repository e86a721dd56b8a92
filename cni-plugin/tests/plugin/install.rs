//! `flannel install`: what is missing is added, and what others installed stays.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::process::Command;

use crate::support::{Answer, answer, flannel};

fn install(arguments: &[&str]) -> Answer {
    let mut command = Command::new(flannel());
    command.arg("install").args(arguments);
    answer(command, "")
}

fn files(directory: &Path) -> BTreeMap<String, u64> {
    let entries = fs::read_dir(directory).unwrap().map(Result::unwrap);
    entries.map(|entry| (entry.file_name().into_string().unwrap(), entry.metadata().unwrap().ino())).collect()
}

const ALL: [&str; 6] = ["bandwidth", "bridge", "flannel", "host-local", "loopback", "portmap"];

#[test]
fn an_empty_directory_gets_every_plugin_in_one_file_of_many_names() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_str().unwrap();
    for _ in 0..2 {
        assert!(install(&[path]).success);
        let files = files(directory.path());
        assert_eq!(files.keys().collect::<Vec<_>>(), ALL);
        assert!(files.values().all(|inode| inode == &files["flannel"]));
    }
    let about = |name: &str| answer(Command::new(directory.path().join(name)), "").stderr;
    assert!(about("portmap").starts_with("CNI Plugin portmap version"), "{}", about("portmap"));
}

#[test]
fn what_others_installed_stays_and_what_an_earlier_installation_left_is_renewed() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    fs::write(path("bridge"), "another's").unwrap();
    symlink("/nowhere", path("loopback")).unwrap();
    assert!(install(&[directory.path().to_str().unwrap()]).success);
    // An earlier version of this program, which differs from this one.
    let mut older = fs::read(flannel()).unwrap();
    older.push(0);
    for name in ["flannel", "portmap"] {
        fs::remove_file(path(name)).unwrap();
        fs::write(path(name), &older).unwrap();
    }
    let answer = install(&[directory.path().to_str().unwrap()]);
    assert!(
        answer.success && answer.stderr.contains("bridge: another one is installed, and stays"),
        "{answer:?}"
    );
    assert_eq!(fs::read_to_string(path("bridge")).unwrap(), "another's");
    assert_eq!(fs::read_link(path("loopback")).unwrap(), Path::new("/nowhere"));
    let files = files(directory.path());
    assert_eq!(files["portmap"], files["flannel"]);
    assert_eq!(fs::read(path("portmap")).unwrap(), fs::read(flannel()).unwrap());
}

#[test]
fn what_is_no_directory_is_named() {
    for arguments in [&[][..], &["/nowhere"], &["/tmp", "/tmp"], &["/etc/passwd"]] {
        let answer = install(arguments);
        assert!(!answer.success && answer.stderr.contains("usage: flannel install DIRECTORY"), "{answer:?}");
    }
}
