//! Addresses and routes of the host that come into the pods' network while the agent runs: named with the remedy
//! at once, until they are gone, at no cost for anybody else.

use backends::testing::Pod;
use ipnet::IpNet;
use subnet::Family;

use crate::bed::Member;
use crate::site::{Kind, Site, answered, config, logs, lost, pings};

/// The notes that `/readyz?verbose` has about what is in the way.
fn notes(member: &Member) -> Vec<String> {
    let named = ["lies in this node's own pod subnet", "lies in the subnet", "another program's route"];
    let lines = member.verbose();
    lines.lines().filter(|line| named.iter().any(|part| line.contains(part))).map(str::to_owned).collect()
}

/// A host address of a subnet, far from those of pods.
fn far(subnet: IpNet, number: u128) -> IpNet {
    let bits = subnet::net::bits_of(subnet.network()) + number;
    IpNet::from(subnet::net::addr_of(Family::of(subnet.addr()), bits))
}

/// The second half of a subnet.
fn half(subnet: IpNet) -> IpNet {
    subnet.subnets(subnet.prefix_len() + 1).unwrap().nth(1).unwrap()
}

/// Waits for exactly one note with all of these parts, in readiness and in the log.
fn noted(member: &Member, parts: &[&str]) {
    member.wait(&format!("a note with {parts:?}"), || {
        let notes = notes(member);
        notes.len() == 1 && parts.iter().all(|part| notes[0].contains(part))
    });
    assert!(member.is_ready(), "others are reached as before");
    member.wait(&format!("a line with {parts:?}"), || {
        member.agent.log().lines().any(|line| parts.iter().all(|part| line.contains(part)))
    });
}

fn route_to(member: &Member, subnet: IpNet) -> String {
    let family = if subnet.addr().is_ipv4() { "-4" } else { "-6" };
    member.show(&format!("ip {family} route show {subnet} proto 70"))
}

fn named_and_harmless(backend: &str) {
    let site = Site::new(Kind::Etcd, &config(&Family::BOTH, backend));
    let (a, b, c) = (site.join(), site.join(), site.join());
    let pods: Vec<Pod> = [&a, &c].into_iter().map(Member::pod_of_all_families).collect();
    let others = pings(&pods.iter().collect::<Vec<_>>());
    a.ip("link add d0 type veth peer name d1\nlink set d1 up\nlink set d0 up");
    let publics = [b.node.address().to_string(), b.node.address_v6().to_string()];
    for (subnet, public) in b.subnets().into_iter().zip(&publics) {
        let address = far(subnet, 99);
        a.wait("the route", || !route_to(&a, subnet).is_empty());
        a.ip(&format!("addr add {address} dev d0"));
        let remedy = format!("ip address del {address} dev d0");
        noted(&a, &[&format!("d0 has the address {address}"), &subnet.to_string(), public, &remedy]);
        a.wait("no route that would cut the address off", || route_to(&a, subnet).is_empty());
        a.show(&remedy);
        a.wait("the end of the note, and the route", || {
            notes(&a).is_empty() && !route_to(&a, subnet).is_empty()
        });
        answered(&others);
    }
    for subnet in a.subnets() {
        let address = far(subnet, 99);
        a.ip(&format!("addr add {address} dev d0"));
        let remedy = format!("ip address del {address} dev d0");
        noted(&a, &[&format!("d0 has the address {address}"), "own pod subnet", &remedy]);
        a.show(&remedy);
        a.wait("the end of the note", || notes(&a).is_empty());
        answered(&others);
    }
    let routers = [c.node.address().to_string(), c.node.address_v6().to_string()];
    for (index, router) in routers.iter().enumerate() {
        for (subnet, whose) in
            [(b.subnets()[index], publics[index].as_str()), (a.subnets()[index], "this node's own pods")]
        {
            let taken = half(subnet);
            a.ip(&format!("route add {taken} via {router} dev eth0 proto static"));
            noted(&a, &[&format!("route {taken} via {router} dev eth0"), whose, "ip route del"]);
            a.ip(&format!("route del {taken} via {router} dev eth0"));
            a.wait("the end of the note", || notes(&a).is_empty());
            answered(&others);
        }
    }
    assert_eq!(notes(&b), Vec::<String>::new());
    a.wait_for_log("nothing of this host is in the way of the pods' network any more");
    assert_eq!(lost(others), [0; 4], "{}", logs(&[&a, &c]));
}

#[test]
fn what_comes_into_the_pods_network_of_vxlan_is_named_until_it_is_gone_and_harms_nobody_else() {
    named_and_harmless(r#"{"Type":"vxlan"}"#);
}

#[test]
fn what_comes_into_the_pods_network_of_host_gw_is_named_until_it_is_gone_and_harms_nobody_else() {
    named_and_harmless(r#"{"Type":"host-gw"}"#);
}
