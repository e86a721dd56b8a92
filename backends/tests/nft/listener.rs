//! Who is woken by what.

use std::sync::Mutex;
use std::time::Duration;

use backends::nft::{Change, Hook, Listener, Moved, Nft, TableFamily, TableId, Watched};
use subnet::Family;
use tokio::runtime::Runtime;

use crate::Bed;
use crate::fixture::flannel;

const LIMIT: Duration = Duration::from_secs(20);

/// A listener that knows `bed.nft` as its own, and watches our table, a table `signal` and the hook forward.
struct Ears {
    runtime: Runtime,
    listener: Listener,
    watched: Mutex<Watched>,
}

impl Ears {
    fn of(bed: &mut Bed) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let listener = bed.namespace.run(|| {
            let _inside = runtime.enter();
            Listener::open().unwrap()
        });
        let tables = ["flannel-ipv4", "signal"].map(ip).into();
        let mut watched = Watched { ports: [bed.nft.port()].into(), tables, ..Watched::default() };
        watched.watch_hook(Hook::Forward, &bed.nft.dump_hook(Hook::Forward).unwrap());
        Self { runtime, listener, watched: Mutex::new(watched) }
    }

    fn next(&self) -> Moved {
        let next = async { tokio::time::timeout(LIMIT, self.listener.moved(&self.watched)).await };
        self.runtime.block_on(next).expect("a notification in time").unwrap()
    }

    /// Whether nothing was heard before the first word about a change that is made only now.
    fn heard_nothing(&self, bed: &Bed) -> bool {
        bed.script("add table ip signal");
        self.next() == Moved::Table(ip("signal"))
    }
}

fn ip(name: &str) -> TableId {
    TableId::new(TableFamily::Ip, name)
}

#[test]
fn a_flush_by_somebody_else_wakes_and_our_own_changes_do_not() {
    let mut bed = Bed::new();
    let ears = Ears::of(&mut bed);
    bed.nft.apply(&[flannel(Family::V4), flannel(Family::V6)]).unwrap();
    bed.nft.commit(&[Change::DeleteTable(flannel(Family::V6).id)]).unwrap();
    bed.nft.apply(&[flannel(Family::V4)]).unwrap();
    assert!(ears.heard_nothing(&bed));
    bed.script("flush ruleset");
    while ears.next() != Moved::Table(ip("flannel-ipv4")) {}
}

#[test]
fn every_damage_to_our_table_wakes() {
    let mut bed = Bed::new();
    let ours = Moved::Table(ip("flannel-ipv4"));
    for damage in [
        "delete chain ip flannel-ipv4 forward",
        "flush chain ip flannel-ipv4 postrtg",
        "add rule ip flannel-ipv4 forward drop",
        "add set ip flannel-ipv4 s { type ipv4_addr; }",
        "add chain ip flannel-ipv4 forward { policy drop; }",
        "delete table ip flannel-ipv4",
        "delete table ip flannel-ipv4; add table ip flannel-ipv4",
    ] {
        bed.nft.apply(&[flannel(Family::V4)]).unwrap();
        let ears = Ears::of(&mut bed);
        bed.script(damage);
        assert_eq!(ears.next(), ours, "{damage}");
    }
    let ears = Ears::of(&mut bed);
    let mut other = bed.namespace.run(|| Nft::open().unwrap());
    other.apply(&[flannel(Family::V4)]).unwrap();
    assert_eq!(ears.next(), ours, "another agent");
}

#[test]
fn foreign_tables_wake_only_where_they_touch_forwarding() {
    let mut bed = Bed::new();
    bed.script("table inet fw { chain forward { type filter hook forward priority 0; }; chain input { }; }");
    let ears = Ears::of(&mut bed);
    bed.script(
        "table ip kube-proxy { map m { type ipv4_addr : verdict; }; chain c { type nat hook output priority 0; }; }
         add element ip kube-proxy m { 10.0.0.1 : drop }
         add rule ip kube-proxy c counter
         add rule inet fw input drop
         add table ip6 flannel-ipv4",
    );
    assert!(ears.heard_nothing(&bed));
    let id = TableId::new(TableFamily::Inet, "fw");
    bed.script("add rule inet fw forward drop");
    assert_eq!(ears.next(), Moved::Chain(id.clone(), "forward".to_owned()));
    bed.script("add chain inet fw late { type filter hook forward priority 1; policy drop; }");
    assert_eq!(ears.next(), Moved::Chain(id.clone(), "late".to_owned()));
    bed.script("delete chain inet fw forward");
    while ears.next() != Moved::Chain(id.clone(), "forward".to_owned()) {}
}

#[test]
fn a_listener_that_fell_behind_is_told_to_look_for_itself() {
    let mut bed = Bed::new();
    bed.script("table ip noise { set s { type ipv4_addr; }; }");
    let ears = Ears::of(&mut bed);
    let add = |block: u8| {
        let elements: Vec<String> =
            (0..10_000u32).map(|i| format!("10.{block}.{}.{}", i / 256, i % 256)).collect();
        bed.script(&format!("add element ip noise s {{ {} }}", elements.join(", ")));
    };
    (0..3).for_each(add);
    assert_eq!(ears.next(), Moved::Anything);
}
