//! The filter of tunnel ports on the real kernel: cheap for peers that come and go, renewed, put right, removed.

use std::thread;
use std::time::{Duration, Instant};

use backends::firewall::nftables::NftFirewall;
use backends::{Firewall, Look, Traffic, TunnelFilter, TunnelPort};
use ipnet::IpNet;
use subnet::Family;

use crate::Bed;

/// A filter of this family with so many peers.
fn filter(family: Family, peers: u32) -> TunnelFilter {
    let (network, base) = match family {
        Family::V4 => ("10.244.0.0/16", "192.168.0.0/16"),
        Family::V6 => ("fd00:244::/48", "2001:db8::/32"),
    };
    let base: IpNet = base.parse().unwrap();
    let peer = |number: u32| match base {
        IpNet::V4(v4) => std::net::IpAddr::V4((v4.network().to_bits() + number).into()),
        IpNet::V6(v6) => std::net::IpAddr::V6((v6.network().to_bits() + u128::from(number)).into()),
    };
    TunnelFilter {
        networks: vec![network.parse().unwrap()],
        underlay: "eth0".parse().unwrap(),
        ports: vec![TunnelPort { number: 8472, vnis: [1].into(), check_sources: true }],
        ipip: None,
        peers: (0..peers).map(|number| (peer(number), ())).collect(),
        recalled: false,
    }
}

fn firewall(bed: &Bed) -> NftFirewall {
    bed.namespace.run(|| NftFirewall::open().unwrap())
}

fn family_name(family: Family) -> &'static str {
    if family == Family::V4 { "ip" } else { "ip6" }
}

/// The lines with numbers of rules, which are others once a rule was replaced.
fn rules(bed: &Bed, table: &str) -> Vec<String> {
    let text =
        bed.namespace.command("nft").args(["-s", "-a", "list", "table"]).args(table.split(' ')).ok().unwrap();
    text.lines().filter(|line| line.contains("# handle")).map(str::to_owned).collect()
}

#[test]
fn one_peer_among_twenty_thousand_costs_one_element() {
    for family in Family::BOTH {
        let bed = Bed::new();
        let mut firewall = firewall(&bed);
        let report = firewall.filter_tunnels(&[filter(family, 20_000)], &[], Look::Kernel).unwrap();
        assert!(report.changed.len() == 1 && report.notes.is_empty(), "{report:?}");
        let table = format!("{} flannel-tunnel", family_name(family));
        let before = rules(&bed, &table);
        let start = Instant::now();
        let report = firewall.filter_tunnels(&[filter(family, 20_001)], &[], Look::Remembered).unwrap();
        println!("one peer more: {:?}", start.elapsed());
        assert!(report.changed.is_empty(), "nobody has to be told: {report:?}");
        let set = bed.list(&format!("set {table} peers"));
        let last = filter(family, 20_001).peers.keys().next_back().unwrap().to_string();
        assert!(set.contains(&last), "{last}");
        firewall.filter_tunnels(&[filter(family, 20_000)], &[], Look::Remembered).unwrap();
        assert!(!bed.list(&format!("set {table} peers")).contains(&last));
        assert_eq!(rules(&bed, &table), before);
        // Nothing differs from the desired state, so nothing is reported either.
        let start = Instant::now();
        let report = firewall.filter_tunnels(&[filter(family, 20_000)], &[], Look::Kernel).unwrap();
        println!("a look: {:?}", start.elapsed());
        assert!(report.changed.is_empty(), "{report:?}");
        assert_eq!(rules(&bed, &table), before);
    }
}

#[test]
fn addresses_that_a_recalled_list_lacks_stay_until_the_list_is_complete() {
    for family in Family::BOTH {
        let bed = Bed::new();
        let table = format!("{} flannel-tunnel", family_name(family));
        let admitted = |number: usize| {
            let address = filter(family, 9).peers.keys().nth(number).unwrap().to_string();
            let set = bed.list(&format!("set {table} peers"));
            set.split([' ', ',', '\n']).any(|word| word == address)
        };
        firewall(&bed).filter_tunnels(&[filter(family, 3)], &[], Look::Kernel).unwrap();
        let before = rules(&bed, &table);
        // The next run of the agent knows one peer less, and then another one more.
        let mut firewall = firewall(&bed);
        let recalled = |peers| TunnelFilter { recalled: true, ..filter(family, peers) };
        for look in [Look::Kernel, Look::Remembered, Look::Kernel] {
            firewall.filter_tunnels(&[recalled(2)], &[], look).unwrap();
            assert!(admitted(2) && admitted(1));
        }
        assert_eq!(rules(&bed, &table), before);
        bed.script(&format!("delete table {table}"));
        firewall.filter_tunnels(&[recalled(2)], &[], Look::Kernel).unwrap();
        assert!(admitted(1) && !admitted(2));
        firewall.filter_tunnels(&[filter(family, 3)], &[], Look::Remembered).unwrap();
        assert!(admitted(2));
        firewall.filter_tunnels(&[recalled(2)], &[], Look::Remembered).unwrap();
        assert!(admitted(2));
        firewall.filter_tunnels(&[filter(family, 2)], &[], Look::Remembered).unwrap();
        assert!(admitted(1) && !admitted(2));
    }
}

#[test]
fn a_filter_that_somebody_removed_is_made_again_with_the_next_peer() {
    let bed = Bed::new();
    let mut firewall = firewall(&bed);
    firewall.filter_tunnels(&[filter(Family::V4, 2)], &[], Look::Kernel).unwrap();
    bed.script("flush ruleset");
    let report = firewall.filter_tunnels(&[filter(Family::V4, 3)], &[], Look::Remembered).unwrap();
    assert_eq!(report.changed.len(), 1, "{report:?}");
    assert!(bed.list("set ip flannel-tunnel peers").contains("192.168.0.2"));
}

#[test]
fn every_look_keeps_the_filter_in_force_for_five_minutes_more() {
    let bed = Bed::new();
    let mut firewall = firewall(&bed);
    let wanted = [filter(Family::V6, 2)];
    let left = || -> f64 {
        let text = bed.list("set ip6 flannel-tunnel active");
        let time = text.split("expires ").nth(1).unwrap().split([' ', '\n', '}']).next().unwrap().to_owned();
        // 4m59s824ms
        let number = |unit: char| -> f64 {
            let before = time.replace("ms", "t").split(unit).next().unwrap().to_owned();
            let digits = before.rsplit(|c: char| !c.is_ascii_digit()).next().unwrap_or_default().to_owned();
            if time.replace("ms", "t").contains(unit) { digits.parse().unwrap() } else { 0.0 }
        };
        number('m') * 60.0 + number('s') + number('t') / 1000.0
    };
    firewall.filter_tunnels(&wanted, &[], Look::Kernel).unwrap();
    thread::sleep(Duration::from_secs(2));
    let before = left();
    assert!((1.0..=298.0).contains(&before), "{before}");
    // A machine that does something else may take its time; a renewal is a renewal.
    let renewed = (0..20).any(|_| {
        firewall.filter_tunnels(&wanted, &[], Look::Kernel).unwrap();
        left() > before
    });
    assert!(renewed, "{before} {}", left());
    // It has expired, which takes too long to wait for.
    bed.script("delete element ip6 flannel-tunnel active { 8472 }");
    firewall.filter_tunnels(&wanted, &[], Look::Kernel).unwrap();
    assert!(bed.list("set ip6 flannel-tunnel active").contains("8472"));
}

#[test]
fn what_somebody_changed_since_the_last_look_is_put_right_by_the_next_one() {
    let bed = Bed::new();
    let mut firewall = firewall(&bed);
    let wanted = [filter(Family::V4, 3), filter(Family::V6, 2)];
    let mut look = || firewall.filter_tunnels(&wanted, &[], Look::Kernel).unwrap().changed;
    assert_eq!(look().len(), 2);
    for (script, lost) in [
        ("delete element ip flannel-tunnel peers { 192.168.0.1 }", "192.168.0.1"),
        ("flush chain ip flannel-tunnel input", "jump input-8472"),
        ("delete table ip flannel-tunnel", "192.168.0.1"),
        // Two transactions, of which the second one undoes nothing.
        ("flush set ip flannel-tunnel peers\nadd table ip somebody", "192.168.0.1"),
    ] {
        // Looks at which nothing has changed, before and after.
        assert_eq!((look().len(), look().len()), (0, 0), "{script}");
        script.lines().for_each(|line| bed.script(line));
        assert_eq!(look().len(), 1, "{script}");
        assert!(bed.list("table ip flannel-tunnel").contains(lost), "{script}");
    }
}

#[test]
fn the_filter_of_another_agent_of_this_host_stays() {
    let bed = Bed::new();
    let (mut one, mut other) = (firewall(&bed), firewall(&bed));
    let theirs = TunnelFilter { networks: vec!["10.99.0.0/16".parse().unwrap()], ..filter(Family::V4, 2) };
    one.filter_tunnels(&[filter(Family::V4, 2)], &[], Look::Kernel).unwrap();
    other.filter_tunnels(std::slice::from_ref(&theirs), &[], Look::Kernel).unwrap();
    let tables = || bed.list("tables");
    assert_eq!(tables(), "table ip flannel-tunnel\ntable ip flannel-tunnel-10.99.0.0-16\n");
    let report = one.filter_tunnels(&[filter(Family::V4, 2)], &[], Look::Kernel).unwrap();
    assert!(report.changed.is_empty(), "{report:?}");
    one.filter_tunnels(&[], &["10.244.0.0/16".parse().unwrap()], Look::Kernel).unwrap();
    assert_eq!(tables(), "table ip flannel-tunnel-10.99.0.0-16\n");
    let report = other.filter_tunnels(&[], &["10.99.0.0/16".parse().unwrap()], Look::Kernel).unwrap();
    assert_eq!(report.changed, ["nftables table ip flannel-tunnel-10.99.0.0-16 removed"]);
    assert_eq!(tables(), "");
}

#[test]
fn without_a_tunnel_there_is_no_filter_and_one_that_was_goes() {
    let bed = Bed::new();
    let mut firewall = firewall(&bed);
    let none = TunnelFilter { ports: Vec::new(), ..filter(Family::V4, 2) };
    firewall.filter_tunnels(std::slice::from_ref(&none), &[], Look::Kernel).unwrap();
    assert_eq!(bed.list("tables"), "");
    firewall.filter_tunnels(&[filter(Family::V4, 2)], &[], Look::Kernel).unwrap();
    assert_eq!(bed.list("tables"), "table ip flannel-tunnel\n");
    firewall.filter_tunnels(std::slice::from_ref(&none), &[], Look::Remembered).unwrap();
    assert_eq!(bed.list("tables"), "");
}

#[test]
fn rules_of_ours_leave_the_filter_known_and_what_somebody_else_does_meanwhile_does_not() {
    let bed = Bed::new();
    let mut firewall = firewall(&bed);
    let wanted = [filter(Family::V4, 3)];
    let traffic = |forward| Traffic {
        network: "10.244.0.0/16".parse().unwrap(),
        subnet: "10.244.1.0/24".parse().unwrap(),
        others: Vec::new(),
        masquerade: None,
        forward,
        fast_path: false,
    };
    firewall.filter_tunnels(&wanted, &[], Look::Kernel).unwrap();
    for forward in [true, true, false, true] {
        firewall.converge(&[traffic(forward)], &[]).unwrap();
        assert!(firewall.knows_filters(), "{forward}");
        assert!(firewall.filter_tunnels(&wanted, &[], Look::Kernel).unwrap().changed.is_empty());
    }
    bed.script("delete element ip flannel-tunnel peers { 192.168.0.1 }");
    firewall.converge(&[traffic(false)], &[]).unwrap();
    assert!(!firewall.knows_filters());
    assert_eq!(firewall.filter_tunnels(&wanted, &[], Look::Kernel).unwrap().changed.len(), 1);
    assert!(bed.list("set ip flannel-tunnel peers").contains("192.168.0.1"));
}

#[test]
fn peers_that_come_and_go_leave_the_filter_known_and_nothing_is_read_again() {
    let bed = Bed::new();
    let mut firewall = firewall(&bed);
    let mut filter_for = |peers, look| {
        let report = firewall.filter_tunnels(&[filter(Family::V4, peers)], &[], look).unwrap();
        (report.changed.len(), firewall.knows_filters())
    };
    assert_eq!(filter_for(3, Look::Kernel), (1, true));
    for (peers, look) in [
        (4, Look::Remembered),
        (2, Look::Remembered),
        (5, Look::Kernel),
        (5, Look::Kernel),
        (3, Look::Kernel),
    ] {
        // Nothing is found to be otherwise, since nothing is looked for.
        assert_eq!(filter_for(peers, look), (0, true), "{peers} {look:?}");
        let shown = bed.list("set ip flannel-tunnel peers");
        let has = |number: u32| shown.contains(&format!("192.168.0.{number}"));
        assert!((1..peers).all(has) && !has(peers), "{shown}");
    }
    bed.script("delete element ip flannel-tunnel peers { 192.168.0.1 }");
    assert_eq!(filter_for(4, Look::Remembered), (0, false), "somebody else has changed something");
    assert_eq!(filter_for(4, Look::Kernel), (1, true));
    bed.script("delete element ip flannel-tunnel peers { 192.168.0.1 }");
    assert_eq!(filter_for(5, Look::Kernel), (1, true), "with a peer that came at the same time");
    assert!(bed.list("set ip flannel-tunnel peers").contains("192.168.0.1"));
}
