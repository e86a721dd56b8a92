//! Which values flags take, and what is said of those that they do not take.

use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

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

/// Certificate and key.
fn client(etcd: &EtcdOptions) -> Option<(&Path, &Path)> {
    etcd.cert.as_deref().zip(etcd.key.as_deref())
}

fn authority(etcd: &EtcdOptions) -> Option<&Path> {
    etcd.ca.as_deref()
}

/// Name and password.
fn user(etcd: &EtcdOptions) -> Option<(&str, &str)> {
    etcd.username.as_deref().zip(etcd.password.as_deref())
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
    assert!(client(&etcd).is_none() && authority(&etcd).is_none() && user(&etcd).is_none());
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
    assert!(options.selectors.regex[0].is_match("eth7") && options.selectors.regex.len() == 2);
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
    let etcd = etcd(&["--etcd-keyfile=/k", "--etcd-certfile=/c"]);
    assert_eq!(client(&etcd), Some((Path::new("/c"), Path::new("/k"))));
}

#[test]
fn leases_in_kubernetes_go_before_the_other_stores() {
    let args = ["--kube-subnet-mgr", "--kubeconfig-file=/k", "--net-config-path=/n", "--lease-store=file:/l"];
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
    use crate::policy::PolicyMode;
    use backends::policy::SteerMode;
    let policies = |args: &[&str]| parse(args).map(|options| options.network_policy);
    let off = policies(&[]).unwrap();
    assert_eq!(
        (off.mode, off.steer, off.mark_shift, off.log_group),
        (PolicyMode::Off, SteerMode::Auto, 24, None)
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
        (PolicyMode::Strict, SteerMode::Never, 4, Some(16))
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
        ("--public-ip=127.0.0.1", ["--public-ip=\"127.0.0.1\"", "send to"]),
        ("--public-ip=240.1.1.1", ["--public-ip=\"240.1.1.1\"", "send to"]),
        ("--public-ipv6=::1", ["--public-ipv6=\"::1\"", "send to"]),
        ("--public-ipv6=::ffff:192.0.2.1", ["--public-ipv6=\"::ffff:192.0.2.1\"", "send to"]),
        ("--public-ipv6=192.0.2.1", ["--public-ipv6=\"192.0.2.1\"", "IPv6"]),
        ("--public-ip=010.0.0.1", ["--public-ip=\"010.0.0.1\"", "IP address"]),
        ("--iface-can-reach=gateway", ["--iface-can-reach=\"gateway\"", "IP address"]),
        ("--iface-regex=eth(", ["--iface-regex=\"eth(\"", "without closing ')'"]),
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
    let read = etcd(&["--etcd-endpoints= http://a:1/ , https://[fd00::1]:2379,,https://etcd-0.x_y:65535"]);
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
        assert!(error.contains(&format!("--etcd-endpoints={bad:?}")) && !error.contains("good"), "{error}");
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
    assert_eq!(user(&etcd(&args)), Some(("root", "hunter2")));
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

#[test]
fn the_fast_path_is_as_configured_unless_the_flag_decides() {
    use crate::fast_path::FastPathMode;
    let mode = |args: &[&str]| parse(args).map(|options| options.fast_path);
    assert_eq!(mode(&[]), Ok(FastPathMode::Auto));
    assert_eq!(mode(&["--fast-path=on"]), Ok(FastPathMode::On));
    assert_eq!(mode(&["--fast-path", "off"]), Ok(FastPathMode::Off));
    let error = mode(&["--fast-path=true"]).unwrap_err();
    assert!(error.contains("--fast-path=\"true\"") && error.contains("auto, on or off"), "{error}");
}
