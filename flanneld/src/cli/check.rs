//! The values of single flags: text in, a typed value or the reason against it out. `flags.rs` and its neighbours
//! name these functions; the reason is completed by the flag or variable and its value.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use backends::policy::SteerMode;
use regex_lite::Regex;
use subnet::Family;
use subnet::net::is_of_a_node;

use super::UsageError;
use super::grammar::{Origin, Setting, variable, written};
use crate::fast_path;
use crate::policy::PolicyMode;

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

    /// Says that the value of a flag, as given, can't be used.
    pub(super) fn refuse(&self, flag: &str, why: &str) -> UsageError {
        let setting = self.0.iter().rfind(|setting| setting.flag == flag);
        self.refuse_value(flag, setting.map_or("", |setting| &setting.value), why)
    }

    /// The same of this part of its value.
    pub(super) fn refuse_value(&self, flag: &str, value: &str, why: &str) -> UsageError {
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

type Checked<T> = Result<T, &'static str>;

/// Any text but an empty one.
pub(super) fn given(text: &str) -> Checked<String> {
    if text.is_empty() { Err("needs a value") } else { Ok(text.to_owned()) }
}

/// An address.
pub(super) fn address(text: &str) -> Checked<IpAddr> {
    text.parse().map_err(|_| "is not an IP address such as 192.0.2.1 or 2001:db8::1")
}

/// The address of IPv4 that is announced.
pub(super) fn public_ipv4(text: &str) -> Result<IpAddr, String> {
    public(text, Family::V4)
}

/// The address of IPv6 that is announced.
pub(super) fn public_ipv6(text: &str) -> Result<IpAddr, String> {
    public(text, Family::V6)
}

fn public(text: &str, family: Family) -> Result<IpAddr, String> {
    let addr = address(text)?;
    // Go flannel takes link-local addresses, too.
    let link_local = matches!(addr, IpAddr::V6(v6) if v6.is_unicast_link_local());
    if Family::of(addr) == family && (is_of_a_node(addr) || link_local) {
        return Ok(addr);
    }
    Err(format!("is not an {family} address that other nodes can send to"))
}

/// A pattern for interfaces.
pub(super) fn regex(pattern: &str) -> Result<Regex, String> {
    Regex::new(pattern).map_err(|error| format!("is not a regular expression: {error}"))
}

/// A whole number; the grammar has turned Go's forms into a decimal one.
fn number(text: &str) -> Checked<i64> {
    text.parse().map_err(|_| "is not a whole number")
}

/// The port of health; 0 and less stand for none.
pub(super) fn health_port(text: &str) -> Checked<i64> {
    let port = number(text)?;
    if port <= u16::MAX.into() { Ok(port) } else { Err("is not a TCP port: give 1 to 65535, or 0 for none") }
}

/// A number of peers.
pub(super) fn metrics_peers(text: &str) -> Checked<i64> {
    let peers = number(text)?;
    let fits = (0..=100_000).contains(&peers);
    if fits { Ok(peers) } else { Err("is no number of peers: give 0 to 100000, 0 for no series of peers") }
}

/// Seconds between two checks of the traffic rules.
pub(super) fn resync(text: &str) -> Checked<i64> {
    let seconds = number(text)?;
    if seconds >= 1 {
        Ok(seconds)
    } else {
        Err("leaves no time between two checks: give at least 1 (second)")
    }
}

/// Minutes before the end of a lease of 24 hours.
pub(super) fn renew_margin(text: &str) -> Checked<i64> {
    let minutes = number(text)?;
    let fits = (1..=1439).contains(&minutes);
    if fits {
        Ok(minutes)
    } else {
        Err("does not fit into the 24 hours of a lease: give 1 to 1439 (minutes)")
    }
}

/// The NFLOG group for refused packets; 0 stands for none.
pub(super) fn log_group(text: &str) -> Checked<i64> {
    let group = number(text)?;
    let fits = u16::try_from(group).is_ok();
    if fits { Ok(group) } else { Err("is no NFLOG group: give 1 to 65535, or 0 for none") }
}

/// A time: whole seconds, or a whole number with a unit; zero for none.
pub(super) fn interval(text: &str) -> Checked<Duration> {
    const BOUNDS: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(3600));
    let units = [("ms", 1), ("s", 1000), ("m", 60_000), ("", 1000)];
    let number = |(unit, millis): (&str, u64)| {
        let number = text.strip_suffix(unit)?;
        let digits = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
        digits.then(|| number.parse::<u64>().ok()?.checked_mul(millis)).flatten()
    };
    let time = units.into_iter().find_map(number).map(Duration::from_millis);
    match time
        .ok_or("is no time: give seconds, or a number with a unit as in 500ms, 10s or 1m; 0 for none")?
    {
        time if time.is_zero() || (BOUNDS.0..=BOUNDS.1).contains(&time) => Ok(time),
        _ => Err("is out of bounds: give 100ms to 60m, or 0 for none"),
    }
}

/// The two files of `--cni-conf`.
pub(super) fn cni_conf(text: &str) -> Checked<(PathBuf, PathBuf)> {
    match text.split_once(':') {
        Some((from, to)) if !from.is_empty() && !to.is_empty() && !to.contains(':') => {
            Ok((PathBuf::from(from), PathBuf::from(to)))
        }
        _ => Err("is not SOURCE:DESTINATION: give for example \
                  /etc/kube-flannel/cni-conf.json:/etc/cni/net.d/10-flannel.conflist"),
    }
}

/// What makes the traffic rules.
pub(super) fn traffic_manager(text: &str) -> Checked<TrafficManager> {
    match text {
        "nft" => Ok(TrafficManager::Nft),
        "iptables" => Ok(TrafficManager::Iptables),
        _ => Err("makes no traffic rules: give nft or iptables"),
    }
}

/// Whether network policies are enforced.
pub(super) fn policy_mode(text: &str) -> Checked<PolicyMode> {
    match text {
        "off" => Ok(PolicyMode::Off),
        "on" => Ok(PolicyMode::On),
        "strict" => Ok(PolicyMode::Strict),
        _ => Err("is no mode: give off, on or strict"),
    }
}

/// Whether established flows of pods skip bridge, rules and routing.
pub(super) fn fast_path(text: &str) -> Checked<fast_path::FastPathMode> {
    match text {
        "auto" => Ok(fast_path::FastPathMode::Auto),
        "on" => Ok(fast_path::FastPathMode::On),
        "off" => Ok(fast_path::FastPathMode::Off),
        _ => Err("is no mode: give auto, on or off"),
    }
}

/// A protocol of network policies, in any letter case.
pub(super) fn protocol(text: &str) -> Checked<String> {
    let known = ["TCP", "UDP", "SCTP"].iter().any(|known| known.eq_ignore_ascii_case(text));
    if known { Ok(text.to_owned()) } else { Err("is none of network policies: give TCP, UDP or SCTP") }
}

/// Whether frames between pods of this node are steered.
pub(super) fn steer_mode(text: &str) -> Checked<SteerMode> {
    match text {
        "auto" => Ok(SteerMode::Auto),
        "always" => Ok(SteerMode::Always),
        "never" => Ok(SteerMode::Never),
        _ => Err("is no mode: give auto, always or never"),
    }
}

/// How far the eight bits of a mask for connection marks are shifted.
pub(super) fn mark_shift(text: &str) -> Checked<u32> {
    let mask = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => u32::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    };
    mask.and_then(|mask: u32| {
        let shift = mask.trailing_zeros().min(24);
        (mask == 0xff << shift).then_some(shift)
    })
    .ok_or("is not eight bits in a row: give 0xff000000 for example, or 0x00ff0000")
}

/// The path of a file that will be written.
pub(super) fn file(text: &str) -> Checked<PathBuf> {
    if text.is_empty() || text.ends_with('/') || text.contains('\0') {
        return Err("is not the name of a file: give a path such as /run/flannel/subnet.env");
    }
    Ok(PathBuf::from(text))
}

/// The directory of `--lease-store=file:DIR`, or none for `etcd`.
pub(super) fn lease_directory(text: &str, source: &Source<'_>) -> Result<Option<PathBuf>, UsageError> {
    match text.split_once(':') {
        None if text == "etcd" => Ok(None),
        Some(("file", directory)) if !directory.is_empty() => Ok(Some(PathBuf::from(directory))),
        _ => Err(source.refuse_value("lease-store", text, "is not a lease store: give etcd, or file:DIR")),
    }
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
            return Err(source.refuse_value(
                "etcd-endpoints",
                &shown,
                "is not the URL of an etcd member: give http://HOST:PORT or https://HOST:PORT, separated by commas",
            ));
        }
        endpoints.push(if bare { authority.to_owned() } else { format!("{scheme}://{authority}") });
    }
    if endpoints.is_empty() {
        return Err(source.refuse_value(
            "etcd-endpoints",
            text,
            "names no etcd member: give http://HOST:PORT",
        ));
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

#[cfg(test)]
mod tests;
