//! `flanneld explain`: its flags and arguments.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::{ArgAction, Parser};

use super::agent_flags::AgentFlags;
use super::grammar::Setting;
use super::{Command, SubcommandFlags, UsageError, check};
use crate::explain::ExplainOptions;

const USAGE: &str = "flanneld explain SOURCE DESTINATION[:PORT] [FLAGS]";

const EXAMPLES: &str = "\
Both ends are addresses; one of IPv6 with a port is written [ADDRESS]:PORT. With a port, network policies are judged as
well, if this node's flanneld enforces them. Nothing is sent and nothing is changed. Which node a tunnel without entries
in the kernel leads to (udp, wireguard) says this node's agent.

Examples:
  flanneld explain 10.244.1.7 10.244.7.3
      by which route, neighbour, forwarding entry and device a pod's packet leaves this node
  flanneld explain 10.244.1.7 10.244.7.3:80 --json

Exit codes: 0 when the packet goes on its way; 1 when it does not, or the kernel can't be asked; 2 when an argument can't
be used.";

/// Says which way a packet takes through this node, by what its kernel has.
#[derive(Parser)]
#[command(name = "flanneld explain", bin_name = "flanneld explain", override_usage = USAGE, after_help = EXAMPLES)]
pub(super) struct ExplainFlags {
    #[arg(hide = true)]
    words: Vec<String>,
    /// Protocol for network policies: TCP, UDP or SCTP
    #[arg(long, value_name = "PROTOCOL", default_value = "TCP", value_parser = check::protocol)]
    protocol: String,
    /// The file of the agent of this node
    #[arg(long, value_name = "FILE", default_value = subnet::env_file::DEFAULT_PATH, value_parser = check::file)]
    subnet_file: PathBuf,
    /// Print a JSON object
    #[arg(long, action = ArgAction::Set, default_value_t = false)]
    json: bool,
    #[command(flatten)]
    agent: AgentFlags,
}

impl SubcommandFlags for ExplainFlags {
    const NAME: &str = "explain";
    const SYNOPSIS: &str = "SOURCE DESTINATION";
    const SUMMARY: &str = "which way a packet takes through this node";

    fn check(self, _settings: &[Setting]) -> Result<Command, UsageError> {
        let [source, destination] = ends(&self.words, "explain")?;
        let source = address("explain", source)?;
        let (destination, port) = address_and_port("explain", destination)?;
        same_family("explain", source, destination)?;
        let port = port.map(|port| (port, self.protocol));
        let Self { subnet_file, json, agent, .. } = self;
        let at = agent.at()?;
        Ok(Command::Explain(ExplainOptions { source, destination, port, subnet_file, at, json }))
    }
}

/// The two ends among the words of a command.
pub(super) fn ends<'a>(words: &'a [String], command: &str) -> Result<[&'a str; 2], UsageError> {
    match words {
        [source, destination] => Ok([source, destination]),
        _ => Err(UsageError(format!("{command} takes two ends: SOURCE DESTINATION, both of them addresses"))),
    }
}

/// An address among the words of a command.
pub(super) fn address(command: &str, text: &str) -> Result<IpAddr, UsageError> {
    text.parse().map_err(|_| {
        UsageError(format!(
            "{command}: {:?} is not an IP address such as 10.244.1.7 (kubectl get pod -o wide shows a pod's)",
            subnet::gojson::shortened(text)
        ))
    })
}

/// An address, perhaps with a port: `ADDRESS`, `IPV4:PORT` or `[IPV6]:PORT`.
fn address_and_port(command: &str, text: &str) -> Result<(IpAddr, Option<u16>), UsageError> {
    match text.parse::<std::net::SocketAddr>() {
        Ok(both) if both.port() > 0 => Ok((both.ip(), Some(both.port()))),
        _ => match text.rsplit_once(':') {
            Some((addr, port))
                if addr.trim_matches(['[', ']']).parse::<IpAddr>().is_ok()
                    && text.parse::<IpAddr>().is_err() =>
            {
                Err(UsageError(format!(
                    "{command}: {:?} is no port: give 1 to 65535",
                    subnet::gojson::shortened(port)
                )))
            }
            _ => Ok((address(command, text)?, None)),
        },
    }
}

/// A packet has two addresses of one family.
pub(super) fn same_family(command: &str, one: IpAddr, other: IpAddr) -> Result<(), UsageError> {
    if one.is_ipv4() == other.is_ipv4() {
        return Ok(());
    }
    Err(UsageError(format!(
        "{command}: {one} and {other} are of two families: give two addresses of the same"
    )))
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::*;

    fn read(args: &[&str]) -> Result<ExplainOptions, String> {
        let args = std::iter::once("explain").chain(args.iter().copied()).map(OsString::from);
        match crate::cli::parse(args, |_| None).map_err(|error| error.to_string())? {
            Command::Explain(options) => Ok(options),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn ends_are_addresses_with_or_without_a_port() {
        let options = read(&["10.244.1.7", "10.244.7.3"]).unwrap();
        assert_eq!((options.destination.to_string().as_str(), options.port), ("10.244.7.3", None));
        let options = read(&["10.244.1.7", "10.244.7.3:80", "--protocol=udp", "--json"]).unwrap();
        assert_eq!((options.port, options.json), (Some((80, "udp".to_owned())), true));
        let options = read(&["fd00::1", "[fd00::2]:53"]).unwrap();
        assert_eq!((options.destination.to_string().as_str(), options.port.unwrap().0), ("fd00::2", 53));
        for (args, part) in [
            (&["10.244.1.7"][..], "two ends"),
            (&["10.244.1.7", "web"], "\"web\" is not an IP address"),
            (&["10.244.1.7", "fd00::2"], "two families"),
            (&["10.244.1.7", "10.244.7.3:0"], "\"0\" is no port: give 1 to 65535"),
            (&["10.244.1.7", "10.244.7.3:65536"], "\"65536\" is no port"),
            (&["fd00::1", "[fd00::2]:http"], "\"http\" is no port"),
            (
                &["10.244.1.7", "10.244.7.3:80", "--protocol=icmp"],
                "--protocol=\"icmp\" is none of network policies",
            ),
            (&["a", "b", "c"], "two ends"),
        ] {
            let error = read(args).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }
}
