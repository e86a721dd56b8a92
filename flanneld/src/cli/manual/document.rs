//! docs/reference.md: all flags, variables and keys, as the program has them.

use std::fmt::Write as _;
use std::path::Path;

use clap::CommandFactory;

use super::super::flags::RunFlags;
use super::super::grammar;
use super::reference::{Flag, Topic, Values, topics};

const HEAD: &str = "\
# Reference

Every command, flag, variable and configuration key, as the program itself has them: this page is generated, and a test fails when
it differs. [configuration.md](configuration.md) and [commands.md](commands.md) explain them, and `flanneld help COMMAND` prints the
same with examples. A flag may be written with one dash or two; a boolean takes its value only after `=`. Empty variables count as unset.
";

fn document() -> String {
    let topics = topics();
    let mut text = HEAD.to_owned();
    for topic in &topics {
        command(&mut text, topic);
    }
    keys(&mut text);
    text
}

fn command(text: &mut String, topic: &Topic) {
    let about = topic.shape.get_about().map(ToString::to_string).unwrap_or_default();
    let _ = match topic.name {
        "" => write!(text, "\n## flanneld\n\n{about}.\n"),
        name => {
            let usage = format!("flanneld {name} {}", topic.synopsis);
            write!(text, "\n## flanneld {name}\n\n`{}`: {about}.\n", usage.trim_end())
        }
    };
    for heading in topic.headings() {
        if let Some(heading) = heading {
            let _ = write!(text, "\n### {heading}\n");
        }
        text.push_str("\n| Flag | Value | Default | Variable | |\n|---|---|---|---|---|\n");
        topic
            .flags()
            .filter(|flag| flag.argument.get_help_heading() == heading)
            .for_each(|flag| row(text, &flag));
    }
}

fn row(text: &mut String, flag: &Flag<'_>) {
    let value = match flag.values() {
        Values::Boolean { .. } => "true, false".to_owned(),
        Values::OneOf(choices) => choices.join(", "),
        Values::Files | Values::Directories | Values::Any => flag.value_name().to_owned(),
    };
    let defaults = flag.argument.get_default_values().iter().map(|value| value.to_string_lossy());
    let default =
        defaults.filter(|value| !value.is_empty()).map(|value| format!("`{value}`")).collect::<String>();
    let variable = grammar::variable_of(flag.argument, &RunFlags::command());
    let help = flag.help();
    let help = variable.iter().fold(help, |help, name| help.replace(&format!(" [env: {name}]"), ""));
    let variable = variable.map(|name| format!("`{name}`")).unwrap_or_default();
    let cell = |text: &str| text.replace('|', "\\|").replace('<', "&lt;");
    let _ =
        writeln!(text, "| `--{}` | {} | {default} | {variable} | {} |", flag.name, cell(&value), cell(&help));
}

fn keys(text: &mut String) {
    text.push_str(
        "\n## Keys of the network configuration\n\n\
         Letter case does not matter; a key that is not among these is ignored with a warning. Go flannel reads some of them on\n\
         Windows alone. [What they mean](configuration.md#the-network-configuration).\n\n\
         | Where | Keys |\n|---|---|\n",
    );
    for (backend, keys) in subnet::config::all_keys() {
        let place = if backend.is_empty() { String::new() } else { format!("`Backend` of `{backend}`") };
        let keys = keys.iter().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(", ");
        let _ = writeln!(text, "| {place} | {keys} |");
    }
}

fn docs() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs")
}

/// `UPDATE_REFERENCE=1 make docs-check` writes the page.
#[test]
fn the_reference_of_all_settings_is_what_the_program_has() {
    let path = docs().join("reference.md");
    let (document, written) = (document(), std::fs::read_to_string(&path).unwrap_or_default());
    if std::env::var_os("UPDATE_REFERENCE").is_some() {
        std::fs::write(&path, &document).unwrap();
        return;
    }
    let differs = document.lines().zip(written.lines()).find(|(right, found)| right != found);
    assert!(
        document == written,
        "docs/reference.md is not what the program has, first here: {differs:?}; write it again: UPDATE_REFERENCE=1 make docs-check"
    );
}

/// The page only lists; what something means is explained by hand.
#[test]
fn every_flag_and_key_is_explained() {
    let text = ["configuration.md", "wireguard.md", "udp.md", "extension.md", "network-policy.md"]
        .map(|name| std::fs::read_to_string(docs().join(name)).unwrap())
        .concat();
    let flags = topics().swap_remove(0);
    let missing =
        flags.flags().map(|flag| format!("`--{}`", flag.name)).filter(|flag| !text.contains(flag.as_str()));
    assert_eq!(missing.collect::<Vec<_>>(), [""; 0]);
    // Those have no effect on Linux.
    let windows = ["Name", "MacPrefix", "DNSServerList"];
    let keys = subnet::config::all_keys().flat_map(|(_, keys)| keys).filter(|key| !windows.contains(key));
    let missing = keys.map(|key| format!("`{key}`")).filter(|key| {
        let nested = key.replacen('`', "`Backend.", 1);
        !text.contains(key.as_str()) && !text.contains(nested.as_str())
    });
    assert_eq!(missing.collect::<Vec<_>>(), [""; 0]);
}
