//! The command line and the environment, read into options that are already checked.
//!
//! The grammar and the flags are Flannel's (contract §1.1 to §1.3), with one deliberate difference: what Go
//! flannel passes over in silence (a wrong flag, a wrong value, a stray word) is an error here.

mod agent_flags;
mod check;
mod check_config;
pub(crate) mod cleanup;
mod connectivity;
mod diags;
mod docker_opts;
mod doctor;
mod explain;
mod flags;
mod grammar;
mod manual;
pub(crate) mod options;
pub(crate) mod policy;
mod print;
mod report;
mod status;
mod trace;

use std::ffi::OsString;

use clap::{ArgAction, CommandFactory, FromArgMatches};

use crate::check_config::CheckConfigOptions;
use crate::connectivity::ConnectivityOptions;
use crate::diags::DiagsOptions;
use crate::docker_opts::DockerOptsOptions;
use crate::explain::ExplainOptions;
use crate::trace::TraceOptions;
use check_config::CheckConfigFlags;
use cleanup::{CleanupFlags, CleanupOptions};
use connectivity::ConnectivityFlags;
use diags::DiagsFlags;
use docker_opts::DockerOptsFlags;
use doctor::DoctorFlags;
use explain::ExplainFlags;
use flags::RunFlags;
use grammar::{Parsed, Setting};
pub(crate) use manual::Pages;
use manual::{CompletionsFlags, ManFlags};
use options::{KubeEnvironment, Options};
use policy::{PolicyFlags, PolicyQuestion};
use print::VersionFlags;
pub(crate) use print::{Print, version};
use report::ReportFlags;
use status::StatusFlags;

use crate::doctor::DoctorOptions;
use crate::show::report::ReportOptions;
use crate::show::status::StatusOptions;
use trace::TraceFlags;

/// All sub-commands, in the order in which the help lists them.
///
/// A new one is a file below `cli` with its flags ([`SubcommandFlags`]), a line here, a variant of [`Command`] and its
/// arm in `main.rs`.
static SUBCOMMANDS: [Subcommand; 14] = [
    Subcommand::of::<StatusFlags>(),
    Subcommand::of::<DoctorFlags>(),
    Subcommand::of::<ExplainFlags>(),
    Subcommand::of::<TraceFlags>(),
    Subcommand::of::<ConnectivityFlags>(),
    Subcommand::of::<PolicyFlags>(),
    Subcommand::of::<CheckConfigFlags>(),
    Subcommand::of::<ReportFlags>(),
    Subcommand::of::<DiagsFlags>(),
    Subcommand::of::<DockerOptsFlags>(),
    Subcommand::of::<CleanupFlags>(),
    Subcommand::of::<CompletionsFlags>(),
    Subcommand::of::<ManFlags>(),
    Subcommand::of::<VersionFlags>(),
];

/// What the command line asks for.
#[derive(Debug)]
pub(crate) enum Command {
    /// Be the agent.
    Run(Box<Options>),
    /// Remove what an agent left on this host.
    Cleanup(CleanupOptions),
    /// Ask the agent of this node about network policies.
    Policy(PolicyQuestion),
    /// Say how nodes stand.
    Status(StatusOptions),
    /// Say what is wrong on this node.
    Doctor(DoctorOptions),
    /// Say which way a packet takes.
    Explain(ExplainOptions),
    /// Follow packets through this node.
    Trace(TraceOptions),
    /// Test the way to every peer.
    Connectivity(ConnectivityOptions),
    /// Check a network configuration.
    CheckConfig(CheckConfigOptions),
    /// Print how all nodes stand as a page of HTML.
    Report(ReportOptions),
    /// Write an archive for a bug report.
    Diags(DiagsOptions),
    /// Write manual pages.
    Pages(Pages),
    /// Write dockerd's options.
    DockerOpts(DockerOptsOptions),
    /// Print a text and end with exit code 0.
    Print(Print),
}

/// The command line or the environment can't be used; the text names what, and what to do.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct UsageError(String);

impl UsageError {
    /// The process's exit code for this error.
    pub(crate) const EXIT_CODE: u8 = 2;

    /// The same for what could only be found later: by reading a file that an option names.
    pub(crate) fn of(error: impl std::fmt::Display) -> Self {
        Self(error.to_string())
    }
}

/// The flags and arguments of a sub-command, with the grammar of flanneld's own: a flag is read by its
/// `value_parser`, and words that are no flags go into a positional `Vec<String>` if there is one. A flag that the agent has,
/// too, such as `--subnet-file`, can be set by its variable.
trait SubcommandFlags: CommandFactory + FromArgMatches {
    /// The first word of the command line.
    const NAME: &'static str;
    /// What follows it, for the help of `flanneld`.
    const SYNOPSIS: &'static str;
    /// What it is for, in a few words.
    const SUMMARY: &'static str;
    /// What its first word that is no flag can be.
    const WORDS: Words = Words::None;

    /// The arguments as words that the grammar knows.
    fn split(args: &[String]) -> Vec<String> {
        args.to_vec()
    }

    /// Checks what no single flag shows. `settings` tell which flags were given, and where.
    fn check(self, settings: &[Setting]) -> Result<Command, UsageError>;
}

/// What a word of a sub-command that is no flag can be, for completions.
#[derive(Clone, Copy)]
enum Words {
    /// Nothing that can be listed.
    None,
    Files,
    Directories,
    OneOf(&'static [&'static str]),
}

/// A sub-command: a type of flags as a value.
struct Subcommand {
    name: &'static str,
    synopsis: &'static str,
    summary: &'static str,
    words: Words,
    shape: fn() -> clap::Command,
    split: fn(&[String]) -> Vec<String>,
    read: fn(&clap::Command, &[Setting]) -> Result<Command, UsageError>,
}

impl Subcommand {
    const fn of<F: SubcommandFlags>() -> Self {
        Self {
            name: F::NAME,
            synopsis: F::SYNOPSIS,
            summary: F::SUMMARY,
            words: F::WORDS,
            shape: F::command,
            split: F::split,
            read: |shape, settings| read::<F>(shape, settings)?.check(settings),
        }
    }

    fn named(name: &str) -> Option<&'static Self> {
        SUBCOMMANDS.iter().find(|subcommand| subcommand.name == name)
    }

    fn parse(&self, args: &[String], environment: Environment<'_>) -> Result<Command, UsageError> {
        let shape = documented((self.shape)());
        let mut settings = match grammar::normalise(&shape, &(self.split)(args))? {
            Parsed::Help => return Ok(print_help(shape)),
            Parsed::Settings(settings) => settings,
        };
        settings.extend(grammar::from_environment(&shape, &RunFlags::command(), &settings, environment)?);
        (self.read)(&shape, &settings)
    }
}

/// How a variable of the environment is read.
type Environment<'a> = &'a dyn Fn(&str) -> Option<OsString>;

/// Reads the arguments (without the program's name) and the environment.
///
/// # Errors
/// [`UsageError`] for the first thing that can't be used.
pub(crate) fn parse(
    args: impl IntoIterator<Item = OsString>,
    environment: impl Fn(&str) -> Option<OsString>,
) -> Result<Command, UsageError> {
    let args = args.into_iter().map(utf8).collect::<Result<Vec<_>, _>>()?;
    match args.split_first().map(|(first, rest)| (first.as_str(), rest)) {
        Some(("help", topic)) => help_on(topic),
        Some((first, rest)) => match Subcommand::named(first) {
            Some(subcommand) => subcommand.parse(rest, &environment),
            None => run(&args, &environment),
        },
        None => run(&args, &environment),
    }
}

fn help_on(topic: &[String]) -> Result<Command, UsageError> {
    let subcommand = match topic {
        [] => return Ok(print_help(run_shape())),
        [name] => Subcommand::named(name),
        _ => None,
    };
    subcommand.map(|subcommand| print_help(documented((subcommand.shape)()))).ok_or_else(|| {
        let names = || SUBCOMMANDS.iter().map(|subcommand| subcommand.name);
        let topics = std::iter::once("flanneld").chain(names()).map(str::to_owned);
        let words = std::iter::once(String::new()).chain(names().map(|name| format!(" {name}")));
        let words = words.map(|name| format!("flanneld help{name}"));
        UsageError(format!("help is about {}: write {}", either(topics), either(words)))
    })
}

/// `a, b or c`.
fn either(items: impl Iterator<Item = String>) -> String {
    let mut items: Vec<String> = items.collect();
    let last = items.pop().unwrap_or_default();
    if items.is_empty() { last } else { format!("{} or {last}", items.join(", ")) }
}

fn run(args: &[String], environment: Environment<'_>) -> Result<Command, UsageError> {
    let shape = run_shape();
    let mut settings = match grammar::normalise(&shape, args)? {
        Parsed::Help => return Ok(print_help(shape)),
        Parsed::Settings(settings) => settings,
    };
    // Before the environment and the values, as in Go: asking for the version works with any of them.
    let version_flag = settings.iter().rfind(|setting| setting.flag == "version");
    if version_flag.is_some_and(|setting| setting.value == "true") {
        return Ok(Command::Print(Print::VersionFlag(version())));
    }
    settings.extend(grammar::from_environment(&shape, &shape, &settings, environment)?);
    let given = |name| environment(name).filter(|value| !value.is_empty()).map(utf8).transpose();
    let pod = given("POD_NAMESPACE")?.zip(given("POD_NAME")?);
    let place = KubeEnvironment { node: given("NODE_NAME")?, pod };
    let matches = grammar::matches(&shape, &settings)?;
    let flags = RunFlags::from_arg_matches(&matches).map_err(|error| grammar::refused(&error, &settings))?;
    let options = Options::check(flags, &settings, place, |store, policies| {
        options::shown(&shape, &matches, store, policies)
    })?;
    Ok(Command::Run(Box::new(options)))
}

/// What to say of variables that look like those of flags and set none.
pub(crate) fn misspelled(variables: impl Iterator<Item = OsString>) -> Vec<String> {
    let agent = RunFlags::command();
    let names = variables.filter_map(|name| name.into_string().ok());
    let said = |name: String| {
        let meant = grammar::meant(&agent, &name)?;
        Some(format!("{} has no effect: did you mean {meant}?", subnet::text::shortened(&name)))
    };
    names.filter_map(said).collect()
}

/// The agent's flags, with the usage that names the sub-commands.
fn run_shape() -> clap::Command {
    let mut usage = "flanneld [FLAGS]\n".to_owned();
    for Subcommand { name, synopsis, summary, .. } in &SUBCOMMANDS {
        usage += &format!("       flanneld {:<30} {summary}\n", format!("{name} {synopsis}"));
    }
    let names = SUBCOMMANDS.iter().map(|subcommand| subcommand.name).collect::<Vec<_>>().join("|");
    usage += &format!("       flanneld help [{names}]");
    documented(RunFlags::command()).override_usage(usage)
}

/// The command with each flag's environment variable in its help text, without what says nothing, and with booleans
/// that take a value only after `=`.
fn documented(shape: clap::Command) -> clap::Command {
    let agent = RunFlags::command();
    shape.next_line_help(true).mut_args(|argument| {
        let no_default = argument.get_default_values().iter().all(|value| value.is_empty());
        let mut argument = argument.hide_possible_values(true).hide_default_value(no_default);
        if grammar::is_boolean(&argument) {
            argument =
                argument.action(ArgAction::Set).num_args(0..=1).require_equals(true).value_name("BOOL");
        }
        match (grammar::variable_of(&argument, &agent), argument.get_help()) {
            (Some(variable), Some(help)) => {
                let help = format!("{help} [env: {variable}]");
                argument.help(help)
            }
            _ => argument,
        }
    })
}

/// The help of a sub-command.
fn help<F: SubcommandFlags>() -> Command {
    print_help(documented(F::command()))
}

fn print_help(mut shape: clap::Command) -> Command {
    Command::Print(Print::Help(shape.render_help().to_string()))
}

fn read<F: FromArgMatches>(shape: &clap::Command, settings: &[Setting]) -> Result<F, UsageError> {
    let matches = grammar::matches(shape, settings)?;
    F::from_arg_matches(&matches).map_err(|error| grammar::refused(&error, settings))
}

fn utf8(text: OsString) -> Result<String, UsageError> {
    text.into_string().map_err(|text| {
        UsageError(format!("{:?} is not valid UTF-8: write it in UTF-8", text.to_string_lossy()))
    })
}

#[cfg(test)]
mod tests;
