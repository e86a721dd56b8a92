//! `flanneld doctor` about network policies that have no effect, with an agent that enforces them.

use serde_json::{Value, json};
use subnet::testing::Refusal;

use crate::bed::{Member, flanneld};
use crate::kubernetes::Kubernetes;

/// State, object and cause of what doctor finds about network policies.
fn findings(member: &Member) -> Vec<(String, String, String)> {
    let node = &member.node;
    let doctor = node
        .namespace()
        .command(flanneld())
        .args(["doctor", "--json"])
        .arg(format!("--subnet-file={}", node.subnet_file().display()))
        .output()
        .unwrap();
    let answer: Value = serde_json::from_slice(&doctor.stdout).unwrap();
    let of_policies =
        answer["findings"].as_array().unwrap().iter().filter(|one| one["check"] == "network policies");
    let text = |one: &Value, key: &str| one[key].as_str().unwrap_or_default().to_owned();
    of_policies.map(|one| (text(one, "state"), text(one, "object"), text(one, "cause"))).collect()
}

/// Waits until there is one finding, of this state and object, whose cause has `part`.
fn is_told(member: &Member, state: &str, object: &str, part: &str) {
    member.wait(part, || {
        let all = findings(member);
        matches!(&all[..], [one] if one.0 == state && one.1.contains(object) && one.2.contains(part))
    });
}

#[test]
fn a_network_policy_without_effect_is_explained() {
    let cluster = Kubernetes::new();
    cluster.api.put_namespace("shop", &[]);
    let off = cluster.join("10.244.2.0/24");
    is_told(&off, "ok", "", "--network-policy=off");
    let member = cluster.join_with("10.244.1.0/24", &["--network-policy=on"]);
    let put_pod = |address: Option<&str>| {
        cluster.api.put_pod_object(json!({
            "metadata": {"namespace": "shop", "name": "web", "uid": "uid-web", "labels": {"app": "web"}},
            "spec": {"nodeName": member.node.name(), "containers": [{"name": "c"}]},
            "status": {"phase": "Running", "podIP": address},
        }));
    };
    put_pod(Some("10.244.1.7"));
    member
        .wait("the pod", || member.agent.get("/metrics").unwrap().1.contains("flannel_policy_pods_local 1"));
    is_told(&member, "ok", "", "there is none in the cluster");
    let select = |app: &str, from: Value| {
        let spec = json!({
            "podSelector": {"matchLabels": {"app": app}},
            "policyTypes": ["Ingress"],
            "ingress": [{"from": [from]}],
        });
        cluster.api.put_policy("shop", "p", spec);
    };
    let friends = json!({"podSelector": {"matchLabels": {"app": "friend"}}});
    select("wbe", friends.clone());
    is_told(&member, "ok", "", "none selects a pod of this node: look at podSelector and namespace");
    select("web", friends.clone());
    is_told(&member, "ok", "", "known: 1; isolated addresses of this node's pods: 1");
    select("web", json!({"ipBlock": {"cidr": "10.0.0/8"}}));
    is_told(&member, "trouble", "rules of policies", "1 of their members can't be understood");
    select("web", friends);
    is_told(&member, "ok", "", "known: 1; isolated addresses of this node's pods: 1");
    // Somebody takes the role's rights away.
    let refusal = Refusal {
        method: "GET",
        path: "networkpolicies".into(),
        status: 403,
        message: "networkpolicies is forbidden".into(),
    };
    cluster.api.behave(|behaviour| behaviour.refusals = vec![refusal]);
    cluster.api.disconnect();
    member.wait("the refusal", || {
        let all = findings(&member);
        all.iter().any(|one| one.0 == "trouble" && one.2.contains("networkpolicies is forbidden"))
    });
    cluster.api.behave(|behaviour| behaviour.refusals.clear());
    is_told(&member, "ok", "", "known: 1; isolated addresses of this node's pods: 1");
}
