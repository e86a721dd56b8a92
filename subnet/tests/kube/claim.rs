//! Taking the lease that Kubernetes gives, and saying so in the node's annotations.

use std::sync::Mutex;

use serde_json::json;
use subnet::testing::{Refusal, announced, node};
use subnet::{Attachment, Claim, Lease, LeaseStore, PublicAddrs, StoreError, Subnets};

use crate::bed::{
    Bed, DUAL, MAC, PREFIX, VXLAN, acquire, acquire_v4, not_while, poll, public, soon, spawn, vxlan,
};

const DATA: &str = r#"{\"VNI\":1,\"VtepMAC\":\"12:c6:65:89:b4:e3\"}"#;

#[tokio::test]
async fn a_node_without_any_annotation_is_announced_by_one_patch_as_go_writes_it() {
    let bed = Bed::new(VXLAN);
    bed.server.put_node(node("n1", &["10.244.3.0/24"]));
    let store = bed.store("n1").await;
    let lease = acquire_v4(&store, 1).await;
    assert_eq!(lease.to_string(), "10.244.3.0/24 of 192.0.2.1 (vxlan)");
    let patch = &bed.patches()[..];
    assert_eq!(patch.len(), 1);
    assert_eq!(patch[0].path, "/api/v1/nodes/n1/status");
    assert_eq!(patch[0].content_type, "application/strategic-merge-patch+json");
    assert_eq!(
        bed.bodies()[0],
        format!(
            r#"{{"metadata":{{"annotations":{{"f/backend-data":"{DATA}","f/backend-type":"vxlan","f/kube-subnet-manager":"true","f/public-ip":"192.0.2.1"}}}}}}"#
        )
    );
    acquire_v4(&store, 1).await;
    acquire_v4(&*bed.store("n1").await, 1).await;
    assert_eq!(bed.patches().len(), 1, "an equal node is not patched");
    acquire_v4(&store, 2).await;
    assert_eq!(bed.bodies()[1..], [r#"{"metadata":{"annotations":{"f/public-ip":"192.0.2.2"}}}"#]);
}

#[tokio::test]
async fn both_families_are_announced_by_one_patch_and_a_change_of_one_by_two() {
    let bed = Bed::new(DUAL);
    bed.server.put_node(node("n1", &["10.244.3.0/24", "fd00:244:0:3::/64"]));
    let store = bed.store("n1").await;
    let take = async |v4, v6| acquire(&store, public(v4, v6), &vxlan(MAC, MAC)).await.unwrap();
    let lease = take("192.0.2.1", "2001:db8::1").await;
    assert_eq!(lease.subnets.to_string(), "10.244.3.0/24 and fd00:244:0:3::/64");
    assert_eq!(
        bed.bodies(),
        [format!(
            r#"{{"metadata":{{"annotations":{{"f/backend-data":"{DATA}","f/backend-type":"vxlan","f/backend-v6-data":"{DATA}","f/kube-subnet-manager":"true","f/public-ip":"192.0.2.1","f/public-ipv6":"2001:db8::1"}}}}}}"#
        )]
    );
    take("192.0.2.2", "2001:db8::1").await;
    assert_eq!(
        bed.bodies()[1..],
        [
            r#"{"metadata":{"annotations":{"f/backend-type":"changing","f/public-ip":"192.0.2.2"}}}"#,
            r#"{"metadata":{"annotations":{"f/backend-type":"vxlan"}}}"#,
        ]
    );
    take("192.0.2.3", "2001:db8::3").await;
    assert_eq!(
        bed.bodies()[3..],
        [r#"{"metadata":{"annotations":{"f/public-ip":"192.0.2.3","f/public-ipv6":"2001:db8::3"}}}"#]
    );
}

#[tokio::test]
async fn an_interrupted_change_of_one_family_is_completed_by_the_next_acquisition() {
    let bed = Bed::new(DUAL);
    bed.server.put_node(node("n1", &["10.244.3.0/24", "fd00:244:0:3::/64"]));
    let store = bed.store("n1").await;
    acquire(&store, public("192.0.2.1", "2001:db8::1"), &vxlan(MAC, MAC)).await.unwrap();
    bed.annotate("n1", "backend-type", Some("changing"));
    acquire(&store, public("192.0.2.1", "2001:db8::1"), &vxlan(MAC, MAC)).await.unwrap();
    assert_eq!(bed.bodies()[1..], [r#"{"metadata":{"annotations":{"f/backend-type":"vxlan"}}}"#]);
}

#[tokio::test]
async fn what_the_node_announced_before_is_known_when_it_decides_anew() {
    let bed = Bed::new(VXLAN);
    bed.server.put_node(announced(node("n1", &["10.244.3.0/24"]), "192.0.2.9", MAC));
    let store = bed.store("n1").await;
    let known = Mutex::new(None);
    let attach = |lease: Option<&Lease>, _: &subnet::Leases| {
        *known.lock().unwrap() = lease.cloned();
        lease.unwrap().attachment.clone()
    };
    let claim = Claim::new(public("192.0.2.1", ""), Subnets::default(), &attach);
    let network = store.network().await.unwrap();
    let lease = store.acquire(&network, &claim).await.unwrap();
    assert_eq!(lease.attachment, vxlan(MAC, ""));
    assert_eq!(known.lock().unwrap().as_ref().unwrap().public, public("192.0.2.9", ""));
}

#[tokio::test]
async fn a_node_without_pod_cidr_waits_with_the_remedy_and_goes_on_as_soon_as_it_has_one() {
    let bed = Bed::new(VXLAN);
    bed.server.put_node(node("n1", &[]));
    let store = bed.store("n1").await;
    for _ in 0..2 {
        let error = acquire(&store, public("192.0.2.1", ""), &vxlan(MAC, "")).await.unwrap_err();
        assert!(matches!(error, StoreError::Unusable(_)));
        let text = error.to_string();
        for part in
            ["node \"n1\" pod cidr not assigned", "--allocate-node-cidrs=true --cluster-cidr=10.244.0.0/16"]
        {
            assert!(text.contains(part), "{text}");
        }
    }
    let events = bed.server.events();
    assert_eq!(events.len(), 1, "said once");
    assert_eq!(events[0]["involvedObject"]["name"], "n1");
    assert!(events[0]["message"].as_str().unwrap().contains("--allocate-node-cidrs"));

    let stirred = store.stirred();
    tokio::pin!(stirred);
    not_while("a heartbeat stirs nobody", &mut stirred, async {
        poll("a watch", || bed.server.watching() == 1).await;
        bed.server.heartbeat("n1");
        store.node_public().await.unwrap();
    })
    .await;
    bed.server.edit_node("n1", |node| {
        node["spec"] = json!({"podCIDR": "10.244.5.0/24", "podCIDRs": ["10.244.5.0/24"]});
    });
    soon("stirred", stirred).await;
    assert_eq!(acquire_v4(&store, 1).await.subnets.to_string(), "10.244.5.0/24");
}

#[tokio::test]
async fn leaving_an_event_may_be_forbidden() {
    let bed = Bed::new(VXLAN);
    bed.server.put_node(node("n1", &[]));
    let refusal = Refusal { method: "POST", path: "/events".into(), status: 403, message: "no".into() };
    bed.server.behave(|behaviour| behaviour.refusals.push(refusal));
    let store = bed.store("n1").await;
    let error = acquire(&store, public("192.0.2.1", ""), &vxlan(MAC, "")).await.unwrap_err();
    assert!(error.to_string().contains("pod cidr not assigned"), "{error}");
}

#[tokio::test]
async fn a_node_that_is_not_registered_yet_is_waited_for() {
    let bed = Bed::new(VXLAN);
    let store = bed.store("n1").await;
    let error = acquire(&store, public("192.0.2.1", ""), &vxlan(MAC, "")).await.unwrap_err().to_string();
    assert!(error.contains("no node \"n1\" yet") && error.contains("NODE_NAME"), "{error}");
    let waiting = std::sync::Arc::clone(&store);
    let mut task = spawn(async move { waiting.stirred().await });
    poll("a watch", || bed.server.watching() == 1).await;
    bed.server.put_node(node("n1", &["10.244.5.0/24"]));
    soon("stirred", &mut task.0).await.unwrap();
    acquire_v4(&store, 1).await;
    bed.server.delete_node("n1");
    soon("stirred by the deletion", store.stirred()).await;
}

#[tokio::test]
async fn subnets_that_cannot_be_used_are_named_with_the_remedy() {
    for (config, cidrs, parts) in [
        (VXLAN, &["10.99.3.0/24"][..], &["10.99.3.0/24", "10.244.0.0/16", "Network", "--cluster-cidr"][..]),
        (VXLAN, &["10.0.0.0/8"], &["10.0.0.0/8", "10.244.0.0/16"]),
        (VXLAN, &["fd00:244:0:3::/64"], &["fd00:244:0:3::/64", "does not enable"]),
        (VXLAN, &["10.244.3.0/24", "10.244.4.0/24", "fd00::/64"], &["spec.podCIDRs has 3 entries"]),
        (VXLAN, &["10.244.3.0"], &["spec.podCIDRs", "\"10.244.3.0\""]),
        (DUAL, &["10.244.3.0/24", "fd99::/64"], &["fd99::/64", "fd00:244::/48", "IPv6Network"]),
    ] {
        let bed = Bed::new(config);
        bed.server.put_node(node("n1", cidrs));
        let store = bed.store("n1").await;
        let error = acquire(&store, public("192.0.2.1", ""), &vxlan(MAC, "")).await.unwrap_err().to_string();
        assert!(error.contains("n1") && parts.iter().all(|part| error.contains(part)), "{error}");
        assert_eq!(bed.patches(), []);
    }
}

#[tokio::test]
async fn a_node_with_one_family_takes_part_in_that_one() {
    let bed = Bed::new(DUAL);
    bed.server.put_node(node("n1", &["10.244.3.0/24"]));
    let store = bed.store("n1").await;
    let lease = acquire(&store, public("192.0.2.1", "2001:db8::1"), &vxlan(MAC, "")).await.unwrap();
    assert_eq!(lease.subnets.to_string(), "10.244.3.0/24");

    let bed = Bed::new(VXLAN);
    bed.server.put_node(node("n1", &["fd00:244:0:3::/64", "10.244.3.0/24"]));
    let store = bed.store("n1").await;
    assert_eq!(acquire_v4(&store, 1).await.subnets.to_string(), "10.244.3.0/24", "IPv6 is not enabled");
}

#[tokio::test]
async fn the_other_backends_write_what_go_writes() {
    for (attachment, body) in [
        (
            Attachment::HostGw,
            r#"{"metadata":{"annotations":{"f/backend-data":"null","f/backend-type":"host-gw","f/kube-subnet-manager":"true","f/public-ip":"192.0.2.1"}}}"#,
        ),
        (
            Attachment::Udp,
            r#"{"metadata":{"annotations":{"f/backend-data":"null","f/backend-type":"","f/kube-subnet-manager":"true","f/public-ip":"192.0.2.1"}}}"#,
        ),
    ] {
        let bed = Bed::new(VXLAN);
        bed.server.put_node(node("n1", &["10.244.3.0/24"]));
        acquire(&*bed.store("n1").await, public("192.0.2.1", ""), &attachment).await.unwrap();
        assert_eq!(bed.bodies(), [body]);
    }
}

#[tokio::test]
async fn an_overwrite_is_announced_instead_of_the_own_address_and_a_wrong_one_is_named() {
    let bed = Bed::new(VXLAN);
    bed.server.put_node(node("n1", &["10.244.3.0/24"]));
    bed.annotate("n1", "public-ip-overwrite", Some("172.18.0.2"));
    let store = bed.store("n1").await;
    let lease = acquire_v4(&store, 1).await;
    assert_eq!(lease.public, public("192.0.2.1", ""), "the device keeps its own");
    assert_eq!(bed.annotation("n1", "public-ip").unwrap(), "172.18.0.2");
    bed.annotate("n1", "public-ip-overwrite", Some("node-1"));
    soon("stirred", store.stirred()).await;
    let error = acquire(&store, public("192.0.2.1", ""), &vxlan(MAC, "")).await.unwrap_err().to_string();
    assert!(error.contains("public-ip-overwrite") && error.contains("\"node-1\""), "{error}");
    assert_eq!(bed.patches().len(), 1);
}

#[tokio::test]
async fn annotations_are_written_under_the_operators_prefix() {
    let bed = Bed::new(VXLAN);
    bed.server.put_node(node("n1", &["10.244.3.0/24"]));
    let mut options = bed.options("n1");
    options.annotation_prefix = "example.org/blue".into();
    let store = subnet::kube::Kube::new(options).await.unwrap();
    acquire_v4(&store, 1).await;
    let node = bed.server.node("n1").unwrap();
    assert_eq!(node["metadata"]["annotations"]["example.org/blue-public-ip"], "192.0.2.1");
    assert!(!node.to_string().contains(PREFIX));
}

#[tokio::test]
async fn the_operators_public_addresses_are_read_from_the_node() {
    let bed = Bed::new(VXLAN);
    bed.server.put_node(node("n1", &["10.244.3.0/24"]));
    let store = bed.store("n1").await;
    assert_eq!(store.node_public().await.unwrap(), PublicAddrs::default());
    acquire_v4(&store, 1).await;
    bed.annotate("n1", "node-public-ip", Some("192.0.2.44"));
    soon("stirred", store.stirred()).await;
    bed.annotate("n1", "node-public-ipv6", Some("2001:db8::44"));
    soon("stirred", store.stirred()).await;
    assert_eq!(store.node_public().await.unwrap(), public("192.0.2.44", "2001:db8::44"));
    bed.annotate("n1", "node-public-ip", Some("2001:db8::45"));
    let error = store.node_public().await.unwrap_err().to_string();
    assert!(
        error.contains("flannel.alpha.coreos.com/node-public-ip") && error.contains("2001:db8::45"),
        "{error}"
    );
}

#[tokio::test]
async fn own_writing_and_heartbeats_stir_nobody() {
    let bed = Bed::new(VXLAN);
    bed.server.put_node(node("n1", &["10.244.3.0/24"]));
    let store = bed.store("n1").await;
    acquire_v4(&store, 1).await;
    store.node_public().await.unwrap();
    not_while("stirred by itself", store.stirred(), async {
        poll("a watch", || bed.server.watching() == 1).await;
        for number in 2..5 {
            acquire_v4(&store, number).await;
            bed.server.heartbeat("n1");
            store.node_public().await.unwrap();
        }
    })
    .await;
}
