//! Following all leases through failures of the server and of the connection.

use std::time::Duration;

use serde_json::json;
use subnet::testing::{Refusal, announced, node};
use subnet::{Family, Known, Lease, LeaseStore, Leases};

use crate::bed::{
    Bed, DUAL, Follower, MAC, PREFIX, VXLAN, acquire, acquire_v4, not_while, poll, public, vxlan,
};

/// The MAC of the node with this number.
pub(crate) fn mac(number: usize) -> String {
    format!("02:00:00:00:{:02x}:{:02x}", number / 256, number % 256)
}

/// A node with this number, announced.
pub(crate) fn peer(number: usize) -> serde_json::Value {
    let cidr = format!("10.{}.{}.{}/28", 244 + number / 4096, number / 16 % 256, number % 16 * 16);
    let public = format!("198.51.{}.{}", number / 250, number % 250 + 1);
    announced(node(&format!("p{number:04}"), &[&cidr]), &public, &mac(number))
}

pub(crate) fn peers(bed: &Bed, count: usize) {
    (0..count).for_each(|number| bed.server.put_node(peer(number)));
}

#[tokio::test]
async fn all_managed_nodes_are_followed_and_the_own_one_is_among_them() {
    let bed = Bed::new(VXLAN);
    bed.server.put_node(node("n1", &["10.244.200.0/24"]));
    bed.server.put_node(node("unmanaged", &["10.244.201.0/24"]));
    peers(&bed, 2);
    let store = bed.store("n1").await;
    let own = acquire_v4(&store, 1).await;
    let mut follower = Follower::of(&store);
    assert_eq!(
        follower.words(3).await,
        [
            "10.244.0.0/28 of 198.51.0.1 (vxlan)",
            "10.244.0.16/28 of 198.51.0.2 (vxlan)",
            "10.244.200.0/24 of 192.0.2.1 (vxlan)"
        ]
    );
    let known = follower.known.borrow().clone();
    let leases = known.leases.unwrap();
    assert_eq!(leases.leases[&own.subnets], own);
    assert!(leases.malformed.is_empty(), "{:?}", leases.malformed);

    bed.server.put_node(peer(2));
    follower.words(4).await;
    bed.annotate("p0001", "public-ip", Some("203.0.113.1"));
    follower
        .leases("a new address", |all| {
            all.leases.values().any(|lease| lease.public == public("203.0.113.1", ""))
        })
        .await;
    bed.annotate("p0001", "kube-subnet-manager", None);
    follower.words(3).await;
    bed.server.delete_node("p0002");
    follower.words(2).await;
}

#[tokio::test]
async fn a_snapshot_is_never_partial() {
    let bed = Bed::new(VXLAN);
    peers(&bed, 20);
    bed.server.behave(|behaviour| behaviour.lists_stop_after = Some(7));
    let store = bed.store("p0000").await;
    let mut follower = Follower::of(&store);
    let mut known = follower.known.clone();
    not_while("a snapshot before the list is complete", known.changed(), async {
        poll("a list", || bed.server.requests().iter().any(|request| request.path.contains("limit=500")))
            .await;
        for _ in 0..20 {
            store.node_public().await.unwrap();
        }
    })
    .await;
    bed.server.behave(|behaviour| behaviour.lists_stop_after = None);
    let first = follower.until("a snapshot", |known| known.leases.is_some()).await;
    assert_eq!(first.leases.unwrap().leases.len(), 20);
}

#[tokio::test]
async fn a_list_in_pages_is_read_to_its_end() {
    let bed = Bed::new(VXLAN);
    peers(&bed, 20);
    bed.server.behave(|behaviour| {
        behaviour.always_pages = true;
        behaviour.largest_page = Some(3);
    });
    let mut follower = Follower::of(&bed.store("p0000").await);
    follower.words(20).await;
    let pages = bed.server.requests().iter().filter(|request| request.path.contains("continue=")).count();
    assert_eq!(pages, 6);
}

#[tokio::test]
async fn a_list_that_can_not_be_continued_is_read_in_one_piece() {
    let bed = Bed::new(VXLAN);
    peers(&bed, 20);
    bed.server.behave(|behaviour| {
        behaviour.always_pages = true;
        behaviour.largest_page = Some(5);
        behaviour.lists_stop_after = Some(4);
    });
    let mut follower = Follower::of(&bed.store("p0000").await);
    poll("the first page", || bed.server.requests().iter().any(|request| request.path.contains("limit=500")))
        .await;
    bed.server.compact();
    bed.server.behave(|behaviour| behaviour.lists_stop_after = None);
    follower.words(20).await;
    let paths: Vec<String> = bed.server.requests().into_iter().map(|request| request.path).collect();
    assert!(paths[1].contains("continue=") && paths[2] == "/api/v1/nodes", "{paths:?}");
}

#[tokio::test]
async fn heartbeats_wake_nobody() {
    let bed = Bed::new(VXLAN);
    peers(&bed, 30);
    let mut follower = Follower::of(&bed.store("p0000").await);
    follower.words(30).await;
    poll("a watch", || bed.server.watching() == 1).await;
    follower.known.mark_unchanged();
    for _ in 0..5 {
        bed.server.names().iter().for_each(|name| bed.server.heartbeat(name));
    }
    bed.annotate("p0007", "public-ip", Some("203.0.113.7"));
    crate::bed::soon("news", follower.known.changed()).await.unwrap();
    let leases = follower.known.borrow().leases.clone().unwrap();
    let changed = leases.leases.values().filter(|lease| lease.public == public("203.0.113.7", "")).count();
    assert_eq!(changed, 1, "the first news is the change, after 150 heartbeats");
}

/// Heartbeats in quick succession, so that the watch is read late, and changes among them and after them.
pub(crate) async fn changes_among_heartbeats_are_seen(bed: &Bed, follower: &mut Follower) {
    for round in 0..5 {
        for beat in 0..40 {
            bed.server.heartbeat(&format!("p{:04}", beat % 20));
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let address = format!("203.0.113.{}", round + 1);
        bed.annotate(&format!("p{round:04}"), "public-ip", Some(&address));
        if round % 2 == 0 {
            // It is seen although nothing follows.
            let seen = |all: &Leases| all.leases.values().any(|lease| lease.public == public(&address, ""));
            follower.leases("a change after many heartbeats", seen).await;
        }
    }
    follower
        .leases("all changes", |all| {
            let changed = |lease: &&Lease| lease.public.to_string().starts_with("203.0.113.");
            all.leases.len() == 20 && all.leases.values().filter(changed).count() == 5
        })
        .await;
}

#[tokio::test]
async fn changes_among_many_heartbeats_are_seen_and_the_watch_is_one() {
    let bed = Bed::new(VXLAN);
    peers(&bed, 20);
    let mut follower = Follower::of(&bed.store("p0019").await);
    follower.words(20).await;
    poll("a watch", || bed.server.watching() == 1).await;
    changes_among_heartbeats_are_seen(&bed, &mut follower).await;
    let requests = bed.server.requests();
    assert_eq!(requests.iter().filter(|request| request.path.contains("limit=")).count(), 1, "{requests:?}");
    // The end of a busy watch is heard, and the next one goes on from there.
    bed.server.heartbeat("p0007");
    bed.server.disconnect();
    bed.annotate("p0007", "public-ip", Some("203.0.113.7"));
    follower
        .leases("a change after the end of a watch", |all| {
            all.leases.values().any(|lease| lease.public == public("203.0.113.7", ""))
        })
        .await;
}

#[tokio::test]
async fn a_server_that_is_away_is_trouble_and_deletes_nothing() {
    let bed = Bed::new(VXLAN);
    peers(&bed, 3);
    let mut follower = Follower::of(&bed.store("p0000").await);
    follower.words(3).await;
    bed.server.behave(|behaviour| behaviour.down = true);
    bed.server.delete_node("p0001");
    let known = follower.until("trouble", |known| known.trouble.is_some()).await;
    assert!(known.trouble.unwrap().contains(&bed.server.url()));
    assert_eq!(known.leases.unwrap().leases.len(), 3);
    bed.server.behave(|behaviour| behaviour.down = false);
    let gone = |known: &Known| known.leases.as_ref().is_some_and(|all| all.leases.len() == 2);
    let known = follower.until("the deletion", gone).await;
    assert_eq!(known.trouble, None, "a list that succeeds ends the trouble at once");
}

#[tokio::test]
async fn a_first_list_that_fails_is_tried_again() {
    let bed = Bed::new(VXLAN);
    peers(&bed, 3);
    let refusal = Refusal { method: "GET", path: "/nodes".into(), status: 500, message: "not yet".into() };
    bed.server.behave(|behaviour| behaviour.refusals = vec![refusal]);
    let mut follower = Follower::of(&bed.store("p0000").await);
    let known = follower.until("trouble", |known| known.trouble.is_some()).await;
    assert!(known.leases.is_none());
    bed.server.behave(|behaviour| behaviour.refusals.clear());
    follower.words(3).await;
    follower.until("no trouble", |known| known.trouble.is_none()).await;
}

#[tokio::test]
async fn what_happens_while_the_watch_is_broken_is_seen_afterwards() {
    let bed = Bed::new(VXLAN);
    peers(&bed, 4);
    let mut follower = Follower::of(&bed.store("p0000").await);
    follower.words(4).await;
    for compacted in [false, true] {
        bed.server.behave(|behaviour| behaviour.down = true);
        bed.server.delete_node("p0001");
        bed.server.put_node(peer(1));
        bed.annotate("p0001", "backend-data", Some(r#"{"VNI":1,"VtepMAC":"02:00:00:00:99:99"}"#));
        bed.server.delete_node("p0002");
        if compacted {
            bed.server.compact();
        }
        bed.server.behave(|behaviour| behaviour.down = false);
        // Some of it may still be heard on the old connection, so three leases alone say little.
        let is_new = |all: &subnet::Leases| {
            let mut macs = all.leases.values().filter_map(|lease| lease.attachment.vtep(Family::V4));
            macs.any(|vtep| vtep.mac.to_string() == "02:00:00:00:99:99")
        };
        follower.leases("three leases", |all| all.leases.len() == 3 && is_new(all)).await;
        bed.server.put_node(peer(1));
        bed.server.put_node(peer(2));
        follower.words(4).await;
    }
}

#[tokio::test]
async fn a_server_that_lost_its_newest_versions_is_listed_as_it_is() {
    let bed = Bed::new(VXLAN);
    peers(&bed, 4);
    let mut follower = Follower::of(&bed.store("p0000").await);
    follower.words(4).await;
    let refusal = Refusal {
        method: "GET",
        path: "NotOlderThan".into(),
        status: 504,
        message: "Too large resource version".into(),
    };
    bed.server.behave(|behaviour| {
        behaviour.refusals = vec![refusal];
        behaviour.down = true;
    });
    bed.server.delete_node("p0003");
    bed.server.compact();
    bed.server.behave(|behaviour| behaviour.down = false);
    follower.words(3).await;
    follower.until("no trouble", |known| known.trouble.is_none()).await;
}

#[tokio::test]
async fn a_watch_that_died_silently_is_replaced() {
    let bed = Bed::new(VXLAN);
    peers(&bed, 2);
    let mut follower = Follower::of(&bed.store("p0000").await);
    follower.words(2).await;
    poll("a watch", || bed.server.watching() == 1).await;
    bed.server.put_node(peer(2));
    follower.words(3).await;
    bed.server.deafen();
    bed.server.put_node(peer(3));
    // Longer than a living watch is ever silent. Only the client's clock is moved.
    tokio::time::pause();
    tokio::time::advance(std::time::Duration::from_secs(151)).await;
    tokio::time::resume();
    follower.words(4).await;
    assert!(follower.known.borrow().trouble.is_none());
}

#[tokio::test]
async fn a_bookmark_is_where_an_idle_watch_goes_on() {
    let bed = Bed::new(VXLAN);
    peers(&bed, 2);
    bed.server.behave(|behaviour| {
        behaviour.bookmark_every = Some(std::time::Duration::from_millis(20));
        behaviour.watches_end_after = Some(std::time::Duration::from_millis(200));
    });
    let mut follower = Follower::of(&bed.store("p0000").await);
    follower.words(2).await;
    // Something that only bookmarks tell of to who watches nodes.
    bed.server.put_pod("default", "pod", "p0001");
    let version = format!("resourceVersion={}", bed.server.version());
    let watched = |path: &str| path.contains("watch=true") && path.contains(&version);
    poll("a watch from there", || bed.server.requests().iter().any(|request| watched(&request.path))).await;
    bed.server.compact();
    bed.server.disconnect();
    bed.server.put_node(peer(2));
    follower.words(3).await;
    let listed = bed.server.requests().iter().filter(|request| request.path.contains("limit=500")).count();
    assert_eq!(listed, 1);
    assert!(follower.known.borrow().trouble.is_none(), "the end of a watch is no trouble");
}

#[tokio::test]
async fn where_a_watch_is_answered_with_something_else_nodes_are_listed_again_and_again() {
    let bed = Bed::new(VXLAN);
    peers(&bed, 2);
    // As the edge proxy of KubeEdge does it: 200, and a Status.
    let refusal =
        Refusal { method: "GET", path: "watch=true".into(), status: 200, message: "no watch here".into() };
    bed.server.behave(|behaviour| behaviour.refusals = vec![refusal]);
    let mut follower = Follower::of(&bed.store("p0000").await);
    follower.words(2).await;
    for number in [2, 3] {
        bed.server.put_node(peer(number));
        follower.words(number + 1).await;
    }
    let known = follower.until("a word about it", |known| known.trouble.is_some()).await;
    assert!(known.trouble.unwrap().contains("answers a watch with something else"));
    bed.server.behave(|behaviour| behaviour.refusals.clear());
    bed.server.put_node(peer(4));
    let known = follower.until("a watch", |known| known.trouble.is_none()).await;
    assert!(known.leases.unwrap().leases.len() >= 4);
    follower.words(5).await;
}

#[tokio::test]
async fn a_node_whose_annotations_stay_away_is_dropped_after_a_moment() {
    let bed = Bed::new(VXLAN);
    peers(&bed, 2);
    let mut follower = Follower::of(&bed.store("p0000").await);
    follower.words(2).await;
    bed.annotate("p0001", "kube-subnet-manager", None);
    follower.words(1).await;
    bed.annotate("p0001", "kube-subnet-manager", Some("true"));
    follower.words(2).await;
}

#[tokio::test]
async fn nodes_that_cannot_be_used_are_reported_by_name_and_disturb_nobody() {
    let bed = Bed::new(DUAL);
    peers(&bed, 2);
    let managed = |name: &str, cidrs: &[&str], key: &str, value: &str| {
        let mut bad = announced(node(name, cidrs), "198.51.100.9", MAC);
        bad["metadata"]["annotations"][format!("flannel.alpha.coreos.com/{key}")] = json!(value);
        bed.server.put_node(bad);
    };
    managed("bad-public", &["10.244.101.0/24"], "public-ip", "here");
    managed("bad-data", &["10.244.102.0/24"], "backend-data", "{");
    managed("bad-v6", &["10.244.103.0/24", "fd00:244:0:3::/64"], "public-ipv6", "198.51.100.3");
    managed("no-cidr", &[], "x", "");
    managed("three", &["10.244.104.0/24", "10.244.105.0/24", "fd00:244:0:4::/64"], "x", "");
    managed("same-1", &["10.244.106.0/24"], "x", "");
    managed("same-2", &["10.244.106.0/24"], "public-ip", "198.51.100.8");
    managed("ipip", &["10.244.107.0/24"], "backend-type", "ipip");
    let store = bed.store("p0000").await;
    store.network().await.unwrap();
    let mut follower = Follower::of(&store);
    let all = follower.leases("leases", |_| true).await;
    let reasons: Vec<(&str, &str)> =
        all.malformed.iter().map(|(name, entry)| (name.as_str(), entry.why.as_str())).collect();
    for (index, (name, part)) in [
        ("bad-data", "backend-data: not a JSON object"),
        ("bad-public", "public-ip: \"here\" is not an IPv4 address"),
        ("bad-v6", "public-ipv6: \"198.51.100.3\" is not an IPv6 address"),
        ("no-cidr", "no IPv4 and no IPv6 subnet"),
        ("same-2", "10.244.106.0/24 is that of node same-1"),
        ("three", "3 entries"),
    ]
    .into_iter()
    .enumerate()
    {
        assert!(reasons[index].0 == name && reasons[index].1.contains(part), "{reasons:?}");
    }
    assert_eq!(reasons.len(), 6);
    let beside = |name: &str| all.malformed[name].lease.map(|subnets| subnets.to_string());
    assert_eq!((beside("bad-data").as_deref(), beside("bad-public")), (Some("10.244.102.0/24"), None));
    let words: Vec<String> = all.leases.values().map(ToString::to_string).collect();
    assert_eq!(
        words[2..],
        [
            "10.244.102.0/24 of 198.51.100.9 (vxlan)",
            "10.244.103.0/24 and fd00:244:0:3::/64 of 198.51.100.9 (vxlan)",
            "10.244.106.0/24 of 198.51.100.9 (vxlan)",
            "10.244.107.0/24 of 198.51.100.9 (ipip)",
        ]
    );
}

#[tokio::test]
async fn a_change_in_two_steps_is_one_change_for_nodes_of_ours() {
    let bed = Bed::new(DUAL);
    bed.server.put_node(node("n1", &["10.244.3.0/24", "fd00:244:0:3::/64"]));
    let store = bed.store("n1").await;
    let take = async |v4: &str| acquire(&store, public(v4, "2001:db8::1"), &vxlan(MAC, MAC)).await.unwrap();
    take("192.0.2.1").await;
    let mut follower = Follower::of(&bed.store("n2").await);
    follower.words(1).await;
    // The first step, and then something else that makes a snapshot.
    let annotations = json!({PREFIX.to_owned() + "/backend-type": "changing", PREFIX.to_owned() + "/public-ip": "192.0.2.2"});
    bed.server.edit_node("n1", |node| {
        let all = node["metadata"]["annotations"].as_object_mut().unwrap();
        all.extend(annotations.as_object().unwrap().clone());
    });
    bed.server.put_node(peer(0));
    let between = follower.words(2).await;
    assert_eq!(between[1], "10.244.3.0/24 and fd00:244:0:3::/64 of 192.0.2.1 and 2001:db8::1 (vxlan)");
    // Also after a listing in the middle.
    bed.server.behave(|behaviour| behaviour.down = true);
    bed.server.put_node(peer(1));
    bed.server.compact();
    bed.server.behave(|behaviour| behaviour.down = false);
    assert_eq!(follower.words(3).await[2], between[1]);
    bed.annotate("n1", "backend-type", Some("vxlan"));
    let addr = public("192.0.2.2", "2001:db8::1");
    follower.leases("the new address", |all| all.leases.values().any(|lease| lease.public == addr)).await;
    take("192.0.2.3").await;
    let addr = public("192.0.2.3", "2001:db8::1");
    follower.leases("the newest address", |all| all.leases.values().any(|lease| lease.public == addr)).await;
}

#[tokio::test]
async fn each_family_of_a_peer_is_followed_by_itself() {
    let bed = Bed::new(DUAL);
    bed.server.put_node(node("n1", &["10.244.3.0/24", "fd00:244:0:3::/64"]));
    bed.server.put_node(peer(0));
    let store = bed.store("n1").await;
    acquire(&store, public("192.0.2.1", "2001:db8::1"), &vxlan(MAC, MAC)).await.unwrap();
    let mut follower = Follower::of(&store);
    assert_eq!(
        follower.words(2).await,
        [
            "10.244.0.0/28 of 198.51.0.1 (vxlan)",
            "10.244.3.0/24 and fd00:244:0:3::/64 of 192.0.2.1 and 2001:db8::1 (vxlan)"
        ]
    );
    for (key, value) in [("public-ipv6", "2001:db8::7"), ("public-ip", "192.0.2.7")] {
        bed.annotate("n1", key, Some(value));
        follower
            .leases(value, |all| all.leases.values().any(|lease| lease.public.to_string().contains(value)))
            .await;
    }
}
