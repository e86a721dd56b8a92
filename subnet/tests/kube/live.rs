//! What is decided again while a node runs: its network's families, and what its operator says about it.

use std::collections::BTreeMap;
use std::sync::Arc;

use subnet::kube::{Kube, KubeOptions};
use subnet::testing::{announced, node};
use subnet::{Attachment, LeaseStore, NetworkConfig, Subnets};

use crate::bed::{
    Bed, DUAL, Follower, MAC, PREFIX, VXLAN, acquire, acquire_v4, not_while, poll, public, soon, spawn, vxlan,
};

const OTHER_MAC: &str = "02:00:00:00:00:77";
const CIDRS: [&str; 2] = ["10.244.3.0/24", "fd00:244:0:3::/64"];

type Annotations = BTreeMap<String, String>;

/// A node of Go flannel with both families, as far as it listens to this one: every patch is an update of
/// which it sees the object before and after (contract §3.2.5, §3.2.6 and K6).
#[derive(Default)]
struct GoReader {
    patches: usize,
    object: Annotations,
    /// What its backend was told last.
    told: Option<Annotations>,
}

impl GoReader {
    fn catch_up(&mut self, bed: &Bed) {
        let bodies = bed.bodies();
        for body in &bodies[self.patches..] {
            let patch: serde_json::Value = serde_json::from_str(body).unwrap();
            let before = self.object.clone();
            for (name, value) in patch["metadata"]["annotations"].as_object().unwrap() {
                let name = name.trim_start_matches("f/").to_owned();
                match value.as_str() {
                    Some(value) => drop(self.object.insert(name, value.to_owned())),
                    None => drop(self.object.remove(&name)),
                }
            }
            let trio = |all: &Annotations, names: [&str; 3]| names.map(|name| all.get(name).cloned());
            let changed = |names| trio(&before, names) != trio(&self.object, names);
            let complete = ["public-ip", "public-ipv6"].iter().all(|name| self.object.contains_key(*name));
            if complete
                && changed(["backend-data", "backend-type", "public-ip"])
                && changed(["backend-v6-data", "backend-type", "public-ipv6"])
                // The backend leaves leases of other types alone.
                && self.object["backend-type"] == "vxlan"
            {
                self.told = Some(self.object.clone());
            }
        }
        self.patches = bodies.len();
    }

    /// Whether it knows what the node says now.
    fn is_up_to_date(&mut self, bed: &Bed) -> bool {
        self.catch_up(bed);
        self.told.as_ref() == Some(&self.object)
    }
}

async fn other_store(bed: &Bed, config: &str) -> Arc<Kube> {
    let net_config_path = bed.write("other.json", config);
    Arc::new(Kube::new(KubeOptions { net_config_path, ..bed.options("n2") }).await.unwrap())
}

async fn take(store: &Kube, v4: &str, v6: &str, attachment: &Attachment) -> String {
    acquire(store, public(v4, v6), attachment).await.unwrap().to_string()
}

#[tokio::test]
async fn a_family_that_is_added_and_each_change_of_one_reach_every_reader() {
    let bed = Bed::new(VXLAN);
    bed.server.put_node(node("n1", &CIDRS));
    let store = bed.store("n1").await;
    let mut go = GoReader::default();
    let before = acquire_v4(&store, 1).await;
    let holding = Arc::clone(&store);
    let mut task = spawn(async move { holding.hold().await });
    let mut follower = Follower::of(&other_store(&bed, DUAL).await);
    follower.words(1).await;
    go.catch_up(&bed);

    bed.write("net-conf.json", DUAL);
    soon("the change", store.network_changed()).await;
    let network = store.network().await.unwrap();
    assert_eq!(store.admits(&network, &before.subnets), Ok(()));
    let work = async {
        let both = vxlan(MAC, MAC);
        let lease = take(&store, "192.0.2.1", "2001:db8::1", &both).await;
        assert_eq!(lease, "10.244.3.0/24 and fd00:244:0:3::/64 of 192.0.2.1 and 2001:db8::1 (vxlan)");
        assert!(go.is_up_to_date(&bed), "IPv6 is new: {:?}", bed.bodies());
        assert_eq!(bed.patches().len(), 3, "what a node with one family says is one patch");
        let v6 = public("192.0.2.1", "2001:db8::1");
        follower.leases("IPv6", |all| all.leases.values().any(|lease| lease.public == v6)).await;

        let other = vxlan(MAC, OTHER_MAC);
        take(&store, "192.0.2.1", "2001:db8::1", &other).await;
        assert!(go.is_up_to_date(&bed), "the MAC of IPv6: {:?}", bed.bodies());
        follower.leases("the MAC", |all| all.leases.values().any(|lease| lease.attachment == other)).await;

        take(&store, "192.0.2.9", "2001:db8::1", &other).await;
        assert!(go.is_up_to_date(&bed), "the address of IPv4: {:?}", bed.bodies());
        let v4 = public("192.0.2.9", "2001:db8::1");
        follower.leases("the address", |all| all.leases.values().any(|lease| lease.public == v4)).await;

        // And away again.
        bed.write("net-conf.json", VXLAN);
        soon("the change", store.network_changed()).await;
        take(&store, "192.0.2.9", "", &vxlan(MAC, "")).await;
        assert_eq!(bed.annotation("n1", "public-ipv6"), None);
        assert_eq!(bed.annotation("n1", "backend-v6-data"), None);
        assert_eq!(bed.annotation("n1", "public-ip").as_deref(), Some("192.0.2.9"));
    };
    not_while("lost", &mut task.0, work).await;
}

#[tokio::test]
async fn the_own_readers_families_follow_the_lease_and_not_the_file() {
    let bed = Bed::new(VXLAN);
    bed.server.put_node(node("n1", &CIDRS));
    bed.server.put_node(announced(node("p1", &["10.244.9.0/24", "fd00:244:0:9::/64"]), "198.51.100.9", MAC));
    bed.annotate("p1", "public-ipv6", Some("2001:db8::9"));
    let store = bed.store("n1").await;
    acquire_v4(&store, 1).await;
    let holding = Arc::clone(&store);
    let _task = spawn(async move { holding.hold().await });
    let mut follower = Follower::of(&store);
    let own = "10.244.3.0/24 of 192.0.2.1 (vxlan)";
    assert_eq!(follower.words(2).await, [own, "10.244.9.0/24 of 198.51.100.9 (vxlan)"]);

    // Reading alone changes nothing: neither what is followed nor what is announced.
    for config in [DUAL, r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:244::/48"}"#] {
        bed.write("net-conf.json", config);
        store.network().await.unwrap();
        bed.annotate("n1", "public-ip", None);
        poll("put back", || bed.annotation("n1", "public-ip").as_deref() == Some("192.0.2.1")).await;
        assert!(bed.annotation("n1", "backend-data").is_some());
    }
    bed.annotate("p1", "public-ip", Some("198.51.100.8"));
    let v4 = public("198.51.100.8", "");
    follower.leases("IPv4 alone", |all| all.leases.values().any(|lease| lease.public == v4)).await;

    bed.write("net-conf.json", DUAL);
    take(&store, "192.0.2.1", "2001:db8::1", &vxlan(MAC, MAC)).await;
    let both = public("198.51.100.8", "2001:db8::9");
    let all = follower.leases("both", |all| all.leases.values().any(|lease| lease.public == both)).await;
    let subnets: Vec<String> = all.leases.keys().map(ToString::to_string).collect();
    assert_eq!(subnets, ["10.244.3.0/24 and fd00:244:0:3::/64", "10.244.9.0/24 and fd00:244:0:9::/64"]);
}

#[tokio::test]
async fn a_peer_between_two_patches_while_a_family_is_added_is_followed_with_both_subnets() {
    let bed = Bed::new(VXLAN);
    bed.server.put_node(node("n1", &CIDRS));
    bed.server.put_node(announced(node("p1", &["10.244.9.0/24", "fd00:244:0:9::/64"]), "198.51.100.9", MAC));
    let store = bed.store("n1").await;
    acquire_v4(&store, 1).await;
    let mut follower = Follower::of(&store);
    follower.words(2).await;

    // An event without a spec leaves it known that a family was left out.
    bed.annotate("p1", "public-ip", Some("198.51.100.10"));
    let moved = |lease: &subnet::Lease| lease.public.v4 == Some("198.51.100.10".parse().unwrap());
    follower.leases("another address", |all| all.leases.values().any(moved)).await;

    // What was known of it before the list of both families stays until the second patch.
    bed.annotate("p1", "backend-type", Some("changing"));
    bed.write("net-conf.json", DUAL);
    take(&store, "192.0.2.1", "2001:db8::1", &vxlan(MAC, MAC)).await;
    let own = public("192.0.2.1", "2001:db8::1");
    follower.leases("the own lease", |all| all.leases.values().any(|lease| lease.public == own)).await;
    bed.annotate("p1", "public-ipv6", Some("2001:db8::9"));
    bed.annotate("p1", "backend-type", Some("vxlan"));
    let both = public("198.51.100.10", "2001:db8::9");
    follower.leases("both", |all| all.leases.values().any(|lease| lease.public == both)).await;
}

#[tokio::test]
async fn a_network_is_admitted_only_if_kubernetes_gave_this_node_subnets_of_it() {
    let bed = Bed::new(VXLAN);
    bed.server.put_node(node("n1", &["10.244.3.0/24"]));
    let store = bed.store("n1").await;
    let held = acquire_v4(&store, 1).await.subnets;
    let network = |json: &str| NetworkConfig::parse_given_subnets(json, &Subnets::default()).unwrap();
    let why = |json: &str| store.admits(&network(json), &held).unwrap_err();
    assert_eq!(store.admits(&network(VXLAN), &held), Ok(()));
    assert_eq!(store.admits(&network(&VXLAN.replace("10.244.0.0/16", "10.240.0.0/12")), &held), Ok(()));
    let error = why(&VXLAN.replace("10.244.", "10.99."));
    for part in ["n1", "its podCIDR 10.244.3.0/24 is not in 10.99.0.0/16", "--cluster-cidr"] {
        assert!(error.contains(part), "{error}");
    }
    let error = why(DUAL);
    for part in ["node \"n1\" has no IPv6 podCIDR", "fd00:244::/48", "--cluster-cidr", "EnableIPv6"] {
        assert!(error.contains(part), "{error}");
    }

    let bed = Bed::new(DUAL);
    bed.server.put_node(node("n1", &CIDRS));
    let store = bed.store("n1").await;
    acquire(&store, public("192.0.2.1", "2001:db8::1"), &vxlan(MAC, MAC)).await.unwrap();
    let held = CIDRS.iter().map(|cidr| cidr.parse::<ipnet::IpNet>().unwrap()).collect();
    assert_eq!(store.admits(&network(DUAL), &held), Ok(()));
    assert_eq!(store.admits(&network(VXLAN), &held), Ok(()), "a family may go");
    let error = store.admits(&network(&DUAL.replace("fd00:244", "fd99:244")), &held).unwrap_err();
    assert!(error.contains("IPv6Network") && error.contains(CIDRS[1]), "{error}");

    // A node that has always done without a family may go on so.
    let bed = Bed::new(DUAL);
    bed.server.put_node(node("n1", &["10.244.3.0/24"]));
    let store = bed.store("n1").await;
    let held = acquire_v4(&store, 1).await.subnets;
    assert_eq!(store.admits(&network(&DUAL.replace("vxlan", "host-gw")), &held), Ok(()));
}

#[tokio::test]
async fn overwrites_that_are_set_changed_and_removed_are_announced_for_either_family() {
    let bed = Bed::new(DUAL);
    bed.server.put_node(node("n1", &CIDRS));
    let store = bed.store("n1").await;
    take(&store, "192.0.2.1", "2001:db8::1", &vxlan(MAC, MAC)).await;
    let mut go = GoReader::default();
    let holding = Arc::clone(&store);
    let mut task = spawn(async move { holding.hold().await });
    let work = async {
        for (name, own, wishes) in [
            ("public-ip", "192.0.2.1", ["172.18.0.2", "172.18.0.3"]),
            ("public-ipv6", "2001:db8::1", ["2001:db8::22", "2001:db8::23"]),
        ] {
            for wish in [Some(wishes[0]), Some(wishes[1]), None] {
                bed.annotate("n1", &format!("{name}-overwrite"), wish);
                let announced = wish.unwrap_or(own);
                let done = || {
                    bed.annotation("n1", name).as_deref() == Some(announced)
                        && bed.annotation("n1", "backend-type").as_deref() == Some("vxlan")
                        && go.is_up_to_date(&bed)
                };
                poll(announced, done).await;
            }
        }
    };
    not_while("lost", &mut task.0, work).await;
}

#[tokio::test]
async fn everybody_who_waits_learns_what_the_operator_decides() {
    let bed = Bed::new(VXLAN);
    bed.server.put_node(node("n1", &["10.244.3.0/24"]));
    let store = bed.store("n1").await;
    acquire_v4(&store, 1).await;
    assert_eq!(store.node_public().await.unwrap(), public("", ""));
    let waiting = || {
        let store = Arc::clone(&store);
        spawn(async move { store.stirred().await })
    };
    let mut tasks = [waiting(), waiting()];
    poll("two watches", || bed.server.watching() == 2).await;
    bed.server.annotate("n1", &format!("{PREFIX}/node-public-ip"), Some("192.0.2.44"));
    for task in &mut tasks {
        soon("stirred", &mut task.0).await.unwrap();
    }
    assert_eq!(store.node_public().await.unwrap(), public("192.0.2.44", ""));
}
