//! Whose an object is, a record says: what no record gives to this agent stays, also when it looks like ours.

use crate::bed::{Cluster, LIMIT, Member, VXLAN, flanneld};

/// A network in which hosts have much else: nodes' subnets are a part of it.
const WIDE: &str = r#"{"Network":"10.0.0.0/8","SubnetMin":"10.128.0.0","SubnetMax":"10.199.255.0","Backend":{"Type":"vxlan"}}"#;

/// Bridges of libvirt, Podman, LXD and Docker, idle and in use, inside and outside of the range.
const BRIDGES: [(&str, &str, bool); 4] = [
    ("virbr0", "10.122.0.1/24", false),
    ("podman1", "10.88.7.1/24", true),
    ("lxdbr0", "10.150.3.1/24", false),
    ("docker0", "10.151.7.1/24", true),
];

/// What boot scripts, a VPN and an agent of another network set.
const ROUTES: &str = "route add 10.152.1.0/24 via 172.31.0.254\n\
    route add 10.152.2.0/24 via 172.31.0.254 proto static\n\
    route add blackhole 10.152.3.0/24\n\
    route add 10.9.1.0/24 via 172.31.0.254 proto 70\n";

fn strangers(member: &Member) -> String {
    let routes = member.show("ip -4 route show");
    let kept = ["10.152.1.0", "10.152.2.0", "10.152.3.0", "10.9.1.0"];
    let routes: Vec<&str> =
        routes.lines().filter(|line| kept.iter().any(|part| line.contains(part))).collect();
    let addresses = BRIDGES.map(|(name, ..)| member.show(&format!("ip -o -4 address show dev {name}")));
    assert!(
        addresses.iter().all(|text| text.contains("inet ")) && routes.len() == kept.len(),
        "{addresses:?} {routes:?}"
    );
    format!("{}\n{}", routes.join("\n"), addresses.join("\n"))
}

/// Has the agent look at the whole kernel and put something right.
fn turn(member: &Member) {
    member.ip("link set flannel.1 mtu 1300");
    member.wait("the repair", || member.show("ip link show flannel.1").contains("mtu 1450"));
}

#[test]
fn bridges_and_routes_of_other_programs_inside_the_network_stay_while_it_runs_and_after_cleanup() {
    let cluster = Cluster::new(WIDE);
    let node = cluster.fabric.node().unwrap();
    let mut lines = ROUTES.to_owned();
    for (number, (name, address, busy)) in BRIDGES.iter().enumerate() {
        lines += &format!("link add {name} type bridge\nlink set {name} up\naddr add {address} dev {name}\n");
        if *busy {
            lines += &format!("link add vnet{number} type veth peer name guest{number}\n");
            lines += &format!("link set vnet{number} master {name} up\n");
        }
    }
    node.namespace().ip(&lines).unwrap();
    let mut a = cluster.start(node, &[]);
    a.agent.wait_ready(LIMIT).unwrap();
    let b = cluster.join();
    a.wait("the peer's route", || a.node.has_route(b.subnet()).unwrap());
    let before = strangers(&a);
    turn(&a);
    a.ip("addr del 10.122.0.1/24 dev virbr0\naddr add 10.122.0.1/24 dev virbr0");
    turn(&a);
    assert_eq!(strangers(&a), before, "{}", a.agent.log());
    a.agent.terminate(LIMIT).unwrap();
    a.start_again();
    assert_eq!(strangers(&a), before, "{}", a.agent.log());

    a.agent.terminate(LIMIT).unwrap();
    let file = format!("--subnet-file={}", a.node.subnet_file().display());
    a.node.namespace().command(flanneld()).args(["cleanup", &file]).ok().unwrap();
    assert_eq!(strangers(&a), before);
    assert!(!a.node.has_route(b.subnet()).unwrap());
}

#[test]
fn an_address_that_was_taken_off_a_bridge_and_came_back_stays_and_is_named() {
    let cluster = Cluster::new(VXLAN);
    let (a, b) = (cluster.join(), cluster.join());
    a.wait("the route", || a.node.has_route(b.subnet()).unwrap());
    let gateway = format!("{}/24", b.subnet().hosts().next().unwrap());
    a.ip("link add br7 type bridge\nlink set br7 up");
    let has = || a.show("ip -o -4 address show dev br7").contains(&gateway);
    a.ip(&format!("addr add {gateway} dev br7"));
    turn(&a);
    a.wait("its end", || !has());
    a.ip(&format!("addr add {gateway} dev br7"));
    turn(&a);
    turn(&a);
    assert!(has());
    a.wait_for_log("something on this host wants it");
    a.wait("the note", || {
        let verbose = a.verbose();
        verbose.contains("br7 has the address") && verbose.contains("ip address del")
    });
}

#[test]
fn a_device_of_the_fallback_that_another_agent_made_stays() {
    let cluster = Cluster::new(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","Fallback":"udp"}}"#);
    let node = cluster.fabric.node().unwrap();
    node.namespace().ip("tuntap add flannel0 mode tun\naddr add 10.99.1.0/16 dev flannel0").unwrap();
    let mut a = cluster.start(node, &[]);
    a.agent.wait_ready(LIMIT).unwrap();
    turn(&a);
    assert!(a.show("ip -o address show dev flannel0").contains("10.99.1.0/16"));
}

#[test]
fn the_gateway_of_a_lost_subnet_goes_with_the_last_pod_and_readiness_follows() {
    let cluster = Cluster::new(VXLAN);
    let a = cluster.join();
    let old = a.subnet();
    a.ip(&format!(
        "link add cni0 type bridge\nlink add pod0 type veth peer name pod1\nlink set pod0 master cni0\n\
         link set cni0 up\naddr add {}/24 dev cni0",
        old.hosts().next().unwrap()
    ));
    let (key, value) = cluster.leases().into_iter().next().unwrap();
    cluster.put(&key, &value.replace(&a.node.address().to_string(), "172.31.0.99"));
    a.wait("another subnet", || a.subnet() != old);
    let reason = || a.agent.get("/readyz").unwrap();
    a.wait("the reason", || reason().1.contains("now belongs to another node, but cni0"));
    a.ip("link del pod0");
    // Without a notification of the last pod's end it would be a minute.
    a.wait("readiness", || reason().0 == 200);
    a.wait("the end of the address", || !a.show("ip -o -4 address show dev cni0").contains("inet "));
}
