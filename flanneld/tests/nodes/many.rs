//! A node among more than a thousand others: routes through nexthop objects, made, adopted and removed by agents.

use std::fmt::Write;

use backends::testing::Pinger;

use crate::bed::{Cluster, LIMIT, Member, flanneld};

const WIDE: &str = r#"{"Network":"10.240.0.0/12","Backend":{"Type":"vxlan"}}"#;
const PEERS: usize = 1100;
/// Operations in a transaction of etcd.
const BATCH: usize = 120;

/// Keys of the leases of nodes that don't exist, none of them of these members.
fn keys(members: &[&Member]) -> Vec<(usize, String)> {
    let taken: Vec<String> =
        members.iter().map(|member| member.subnet().to_string().replace('/', "-")).collect();
    let all = (0..).map(|number: usize| (number, format!("10.{}.{}.0-24", 240 + number / 256, number % 256)));
    all.filter(|(_, key)| !taken.contains(key)).take(PEERS).collect()
}

fn lease(number: usize) -> String {
    let (high, low) = (number / 256, number % 256);
    format!(
        r#"{{"PublicIP":"172.20.{high}.{low}","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:00:00:01:{high:02x}:{low:02x}"}}}}"#
    )
}

fn transactions(cluster: &Cluster, operations: &[String]) {
    for some in operations.chunks(BATCH) {
        // No conditions; what is done then; and nothing otherwise.
        let mut text = "\n".to_owned();
        some.iter().for_each(|operation| writeln!(text, "{operation}").unwrap());
        cluster.etcd.ctl(&["txn"], &format!("{text}\n\n")).unwrap();
    }
}

fn come(cluster: &Cluster, keys: &[(usize, String)]) {
    let put = |(number, key): &(usize, String)| {
        let value = lease(*number).replace('"', "\\\"");
        format!("put /coreos.com/network/subnets/{key} \"{value}\"")
    };
    transactions(cluster, &keys.iter().map(put).collect::<Vec<_>>());
}

fn leave(cluster: &Cluster, keys: &[(usize, String)]) {
    let del = |(_, key): &(usize, String)| format!("del /coreos.com/network/subnets/{key}");
    transactions(cluster, &keys.iter().map(del).collect::<Vec<_>>());
}

fn objects(member: &Member) -> usize {
    member.show("ip nexthop show").lines().count()
}

fn through_objects(member: &Member) -> usize {
    member.show("ip -4 route show proto 70").lines().filter(|line| line.contains("nhid")).count()
}

#[test]
fn a_pod_is_reached_all_the_time_while_a_thousand_nodes_come_and_go_and_the_agent_is_killed() {
    let cluster = Cluster::new(WIDE);
    let (mut a, b) = (cluster.join(), cluster.join());
    a.wait("the peer's route", || a.node.has_route(b.subnet()).unwrap());
    let (pod_a, pod_b) = (a.pod(), b.pod());
    let pinger = Pinger::start(pod_a.namespace(), pod_b.address()).unwrap();
    pinger.wait_for_reply(LIMIT).unwrap();
    assert_eq!(objects(&a), 0, "few peers have plain routes");

    let keys = keys(&[&a, &b]);
    come(&cluster, &keys);
    a.wait("routes through objects", || through_objects(&a) == PEERS + 1);
    assert_eq!(objects(&a), PEERS + 1);
    // What an agent that knows no objects would have made of them.
    a.agent.kill().unwrap();
    let plain: String = keys.iter().fold(String::new(), |mut all, (_, key)| {
        let base = key.trim_end_matches("-24");
        writeln!(all, "route replace {base}/24 via {base} dev flannel.1 onlink").unwrap();
        all
    });
    a.ip(&plain);
    let theirs = b.subnet();
    a.ip(&format!("route replace {theirs} via {} dev flannel.1 onlink", theirs.network()));
    assert_eq!(through_objects(&a), 0);
    a.start_again();
    a.wait("routes through objects again", || through_objects(&a) == PEERS + 1);
    a.wait("one object for each", || objects(&a) == PEERS + 1);
    pinger.wait_for_reply(LIMIT).unwrap();

    leave(&cluster, &keys);
    a.wait("plain routes", || through_objects(&a) == 0 && objects(&a) == 0);
    assert!(a.node.has_route(b.subnet()).unwrap());
    pinger.wait_for_reply(LIMIT).unwrap();
    let pings = pinger.finish().unwrap();
    assert_eq!(pings.lost, 0, "{pings:?}; {}", a.agent.log());
}

#[test]
fn damage_to_objects_is_repaired_and_cleanup_leaves_those_of_others() {
    let cluster = Cluster::new(WIDE);
    let mut a = cluster.join();
    a.ip("nexthop add id 1174405121 via 172.31.0.254 dev eth0 proto 70\nnexthop add id 9 via 172.31.0.254 dev eth0");
    come(&cluster, &keys(&[&a]));
    let whole = || through_objects(&a) == PEERS && objects(&a) == PEERS + 2;
    a.wait("routes through objects", whole);
    // A device that is made again has another index, so its own properties are no part of it.
    let routes = || a.show("ip -4 route show proto 70");
    let healthy = routes();
    let some = healthy.lines().next().unwrap().to_owned();
    let id = some.split("nhid ").nth(1).unwrap().split(' ').next().unwrap().to_owned();
    for damage in [
        format!("nexthop del id {id}"),
        format!("nexthop replace id {id} via 172.31.0.254 dev eth0 proto 70"),
        "link set flannel.1 down".to_owned(),
        "link del flannel.1".to_owned(),
    ] {
        a.ip(&damage);
        a.wait(&format!("the repair of: {damage}"), || whole() && routes() == healthy);
    }
    a.agent.terminate(LIMIT).unwrap();
    let file = format!("--subnet-file={}", a.node.subnet_file().display());
    a.node.namespace().command(flanneld()).args(["cleanup", &file]).ok().unwrap();
    assert_eq!(objects(&a), 2, "{}", a.show("ip nexthop show"));
    assert!(!a.show("ip link show").contains("flannel"));
}
