//! The condition that keeps pods away from a node without network.

use std::sync::Arc;

use serde_json::{Value, json};
use subnet::LeaseStore;
use subnet::kube::Kube;
use subnet::testing::{Refusal, node};

use crate::bed::{Bed, VXLAN, acquire_v4, poll, soon, spawn};

fn condition(bed: &Bed) -> Value {
    let node = bed.server.node("n1").unwrap();
    let all = node["status"]["conditions"].as_array().unwrap();
    all.iter().find(|condition| condition["type"] == "NetworkUnavailable").cloned().unwrap_or_default()
}

#[tokio::test]
async fn the_network_is_said_to_be_available_until_it_is_heard() {
    let bed = Bed::new(VXLAN);
    bed.server.put_node(node("n1", &["10.244.3.0/24"]));
    let refusal =
        Refusal { method: "PATCH", path: "/status".into(), status: 503, message: "etcd is away".into() };
    bed.server.behave(|behaviour| behaviour.refusals = vec![refusal]);
    let store = bed.store("n1").await;
    let announcing = Arc::clone(&store);
    let mut task = spawn(async move { announcing.announce_ready().await });
    poll("the second attempt", || bed.patches().len() == 2).await;
    assert_eq!(condition(&bed), Value::Null);
    bed.server.behave(|behaviour| behaviour.refusals.clear());
    soon("announced", &mut task.0).await.unwrap();
    let told = condition(&bed);
    let now = told["lastHeartbeatTime"].as_str().unwrap();
    assert_eq!((now.len(), &now[4..5], &now[10..11], &now[19..]), (20, "-", "T", "Z"), "{now}");
    let last = bed.bodies().pop().unwrap();
    assert_eq!(
        last,
        r#"{"status":{"conditions":[{"type":"NetworkUnavailable","status":"False","lastHeartbeatTime":"NOW","lastTransitionTime":"NOW","reason":"FlannelIsUp","message":"Flannel is running on this node"}]}}"#
            .replace("NOW", now)
    );
    let ready = &bed.server.node("n1").unwrap()["status"]["conditions"][0]["type"];
    assert_eq!(ready, "Ready", "the other conditions stay");
}

fn set(bed: &Bed, status: &str) {
    bed.server.edit_node("n1", |node| {
        let conditions = node["status"]["conditions"].as_array_mut().unwrap();
        conditions.retain(|condition| condition["type"] != "NetworkUnavailable");
        conditions.push(json!({"type": "NetworkUnavailable", "status": status, "lastTransitionTime": "2026-01-01T00:00:00Z"}));
    });
}

#[tokio::test]
async fn a_condition_that_holds_keeps_its_time_of_transition() {
    let bed = Bed::new(VXLAN);
    bed.server.put_node(node("n1", &["10.244.3.0/24"]));
    let store = bed.store("n1").await;
    set(&bed, "False");
    store.announce_ready().await;
    assert_eq!(condition(&bed)["lastTransitionTime"], "2026-01-01T00:00:00Z");
    assert_ne!(condition(&bed)["lastHeartbeatTime"], Value::Null);
    set(&bed, "True");
    store.announce_ready().await;
    assert_eq!(condition(&bed)["status"], "False");
    assert_ne!(condition(&bed)["lastTransitionTime"], "2026-01-01T00:00:00Z");
}

#[tokio::test]
async fn nothing_is_said_where_the_operator_does_not_want_it() {
    let bed = Bed::new(VXLAN);
    bed.server.put_node(node("n1", &["10.244.3.0/24"]));
    let mut options = bed.options("n1");
    options.set_network_unavailable = false;
    Kube::new(options).await.unwrap().announce_ready().await;
    assert_eq!(bed.server.requests(), []);
}

#[tokio::test]
async fn a_condition_that_is_taken_back_is_set_again() {
    let bed = Bed::new(VXLAN);
    bed.server.put_node(node("n1", &["10.244.3.0/24"]));
    let store = bed.store("n1").await;
    set(&bed, "True");
    acquire_v4(&store, 1).await;
    let holding = Arc::clone(&store);
    let _hold = spawn(async move { holding.hold().await });
    poll("a watch", || bed.server.watching() == 1).await;
    bed.server.heartbeat("n1");
    store.node_public().await.unwrap();
    assert_eq!(condition(&bed)["status"], "True", "nothing was announced yet");
    store.announce_ready().await;
    set(&bed, "True");
    poll("False again", || condition(&bed)["status"] == "False").await;
    bed.server.delete_node("n1");
    bed.server.put_node(node("n1", &["10.244.3.0/24"]));
    poll("False on a new node", || condition(&bed)["status"] == "False").await;
}
