//! What watches tell, in each order.

use subnet::policy::{Isolation, Labels, NetworkPolicy, Selector};

use super::*;
use crate::policy::announce::Announcement;

const POLICIES: u32 = 1;
const OWN: u32 = 2;
const OF_BANK: u32 = 3;
const ALL: u32 = 4;

struct Bed {
    known: Known,
    cluster: Cluster,
    kept: Kept,
    _files: tempfile::TempDir,
}

impl Bed {
    fn new() -> Self {
        let files = tempfile::tempdir().unwrap();
        let kept = Kept::open(files.path().join("policy")).unwrap();
        let mut known = Known::default();
        known.begin(POLICIES, Watch::Policies);
        known.begin(OWN, Watch::OwnPods);
        Self { known, cluster: Cluster::default(), kept, _files: files }
    }

    fn hear(&mut self, watch: u32, told: impl IntoIterator<Item = Told>) -> Effect {
        let mut effect = Effect::default();
        for told in told {
            effect = self.known.hear(watch, told, &mut self.cluster, &mut self.kept);
        }
        effect
    }

    fn uids(&self) -> Vec<u128> {
        let mut uids: Vec<u128> = self.cluster.uids().map(|uid| uid.0).collect();
        uids.sort_unstable();
        uids
    }

    fn policies(&self) -> Vec<String> {
        self.cluster.policies().map(|policy| policy.name.to_string()).collect()
    }
}

fn pod(uid: u128, namespace: &str, local: bool) -> Pod {
    Pod {
        uid: Uid(uid),
        name: ObjectName::new(namespace, format!("pod-{uid}")),
        labels: Labels::new(),
        addresses: vec![[10, 0, 0, uid as u8].into()],
        ports: Vec::new(),
        created: 0,
        local,
    }
}

fn told(pod: Pod) -> Told {
    Told::Pod(ReadPod::Own(pod))
}

fn policy(name: &str, isolates: bool) -> ReadPolicy {
    let ingress = if isolates { Isolation::Isolated([].into()) } else { Isolation::Unspecified };
    let (pods, egress) = (Selector::everything(), Isolation::Unspecified);
    let policy = NetworkPolicy { name: ObjectName::new("shop", name), pods, ingress, egress };
    ReadPolicy { policy, ignored: Vec::new() }
}

#[test]
fn nothing_is_removed_while_a_list_is_under_way_and_what_it_lacks_is_afterwards() {
    let mut bed = Bed::new();
    let put = |name: &str, version| Told::Policy(Box::new(policy(name, true)), version);
    bed.hear(POLICIES, [Told::Listing, put("a", 1), put("b", 2)]);
    assert!(!bed.known.are_complete([POLICIES].into_iter()));
    bed.hear(POLICIES, [Told::Listed]);
    assert!(bed.known.are_complete([POLICIES].into_iter()));
    bed.hear(POLICIES, [Told::Listing, put("b", 2)]);
    assert_eq!(bed.policies(), ["shop/a", "shop/b"]);
    // One that is broken off and begun again.
    bed.hear(POLICIES, [Told::Listing, put("a", 1)]);
    assert_eq!(bed.policies(), ["shop/a", "shop/b"]);
    assert!(bed.hear(POLICIES, [Told::Listed]).demand);
    assert_eq!(bed.policies(), ["shop/a"]);
    // A watch that was given up has no receiver.
    assert_eq!(bed.hear(77, [put("c", 3)]), Effect::default());
    assert_eq!(bed.policies(), ["shop/a"]);
}

#[test]
fn a_watch_that_is_behind_undoes_nothing() {
    let mut bed = Bed::new();
    let isolates = |bed: &Bed| bed.cluster.knows_policy(&policy("a", true).policy);
    bed.known.set_policy(policy("a", true), 9, true, &mut bed.cluster);
    let older = bed.hear(POLICIES, [Told::Policy(Box::new(policy("a", false)), 8)]);
    assert!(isolates(&bed) && older == Effect::default());
    bed.hear(POLICIES, [Told::Listing, Told::Listed]);
    assert!(isolates(&bed), "the list is of before");
    bed.hear(POLICIES, [Told::Policy(Box::new(policy("a", true)), 9)]);
    bed.hear(POLICIES, [Told::Policy(Box::new(policy("a", false)), 10)]);
    assert!(!isolates(&bed));
    // This node's pods are told of by one watch alone.
    bed.known.begin(ALL, Watch::AllPods);
    bed.hear(OWN, [Told::Listing, told(pod(1, "shop", true)), Told::Listed]);
    assert_eq!(bed.hear(ALL, [told(pod(1, "shop", false))]), Effect::default());
    assert_eq!(bed.cluster.pods_elsewhere(|_| true), []);
    bed.hear(ALL, [Told::Listing, told(pod(2, "shop", false)), told(pod(3, "bank", false)), Told::Listed]);
    bed.hear(ALL, [Told::Listing, told(pod(3, "bank", false)), Told::Listed]);
    assert_eq!(bed.uids(), [1, 3], "the own pod is not what this list is about");
}

#[test]
fn pods_of_a_watch_that_is_given_up_go_unless_another_one_has_them() {
    let mut bed = Bed::new();
    bed.known.begin(OF_BANK, Watch::PodsOf("bank".into()));
    bed.known.begin(ALL, Watch::AllPods);
    bed.hear(OWN, [told(pod(1, "bank", true))]);
    bed.hear(OF_BANK, [told(pod(2, "bank", false))]);
    bed.hear(ALL, [told(pod(2, "bank", false)), told(pod(3, "shop", false))]);
    bed.known.end(ALL, &mut bed.cluster);
    assert_eq!(bed.uids(), [1, 2]);
    bed.known.end(OF_BANK, &mut bed.cluster);
    assert_eq!(bed.uids(), [1]);
}

#[test]
fn what_was_announced_of_a_pod_counts_as_long_as_its_object_is_there() {
    let mut bed = Bed::new();
    let announced = Announcement {
        namespace: "shop".into(),
        pod: "pod-1".into(),
        uid: format!("{:032x}", 1),
        container: "c1".into(),
        host_interface: "veth0".into(),
        mac: None,
        addresses: vec!["10.0.0.77".parse().unwrap()],
    };
    bed.kept.put(&announced).unwrap();
    bed.hear(OWN, [Told::Listing, told(pod(1, "shop", true)), Told::Listed]);
    assert_eq!(bed.kept.of(&pod(1, "shop", true)), Some(&announced));
    // The addresses of one that has ended are free, though its object stays.
    bed.hear(OWN, [Told::Pod(ReadPod::Without(Uid(1)))]);
    assert_eq!((bed.kept.of(&pod(1, "shop", true)), bed.uids()), (None, vec![]));
    bed.kept.put(&announced).unwrap();
    bed.hear(OWN, [Told::Listing, Told::Listed]);
    assert_eq!(bed.kept.of(&pod(1, "shop", true)), None);
}

#[test]
fn the_most_serious_trouble_is_told() {
    let mut bed = Bed::new();
    let away = || StoreError::Unreachable { store: "API".into(), why: "away".into() };
    let denied = || StoreError::Denied { store: "API".into(), why: "no".into() };
    bed.hear(POLICIES, [Told::Trouble(away())]);
    bed.hear(OWN, [Told::Trouble(denied())]);
    let trouble = |bed: &Bed| bed.known.trouble().map(ToString::to_string);
    assert_eq!(trouble(&bed), Some(denied().to_string()));
    bed.hear(OWN, [Told::Sound]);
    assert_eq!(trouble(&bed), Some(away().to_string()));
    bed.hear(POLICIES, [Told::Listing, Told::Listed]);
    assert_eq!(trouble(&bed), None);
}

#[tokio::test(start_paused = true)]
async fn a_refusal_counts_from_its_beginning_until_the_server_tells_again() {
    const LASTING: Duration = Duration::from_secs(30);
    let mut bed = Bed::new();
    let denied = || Told::Trouble(StoreError::Denied { store: "API".into(), why: "no".into() });
    let away = || Told::Trouble(StoreError::Unreachable { store: "API".into(), why: "away".into() });
    bed.hear(POLICIES, [denied()]);
    assert!(bed.known.refusal(Duration::ZERO).is_some() && bed.known.refusal(LASTING).is_none());
    tokio::time::advance(LASTING / 2).await;
    bed.hear(POLICIES, [denied()]);
    tokio::time::advance(LASTING / 2).await;
    assert!(bed.known.refusal(LASTING).is_some());
    for end in [away(), Told::Sound, Told::Listed] {
        bed.hear(POLICIES, [end, denied()]);
        assert!(bed.known.refusal(LASTING).is_none() && bed.known.refusal(Duration::ZERO).is_some());
        tokio::time::advance(LASTING).await;
    }
    bed.hear(POLICIES, [Told::Sound]);
    assert!(bed.known.refusal(Duration::ZERO).is_none());
}
