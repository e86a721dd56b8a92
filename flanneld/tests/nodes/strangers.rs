//! Other people's keys, other agents, other programs: none of them can hurt us, nor we them.

use crate::bed::{Cluster, LIMIT, VXLAN};

#[test]
fn nothing_written_under_the_prefix_stops_pod_traffic() {
    let cluster = Cluster::new(VXLAN);
    let (a, b) = (cluster.join(), cluster.join());
    let (pod_a, pod_b) = (a.pod(), b.pod());
    a.wait("the first echo between pods", || pod_a.namespace().reaches(pod_b.address()).unwrap());
    let pinger = backends::testing::Pinger::start(pod_a.namespace(), pod_b.address()).unwrap();
    let healthy = a.state();
    let lease = |last: u8| {
        format!(
            r#"{{"PublicIP":"172.31.0.{last}","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:00:00:00:00:{last:02x}"}}}}"#
        )
    };
    for (key, value) in [
        ("hello", "{}".to_owned()),
        ("10.244.77.0-24", "nonsense".to_owned()),
        ("192.168.0.0-16", lease(91)),
        ("0.0.0.0-0", lease(92)),
        ("10.244.0.0-16", lease(93)),
    ] {
        cluster.put(&format!("/coreos.com/network/subnets/{key}"), &value);
        a.wait_for_log(&format!("key=\"{key}\""));
    }
    assert_eq!(a.state(), healthy);
    let pings = pinger.finish().unwrap();
    assert_eq!(pings.lost, 0, "{pings:?}");
    let skipped = a.agent.log().matches("lease skipped").count();
    assert_eq!(skipped, 5, "each is told once:\n{}", a.agent.log());
}

/// All agents make a way through a foreign chain, and none undoes another's.
fn assert_ways_of_all_stay(a: &crate::bed::Member) {
    let forward_chain = |member: &crate::bed::Member| member.show("nft list chain ip filter FORWARD");
    let networks = ["10.244.0.0/16", "10.99.0.0/16", "10.98.0.0/16"];
    a.wait("a way for each", || {
        networks.iter().all(|network| forward_chain(a).matches(&format!("saddr {network}")).count() == 1)
    });
    let handles = a.show("nft -a list chain ip filter FORWARD");
    a.show("nft add rule ip filter FORWARD ip saddr 192.0.2.0/24 drop");
    let untouched = || {
        handles.lines().filter(|line| line.contains("saddr")).all(|line| {
            a.show("nft -a list chain ip filter FORWARD")
                .contains(line.split("counter").next().unwrap_or(line))
        })
    };
    std::thread::sleep(std::time::Duration::from_millis(500));
    assert!(untouched(), "{handles}\n{}", a.show("nft -a list chain ip filter FORWARD"));
}

#[test]
fn two_agents_share_a_host_and_neither_touches_what_is_the_others() {
    let cluster = Cluster::new(VXLAN);
    cluster.put(
        "/second/config",
        r#"{"Network":"10.99.0.0/16","Backend":{"Type":"vxlan","VNI":7,"Port":8477}}"#,
    );
    cluster.put("/third/config", r#"{"Network":"10.98.0.0/16","Backend":{"Type":"host-gw"}}"#);
    let (a, b) = (cluster.join(), cluster.join());
    let others = |member: &crate::bed::Member, prefix: &str, port: u16| {
        let args = [
            format!("--etcd-endpoints={}", cluster.etcd.endpoint()),
            format!("--etcd-prefix=/{prefix}"),
            format!("--subnet-file={}", member.node.dir().join(prefix).display()),
            format!("--healthz-port={port}"),
        ];
        let mut agent = backends::testing::Agent::spawn(&member.node, crate::bed::flanneld(), args).unwrap();
        agent.wait_ready(LIMIT).unwrap();
        agent
    };
    let (second_a, _second_b) = (others(&a, "second", 8082), others(&b, "second", 8082));
    let (_third_a, _third_b) = (others(&a, "third", 8083), others(&b, "third", 8083));
    let routes = || a.show("ip route show type unicast proto 70");
    a.wait("one peer in each network", || routes().lines().count() == 3);
    let before = routes();
    drop(second_a);
    let mut restarted = others(&a, "second", 8082);
    restarted.terminate(LIMIT).unwrap();
    assert_eq!(routes(), before);

    a.show("iptables -P FORWARD DROP");
    let second_again = others(&a, "second", 8082);
    assert_ways_of_all_stay(&a);
    drop(second_again);

    // Uninstalling one leaves the other two alone.
    let file = a.node.dir().join("second");
    let cleaned = a
        .node
        .namespace()
        .command(crate::bed::flanneld())
        .args(["cleanup", &format!("--subnet-file={}", file.display())])
        .ok()
        .unwrap();
    assert!(cleaned.contains("link flannel.7"), "{cleaned}");
    assert_eq!(routes().lines().count(), 2);
    assert!(a.show("ip link show flannel.1").contains("UP"));
}

#[test]
fn a_bridge_left_from_an_earlier_subnet_is_named_while_pods_hang_on_it_and_freed_afterwards() {
    let cluster = Cluster::new(VXLAN);
    let (a, b) = (cluster.join(), cluster.join());
    a.wait("the route", || a.node.has_route(b.subnet()).unwrap());
    let gateway = b.subnet().hosts().next().unwrap();
    a.ip(&format!(
        "link add cni0 type bridge\nlink add pod0 type veth peer name pod1\nlink set pod0 master cni0\n\
         link set cni0 up\nroute del {0}\naddr add {gateway}/24 dev cni0\naddr add 10.7.7.7/24 dev cni0",
        b.subnet()
    ));
    a.wait_for_log("but cni0 of this host has an address in it");
    a.wait_for_log("1 devices hang on it");
    assert!(a.show("ip route show").contains(&format!("{} dev cni0 proto kernel", b.subnet())));
    a.ip("link del pod0\nlink set flannel.1 mtu 1300");
    a.wait("the route", || a.show("ip route show").contains(&format!("{} via", b.subnet())));
    let left = a.show("ip -o -4 address show dev cni0");
    assert!(left.contains("10.7.7.7/24") && !left.contains("10.244."), "{left}");
}

#[test]
fn a_packet_for_a_pod_that_does_not_exist_ends_at_its_node() {
    let cluster = Cluster::new(VXLAN);
    let (a, b) = (cluster.join(), cluster.join());
    a.wait("the route", || a.node.has_route(b.subnet()).unwrap());
    let nobody = b.subnet().hosts().nth(99).unwrap().to_string();
    let answer = a.node.namespace().command("ping").args(["-n", "-c1", "-W2", &nobody]).output().unwrap();
    let text = String::from_utf8(answer.stdout).unwrap();
    assert!(text.contains("100% packet loss") && !text.contains("Time to live"), "{text}");
    // A bridge's own route wins over it.
    let route = b.show(&format!("ip route show exact {}", b.subnet()));
    assert!(route.starts_with("blackhole"), "{route}");
    let _pod = b.pod();
    assert!(b.show(&format!("ip route get {nobody}")).contains("dev cni0"));
}
