//! The command line and the environment, read into options that are already checked.
//!
//! The grammar and the flags are Flannel's (contract §1.1 to §1.3), with one deliberate difference: what Go
//! flannel passes over in silence (a wrong flag, a wrong value, a stray word) is an error here.

mod check;
mod flags;
mod grammar;
pub(crate) mod options;
pub(crate) mod policy;

use std::ffi::OsString;
use std::io::{self, Write};

use clap::{CommandFactory, FromArgMatches};

use flags::{CleanupFlags, RunFlags};
use grammar::{Parsed, Setting};
use options::{CleanupOptions, Options, Place};
use policy::PolicyQuestion;

/// What the command line asks for.
#[derive(Debug)]
pub(crate) enum Command {
    /// Be the agent.
    Run(Box<Options>),
    /// Remove what an agent left on this host.
    Cleanup(CleanupOptions),
    /// Ask the agent of this node about network policies.
    Policy(PolicyQuestion),
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

/// The version, with the commit that the program was built from if the build was told (by the Makefile).
pub(crate) fn version() -> String {
    let commit = option_env!("FLANNEL_COMMIT").filter(|commit| !commit.is_empty()).unwrap_or("unknown");
    format!("v{} (commit {commit})", env!("CARGO_PKG_VERSION"))
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

/// Reads the arguments (without the program's name) and the environment.
///
/// # Errors
/// [`UsageError`] for the first thing that can't be used.
pub(crate) fn parse(
    args: impl IntoIterator<Item = OsString>,
    environment: impl Fn(&str) -> Option<OsString>,
) -> Result<Command, UsageError> {
    let args = args.into_iter().map(utf8).collect::<Result<Vec<_>, _>>()?;
    match args.split_first() {
        Some((first, rest)) if first == "cleanup" => cleanup(rest, environment),
        Some((first, rest)) if first == "policy" => policy::parse(rest, environment),
        Some((first, [])) if first == "version" => Ok(Command::Print(Print::Version(version()))),
        Some((first, rest)) if first == "help" => help_on(rest),
        _ => run(&args, environment),
    }
}

fn help_on(topic: &[String]) -> Result<Command, UsageError> {
    match topic {
        [] => Ok(help(flags::documented(RunFlags::command()))),
        [topic] if topic == "cleanup" => Ok(help(flags::documented(CleanupFlags::command()))),
        [topic] if topic == "policy" => Ok(policy::help()),
        _ => Err(UsageError(
            "help is about flanneld, cleanup or policy: write flanneld help, flanneld help cleanup or flanneld help policy"
                .into(),
        )),
    }
}

fn run(args: &[String], environment: impl Fn(&str) -> Option<OsString>) -> Result<Command, UsageError> {
    let command = flags::documented(RunFlags::command());
    let mut settings = match grammar::normalise(&command, args)? {
        Parsed::Help => return Ok(help(command)),
        Parsed::Settings(settings) => settings,
    };
    // Before the environment, as in Go: asking for the version works with any environment.
    if read::<RunFlags>(&command, &settings)?.version {
        return Ok(Command::Print(Print::VersionFlag(version())));
    }
    settings.extend(grammar::from_environment(&command, &settings, &environment)?);
    let flags = read(&command, &settings)?;
    let given = |name| environment(name).filter(|value| !value.is_empty()).map(utf8).transpose();
    let pod = given("POD_NAMESPACE")?.zip(given("POD_NAME")?);
    let place = Place { node: given("NODE_NAME")?, pod };
    Options::check(flags, &settings, place).map(Box::new).map(Command::Run)
}

fn cleanup(args: &[String], environment: impl Fn(&str) -> Option<OsString>) -> Result<Command, UsageError> {
    let command = flags::documented(CleanupFlags::command());
    let mut settings = match grammar::normalise(&command, args)? {
        Parsed::Help => return Ok(help(command)),
        Parsed::Settings(settings) => settings,
    };
    settings.extend(grammar::from_environment(&command, &settings, &environment)?);
    CleanupOptions::check(read(&command, &settings)?, &settings).map(Command::Cleanup)
}

fn help(mut command: clap::Command) -> Command {
    Command::Print(Print::Help(command.render_help().to_string()))
}

fn read<T: FromArgMatches>(command: &clap::Command, settings: &[Setting]) -> Result<T, UsageError> {
    let words = std::iter::once(command.get_name().to_owned()).chain(settings.iter().map(Setting::argument));
    // The settings are normalised, so clap finds nothing to complain about; its text may repeat a value.
    command
        .clone()
        .try_get_matches_from(words)
        .and_then(|matches| T::from_arg_matches(&matches))
        .map_err(|error| UsageError(format!("the flags can't be read: {}", error.kind())))
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
    fn arguments_and_variables_that_are_not_utf8_are_refused() {
        use std::os::unix::ffi::OsStringExt;
        let broken = || OsString::from_vec(b"--iface=eth\xff".to_vec());
        let error = super::parse([broken()], |_| None).unwrap_err().to_string();
        assert!(error.contains("UTF-8"), "{error}");
        let error = super::parse([], |name| (name == "FLANNELD_IFACE").then(broken)).unwrap_err().to_string();
        assert!(error.contains("FLANNELD_IFACE") && error.contains("UTF-8"), "{error}");
    }
}
