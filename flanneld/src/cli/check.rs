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
mod tests {
    use std::ffi::OsString;

    use proptest::prelude::*;

    use super::*;
    use crate::cli::Command;
    use crate::cli::options::{EtcdOptions, Options, StoreOptions};
    use crate::log::Verbosity;

    fn parse(args: &[&str]) -> Result<Options, String> {
        let environment = |name: &str| (name == "NODE_NAME").then(|| "n1".into());
        match crate::cli::parse(args.iter().map(OsString::from), environment) {
            Ok(Command::Run(options)) => Ok(*options),
            Ok(other) => panic!("{other:?}"),
            Err(error) => Err(error.to_string()),
        }
    }

    fn etcd(args: &[&str]) -> EtcdOptions {
        match parse(args).unwrap().store {
            StoreOptions::Etcd(etcd) => etcd,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn defaults_are_flannels() {
        let options = parse(&[]).unwrap();
        assert_eq!(options.subnet_file.to_str(), Some("/run/flannel/subnet.env"));
        assert_eq!(options.renew_margin, Duration::from_secs(3600));
        assert_eq!(options.health, None);
        assert_eq!(options.warnings, [""; 0]);
        let etcd = etcd(&[]);
        assert_eq!(etcd.endpoints, ["http://127.0.0.1:4001", "http://127.0.0.1:2379"]);
        assert_eq!(etcd.prefix, "/coreos.com/network");
        assert!(etcd.client.is_none() && etcd.ca_file.is_none() && etcd.user.is_none());
    }

    #[test]
    fn values_are_typed_and_the_last_of_a_repeated_one_counts() {
        let options = parse(&[
            "--lease-store=file:/var/lib/leases",
            "--healthz-ip=::1",
            "--healthz-port=1",
            "--healthz-port=0x1f90",
            "--iface=eth0",
            "--iface=",
            "--iface-regex=(?i)^ETH\\d",
            "--iface-regex=10\\.0",
            "--iface-can-reach=192.0.2.1",
            "--public-ip=198.51.100.1",
            "--public-ipv6=2001:db8::1",
            "--subnet-lease-renew-margin=1439",
            "--iptables-resync=9223372036854775807",
            "-v=-3",
        ])
        .unwrap();
        assert!(
            matches!(&options.store, StoreOptions::File(directory) if directory.to_str() == Some("/var/lib/leases"))
        );
        assert_eq!(options.health, Some("[::1]:8080".parse().unwrap()));
        assert_eq!(options.selectors.iface, ["eth0", ""]);
        assert!(options.selectors.regex[0].is_match(b"eth7") && options.selectors.regex.len() == 2);
        assert_eq!(options.selectors.can_reach, Some("192.0.2.1".parse().unwrap()));
        assert_eq!(options.selectors.public.to_string(), "198.51.100.1 and 2001:db8::1");
        assert_eq!(options.renew_margin, Duration::from_secs(1439 * 60));
        assert_eq!(options.verbosity, Verbosity::new(0));
        assert!(!options.traffic.masquerade && options.traffic.fully_random && options.traffic.forward);
        assert_eq!(options.traffic_manager, TrafficManager::Nft);
        let options = parse(&[
            "--ip-masq",
            "--ip-masq-fully-random-disable",
            "--iptables-forward-rules=false",
            "--traffic-manager=iptables",
        ])
        .unwrap();
        assert!(options.traffic.masquerade && !options.traffic.fully_random && !options.traffic.forward);
        assert_eq!(options.traffic_manager, TrafficManager::Iptables);
        let client = etcd(&["--etcd-keyfile=/k", "--etcd-certfile=/c"]).client.unwrap();
        assert_eq!((client.key_file.to_str(), client.cert_file.to_str()), (Some("/k"), Some("/c")));
    }

    #[test]
    fn leases_in_kubernetes_go_before_the_other_stores() {
        let args =
            ["--kube-subnet-mgr", "--kubeconfig-file=/k", "--net-config-path=/n", "--lease-store=file:/l"];
        let StoreOptions::Kube(kube) = parse(&args).unwrap().store else { panic!() };
        assert_eq!(kube.kubeconfig.unwrap().to_str(), Some("/k"));
        assert_eq!((kube.api_url, kube.net_config_path.to_str()), (None, Some("/n")));
        assert_eq!(kube.annotation_prefix, "flannel.alpha.coreos.com");
        assert!(kube.set_network_unavailable);
        let error = parse(&["--kube-subnet-mgr", "--kube-annotation-prefix=org"]).unwrap_err();
        assert!(error.starts_with("--kube-annotation-prefix: \"org\" can't"), "{error}");
        let error = parse(&["--kube-subnet-mgr", "--kube-api-url=https://root:hunter2@a"]).unwrap_err();
        assert!(error.starts_with("--kube-api-url: \"a\" is not") && !error.contains("hunter2"), "{error}");
    }

    #[test]
    fn network_policies_need_kubernetes_and_a_mask_of_eight_bits() {
        use crate::policy::Mode;
        use backends::policy::SteerMode;
        let policies = |args: &[&str]| parse(args).map(|options| options.network_policy);
        let off = policies(&[]).unwrap();
        assert_eq!(
            (off.mode, off.steer, off.mark_shift, off.log_group),
            (Mode::Off, SteerMode::Auto, 24, None)
        );
        let strict = policies(&[
            "--kube-subnet-mgr",
            "--network-policy=strict",
            "--network-policy-steer=never",
            "--network-policy-mark-mask=0xFF0",
            "--network-policy-log=0x10",
        ])
        .unwrap();
        assert_eq!(
            (strict.mode, strict.steer, strict.mark_shift, strict.log_group),
            (Mode::Strict, SteerMode::Never, 4, Some(16))
        );
        assert_eq!(policies(&["--network-policy-mark-mask=255"]).unwrap().mark_shift, 0);
        let shown = parse(&["--kube-subnet-mgr", "--network-policy=on"]).unwrap().to_string();
        assert!(shown.contains("--network-policy=on"), "{shown}");
        for (args, parts) in [
            (&["--network-policy=on"][..], ["--network-policy=\"on\"", "--kube-subnet-mgr"]),
            (&["--network-policy=yes"], ["\"yes\"", "off, on or strict"]),
            (&["--network-policy-steer=yes"], ["--network-policy-steer=\"yes\"", "auto, always or never"]),
            (&["--network-policy-mark-mask=0"], ["\"0\"", "0xff000000"]),
            (&["--network-policy-mark-mask=0x1ff"], ["\"0x1ff\"", "eight bits in a row"]),
            (&["--network-policy-mark-mask=0xff0000000"], ["\"0xff0000000\"", "eight bits in a row"]),
            (&["--network-policy-mark-mask=mark"], ["\"mark\"", "eight bits in a row"]),
            (&["--network-policy-log=65536"], ["\"65536\"", "1 to 65535"]),
            (&["--network-policy-log=-1"], ["\"-1\"", "1 to 65535"]),
        ] {
            let error = parse(args).unwrap_err();
            assert!(parts.iter().all(|part| error.contains(part)), "{args:?}: {error}");
        }
    }

    #[test]
    fn flags_that_ask_for_nothing_that_is_missing_are_accepted() {
        let options = parse(&[
            "--kube-subnet-mgr=false",
            "--kube-annotation-prefix=flannel.alpha.coreos.com",
            "--kube-api-url=",
            "--net-config-path=/etc/net-conf.json",
            "--set-node-network-unavailable=false",
            "--ip-blackhole-route",
            "--vmodule=a=1",
            "--log_backtrace_at=main.go:1",
        ])
        .unwrap();
        assert_eq!(options.warnings.len(), 1);
        assert!(
            options.warnings[0].contains("--vmodule and --log_backtrace_at have no effect"),
            "{:?}",
            options.warnings
        );
    }

    #[test]
    fn wrong_values_are_named_with_a_remedy() {
        for (argument, parts) in [
            ("--cni-conf=/etc/a.json", ["--cni-conf=\"/etc/a.json\"", "SOURCE:DESTINATION"]),
            ("--traffic-manager=ipvs", ["--traffic-manager=\"ipvs\"", "nft or iptables"]),
            ("--iptables-resync=0", ["--iptables-resync=\"0\"", "at least 1"]),
            ("--iptables-resync=-1", ["--iptables-resync=\"-1\"", "at least 1"]),
            ("--subnet-lease-renew-margin=0", ["margin=\"0\"", "1 to 1439"]),
            ("--subnet-lease-renew-margin=1440", ["margin=\"1440\"", "1 to 1439"]),
            ("--healthz-port=65536", ["--healthz-port=\"65536\"", "1 to 65535"]),
            ("--healthz-ip=localhost", ["--healthz-ip=\"localhost\"", "192.0.2.1"]),
            ("--public-ip=2001:db8::1", ["--public-ip=\"2001:db8::1\"", "IPv4"]),
            ("--public-ip=0.0.0.0", ["--public-ip=\"0.0.0.0\"", "send to"]),
            ("--public-ipv6=192.0.2.1", ["--public-ipv6=\"192.0.2.1\"", "IPv6"]),
            ("--public-ip=010.0.0.1", ["--public-ip=\"010.0.0.1\"", "IP address"]),
            ("--iface-can-reach=gateway", ["--iface-can-reach=\"gateway\"", "IP address"]),
            ("--iface-regex=eth(", ["--iface-regex=\"eth(\"", "unclosed group"]),
            ("--lease-store=consul", ["--lease-store=\"consul\"", "file:DIR"]),
            ("--lease-store=file:", ["--lease-store=\"file:\"", "file:DIR"]),
            ("--subnet-file=", ["--subnet-file=\"\"", "/run/flannel/subnet.env"]),
        ] {
            let error = parse(&[argument]).unwrap_err();
            assert!(parts.iter().all(|part| error.contains(part)), "{argument}: {error}");
        }
    }

    #[test]
    fn endpoints_are_trimmed_and_the_bad_one_is_named() {
        let read =
            etcd(&["--etcd-endpoints= http://a:1/ , https://[fd00::1]:2379,,https://etcd-0.x_y:65535"]);
        assert_eq!(read.endpoints, ["http://a:1", "https://[fd00::1]:2379", "https://etcd-0.x_y:65535"]);
        let read = etcd(&["--etcd-endpoints=127.0.0.1:2379,[::1]:2379,HTTPS://a:1//,http://a:1/x,etcd:1/"]);
        assert_eq!(read.endpoints, ["127.0.0.1:2379", "[::1]:2379", "https://a:1", "http://a:1", "etcd:1"]);
        for bad in [
            "127.0.0.1",
            "unix:///run/etcd.sock",
            "http://a",
            "http://a:0",
            "http://a:+1",
            "http://:1",
            "ftp://a:1",
            "http://[::1:1",
            "http://a b:1",
        ] {
            let error = parse(&[&format!("--etcd-endpoints=http://good:1,{bad}")]).unwrap_err();
            assert!(
                error.contains(&format!("--etcd-endpoints={bad:?}")) && !error.contains("good"),
                "{error}"
            );
        }
        assert!(parse(&["--etcd-endpoints= ,"]).unwrap_err().contains("names no etcd member"));
    }

    #[test]
    fn secrets_appear_in_no_text() {
        let args = [
            "--etcd-username=root",
            "--etcd-password=hunter2",
            "--etcd-endpoints=http://u:hunter3@a:1",
            "--iface=eth0",
        ];
        let options = parse(&args).unwrap();
        for text in [options.to_string(), format!("{options:?}"), options.warnings.join("\n")] {
            assert!(!text.contains("hunter"), "{text}");
        }
        assert!(options.to_string().contains("--etcd-password=*** --iface=eth0"), "{options}");
        assert!(options.warnings[0].contains("--etcd-username"), "{:?}", options.warnings);
        let (name, password) = etcd(&args).user.unwrap();
        assert_eq!((name.as_str(), password.expose()), ("root", "hunter2"));
        for bad in ["http://u:hunter3@a", "u:hunter3@a:x", "http://u:hunt@er3@:1", "u:hunter3://x@a:1"] {
            let error = parse(&[&format!("--etcd-endpoints={bad}")]).unwrap_err();
            assert!(!error.contains("er3") && error.contains("***@"), "{error}");
        }
        let error = parse(&["--etcd-endpoints=http://u:hunt,er3@a:1"]).unwrap_err();
        assert!(!error.contains("hunt") && !error.contains("er3"), "{error}");
    }

    proptest! {
        #[test]
        fn arbitrary_values_never_panic(
            flag in "(etcd-endpoints|iface-regex|public-ip|healthz-port|lease-store|iptables-resync|subnet-file)",
            value in "(https?://)?[0-9a-z@:./,()\\[\\]é-]{0,20}",
        ) {
            let _ = parse(&[&format!("--{flag}={value}")]);
        }
    }
}
