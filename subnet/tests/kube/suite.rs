//! The sentences that need no fault, run over the API server that follows a script and, by `make test-kube`,
//! over a real one.

use std::sync::Arc;

use serde_json::{Value, json};
use subnet::LeaseStore;
use subnet::testing::{announced, fattened, node};

use crate::common::{
    DUAL, Follower, MAC, PREFIX, VXLAN, acquire, acquire_v4, not_while, public, soon, spawn, vxlan,
};
use crate::world;

/// A node that another agent has announced.
fn peer(number: u8) -> Value {
    let cidr = format!("10.244.{number}.0/24");
    let mac = format!("02:00:00:00:00:{number:02x}");
    announced(fattened(node(&format!("peer{number}"), &[&cidr]), 10), &format!("198.51.100.{number}"), &mac)
}

fn moment(second: usize) -> String {
    format!("2026-01-02T00:00:{second:02}Z")
}

#[tokio::test]
async fn a_node_is_announced_as_go_writes_it_and_nothing_else_of_it_changes() {
    let world = world().await;
    world.hand.put_node(&node("n1", &["10.244.3.0/24"])).await;
    world.hand.merge("n1", &json!({"metadata": {"annotations": {"other.example.org/x": "1"}}})).await;
    let before = world.hand.node("n1").await;
    let store = world.store("n1", VXLAN).await;
    let lease = acquire_v4(&store, 1).await;
    assert_eq!(lease.to_string(), "10.244.3.0/24 of 192.0.2.1 (vxlan)");
    let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
    assert_eq!(
        world.hand.annotations("n1").await,
        [
            pair("backend-data", r#"{"VNI":1,"VtepMAC":"12:c6:65:89:b4:e3"}"#),
            pair("backend-type", "vxlan"),
            pair("kube-subnet-manager", "true"),
            pair("public-ip", "192.0.2.1"),
        ]
    );
    let after = world.hand.node("n1").await;
    for part in ["spec", "status"] {
        assert_eq!(after[part], before[part], "{part}");
    }
    assert_eq!(after["metadata"]["labels"], before["metadata"]["labels"]);
    assert_eq!(after["metadata"]["annotations"]["other.example.org/x"], "1");
    acquire_v4(&store, 1).await;
    let again = world.hand.node("n1").await;
    assert_eq!(
        again["metadata"]["resourceVersion"], after["metadata"]["resourceVersion"],
        "nothing is written"
    );
}

#[tokio::test]
async fn both_families_are_announced_and_followed() {
    let world = world().await;
    world.hand.put_node(&node("n1", &["10.244.3.0/24", "fd00:244:0:3::/64"])).await;
    let store = world.store("n1", DUAL).await;
    let take = async |v4| acquire(&store, public(v4, "2001:db8::1"), &vxlan(MAC, MAC)).await.unwrap();
    take("192.0.2.1").await;
    let mut follower = Follower::of(&store);
    assert_eq!(
        follower.words(1).await,
        ["10.244.3.0/24 and fd00:244:0:3::/64 of 192.0.2.1 and 2001:db8::1 (vxlan)"]
    );
    // By two patches, of which the first says nothing to nodes of ours.
    take("192.0.2.2").await;
    let addr = public("192.0.2.2", "2001:db8::1");
    follower.leases("the new address", |all| all.leases.values().any(|lease| lease.public == addr)).await;
    assert!(world.hand.annotations("n1").await.contains(&("backend-type".into(), "vxlan".into())));
}

#[tokio::test]
async fn nodes_that_come_change_and_go_are_followed() {
    let world = world().await;
    world.hand.put_node(&node("n1", &["10.244.200.0/24"])).await;
    world.hand.put_node(&node("unmanaged", &["10.244.201.0/24"])).await;
    world.hand.put_node(&peer(1)).await;
    let store = world.store("n1", VXLAN).await;
    acquire_v4(&store, 1).await;
    let mut follower = Follower::of(&store);
    let own = "10.244.200.0/24 of 192.0.2.1 (vxlan)";
    assert_eq!(follower.words(2).await, ["10.244.1.0/24 of 198.51.100.1 (vxlan)", own]);
    world.hand.put_node(&peer(2)).await;
    follower.words(3).await;
    world.hand.annotate("peer2", "public-ip", Some("203.0.113.1")).await;
    let addr = public("203.0.113.1", "");
    follower.leases("a new address", |all| all.leases.values().any(|lease| lease.public == addr)).await;
    world.hand.annotate("peer2", "kube-subnet-manager", None).await;
    follower.words(2).await;
    world.hand.delete_node("peer1").await;
    assert_eq!(follower.words(1).await, [own]);
}

#[tokio::test]
async fn heartbeats_are_no_news() {
    let world = world().await;
    for number in 1..6 {
        world.hand.put_node(&peer(number)).await;
    }
    let mut follower = Follower::of(&world.store("peer1", VXLAN).await);
    follower.words(5).await;
    // Once this is known there is a watch.
    world.hand.put_node(&peer(6)).await;
    follower.words(6).await;
    follower.known.mark_unchanged();
    for second in 0..20 {
        world.hand.condition(&format!("peer{}", 1 + second % 6), "Ready", "True", &moment(second)).await;
    }
    world.hand.annotate("peer3", "public-ip", Some("203.0.113.7")).await;
    soon("news", follower.known.changed()).await.unwrap();
    let leases = follower.known.borrow().leases.clone().unwrap();
    let changed = leases.leases.values().filter(|lease| lease.public == public("203.0.113.7", "")).count();
    assert_eq!(changed, 1, "the first news is the change, after 20 heartbeats");
}

#[tokio::test]
async fn a_node_without_pod_cidr_waits_and_goes_on_as_soon_as_it_has_one() {
    let world = world().await;
    world.hand.put_node(&node("n1", &[])).await;
    let store = world.store("n1", VXLAN).await;
    let error = acquire(&store, public("192.0.2.1", ""), &vxlan(MAC, "")).await.unwrap_err().to_string();
    assert!(error.contains("node \"n1\" pod cidr not assigned"), "{error}");
    let waiting = Arc::clone(&store);
    let mut task = spawn(async move { waiting.stirred().await });
    let spec = json!({"spec": {"podCIDR": "10.244.5.0/24", "podCIDRs": ["10.244.5.0/24"]}});
    world.hand.merge("n1", &spec).await;
    soon("stirred", &mut task.0).await.unwrap();
    assert_eq!(acquire_v4(&store, 1).await.subnets.to_string(), "10.244.5.0/24");
}

#[tokio::test]
async fn annotations_that_are_changed_are_put_back_and_an_overwrite_is_followed() {
    let world = world().await;
    world.hand.put_node(&node("n1", &["10.244.3.0/24"])).await;
    let store = world.store("n1", VXLAN).await;
    acquire_v4(&store, 1).await;
    let holding = Arc::clone(&store);
    let mut task = spawn(async move { holding.hold().await });
    not_while("lost", &mut task.0, async {
        world.hand.annotate("n1", "public-ip", Some("198.51.100.1")).await;
        world.hand.sees("n1", "public-ip", "192.0.2.1").await;
        world.hand.annotate("n1", "kube-subnet-manager", None).await;
        world.hand.sees("n1", "kube-subnet-manager", "true").await;
        world.hand.annotate("n1", "public-ip-overwrite", Some("172.18.0.2")).await;
        world.hand.sees("n1", "public-ip", "172.18.0.2").await;
        world.hand.annotate("n1", "public-ip-overwrite", None).await;
        world.hand.sees("n1", "public-ip", "192.0.2.1").await;
    })
    .await;
}

#[tokio::test]
async fn a_node_that_is_registered_again_is_announced_again_and_another_subnet_ends_the_lease() {
    let world = world().await;
    world.hand.put_node(&node("n1", &["10.244.3.0/24"])).await;
    let store = world.store("n1", VXLAN).await;
    acquire_v4(&store, 1).await;
    let holding = Arc::clone(&store);
    let mut task = spawn(async move { holding.hold().await });
    not_while("lost", &mut task.0, async {
        world.hand.delete_node("n1").await;
        world.hand.put_node(&node("n1", &["10.244.3.0/24"])).await;
        world.hand.sees("n1", "public-ip", "192.0.2.1").await;
    })
    .await;
    world.hand.delete_node("n1").await;
    world.hand.put_node(&node("n1", &["10.244.9.0/24"])).await;
    let loss = soon("lost", &mut task.0).await.unwrap();
    assert_eq!(loss.to_string(), "this node was given other subnets than 10.244.3.0/24");
    assert_eq!(acquire_v4(&store, 1).await.subnets.to_string(), "10.244.9.0/24");
}

#[tokio::test]
async fn the_condition_is_set_beside_the_others_and_again_when_it_is_taken_back() {
    let world = world().await;
    world.hand.put_node(&node("n1", &["10.244.3.0/24"])).await;
    world.hand.condition("n1", "Ready", "True", &moment(0)).await;
    world.hand.condition("n1", "NetworkUnavailable", "True", &moment(0)).await;
    let store = world.store("n1", VXLAN).await;
    acquire_v4(&store, 1).await;
    let holding = Arc::clone(&store);
    let _hold = spawn(async move { holding.hold().await });
    store.announce_ready().await;
    let conditions = async || {
        let node = world.hand.node("n1").await;
        let all = node["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let pair = |condition: &Value| (condition["type"].clone(), condition["status"].clone());
        all.iter().map(pair).collect::<Vec<_>>()
    };
    let is = async |status: &str| conditions().await.contains(&("NetworkUnavailable".into(), status.into()));
    assert!(is("False").await);
    assert!(conditions().await.contains(&("Ready".into(), "True".into())), "the other conditions stay");
    world.hand.condition("n1", "NetworkUnavailable", "True", &moment(1)).await;
    world.hand.until("False again", "n1", async |_| is("False").await).await;
}

#[tokio::test]
async fn the_operators_public_address_is_read_from_the_node() {
    let world = world().await;
    world.hand.put_node(&node("n1", &["10.244.3.0/24"])).await;
    let store = world.store("n1", VXLAN).await;
    assert_eq!(store.node_public().await.unwrap(), public("", ""));
    world.hand.annotate("n1", "node-public-ip", Some("192.0.2.44")).await;
    soon("stirred", store.stirred()).await;
    assert_eq!(store.node_public().await.unwrap(), public("192.0.2.44", ""));
    let node = world.hand.node("n1").await;
    assert_eq!(node["metadata"]["annotations"][format!("{PREFIX}/node-public-ip")], "192.0.2.44");
}
