//! `flanneld status`: its flags.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use clap::{ArgAction, Parser};

use super::grammar::Setting;
use super::{Command, SubcommandFlags, UsageError, check};
use crate::show::status::{StatusExtent, StatusOptions};

const EXAMPLES: &str = "\
Examples:
  flanneld status
      this node: store, peers, kernel, rules, addresses of pods, and what is wrong
  flanneld status --peers
      its peers, the worst first
  flanneld status --all
      every node of the cluster, and what each says of each; a node that does not answer within 2 s has a row
  kubectl exec -n kube-flannel ds/kube-flannel-ds -- /opt/bin/flanneld status

docs/status.md describes the JSON. Colours only on a terminal, and not if NO_COLOR is set.

Exit codes: 0 when this node's agent answers; 1 when it does not; 2 when a flag or a variable can't be used.";

/// Says how this node, its peers or all nodes stand.
#[derive(Parser)]
#[command(
    name = "flanneld status",
    bin_name = "flanneld status",
    override_usage = "flanneld status [--peers|--all] [--json] [FLAGS]",
    after_help = EXAMPLES
)]
pub(super) struct StatusFlags {
    /// Show this node's peers
    #[arg(long, action = ArgAction::Set, default_value_t = false)]
    peers: bool,
    /// Ask every node of the cluster, at its public address and the same port
    #[arg(long, action = ArgAction::Set, default_value_t = false)]
    all: bool,
    /// Print JSON
    #[arg(long, action = ArgAction::Set, default_value_t = false)]
    json: bool,
    /// Address at which the agent of this node serves health; an unspecified one means loopback
    #[arg(long, value_name = "IP", default_value = "127.0.0.1", value_parser = check::address)]
    healthz_ip: IpAddr,
    /// Port at which agents serve health
    #[arg(long, value_name = "PORT", default_value_t = 8081, value_parser = check::health_port)]
    healthz_port: i64,
}

/// Where the agent of this node answers.
pub(super) fn agent_at(ip: IpAddr, port: i64) -> Result<SocketAddr, UsageError> {
    let ip = match ip {
        IpAddr::V4(v4) if v4.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(v6) if v6.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        other => other,
    };
    match u16::try_from(port) {
        Ok(port) if port > 0 => Ok(SocketAddr::new(ip, port)),
        _ => Err(UsageError(
            "--healthz-port is 0, so agents serve nothing that can be asked: give their port".into(),
        )),
    }
}

impl SubcommandFlags for StatusFlags {
    const NAME: &str = "status";
    const SYNOPSIS: &str = "[--peers|--all] [--json]";
    const SUMMARY: &str = "how this node, its peers or all nodes stand";

    fn check(self, _: &[Setting]) -> Result<Command, UsageError> {
        let extent = match (self.peers, self.all) {
            (true, true) => return Err(UsageError("--peers and --all exclude each other: give one".into())),
            (true, false) => StatusExtent::Peers,
            (false, true) => StatusExtent::All,
            (false, false) => StatusExtent::Node,
        };
        let at = agent_at(self.healthz_ip, self.healthz_port)?;
        Ok(Command::Status(StatusOptions { extent, json: self.json, at }))
    }
}
