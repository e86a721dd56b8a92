//! The configuration changes while packets flow.

use std::time::Duration;

use backends::testing::{Pinger, Pod, wait_for};

use crate::bed::{Cluster, HOST_GW, Member, VXLAN};

const CONFIG: &str = "/coreos.com/network/config";
const UDP: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"udp"}}"#;
/// A backend that no peer uses any more is given up after 30 s.
const TIMEOUT: Duration = Duration::from_secs(90);

/// Everything that flanneld makes on a node, without numbers that differ from device to device or from second to
/// second, and the order in which tables were made.
pub(crate) fn everything(member: &Member) -> String {
    let mut lines = vec![member.rules()];
    for command in [
        "ip -4 route show",
        "ip -6 route show proto 70",
        "ip -o -d link show type vxlan",
        "ip -o -d link show type tun",
        "ip -o addr show",
        "ip neigh show nud permanent",
        "bridge fdb show",
    ] {
        let mut of_one: Vec<String> = member.show(command).lines().map(without_numbers).collect();
        of_one.sort();
        lines.append(&mut of_one);
    }
    lines.join("\n")
}

fn without_numbers(line: &str) -> String {
    let (number, rest) = line.split_once(": ").unwrap_or(("", line));
    if number.bytes().all(|byte| byte.is_ascii_digit()) {
        rest.trim().to_owned()
    } else {
        line.trim().to_owned()
    }
}

/// Echo requests from every pod to every other.
fn pings(pods: &[Pod]) -> Vec<Pinger> {
    crate::site::pings(&pods.iter().collect::<Vec<_>>())
}

fn lost(pings: Vec<Pinger>) -> u64 {
    crate::site::lost(pings).into_iter().sum()
}

#[test]
fn the_backend_changes_three_times_and_no_packet_is_lost() {
    let cluster = Cluster::new(VXLAN);
    let members = [cluster.join(), cluster.join(), cluster.join()];
    let pods: Vec<Pod> = members.iter().map(Member::pod).collect();
    let pings = pings(&pods);
    let fresh: Vec<String> = members.iter().map(everything).collect();
    for (config, announced, device) in [
        (HOST_GW, r#""BackendType":"host-gw""#, "dev eth0 proto 70"),
        (UDP, r#""PublicIPv6":null}"#, "10.244.0.0/16 dev flannel0"),
        (VXLAN, r#""BackendType":"vxlan""#, "dev flannel.1 proto 70 onlink"),
    ] {
        cluster.put(CONFIG, config);
        for member in &members {
            member.wait("every node's announcement", || {
                cluster.leases().iter().all(|(_, value)| value.contains(announced))
            });
            member.wait(device, || {
                let routes = member.show("ip route");
                let wanted = routes.matches(device).count();
                wanted == if device.contains("/16") { 1 } else { 2 }
            });
        }
    }
    for (member, fresh) in members.iter().zip(&fresh) {
        let end = std::time::Instant::now() + TIMEOUT;
        while everything(member) != *fresh {
            if std::time::Instant::now() >= end {
                assert_eq!(everything(member), *fresh, "{}", member.agent.log());
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }
    let logs = members.iter().map(|member| member.agent.log()).collect::<Vec<_>>().join("\n---\n");
    assert_eq!(lost(pings), 0, "{logs}");
}

#[test]
fn the_port_changes_and_no_packet_is_lost() {
    let cluster = Cluster::new(VXLAN);
    let members = [cluster.join(), cluster.join(), cluster.join()];
    let pods: Vec<Pod> = members.iter().map(Member::pod).collect();
    let pings = pings(&pods);
    let port = |member: &Member| {
        // For a moment there is none: the old one has made room, and the new one is not there yet.
        let link = member.try_show("ip -d link show flannel.1");
        let after = link.split_once("dstport ").and_then(|(_, after)| after.split(' ').next());
        after.unwrap_or_default().to_owned()
    };
    let mut said = false;
    for (config, wanted) in [(&*VXLAN.replace("vxlan\"", "vxlan\",\"Port\":4789"), "4789"), (VXLAN, "8472")] {
        cluster.put(CONFIG, config);
        for member in &members {
            member.wait("the new port", || port(member) == wanted);
        }
        said |= cluster.leases().iter().any(|(_, value)| value.contains("\"Port\":4789"));
        for member in &members {
            let end = std::time::Instant::now() + TIMEOUT;
            while member.show("ip -o link show type vxlan").lines().count() > 1 {
                assert!(std::time::Instant::now() < end, "{}", member.agent.log());
                std::thread::sleep(Duration::from_millis(200));
            }
        }
        values_become_plain(&cluster);
    }
    assert!(said, "who changes the port says so");
    let logs = members.iter().map(|member| member.agent.log()).collect::<Vec<_>>().join("\n---\n");
    assert_eq!(lost(pings), 0, "{logs}");
}

/// Afterwards leases are again as Go flannel writes them: those of nodes that had just started after a minute.
fn values_become_plain(cluster: &Cluster) {
    let plain = |value: &str| value.contains(r#""BackendData":{"VNI":1,"VtepMAC":"#);
    wait_for("leases without a port", TIMEOUT, || cluster.leases().iter().all(|(_, value)| plain(value)))
        .unwrap();
}

#[test]
fn the_network_moves_and_pods_of_the_old_one_lose_no_packet() {
    let cluster = Cluster::new(VXLAN);
    let members = [cluster.join_with(&["--ip-masq"]), cluster.join_with(&["--ip-masq"])];
    let pods: Vec<Pod> = members.iter().map(Member::pod).collect();
    let pings = pings(&pods);
    cluster.put(CONFIG, &VXLAN.replace("10.244", "10.99"));
    for member in &members {
        member.wait("a subnet of the new network", || member.subnet().to_string().starts_with("10.99."));
        member.wait("routes to both subnets of the other node", || {
            let routes = member.show("ip route show proto 70");
            routes.matches("10.99.").count() > 1 && routes.matches("10.244.").count() > 1
        });
    }
    for member in &members {
        member.wait("rules for both", || {
            let rules = member.show("nft list table ip flannel-ipv4");
            rules.contains("10.99.0.0/16") && rules.contains("10.244.0.0/16")
        });
        member.wait("the remedy", || member.verbose().contains("drain this node"));
    }
    assert_eq!(cluster.leases().len(), 4, "the old leases end by themselves");
    let logs = members.iter().map(|member| member.agent.log()).collect::<Vec<_>>().join("\n---\n");
    assert_eq!(lost(pings), 0, "{logs}");
    // A node without pods has nothing to wait for.
    let member = &members[0];
    drop(pods);
    member.wait("the end of the old network here", || {
        let notes = member.agent.get("/readyz?verbose").unwrap().1;
        !notes.contains("drain this node") && !member.show("ip addr show cni0").contains("10.244.")
    });
}
