//! The grammar of Go's `flag` package (contract §1.1), turned into the one form that clap is given.

//!
//! clap's own reading of the environment (`Arg::env`) isn't used: it takes an empty variable for a value, and its
//! errors name the flag where the operator has written a variable.

use std::any::TypeId;
use std::error::Error;

use clap::error::{ContextKind, ContextValue};
use clap::{Arg, ArgAction, ArgMatches, Command};
use subnet::text::{distance, shortened};

use super::{Environment, SUBCOMMANDS, Subcommand, UsageError};

/// A flag with its value, and where it comes from.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Setting {
    /// The flag's name without dashes, or that of a positional argument.
    pub(super) flag: String,
    /// Its value: `true` or `false` of a boolean, a decimal number of a number.
    pub(super) value: String,
    /// Where it was set.
    pub(super) origin: Origin,
}

/// Where a flag was set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// On the command line.
    Argument,
    /// By its environment variable.
    Environment,
}

impl Setting {
    /// The form that clap is given.
    pub(super) fn argument(&self) -> String {
        format!("--{}={}", self.flag, self.value)
    }
}

/// What the arguments ask for.
pub(super) enum Parsed {
    /// The usage.
    Help,
    /// These settings, in the order given.
    Settings(Vec<Setting>),
}

/// Reads arguments by Go's rules: one dash or two, the value after `=` or in the next argument, booleans
/// only with `=`, an end of flags at `--`. A word that is no flag is an argument of a command that has some, before and
/// after flags; of another one it is refused, where Go ignores it and all that follows.
pub(super) fn normalise(command: &Command, args: &[String]) -> Result<Parsed, UsageError> {
    let mut settings: Vec<Setting> = Vec::new();
    let positional = command.get_positionals().next();
    let mut words = args.iter();
    while let Some(word) = words.next() {
        let body = match (word.strip_prefix('-'), positional) {
            (None, Some(argument)) => {
                settings.push(positional_setting(argument, word));
                continue;
            }
            (Some(""), Some(argument)) => {
                settings.push(positional_setting(argument, word));
                continue;
            }
            (None | Some(""), None) => return Err(stray(command, word, settings.last())),
            (Some("-"), Some(argument)) => {
                settings.extend(words.map(|word| positional_setting(argument, word)));
                break;
            }
            (Some("-"), None) => match words.next() {
                Some(word) => return Err(stray(command, word, None)),
                None => break,
            },
            (Some(body), _) => body.strip_prefix('-').unwrap_or(body),
        };
        let (flag, given) = match body.split_once('=') {
            Some((flag, value)) => (flag, Some(value)),
            None => (body, None),
        };
        if matches!(flag, "h" | "help") {
            return Ok(Parsed::Help);
        }
        let Some(argument) = command.get_arguments().find(|argument| argument.get_long() == Some(flag))
        else {
            return Err(unknown(command, flag));
        };
        let value = match (given, Kind::of(argument)) {
            (Some(value), _) => value,
            (None, Kind::Boolean) => "true",
            (None, Kind::Number | Kind::Text) => words.next().ok_or_else(|| {
                UsageError(format!("--{flag} needs a value: write --{flag}=<{}>", placeholder(argument)))
            })?,
        };
        settings.push(setting(argument, flag, value, Origin::Argument)?);
    }
    Ok(Parsed::Settings(settings))
}

fn positional_setting(argument: &Arg, word: &str) -> Setting {
    Setting { flag: argument.get_id().to_string(), value: word.to_owned(), origin: Origin::Argument }
}

/// The settings that the environment adds to those of the command line. `agent` is the command with the flags that have
/// a variable.
pub(super) fn from_environment(
    command: &Command,
    agent: &Command,
    given: &[Setting],
    environment: Environment<'_>,
) -> Result<Vec<Setting>, UsageError> {
    let mut found = Vec::new();
    for argument in command.get_arguments() {
        let (Some(flag), Some(name)) = (argument.get_long(), variable_of(argument, agent)) else { continue };
        if given.iter().any(|setting| setting.flag == flag) {
            continue;
        }
        let Some(value) = environment(&name).filter(|value| !value.is_empty()) else { continue };
        let value = value
            .into_string()
            .map_err(|_| UsageError(format!("{name} is not valid UTF-8: write it in UTF-8, or unset it")))?;
        found.push(setting(argument, flag, &value, Origin::Environment)?);
    }
    Ok(found)
}

/// The environment variable of a flag.
pub(super) fn variable(flag: &str) -> String {
    format!("FLANNELD_{}", flag.to_uppercase().replace('-', "_"))
}

/// The environment variable of an argument, if it has one: a flag of the agent, here or in a subcommand. What other
/// flags ask for is asked once, and `FLANNELD_PORT` is what Kubernetes sets for a Service `flanneld`.
pub(super) fn variable_of(argument: &Arg, agent: &Command) -> Option<String> {
    let is_agents = |flag: &&str| agent.get_arguments().any(|known| known.get_long() == Some(flag));
    argument.get_long().filter(|flag| *flag != "version").filter(is_agents).map(variable)
}

/// The variable that was probably meant by one that is no flag's, as `FLANNELD_ETCD_ENDPOINT`. Those that are like none
/// belong to others: Kubernetes sets some for a Service `flanneld`, and units have some of their own.
pub(super) fn meant(command: &Command, name: &str) -> Option<String> {
    let flag = name.strip_prefix("FLANNELD_")?.to_ascii_lowercase().replace('_', "-");
    let known = |argument: &Arg| {
        argument.get_long() == Some(&flag) || argument.get_long().map(variable).as_deref() == Some(name)
    };
    if command.get_arguments().any(known) {
        return None;
    }
    nearest(command, &flag).filter(|near| *near != "version").map(variable)
}

/// Whether an argument is a flag that is true or false.
pub(super) fn is_boolean(argument: &Arg) -> bool {
    matches!(Kind::of(argument), Kind::Boolean)
}

/// Gives clap the settings, which then reads each value by its `value_parser`. Of a flag that is not repeatable the
/// last value counts, and an empty one unsets a flag that has no default.
pub(super) fn matches(command: &Command, settings: &[Setting]) -> Result<ArgMatches, UsageError> {
    let (mut flags, mut words) = (vec![command.get_name().to_owned()], vec!["--".to_owned()]);
    for (at, setting) in settings.iter().enumerate() {
        let mut flagged = command.get_arguments().filter(|argument| argument.get_long().is_some());
        let Some(argument) = flagged.find(|argument| argument.get_long() == Some(&setting.flag)) else {
            words.push(setting.value.clone());
            continue;
        };
        let overridden = settings[at + 1..].iter().any(|later| later.flag == setting.flag);
        let unset = setting.value.is_empty() && argument.get_default_values().is_empty();
        if matches!(argument.get_action(), ArgAction::Append) || !(overridden || unset) {
            flags.push(setting.argument());
        }
    }
    flags.append(&mut words);
    command.clone().try_get_matches_from(flags).map_err(|error| refused(&error, settings))
}

/// What clap says of a setting, in our words: its own text may repeat a password.
pub(super) fn refused(error: &clap::Error, settings: &[Setting]) -> UsageError {
    let context = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        _ => None,
    };
    let flag = context(ContextKind::InvalidArg).and_then(|shown| shown.strip_prefix("--"));
    let flag = flag.and_then(|shown| shown.split([' ', '[', '=']).next());
    let (Some(flag), Some(value)) = (flag, context(ContextKind::InvalidValue)) else {
        return UsageError(format!("the flags can't be read: {}", error.kind()));
    };
    let why = match (error.source(), error.get(ContextKind::ValidValue)) {
        (Some(why), _) => why.to_string(),
        (None, Some(ContextValue::Strings(possible))) => {
            let possible: Vec<&str> =
                possible.iter().map(String::as_str).filter(|one| !one.is_empty()).collect();
            format!("can't be used: give {}", possible.join(" or "))
        }
        (None, _) => error.kind().to_string(),
    };
    let setting = settings.iter().rfind(|setting| setting.flag == flag && setting.value == value);
    let origin = setting.map_or(Origin::Argument, |setting| setting.origin);
    UsageError(format!("{} {why}", written(flag, value, origin)))
}

/// How a refusal names a setting: the way it was written.
pub(super) fn written(flag: &str, value: &str, origin: Origin) -> String {
    match origin {
        Origin::Argument => format!("--{flag}={:?}", shortened(value)),
        Origin::Environment => format!("{}={:?}", variable(flag), shortened(value)),
    }
}

enum Kind {
    Boolean,
    Number,
    Text,
}

impl Kind {
    fn of(argument: &Arg) -> Self {
        let kind = argument.get_value_parser().type_id();
        if kind == TypeId::of::<bool>() {
            Self::Boolean
        } else if kind == TypeId::of::<i64>() {
            Self::Number
        } else {
            Self::Text
        }
    }
}

fn setting(argument: &Arg, flag: &str, value: &str, origin: Origin) -> Result<Setting, UsageError> {
    let wrong = |wanted| UsageError(format!("{} {wanted}", written(flag, value, origin)));
    let value = match Kind::of(argument) {
        Kind::Boolean => boolean(value)
            .ok_or_else(|| wrong("is neither true nor false: give true or false (or 1, t, 0, f)"))?
            .to_string(),
        Kind::Number => number(value).ok_or_else(|| wrong("is not a whole number"))?.to_string(),
        Kind::Text => value.to_owned(),
    };
    Ok(Setting { flag: flag.to_owned(), value, origin })
}

/// Go's `strconv.ParseBool`.
fn boolean(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

/// Go's `strconv.ParseInt` with base 0: `0x`, `0o`, `0b`, a leading `0` for octal, `_` between digits.
fn number(text: &str) -> Option<i64> {
    let (negative, digits) = match text.as_bytes().first()? {
        b'-' => (true, &text[1..]),
        b'+' => (false, &text[1..]),
        _ => (false, text),
    };
    let prefix = digits.get(..2).unwrap_or_default().to_ascii_lowercase();
    let (radix, digits) = match prefix.as_str() {
        "0x" => (16, &digits[2..]),
        "0o" => (8, &digits[2..]),
        "0b" => (2, &digits[2..]),
        _ if digits.len() > 1 && digits.starts_with('0') => (8, &digits[1..]),
        _ => (10, digits),
    };
    // An underscore may follow a prefix or a digit, and a digit has to follow it.
    let prefixed = radix != 10;
    let misplaced = digits.ends_with('_') || digits.contains("__") || (!prefixed && digits.starts_with('_'));
    let digits = digits.replace('_', "");
    if misplaced || digits.is_empty() || digits.starts_with(['+', '-']) {
        return None;
    }
    let value = i128::from(u64::from_str_radix(&digits, radix).ok()?);
    i64::try_from(if negative { -value } else { value }).ok()
}

fn placeholder(argument: &Arg) -> String {
    argument.get_value_names().and_then(|names| names.first()).map_or("VALUE".into(), ToString::to_string)
}

fn unknown(command: &Command, flag: &str) -> UsageError {
    let name = command.get_name();
    let shown = shortened(flag);
    if flag.is_empty() || flag.starts_with('-') {
        return UsageError(format!("\"-{shown}\" is not a flag: write one dash or two before its name"));
    }
    let remedy = nearest(command, flag)
        .map_or(format!("{name} --help lists the flags"), |near| format!("did you mean --{near}?"));
    UsageError(format!("--{shown} is not a flag of {name}: {remedy}"))
}

/// A word where a flag should be. The word after a password is not repeated: it may be the rest of it.
fn stray(command: &Command, word: &str, before: Option<&Setting>) -> UsageError {
    let name = command.get_name();
    let shown = format!("{:?}", shortened(word));
    let is_boolean = |last: &Setting| {
        let argument = command.get_arguments().find(|argument| argument.get_long() == Some(&last.flag));
        argument.is_some_and(is_boolean)
    };
    let near = nearest_of(|| SUBCOMMANDS.iter().map(|subcommand| subcommand.name), word);
    let text = match before {
        _ if Subcommand::named(word).is_some() => {
            format!("{word} has to come first: flanneld {word} [FLAGS]")
        }
        None if near.is_some() => {
            format!(
                "{shown} is not a command of flanneld: did you mean flanneld {}?",
                near.unwrap_or_default()
            )
        }
        Some(last) if last.flag == "etcd-password" => {
            "the word after --etcd-password is not a flag: quote a password that contains spaces".to_owned()
        }
        Some(last) if is_boolean(last) => format!(
            "{shown} after --{flag} is not a flag: a boolean takes its value only with '=', as in --{flag}=true",
            flag = last.flag
        ),
        None if name == "flanneld" => format!(
            "{shown} is not a flag and not a command of flanneld: flanneld --help lists both; remove it, or quote the value that \
             it belongs to"
        ),
        _ => format!(
            "{shown} is not a flag, and {name} takes nothing else: remove it, or quote the value that it belongs to"
        ),
    };
    UsageError(text)
}

/// The flag that was probably meant: one that begins so, or one within a few slips of the finger.
fn nearest<'a>(command: &'a Command, given: &str) -> Option<&'a str> {
    nearest_of(|| command.get_arguments().filter_map(Arg::get_long), &given.replace('_', "-"))
}

fn nearest_of<'a, I: Iterator<Item = &'a str>>(names: impl Fn() -> I, given: &str) -> Option<&'a str> {
    let given = given.to_lowercase();
    let slips = if given.len() < 3 { 0 } else { given.len().div_ceil(3).min(3) };
    names()
        .map(|name| (distance(&given, name), name))
        .filter(|(distance, _)| *distance <= slips)
        .min()
        .map(|(_, name)| name)
        .or_else(|| names().find(|name| given.len() > 3 && name.starts_with(&given)))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;
    use proptest::prelude::*;

    use super::super::flags::RunFlags;
    use super::*;

    fn normal(args: &[&str]) -> Result<Vec<String>, String> {
        let args: Vec<String> = args.iter().map(ToString::to_string).collect();
        match normalise(&RunFlags::command(), &args) {
            Ok(Parsed::Settings(settings)) => Ok(settings.iter().map(Setting::argument).collect()),
            Ok(Parsed::Help) => Ok(vec!["help".into()]),
            Err(error) => Err(error.to_string()),
        }
    }

    #[test]
    fn both_dashes_and_both_places_of_a_value_mean_the_same() {
        for args in [
            &["-iface=eth0", "-v=2"][..],
            &["--iface", "eth0", "--v", "2"],
            &["-iface", "eth0", "--v=0x2"],
            &["--iface=eth0", "-v", "0b10", "--"],
        ] {
            assert_eq!(normal(args).unwrap(), ["--iface=eth0", "--v=2"], "{args:?}");
        }
        assert_eq!(normal(&["--etcd-prefix=/a=b"]).unwrap(), ["--etcd-prefix=/a=b"]);
        assert_eq!(
            normal(&["--iface", "--v"]).unwrap(),
            ["--iface=--v"],
            "the next argument, whatever it is"
        );
        assert_eq!(normal(&["--etcd-keyfile="]).unwrap(), ["--etcd-keyfile="]);
        assert_eq!(normal(&[]).unwrap(), [""; 0]);
    }

    #[test]
    fn booleans_have_gos_spellings_and_take_a_value_only_after_an_equals_sign() {
        for (text, value) in [
            ("--ip-masq", "true"),
            ("-ip-masq=T", "true"),
            ("--ip-masq=1", "true"),
            ("--ip-masq=TRUE", "true"),
            ("--ip-masq=f", "false"),
            ("--ip-masq=False", "false"),
        ] {
            assert_eq!(normal(&[text]).unwrap(), [format!("--ip-masq={value}")], "{text}");
        }
        for text in ["--ip-masq=yes", "--ip-masq=", "--ip-masq=tRUE", "--ip-masq=2"] {
            assert!(normal(&[text]).unwrap_err().contains("neither true nor false"), "{text}");
        }
        let error = normal(&["--ip-masq", "true", "--iface=eth0"]).unwrap_err();
        assert!(error.contains(r#""true" after --ip-masq"#) && error.contains("--ip-masq=true"), "{error}");
    }

    #[test]
    fn numbers_are_gos() {
        for (text, value) in [
            ("0", 0),
            ("-5", -5),
            ("+7", 7),
            ("0x1F", 31),
            ("0o17", 15),
            ("0B11", 3),
            ("017", 15),
            ("1_000", 1000),
            ("0x_f", 15),
            ("0_7", 7),
            ("9223372036854775807", i64::MAX),
            ("-9223372036854775808", i64::MIN),
        ] {
            assert_eq!(number(text), Some(value), "{text}");
        }
        for text in [
            "",
            "-",
            "+",
            "0x",
            "08",
            "1__0",
            "_1",
            "1_",
            "--1",
            "0x-1",
            "9223372036854775808",
            "1.0",
            " 1",
            "é",
        ] {
            assert_eq!(number(text), None, "{text}");
        }
    }

    #[test]
    fn help_is_help_before_the_first_mistake_only() {
        for args in [&["-h"][..], &["--help=x"], &["-v=1", "-help", "--nonsense"]] {
            assert_eq!(normal(args).unwrap(), ["help"], "{args:?}");
        }
        assert!(normal(&["--nonsense", "-h"]).is_err());
    }

    #[test]
    fn mistakes_are_named_with_a_remedy() {
        for (args, parts) in [
            (&["--ifcae=eth0"][..], ["--ifcae is not a flag", "did you mean --iface?"]),
            (&["--etcd_endpoints=x"], ["--etcd_endpoints", "did you mean --etcd-endpoints?"]),
            (&["--subnet-lease"], ["--subnet-lease is", "did you mean --subnet-lease-renew-margin?"]),
            (&["--networks=a"], ["--networks is not a flag of flanneld", "flanneld --help"]),
            (&["-v"], ["--v needs a value", "--v=<LEVEL>"]),
            (&["---v=1"], [r#""--v" is not a flag"#, "one dash or two"]),
            (&["-=1"], ["is not a flag", "one dash or two"]),
            (&["--healthz-port=high"], [r#"--healthz-port="high""#, "not a whole number"]),
            (&["eth0"], [r#""eth0" is not a flag and not a command"#, "flanneld --help lists both"]),
            (&["-"], [r#""-" is not a flag"#, "remove it"]),
            (&["-v=1", "--", "x"], [r#""x" is not a flag"#, "remove it"]),
            (&["-v=1", "1"], [r#""1" is not a flag"#, "remove it"]),
        ] {
            let error = normal(args).unwrap_err();
            assert!(parts.iter().all(|part| error.contains(part)), "{args:?}: {error}");
        }
    }

    #[test]
    fn no_mistake_repeats_a_password() {
        for args in [
            &["--etcd-passwrod=hunter2"][..],
            &["--etcd-password=my", "hunter2"],
            &["--etcd-password", "hunter2", "--wrong"],
        ] {
            let error = normal(args).unwrap_err();
            assert!(!error.contains("hunter2") && !error.contains("my"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_arguments_never_panic_and_clap_takes_what_is_accepted(
            args in proptest::collection::vec("(--?)?(iface|v|ip-masq|healthz-port|h|[a-zé-]{0,9})?(=)?[0-9a-fxé_=-]{0,4}", 0..5),
        ) {
            let command = RunFlags::command();
            if let Ok(Parsed::Settings(settings)) = normalise(&command, &args) {
                prop_assert!(super::super::read::<RunFlags>(&command, &settings).is_ok());
            }
        }

        #[test]
        fn every_number_is_read_back(number in any::<i64>()) {
            prop_assert_eq!(super::number(&number.to_string()), Some(number));
            let sign = if number < 0 { "-" } else { "" };
            prop_assert_eq!(super::number(&format!("{sign}{:#x}", number.unsigned_abs())), Some(number));
        }
    }
}
