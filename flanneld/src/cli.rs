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
mod doctor;
mod explain;
mod flags;
mod grammar;
pub(crate) mod options;
pub(crate) mod policy;
mod status;
mod trace;

use std::ffi::OsString;
use std::io::{self, Write};

use clap::{ArgAction, CommandFactory, FromArgMatches};

use crate::check_config::CheckConfigOptions;
use crate::connectivity::ConnectivityOptions;
use crate::diags::DiagsOptions;
use crate::explain::ExplainOptions;
use crate::trace::TraceOptions;
use check_config::CheckConfigFlags;
use cleanup::{CleanupFlags, CleanupOptions};
use connectivity::ConnectivityFlags;
use diags::DiagsFlags;
use doctor::DoctorFlags;
use explain::ExplainFlags;
use flags::RunFlags;
use grammar::{Parsed, Setting};
use options::{Options, Place};
use policy::{PolicyFlags, PolicyQuestion};
use status::StatusFlags;

use crate::doctor::DoctorOptions;
use crate::show::status::StatusOptions;
use trace::TraceFlags;

/// All sub-commands, in the order in which the help lists them.
///
/// A new one is a file below `cli` with its flags ([`SubcommandFlags`]), a line here, a variant of [`Command`] and its
/// arm in `main.rs`.
static SUBCOMMANDS: [Subcommand; 9] = [
    Subcommand::of::<StatusFlags>(),
    Subcommand::of::<DoctorFlags>(),
    Subcommand::of::<ExplainFlags>(),
    Subcommand::of::<TraceFlags>(),
    Subcommand::of::<ConnectivityFlags>(),
    Subcommand::of::<PolicyFlags>(),
    Subcommand::of::<CheckConfigFlags>(),
    Subcommand::of::<DiagsFlags>(),
    Subcommand::of::<CleanupFlags>(),
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
    /// Write an archive for a bug report.
    Diags(DiagsOptions),
    /// Print a text and end with exit code 0.
    Print(Print),
}

/// A text that was asked for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Print {
    /// The usage, which goes to stdout.
    Help(String),
    /// What `version` prints, to stdout.
    Version(String),
    /// What `--version` prints, to stderr as Go flannel's does.
    VersionFlag(String),
}

/// The version, with the commit.
pub(crate) fn version() -> String {
    format!("v{} (commit {})", crate::version::VERSION, crate::version::commit())
}

/// The same as a JSON object.
fn version_as_json() -> String {
    let version = format!("v{}", crate::version::VERSION);
    serde_json::json!({ "schema": 1, "version": version, "commit": crate::version::commit() }).to_string()
}

impl Print {
    /// Writes the text to where it belongs.
    ///
    /// # Errors
    /// When the reader is gone, for example.
    pub(crate) fn print(&self) -> io::Result<()> {
        match self {
            Self::Help(text) => io::stdout().write_all(text.as_bytes()),
            Self::Version(text) => writeln!(io::stdout(), "{text}"),
            Self::VersionFlag(text) => writeln!(io::stderr(), "{text}"),
        }
    }
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

    /// Checks what no single flag shows. `settings` tell which flags were given, and where.
    fn check(self, settings: &[Setting]) -> Result<Command, UsageError>;
}

/// A sub-command: a type of flags as a value.
struct Subcommand {
    name: &'static str,
    synopsis: &'static str,
    summary: &'static str,
    shape: fn() -> clap::Command,
    read: fn(&clap::Command, &[Setting]) -> Result<Command, UsageError>,
}

impl Subcommand {
    const fn of<F: SubcommandFlags>() -> Self {
        Self {
            name: F::NAME,
            synopsis: F::SYNOPSIS,
            summary: F::SUMMARY,
            shape: F::command,
            read: |shape, settings| read::<F>(shape, settings)?.check(settings),
        }
    }

    fn named(name: &str) -> Option<&'static Self> {
        SUBCOMMANDS.iter().find(|subcommand| subcommand.name == name)
    }

    fn parse(&self, args: &[String], environment: Environment<'_>) -> Result<Command, UsageError> {
        let shape = documented((self.shape)());
        let mut settings = match grammar::normalise(&shape, args)? {
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
        Some(("version", [])) => Ok(Command::Print(Print::Version(version()))),
        Some(("version", [json])) if matches!(json.as_str(), "--json" | "-json" | "--json=true") => {
            Ok(Command::Print(Print::Version(version_as_json())))
        }
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
    let place = Place { node: given("NODE_NAME")?, pod };
    let matches = grammar::matches(&shape, &settings)?;
    let flags = RunFlags::from_arg_matches(&matches).map_err(|error| grammar::refused(&error, &settings))?;
    let options = Options::check(flags, &settings, place, |store, policies| {
        options::shown(&shape, &matches, store, policies)
    })?;
    Ok(Command::Run(Box::new(options)))
}

/// The agent's flags, with the usage that names the sub-commands.
fn run_shape() -> clap::Command {
    let mut usage = "flanneld [FLAGS]\n".to_owned();
    for Subcommand { name, synopsis, summary, .. } in &SUBCOMMANDS {
        usage += &format!("       flanneld {:<30} {summary}\n", format!("{name} {synopsis}"));
    }
    let names = SUBCOMMANDS.iter().map(|subcommand| subcommand.name).collect::<Vec<_>>().join("|");
    usage += &format!("       flanneld version | help [{names}]");
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
mod tests {
    use super::*;

    fn parse(args: &[&str], environment: &[(&str, &str)]) -> Result<Command, UsageError> {
        super::parse(args.iter().map(OsString::from), |name| {
            environment.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(value))
        })
    }

    fn options(args: &[&str], environment: &[(&str, &str)]) -> Options {
        match parse(args, environment).unwrap() {
            Command::Run(options) => *options,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_environment_fills_in_what_the_command_line_leaves_out() {
        let environment = [
            ("FLANNELD_SUBNET_FILE", "/tmp/environment"),
            ("FLANNELD_HEALTHZ_PORT", "0x1f91"),
            ("FLANNELD_IFACE", "eth0,eth1"),
            ("FLANNELD_PUBLIC_IP", ""),
        ];
        let read = options(&["--healthz-port=9000"], &environment);
        assert_eq!(read.subnet_file.to_str(), Some("/tmp/environment"));
        assert_eq!(read.health.unwrap().port(), 9000);
        assert_eq!(read.selectors.iface, ["eth0,eth1"], "a repeatable flag gets one element");
        assert_eq!(read.selectors.public.v4, None);
        assert_eq!(options(&[], &environment).health.unwrap().port(), 8081);
    }

    #[test]
    fn a_wrong_variable_is_named_as_the_variable_that_it_is() {
        for (variable, value, part) in [
            ("FLANNELD_HEALTHZ_PORT", "high", "whole number"),
            ("FLANNELD_IP_MASQ", "yes", "true or false"),
            ("FLANNELD_SUBNET_LEASE_RENEW_MARGIN", "1440", "1 to 1439"),
            ("FLANNELD_V", "much", "whole number"),
        ] {
            let text = parse(&[], &[(variable, value)]).unwrap_err().to_string();
            assert!(text.starts_with(&format!("{variable}={value:?}")) && text.contains(part), "{text}");
        }
        for (variable, value) in
            [("FLANNELD_KUBE_API_URL", "ftp://a"), ("NODE_NAME", "Node 1"), ("NODE_NAME", "")]
        {
            let environment = [("NODE_NAME", "n1"), (variable, value)];
            let environment = &environment[usize::from(variable == "NODE_NAME")..];
            let text = parse(&["--kube-subnet-mgr"], environment).unwrap_err().to_string();
            assert!(text.starts_with(&format!("{variable}: ")) && text.contains(value), "{text}");
        }
    }

    #[test]
    fn the_version_is_printed_whatever_the_environment_says() {
        let wanted = Print::VersionFlag(version());
        for args in [&["--version"][..], &["-version=T", "--kube-subnet-mgr"]] {
            match parse(args, &[("FLANNELD_V", "much"), ("FLANNELD_VERSION", "false")]).unwrap() {
                Command::Print(print) => assert_eq!(print, wanted),
                other => panic!("{other:?}"),
            }
        }
        assert!(matches!(parse(&[], &[("FLANNELD_VERSION", "true")]), Ok(Command::Run(_))));
    }

    #[test]
    fn version_and_help_are_commands_too() {
        let text = version();
        assert!(text.starts_with(concat!("v", env!("CARGO_PKG_VERSION"), " (commit ")), "{text}");
        let Command::Print(print) = parse(&["version"], &[]).unwrap() else { panic!() };
        assert_eq!(print, Print::Version(text));
        let text = |args: &[&str]| match parse(args, &[]).unwrap() {
            Command::Print(Print::Help(text)) => text,
            other => panic!("{other:?}"),
        };
        assert_eq!(text(&["help"]), text(&["--help"]));
        assert_eq!(text(&["help", "cleanup"]), text(&["cleanup", "--help"]));
        assert!(text(&["help"]).contains("Examples:\n  flanneld --etcd-endpoints="));
        assert!(text(&["help", "cleanup"]).contains("--all"));
        assert!(parse(&["help", "me"], &[]).unwrap_err().to_string().contains("flanneld help cleanup"));
    }

    #[test]
    fn help_lists_every_flag_with_its_variable_and_every_default() {
        for args in [["-h"], ["--help"], ["-help"]] {
            let Command::Print(Print::Help(text)) = parse(&args, &[]).unwrap() else { panic!("{args:?}") };
            for argument in RunFlags::command().get_arguments() {
                let flag = argument.get_long().unwrap();
                assert!(text.contains(&format!("--{flag}")), "--{flag} is missing");
                let variable = grammar::variable(flag);
                assert_eq!(text.contains(&format!("[env: {variable}]")), flag != "version", "{variable}");
                for default in argument.get_default_values() {
                    assert!(text.contains(default.to_str().unwrap()), "default of --{flag}");
                }
            }
            assert!(text.contains("flanneld cleanup"));
        }
        let Command::Print(Print::Help(text)) = parse(&["cleanup", "-h"], &[]).unwrap() else { panic!() };
        assert!(text.contains("--dry-run") && text.contains("FLANNELD_SUBNET_FILE"), "{text}");
    }

    #[test]
    fn cleanup_has_its_own_flags() {
        let environment = [("FLANNELD_SUBNET_FILE", "/tmp/a")];
        for (args, dry_run, file) in [
            (&["cleanup"][..], false, "/tmp/a"),
            (&["cleanup", "--dry-run"], true, "/tmp/a"),
            (&["cleanup", "-dry-run=f", "-subnet-file", "/tmp/b"], false, "/tmp/b"),
        ] {
            let Command::Cleanup(options) = parse(args, &environment).unwrap() else { panic!("{args:?}") };
            assert_eq!((options.dry_run, options.subnet_file.to_str()), (dry_run, Some(file)));
            assert!(options.named && !options.all);
            assert_eq!(options.verbosity, crate::log::Verbosity::new(0));
        }
        let text = parse(&["cleanup", "--iface=eth0"], &[]).unwrap_err().to_string();
        assert!(text.contains("--iface is not a flag of flanneld cleanup"), "{text}");
        let text = parse(&["-v=1", "cleanup"], &[]).unwrap_err().to_string();
        assert!(text.contains("first"), "{text}");
    }

    #[test]
    fn the_last_value_counts_and_an_empty_one_unsets_what_has_no_default() {
        let read =
            options(&["--public-ip=x", "--public-ip=192.0.2.1", "--etcd-cafile=/a", "--etcd-cafile="], &[]);
        assert_eq!(read.selectors.public.to_string(), "192.0.2.1");
        let options::StoreOptions::Etcd(etcd) = read.store else { panic!() };
        assert_eq!(etcd.ca, None);
        let error = parse(&["--public-ip=192.0.2.1", "--public-ip=x"], &[]).unwrap_err().to_string();
        assert!(error.starts_with("--public-ip=\"x\" is not an IP address"), "{error}");
        assert!(parse(&["--subnet-file="], &[]).is_err());
    }

    #[test]
    fn arguments_stand_before_and_after_flags_and_behind_two_dashes() {
        for args in [
            &["policy", "list", "a/b", "--subnet-file=/f"][..],
            &["policy", "--subnet-file", "/f", "list", "--", "a/b"],
        ] {
            let Command::Policy(question) = parse(args, &[]).unwrap() else { panic!("{args:?}") };
            assert_eq!(question.query, policy::Query::List(Some("a/b".into())));
            assert_eq!(question.subnet_file.to_str(), Some("/f"));
        }
        let error = parse(&["polcy", "list"], &[]).unwrap_err().to_string();
        assert!(error.contains("did you mean flanneld policy?"), "{error}");
    }

    #[test]
    fn only_flags_of_the_agent_have_variables() {
        let environment = [("FLANNELD_PROTOCOL", "UDP"), ("FLANNELD_ALL", "true"), ("FLANNELD_V", "2")];
        assert!(parse(&["policy", "list"], &environment).is_ok());
        let Command::Cleanup(options) = parse(&["cleanup"], &environment).unwrap() else { panic!() };
        assert!(!options.all && options.verbosity == crate::log::Verbosity::new(2));
    }

    #[test]
    fn the_log_shows_every_flag_that_has_an_effect() {
        let shown = options(&["--ip-masq-fully-random-disable", "--vmodule=a=1"], &[]).to_string();
        assert!(shown.starts_with("--subnet-lease-renew-margin=60 --etcd-endpoints=http"), "{shown}");
        assert!(shown.contains(" --ip-masq-fully-random-disable=true"), "{shown}");
        for absent in
            ["vmodule", "version", "lease-store", "kube-", "network-policy", "public-ip", "password"]
        {
            assert!(!shown.contains(absent), "{absent} in {shown}");
        }
    }

    #[test]
    fn arguments_and_variables_that_are_not_utf8_are_refused() {
        use std::os::unix::ffi::OsStringExt;
        let broken = || OsString::from_vec(b"--iface=eth\xff".to_vec());
        let error = super::parse([broken()], |_| None).unwrap_err().to_string();
        assert!(error.contains("UTF-8"), "{error}");
        let error = super::parse([], |name| (name == "FLANNELD_IFACE").then(broken)).unwrap_err().to_string();
        assert!(error.contains("FLANNELD_IFACE") && error.contains("UTF-8"), "{error}");
    }
}
