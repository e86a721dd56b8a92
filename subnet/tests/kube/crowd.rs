//! Large and restless clusters.

use std::collections::BTreeMap;

use subnet::testing::fattened;
use subnet::{Family, LeaseStore};

use crate::bed::{Bed, Follower, VXLAN, poll};
use crate::follow::{mac, peer};

/// What every node of the server announces, read another way.
fn model(bed: &Bed) -> BTreeMap<String, (String, String)> {
    let text = |node: &serde_json::Value, key: &str| {
        node["metadata"]["annotations"][format!("flannel.alpha.coreos.com/{key}")]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    };
    let nodes = bed.server.names().into_iter().filter_map(|name| bed.server.node(&name));
    nodes
        .filter(|node| text(node, "kube-subnet-manager") == "true")
        .map(|node| {
            let data: serde_json::Value = serde_json::from_str(&text(&node, "backend-data")).unwrap();
            let cidr = node["spec"]["podCIDR"].as_str().unwrap().to_owned();
            (cidr, (text(&node, "public-ip"), data["VtepMAC"].as_str().unwrap().to_owned()))
        })
        .collect()
}

async fn agrees(bed: &Bed, follower: &mut Follower) {
    let expected = model(bed);
    follower
        .leases("the state of the server", |all| {
            let known: BTreeMap<String, (String, String)> = all
                .leases
                .values()
                .map(|lease| {
                    let mac = lease.attachment.vtep(Family::V4).unwrap().mac.to_string();
                    (lease.subnets.to_string(), (lease.public.to_string(), mac))
                })
                .collect();
            known == expected && all.malformed.is_empty()
        })
        .await;
}

#[tokio::test]
async fn churn_with_every_kind_of_fault_ends_in_the_state_of_the_server() {
    let bed = Bed::new(VXLAN);
    (0..60).for_each(|number| bed.server.put_node(peer(number)));
    bed.server.behave(|behaviour| {
        behaviour.always_pages = true;
        behaviour.largest_page = Some(7);
        behaviour.bookmark_every = Some(std::time::Duration::from_millis(3));
    });
    let store = bed.store("p0000").await;
    let mut follower = Follower::of(&store);
    agrees(&bed, &mut follower).await;
    let mut random: u64 = 0x9e37_79b9_7f4a_7c15;
    for step in 0..3000_usize {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let number = (random >> 33) as usize % 80;
        let name = format!("p{number:04}");
        match (random >> 52) % 16 {
            0..=3 => bed.server.heartbeat(&name),
            4..=5 => bed.server.put_node(peer(number)),
            6..=7 => bed.server.delete_node(&name),
            8..=9 => bed.annotate(&name, "public-ip", Some(&format!("203.0.113.{}", step % 200))),
            10..=11 => {
                let data = format!(r#"{{"VNI":1,"VtepMAC":"{}"}}"#, mac(step));
                bed.annotate(&name, "backend-data", Some(&data));
            }
            12 => bed.annotate(&name, "kube-subnet-manager", [Some("true"), Some("false"), None][step % 3]),
            13 if step % 7 == 0 => bed.server.disconnect(),
            14 if step % 11 == 0 => bed.server.compact(),
            // Lets the follower come along, or not.
            _ => store.node_public().await.map(drop).unwrap_or_default(),
        }
    }
    // A node that was annotated without ever having been announced has no data: not a peer's doing.
    for name in bed.server.names() {
        bed.server.put_node(peer(name[1..].parse().unwrap()));
    }
    agrees(&bed, &mut follower).await;
}

#[tokio::test]
async fn five_thousand_large_nodes_are_followed_and_their_heartbeats_wake_nobody() {
    const NODES: usize = 5000;
    let bed = Bed::new(VXLAN);
    (0..NODES).for_each(|number| bed.server.put_node(fattened(peer(number), 40)));
    let size = bed.server.node("p0000").unwrap().to_string().len();
    assert!(size > 9_000, "{size}");
    let mut follower = Follower::of(&bed.store("p0000").await);
    follower.words(NODES).await;
    poll("a watch", || bed.server.watching() == 1).await;
    follower.known.mark_unchanged();
    bed.server.names().iter().for_each(|name| bed.server.heartbeat(name));
    bed.server.delete_node("p0005");
    crate::bed::soon("news", follower.known.changed()).await.unwrap();
    assert_eq!(follower.known.borrow().leases.as_ref().unwrap().leases.len(), NODES - 1);
    assert_eq!(bed.server.requests().iter().filter(|request| request.path.contains("limit=500")).count(), 1);
}
