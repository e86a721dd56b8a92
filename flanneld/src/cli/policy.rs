//! `flanneld policy`: the flags and arguments of questions to the agent of this node about network policies.

use std::path::PathBuf;

use clap::Parser;

use super::grammar::Setting;
use super::{Command, SubcommandFlags, UsageError, Words, check, help};

const USAGE: &str = "\
flanneld policy explain SOURCE DESTINATION:PORT [--protocol=TCP|UDP|SCTP]
           whether a connection is allowed, by which rule, or what stands in the way; each end is a pod
           (NAMESPACE/NAME) or an address; an address of IPv6 with a port is written [ADDRESS]:PORT
       flanneld policy list [NAMESPACE/NAME]
           the pods of this node, or one of them, with the policies that isolate them
       flanneld policy denied
           packets that are refused, one a line, as they come; needs --network-policy-log=GROUP";

const EXAMPLES: &str = "\
Examples:
  flanneld policy explain shop/web-7d9f-x2v9q shop/db-0:5432
  kubectl exec -n kube-flannel ds/kube-flannel-ds -- /opt/bin/flanneld policy explain 192.0.2.7 shop/web-0:80

Exit codes: 0 when there is an answer, whatever it is; 1 when there is none; 2 when an argument can't be used.";

/// Says what network policies do on this node, whose flanneld has to run with --network-policy.
#[derive(Parser)]
#[command(name = "flanneld policy", bin_name = "flanneld policy", override_usage = USAGE, after_help = EXAMPLES)]
pub(super) struct PolicyFlags {
    #[arg(hide = true)]
    words: Vec<String>,
    /// Protocol of the connection: TCP, UDP or SCTP
    #[arg(long, value_name = "PROTOCOL", default_value = "TCP", value_parser = check::given)]
    protocol: String,
    /// The file of the agent that is asked
    #[arg(long, value_name = "FILE", default_value = subnet::env_file::DEFAULT_PATH, value_parser = check::file)]
    subnet_file: PathBuf,
}

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Query {
    /// What becomes of a connection.
    Explain {
        /// Who asks: a pod or an address.
        source: String,
        /// Who is asked, with the port.
        destination: String,
        /// By which protocol.
        protocol: String,
    },
    /// Which policies isolate the pods of this node, or one of them.
    List(Option<String>),
    /// Which packets are refused.
    Denied,
}

/// A question, and the agent it is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PolicyQuestion {
    /// What is asked.
    pub(crate) query: Query,
    /// The file that names the agent's socket.
    pub(crate) subnet_file: PathBuf,
}

impl SubcommandFlags for PolicyFlags {
    const NAME: &'static str = "policy";
    const SYNOPSIS: &'static str = "explain|list|denied";
    const SUMMARY: &'static str = "what network policies do on this node";
    const WORDS: Words = Words::OneOf(&["explain", "list", "denied"]);

    fn check(self, settings: &[Setting]) -> Result<Command, UsageError> {
        let words: Vec<&str> = self.words.iter().map(String::as_str).collect();
        let has_protocol = settings.iter().any(|setting| setting.flag == "protocol");
        if has_protocol && words.first() != Some(&"explain") {
            return Err(UsageError("--protocol is for flanneld policy explain only".into()));
        }
        let query = match words[..] {
            [] | ["help"] => return Ok(help::<Self>()),
            ["explain", source, destination] => Query::Explain {
                source: source.to_owned(),
                destination: destination.to_owned(),
                protocol: self.protocol,
            },
            ["explain", ..] => {
                return Err(UsageError("policy explain takes two ends: SOURCE DESTINATION:PORT".into()));
            }
            ["list"] => Query::List(None),
            ["list", pod] => Query::List(Some(pod.to_owned())),
            ["list", ..] => {
                return Err(UsageError("policy list takes one pod at most: NAMESPACE/NAME".into()));
            }
            ["denied"] => Query::Denied,
            ["denied", ..] => return Err(UsageError("policy denied takes no arguments".into())),
            [other, ..] => {
                return Err(UsageError(format!("policy {other:?} is not known: explain, list or denied is")));
            }
        };
        Ok(Command::Policy(PolicyQuestion { query, subnet_file: self.subnet_file }))
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::*;
    use crate::cli::Print;

    fn parse(args: &[String], environment: impl Fn(&str) -> Option<OsString>) -> Result<Command, UsageError> {
        let args = args.iter().map(OsString::from);
        crate::cli::parse(std::iter::once("policy".into()).chain(args), environment)
    }

    fn read(args: &[&str]) -> Result<PolicyQuestion, String> {
        let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
        let environment = |name: &str| (name == "FLANNELD_SUBNET_FILE").then(|| "/run/a/subnet.env".into());
        match parse(&args, environment).map_err(|error| error.to_string())? {
            Command::Policy(question) => Ok(question),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn questions_are_read_with_their_flags_in_any_place() {
        let explain = |protocol: &str| Query::Explain {
            source: "shop/web".into(),
            destination: "shop/db-0:5432".into(),
            protocol: protocol.into(),
        };
        let asked = |args: &[&str]| read(args).unwrap();
        assert_eq!(asked(&["explain", "shop/web", "shop/db-0:5432"]).query, explain("TCP"));
        let other = asked(&["explain", "--protocol", "udp", "shop/web", "-subnet-file=/b", "shop/db-0:5432"]);
        assert_eq!(other, PolicyQuestion { query: explain("udp"), subnet_file: "/b".into() });
        assert_eq!(
            asked(&["list"]),
            PolicyQuestion { query: Query::List(None), subnet_file: "/run/a/subnet.env".into() }
        );
        assert_eq!(asked(&["list", "shop/web"]).query, Query::List(Some("shop/web".into())));
        assert_eq!(asked(&["denied"]).query, Query::Denied);
    }

    #[test]
    fn what_is_no_question_is_named() {
        for (args, part) in [
            (&["explain", "a"][..], "two ends"),
            (&["explain", "a", "b", "c"], "two ends"),
            (&["list", "a", "b"], "one pod at most"),
            (&["denied", "x"], "no arguments"),
            (&["allow"], "\"allow\" is not known"),
            (&["list", "--iface=eth0"], "--iface is not a flag of flanneld policy"),
            (&["explain", "a", "b", "--protocol"], "--protocol needs a value"),
            (&["list", "--protocol=UDP"], "for flanneld policy explain only"),
        ] {
            let error = read(args).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
        for args in [&[][..], &["help"], &["--help"], &["explain", "-h"]] {
            let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
            assert!(
                matches!(parse(&args, |_| None), Ok(Command::Print(Print::Help(text))) if text.contains("explain"))
            );
        }
    }
}
