//! A node among more than a thousand others: routes through nexthop objects, made, adopted and removed by agents.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::time::{Duration, Instant};

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

/// Subnets, next hops and destinations of forwarding entries, as the kernel has them and as the leases say.
fn as_leased(cluster: &Cluster, member: &Member) -> [[BTreeSet<String>; 3]; 2] {
    let of = |command: &str, word: usize| -> BTreeSet<String> {
        let shown = member.show(command);
        shown.lines().filter_map(|line| line.split_whitespace().nth(word)).map(str::to_owned).collect()
    };
    let kernel = [
        of("ip -4 route show dev flannel.1", 0),
        of("ip -4 neigh show dev flannel.1", 0),
        of("bridge fdb show dev flannel.1", 2),
    ];
    let mut leased: [BTreeSet<String>; 3] = Default::default();
    let own = member.subnet().to_string();
    for (key, value) in cluster.leases() {
        let subnet = key.rsplit('/').next().unwrap().replace('-', "/");
        if subnet != own {
            leased[1].insert(subnet.trim_end_matches("/24").to_owned());
            leased[0].insert(subnet);
            leased[2].insert(value.split('"').nth(3).unwrap().to_owned());
        }
    }
    [kernel, leased]
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
    a.wait("the first echo between pods", || pod_a.namespace().reaches(pod_b.address()).unwrap());
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

#[test]
fn hundreds_of_changes_a_second_with_damage_among_them_end_as_the_leases_say() {
    const STEPS: usize = 60;
    const AT_ONCE: usize = 20;
    let cluster = Cluster::new(WIDE);
    let a = cluster.join();
    let keys = keys(&[&a]);
    come(&cluster, &keys);
    a.wait("routes through objects", || through_objects(&a) == PEERS);
    let guests: Vec<(usize, String)> = (0..STEPS * AT_ONCE)
        .map(|number| (2000 + number, format!("10.{}.{}.0-24", 250 + number / 256, number % 256)))
        .filter(|(_, key)| !key.starts_with(&a.subnet().network().to_string()))
        .collect();
    let mut due = Instant::now();
    for (step, some) in guests.chunks(AT_ONCE).enumerate() {
        come(&cluster, some);
        // Those of two steps ago go, those of three steps ago move to where others were.
        if let Some(former) = step.checked_sub(2).and_then(|step| guests.chunks(AT_ONCE).nth(step)) {
            let (leaving, moving) = former.split_at(AT_ONCE / 2);
            leave(&cluster, leaving);
            let moved: Vec<_> = moving.iter().map(|(number, key)| (number + 3000, key.clone())).collect();
            come(&cluster, &moved);
        }
        if step % 10 == 5 {
            let lost = keys[step].1.replace('-', "/");
            a.ip(&format!("route del {lost}\nroute add 10.247.{step}.128/25 via 172.31.0.254 proto 70"));
        }
        due += Duration::from_millis(100);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    a.wait("what the leases say", || {
        let [kernel, leased] = as_leased(&cluster, &a);
        kernel == leased
    });
    let stray = a.show("ip -4 route show proto 70 via 172.31.0.254");
    assert_eq!(stray, "", "{}", a.agent.log());
}
