//! `cp` and `install-conf`, called by links to the plugin as in the image.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::support::{Answer, answer, flannel};

/// A directory with links by the names of the helpers in `bin`.
struct Image(tempfile::TempDir);

impl Image {
    fn new() -> Self {
        let image = Self(tempfile::tempdir().unwrap());
        fs::create_dir(image.path("bin")).unwrap();
        for helper in ["cp", "install-conf"] {
            symlink(flannel(), image.path("bin").join(helper)).unwrap();
        }
        image
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn file(&self, name: &str, content: &str, mode: u32) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        path
    }

    /// Runs a helper in this directory, with `CNI_COMMAND` set as if that mattered.
    fn run(&self, helper: &str, arguments: &[&str]) -> Answer {
        let mut command = Command::new(self.path("bin").join(helper));
        command.args(arguments).current_dir(self.0.path()).env("CNI_COMMAND", "ADD");
        answer(command, "")
    }

    #[track_caller]
    fn succeeds(&self, helper: &str, arguments: &[&str]) {
        let answer = self.run(helper, arguments);
        assert!(answer.success && answer.stdout.is_empty() && answer.stderr.is_empty(), "{answer:?}");
    }

    #[track_caller]
    fn fails(&self, helper: &str, arguments: &[&str]) -> String {
        let before = self.tree();
        let answer = self.run(helper, arguments);
        assert!(!answer.success && answer.stdout.is_empty(), "{answer:?}");
        assert_eq!(self.tree(), before, "a failure changes nothing and leaves nothing");
        answer.stderr
    }

    /// Mode and content of each file by its name, but for `bin`.
    fn tree(&self) -> BTreeMap<PathBuf, (u32, Vec<u8>)> {
        let mut files = BTreeMap::new();
        let mut directories = vec![self.0.path().to_path_buf()];
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(directory).unwrap() {
                let (path, kind) = entry.map(|entry| (entry.path(), entry.file_type().unwrap())).unwrap();
                if kind.is_dir() {
                    directories.push(path);
                } else if path.parent() != Some(&self.path("bin")) {
                    files.insert(path.clone(), (mode(&path), fs::read(&path).unwrap_or_default()));
                }
            }
        }
        files
    }
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
}

#[test]
fn content_and_mode_arrive_and_nothing_else_appears() {
    for (helper, options) in [("cp", &["-f"][..]), ("cp", &[]), ("install-conf", &[])] {
        for permissions in [0o644, 0o755, 0o600, 0o444] {
            let image = Image::new();
            image.file("source", "new", permissions);
            image.file("old", "old, and longer", 0o640);
            for destination in ["old", "./fresh"] {
                image.succeeds(helper, &[options, &["source", destination]].concat());
                let expected = (permissions, b"new".to_vec());
                assert_eq!(image.tree().get(&image.path(destination)), Some(&expected), "{helper}");
            }
            assert_eq!(image.tree().len(), 3, "{helper}: {:?}", image.tree().keys());
        }
    }
}

#[test]
fn a_program_is_replaced_while_it_runs() {
    for helper in ["cp", "install-conf"] {
        let image = Image::new();
        let program = image.path("program");
        // Not by this process: a program that another test starts at that moment would hold it open for writing.
        assert!(
            Command::new("cp").args(["/bin/sleep".as_ref(), program.as_os_str()]).status().unwrap().success()
        );
        let mut running = Command::new(&program).arg("60").stdin(Stdio::null()).spawn().unwrap();
        assert!(fs::write(&program, "").is_err(), "a running program can be written to");
        image.file("source", "new", 0o755);
        image.succeeds(helper, &["source", "program"]);
        let alive = running.try_wait().unwrap().is_none();
        running.kill().unwrap();
        running.wait().unwrap();
        assert!(alive, "{helper} ended the running program");
        assert_eq!(fs::read(&program).unwrap(), b"new");
    }
}

#[test]
fn a_file_that_is_as_it_should_be_is_not_written_again() {
    for helper in ["cp", "install-conf"] {
        let image = Image::new();
        image.file("source", "same", 0o644);
        let destination = image.file("destination", "same", 0o644);
        let inode = || fs::metadata(&destination).unwrap().ino();
        let before = inode();
        image.succeeds(helper, &["source", "destination"]);
        assert_eq!(inode(), before, "{helper}");
        fs::set_permissions(&destination, Permissions::from_mode(0o600)).unwrap();
        image.succeeds(helper, &["source", "destination"]);
        assert_eq!((inode() == before, mode(&destination)), (false, 0o644), "{helper}");
    }
}

#[test]
fn a_link_is_replaced_and_its_target_stays() {
    for helper in ["cp", "install-conf"] {
        let image = Image::new();
        let target = image.file("target", "target", 0o644);
        image.file("source", "new", 0o644);
        symlink("target", image.path("link")).unwrap();
        symlink("nowhere", image.path("dangling")).unwrap();
        for link in ["link", "dangling"] {
            image.succeeds(helper, &["source", link]);
            assert!(fs::symlink_metadata(image.path(link)).unwrap().is_file(), "{helper}");
        }
        assert_eq!(fs::read(target).unwrap(), b"target", "{helper}");
    }
}

#[test]
fn a_source_may_be_a_link_as_in_a_config_map_volume() {
    for helper in ["cp", "install-conf"] {
        let image = Image::new();
        fs::create_dir(image.path("..data")).unwrap();
        image.file("..data/cni-conf.json", "{}", 0o644);
        symlink("..data/cni-conf.json", image.path("cni-conf.json")).unwrap();
        image.succeeds(helper, &["cni-conf.json", "10-flannel.conflist"]);
        assert_eq!(fs::read(image.path("10-flannel.conflist")).unwrap(), b"{}", "{helper}");
    }
}

#[test]
fn cp_copies_into_a_directory_and_several_files() {
    let image = Image::new();
    fs::create_dir(image.path("directory")).unwrap();
    image.file("one", "1", 0o755);
    image.file("-f", "2", 0o644);
    image.succeeds("cp", &["-f", "--", "one", "-f", "directory"]);
    assert_eq!(fs::read(image.path("directory/one")).unwrap(), b"1");
    assert_eq!(fs::read(image.path("directory/-f")).unwrap(), b"2");
}

#[test]
fn cp_says_of_each_file_why_it_was_not_copied_and_copies_the_others() {
    let image = Image::new();
    fs::create_dir(image.path("directory")).unwrap();
    image.file("one", "1", 0o755);
    let answer = image.run("cp", &["missing", "one", "bin", "directory"]);
    assert!(!answer.success);
    let lines: Vec<_> = answer.stderr.lines().collect();
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert!(lines[0].starts_with("cp: \"missing\" can't be read: No such file"), "{lines:?}");
    assert!(lines[1].starts_with("cp: \"bin\" is not a regular file"), "{lines:?}");
    assert_eq!(fs::read(image.path("directory/one")).unwrap(), b"1");
}

#[test]
fn what_cp_does_not_do_is_refused_with_a_sentence() {
    let image = Image::new();
    image.file("a", "", 0o644);
    image.file("b", "", 0o644);
    image.file("c", "c", 0o644);
    let usage = "usage: cp [-f] SOURCE... DESTINATION\n";
    for (arguments, text) in [
        (&["-r", "a", "c"][..], "cp: the option \"-r\" is not known here, only -f is; "),
        (&["a", "-fp", "c"], "cp: the option \"-fp\" is not known here, only -f is; "),
        (&["a"], "cp: it takes at least two files; "),
        (&["-f"], "cp: it takes at least two files; "),
        (&["a", "b", "c"], "cp: several files go into a directory, and \"c\" is none; "),
    ] {
        assert_eq!(image.fails("cp", arguments), format!("{text}{usage}"));
    }
}

#[test]
fn install_conf_takes_exactly_two_arguments() {
    let image = Image::new();
    image.file("a", "", 0o644);
    for arguments in [&[][..], &["a"], &["a", "b", "c"], &["-f", "a", "b"]] {
        let error = image.fails("install-conf", arguments);
        let expected = format!(
            "install-conf: it takes two files, not {}; usage: install-conf SOURCE DESTINATION\n",
            arguments.len()
        );
        assert_eq!(error, expected);
    }
}

#[test]
fn a_destination_that_cannot_be_written_is_named_and_nothing_stays_behind() {
    let image = Image::new();
    image.file("source", "new", 0o644);
    fs::create_dir(image.path("full")).unwrap();
    image.file("full/file", "", 0o644);
    for (destination, why) in [
        ("missing/file", "No such file or directory"),
        ("source/file", "Not a directory"),
        ("full", "directory"),
        ("..", "directory"),
        ("", ""),
    ] {
        let error = image.fails("install-conf", &["source", destination]);
        let start = format!("install-conf: {destination:?} can't be written: ");
        assert!(error.starts_with(&start) && error.contains(why), "{error}");
    }
    let error = image.fails("install-conf", &["missing", "file"]);
    assert!(error.starts_with("install-conf: \"missing\" can't be read: No such file"), "{error}");
}
