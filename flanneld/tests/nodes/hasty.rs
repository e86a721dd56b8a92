//! Changes of the configuration one upon another, before the one before has come to its end.

use std::thread;
use std::time::{Duration, Instant};

use backends::testing::{Numbers, Pod};
use subnet::Family;

use crate::bed::Member;
use crate::live::everything;
use crate::site::{Kind, Site, config, logs, lost, pings_of};

const V4: &[Family] = &[Family::V4];
const VXLAN: &str = r#"{"Type":"vxlan"}"#;
/// Old ways stay for 30 s after the last change.
const PATIENCE: Duration = Duration::from_secs(90);

fn configurations() -> Vec<String> {
    let both: &[Family] = &Family::BOTH;
    vec![
        config(V4, VXLAN),
        config(V4, r#"{"Type":"host-gw"}"#),
        config(V4, r#"{"Type":"udp"}"#),
        config(V4, r#"{"Type":"vxlan","VNI":2}"#),
        config(V4, r#"{"Type":"vxlan","Port":4789}"#),
        config(V4, r#"{"Type":"vxlan","MTU":1400,"DirectRouting":true}"#),
        config(both, VXLAN),
        config(both, r#"{"Type":"host-gw"}"#),
        config(both, r#"{"Type":"vxlan","VNI":3,"DirectRouting":true}"#),
        config(V4, VXLAN).replace("10.244.0.0/16", "10.240.0.0/12"),
    ]
}

fn hurry(kind: Kind, seed: u64) {
    let first = config(V4, VXLAN);
    let site = Site::new(kind, &first);
    let members: Vec<Member> = (0..3).map(|_| site.join_with(&["--ip-masq"])).collect();
    let pods: Vec<Pod> = members.iter().map(Member::pod_of_all_families).collect();
    let pings = pings_of(&[&pods[0], &pods[1], &pods[2]], V4);
    let fresh: Vec<String> = members.iter().map(everything).collect();
    let (all, mut numbers) = (configurations(), Numbers(seed));
    let mut story = Vec::new();
    for _ in 0..12 {
        let next = &all[numbers.below(all.len())];
        story.push(next.clone());
        if kind == Kind::Kube {
            for member in &members {
                site.configure_one(&member.node.name(), next);
                thread::sleep(Duration::from_millis(numbers.below(700) as u64));
            }
        } else {
            site.configure(next);
        }
        thread::sleep(Duration::from_millis(numbers.below(1500) as u64));
    }
    site.configure(&first);
    let told = || {
        format!("{kind:?}, seed {seed}\n{}\n{}", story.join("\n"), logs(&members.iter().collect::<Vec<_>>()))
    };
    for (member, fresh) in members.iter().zip(&fresh) {
        let end = Instant::now() + PATIENCE;
        while everything(member) != *fresh {
            if Instant::now() >= end {
                assert_eq!(everything(member), *fresh, "{}", told());
            }
            thread::sleep(Duration::from_millis(500));
        }
        assert!(member.is_ready());
    }
    let lost = lost(pings);
    assert!(lost.iter().all(|lost| *lost == 0), "{lost:?}: {}", told());
}

#[test]
fn changes_in_any_order_and_however_soon_lose_nothing_and_leave_nothing() {
    thread::scope(|scope| {
        for (kind, seed) in [(Kind::Etcd, 2026), (Kind::Files, 11), (Kind::Kube, 22)] {
            let work = move || hurry(kind, seed);
            thread::Builder::new().name(format!("{kind:?}")).spawn_scoped(scope, work).unwrap();
        }
    });
}
