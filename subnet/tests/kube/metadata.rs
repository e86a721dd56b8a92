//! Watches of metadata: where the pod subnets of nodes come from, and servers that know whole objects only.

use serde_json::{Value, json};
use subnet::testing::{Refusal, node};

use crate::bed::{Bed, Follower, VXLAN, acquire_v4, poll};
use crate::follow::peer;

/// What a request for the single node of this name contains: a list, because the manifest gives no right to `get` nodes.
fn selector(name: &str) -> String {
    format!("/api/v1/nodes?fieldSelector=metadata.name%3D{name}")
}

/// Requests for the single node of this name.
fn requests(bed: &Bed, name: &str) -> usize {
    let requests = bed.server.requests();
    let path = format!("/api/v1/nodes/{name}");
    assert!(requests.iter().all(|request| request.method != "GET" || request.path != path), "{requests:?}");
    requests.iter().filter(|request| request.method == "GET" && request.path == selector(name)).count()
}

/// A node of which nothing says who has set its fields.
fn cleared(mut node: Value) -> Value {
    node["metadata"]["managedFields"] = json!([{}]);
    node
}

async fn followed(bed: &Bed, count: usize) -> Follower {
    (0..count).for_each(|number| bed.server.put_node(peer(number)));
    let mut follower = Follower::of(&bed.store("p0000").await);
    follower.words(count).await;
    poll("the watch", || bed.server.watching() == 1).await;
    follower
}

#[tokio::test]
async fn the_subnets_of_a_new_node_are_known_from_its_metadata_without_a_request() {
    let bed = Bed::new(VXLAN);
    let mut follower = followed(&bed, 3).await;
    bed.server.put_node(peer(3));
    assert_eq!(follower.words(4).await[3], "10.244.0.48/28 of 198.51.0.4 (vxlan)");
    assert_eq!(requests(&bed, "p0003"), 0);
    let watches: Vec<_> =
        bed.server.requests().into_iter().filter(|request| request.path.contains("watch=")).collect();
    let asks =
        |accept: &str| accept.starts_with("application/vnd.kubernetes.protobuf;as=PartialObjectMetadata");
    assert!(watches.iter().any(|request| asks(&request.accept)), "{watches:?}");
    let lists: Vec<_> =
        bed.server.requests().into_iter().filter(|request| request.path.contains("limit=")).collect();
    assert!(lists.iter().all(|request| request.accept == "application/json"), "{lists:?}");
}

#[tokio::test]
async fn the_same_holds_where_the_server_has_metadata_in_json_alone() {
    let bed = Bed::new(VXLAN);
    bed.server.behave(|behaviour| behaviour.no_protobuf = true);
    let mut follower = followed(&bed, 3).await;
    bed.server.put_node(peer(3));
    assert_eq!(follower.words(4).await[3], "10.244.0.48/28 of 198.51.0.4 (vxlan)");
    assert_eq!(requests(&bed, "p0003"), 0);
    bed.server.put_node(cleared(peer(4)));
    assert_eq!(follower.words(5).await[4], "10.244.0.64/28 of 198.51.0.5 (vxlan)");
    assert_eq!(requests(&bed, "p0004"), 1);
    bed.server.delete_node("p0003");
    follower.words(4).await;
}

#[tokio::test]
async fn a_server_whose_protobuf_can_not_be_decoded_is_asked_for_json() {
    const NO_LENGTH: &[u8] = b"<html>";
    const NO_EVENT: &[u8] = &[0, 0, 0, 4, 0xff, 0xff, 0xff, 0xff];
    for garbled in [NO_LENGTH, NO_EVENT] {
        let bed = Bed::new(VXLAN);
        let mut follower = followed(&bed, 2).await;
        bed.server.behave(|behaviour| behaviour.garbled_protobuf = Some(garbled));
        (2..5).for_each(|number| bed.server.put_node(peer(number)));
        follower.words(5).await;
        poll("the watch in JSON", || bed.server.watching() == 1).await;
        bed.server.put_node(peer(5));
        assert_eq!(follower.words(6).await[5], "10.244.0.80/28 of 198.51.0.6 (vxlan)");
        let requests = bed.server.requests();
        let watches: Vec<_> = requests.iter().filter(|request| request.path.contains("watch=")).collect();
        let json = |accept: &str| accept.starts_with("application/json;as=PartialObjectMetadata");
        assert!(json(&watches.last().unwrap().accept), "{watches:?}");
        assert_eq!(watches.iter().filter(|request| json(&request.accept)).count(), 1, "{watches:?}");
    }
}

#[tokio::test]
async fn a_new_node_whose_managed_fields_were_cleared_is_asked_for_once() {
    let bed = Bed::new(VXLAN);
    let mut follower = followed(&bed, 2).await;
    bed.server.put_node(cleared(peer(2)));
    assert_eq!(follower.words(3).await[2], "10.244.0.32/28 of 198.51.0.3 (vxlan)");
    (0..5).for_each(|_| bed.server.heartbeat("p0002"));
    bed.annotate("p0002", "public-ip", Some("203.0.113.9"));
    follower
        .leases("the new address", |all| {
            all.leases.values().any(|lease| lease.public.to_string() == "203.0.113.9")
        })
        .await;
    assert_eq!(requests(&bed, "p0002"), 1);
    // A list has whole nodes, so that one who begins later asks for none.
    let mut later = Follower::of(&bed.store("p0001").await);
    later.words(3).await;
    assert_eq!(requests(&bed, "p0002"), 1);
}

#[tokio::test]
async fn a_request_for_a_new_node_that_fails_is_repeated_and_no_lease_is_lost_meanwhile() {
    let bed = Bed::new(VXLAN);
    let mut follower = followed(&bed, 2).await;
    let refusal = Refusal {
        method: "GET",
        path: selector("p0002"),
        status: 500,
        message: "etcdserver: request timed out".into(),
    };
    bed.server.behave(|behaviour| behaviour.refusals = vec![refusal]);
    bed.server.put_node(cleared(peer(2)));
    let known = follower.until("trouble", |known| known.trouble.is_some()).await;
    assert_eq!(known.leases.unwrap().leases.len(), 2);
    bed.server.behave(|behaviour| behaviour.refusals.clear());
    follower.words(3).await;
    follower.until("no trouble", |known| known.trouble.is_none()).await;
}

#[tokio::test]
async fn a_new_node_that_is_gone_before_it_could_be_asked_for_is_no_trouble() {
    let bed = Bed::new(VXLAN);
    let mut follower = followed(&bed, 2).await;
    bed.server.put_node(cleared(peer(2)));
    bed.server.delete_node("p0002");
    bed.server.put_node(peer(3));
    assert_eq!(follower.words(3).await[2], "10.244.0.48/28 of 198.51.0.4 (vxlan)");
    assert!(follower.known.borrow().trouble.is_none());
}

#[tokio::test]
async fn a_server_that_knows_whole_objects_only_is_followed_all_the_same() {
    for refuses in [false, true] {
        let bed = Bed::new(VXLAN);
        bed.server.behave(|behaviour| {
            behaviour.whole_objects = true;
            behaviour.no_other_form = refuses;
        });
        let mut follower = followed(&bed, 2).await;
        bed.server.put_node(cleared(peer(2)));
        follower.words(3).await;
        bed.annotate("p0002", "public-ip", Some("203.0.113.9"));
        follower
            .leases("the new address", |all| {
                all.leases.values().any(|lease| lease.public.to_string() == "203.0.113.9")
            })
            .await;
        assert_eq!(requests(&bed, "p0002"), 0, "a whole object says it itself");
        assert!(follower.known.borrow().trouble.is_none());
    }
}

#[tokio::test]
async fn a_node_that_is_registered_again_has_the_subnets_of_its_new_object() {
    let bed = Bed::new(VXLAN);
    let mut follower = followed(&bed, 2).await;
    for (created, clear) in [("2026-02-01T00:00:00Z", false), ("2026-03-01T00:00:00Z", true)] {
        let cidr = if clear { "10.244.78.0/24" } else { "10.244.77.0/24" };
        let mut again = peer(1);
        again["spec"] = json!({"podCIDR": cidr, "podCIDRs": [cidr]});
        again["metadata"]["creationTimestamp"] = created.into();
        bed.server.delete_node("p0001");
        bed.server.put_node(if clear { cleared(again) } else { again });
        follower
            .leases("the new subnet", |all| {
                all.leases.len() == 2 && all.leases.keys().any(|subnets| subnets.to_string() == cidr)
            })
            .await;
    }
    assert_eq!(requests(&bed, "p0001"), 1);
}

#[tokio::test]
async fn a_node_that_gets_its_subnet_after_its_annotations_is_followed_once_it_has_one() {
    let bed = Bed::new(VXLAN);
    let mut follower = followed(&bed, 1).await;
    let mut bare = peer(1);
    bare["spec"] = json!({});
    bed.server.put_node(bare);
    follower
        .leases("a word about it", |all| {
            all.malformed.get("p0001").is_some_and(|one| one.why.contains("spec.podCIDRs has no IPv4"))
        })
        .await;
    bed.server.edit_node("p0001", |node| {
        node["spec"] = json!({"podCIDR": "10.244.9.0/24", "podCIDRs": ["10.244.9.0/24"]});
    });
    assert_eq!(follower.words(2).await[1], "10.244.9.0/24 of 198.51.0.2 (vxlan)");
}

#[tokio::test]
async fn nodes_that_join_one_after_the_other_are_followed_with_their_annotations_of_the_watch() {
    let bed = Bed::new(VXLAN);
    let mut follower = followed(&bed, 1).await;
    // Registered without a subnet, then given one, then announced by its agent.
    bed.server.put_node(node("n1", &[]));
    bed.server.edit_node("n1", |node| {
        node["spec"] = json!({"podCIDR": "10.244.3.0/24", "podCIDRs": ["10.244.3.0/24"]});
    });
    let store = bed.store("n1").await;
    acquire_v4(&store, 7).await;
    assert_eq!(follower.words(2).await[1], "10.244.3.0/24 of 192.0.2.7 (vxlan)");
}
