//! `flanneld trace`: its flags and arguments.

use std::time::Duration;

use backends::trace::{Flow, Transport};
use clap::{ArgAction, Parser};

use super::explain::{address, ends, same_family};
use super::grammar::Setting;
use super::{Command, SubcommandFlags, UsageError, check};
use crate::trace::TraceOptions;

const USAGE: &str = "flanneld trace SOURCE DESTINATION [FLAGS]";

const EXAMPLES: &str = "\
Follows real packets between two addresses, and their answers, through the tables of nftables (and of iptables-nft) on this
node: at most 10 packets. It sends none itself, so let the two talk meanwhile; on the other node, the same command shows
the rest of the way. Its table affects no packet and goes with the process, also if that is killed. Needs CAP_NET_ADMIN.
Rules of legacy iptables are not seen.

Examples:
  flanneld trace 10.244.1.7 10.244.7.3 --proto=tcp --port=80
  flanneld trace 10.244.1.7 10.244.7.3 --proto=icmp --live=10s --json

Exit codes: 0 when packets came and all went on; 1 when one was dropped, none came or they can't be traced; 2 when an
argument can't be used.";

/// Follows packets through this node, and names the rule that drops them.
#[derive(Parser)]
#[command(name = "flanneld trace", bin_name = "flanneld trace", override_usage = USAGE, after_help = EXAMPLES)]
pub(super) struct TraceFlags {
    #[arg(hide = true)]
    words: Vec<String>,
    /// Only packets of this protocol: tcp, udp or icmp
    #[arg(long, value_name = "PROTOCOL", value_parser = transport)]
    proto: Option<Transport>,
    /// Only packets to this port of the destination, and answers from it
    #[arg(long, value_name = "PORT", value_parser = port)]
    port: Option<u16>,
    /// How long to wait for packets: seconds, or with a unit as in 30s or 2m
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = live)]
    live: Duration,
    /// Print a JSON object a line
    #[arg(long, action = ArgAction::Set, default_value_t = false)]
    json: bool,
}

fn transport(text: &str) -> Result<Transport, &'static str> {
    match text.to_ascii_lowercase().as_str() {
        "tcp" => Ok(Transport::Tcp),
        "udp" => Ok(Transport::Udp),
        "icmp" | "icmpv6" => Ok(Transport::Icmp),
        _ => Err("is no protocol that can be traced: give tcp, udp or icmp"),
    }
}

fn port(text: &str) -> Result<u16, &'static str> {
    text.parse().ok().filter(|port| *port > 0).ok_or("is not a port: give 1 to 65535")
}

fn live(text: &str) -> Result<Duration, &'static str> {
    match check::interval(text) {
        Ok(time) if time >= Duration::from_secs(1) => Ok(time),
        _ => Err("is no time to wait: give seconds, or a number with a unit as in 30s or 2m"),
    }
}

impl SubcommandFlags for TraceFlags {
    const NAME: &str = "trace";
    const SYNOPSIS: &str = "SOURCE DESTINATION";
    const SUMMARY: &str = "follow packets through this node's rules";

    fn check(self, _settings: &[Setting]) -> Result<Command, UsageError> {
        let [source, destination] = ends(&self.words, "trace")?;
        let (source, destination) = (address("trace", source)?, address("trace", destination)?);
        same_family("trace", source, destination)?;
        let Self { proto: transport, port, live, json, .. } = self;
        if port.is_some() && !matches!(transport, Some(Transport::Tcp | Transport::Udp)) {
            return Err(UsageError("--port needs --proto=tcp or --proto=udp".into()));
        }
        Ok(Command::Trace(TraceOptions { flow: Flow { source, destination, transport, port }, live, json }))
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::*;

    fn read(args: &[&str]) -> Result<TraceOptions, String> {
        let args = std::iter::once("trace").chain(args.iter().copied()).map(OsString::from);
        match crate::cli::parse(args, |_| None).map_err(|error| error.to_string())? {
            Command::Trace(options) => Ok(options),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_flow_is_two_addresses_a_protocol_and_a_port() {
        let options = read(&["10.244.1.7", "10.244.7.3", "--proto", "tcp", "--port=80", "--live=5"]).unwrap();
        let Flow { transport, port, .. } = options.flow;
        assert_eq!((transport, port, options.live), (Some(Transport::Tcp), Some(80), Duration::from_secs(5)));
        assert_eq!(read(&["10.244.1.7", "10.244.7.3"]).unwrap().live, Duration::from_secs(30));
        for (args, part) in [
            (&["10.244.1.7"][..], "two ends"),
            (&["10.244.1.7", "10.244.7.3", "--port=80"], "needs --proto"),
            (&["10.244.1.7", "10.244.7.3", "--proto=icmp", "--port=80"], "needs --proto"),
            (&["10.244.1.7", "10.244.7.3", "--proto=gre"], "give tcp, udp or icmp"),
            (&["10.244.1.7", "10.244.7.3", "--proto=tcp", "--port=0"], "1 to 65535"),
            (&["10.244.1.7", "10.244.7.3", "--live=0"], "no time to wait"),
            (&["10.244.1.7", "fd00::1"], "two families"),
        ] {
            let error = read(args).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }
}
