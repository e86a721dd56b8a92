//! What only etcd can show: Go's bytes, compaction, restarts, races, broken paths.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use etcd_client::PutOptions;
use subnet::etcd::Etcd;
use subnet::{LeaseStore, StoreError};

use super::bed::{Bed, InEtcd, options};
use super::etcd_server::Server;
use super::nodes::{Follower, acquire, hold, key, public, subnets, until, value, within};
use super::sentences::CONFIG;

const HOUR: Duration = Duration::from_secs(3600);

#[tokio::test]
async fn key_value_and_time_to_live_are_those_of_go_flannel() {
    let bed = InEtcd::new(Some(CONFIG)).await;
    let lease = acquire(&bed.node(), CONFIG, 1).await.unwrap();
    let mut client = bed.client.clone();
    let all =
        client.get(bed.prefix.as_str(), Some(etcd_client::GetOptions::new().with_prefix())).await.unwrap();
    let [_, kv] = all.kvs() else { panic!("{all:?}") };
    let subnet = lease.subnets.to_string().replace('/', "-");
    assert_eq!(kv.key_str().unwrap(), format!("{}/subnets/{subnet}", bed.prefix));
    assert_eq!(
        kv.value_str().unwrap(),
        r#"{"PublicIP":"192.0.0.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:01"}}"#
    );
    let ttl = client.lease_time_to_live(kv.lease(), None).await.unwrap();
    assert_eq!(ttl.granted_ttl(), 86_400);
    assert!((86_390..=86_400).contains(&ttl.ttl()), "{}", ttl.ttl());
    assert_eq!(lease.created, kv.create_revision() as u64);
}

#[tokio::test]
async fn a_dual_stack_key_is_that_of_go_flannel() {
    let config = r#"{"Network":"10.3.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:3::/48","SubnetMin":"10.3.9.0","SubnetMax":"10.3.9.0","IPv6SubnetMin":"fd00:3:0:9::","IPv6SubnetMax":"fd00:3:0:9::"}"#;
    let bed = InEtcd::new(Some(config)).await;
    acquire(&bed.node(), config, 1).await.unwrap();
    assert!(bed.read("10.3.9.0-24&fd00:3:0:9::-64").await.is_some());
    // Another node that had its eyes on one half only finds the other half taken as well.
    let other = config.replace("10.3.9.0", "10.3.8.0");
    let error = acquire(&bed.node(), &other, 2).await.unwrap_err();
    assert!(matches!(error, StoreError::Exhausted { .. }), "{error}");
}

#[tokio::test]
async fn a_lease_that_gains_a_family_moves_in_one_revision() {
    let config = r#"{"Network":"10.3.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:3::/48"}"#;
    let bed = InEtcd::new(Some(CONFIG)).await;
    let node = bed.node();
    let old = acquire(&node, CONFIG, 1).await.unwrap();
    let new = acquire(&node, config, 1).await.unwrap();
    let mut client = bed.client.clone();
    for (revision, names) in [(new.created - 1, [1, 0]), (new.created, [0, 1])] {
        for (lease, count) in [&old, &new].into_iter().zip(names) {
            let then = etcd_client::GetOptions::new().with_revision(revision as i64);
            let found = client.get(bed.key(&key(lease)), Some(then)).await.unwrap();
            assert_eq!(found.kvs().len(), count, "{lease} at {revision}");
        }
    }
}

/// As after a move of which the answer was lost.
#[tokio::test]
async fn an_own_lease_that_moved_unnoticed_is_held_under_its_new_key() {
    let bed = InEtcd::new(Some(CONFIG)).await;
    let node = Arc::new(bed.node());
    let lease = acquire(&*node, CONFIG, 1).await.unwrap();
    let moved = format!("{}&fd00:3:0:7::-64", key(&lease));
    bed.put(&moved, &value(1), Some(HOUR / 2)).await;
    bed.delete(&key(&lease)).await;
    let holding = hold(&node);
    let renewed = |entry: &super::bed::Entry| entry.ttl.is_some_and(|ttl| ttl > HOUR);
    until(async || bed.read(&moved).await.filter(renewed)).await;
    assert_eq!(bed.read(&key(&lease)).await, None);
    assert!(!holding.ended());
}

#[tokio::test]
async fn networks_with_other_prefixes_are_apart() {
    let bed = InEtcd::new(Some(CONFIG)).await;
    let mut client = bed.client.clone();
    let neighbours = ["2", "/subnetsX", "/subnets0", "/subnet", "/config/subnets"];
    for tail in neighbours {
        client.put(format!("{}{tail}/10.3.1.0-24", bed.prefix), value(9), None).await.unwrap();
    }
    let node = bed.node();
    let lease = acquire(&node, CONFIG, 9).await.unwrap();
    let mut follower = Follower::of(Arc::new(node));
    let now = follower.leases(|leases| !leases.leases.is_empty()).await;
    assert_eq!(now.leases.keys().collect::<Vec<_>>(), [&lease.subnets]);
    assert!(now.malformed.is_empty());
    let others =
        client.get(bed.prefix.as_str(), Some(etcd_client::GetOptions::new().with_prefix())).await.unwrap();
    assert_eq!(others.kvs().len(), neighbours.len() + 2);
}

#[tokio::test]
async fn what_changed_behind_a_compaction_is_seen() {
    let server = Arc::new(Server::prepare());
    server.start();
    let bed = InEtcd::on(server, Some(CONFIG)).await;
    bed.put("10.3.1.0-24", &value(1), None).await;
    bed.put("10.3.2.0-24", &value(2), None).await;
    let node = Arc::new(bed.node());
    let own = acquire(&*node, CONFIG, 3).await.unwrap();
    let holding = hold(&node);
    let mut follower = Follower::of(node);
    follower.leases(|leases| leases.leases.len() == 3).await;

    bed.cut().await;
    follower.until(|known| known.trouble.is_some()).await;
    bed.put("10.3.1.0-24", &value(11), None).await;
    bed.delete("10.3.2.0-24").await;
    bed.put("10.3.204.0-24", &value(4), None).await;
    let mut client = bed.client.clone();
    let now = client.get("any", None).await.unwrap().header().unwrap().revision();
    client.compact(now, None).await.unwrap();
    bed.mend().await;

    let leases = follower.leases(|leases| leases.leases.contains_key(&subnets("10.3.204.0/24"))).await;
    assert_eq!(leases.leases[&subnets("10.3.1.0/24")].public, public(11));
    assert_eq!(leases.leases.len(), 3);
    assert_eq!(leases.leases[&own.subnets], own);
    assert!(!holding.ended());
    // And what happens from now on.
    bed.delete("10.3.204.0-24").await;
    follower.leases(|leases| leases.leases.len() == 2).await;
}

/// The listing that `acquire` made is older than all history when `follow` begins.
#[tokio::test]
async fn a_watch_that_begins_before_the_compacted_revision_lists_again() {
    let server = Arc::new(Server::prepare());
    server.start();
    let bed = InEtcd::on(server, Some(CONFIG)).await;
    let node = Arc::new(bed.node());
    let lease = acquire(&*node, CONFIG, 3).await.unwrap();
    for number in 10..20 {
        bed.put("10.3.201.0-24", &value(number), None).await;
    }
    bed.delete(&key(&lease)).await;
    let mut client = bed.client.clone();
    let now = client.get("any", None).await.unwrap().header().unwrap().revision();
    client.compact(now, None).await.unwrap();
    let mut follower = Follower::of(node.clone());
    let leases = follower.leases(|leases| leases.leases.contains_key(&subnets("10.3.201.0/24"))).await;
    assert_eq!(leases.leases.len(), 1, "{leases:?}");
    let _holding = hold(&node);
    follower.leases(|leases| leases.leases.contains_key(&lease.subnets)).await;
    bed.put("10.3.201.0-24", &value(20), None).await;
    follower.leases(|leases| leases.leases[&subnets("10.3.201.0/24")].public == public(20)).await;
}

/// What was read is of a revision that the server will reach much later, if ever.
#[tokio::test]
async fn a_server_put_back_to_an_earlier_state_is_followed_at_once() {
    let server = Arc::new(Server::prepare());
    server.start();
    let bed = InEtcd::on(server.clone(), Some(CONFIG)).await;
    for number in 0..100 {
        bed.put("10.3.201.0-24", &value(number), None).await;
    }
    let node = Arc::new(bed.node());
    node.network().await.unwrap();
    acquire(&*node, CONFIG, 3).await.unwrap();
    let mut client = server.begin_anew().await;
    let lease = format!("{}/subnets/10.3.202.0-24", bed.prefix);
    client.put(lease.as_str(), value(20), None).await.unwrap();
    let revision = client.get("any", None).await.unwrap().header().unwrap().revision();
    assert!(revision < 10, "{revision}");
    // The listing that `acquire` made, and what `network` read.
    let mut follower = Follower::of(node.clone());
    let leases = follower.leases(|leases| leases.leases.contains_key(&subnets("10.3.202.0/24"))).await;
    assert_eq!(leases.leases.len(), 1, "{leases:?}");
    within(node.network_changed()).await;
    assert!(matches!(node.network().await, Err(StoreError::NoConfig { .. })));
    // And what happens from now on.
    client.delete(lease.as_str(), None).await.unwrap();
    follower.leases(|leases| leases.leases.is_empty()).await;
}

#[tokio::test]
async fn a_server_that_is_killed_and_started_again_is_followed_on() {
    let server = Arc::new(Server::prepare());
    server.start();
    let bed = InEtcd::on(server.clone(), Some(CONFIG)).await;
    let node = Arc::new(bed.eager_node());
    let lease = acquire(&*node, CONFIG, 1).await.unwrap();
    let holding = hold(&node);
    let mut follower = Follower::of(node.clone());
    follower.leases(|leases| leases.leases.len() == 1).await;
    server.kill();
    let known = follower.until(|known| known.trouble.is_some()).await;
    assert_eq!(known.leases.unwrap().leases[&lease.subnets], lease);
    assert!(matches!(within(node.network()).await, Err(StoreError::Unreachable { .. })));
    server.start();
    server.answering(None).await;
    bed.put("10.3.255.0-24", &value(2), None).await;
    follower.until(|known| known.trouble.is_none() && known.leases.as_ref().unwrap().leases.len() == 2).await;
    // Renewals go on, too.
    let before = bed.read(&key(&lease)).await.unwrap().version;
    until(async || bed.read(&key(&lease)).await.filter(|entry| entry.version != before)).await;
    assert!(!holding.ended());
}

#[tokio::test]
async fn a_dead_endpoint_beside_a_living_one_does_not_matter() {
    let bed = InEtcd::new(Some(CONFIG)).await;
    let dead = format!("http://{}:2379", super::etcd_server::own_address());
    for _ in 0..8 {
        let mut options = bed.options(HOUR);
        options.endpoints.insert(0, dead.clone());
        options.endpoints.push("  ".into());
        let node = Etcd::new(options).unwrap();
        within(node.network()).await.unwrap();
        acquire(&node, CONFIG, 1).await.unwrap();
    }
}

#[tokio::test]
async fn a_lost_race_is_run_again_and_leaves_nothing_behind() {
    let config = r#"{"Network":"10.3.0.0/24","SubnetLen":28,"Backend":{"Type":"vxlan"}}"#;
    let server = Arc::new(Server::prepare());
    server.start();
    let bed = InEtcd::on(server, Some(config)).await;
    // 15 subnets for 15 nodes that all want the same one.
    let mut nodes = tokio::task::JoinSet::new();
    for number in 0..15 {
        let node = bed.node();
        nodes.spawn(async move {
            super::nodes::acquire_after(&node, config, number, subnets("10.3.0.64/28")).await.unwrap()
        });
    }
    let leases = within(nodes.join_all()).await;
    let distinct: std::collections::BTreeSet<_> = leases.iter().map(|lease| lease.subnets).collect();
    assert_eq!(distinct.len(), 15);
    assert!(distinct.contains(&subnets("10.3.0.64/28")));
    // Each key has its grant, and no grant of a lost race is left.
    assert_eq!(bed.client.clone().leases().await.unwrap().leases().len(), 15);
}

/// What another node does while this one is between deciding and writing.
async fn acquire_while(
    bed: &InEtcd,
    config: &str,
    meanwhile: (&str, u16),
) -> Result<subnet::Lease, StoreError> {
    let once = AtomicBool::new(true);
    let attach = |_: Option<&subnet::Lease>, _: &subnet::Leases| {
        if once.swap(false, Ordering::Relaxed) {
            let (url, key) = (format!("http://{}", bed.server.address()), bed.key(meanwhile.0));
            let other = std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(async {
                    let mut client = etcd_client::Client::connect([url], None).await.unwrap();
                    client.put(key, value(meanwhile.1), None).await.unwrap();
                });
            });
            other.join().unwrap();
        }
        super::nodes::vxlan(1)
    };
    let claim = subnet::Claim::new(public(1), subnet::Subnets::default(), &attach);
    within(bed.node().acquire(&super::nodes::network(config), &claim)).await
}

#[tokio::test]
async fn what_another_writes_while_this_node_decides_is_respected() {
    let one = r#"{"Network":"10.3.0.0/16","SubnetMin":"10.3.1.0","SubnetMax":"10.3.1.0"}"#;
    for rival in ["10.3.1.0-24", "10.3.1.0-25", "10.3.1.0-24&fd00:3::-64"] {
        let bed = InEtcd::new(Some(one)).await;
        let error = acquire_while(&bed, one, (rival, 2)).await.unwrap_err();
        assert!(matches!(error, StoreError::Exhausted { .. }), "{rival}: {error}");
        let mut follower = Follower::of(Arc::new(bed.node()));
        let now = follower.until(|known| known.leases.is_some()).await.leases.unwrap();
        assert_eq!(now.leases.values().map(|lease| lease.public).collect::<Vec<_>>(), [public(2)], "{rival}");
    }
    // The own lease, given to another node after it was read.
    let bed = InEtcd::new(Some(CONFIG)).await;
    bed.put("10.3.7.0-24", &value(1), None).await;
    let lease = acquire_while(&bed, CONFIG, ("10.3.7.0-24", 2)).await.unwrap();
    assert_ne!(lease.subnets, subnets("10.3.7.0/24"));
    assert_eq!(bed.read("10.3.7.0-24").await.unwrap().value, value(2));
    // The same with one that no longer fits and would be deleted.
    let bed = InEtcd::new(Some(CONFIG)).await;
    bed.put("10.9.7.0-24", &value(1), None).await;
    acquire_while(&bed, CONFIG, ("10.9.7.0-24", 2)).await.unwrap();
    assert_eq!(bed.read("10.9.7.0-24").await.unwrap().value, value(2));
}

/// Two nodes that create keys which differ but overlap: the younger gives way.
#[tokio::test]
async fn a_dual_stack_node_that_has_half_of_an_older_lease_moves() {
    let config = r#"{"Network":"10.3.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:3::/48"}"#;
    let bed = InEtcd::new(Some(config)).await;
    bed.put("10.3.5.0-24&fd00:3:0:5::-64", &value(1), None).await;
    bed.put("10.3.5.0-24&fd00:3:0:6::-64", &value(2), None).await;
    let moved = acquire(&bed.node(), config, 2).await.unwrap();
    assert!(!moved.subnets.overlaps(&subnets("10.3.5.0/24&fd00:3:0:5::/64")), "{moved}");
    assert_eq!(bed.read("10.3.5.0-24&fd00:3:0:6::-64").await, None);
    let stays = acquire(&bed.node(), config, 1).await.unwrap();
    assert_eq!(stays.subnets, subnets("10.3.5.0/24&fd00:3:0:5::/64"));
}

/// An operator shortens the life of a lease: it is renewed before that.
#[tokio::test]
async fn a_time_to_live_that_somebody_shortened_is_noticed() {
    let bed = InEtcd::new(Some(CONFIG)).await;
    let node = Arc::new(bed.node());
    let lease = acquire(&*node, CONFIG, 1).await.unwrap();
    let _holding = hold(&node);
    let mut client = bed.client.clone();
    let short = client.lease_grant(1800, None).await.unwrap().id();
    let put = Some(PutOptions::new().with_lease(short));
    client.put(bed.key(&key(&lease)), value(1), put).await.unwrap();
    let long = |entry: &super::bed::Entry| entry.ttl.is_some_and(|ttl| ttl > HOUR);
    until(async || bed.read(&key(&lease)).await.filter(long)).await;
}

#[tokio::test]
async fn a_connection_that_is_silently_dead_is_noticed() {
    let bed = InEtcd::new(Some(CONFIG)).await;
    let node = Arc::new(bed.node());
    let lease = acquire(&*node, CONFIG, 1).await.unwrap();
    let holding = hold(&node);
    let mut follower = Follower::of(node);
    // What was put after the listing comes through the watch.
    follower.leases(|leases| leases.leases.len() == 1).await;
    bed.put("10.3.255.0-24", &value(2), None).await;
    follower.leases(|leases| leases.leases.len() == 2).await;
    bed.proxy.freeze();
    let known = follower.until(|known| known.trouble.is_some()).await;
    assert_eq!(known.leases.unwrap().leases.len(), 2);
    bed.delete(&key(&lease)).await;
    bed.cut().await;
    bed.mend().await;
    until(async || bed.read(&key(&lease)).await).await;
    follower.until(|known| known.trouble.is_none()).await;
    assert!(!holding.ended());
}

#[tokio::test]
async fn large_values_under_the_prefix_disturb_nobody() {
    let bed = InEtcd::new(Some(CONFIG)).await;
    for number in 0..6 {
        bed.put(&format!("10.3.{number}.0-24"), &"x".repeat(1_000_000), None).await;
        bed.put(&format!("10.3.{}.0-24", 100 + number), &value(number), None).await;
    }
    let node = Arc::new(bed.node());
    let mut follower = Follower::of(node.clone());
    let now = follower.until(|known| known.leases.is_some()).await.leases.unwrap();
    assert_eq!((now.leases.len(), now.malformed.len()), (6, 6));
    assert!(now.malformed.values().all(|entry| entry.why.len() < 200));
    let lease = acquire(&*node, CONFIG, 77).await.unwrap();
    follower.leases(|leases| leases.leases.contains_key(&lease.subnets)).await;
}

#[tokio::test]
async fn history_that_is_removed_between_two_pages_costs_nothing_but_a_new_listing() {
    const ALL: u16 = 3000;
    let server = Arc::new(Server::prepare());
    server.start();
    let bed = InEtcd::on(server, Some(CONFIG)).await;
    let all: Vec<_> = (0..ALL).map(|i| (format!("10.3.{}.{}-29", i / 32, i % 32 * 8), value(i))).collect();
    bed.write(&all, None).await;
    let mut client = bed.client.clone();
    let compacting = super::nodes::Running(tokio::spawn(async move {
        for round in 0..200 {
            let written = client.put("elsewhere", format!("{round}"), None).await.unwrap();
            client.compact(written.header().unwrap().revision(), None).await.unwrap();
        }
    }));
    loop {
        let done = compacting.ended();
        let node = bed.node();
        let lease = acquire(&node, r#"{"Network":"10.4.0.0/16"}"#, ALL).await.unwrap();
        let known = Follower::of(Arc::new(node)).until(|known| known.leases.is_some()).await;
        let leases = known.leases.unwrap().leases.len();
        assert_eq!((leases, lease.public), (usize::from(ALL) + 1, public(ALL)));
        if done {
            break;
        }
    }
}

#[tokio::test]
async fn a_value_that_is_too_large_to_read_costs_its_key_alone() {
    let server = Server::prepare().with(vec!["--max-request-bytes=16777216".into()]);
    server.start();
    let mut client = server.answering(None).await;
    let huge = "x".repeat(5 << 20);
    client.put("/coreos.com/network/config", CONFIG, None).await.unwrap();
    client.put("/coreos.com/network/subnets/10.3.7.0-24", huge.clone(), None).await.unwrap();
    client.put("/coreos.com/network/subnets/10.3.8.0-24", value(2), None).await.unwrap();
    let node = Arc::new(Etcd::new(options(format!("http://{}", server.address()), HOUR)).unwrap());
    let lease = acquire(&*node, CONFIG, 1).await.unwrap();
    let mut follower = Follower::of(node);
    let leases = follower.leases(|leases| leases.leases.contains_key(&lease.subnets)).await;
    assert_eq!(leases.leases.len(), 2);
    assert!(leases.malformed["10.3.7.0-24"].why.contains("too large"), "{:?}", leases.malformed);
    assert_eq!(leases.taken().count(), 3, "nobody else takes its subnet");
    // The same while it is watched.
    client.put("/coreos.com/network/subnets/10.3.9.0-24", huge, None).await.unwrap();
    client.put("/coreos.com/network/subnets/10.3.10.0-24", value(3), None).await.unwrap();
    follower.leases(|leases| leases.leases.len() == 3 && leases.malformed.len() == 2).await;
}
