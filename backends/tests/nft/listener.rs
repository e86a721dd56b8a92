//! Who is woken by what.

use std::net::Ipv4Addr;
use std::sync::Mutex;
use std::time::Duration;

use backends::nft::{
    Chain, Change, Hook, KeyType, Moved, Nft, NftListener, Rule, Set, Span, Table, TableFamily, TableId,
    Watched, matches::*,
};
use subnet::Family;
use tokio::runtime::Runtime;

use crate::Bed;
use crate::fixture::flannel;

const LIMIT: Duration = Duration::from_secs(20);

/// A listener that knows `bed.nft` as its own, and watches our table, a table `signal` and the hook forward.
struct Ears {
    runtime: Runtime,
    listener: NftListener,
    watched: Mutex<Watched>,
}

impl Ears {
    fn of(bed: &mut Bed) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let listener = bed.namespace.run(|| {
            let _inside = runtime.enter();
            NftListener::open().unwrap()
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

/// A table with elements without end, and as many rules as a large cluster's policies take.
fn huge(name: &str, elements: u32) -> Table {
    let mut table = Table::new(ip(name));
    let address = |number: u32| Span::address(Ipv4Addr::from_bits(0x0a00_0000 + number).into());
    table.sets = vec![Set::new("s", &[KeyType::Ipv4]).with((0..elements).map(address))];
    let mut chain = Chain::regular("c");
    chain.rules = vec![Rule::new([in_set(&[Field::Source(Family::V4)], "s"), counter(), accept()]); 5_000];
    table.chains = vec![chain];
    table
}

#[test]
fn our_own_large_changes_do_not_overrun_the_listener() {
    let mut bed = Bed::new();
    let ears = Ears::of(&mut bed);
    bed.nft.apply(&[huge("flannel-ipv4", 20_000)]).unwrap();
    bed.nft.apply(&[huge("flannel-ipv4", 20_000)]).unwrap();
    assert!(ears.heard_nothing(&bed));
}

#[test]
fn a_listener_that_fell_behind_is_told_to_look_for_itself() {
    let mut bed = Bed::new();
    let ears = Ears::of(&mut bed);
    let noise = huge("noise", 100_000);
    for _ in 0..4 {
        bed.nft.apply(std::slice::from_ref(&noise)).unwrap();
    }
    assert_eq!(ears.next(), Moved::Anything);
}

#[test]
fn a_listener_can_run_on_any_thread() {
    fn send<T: Send>(_: &T) {}
    let mut bed = Bed::new();
    let ears = Ears::of(&mut bed);
    let moved = tokio::sync::Notify::new();
    send(&ears.listener.run(&ears.watched, &moved));
}
