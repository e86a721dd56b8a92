//! `flanneld connectivity-test`: its flags.

use clap::{ArgAction, Parser};

use super::agent_flags::AgentFlags;
use super::grammar::Setting;
use super::{Command, SubcommandFlags, UsageError};
use crate::connectivity::ConnectivityOptions;

const USAGE: &str = "flanneld connectivity-test [FLAGS]";

const EXAMPLES: &str = "\
Sends packets of several lengths to every peer that this node's flanneld knows, and opens a TCP connection to its agent's
health port. Needs no pods, and CAP_NET_RAW.

Examples:
  flanneld connectivity-test
      short packets, packets of the pods' MTU, and longer ones, which no device should accept
  flanneld connectivity-test --size=64,1450,8000 --count=100 --json

Exit codes: 0 when everything arrived; 1 when something did not, or nothing can be tested; 2 when a flag can't be used.";

/// Tests the way to every peer, with packets of several lengths and a TCP connection.
#[derive(Parser)]
#[command(
    name = "flanneld connectivity-test",
    bin_name = "flanneld connectivity-test",
    override_usage = USAGE,
    after_help = EXAMPLES
)]
pub(super) struct ConnectivityFlags {
    /// Lengths of packets in bytes, 64 to 65000, separated by commas; 64, the MTU and one more if not given
    #[arg(long, value_name = "BYTES", value_parser = sizes)]
    size: Option<Sizes>,
    /// Packets of each length, 1 to 10000
    #[arg(long, value_name = "NUMBER", default_value = "20", value_parser = count)]
    count: u32,
    #[command(flatten)]
    agent: AgentFlags,
    /// Print a JSON object
    #[arg(long, action = ArgAction::Set, default_value_t = false)]
    json: bool,
}

/// Lengths of packets.
#[derive(Clone, Debug)]
struct Sizes(Vec<u16>);

fn sizes(text: &str) -> Result<Sizes, &'static str> {
    let size = |text: &str| text.trim().parse::<u16>().ok().filter(|size| (64..=65_000).contains(size));
    let all = text.split(',').map(size).collect::<Option<Vec<u16>>>();
    let all = all.filter(|all| all.len() <= 8).map(Sizes);
    all.ok_or("is no list of lengths: give up to eight numbers from 64 to 65000, separated by commas")
}

fn count(text: &str) -> Result<u32, &'static str> {
    text.parse()
        .ok()
        .filter(|count| (1..=10_000).contains(count))
        .ok_or("is no number of packets: give 1 to 10000")
}

impl SubcommandFlags for ConnectivityFlags {
    const NAME: &str = "connectivity-test";
    const SYNOPSIS: &str = "[FLAGS]";
    const SUMMARY: &str = "test the way to every peer";

    fn check(self, _settings: &[Setting]) -> Result<Command, UsageError> {
        let Self { size, count, agent, json } = self;
        let sizes = size.map(|sizes| sizes.0).unwrap_or_default();
        Ok(Command::Connectivity(ConnectivityOptions { sizes, count, health: agent.at()?, json }))
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::*;

    fn read(args: &[&str]) -> Result<ConnectivityOptions, String> {
        let args = std::iter::once("connectivity-test").chain(args.iter().copied()).map(OsString::from);
        match crate::cli::parse(args, |_| None).map_err(|error| error.to_string())? {
            Command::Connectivity(options) => Ok(options),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn lengths_and_numbers_are_checked() {
        let options = read(&["--size=64,1450,8000", "--count=5", "--healthz-port=9000"]).unwrap();
        assert_eq!((options.sizes, options.count, options.health.port()), (vec![64, 1450, 8000], 5, 9000));
        let options = read(&[]).unwrap();
        assert_eq!((options.sizes, options.count, options.health.port()), (vec![], 20, 8081));
        for (args, part) in [
            (&["--size=63"][..], "64 to 65000"),
            (&["--size=64,,65"], "64 to 65000"),
            (&["--count=0"], "1 to 10000"),
            (&["--healthz-port=0"], "give their port"),
            (&["a7"], "is not a flag"),
        ] {
            let error = read(args).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }
}
