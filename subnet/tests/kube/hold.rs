//! Keeping what this node announces.

use std::sync::Arc;

use subnet::testing::{Refusal, node};
use subnet::{LeaseStore, Loss};

use crate::bed::{
    Bed, DUAL, MAC, Task, VXLAN, acquire, acquire_v4, not_while, poll, public, soon, spawn, vxlan,
};

async fn held(bed: &Bed) -> (Arc<subnet::kube::Kube>, Task<Loss>) {
    bed.server.put_node(node("n1", &["10.244.3.0/24"]));
    let store = bed.store("n1").await;
    acquire_v4(&store, 1).await;
    let holding = Arc::clone(&store);
    let task = spawn(async move { holding.hold().await });
    poll("a watch", || bed.server.watching() == 1).await;
    (store, task)
}

#[tokio::test]
async fn annotations_that_are_changed_or_removed_are_put_back() {
    let bed = Bed::new(VXLAN);
    let (_store, _task) = held(&bed).await;
    bed.annotate("n1", "public-ip", Some("198.51.100.1"));
    poll("put back", || bed.annotation("n1", "public-ip").as_deref() == Some("192.0.2.1")).await;
    bed.annotate("n1", "kube-subnet-manager", None);
    poll("managed", || bed.annotation("n1", "kube-subnet-manager").as_deref() == Some("true")).await;
    assert_eq!(
        bed.bodies()[1..],
        [
            r#"{"metadata":{"annotations":{"f/public-ip":"192.0.2.1"}}}"#,
            r#"{"metadata":{"annotations":{"f/kube-subnet-manager":"true"}}}"#,
        ],
        "and nothing else is written"
    );
}

#[tokio::test]
async fn heartbeats_and_strangers_annotations_are_nobodys_concern() {
    let bed = Bed::new(VXLAN);
    let (store, mut task) = held(&bed).await;
    not_while("lost", &mut task.0, async {
        for round in 0..5 {
            bed.server.heartbeat("n1");
            bed.server.annotate("n1", "other.example.org/x", Some(&round.to_string()));
            store.node_public().await.unwrap();
        }
        bed.annotate("n1", "public-ip", Some("198.51.100.1"));
        poll("put back", || bed.patches().len() == 2).await;
    })
    .await;
}

#[tokio::test]
async fn a_node_that_is_registered_again_is_announced_again() {
    let bed = Bed::new(VXLAN);
    let (_store, mut task) = held(&bed).await;
    not_while("lost", &mut task.0, async {
        for _ in 0..12 {
            let before = bed.patches().len();
            bed.server.delete_node("n1");
            let mut new = node("n1", &[]);
            new["metadata"]["uid"] = format!("{before}").into();
            bed.server.put_node(new);
            bed.server
                .edit_node("n1", |node| node["spec"]["podCIDRs"] = serde_json::json!(["10.244.3.0/24"]));
            poll("announced", || bed.annotation("n1", "public-ip").is_some()).await;
        }
    })
    .await;
}

#[tokio::test]
async fn another_subnet_is_a_loss_and_a_missing_one_is_waited_for() {
    let bed = Bed::new(VXLAN);
    let (store, mut task) = held(&bed).await;
    not_while("lost without a new subnet", &mut task.0, async {
        bed.server.delete_node("n1");
        bed.server.put_node(node("n1", &[]));
        store.node_public().await.unwrap();
    })
    .await;
    bed.server.put_node(node("n1", &["10.244.9.0/24"]));
    let loss = soon("lost", &mut task.0).await.unwrap();
    assert_eq!(loss.to_string(), "this node was given other subnets than 10.244.3.0/24");
    let patches = bed.patches().len();
    assert_eq!(patches, 1, "the new node is not announced with the old lease");
    assert_eq!(acquire_v4(&store, 1).await.subnets.to_string(), "10.244.9.0/24");
}

#[tokio::test]
async fn an_overwrite_is_honoured_while_the_lease_is_held() {
    let bed = Bed::new(VXLAN);
    let (_store, _task) = held(&bed).await;
    let wishes =
        [(Some("172.18.0.2"), "172.18.0.2"), (Some("172.18.0.3"), "172.18.0.3"), (None, "192.0.2.1")];
    // Many wishes are no contest.
    for (overwrite, announced) in wishes.into_iter().cycle().take(30) {
        bed.annotate("n1", "public-ip-overwrite", overwrite);
        poll(announced, || bed.annotation("n1", "public-ip").as_deref() == Some(announced)).await;
    }
    bed.annotate("n1", "public-ip-overwrite", Some("nonsense"));
    bed.annotate("n1", "public-ip-overwrite", Some("172.18.0.4"));
    poll("172.18.0.4", || bed.annotation("n1", "public-ip").as_deref() == Some("172.18.0.4")).await;
}

#[tokio::test]
async fn who_changes_the_annotations_again_and_again_gets_his_way_and_is_named() {
    let bed = Bed::new(VXLAN);
    let (store, mut task) = held(&bed).await;
    let loss = loop {
        if bed.annotation("n1", "public-ip").as_deref() == Some("192.0.2.1") {
            bed.annotate("n1", "public-ip", Some("198.51.100.1"));
        }
        tokio::select! {
            loss = &mut task.0 => break loss.unwrap(),
            () = tokio::time::sleep(std::time::Duration::from_millis(5)) => {}
        }
    };
    assert!(matches!(loss, Loss::Rewritten { .. }), "{loss}");
    assert!(loss.to_string().contains("a second flanneld with the same node name"), "{loss}");
    assert_eq!(bed.patches().len(), 1 + 8);
    drop(store);
}

#[tokio::test]
async fn acquiring_again_is_not_taken_for_somebody_elses_writing() {
    let bed = Bed::new(DUAL);
    bed.server.put_node(node("n1", &["10.244.3.0/24", "fd00:244:0:3::/64"]));
    let store = bed.store("n1").await;
    let take = async |v4: &str| acquire(&store, public(v4, "2001:db8::1"), &vxlan(MAC, MAC)).await.unwrap();
    take("192.0.2.1").await;
    let holding = Arc::clone(&store);
    let mut task = spawn(async move { holding.hold().await });
    poll("a watch", || bed.server.watching() == 1).await;
    not_while("lost", &mut task.0, async {
        for number in 2..22 {
            take(&format!("192.0.2.{number}")).await;
        }
        // Seen after all that.
        bed.annotate("n1", "public-ip", None);
        poll("put back", || bed.annotation("n1", "public-ip").as_deref() == Some("192.0.2.21")).await;
    })
    .await;
    poll("settled", || bed.annotation("n1", "backend-type").as_deref() == Some("vxlan")).await;
    let putting_back = 2;
    assert_eq!(bed.patches().len(), 1 + 20 * 2 + putting_back);
}

#[tokio::test]
async fn a_server_that_restarts_ends_nothing() {
    let bed = Bed::new(VXLAN);
    let (_store, mut task) = held(&bed).await;
    not_while("lost", &mut task.0, async {
        bed.server.behave(|behaviour| behaviour.down = true);
        bed.annotate("n1", "public-ip", None);
        bed.server.compact();
        bed.server.behave(|behaviour| behaviour.down = false);
        poll("put back", || bed.annotation("n1", "public-ip").is_some()).await;
    })
    .await;
}

fn trouble(store: &subnet::kube::Kube) -> String {
    store.tenure().trouble.unwrap_or_default()
}

#[tokio::test]
async fn a_node_that_is_gone_or_has_no_subnet_is_trouble_until_it_is_back() {
    let bed = Bed::new(VXLAN);
    let (store, mut task) = held(&bed).await;
    store.announce_ready().await;
    let available = || {
        let conditions = bed.server.node("n1").unwrap()["status"]["conditions"].clone();
        conditions.as_array().unwrap().iter().any(|one| one["type"] == "NetworkUnavailable")
    };
    poll("available", available).await;
    assert_eq!(store.tenure().trouble, None);
    not_while("lost", &mut task.0, async {
        bed.server.delete_node("n1");
        poll("gone", || trouble(&store).contains("has no node \"n1\" any more")).await;
        assert!(trouble(&store).contains(": it appears when kubelet registers this machine again"));
        let mut new = node("n1", &[]);
        new["metadata"]["uid"] = "another".into();
        bed.server.put_node(new);
        poll("no subnet", || trouble(&store).contains("node \"n1\" has no podCIDR any more")).await;
        assert!(trouble(&store).contains("--allocate-node-cidrs=true") && !available());
        bed.server.edit_node("n1", |node| node["spec"]["podCIDRs"] = serde_json::json!(["10.244.3.0/24"]));
        poll("no trouble", || store.tenure().trouble.is_none()).await;
        poll("announced", || bed.annotation("n1", "public-ip").is_some()).await;
        poll("available again", available).await;
    })
    .await;
}

#[tokio::test]
async fn a_right_to_write_that_is_taken_away_is_trouble_until_it_is_given_back() {
    let bed = Bed::new(VXLAN);
    let (store, mut task) = held(&bed).await;
    let message = "nodes \"n1\" is forbidden: User \"x\" cannot patch resource \"nodes/status\"".to_owned();
    let refusal = Refusal { method: "PATCH", path: "/status".into(), status: 403, message };
    not_while("lost", &mut task.0, async {
        bed.server.behave(|behaviour| behaviour.refusals = vec![refusal]);
        bed.annotate("n1", "public-ip", None);
        poll("trouble", || trouble(&store).starts_with("this node's object can't be written")).await;
        let text = trouble(&store);
        assert!(text.contains("(403): the ClusterRole of flanneld has to allow"), "{text}");
        bed.server.behave(|behaviour| behaviour.refusals.clear());
        poll("put back", || bed.annotation("n1", "public-ip").is_some()).await;
        poll("no trouble", || store.tenure().trouble.is_none()).await;
    })
    .await;
}
