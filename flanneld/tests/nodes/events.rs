//! Events of Kubernetes: left at this node's object, each once, and none where the role forbids it.

use serde_json::Value;
use subnet::Family;
use subnet::testing::Refusal;

use crate::bed::Member;
use crate::site::{Kind, Site, config};

const QUICK: &[&str] = &["--probe-interval=1s"];

/// The events about a node with this reason.
fn events(site: &Site, member: &Member, reason: &str) -> Vec<Value> {
    let about =
        |event: &Value| event["reason"] == reason && event["involvedObject"]["name"] == member.node.name();
    site.api().events().into_iter().filter(about).collect()
}

fn delete_rules(member: &Member) {
    member.node.namespace().command("nft").args(["delete", "table", "ip", "flannel-ipv4"]).ok().unwrap();
    member.wait("the rules", || member.show("nft list tables").contains("flannel-ipv4"));
}

#[test]
fn damaged_rules_and_a_blocked_tunnel_are_events_of_the_node_each_once() {
    let site = Site::new(Kind::Kube, &config(&[Family::V4], r#"{"Type":"vxlan"}"#));
    let (a, b) = (site.join_with(QUICK), site.join_with(QUICK));
    a.wait("a probe", || a.agent.get("/peers").unwrap().1.contains("\"verdict\":\"fine\""));
    delete_rules(&a);
    a.wait("the event", || !events(&site, &a, "RulesRestored").is_empty());
    delete_rules(&a);
    let rules =
        "table bridge faults { chain f { type filter hook forward priority 0; udp dport 8472 drop; }\n}\n";
    site.fabric.switch().command("nft").args(["-f", "-"]).input(rules).ok().unwrap();
    a.wait("the event", || !events(&site, &a, "PeerUnreachable").is_empty());
    let blocked = events(&site, &a, "PeerUnreachable");
    let message = blocked[0]["message"].as_str().unwrap();
    assert!(
        message.contains(&b.node.address().to_string()) && message.contains("UDP port 8472"),
        "{message}"
    );
    assert_eq!(blocked[0]["type"], "Warning");
    let restored = events(&site, &a, "RulesRestored");
    assert_eq!((restored.len(), blocked.len()), (1, 1), "{restored:?} {blocked:?}");
    assert_eq!(events(&site, &b, "RulesRestored"), [] as [Value; 0], "its rules are whole");
}

#[test]
fn a_role_without_the_right_is_said_once_and_disturbs_nothing() {
    let site = Site::new(Kind::Kube, &config(&[Family::V4], r#"{"Type":"vxlan"}"#));
    let refusal = Refusal { method: "POST", path: "/events".into(), status: 403, message: "no".into() };
    site.api().behave(|behaviour| behaviour.refusals.push(refusal));
    let a = site.join();
    delete_rules(&a);
    a.wait_for_log("no events are left in Kubernetes");
    delete_rules(&a);
    assert_eq!(a.agent.get("/readyz").unwrap().0, 200);
    assert_eq!(a.agent.log().matches("no events are left in Kubernetes").count(), 1, "{}", a.agent.log());
    assert_eq!(site.api().events(), [] as [Value; 0]);
}
