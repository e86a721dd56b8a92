//! Pods and their addresses, and network policies.

use super::*;
use crate::doctor::seen::Pod;
use crate::status::Policy;

const PODS: &[Case] = &[
    (
        "no subnet file",
        |seen| seen.env = Env::Missing,
        ["/run/flannel/subnet.env", "does not exist", "flanneld status"],
    ),
    (
        "a subnet file that is damaged",
        |seen| seen.env = Env::Bad("FLANNEL_SUBNET=\"x\" is not an IPv4 prefix".into()),
        ["subnet.env", "is not an IPv4 prefix", "remove it"],
    ),
    (
        "another configuration that comes first",
        |seen| seen.confs.as_mut().unwrap().insert(0, conf("05-bridge.conf", &["bridge"])),
        ["05-bridge.conf", "takes the first file by name", "remove /etc/cni/net.d/05-bridge.conf"],
    ),
    (
        "no configuration of flannel",
        |seen| seen.confs = Some(vec![conf("05-bridge.conf", &["bridge"])]),
        ["/etc/cni/net.d", "no CNI configuration there names flannel", "--cni-conf"],
    ),
    (
        "a configuration that can't be read",
        |seen| {
            let file =
                ConfFile { path: "/etc/cni/net.d/99-x.conf".into(), conf: Err("it is not JSON".into()) };
            seen.confs.as_mut().unwrap().push(file);
        },
        ["99-x.conf", "not JSON", "remove it"],
    ),
    (
        "a plugin that is missing",
        |seen| seen.missing_plugins = Some(vec!["portmap".into()]),
        ["portmap", "not in /opt/cni/bin", "install the CNI plugins"],
    ),
    (
        "the plugin flannel is missing",
        |seen| seen.missing_plugins = Some(vec!["flannel".into()]),
        ["flannel", "not in /opt/cni/bin", "install-cni-plugin"],
    ),
    (
        "a bridge with the address of another subnet",
        |seen| seen.links.as_mut().unwrap()[2] = link("cni0", Some("10.244.9.1/24")),
        [
            "cni0",
            "it has the address 10.244.9.1/24, and this node's gateway is 10.244.1.1",
            "ip address del 10.244.9.1/24 dev cni0",
        ],
    ),
    (
        "a bridge with another address of this node's IPv6 subnet",
        |seen| {
            seen.env = Env::Written(["fd00:1::/64".parse::<ipnet::IpNet>().unwrap()].into_iter().collect());
            seen.links.as_mut().unwrap()[2] = link("cni0", Some("fd00:1::7/64"));
        },
        ["cni0", "this node's gateway is fd00:1::1", "ip address del fd00:1::7/64 dev cni0"],
    ),
    (
        "a pool of IPv6 that leaks",
        |seen| {
            seen.addresses.pools = vec![("fd00:1::/64".parse().unwrap(), u64::MAX, 2)];
            seen.addresses.leaked = Ok(vec![("fd00:1::7".parse().unwrap(), "/x".into(), None)]);
        },
        ["fd00:1::/64", "the pool leaks: 2 taken, fd00:1::7 is reserved for a pod", "--dry-run"],
    ),
    (
        "a bridge that is down",
        |seen| seen.links.as_mut().unwrap()[2].up = false,
        ["cni0", "set down", "ip link set cni0 up"],
    ),
    (
        "a pool that is really full",
        |seen| seen.addresses.pools[0].2 = 253,
        ["10.244.1.0/24", "all of them by living pods", "SubnetLen"],
    ),
    (
        "a pool that leaks",
        |seen| seen.addresses.leaked = Ok(vec![("10.244.1.7".parse().unwrap(), "/x".into(), None)]),
        ["10.244.1.0/24", "the pool leaks: 83 of 253 taken, 10.244.1.7 is reserved for a pod", "--dry-run"],
    ),
];

#[test]
fn a_pod_gets_no_address() {
    let leak = |last: u8| {
        let address = std::net::IpAddr::from([10, 244, 1, last]);
        (address, format!("/var/lib/cni/networks/cbr0/{address}").into(), Some(777_600))
    };
    let mut full = healthy();
    full.addresses.pools[0].2 = 253;
    full.addresses.leaked = Ok(vec![leak(7), leak(8)]);
    let found = troubles(&full);
    assert!(
        found[0].cause.contains(
            "the pool is full: 253 of 253 taken, 2 are reserved for pods that no longer exist (oldest 9d00h)"
        ),
        "{found:?}"
    );
    assert!(found[0].remedy.contains("--fix leaked-addresses"), "{found:?}");
    each_is_named(PODS);
    let mut second = healthy();
    second.env = Env::Written(
        ["10.244.1.0/24", "fd00:1::/64"]
            .map(|net| net.parse::<ipnet::IpNet>().unwrap())
            .into_iter()
            .collect(),
    );
    let bridge = &mut second.links.as_mut().unwrap()[2];
    bridge
        .addresses
        .extend(["fd00:1::1/64", "fd99::1/64", "fe80::1/64"].map(|net| net.parse::<ipnet::IpNet>().unwrap()));
    assert_eq!(troubles(&second), [], "the bridge plugin allows IPv6 addresses of other networks");
}

#[test]
fn one_pod_that_is_asked_about() {
    let addr = |last: u8| std::net::IpAddr::from([10, 244, 1, last]);
    let with = |reserved: &[u8], living: &[u8]| {
        let mut seen = healthy();
        let all = |all: &[u8]| all.iter().map(|last| addr(*last)).collect::<Vec<_>>();
        let (reserved, living) = (all(reserved), all(living));
        seen.pod = Some(Pod { asked: "10.244.1.7".into(), reserved, living: Ok(living) });
        seen
    };
    assert_eq!(troubles(&with(&[7], &[7])), []);
    for (reserved, living, part) in [
        (&[7][..], &[][..], "never attached, or is gone"),
        (&[], &[], "no address is reserved for it"),
        (&[], &[7], "another pod may get it"),
    ] {
        let found = troubles(&with(reserved, living));
        assert!(
            found.len() == 1 && found[0].cause.contains(part) && !found[0].remedy.is_empty(),
            "{found:?}"
        );
    }
}

const POLICY: &[Case] = &[
    (
        "policies that could not be read",
        |seen| {
            let status = status(seen);
            status.policy = Some(Policy::default());
            let why = "the API server refuses: apply the rights in kube-flannel-network-policy.yml";
            status.conditions.insert("network-policy".into(), Some(why.into()));
        },
        ["--network-policy", "refuses", "apply the rights"],
    ),
    (
        "members that are not understood",
        |seen| status(seen).policy = Some(Policy { ignored: 2, ..Policy::default() }),
        ["rules of policies", "2 of their members can't be understood", "policy explain"],
    ),
    (
        "no tables",
        |seen| status(seen).policy = Some(Policy { policies: 1, ..Policy::default() }),
        ["nftables", "no tables", "nf_tables"],
    ),
];

#[test]
fn a_network_policy_has_no_effect() {
    let enforced = |seen: &mut Observation| {
        let policy =
            Policy { generation: 3, policies: 2, isolated_addresses: 4, pods_local: 4, ..Policy::default() };
        status(seen).policy = Some(policy);
    };
    let said = |seen: &Observation| diagnose(seen).pop().unwrap().cause;
    assert!(said(&healthy()).contains("--network-policy=off"));
    let mut seen = healthy();
    enforced(&mut seen);
    assert!(said(&seen).contains("known: 2; isolated addresses of this node's pods: 4"), "{}", said(&seen));
    status(&mut seen).policy.as_mut().unwrap().isolated_addresses = 0;
    assert!(said(&seen).contains("none selects a pod of this node"));
    // A node without policies needs no tables.
    status(&mut seen).policy = Some(Policy { pods_local: 4, ..Policy::default() });
    assert!(said(&seen).contains("there is none in the cluster"));
    each_is_named(POLICY);
}
