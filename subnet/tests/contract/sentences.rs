//! The contract, sentence by sentence, for any kind of store.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use subnet::{LeaseStore, Loss, StoreError, Subnets};

use super::bed::Bed;
use super::nodes::{
    Follower, acquire, acquire_after, hold, key, network, public, subnets, until, value, vxlan, within,
};

pub(crate) const CONFIG: &str = r#"{"Network":"10.3.0.0/16","Backend":{"Type":"vxlan"}}"#;
const DUAL: &str = r#"{"Network":"10.3.0.0/24","SubnetLen":29,"EnableIPv6":true,"IPv6Network":"fd00:3::/58","IPv6SubnetLen":64,"Backend":{"Type":"vxlan"}}"#;

fn many(count: u16) -> Vec<(String, String)> {
    (0..count).map(|i| (format!("10.3.{}.{}-28", i / 16, i % 16 * 16), value(i))).collect()
}

pub(crate) async fn a_snapshot_is_never_partial<B: Bed>() {
    const ALL: usize = 1234;
    let bed = B::new(Some(CONFIG)).await;
    bed.write(&many(ALL as u16), None).await;
    let mut follower = Follower::of(Arc::new(bed.node()));
    let first = follower.until(|known| known.leases.is_some()).await.leases.unwrap();
    assert_eq!(first.leases.len(), ALL);
    // Each state that is seen while leases go one by one is one that there was.
    for (key, _) in many(20) {
        bed.delete(&key).await;
    }
    let mut seen = ALL;
    while seen > ALL - 20 {
        let last = seen;
        seen = follower.leases(|leases| leases.leases.len() != last).await.leases.len();
        assert!((ALL - 20..last).contains(&seen), "{seen} after {last}");
    }
}

pub(crate) async fn an_expired_lease_disappears<B: Bed>() {
    let bed = B::new(Some(CONFIG)).await;
    bed.put("10.3.7.0-24", &value(7), Some(Duration::from_secs(2))).await;
    bed.put("10.3.8.0-24", &value(8), None).await;
    let mut follower = Follower::of(Arc::new(bed.node()));
    follower.leases(|leases| leases.leases.len() == 2).await;
    let left = follower.leases(|leases| leases.leases.len() == 1).await;
    assert_eq!(left.leases.keys().next(), Some(&subnets("10.3.8.0/24")));
    assert_eq!(bed.read("10.3.7.0-24").await, None);
}

pub(crate) async fn the_same_node_gets_the_same_subnet<B: Bed>() {
    let bed = B::new(Some(CONFIG)).await;
    let first = acquire(&bed.node(), CONFIG, 1).await.unwrap();
    acquire(&bed.node(), CONFIG, 2).await.unwrap();
    let again = acquire(&bed.node(), CONFIG, 1).await.unwrap();
    assert_eq!(first, again);
    let node = bed.node();
    let mut follower = Follower::of(Arc::new(node));
    assert_eq!(follower.leases(|leases| leases.leases.len() == 2).await.leases[&first.subnets], first);
}

pub(crate) async fn two_claims_never_share<B: Bed>() {
    for config in [CONFIG, DUAL, super::shapes::V6] {
        let bed = B::new(Some(config)).await;
        let mut nodes = tokio::task::JoinSet::new();
        for number in 0..30 {
            let node = bed.node();
            nodes.spawn(async move { acquire(&node, config, number).await.unwrap() });
        }
        let leases = within(nodes.join_all()).await;
        for (i, a) in leases.iter().enumerate() {
            for b in &leases[..i] {
                assert!(!a.subnets.overlaps(&b.subnets), "{a} and {b}");
            }
        }
        let now = Follower::of(Arc::new(bed.node())).until(|known| known.leases.is_some()).await;
        let now: BTreeSet<Subnets> = now.leases.unwrap().leases.keys().copied().collect();
        assert_eq!(now, leases.iter().map(|lease| lease.subnets).collect());
    }
}

pub(crate) async fn silence_is_not_deletion<B: Bed>() {
    let bed = B::new(Some(CONFIG)).await;
    let node = Arc::new(bed.node());
    let lease = acquire(&*node, CONFIG, 1).await.unwrap();
    let holding = hold(&node);
    let mut follower = Follower::of(node);
    follower.leases(|leases| leases.leases.len() == 1).await;
    bed.cut().await;
    let known = follower.until(|known| known.trouble.is_some()).await;
    assert_eq!(known.leases.unwrap().leases[&lease.subnets], lease);
    bed.mend().await;
    follower.until(|known| known.trouble.is_none()).await;
    bed.put("10.3.255.0-24", &value(2), None).await;
    follower.leases(|leases| leases.leases.len() == 2).await;
    assert!(!holding.ended());
}

pub(crate) async fn a_first_listing_that_fails_is_tried_again<B: Bed>() {
    let bed = B::new(Some(CONFIG)).await;
    bed.put("10.3.8.0-24", &value(8), None).await;
    bed.cut().await;
    let node = Arc::new(bed.node());
    let mut follower = Follower::of(node.clone());
    let known = follower.until(|known| known.trouble.is_some()).await;
    assert!(known.leases.is_none());
    let error = within(node.network()).await.unwrap_err();
    assert!(matches!(error, StoreError::Unreachable { .. }), "{error}");
    assert!(matches!(acquire(&*node, CONFIG, 1).await, Err(StoreError::Unreachable { .. })));
    bed.mend().await;
    follower.leases(|leases| leases.leases.len() == 1).await;
    acquire(&*node, CONFIG, 1).await.unwrap();
}

pub(crate) async fn a_deleted_lease_is_put_back<B: Bed>() {
    let bed = B::new(Some(CONFIG)).await;
    let node = Arc::new(bed.node());
    let lease = acquire(&*node, CONFIG, 1).await.unwrap();
    let holding = hold(&node);
    let key = key(&lease);
    for _ in 0..3 {
        let before = bed.read(&key).await.unwrap();
        bed.delete(&key).await;
        let after = until(async || bed.read(&key).await).await;
        assert_eq!(before.value, after.value);
    }
    assert!(!holding.ended());
}

pub(crate) async fn a_lease_deleted_before_it_is_held_is_put_back<B: Bed>() {
    let bed = B::new(Some(CONFIG)).await;
    let node = Arc::new(bed.node());
    let lease = acquire(&*node, CONFIG, 1).await.unwrap();
    bed.delete(&key(&lease)).await;
    let _holding = hold(&node);
    until(async || bed.read(&key(&lease)).await).await;
}

/// A node that was suspended wakes up after its lease was given away, with the renewal long due.
pub(crate) async fn a_lease_given_to_another_is_lost_not_overwritten<B: Bed>() {
    let bed = B::new(Some(CONFIG)).await;
    let node = Arc::new(bed.eager_node());
    let lease = acquire(&*node, CONFIG, 1).await.unwrap();
    bed.delete(&key(&lease)).await;
    bed.put(&key(&lease), &value(2), None).await;
    let given = bed.read(&key(&lease)).await;
    let loss = hold(&node).end().await;
    assert_eq!(loss, Loss::Taken { subnets: lease.subnets, holder: public(2) });
    assert_eq!(bed.read(&key(&lease)).await, given);
    let next = acquire(&*node, CONFIG, 1).await.unwrap();
    assert_ne!(next.subnets, lease.subnets);
    assert_eq!(bed.read(&key(&lease)).await, given);
}

pub(crate) async fn a_lease_overlapped_while_away_is_lost<B: Bed>() {
    let bed = B::new(Some(CONFIG)).await;
    let node = Arc::new(bed.node());
    let lease = acquire(&*node, CONFIG, 1).await.unwrap();
    bed.delete(&key(&lease)).await;
    let wider = key(&lease).replace("-24", "-25");
    bed.put(&wider, &value(2), None).await;
    let loss = hold(&node).end().await;
    assert_eq!(loss, Loss::Taken { subnets: lease.subnets, holder: public(2) });
    assert_eq!(bed.read(&key(&lease)).await, None);
}

pub(crate) async fn a_lease_taken_while_it_is_held_is_lost<B: Bed>() {
    let bed = B::new(Some(CONFIG)).await;
    let node = Arc::new(bed.node());
    let lease = acquire(&*node, CONFIG, 1).await.unwrap();
    let mut holding = hold(&node);
    bed.put(&key(&lease), &value(2), None).await;
    assert_eq!(holding.end().await, Loss::Taken { subnets: lease.subnets, holder: public(2) });
}

pub(crate) async fn a_rewritten_lease_is_contested<B: Bed>() {
    let bed = B::new(Some(CONFIG)).await;
    let node = Arc::new(bed.eager_node());
    let lease = acquire(&*node, CONFIG, 1).await.unwrap();
    let mut holding = hold(&node);
    // Another node with the same public address takes it for its own.
    let other = acquire_with_mac(&bed.node(), 1, 99).await;
    assert_eq!(other.subnets, lease.subnets);
    assert_eq!(holding.end().await, Loss::Contested { subnets: lease.subnets, public: public(1) });
    let now = bed.read(&key(&lease)).await.unwrap();
    assert_eq!(now.value, subnet::lease::encode_value(&public(1), &vxlan(99)));
}

pub(crate) async fn a_living_twin_is_noticed_although_it_writes_the_same<B: Bed>() {
    let bed = B::new(Some(CONFIG)).await;
    let node = Arc::new(bed.node());
    let lease = acquire_with_mac(&*node, 1, 7).await;
    let mut holding = hold(&node);
    // A file tells times apart that lie a second apart, so the twin may have to try more than once.
    let twin = bed.node();
    let twinned = async {
        loop {
            assert_eq!(acquire_with_mac(&twin, 1, 7).await.subnets, lease.subnets);
            tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        }
    };
    let loss = tokio::select! {
        loss = holding.end() => loss,
        () = twinned => unreachable!("it tries for ever"),
    };
    assert_eq!(loss, Loss::Contested { subnets: lease.subnets, public: public(1) });
}

async fn acquire_with_mac(store: &impl subnet::LeaseStore, number: u16, mac: u16) -> subnet::Lease {
    let attach = |_: Option<&subnet::Lease>, _: &subnet::Leases| vxlan(mac);
    let claim = subnet::Claim::new(public(number), Subnets::default(), &attach);
    within(store.acquire(&network(CONFIG), &claim)).await.unwrap()
}

pub(crate) async fn acquiring_again_republishes_under_the_eyes_of_hold<B: Bed>() {
    let bed = B::new(Some(CONFIG)).await;
    let node = Arc::new(bed.node());
    let lease = acquire(&*node, CONFIG, 1).await.unwrap();
    let holding = hold(&node);
    let mut follower = Follower::of(node.clone());
    for mac in 50..60 {
        let again = acquire_with_mac(&*node, 1, mac).await;
        assert_eq!((again.subnets, again.created), (lease.subnets, lease.created));
        follower.leases(|leases| leases.leases.get(&lease.subnets) == Some(&again)).await;
    }
    assert!(!holding.ended());
    // It is the last attachment that hold puts back.
    let before = bed.read(&key(&lease)).await.unwrap();
    bed.delete(&key(&lease)).await;
    assert_eq!(until(async || bed.read(&key(&lease)).await).await.value, before.value);
}

pub(crate) async fn a_new_public_address_moves_the_lease<B: Bed>() {
    let bed = B::new(Some(CONFIG)).await;
    let node = Arc::new(bed.node());
    let lease = acquire(&*node, CONFIG, 1).await.unwrap();
    let holding = hold(&node);
    let moved = acquire(&*node, CONFIG, 2).await.unwrap();
    assert_eq!((moved.subnets, moved.created), (lease.subnets, lease.created));
    assert_eq!(bed.read(&key(&lease)).await.unwrap().value, value(2));
    bed.delete(&key(&lease)).await;
    assert_eq!(until(async || bed.read(&key(&lease)).await).await.value, value(2));
    assert!(!holding.ended());
}

pub(crate) async fn the_previous_subnet_is_taken_again<B: Bed>() {
    let bed = B::new(Some(CONFIG)).await;
    let previous = subnets("10.3.77.0/24");
    let lease = acquire_after(&bed.node(), CONFIG, 1, previous).await.unwrap();
    assert_eq!(lease.subnets, previous);
    // Not by another, not outside the network, and not against the lease that the node has.
    for (number, previous) in [(2, "10.3.77.0/24"), (3, "10.4.1.0/24"), (4, "10.3.1.0/25")] {
        let lease = acquire_after(&bed.node(), CONFIG, number, subnets(previous)).await.unwrap();
        assert!(network(CONFIG).allows(&lease.subnets) && lease.subnets != subnets(previous), "{lease}");
    }
    let lease = acquire_after(&bed.node(), CONFIG, 1, subnets("10.3.99.0/24")).await.unwrap();
    assert_eq!(lease.subnets, previous);
}

pub(crate) async fn an_own_lease_that_fits_in_part_is_replaced<B: Bed>() {
    let bed = B::new(Some(CONFIG)).await;
    let old = "10.3.7.0-24&fd00:3:0:7::-64";
    bed.put(old, &value(1), None).await;
    let node = bed.node();
    let lease = acquire(&node, CONFIG, 1).await.unwrap();
    assert_eq!(lease.subnets, subnets("10.3.7.0/24"));
    assert_eq!(bed.read(old).await, None);
    // The listing of `acquire`, which `follow` begins with, knows it too.
    let mut follower = Follower::of(Arc::new(node));
    let now = follower.until(|known| known.leases.is_some()).await.leases.unwrap();
    assert_eq!(now.leases.values().collect::<Vec<_>>(), [&lease]);
}

pub(crate) async fn a_full_network_says_so<B: Bed>() {
    let config =
        r#"{"Network":"10.3.0.0/24","SubnetLen":26,"SubnetMin":"10.3.0.64","Backend":{"Type":"vxlan"}}"#;
    let bed = B::new(Some(config)).await;
    for number in 1..4 {
        acquire(&bed.node(), config, number).await.unwrap();
    }
    let node = bed.node();
    let error = acquire(&node, config, 4).await.unwrap_err();
    assert!(
        error
            .to_string()
            .contains("every /26 of 10.3.0.0/24 from SubnetMin 10.3.0.64 to SubnetMax 10.3.0.192 is leased"),
        "{error}"
    );
    // A node whose own lease does not fit any more can have its place all the same.
    let halved = config.replace(":26", ":27");
    let lease = acquire(&bed.node(), &halved, 2).await.unwrap();
    assert!(network(&halved).allows(&lease.subnets), "{lease}");
    // What it gave up is free for others.
    acquire(&bed.node(), &halved, 5).await.unwrap();
    let error = acquire(&node, &halved, 6).await.unwrap_err();
    assert!(matches!(&error, StoreError::Exhausted { ranges } if ranges.contains("every /27 ")), "{error}");
}

pub(crate) async fn malformed_entries_disturb_nobody<B: Bed>() {
    let bed = B::new(Some(CONFIG)).await;
    bed.put("10.3.1.0-24", &value(1), None).await;
    let node = Arc::new(bed.node());
    let mut follower = Follower::of(node.clone());
    let good = follower.leases(|leases| leases.leases.len() == 1).await;
    for (key, value) in [
        ("10.3.2.0-24", "{"),
        ("10.3.3.0-24", ""),
        ("10.3.5.7-24", r#"{"PublicIP":"192.0.2.9"}"#),
        ("nonsense", r#"{"PublicIP":"192.0.2.9"}"#),
        ("10.3.4.0-24", r#"{"PublicIP":"192.0.2.300"}"#),
    ] {
        bed.put(key, value, None).await;
    }
    let leases = follower.leases(|leases| leases.malformed.len() == 5).await;
    assert_eq!(leases.leases, good.leases);
    assert!(leases.malformed["10.3.4.0-24"].why.contains("192.0.2.300"));
    let lease = acquire(&*node, CONFIG, 2).await.unwrap();
    assert!(!leases.taken().any(|taken| taken.overlaps(&lease.subnets)), "{lease}");
    for key in leases.malformed.keys() {
        bed.delete(key).await;
    }
    follower.leases(|leases| leases.malformed.is_empty() && leases.leases.len() == 2).await;
}

pub(crate) async fn an_own_lease_that_was_damaged_is_restored<B: Bed>() {
    let bed = B::new(Some(CONFIG)).await;
    let node = Arc::new(bed.node());
    let lease = acquire(&*node, CONFIG, 1).await.unwrap();
    let holding = hold(&node);
    bed.put(&key(&lease), "damaged", None).await;
    until(async || bed.read(&key(&lease)).await.filter(|entry| entry.value == value(1))).await;
    assert!(!holding.ended());
}

pub(crate) async fn a_bad_configuration_is_named<B: Bed>() {
    let bed = B::new(Some(r#"{"Network":"10.3.0.0/33"}"#)).await;
    let error = within(bed.node().network()).await.unwrap_err();
    assert!(matches!(error, StoreError::BadConfig { .. }), "{error}");
    assert!(error.to_string().contains("10.3.0.0/33"), "{error}");
}

pub(crate) async fn the_configuration_is_read<B: Bed>() {
    let bed = B::new(Some(CONFIG)).await;
    assert_eq!(within(bed.node().network()).await.unwrap(), network(CONFIG));
}

pub(crate) async fn a_missing_configuration_says_where<B: Bed>() {
    let bed = B::new(None).await;
    let error = within(bed.node().network()).await.unwrap_err();
    let StoreError::NoConfig { at } = &error else { panic!("{error}") };
    assert!(at.contains("config"), "{error}");
}

pub(crate) async fn a_lease_is_renewed_in_time<B: Bed>() {
    let bed = B::new(Some(CONFIG)).await;
    let node = Arc::new(bed.eager_node());
    let lease = acquire(&*node, CONFIG, 1).await.unwrap();
    let first = bed.read(&key(&lease)).await.unwrap();
    let holding = hold(&node);
    let mut version = first.version;
    for _ in 0..2 {
        let next =
            until(async || bed.read(&key(&lease)).await.filter(|entry| entry.version != version)).await;
        assert_eq!(next.value, first.value);
        let ttl = next.ttl.unwrap().as_secs();
        assert!((86_390..=86_410).contains(&ttl), "{ttl}");
        version = next.version;
    }
    assert!(!holding.ended());
}

pub(crate) async fn a_reservation_stays_without_time_to_live<B: Bed>() {
    let bed = B::new(Some(CONFIG)).await;
    bed.put("10.3.44.0-24", r#"{"PublicIP":"192.0.0.1"}"#, None).await;
    let (reserved, ordinary) = (Arc::new(bed.eager_node()), Arc::new(bed.eager_node()));
    let lease = acquire(&*reserved, CONFIG, 1).await.unwrap();
    assert_eq!(lease.subnets, subnets("10.3.44.0/24"));
    let before = bed.read("10.3.44.0-24").await.unwrap();
    assert_eq!((before.ttl, before.value.as_str()), (None, value(1).as_str()));
    let other = acquire(&*ordinary, CONFIG, 2).await.unwrap();
    let _holding = (hold(&reserved), hold(&ordinary));
    // In the time in which an ordinary lease is renewed twice, nothing happens to the reservation.
    let mut version = bed.read(&key(&other)).await.unwrap().version;
    for _ in 0..2 {
        let changed =
            until(async || bed.read(&key(&other)).await.filter(|entry| entry.version != version)).await;
        version = changed.version;
    }
    assert_eq!(bed.read("10.3.44.0-24").await, Some(before.clone()));
    // An ordinary lease that an operator turns into a reservation is left alone from then on.
    bed.put(&key(&other), &value(2), None).await;
    let now = bed.read(&key(&other)).await.unwrap();
    let third = Arc::new(bed.eager_node());
    let lease = acquire(&*third, CONFIG, 3).await.unwrap();
    let _third = hold(&third);
    let mut version = bed.read(&key(&lease)).await.unwrap().version;
    for _ in 0..3 {
        let changed =
            until(async || bed.read(&key(&lease)).await.filter(|entry| entry.version != version)).await;
        version = changed.version;
    }
    assert_eq!(bed.read(&key(&other)).await, Some(now));
}

pub(crate) async fn two_nodes_with_one_public_address_never_get_two_leases<B: Bed>() {
    for _ in 0..10 {
        let bed = B::new(Some(CONFIG)).await;
        let (one, other) = (bed.node(), bed.node());
        let (one, other) = tokio::join!(acquire(&one, CONFIG, 1), acquire(&other, CONFIG, 1));
        assert_eq!(one.unwrap().subnets, other.unwrap().subnets);
    }
}
