//! Checks of single flags: text in, a typed value or a sentence out.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use backends::policy::SteerMode;
use regex::bytes::RegexBuilder;
use subnet::{Family, PublicAddrs};

use super::UsageError;
use super::flags::RunFlags;
use super::grammar::{Origin, Setting, variable, written};
use crate::interface::Selectors;
use crate::policy::{Mode, PolicyOptions};

/// What makes traffic rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TrafficManager {
    /// nftables, over netlink.
    Nft,
    /// The iptables programs.
    Iptables,
}

/// Knows where each flag was set, so that a refusal can name it as it was written.
pub(super) struct Source<'a>(&'a [Setting]);

impl<'a> Source<'a> {
    pub(super) fn new(settings: &'a [Setting]) -> Self {
        Self(settings)
    }

    /// Says that the value of a flag can't be used.
    pub(super) fn refuse(&self, flag: &str, value: &str, why: &str) -> UsageError {
        let origin = self.origin(flag).unwrap_or(Origin::Argument);
        UsageError(format!("{} {why}", written(flag, value, origin)))
    }

    /// The same where somebody else has checked the value and says so in words: of `--flag` or of a variable.
    pub(super) fn name(&self, option: &str, why: &str) -> UsageError {
        let from_environment = |flag: &&str| matches!(self.origin(flag), Some(Origin::Environment));
        let variable = option.strip_prefix("--").filter(from_environment).map(variable);
        UsageError(format!("{}: {why}", variable.as_deref().unwrap_or(option)))
    }

    fn origin(&self, flag: &str) -> Option<Origin> {
        self.0.iter().rfind(|setting| setting.flag == flag).map(|setting| setting.origin)
    }
}

/// Which interface, and which addresses to announce.
pub(super) fn selectors(flags: &RunFlags, source: &Source<'_>) -> Result<Selectors, UsageError> {
    let public =
        [("public-ip", &flags.public_ip, Family::V4), ("public-ipv6", &flags.public_ipv6, Family::V6)]
            .into_iter()
            .filter(|(_, text, _)| !text.is_empty())
            .map(|(flag, text, family)| {
                let wanted = format!("is not an {family} address that other nodes can send to");
                address(flag, text, source).and_then(|addr| {
                    match Family::of(addr) == family && is_unicast(addr) {
                        true => Ok(addr),
                        false => Err(source.refuse(flag, text, &wanted)),
                    }
                })
            })
            .collect::<Result<_, _>>()?;
    let regex = flags
        .iface_regex
        .iter()
        .map(|pattern| {
            // Bytes without Unicode: \d, \w and (?i) then mean what they mean in Go's syntax, ASCII.
            RegexBuilder::new(pattern).unicode(false).build().map_err(|error| {
                let why = error.to_string();
                let why = why.lines().last().unwrap_or_default().trim_start_matches("error: ");
                source.refuse("iface-regex", pattern, &format!("is not a regular expression: {why}"))
            })
        })
        .collect::<Result<_, _>>()?;
    let can_reach = match flags.iface_can_reach.as_str() {
        "" => None,
        text => Some(address("iface-can-reach", text, source)?),
    };
    Ok(Selectors { iface: flags.iface.clone(), regex, can_reach, public, prefer: PublicAddrs::default() })
}

/// Where to serve health, if anywhere.
pub(super) fn health(flags: &RunFlags, source: &Source<'_>) -> Result<Option<SocketAddr>, UsageError> {
    let ip = address("healthz-ip", &flags.healthz_ip, source)?;
    let port = flags.healthz_port;
    if port <= 0 {
        return Ok(None);
    }
    let port = u16::try_from(port).map_err(|_| {
        let why = "is not a TCP port: give 1 to 65535, or 0 for none";
        source.refuse("healthz-port", &port.to_string(), why)
    })?;
    Ok(Some(SocketAddr::new(ip, port)))
}

/// The two files of `--cni-conf`, if it is given.
pub(super) fn cni_conf(
    flags: &RunFlags,
    source: &Source<'_>,
) -> Result<Option<(PathBuf, PathBuf)>, UsageError> {
    let text = flags.cni_conf.as_str();
    if text.is_empty() {
        return Ok(None);
    }
    match text.split_once(':') {
        Some((from, to)) if !from.is_empty() && !to.is_empty() && !to.contains(':') => {
            Ok(Some((PathBuf::from(from), PathBuf::from(to))))
        }
        _ => {
            let why = "is not SOURCE:DESTINATION: give for example \
                       /etc/kube-flannel/cni-conf.json:/etc/cni/net.d/10-flannel.conflist";
            Err(source.refuse("cni-conf", text, why))
        }
    }
}

/// What makes the traffic rules.
pub(super) fn traffic_manager(flags: &RunFlags, source: &Source<'_>) -> Result<TrafficManager, UsageError> {
    match flags.traffic_manager.as_str() {
        "nft" => Ok(TrafficManager::Nft),
        "iptables" => Ok(TrafficManager::Iptables),
        other => Err(source.refuse("traffic-manager", other, "makes no traffic rules: give nft or iptables")),
    }
}

/// Whether and how network policies are enforced.
pub(super) fn network_policy(flags: &RunFlags, source: &Source<'_>) -> Result<PolicyOptions, UsageError> {
    let mode = match flags.network_policy.as_str() {
        "off" => Mode::Off,
        "on" => Mode::On,
        "strict" => Mode::Strict,
        other => return Err(source.refuse("network-policy", other, "is no mode: give off, on or strict")),
    };
    if mode != Mode::Off && !flags.kube_subnet_mgr {
        let why = "needs Kubernetes, where network policies are kept: give --kube-subnet-mgr as well, or off";
        return Err(source.refuse("network-policy", &flags.network_policy, why));
    }
    let steer = match flags.network_policy_steer.as_str() {
        "auto" => SteerMode::Auto,
        "always" => SteerMode::Always,
        "never" => SteerMode::Never,
        other => {
            return Err(source.refuse(
                "network-policy-steer",
                other,
                "is no mode: give auto, always or never",
            ));
        }
    };
    let text = flags.network_policy_mark_mask.as_str();
    let mask = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => u32::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    };
    let mark_shift = mask.and_then(|mask: u32| {
        let shift = mask.trailing_zeros().min(24);
        (mask == 0xff << shift).then_some(shift)
    });
    let mark_shift = mark_shift.ok_or_else(|| {
        let why = "is not eight bits in a row: give 0xff000000 for example, or 0x00ff0000";
        source.refuse("network-policy-mark-mask", text, why)
    })?;
    let group = flags.network_policy_log;
    let log_group = u16::try_from(group).map_err(|_| {
        source.refuse(
            "network-policy-log",
            &group.to_string(),
            "is no NFLOG group: give 1 to 65535, or 0 for none",
        )
    })?;
    Ok(PolicyOptions { mode, steer, mark_shift, log_group: (log_group > 0).then_some(log_group) })
}

/// Seconds between two checks of the traffic rules.
pub(super) fn resync(flags: &RunFlags, source: &Source<'_>) -> Result<(), UsageError> {
    if flags.iptables_resync >= 1 {
        return Ok(());
    }
    let why = "leaves no time between two checks: give at least 1 (second)";
    Err(source.refuse("iptables-resync", &flags.iptables_resync.to_string(), why))
}

/// Minutes before the end of a lease of 24 hours.
pub(super) fn renew_margin(flags: &RunFlags, source: &Source<'_>) -> Result<Duration, UsageError> {
    match flags.subnet_lease_renew_margin {
        minutes @ 1..=1439 => Ok(Duration::from_secs(60 * minutes.unsigned_abs())),
        minutes => Err(source.refuse(
            "subnet-lease-renew-margin",
            &minutes.to_string(),
            "does not fit into the 24 hours of a lease: give 1 to 1439 (minutes)",
        )),
    }
}

/// The directory of `--lease-store=file:DIR`, or none for `etcd`.
pub(super) fn lease_directory(text: &str, source: &Source<'_>) -> Result<Option<PathBuf>, UsageError> {
    match text.split_once(':') {
        None if text == "etcd" => Ok(None),
        Some(("file", directory)) if !directory.is_empty() => Ok(Some(PathBuf::from(directory))),
        _ => Err(source.refuse("lease-store", text, "is not a lease store: give etcd, or file:DIR")),
    }
}

/// The path of a file that will be written.
pub(super) fn file(flag: &str, text: String, source: &Source<'_>) -> Result<PathBuf, UsageError> {
    if text.is_empty() || text.ends_with('/') || text.contains('\0') {
        return Err(source.refuse(
            flag,
            &text,
            "is not the name of a file: give a path such as /run/flannel/subnet.env",
        ));
    }
    Ok(PathBuf::from(text))
}

/// The endpoints without user names, and whether there were any.
pub(super) fn endpoints(text: &str, source: &Source<'_>) -> Result<(Vec<String>, bool), UsageError> {
    let mut credentials = false;
    let mut endpoints = Vec::new();
    for item in text.split(',').map(str::trim).filter(|item| !item.is_empty()) {
        let (scheme, rest) = item.split_once("://").unwrap_or(("", item));
        // What stands before the last '@' may be a password and is not repeated.
        let authority = rest.rsplit_once('@').map_or(rest, |(_, authority)| authority);
        credentials |= authority.len() < rest.len();
        // As etcd's own clients: a path means nothing, and without a scheme a client certificate decides about TLS.
        let authority = authority.split_once('/').map_or(authority, |(authority, _)| authority);
        let scheme = scheme.to_ascii_lowercase();
        let known = matches!(scheme.as_str(), "http" | "https");
        let bare = !item.contains("://");
        if !(known || bare) || !is_host_and_port(authority) {
            let scheme = if known { format!("{scheme}://") } else { String::new() };
            let shown = match (item.contains('@'), text.contains('@')) {
                (true, _) => format!("{scheme}***@{authority}"),
                // A password with a comma in it is cut in two, and this may be its first half.
                (false, true) => format!("{scheme}***"),
                (false, false) => item.to_owned(),
            };
            return Err(source.refuse(
                "etcd-endpoints",
                &shown,
                "is not the URL of an etcd member: give http://HOST:PORT or https://HOST:PORT, separated by commas",
            ));
        }
        endpoints.push(if bare { authority.to_owned() } else { format!("{scheme}://{authority}") });
    }
    if endpoints.is_empty() {
        return Err(source.refuse("etcd-endpoints", text, "names no etcd member: give http://HOST:PORT"));
    }
    Ok((endpoints, credentials))
}

fn is_host_and_port(authority: &str) -> bool {
    let Some((host, port)) = authority.rsplit_once(':') else { return false };
    let numbered =
        port.bytes().all(|byte| byte.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|port| port != 0);
    let named = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(literal) => literal.parse::<std::net::Ipv6Addr>().is_ok(),
        None => {
            !host.is_empty()
                && host.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_'))
        }
    };
    numbered && named
}

fn address(flag: &str, text: &str, source: &Source<'_>) -> Result<IpAddr, UsageError> {
    text.parse()
        .map_err(|_| source.refuse(flag, text, "is not an IP address such as 192.0.2.1 or 2001:db8::1"))
}

fn is_unicast(addr: IpAddr) -> bool {
    let broadcast = matches!(addr, IpAddr::V4(v4) if v4.is_broadcast());
    !addr.is_unspecified() && !addr.is_multicast() && !broadcast
}

#[cfg(test)]
mod tests;
