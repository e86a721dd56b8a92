//! All commands with their flags, and what a word or a value of a flag can be.

use clap::Arg;

use super::super::{SUBCOMMANDS, Words, documented, grammar, run_shape};

/// Values of flags that are one of few words. Flags of this name mean the same in every command.
const CHOICES: [(&str, &[&str]); 7] = [
    ("fix", &["leaked-addresses"]),
    ("lease-store", &["etcd", "file:"]),
    ("network-policy", &["off", "on", "strict"]),
    ("network-policy-steer", &["auto", "always", "never"]),
    ("proto", &["tcp", "udp", "icmp"]),
    ("protocol", &["TCP", "UDP", "SCTP"]),
    ("traffic-manager", &["nft", "iptables"]),
];

/// A command, or the agent itself.
pub(super) struct Topic {
    /// The first word of the command line; empty for the agent.
    pub(super) name: &'static str,
    /// What follows it, in short.
    pub(super) synopsis: &'static str,
    /// What it is for, in a few words.
    pub(super) summary: &'static str,
    /// Its flags.
    pub(super) shape: clap::Command,
    /// Its words that are no flags.
    pub(super) words: Words,
}

impl Topic {
    /// The name of its manual page.
    pub(super) fn page_name(&self) -> String {
        if self.name.is_empty() { "flanneld".to_owned() } else { format!("flanneld-{}", self.name) }
    }

    /// Its flags, in the order of the help.
    pub(super) fn flags(&self) -> impl Iterator<Item = Flag<'_>> {
        self.shape.get_arguments().filter_map(|argument| Some(Flag { argument, name: argument.get_long()? }))
    }

    /// The headings of its flags, in the order of the help.
    pub(super) fn headings(&self) -> Vec<Option<&str>> {
        let mut headings: Vec<Option<&str>> = Vec::new();
        for flag in self.flags() {
            let heading = flag.argument.get_help_heading();
            if !headings.contains(&heading) {
                headings.push(heading);
            }
        }
        headings
    }
}

/// A flag.
pub(super) struct Flag<'a> {
    pub(super) argument: &'a Arg,
    /// Without dashes.
    pub(super) name: &'a str,
}

impl Flag<'_> {
    /// What its value can be.
    pub(super) fn values(&self) -> Values {
        if grammar::is_boolean(self.argument) {
            return Values::Boolean {
                default: self.argument.get_default_values().iter().any(|value| *value == "true"),
            };
        }
        let choices = CHOICES.iter().find(|(name, _)| *name == self.name);
        match (choices, self.value_name()) {
            (Some((_, choices)), _) => Values::OneOf(choices),
            (None, "FILE") => Values::Files,
            (None, "DIR") => Values::Directories,
            (None, _) => Values::Any,
        }
    }

    /// What stands for its value in help texts.
    pub(super) fn value_name(&self) -> &str {
        self.argument.get_value_names().and_then(|names| names.first()).map_or("VALUE", |name| name.as_str())
    }

    /// Its help text in one line.
    pub(super) fn help(&self) -> String {
        self.argument.get_help().map(|text| text.to_string().replace('\n', " ")).unwrap_or_default()
    }
}

/// What a flag's value can be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Values {
    /// True or false, after `=` only.
    Boolean {
        /// What it is without the flag.
        default: bool,
    },
    OneOf(&'static [&'static str]),
    Files,
    Directories,
    Any,
}

/// The agent, then the commands in the order of the help.
pub(super) fn topics() -> Vec<Topic> {
    let agent = Topic { name: "", synopsis: "", summary: "", shape: run_shape(), words: Words::None };
    let command = |command: &super::super::Subcommand| Topic {
        name: command.name,
        synopsis: command.synopsis,
        summary: command.summary,
        shape: documented((command.shape)()),
        words: command.words,
    };
    std::iter::once(agent).chain(SUBCOMMANDS.iter().map(command)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::grammar::{Origin, Setting};

    #[test]
    fn every_value_that_is_offered_is_one_that_the_flag_takes() {
        let topics = topics();
        for (name, choices) in CHOICES {
            let mut has =
                topics.iter().filter(|topic| topic.flags().any(|flag| flag.name == name)).peekable();
            assert!(has.peek().is_some(), "no command has --{name}");
            for (topic, choice) in has.flat_map(|topic| choices.iter().map(move |choice| (topic, choice))) {
                let setting =
                    Setting { flag: name.into(), value: (*choice).into(), origin: Origin::Argument };
                let read = grammar::matches(&topic.shape, &[setting]);
                assert!(read.is_ok(), "{} --{name}={choice}: {}", topic.name, read.unwrap_err());
            }
        }
    }

    #[test]
    fn flags_of_one_name_take_the_same_values_in_every_command() {
        let topics = topics();
        let flags: Vec<Flag<'_>> = topics.iter().flat_map(Topic::flags).collect();
        for flag in &flags {
            for other in flags.iter().filter(|other| other.name == flag.name) {
                assert_eq!(flag.values(), other.values(), "--{}", flag.name);
            }
        }
    }
}
