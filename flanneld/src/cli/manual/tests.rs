//! Scripts are run by the shells, and pages read by programs that show them.

use std::process::{Command, Output};

use super::*;

fn run(program: &str, args: &[&str]) -> Output {
    Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}: make deps installs it"))
}

fn parse(args: &[&str]) -> Result<super::Command, String> {
    crate::cli::parse(args.iter().map(Into::into), |_| None).map_err(|error| error.to_string())
}

fn script(shell: &str) -> (tempfile::TempDir, String) {
    let super::Command::Print(Print::Generated(text)) = parse(&["completions", shell]).unwrap() else {
        panic!()
    };
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("_flanneld");
    std::fs::write(&path, text).unwrap();
    let path = path.to_str().unwrap().to_owned();
    (directory, path)
}

#[test]
fn every_command_and_flag_is_in_every_script_and_on_its_page() {
    let topics = topics();
    for (shell, dashes) in [("bash", "--"), ("zsh", "--"), ("fish", "-l ")] {
        let (_directory, path) = script(shell);
        let text = std::fs::read_to_string(path).unwrap();
        for topic in &topics {
            assert!(text.contains(topic.name), "{} in {shell}", topic.name);
            for flag in topic.flags() {
                assert!(text.contains(&format!("{dashes}{}", flag.name)), "--{} in {shell}", flag.name);
            }
        }
    }
    let main = page::page(&topics[0], &topics);
    for topic in &topics {
        let page = page::page(topic, &topics);
        assert!(main.contains(&format!("flanneld {}", topic.name.replace('-', "\\-"))), "{}", topic.name);
        for flag in topic.flags() {
            let shown = format!("\n\\fB\\-\\-{}\\fR", flag.name.replace('-', "\\-"));
            assert!(page.contains(&shown), "--{} on the page of {:?}", flag.name, topic.name);
        }
        for section in ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXIT STATUS", "SEE ALSO"] {
            assert!(page.contains(&format!(".SH {section}\n")), "{section} of {:?}", topic.name);
        }
    }
}

#[test]
fn pages_are_without_fault_for_mandoc_and_man() {
    let directory = tempfile::tempdir().unwrap();
    let pages = directory.path().join("share/man1");
    let super::Command::Pages(written) = parse(&["man", pages.to_str().unwrap()]).unwrap() else { panic!() };
    written.write().unwrap();
    let topics = topics();
    assert_eq!(std::fs::read_dir(&pages).unwrap().count(), topics.len());
    for topic in &topics {
        let path = pages.join(format!("{}.1", topic.page_name()));
        let path = path.to_str().unwrap();
        let lint = run("mandoc", &["-T", "lint", "-W", "warning", path]);
        let complaints = String::from_utf8_lossy(&lint.stdout).into_owned();
        // A date would make each build another file.
        let complaints: Vec<&str> =
            complaints.lines().filter(|line| !line.contains("missing date")).collect();
        assert!(complaints.is_empty(), "{complaints:?}");
        let shown = run("mandoc", &["-T", "utf8", "-O", "width=400", path]);
        let shown = String::from_utf8_lossy(&shown.stdout).replace('\u{8}', "");
        assert!(shown.contains("SYNOPSIS") || shown.contains("SSYYNNOOPPSSIISS"), "{shown}");
    }
}

#[test]
fn bash_completes_commands_flags_values_and_files() {
    let (directory, path) = script("bash");
    assert!(run("bash", &["-n", &path]).status.success());
    std::fs::write(directory.path().join("net conf.json"), "{}").unwrap();
    let complete = |words: &[&str]| {
        let list = words.iter().map(|word| format!("'{word}'")).collect::<Vec<_>>().join(" ");
        let ask = format!(
            "set -u; cd '{}'; source '{path}'; COMP_WORDS=({list}); COMP_CWORD={}; _flanneld; printf '%s\\n' \"${{COMPREPLY[@]}}\"",
            directory.path().display(),
            words.len() - 1
        );
        let output = run("bash", &["--norc", "-c", &ask]);
        assert!(output.stderr.is_empty(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(complete(&["flanneld", "cle"]), ["cleanup"]);
    assert_eq!(complete(&["flanneld", "--etcd-end"]), ["--etcd-endpoints="]);
    assert_eq!(complete(&["flanneld", "status", "--p"]), ["--peers"]);
    assert_eq!(complete(&["flanneld", "policy", ""]), ["explain", "list", "denied"]);
    assert_eq!(complete(&["flanneld", "policy", "explain", "--pro"]), ["--protocol="]);
    assert_eq!(complete(&["flanneld", "--traffic-manager", "="]), ["nft", "iptables"]);
    assert_eq!(complete(&["flanneld", "--traffic-manager", "=", "i"]), ["iptables"]);
    assert_eq!(complete(&["flanneld", "--traffic-manager=i"]), ["--traffic-manager=iptables"]);
    assert_eq!(complete(&["flanneld", "-traffic-manager", ""]), ["nft", "iptables"]);
    assert_eq!(complete(&["flanneld", "--ip-forward", "=", "f"]), ["false"]);
    assert_eq!(complete(&["flanneld", "check-config", "--json", "ne"]), ["net conf.json"]);
    assert_eq!(complete(&["flanneld", "help", "trac"]), ["trace"]);
    assert_eq!(complete(&["flanneld", "version", "--"]), ["--json", "--help"]);
}

#[test]
fn fish_completes_commands_flags_and_values() {
    let (_directory, path) = script("fish");
    assert!(run("fish", &["--no-execute", &path]).status.success());
    let complete = |line: &str| {
        let output = run("fish", &["--no-config", "-c", &format!("source {path}; complete -C '{line}'")]);
        assert!(output.stderr.is_empty(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.lines().map(|line| line.split('\t').next().unwrap_or_default().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(complete("flanneld cle"), ["cleanup"]);
    assert_eq!(complete("flanneld status --pe"), ["--peers"]);
    assert_eq!(complete("flanneld policy exp"), ["explain"]);
    assert_eq!(complete("flanneld policy explain --pro"), ["--protocol"]);
    assert_eq!(complete("flanneld --traffic-manager=ip"), ["--traffic-manager=iptables"]);
    assert_eq!(complete("flanneld policy --etcd-"), [""; 0]);
}

#[test]
fn zsh_reads_its_script_and_its_flags() {
    let (_directory, path) = script("zsh");
    assert!(run("zsh", &["-n", &path]).status.success());
    // A terminal is needed to complete for real: zsh's own pseudo terminal is one.
    let ask = format!(
        "zmodload zsh/zpty; zpty shell 'zsh -f -i'; zpty -w shell 'PS1=; autoload -U compinit; compinit -u -D; source {path}; \
         bindkey \"^I\" complete-word; zstyle \":completion:*\" list-prompt \"\"; echo re\"\"ady'; \
         zpty -r -m shell line '*ready*'; zpty -w -n shell $'flanneld clea\\tX\\n'; zpty -r -m shell line '*cleanup*X*' && print found; \
         zpty -w -n shell $'flanneld status --pee\\tY\\n'; zpty -r -m shell line '*--peers*Y*' && print found; zpty -d shell"
    );
    let output = run("timeout", &["60", "zsh", "-f", "-c", &ask]);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(said.matches("found").count(), 2, "{said} {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn other_shells_and_words_are_refused_with_the_known_ones() {
    for (args, part) in [
        (&["completions"][..], "bash, zsh or fish"),
        (&["completions", "tcsh"], "\"tcsh\""),
        (&["completions", "bash", "zsh"], "takes one shell"),
        (&["man", "a", "b"], "one directory"),
        (&["version", "now"], "\"now\""),
    ] {
        let error = parse(args).unwrap_err();
        assert!(error.contains(part), "{error}");
    }
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    std::fs::write(&file, "").unwrap();
    let super::Command::Pages(pages) = parse(&["man", file.join("man1").to_str().unwrap()]).unwrap() else {
        panic!()
    };
    let error = pages.write().unwrap_err().to_string();
    assert!(error.contains("man1 can't be written"), "{error}");
}
