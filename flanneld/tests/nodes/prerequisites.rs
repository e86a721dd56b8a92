//! What the host has to do for pods' packets: switched on at start, named with its remedy later.

use std::time::Duration;

use crate::bed::{Cluster, LIMIT, Member, VXLAN, flanneld};

fn verbose(member: &Member) -> (u16, String) {
    member.agent.get("/readyz?verbose").unwrap()
}

fn forwarding(member: &Member) -> String {
    member.show("cat /proc/sys/net/ipv4/ip_forward").trim().to_owned()
}

#[test]
fn forwarding_is_switched_on_at_start_unless_the_operator_says_otherwise() {
    let cluster = Cluster::new(VXLAN);
    for (args, expected) in [(&[][..], "1"), (&["--ip-forward=false"][..], "0")] {
        let node = cluster.fabric.node().unwrap();
        node.namespace().sysctl("ipv4/ip_forward", "0").unwrap();
        let mut a = cluster.start(node, args);
        a.agent.wait_ready(LIMIT).unwrap();
        assert_eq!(forwarding(&a), expected);
        let said = a.agent.log().contains("net/ipv4/ip_forward was 0 and is 1 now");
        assert_eq!(said, expected == "1", "{}", a.agent.log());
        let (code, text) = verbose(&a);
        assert!(
            code == 200 && text.contains("sysctl -w net.ipv4.ip_forward=1") == (expected == "0"),
            "{text}"
        );
    }
}

#[test]
fn a_setting_that_somebody_changes_later_is_named_until_it_is_right_and_left_alone() {
    let cluster = Cluster::new(VXLAN);
    let a = cluster.join();
    for (key, wrong, right, expected) in [
        ("ipv4/ip_forward", "0", "1", "sysctl -w net.ipv4.ip_forward=1"),
        ("ipv4/conf/eth0/forwarding", "0", "1", "sysctl -w net.ipv4.conf.eth0.forwarding=1"),
    ] {
        a.node.namespace().sysctl(key, wrong).unwrap();
        // The kernel tells; without that it would be a minute.
        a.wait("the note", || verbose(&a).1.contains(expected));
        assert_eq!(verbose(&a).0, 200);
        assert_eq!(a.show(&format!("cat /proc/sys/net/{key}")).trim(), wrong, "not fought over");
        a.node.namespace().sysctl(key, right).unwrap();
        a.wait("its end", || !verbose(&a).1.contains("sysctl -w"));
    }
    a.wait_for_log("the host has what pods' packets need");
}

#[test]
fn an_interface_that_is_set_down_makes_the_node_unready_and_one_without_carrier_is_a_note() {
    let cluster = Cluster::new(VXLAN);
    let a = cluster.join_with(&["--iface=eth0"]);
    a.node.unplug().unwrap();
    a.wait("the note", || verbose(&a).1.contains("eth0 has no carrier"));
    assert_eq!(verbose(&a).0, 200);
    a.node.plug().unwrap();
    a.wait("its end", || !verbose(&a).1.contains("carrier"));

    a.node.link_down().unwrap();
    a.wait("the reason", || verbose(&a).1.contains("ip link set eth0 up"));
    assert_eq!(verbose(&a).0, 503);
    a.node.link_up().unwrap();
    a.wait("readiness", || verbose(&a).0 == 200);
}

/// The carrier comes back before, while and after the agent reads what the loss of it changed, which it does 20 ms later.
#[test]
fn a_carrier_that_comes_back_at_any_moment_is_noticed() {
    let cluster = Cluster::new(VXLAN);
    let a = cluster.join_with(&["--iface=eth0"]);
    for round in 0..80 {
        a.node.unplug().unwrap();
        std::thread::sleep(Duration::from_micros(18_000 + 100 * round));
        a.node.plug().unwrap();
        // As long as the agent needs to hear of the loss.
        std::thread::sleep(Duration::from_millis(60));
        a.wait("the end of the note", || !verbose(&a).1.contains("carrier"));
    }
}

#[test]
fn a_namespace_in_which_nothing_is_up_yet_ends_neither_the_agent_nor_cleanup() {
    let cluster = Cluster::new(VXLAN);
    let node = cluster.fabric.node().unwrap();
    let file = format!("--subnet-file={}", node.subnet_file().display());
    std::fs::write(node.subnet_file(), "FLANNEL_NETWORK=10.244.0.0/16\n").unwrap();
    let alone = |args: &[&str]| {
        node.namespace().command("unshare").args(["-n"]).args([flanneld()]).args(args).args([&file])
    };
    alone(&["cleanup"]).ok().unwrap();
    std::fs::write(node.dir().join("config.json"), VXLAN).unwrap();
    let store = format!("--lease-store=file:{}", node.dir().display());
    let mut agent = alone(&[&store]).spawn().unwrap();
    assert!(agent.wait(Duration::from_secs(3)).is_err(), "it goes on and waits for an interface");
}
