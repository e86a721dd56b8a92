//! The flags of commands that ask the agent of this node.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use clap::Args;

use super::{UsageError, check};

/// Where the agent of this node is asked.
#[derive(Args)]
pub(super) struct AgentFlags {
    /// Address at which the agent of this node serves health; an unspecified one means loopback
    #[arg(long, value_name = "IP", default_value = "127.0.0.1", value_parser = check::address)]
    healthz_ip: IpAddr,
    /// Port at which agents serve health
    #[arg(long, value_name = "PORT", default_value_t = 8081, value_parser = check::health_port)]
    healthz_port: i64,
}

impl AgentFlags {
    /// Where it answers.
    pub(super) fn at(&self) -> Result<SocketAddr, UsageError> {
        let ip = match self.healthz_ip {
            IpAddr::V4(v4) if v4.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(v6) if v6.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
            other => other,
        };
        match u16::try_from(self.healthz_port) {
            Ok(port) if port > 0 => Ok(SocketAddr::new(ip, port)),
            _ => Err(UsageError(
                "--healthz-port is 0, so agents serve nothing that can be asked: give their port".into(),
            )),
        }
    }
}
