//! `flanneld docker-opts`: its flags, those of Go flannel's `mk-docker-opts.sh`.

use std::path::PathBuf;

use clap::{ArgAction, Parser};

use super::grammar::Setting;
use super::{Command, SubcommandFlags, UsageError, check};
use crate::docker_opts::{DEFAULT_KEY, DEFAULT_OUTPUT, DockerOptsOptions, Shape};

const EXAMPLES: &str = "\
Takes the place of mk-docker-opts.sh, with its options and output, for Docker without Kubernetes. It waits 10 s for the
subnet file. Single letters may be joined, as in -icf FILE. A value that the environment has for the key, and variables
DOCKER_OPT_*, are among the options, as with that script.

Examples:
  flanneld docker-opts -k DOCKER_NETWORK_OPTIONS -d /run/flannel/docker
      in the unit of flanneld: ExecStartPost=; Docker's unit reads it by EnvironmentFile=/run/flannel/docker
  flanneld docker-opts -c -d -
      prints DOCKER_OPTS=\" --bip=10.244.3.1/24 --ip-masq=false --mtu=1450\"

Exit codes: 0 when the file is written; 1 when the subnet file is missing, can't be used, or the file can't be written; 2
when a flag or a variable can't be used.";

/// Writes the options of dockerd that put its bridge into this node's subnet.
#[derive(Parser)]
#[command(
    name = "flanneld docker-opts",
    bin_name = "flanneld docker-opts",
    override_usage = "flanneld docker-opts [FLAGS]",
    after_help = EXAMPLES
)]
pub(super) struct DockerOptsFlags {
    /// The subnet file, if it is not that of --subnet-file
    #[arg(long = "f", value_name = "FILE", value_parser = check::file)]
    f: Option<PathBuf>,
    /// The file to write; - for standard output
    #[arg(long = "d", value_name = "FILE", default_value = DEFAULT_OUTPUT, value_parser = check::file)]
    d: PathBuf,
    /// Write one variable for each option: DOCKER_OPT_BIP, DOCKER_OPT_IPMASQ, DOCKER_OPT_MTU
    #[arg(long = "i", action = ArgAction::Set, default_value_t = false)]
    i: bool,
    /// Write one variable with all options; without -i and -c, both are written
    #[arg(long = "c", action = ArgAction::Set, default_value_t = false)]
    c: bool,
    /// Leave --ip-masq out
    #[arg(long = "m", action = ArgAction::Set, default_value_t = false)]
    m: bool,
    /// Name of the variable with all options
    #[arg(long = "k", value_name = "NAME", default_value = DEFAULT_KEY, value_parser = variable)]
    k: String,
    /// File that tells about this node, as the agent's flag
    #[arg(long, value_name = "FILE", default_value = subnet::env_file::DEFAULT_PATH, value_parser = check::file)]
    subnet_file: PathBuf,
}

/// The name of a shell variable.
fn variable(text: &str) -> Result<String, String> {
    let mut letters = text.chars();
    let first = letters.next().is_some_and(|letter| letter == '_' || letter.is_ascii_alphabetic());
    if first && letters.all(|letter| letter == '_' || letter.is_ascii_alphanumeric()) {
        return Ok(text.to_owned());
    }
    Err("is not the name of a variable: use letters, digits and _, such as DOCKER_NETWORK_OPTIONS".to_owned())
}

impl SubcommandFlags for DockerOptsFlags {
    const NAME: &'static str = "docker-opts";
    const SYNOPSIS: &'static str = "[-d FILE] [FLAGS]";
    const SUMMARY: &'static str = "write dockerd's options for this node's subnet";

    /// As getopts has it: `-ic` is `-i -c`, and `-f/run/subnet.env` is `-f /run/subnet.env`.
    fn split(args: &[String]) -> Vec<String> {
        let mut split = Vec::new();
        let mut words = args.iter();
        while let Some(word) = words.next() {
            let Some(mut letters) = word.strip_prefix('-').filter(|rest| is_joined(rest)) else {
                split.push(word.clone());
                continue;
            };
            while let Some(letter) = letters.chars().next() {
                letters = &letters[letter.len_utf8()..];
                split.push(format!("-{letter}"));
                if matches!(letter, 'f' | 'd' | 'k') {
                    split.extend(Some(letters).filter(|value| !value.is_empty()).map(str::to_owned));
                    break;
                }
            }
            // The value of a separate word is no flag, even with dashes.
            if split.last().is_some_and(|last| matches!(last.as_str(), "-f" | "-d" | "-k")) {
                split.extend(words.next().cloned());
            }
        }
        split
    }

    fn check(self, _settings: &[Setting]) -> Result<Command, UsageError> {
        let Self { f, d, i, c, m, k, subnet_file } = self;
        let shape = match (i, c) {
            (true, false) => Shape::Individual,
            (false, true) => Shape::Combined,
            (true, true) | (false, false) => Shape::Both,
        };
        Ok(Command::DockerOpts(DockerOptsOptions {
            subnet_file: f.unwrap_or(subnet_file),
            output: d,
            shape,
            masquerade: !m,
            key: k,
        }))
    }
}

/// Whether what follows the dash is letters of getopts, and not a flag of several letters or with `=`.
fn is_joined(rest: &str) -> bool {
    let mut letters = rest.chars().skip_while(|letter| matches!(letter, 'i' | 'c' | 'm'));
    match letters.next() {
        None => !rest.is_empty(),
        Some('f' | 'd' | 'k') => letters.next() != Some('='),
        Some(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(args: &[&str]) -> Result<DockerOptsOptions, String> {
        let words = std::iter::once("docker-opts").chain(args.iter().copied()).map(Into::into);
        let environment = |name: &str| (name == "FLANNELD_SUBNET_FILE").then(|| "/tmp/agents.env".into());
        match super::super::parse(words, environment) {
            Ok(Command::DockerOpts(options)) => Ok(options),
            Ok(other) => panic!("{other:?}"),
            Err(error) => Err(error.to_string()),
        }
    }

    #[test]
    fn options_are_those_of_the_script() {
        let default = DockerOptsOptions {
            subnet_file: "/tmp/agents.env".into(),
            output: DEFAULT_OUTPUT.into(),
            shape: Shape::Both,
            masquerade: true,
            key: DEFAULT_KEY.into(),
        };
        let given = DockerOptsOptions {
            subnet_file: "/run/x.env".into(),
            output: "/run/flannel/docker".into(),
            shape: Shape::Combined,
            masquerade: false,
            key: "DOCKER_NETWORK_OPTIONS".into(),
        };
        let individual = DockerOptsOptions { shape: Shape::Individual, ..default.clone() };
        let key = "DOCKER_NETWORK_OPTIONS";
        for (args, expected) in [
            (&[][..], &default),
            (&["-i", "-c"], &default),
            (&["-ic"], &default),
            (&["-i"], &individual),
            (&["-f", "/run/x.env", "-d", "/run/flannel/docker", "-c", "-m", "-k", key], &given),
            (&["-cmf", "/run/x.env", "-d/run/flannel/docker", "-kDOCKER_NETWORK_OPTIONS"], &given),
            (&["--f=/run/x.env", "-d=/run/flannel/docker", "--c", "-m=true", "--k", key], &given),
        ] {
            assert_eq!(options(args).as_ref(), Ok(expected), "{args:?}");
        }
        assert_eq!(options(&["-d", "-"]).map(|options| options.output), Ok("-".into()));
    }

    #[test]
    fn mistakes_are_named_with_a_remedy() {
        for (args, parts) in [
            (&["-k", "A B"][..], ["A B", "DOCKER_NETWORK_OPTIONS"]),
            (&["-k", ""], ["--k", "DOCKER_NETWORK_OPTIONS"]),
            (&["-x"], ["--x", "docker-opts --help"]),
            (&["-d"], ["--d needs a value", "--d=<FILE>"]),
            (&["/run/flannel/docker"], ["/run/flannel/docker", "remove it"]),
        ] {
            let error = options(args).unwrap_err();
            assert!(parts.iter().all(|part| error.contains(part)), "{args:?}: {error}");
        }
    }
}
