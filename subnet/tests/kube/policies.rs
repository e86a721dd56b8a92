//! Policies, namespaces and pods, followed through all failures on the way.

use std::sync::Arc;

use serde_json::{Value, json};
use subnet::StoreError;
use subnet::kube::{News, PolicyApi, Told, Watch};
use subnet::policy::objects::{ReadPod, uid};
use subnet::policy::{ObjectName, Uid};
use subnet::testing::Refusal;
use tokio::sync::mpsc;

use crate::bed::{Bed, Task, VXLAN, not_while, poll, soon, spawn};

/// A pod object with everything that a real one has too much of.
fn pod(namespace: &str, name: &str, node: &str, address: &str) -> Value {
    json!({
        "metadata": {
            "namespace": namespace, "name": name, "uid": format!("{namespace}-{name}"), "labels": {"app": name},
            "annotations": {"a": "\"status\":{"}, "managedFields": [{"fieldsV1": {"f:status": {}}}],
        },
        "spec": {
            "nodeName": node, "volumes": [{"name": "v", "emptyDir": {}}],
            "containers": [{"name": "c", "env": [{"name": "volumes", "value": "["}], "ports": [{"name": "web", "containerPort": 80}]}],
        },
        "status": {
            "phase": "Running", "podIP": address, "podIPs": [{"ip": address}],
            "conditions": [{"type": "Ready", "status": "True"}], "containerStatuses": [{"name": "c", "state": {}}],
        },
    })
}

fn policy(port: u16) -> Value {
    json!({"podSelector": {}, "ingress": [{"ports": [{"port": port}]}]})
}

/// What a watch tells, in words.
struct Teller {
    news: mpsc::Receiver<News>,
    _following: Task<()>,
}

impl Teller {
    async fn of(bed: &Bed, watch: Watch) -> Self {
        let (sender, news) = mpsc::channel(8);
        let api = api(bed).await;
        Self { news, _following: spawn(async move { api.follow(&watch, 7, &sender).await }) }
    }

    async fn next(&mut self) -> String {
        let news = soon("news", self.news.recv()).await.unwrap();
        assert_eq!(news.watch, 7);
        words(news.told)
    }

    async fn expect(&mut self, expected: &[&str]) {
        for expected in expected {
            assert_eq!(self.next().await, *expected);
        }
    }

    /// The next that is told and is not that a connection broke.
    async fn until(&mut self, expected: &str) {
        while self.next().await != expected {}
    }
}

fn words(told: Told) -> String {
    match told {
        Told::Listing => "listing".into(),
        Told::Listed => "listed".into(),
        Told::Policy(read, version) => {
            assert!(version > 0);
            format!("policy {}", read.policy.name)
        }
        Told::PolicyGone(name) => format!("no policy {name}"),
        Told::Namespace(name, labels) => {
            let labels: Vec<String> = labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
            format!("namespace {name} {}", labels.join(" "))
        }
        Told::NamespaceGone(name) => format!("no namespace {name}"),
        Told::Pod(ReadPod::Own(pod)) => {
            let labels: Vec<&str> = pod.labels.values().map(String::as_str).collect();
            let ports: Vec<u16> = pod.ports.iter().map(|port| port.port).collect();
            format!("pod {} {labels:?} {:?} {ports:?} local={}", pod.name, pod.addresses, pod.local)
        }
        Told::Pod(ReadPod::Without(_)) => "pod without".into(),
        Told::PodGone(_) => "no pod".into(),
        Told::Unreadable(error) => error.to_string(),
        Told::Trouble(StoreError::Denied { why, .. }) => format!("denied: {why}"),
        Told::Trouble(_) => "trouble".into(),
        Told::Sound => "sound".into(),
    }
}

async fn api(bed: &Bed) -> Arc<PolicyApi> {
    Arc::new(bed.store("n1").await.policy_api())
}

#[tokio::test]
async fn policies_and_namespaces_are_told_from_the_list_on() {
    let bed = Bed::new(VXLAN);
    bed.server.put_namespace("shop", &[("team", "a")]);
    bed.server.put_policy("shop", "deny", json!({"podSelector": {}}));
    let mut policies = Teller::of(&bed, Watch::Policies).await;
    policies.expect(&["listing", "policy shop/deny", "listed", "sound"]).await;
    bed.server.put_policy("shop", "deny", policy(80));
    policies.expect(&["policy shop/deny"]).await;
    bed.server.delete_policy("shop", "deny");
    policies.expect(&["no policy shop/deny"]).await;
    let mut namespaces = Teller::of(&bed, Watch::Namespaces).await;
    let shop = "namespace shop kubernetes.io/metadata.name=shop team=a";
    namespaces.expect(&["listing", shop, "listed", "sound"]).await;
    bed.server.put_namespace("bank", &[]);
    namespaces.expect(&["namespace bank kubernetes.io/metadata.name=bank"]).await;
    bed.server.delete_namespace("shop");
    namespaces.expect(&["no namespace shop"]).await;
}

#[tokio::test]
async fn pods_are_asked_for_by_node_or_namespace_and_the_bulk_of_them_is_passed_over() {
    let bed = Bed::new(VXLAN);
    bed.server.put_pod_object(pod("shop", "web", "n1", "10.0.0.1"));
    bed.server.put_pod_object(pod("shop", "db", "n2", "10.0.1.1"));
    bed.server.put_pod_object(pod("bank", "vault", "n1", "10.0.0.2"));
    let web = "pod shop/web [\"web\"] [10.0.0.1] [80] local=true";
    let db = "pod shop/db [\"db\"] [10.0.1.1] [80] local=false";
    let vault = "pod bank/vault [\"vault\"] [10.0.0.2] [80] local=true";
    Teller::of(&bed, Watch::OwnPods).await.expect(&["listing", vault, web, "listed", "sound"]).await;
    Teller::of(&bed, Watch::AllPods).await.expect(&["listing", vault, db, web, "listed", "sound"]).await;
    let mut shop = Teller::of(&bed, Watch::PodsOf("shop".into())).await;
    shop.expect(&["listing", db, web, "listed", "sound"]).await;
    bed.server.delete_pod("shop", "web");
    bed.server.put_pod_object(pod("bank", "till", "n1", "10.0.0.3"));
    let mut ended = pod("shop", "db", "n2", "10.0.1.1");
    ended["status"]["phase"] = "Succeeded".into();
    bed.server.put_pod_object(ended);
    shop.expect(&["no pod", "pod without"]).await;
    let paths: Vec<String> = bed.server.requests().into_iter().map(|request| request.path).collect();
    let asked = |part: &str| paths.iter().filter(|path| path.contains(part)).count();
    assert_eq!(asked("/api/v1/pods?fieldSelector=spec.nodeName%3Dn1&"), 2, "{paths:?}");
    assert_eq!((asked("/api/v1/pods?limit"), asked("/api/v1/namespaces/shop/pods?")), (1, 2), "{paths:?}");
}

#[tokio::test]
async fn nothing_is_complete_before_the_list_is() {
    let bed = Bed::new(VXLAN);
    (0..9).for_each(|n| bed.server.put_policy("shop", &format!("p{n}"), policy(80)));
    bed.server.behave(|behaviour| behaviour.lists_stop_after = Some(2));
    let mut told = Teller::of(&bed, Watch::Policies).await;
    told.expect(&["listing", "policy shop/p0", "policy shop/p1"]).await;
    let api = api(&bed).await;
    not_while("more than was sent", told.next(), async {
        for _ in 0..20 {
            assert!(api.pod(&ObjectName::new("a", "b")).await.unwrap().is_none());
        }
    })
    .await;
    bed.server.behave(|behaviour| behaviour.lists_stop_after = None);
    for n in 2..9 {
        told.expect(&[&format!("policy shop/p{n}")]).await;
    }
    told.expect(&["listed", "sound"]).await;
}

#[tokio::test]
async fn a_watch_whose_version_is_compacted_is_listed_anew() {
    let bed = Bed::new(VXLAN);
    bed.server.put_policy("shop", "old", policy(80));
    bed.server.put_policy("shop", "stays", policy(80));
    let mut told = Teller::of(&bed, Watch::Policies).await;
    told.expect(&["listing", "policy shop/old", "policy shop/stays", "listed", "sound"]).await;
    // While no watch is open, so that the change is in none.
    bed.server.behave(|behaviour| behaviour.down = true);
    bed.server.delete_policy("shop", "old");
    bed.server.compact();
    bed.server.behave(|behaviour| behaviour.down = false);
    told.until("listing").await;
    told.expect(&["policy shop/stays", "listed", "sound"]).await;
}

#[tokio::test]
async fn a_server_that_is_away_is_trouble_and_ends_nothing() {
    let bed = Bed::new(VXLAN);
    bed.server.put_pod_object(pod("shop", "web", "n1", "10.0.0.1"));
    let mut told = Teller::of(&bed, Watch::OwnPods).await;
    told.until("sound").await;
    bed.server.behave(|behaviour| behaviour.down = true);
    told.expect(&["trouble"]).await;
    bed.server.put_pod_object(pod("shop", "db", "n1", "10.0.0.2"));
    bed.server.behave(|behaviour| behaviour.down = false);
    told.until("sound").await;
    told.expect(&["pod shop/db [\"db\"] [10.0.0.2] [80] local=true"]).await;
}

#[tokio::test]
async fn a_role_without_the_rights_is_named_with_what_it_lacks() {
    let bed = Bed::new(VXLAN);
    let message = "networkpolicies.networking.k8s.io is forbidden: User \"x\" cannot list resource";
    let refusal =
        Refusal { method: "GET", path: "/networkpolicies".into(), status: 403, message: message.into() };
    bed.server.behave(|behaviour| behaviour.refusals.push(refusal));
    let mut told = Teller::of(&bed, Watch::Policies).await;
    let why = told.next().await;
    for part in ["denied", message, "get, list and watch", "kube-flannel-network-policy.yml"] {
        assert!(why.contains(part), "{why}");
    }
    bed.server.behave(|behaviour| behaviour.refusals.clear());
    told.until("sound").await;
    // What leases need is another right.
    let refusal = Refusal { method: "GET", path: "/nodes".into(), status: 403, message: "no".into() };
    bed.server.behave(|behaviour| behaviour.refusals.push(refusal));
    let why = subnet::LeaseStore::node_public(&*bed.store("n1").await).await.unwrap_err().to_string();
    assert!(why.contains("watch of nodes") && !why.contains("networkpolicies"), "{why}");
}

#[tokio::test]
async fn an_object_that_can_not_be_read_is_told_and_ends_no_watch() {
    let bed = Bed::new(VXLAN);
    bed.server.put_policy("shop", "odd", json!({"podSelector": {"matchLabels": 5}}));
    bed.server.put_policy("shop", "plain", policy(80));
    let mut told = Teller::of(&bed, Watch::Policies).await;
    told.expect(&["listing"]).await;
    assert!(told.next().await.contains("can't be read"));
    told.expect(&["policy shop/plain", "listed", "sound"]).await;
}

#[tokio::test]
async fn for_an_add_the_policies_of_a_namespace_and_a_pod_are_read_as_they_are_now() {
    let bed = Bed::new(VXLAN);
    bed.server.put_policy("shop", "deny", policy(80));
    bed.server.put_policy("bank", "deny", policy(80));
    let api = api(&bed).await;
    let read = api.policies_of("shop").await.unwrap();
    assert_eq!(read.len(), 1);
    assert_eq!((read[0].0.policy.name.to_string(), read[0].1), ("shop/deny".to_owned(), 1));
    let asked = bed.server.requests().pop().unwrap().path;
    assert!(!asked.contains("resourceVersion"), "not the newest: {asked}");

    assert!(api.pod(&ObjectName::new("shop", "web")).await.unwrap().is_none());
    bed.server.put_pod_object(pod("shop", "web", "n1", "10.0.0.1"));
    let found = api.pod(&ObjectName::new("shop", "web")).await.unwrap().unwrap();
    let ReadPod::Own(found_pod) = found.pod else { panic!("no pod") };
    assert_eq!((found_pod.uid, found.static_uid), (uid("shop-web"), None));
    let mut mirror = pod("shop", "fixed", "n1", "10.0.0.2");
    let hash = "0123456789abcdef0123456789abcdef";
    mirror["metadata"]["annotations"] =
        json!({"kubernetes.io/config.mirror": hash, "kubernetes.io/config.hash": hash});
    bed.server.put_pod_object(mirror);
    let found = api.pod(&ObjectName::new("shop", "fixed")).await.unwrap().unwrap();
    assert_eq!(found.static_uid, Some(Uid(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef)));
    bed.server.behave(|behaviour| behaviour.down = true);
    assert!(api.policies_of("shop").await.is_err());
}

#[tokio::test]
async fn a_watch_ends_when_nobody_listens() {
    let bed = Bed::new(VXLAN);
    let told = Teller::of(&bed, Watch::Policies).await;
    poll("the watch", || bed.server.watching() == 1).await;
    drop(told);
    poll("its end", || bed.server.watching() == 0).await;
}
