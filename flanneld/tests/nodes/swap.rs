//! Taking over a living node from a Go flannel: nothing lost, nothing doubled, nothing left.
//!
//! A Go flannel can't be had here. What it leaves on a host is known to the letter (contract §5.1, §6, §7),
//! and is made here by hand with `ip`, `bridge`, `iptables` and `nft`.

use backends::testing::{Node, Pinger, Pod};

use crate::bed::{Cluster, LIMIT, Member, VXLAN};

const MAC: &str = "c6:d2:32:6f:8f:44";

/// What a Go flannel with `--ip-masq` in iptables mode has on a node with subnet 10.244.7.0/24, whose peer
/// has 10.244.9.0/24.
const IPTABLES: &str = "\
*nat
:FLANNEL-POSTRTG - [0:0]
-A POSTROUTING -m comment --comment \"flanneld masq\" -j FLANNEL-POSTRTG
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment \"flanneld masq\" -j RETURN
-A FLANNEL-POSTRTG -s 10.244.7.0/24 -d 10.244.0.0/16 -m comment --comment \"flanneld masq\" -j RETURN
-A FLANNEL-POSTRTG -s 10.244.0.0/16 -d 10.244.7.0/24 -m comment --comment \"flanneld masq\" -j RETURN
-A FLANNEL-POSTRTG ! -s 10.244.0.0/16 -d 10.244.7.0/24 -m comment --comment \"flanneld masq\" -j RETURN
-A FLANNEL-POSTRTG -s 10.244.0.0/16 ! -d 224.0.0.0/4 -m comment --comment \"flanneld masq\" -j MASQUERADE --random-fully
-A FLANNEL-POSTRTG ! -s 10.244.0.0/16 -d 10.244.0.0/16 -m comment --comment \"flanneld masq\" -j MASQUERADE --random-fully
COMMIT
*filter
:FLANNEL-FWD - [0:0]
-A FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD
-A FLANNEL-FWD -s 10.244.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT
-A FLANNEL-FWD -d 10.244.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT
COMMIT
";

/// Rules are those of this mode alone.
fn assert_rules(node: &Member, mode: &str) {
    let rules = node.show("nft -s list ruleset");
    let saved = node.show("iptables-save");
    if mode == "nft" {
        assert!(!rules.contains("FLANNEL-") && !rules.contains("chain stale"), "{rules}");
        assert_eq!(rules.matches("masquerade fully-random").count(), 2, "{rules}");
    } else {
        assert!(!rules.contains("flannel-ipv4"), "{rules}");
        for line in IPTABLES.lines().filter(|line| line.starts_with("-A")) {
            assert_eq!(saved.matches(&format!("{line}\n")).count(), 1, "{line} in\n{saved}");
        }
        assert!(!node.agent.log().contains("put right"), "rules that are right are left alone");
    }
}

/// Makes the kernel state of a Go flannel: device, routes, rules; and what only an earlier run of ours leaves.
fn as_go_leaves_it(go: &Node, peer: &Member, their_mac: &str) {
    let theirs = peer.subnet();
    // Of a node that is gone.
    let stale = if theirs.network().to_string() == "10.244.88.0" { "10.244.89.0" } else { "10.244.88.0" };
    let host = go.namespace();
    host.ip(&format!(
        "link add flannel.1 address {MAC} mtu 1450 type vxlan id 1 dev eth0 local {} dstport 8472 nolearning\n\
         addr add 10.244.7.0/32 dev flannel.1\nlink set flannel.1 up\n\
         neigh replace {} lladdr {their_mac} dev flannel.1 nud permanent\n\
         route replace {theirs} via {} dev flannel.1 onlink\n\
         route add {stale}/24 via {stale} dev flannel.1 onlink",
        go.address(),
        theirs.network(),
        theirs.network(),
    ))
    .unwrap();
    let fdb = format!("fdb replace {their_mac} dev flannel.1 dst {} self permanent", peer.node.address());
    host.command("bridge").args(fdb.split(' ')).ok().unwrap();
    host.command("iptables-restore").arg("--noflush").input(IPTABLES).ok().unwrap();
    // As Docker sets it: what Go's chain let through has to pass all the time.
    host.command("iptables").args(["-P", "FORWARD", "DROP"]).ok().unwrap();
    for words in ["add table ip flannel-ipv4", "add chain ip flannel-ipv4 stale"] {
        host.command("nft").arg(words).ok().unwrap();
    }
}

#[test]
fn a_go_flannels_node_is_taken_over_without_losing_a_packet() {
    for mode in ["nft", "iptables"] {
        let cluster = Cluster::new(VXLAN);
        let lease = |public: &str, mac: &str| {
            format!(
                r#"{{"PublicIP":"{public}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{mac}"}}}}"#
            )
        };
        let go = cluster.fabric.node().unwrap();
        cluster.put("/coreos.com/network/subnets/10.244.7.0-24", &lease(&go.address().to_string(), MAC));
        let peer = cluster.join();
        let theirs = peer.subnet();
        let their_mac = cluster.leases().into_iter().find(|(_, value)| !value.contains(MAC)).unwrap().1;
        let their_mac = their_mac.split("\"VtepMAC\":\"").nth(1).unwrap()[..17].to_owned();

        as_go_leaves_it(&go, &peer, &their_mac);
        let env = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.7.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";
        std::fs::write(go.subnet_file(), env).unwrap();
        let inode = |path| {
            use std::os::unix::fs::MetadataExt;
            std::fs::metadata(path).unwrap().ino()
        };
        let before = inode(go.subnet_file());

        let pod = Pod::wired(&go, "10.244.7.2/24".parse().unwrap()).unwrap();
        let other = peer.pod();
        peer.wait("the first echo between pods", || pod.namespace().reaches(other.address()).unwrap());
        let pinger = Pinger::start(pod.namespace(), other.address()).unwrap();
        pinger.wait_for_reply(LIMIT).unwrap();
        let manager = format!("--traffic-manager={mode}");
        let mut node = cluster.start(go, &["--ip-masq", &manager]);
        node.agent.wait_ready(LIMIT).unwrap();
        let pings = pinger.finish().unwrap();
        assert_eq!(pings.lost, 0, "{mode}: {pings:?}");

        assert_eq!(node.subnet().to_string(), "10.244.7.0/24");
        assert!(node.show("ip link show flannel.1").contains(MAC), "the device and its MAC stay");
        assert_eq!(cluster.leases().len(), 2);
        let routes = node.show("ip route show dev flannel.1");
        assert_eq!(routes.trim(), format!("{theirs} via {} proto 70 onlink", theirs.network()));
        assert_eq!(std::fs::read_to_string(node.node.subnet_file()).unwrap(), env);
        assert_eq!(inode(node.node.subnet_file()), before, "a file that is right is not written again");
        assert_rules(&node, mode);
    }
}
