//! Leases of one family, of the other and of both, and networks that gain, lose or move one.

use std::sync::Arc;
use std::time::Duration;

use subnet::{Family, Lease, Loss, Subnets};

use super::bed::Bed;
use super::nodes::{
    Follower, Running, acquire, acquire_beside, hold, key, network, public, public_v6, public_with_v6,
    subnets, until, value, value_of,
};
use super::sentences::CONFIG;

/// The subnets that a key of both families names.
fn subnets_of(key: &str) -> Subnets {
    subnet::lease::parse_key(key).unwrap()
}

pub(crate) const V6: &str =
    r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:3::/48","Backend":{"Type":"vxlan"}}"#;
const BOTH: &str =
    r#"{"Network":"10.3.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:3::/48","Backend":{"Type":"vxlan"}}"#;

pub(crate) async fn a_v6_only_lease_is_obtained_and_found_again<B: Bed>() {
    let bed = B::new(Some(V6)).await;
    let node = Arc::new(bed.node());
    let lease = acquire(&*node, V6, 1).await.unwrap();
    assert!(network(V6).allows(&lease.subnets), "{lease}");
    assert!(key(&lease).starts_with("0.0.0.0-0&fd00:3:0:"), "{}", key(&lease));
    let entry = bed.read(&key(&lease)).await.unwrap();
    assert!(entry.value.starts_with(r#"{"PublicIP":"0.0.0.0","PublicIPv6":"2001:db8::1","#), "{entry:?}");
    let other = acquire(&bed.node(), V6, 2).await.unwrap();
    assert!(!other.subnets.overlaps(&lease.subnets));
    assert_eq!(acquire(&bed.node(), V6, 1).await.unwrap(), lease, "after a restart");
    let mut follower = Follower::of(Arc::new(bed.node()));
    let seen = follower.leases(|leases| leases.leases.len() == 2).await;
    assert_eq!((&seen.leases[&lease.subnets], &seen.leases[&other.subnets]), (&lease, &other));
    assert!(seen.malformed.is_empty());
}

pub(crate) async fn a_v6_only_lease_is_put_back_and_lost_like_any_other<B: Bed>() {
    let bed = B::new(Some(V6)).await;
    let node = Arc::new(bed.node());
    let lease = acquire(&*node, V6, 1).await.unwrap();
    let mut holding = hold(&node);
    bed.delete(&key(&lease)).await;
    until(async || bed.read(&key(&lease)).await).await;
    assert!(!holding.ended());
    bed.put(&key(&lease), &value_of(public_v6(2), 2), None).await;
    assert_eq!(holding.end().await, Loss::Taken { subnets: lease.subnets, holder: public_v6(2) });

    let lease = acquire(&*node, V6, 1).await.unwrap();
    let mut holding = hold(&node);
    bed.put(&key(&lease), &value_of(public_v6(1), 99), None).await;
    assert_eq!(holding.end().await, Loss::Contested { subnets: lease.subnets, public: public_v6(1) });
}

pub(crate) async fn a_v6_only_lease_expires<B: Bed>() {
    let bed = B::new(Some(V6)).await;
    let at = "0.0.0.0-0&fd00:3:0:7::-64";
    bed.put(at, &value_of(public_v6(7), 7), Some(Duration::from_secs(2))).await;
    let mut follower = Follower::of(Arc::new(bed.node()));
    follower.leases(|leases| leases.leases.contains_key(&subnets("fd00:3:0:7::/64"))).await;
    follower.leases(|leases| leases.leases.is_empty()).await;
    assert_eq!(bed.read(at).await, None);
}

/// Looks at every snapshot until it ends: the node is in each of them, once.
fn always_once<B: Bed>(bed: &B, number: u16) -> Running<()> {
    let mut follower = Follower::of(Arc::new(bed.node()));
    Running(tokio::spawn(async move {
        loop {
            let all = follower.next().await;
            let Some(leases) = all.leases else { continue };
            let of: Vec<&Lease> = leases.by_public(&public(number)).collect();
            assert_eq!(of.len(), 1, "{of:?}");
        }
    }))
}

pub(crate) async fn ipv6_added_or_removed_keeps_the_ipv4_subnet_and_nobody_sees_the_node_missing_or_twice<
    B: Bed,
>() {
    let bed = B::new(Some(CONFIG)).await;
    bed.put("10.3.200.0-24", &value(2), None).await;
    let node = Arc::new(bed.node());
    let first = acquire(&*node, CONFIG, 1).await.unwrap();
    let (holding, watching) = (hold(&node), always_once(&bed, 1));
    let mut follower = Follower::of(node.clone());
    follower.leases(|leases| leases.leases.contains_key(&first.subnets)).await;
    let mut old = first.clone();
    for round in 0..6 {
        let config = if round % 2 == 0 { BOTH } else { CONFIG };
        let now = acquire(&*node, config, 1).await.unwrap();
        assert!(network(config).allows(&now.subnets), "{now}");
        assert_eq!((now.subnets.v4, now.public), (first.subnets.v4, first.public), "{now}");
        assert_eq!(bed.read(&key(&old)).await, None);
        let all = follower.leases(|leases| leases.leases.contains_key(&now.subnets)).await;
        assert_eq!(all.leases.len(), 2, "{all:?}");
        old = now;
    }
    assert!(!holding.ended() && !watching.ended());
    // What is held now is put back as it is.
    drop(watching);
    bed.delete(&key(&old)).await;
    until(async || bed.read(&key(&old)).await).await;
    assert!(!holding.ended());
}

/// By a node that was stopped meanwhile, and so holds nothing.
pub(crate) async fn a_family_added_while_a_node_is_away_is_added_to_its_lease<B: Bed>() {
    let bed = B::new(Some(CONFIG)).await;
    let v4 = acquire(&bed.node(), CONFIG, 1).await.unwrap();
    let both = acquire(&bed.node(), BOTH, 1).await.unwrap();
    assert_eq!((both.subnets.v4, bed.read(&key(&v4)).await), (v4.subnets.v4, None));
    // It has an IPv6 address by now, without which it would not be recognised where there is no IPv4.
    bed.put(&key(&both), &value_of(public_with_v6(1), 1), None).await;
    let v6 = acquire(&bed.node(), V6, 1).await.unwrap();
    assert_eq!((v6.subnets.v4, v6.subnets.v6), (None, both.subnets.v6));
    assert_eq!(bed.read(&key(&both)).await, None);
}

pub(crate) async fn nodes_that_all_gain_ipv6_at_once_keep_ipv4_and_never_share<B: Bed>() {
    let few = BOTH.replace("fd00:3::/48", "fd00:3::/59");
    let bed = B::new(Some(CONFIG)).await;
    let mut nodes = Vec::new();
    for number in 0..20 {
        let node = bed.node();
        let lease = acquire(&node, CONFIG, number).await.unwrap();
        nodes.push((number, node, lease));
    }
    let mut tasks = tokio::task::JoinSet::new();
    for (number, node, before) in nodes {
        let few = few.clone();
        tasks.spawn(async move { (before, acquire(&node, &few, number).await.unwrap()) });
    }
    let moved = super::nodes::within(tasks.join_all()).await;
    for (before, now) in &moved {
        assert_eq!(before.subnets.v4, now.subnets.v4);
        assert!(network(&few).allows(&now.subnets), "{now}");
    }
    for (i, (_, one)) in moved.iter().enumerate() {
        assert!(moved[..i].iter().all(|(_, other)| !one.subnets.overlaps(&other.subnets)), "{one}");
    }
    let known = Follower::of(Arc::new(bed.node())).until(|known| known.leases.is_some()).await;
    let now: Vec<Subnets> = known.leases.unwrap().leases.keys().copied().collect();
    assert_eq!(now.len(), moved.len(), "nothing is left of the races");
}

pub(crate) async fn a_network_that_grows_keeps_the_lease<B: Bed>() {
    let bed = B::new(Some(CONFIG)).await;
    let node = bed.node();
    let lease = acquire(&node, CONFIG, 1).await.unwrap();
    let grown = CONFIG.replace("10.3.0.0/16", "10.2.0.0/15");
    assert_eq!(acquire(&node, &grown, 1).await.unwrap(), lease);
    assert_eq!(acquire(&bed.node(), &grown, 1).await.unwrap(), lease);
}

pub(crate) async fn a_network_that_moves_gives_a_new_subnet_and_leaves_the_old_lease<B: Bed>() {
    let bed = B::new(Some(CONFIG)).await;
    let node = Arc::new(bed.node());
    let old = acquire(&*node, CONFIG, 1).await.unwrap();
    let holding = hold(&node);
    let before = bed.read(&key(&old)).await.unwrap();
    let moved = CONFIG.replace("10.3.", "10.9.");
    let new = acquire(&*node, &moved, 1).await.unwrap();
    assert!(network(&moved).allows(&new.subnets), "{new}");
    assert_eq!(bed.read(&key(&old)).await.unwrap().version, before.version, "pods still use it");
    let mut follower = Follower::of(node.clone());
    follower.leases(|leases| leases.leases.len() == 2).await;
    // A restart finds the one that fits, and so does a network that moves back.
    assert_eq!(acquire(&bed.node(), &moved, 1).await.unwrap(), new);
    assert_eq!(acquire(&bed.node(), CONFIG, 1).await.unwrap().subnets, old.subnets);
    assert_eq!(acquire(&*node, &moved, 1).await.unwrap().subnets, new.subnets);
    let _ = holding;
}

/// Go flannel reads no lease of IPv6 alone, and one of IPv4 alone ends a Go node that looks for both families.
pub(crate) async fn a_family_that_moves_keeps_the_other_one_and_leaves_the_old_lease_whole<B: Bed>() {
    for (moved, stays) in
        [(BOTH.replace("10.3.", "10.9."), Family::V6), (BOTH.replace("fd00:3::", "fd00:9::"), Family::V4)]
    {
        let bed = B::new(Some(BOTH)).await;
        let node = Arc::new(bed.node());
        let old = acquire_beside(&*node, BOTH, 1, &[]).await.unwrap();
        let before = bed.read(&key(&old)).await.unwrap();
        let holding = hold(&node);
        let mut follower = Follower::of(Arc::new(bed.node()));
        follower.leases(|leases| leases.leases.contains_key(&old.subnets)).await;
        let new = acquire_beside(&*node, &moved, 1, &[]).await.unwrap();
        assert!(network(&moved).allows(&new.subnets), "{new}");
        assert_eq!(new.subnets.get(stays), old.subnets.get(stays), "the other family stays");
        assert_eq!(bed.read(&key(&old)).await.unwrap().version, before.version, "pods still use it");
        let all = follower.leases(|leases| leases.leases.contains_key(&new.subnets)).await;
        assert_eq!(all.leases.keys().copied().collect::<Vec<_>>().len(), 2, "{all:?}");
        // What is held is the new one, which is put back.
        bed.delete(&key(&new)).await;
        until(async || bed.read(&key(&new)).await).await;
        assert!(!holding.ended(), "this node's own old lease is no rival");
        assert!(bed.read(&key(&old)).await.is_some());
        // A network that moves back finds the old one, and one that moves again the new one.
        assert_eq!(acquire_beside(&*node, BOTH, 1, &[]).await.unwrap().subnets, old.subnets);
        assert_eq!(acquire_beside(&*node, &moved, 1, &[]).await.unwrap().subnets, new.subnets);
        assert!(!holding.ended());
        drop(holding);
        assert_eq!(
            acquire_beside(&bed.node(), &moved, 1, &[]).await.unwrap().subnets,
            new.subnets,
            "after a restart"
        );
    }
}

pub(crate) async fn a_lease_that_the_network_moved_away_from_is_renewed_while_pods_are_in_it<B: Bed>() {
    for moved in [
        BOTH.replace("10.3.", "10.9."),
        BOTH.replace("fd00:3::", "fd00:9::"),
        BOTH.replace("10.3.", "10.9.").replace("fd00:3::", "fd00:9::"),
    ] {
        let bed = B::new(Some(BOTH)).await;
        let (old, ttl) = ("10.3.7.0-24&fd00:3:0:7::-64", Some(Duration::from_secs(600)));
        bed.put(old, &value_of(public_with_v6(1), 99), ttl).await;
        let (strange, theirs) = ("10.3.8.0-24&fd00:3:0:8::-64", value_of(public_with_v6(2), 2));
        bed.put(strange, &theirs, ttl).await;
        let node = Arc::new(bed.node());
        let new = acquire_beside(&*node, &moved, 1, &[]).await.unwrap();
        let left: Vec<_> =
            subnets_of(old).iter().filter(|old| !new.subnets.iter().any(|new| new == *old)).collect();
        // Another node's subnet is not this node's, with any value.
        let all: Vec<_> = left.iter().copied().chain(subnets_of(strange).iter()).collect();
        assert_eq!(acquire_beside(&*node, &moved, 1, &all).await.unwrap().subnets, new.subnets);
        let entry = bed.read(old).await.unwrap();
        assert_eq!(entry.value, value_of(public_with_v6(1), 1), "as this node announces itself now");
        assert!(entry.ttl.is_none_or(|ttl| ttl > Duration::from_secs(80_000)), "{:?}", entry.ttl);
        let entry = bed.read(strange).await.unwrap();
        assert!(
            entry.value.starts_with(theirs.trim_end_matches('}'))
                && entry.ttl.is_none_or(|ttl| ttl < Duration::from_secs(601)),
            "{entry:?}"
        );
        // Of two leases with one subnet the current one is written last.
        let mut follower = Follower::of(Arc::new(bed.node()));
        let all = follower.leases(|leases| leases.leases.len() == 3).await;
        let old = &all.leases[&subnets_of(old)];
        assert!(
            (old.written, old.created) < (all.leases[&new.subnets].written, all.leases[&new.subnets].created)
        );
    }
}

pub(crate) async fn a_v4_only_peer_and_a_dual_peer_live_side_by_side<B: Bed>() {
    let bed = B::new(Some(BOTH)).await;
    let one = acquire(&bed.node(), CONFIG, 1).await.unwrap();
    let two = acquire(&bed.node(), BOTH, 2).await.unwrap();
    let three = acquire(&bed.node(), V6, 3).await.unwrap();
    let families = |lease: &Lease| Family::BOTH.map(|family| lease.subnets.get(family).is_some());
    assert_eq!([&one, &two, &three].map(families), [[true, false], [true, true], [false, true]]);
    assert!(!two.subnets.overlaps(&one.subnets) && !two.subnets.overlaps(&three.subnets));
    let mut follower = Follower::of(Arc::new(bed.node()));
    let all = follower.leases(|leases| leases.leases.len() == 3).await;
    for lease in [one, two, three] {
        assert_eq!(all.leases[&lease.subnets], lease);
    }
}

pub(crate) async fn a_reservation_that_gains_a_family_stays_one<B: Bed>() {
    let bed = B::new(Some(CONFIG)).await;
    bed.put("10.3.44.0-24", &value(1), None).await;
    let node = Arc::new(bed.eager_node());
    let lease = acquire(&*node, BOTH, 1).await.unwrap();
    assert_eq!(lease.subnets.v4, subnets("10.3.44.0/24").v4);
    assert_eq!(bed.read(&key(&lease)).await.unwrap().ttl, None);
    assert_eq!(bed.read("10.3.44.0-24").await, None);
}
