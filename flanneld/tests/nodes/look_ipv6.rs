//! The commands that look, over IPv6: explain, trace and connectivity-test on clusters of both families.

use std::net::IpAddr;

use backends::testing::{Pod, Signal};
use serde_json::Value;
use subnet::Family;

use crate::bed::Member;
use crate::look::run;
use crate::site::{Kind, Site, config};

/// Two nodes of both families with a pod each.
fn pair(backend: &str, args: &[&str]) -> (Site, [Member; 2], [Pod; 2]) {
    let site = Site::new(Kind::Etcd, &config(&Family::BOTH, backend));
    let join = || site.ready(site.fabric.node().unwrap(), args);
    let members = [join(), join()];
    let pods = [members[0].pod_of_all_families(), members[1].pod_of_all_families()];
    for net in pods[1].addresses() {
        members[0].wait("the way", || pods[0].namespace().reaches(net.addr()).unwrap_or(false));
    }
    (site, members, pods)
}

fn v6(pod: &Pod) -> IpAddr {
    pod.addresses().iter().map(|net| net.addr()).find(IpAddr::is_ipv6).unwrap()
}

fn subnet_v6(member: &Member) -> ipnet::IpNet {
    member.subnets().into_iter().find(|net| net.addr().is_ipv6()).unwrap()
}

#[test]
fn explain_follows_a_packet_of_ipv6_through_tunnel_and_next_hop() {
    let (_site, [a, b], [pod_a, pod_b]) = pair(r#"{"Type":"vxlan"}"#, &[]);
    let (from, to) = (v6(&pod_a).to_string(), v6(&pod_b).to_string());
    let (code, text, stderr) = run(&a, &["explain", &from, &to]);
    assert_eq!(code, 0, "{text}{stderr}");
    let (subnet, network) = (subnet_v6(&b), subnet_v6(&b).network());
    for part in [
        format!("pod {from}"),
        format!("→ route {subnet} via {network} dev flannel-v6.1 (flannel's)"),
        format!("→ neighbour {network} = "),
        format!("dst {}", b.node.address_v6()),
        format!("→ eth0 to {}, UDP 8472, VNI 1, mtu 1430 inside", b.node.address_v6()),
        format!("→ source stays {from}: from pod to pod"),
    ] {
        assert!(text.contains(&part), "{part} in\n{text}");
    }
    let (code, text, _) = run(&b, &["explain", &from, &format!("[{to}]:80")]);
    assert!(code == 0 && text.contains("come in by flannel-v6.1"), "{text}");
    let (code, text, _) = run(&a, &["explain", &from, "fd00:244:0:fe::9"]);
    assert!(code == 1 && text.contains("no route of flannel leads there"), "{text}");

    let (_site, [a, b], [pod_a, pod_b]) = pair(r#"{"Type":"host-gw"}"#, &[]);
    let (code, text, _) = run(&a, &["explain", &v6(&pod_a).to_string(), &v6(&pod_b).to_string()]);
    let via = format!("→ route {} via {} dev eth0 (flannel's)", subnet_v6(&b), b.node.address_v6());
    assert!(code == 0 && text.contains(&via), "{text}");
}

#[test]
fn trace_names_the_rule_that_drops_a_packet_of_ipv6() {
    let (_site, [a, _b], [pod_a, pod_b]) = pair(r#"{"Type":"vxlan"}"#, &[]);
    let (from, to) = (v6(&pod_a).to_string(), v6(&pod_b).to_string());
    let trace = || {
        let mut ping = pod_a.namespace().command("ping").args(["-i", "0.2", &to]).spawn().unwrap();
        let outcome = run(&a, &["trace", &from, &to, "--proto=icmp", "--live=20s"]);
        ping.signal(Signal::KILL).unwrap();
        outcome
    };
    let (code, text, stderr) = trace();
    assert!(code == 0 && text.contains("✔ left by flannel-v6.1"), "{text}{stderr}");
    assert!(text.contains("echo request") && text.contains("echo reply"), "{text}");
    let rules = "table ip6 site { chain fw { type filter hook forward priority 5; meta l4proto ipv6-icmp icmpv6 type echo-request \
                 drop; }\n}\n";
    a.node.namespace().command("nft").args(["-f", "-"]).input(rules).ok().unwrap();
    let (code, text, _) = trace();
    assert!(
        code == 1 && text.contains("dropped here by table ip6 site, chain fw, rule 1 (handle "),
        "{text}"
    );
}

#[test]
fn the_connectivity_test_has_a_line_for_each_family_and_tells_which_is_cut() {
    let (site, [a, b], _pods) = pair(r#"{"Type":"vxlan"}"#, &["--healthz-ip=::", "--probe-interval=1s"]);
    let args = ["connectivity-test", "--count=5", "--json"];
    let (code, json, stderr) = run(&a, &args);
    let value: Value = serde_json::from_str(&json).unwrap_or_else(|error| panic!("{error}: {json}{stderr}"));
    assert!(code == 0 && value["peers"].as_array().unwrap().len() == 2, "{json}{stderr}");
    let rule = format!(
        "table bridge faults {{ chain f {{ type filter hook forward priority 0; ip6 daddr {} udp dport 8472 drop; }}\n}}\n",
        b.node.address_v6()
    );
    site.fabric.switch().command("nft").args(["-f", "-"]).input(rule).ok().unwrap();
    let (code, text, _) = run(&a, &["connectivity-test", "--count=5"]);
    assert!(code == 1 && text.contains("2 ways: 1 ok, 1 with trouble"), "{text}");
    let line = text.lines().find(|line| line.starts_with('✘')).unwrap();
    assert!(line.contains(&subnet_v6(&b).to_string()), "{text}");
}
