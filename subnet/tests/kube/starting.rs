//! What is said when there is no real API server, or when it does not start. That one starts is tested nowhere
//! but by `make test-kube`.

use std::path::Path;
use std::process::Command;

use subnet::testing::write_program;

use crate::real::{Programs, world};

fn script(directory: &Path, name: &str, text: &str) {
    write_program(&directory.join(name), &format!("#!/bin/sh\n{text}\n")).unwrap();
}

#[test]
fn programs_that_are_missing_are_named_with_where_they_come_from() {
    let directory = tempfile::tempdir().unwrap();
    for none in [None, Some("".into())] {
        let error = Programs::find(none).err().unwrap();
        assert!(
            error.contains("KUBEBUILDER_ASSETS is not set") && error.contains("make test-kube"),
            "{error}"
        );
    }
    let find = || Programs::find(Some(directory.path().into())).err();
    assert!(find().unwrap().contains("there is no kube-apiserver in it"));
    script(directory.path(), "kube-apiserver", "");
    assert!(find().unwrap().contains("there is no etcd in it"));
    script(directory.path(), "etcd", "");
    assert_eq!(find(), None);
}

#[test]
fn make_test_kube_refuses_a_directory_without_an_api_server() {
    let directory = tempfile::tempdir().unwrap();
    let mut make = Command::new("make");
    // What the make above this test says is not for this one.
    make.args(["-s", "test-kube"]).env_remove("MAKEFLAGS").env_remove("MAKELEVEL");
    make.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).env("KUBEBUILDER_ASSETS", directory.path());
    let output = make.output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && text.contains("there is no kube-apiserver in it"), "{text}");
}

#[tokio::test]
async fn a_server_that_does_not_start_is_shown_with_what_it_said() {
    let directory = tempfile::tempdir().unwrap();
    script(directory.path(), "etcd", "exec etcd \"$@\"");
    script(
        directory.path(),
        "kube-apiserver",
        "[ \"$1\" = --version ] && exec echo Kubernetes v1.36.2; echo \"no idea of $1\"; exit 3",
    );
    let programs = Programs::find(Some(directory.path().into())).unwrap();
    let error = world(&programs).await.err().unwrap();
    assert!(error.starts_with("kube-apiserver has ended"), "{error}");
    assert!(error.contains("no idea of --etcd-servers=http://127.0.0.1:"), "{error}");
}
