//! Replacing whole tables, and reading them back.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use backends::nft::{
    Base, Chain, Change, CtState, Hook, Nft, NftError, Op, Refit, Rule, Set, Span, Table, TableFamily,
    TableId, Verdict, differs, matches::*,
};
use backends::nft::{KeyType, masquerade_flags};
use ipnet::IpNet;
use subnet::Family;

use crate::fixture::flannel;
use crate::{Bed, plain};

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn gallery_sets() -> Vec<Set> {
    let (v4, v6) = (KeyType::address(Family::V4), KeyType::address(Family::V6));
    let mut nets = Set::new("nets", &[v4]).with_ranges().with([
        Span::net(net("10.0.0.0/8")),
        Span::address([192, 168, 0, 1].into()),
        Span::net(net("255.255.255.0/24")),
        // Inside of another, and next to another: the kernel would refuse both.
        Span::net(net("10.1.0.0/16")),
        Span::net(net("11.0.0.0/8")),
    ]);
    nets.comment = Some("of pods".to_owned());
    let concat = |a, port| Span::concat([Span::net(net(a)), Span::protocol(TCP), port]);
    vec![
        nets,
        Set::new("nodes", &[v6])
            .constant()
            .with([Span::net(net("fd00::1/128")), Span::net(net("fd00::2/128"))]),
        Set::new("ports", &[KeyType::Port]).with_ranges().with([Span::port(53), Span::ports(8000..=8080)]),
        Set::new("marks", &[KeyType::Mark]).with([Span::mark(0x4000)]),
        Set::new("devices", &[KeyType::Interface]).with([Span::interface("flannel.1")]),
        Set::new("peers", &[v4, KeyType::Protocol, KeyType::Port])
            .with([concat("10.0.0.1/32", Span::port(80)), concat("10.0.0.2/32", Span::port(443))]),
        Set::new("blocks", &[v4, KeyType::Protocol, KeyType::Port])
            .with_ranges()
            .with([concat("10.0.0.0/24", Span::ports(80..=90))]),
        Set::verdict_map("pods", &[v4]).with_verdicts([
            (Span::net(net("10.1.0.1/32")), Verdict::Jump("pod".to_owned())),
            (Span::net(net("10.1.0.2/32")), Verdict::Drop),
        ]),
        Set::verdict_map("blocks-to", &[v4]).with_ranges().with_verdicts([
            (Span::net(net("10.2.0.0/24")), Verdict::Goto("pod".to_owned())),
            (Span::net(net("10.2.1.0/24")), Verdict::Accept),
        ]),
    ]
}

fn gallery_chain() -> Chain {
    let mut pod = Chain::regular("pod");
    pod.comment = Some("one of many".to_owned());
    pod.rules = vec![
        Rule::new([ct_state(CtState::ESTABLISHED | CtState::RELATED), counter(), accept()])
            .with_comment("answers"),
        Rule::new([family(Family::V4), in_set(&[Field::Source(Family::V4)], "nets"), accept()]),
        Rule::new([family(Family::V6), not_in_set(&[Field::Destination(Family::V6)], "nodes"), drop()]),
        Rule::new([protocol(Op::Eq, UDP), in_set(&[Field::DestinationPort], "ports"), accept()]),
        Rule::new([protocol(Op::Eq, TCP), destination_ports(1..=1023), leave()]),
        Rule::new([protocol(Op::Eq, SCTP), source_port(Op::Ne, 9), destination_port(Op::Eq, 10), accept()]),
        Rule::new([in_name(Op::Eq, "cni0"), out_name(Op::Ne, "flannel.*"), drop()]),
        Rule::new([in_set(&[Field::InName], "devices"), in_set(&[Field::Mark], "marks"), accept()]),
        Rule::new([mark(Op::Eq, 0x10), goto("last")]),
    ];
    pod
}

/// One of everything that this module can say.
fn gallery() -> Table {
    let mut table = Table::new(TableId::new(TableFamily::Inet, "gallery"));
    table.sets = gallery_sets();
    let pod = gallery_chain();
    let mut base = Chain::base("filter", Base::filter(Hook::Forward, -5));
    let key = [Field::Source(Family::V4), Field::Protocol, Field::DestinationPort];
    base.rules = vec![
        Rule::new([family(Family::V4), verdict_map(&[Field::Source(Family::V4)], "pods")]),
        Rule::new([family(Family::V4), verdict_map(&[Field::Destination(Family::V4)], "blocks-to")]),
        Rule::new([family(Family::V4), in_set(&key, "peers"), jump("last")]),
        Rule::new([family(Family::V4), in_set(&key, "blocks"), accept()]),
        Rule::new([
            family(Family::V4),
            source(Op::Eq, net("10.0.0.0/20")),
            destination(Op::Ne, net("0.0.0.0/0")),
            drop(),
        ]),
        Rule::new([
            family(Family::V6),
            source(Op::Eq, net("fd00::/20")),
            destination(Op::Eq, net("fd00::7/128")),
            accept(),
        ]),
    ];
    let mut nat = Chain::base("nat", Base::nat(Hook::Postrouting, Base::SOURCE_NAT));
    nat.rules = vec![Rule::new([masquerade(0)]), Rule::new([masquerade(masquerade_flags::FULLY_RANDOM)])];
    let mut last = Chain::regular("last");
    last.rules = vec![
        Rule::new([in_name(Op::Ne, "eth0"), reverse_path(false), drop()]),
        Rule::new([source_is_local(), accept()]),
        Rule::new([protocol(Op::Eq, UDP), vni_is_none_of(&[1, 0x00ab_cdef]), accept()]),
    ];
    table.chains = vec![base, pod, last, nat];
    table
}

#[test]
fn everything_reads_back_as_it_was_written_and_nft_understands_it() {
    let mut bed = Bed::new();
    let wanted = [gallery()];
    bed.nft.apply(&wanted).unwrap();
    let found = bed.nft.dump().unwrap();
    assert_eq!(differs(&wanted, &found), None);
    assert_eq!(plain(found).tables, wanted);
    assert_eq!(bed.list("ruleset"), GALLERY);
}

const GALLERY: &str = r#"table inet gallery {
	set nets {
		type ipv4_addr
		flags interval
		comment "of pods"
		elements = { 10.0.0.0/7, 192.168.0.1,
			     255.255.255.0/24 }
	}

	set nodes {
		type ipv6_addr
		flags constant
		elements = { fd00::1,
			     fd00::2 }
	}

	set ports {
		type inet_service
		flags interval
		elements = { 53, 8000-8080 }
	}

	set marks {
		type mark
		elements = { 0x00004000 }
	}

	set devices {
		type ifname
		elements = { "flannel.1" }
	}

	set peers {
		type ipv4_addr . inet_proto . inet_service
		elements = { 10.0.0.1 . tcp . 80,
			     10.0.0.2 . tcp . 443 }
	}

	set blocks {
		type ipv4_addr . inet_proto . inet_service
		flags interval
		elements = { 10.0.0.0/24 . tcp . 80-90 }
	}

	map pods {
		type ipv4_addr : verdict
		elements = { 10.1.0.1 : jump pod, 10.1.0.2 : drop }
	}

	map blocks-to {
		type ipv4_addr : verdict
		flags interval
		elements = { 10.2.0.0/24 : goto pod, 10.2.1.0/24 : accept }
	}

	chain filter {
		type filter hook forward priority filter - 5; policy accept;
		ip saddr vmap @pods
		ip daddr vmap @blocks-to
		ip saddr . meta l4proto . th dport @peers jump last
		ip saddr . meta l4proto . th dport @blocks accept
		ip saddr 10.0.0.0/20 ip daddr != 0.0.0.0/0 drop
		ip6 saddr fd00::/20 ip6 daddr fd00::7 accept
	}

	chain pod {
		comment "one of many"
		ct state established,related counter packets 0 bytes 0 accept comment "answers"
		ip saddr @nets accept
		ip6 daddr != @nodes drop
		udp dport @ports accept
		tcp dport 1-1023 return
		sctp sport != 9 sctp dport 10 accept
		iifname "cni0" oifname != "flannel.*" drop
		iifname @devices meta mark @marks accept
		meta mark 0x00000010 goto last
	}

	chain last {
		iifname != "eth0" fib saddr . iif oif missing drop
		fib saddr type local accept
		meta l4proto udp @th,96,24 != 0x1 @th,96,24 != 0xabcdef accept
	}

	chain nat {
		type nat hook postrouting priority srcnat; policy accept;
		masquerade
		masquerade fully-random
	}
}
"#;

#[test]
fn a_table_is_replaced_whole_and_others_stay() {
    let mut bed = Bed::new();
    bed.script(
        "table ip other { set s { type ipv4_addr; elements = { 1.2.3.4 }; }
            chain c { type filter hook forward priority 5; ip saddr @s counter drop; }; }
         table ip flannel-ipv4 { set s { type ipv4_addr; elements = { 1.2.3.4 }; }
            chain x { ip saddr @s drop; }; chain postrtg { jump x; }; }",
    );
    let others = bed.list("table ip other");
    for _ in 0..2 {
        bed.nft.apply(&[flannel(Family::V4)]).unwrap();
        let found = bed.nft.dump_tables(&[flannel(Family::V4).id]).unwrap();
        assert_eq!(plain(found).tables, [flannel(Family::V4)]);
        assert_eq!(bed.list("table ip other"), others);
    }
}

#[test]
fn a_deleted_table_is_gone_whether_or_not_it_was_there() {
    let mut bed = Bed::new();
    bed.nft.apply(&[flannel(Family::V4), flannel(Family::V6)]).unwrap();
    for _ in 0..2 {
        bed.nft.commit(&[Change::DeleteTable(flannel(Family::V4).id)]).unwrap();
        assert_eq!(plain(bed.nft.dump().unwrap()).tables, [flannel(Family::V6)]);
    }
    assert_eq!(bed.list("tables"), "table ip6 flannel-ipv6\n");
}

#[test]
fn when_the_last_rule_is_refused_nothing_changes_and_the_rule_is_named() {
    let mut bed = Bed::new();
    bed.nft.apply(&[flannel(Family::V4)]).unwrap();
    let before = bed.list("ruleset");

    let mut broken = flannel(Family::V4);
    broken.chains[0].rules.remove(0);
    broken.chains[1].rules.push(Rule::new([masquerade(0)]));
    let refused = bed.nft.apply(&[flannel(Family::V6), broken.clone()]).unwrap_err();
    let text = refused.to_string();
    assert!(
        text.starts_with("rule 3 of chain forward in table ip flannel-ipv4: Operation not supported"),
        "{text}"
    );

    broken.chains[1].rules[2] = Rule::new([jump("nowhere")]);
    let refused = bed.nft.apply(&[broken]).unwrap_err();
    let text = refused.to_string();
    assert!(text.starts_with("rule 3 of chain forward in table ip flannel-ipv4: No such file"), "{text}");
    assert!(text.contains("what it names is not there"), "{text}");
    assert_eq!(bed.list("ruleset"), before);
}

#[test]
fn what_cannot_be_said_is_refused_before_anything_is_sent() {
    let mut bed = Bed::new();
    let mut why = |damage: fn(&mut Table)| {
        let mut table = gallery();
        damage(&mut table);
        let error = bed.nft.apply(&[table]).unwrap_err();
        assert!(matches!(error, NftError::Invalid { .. }), "{error:?}");
        error.to_string()
    };
    let text = why(|table| table.chains[1].rules[2].comment = Some("x".repeat(128)));
    assert!(text.starts_with("rule 3 of chain pod in table inet gallery: the comment \"xxx"), "{text}");
    assert!(why(|table| table.id.name = String::new()).contains("the name \"\" must be 1 to 255 bytes"));
    assert!(why(|table| table.chains[1].name = "a\0".to_owned()).starts_with("chain a\0 in table"));
    let text = why(|table| table.sets[0] = table.sets[0].clone().with([Span::port(1)]));
    assert_eq!(text, "element 1 of set nets in table inet gallery: 2 bytes long where keys have 4");
    let text = why(|table| table.chains[1].rules[0] = Rule::new((0..4000).map(|_| counter())));
    assert!(text.starts_with("rule 1 of chain pod in table inet gallery: longer than the 64 KiB"), "{text}");
    assert_eq!(bed.list("ruleset"), "");
}

#[test]
fn without_privilege_the_missing_capability_is_named() {
    use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
    let bed = Bed::new();
    // The thread that loses its capabilities ends with the closure.
    let (apply, dump) = bed.namespace.run(|| {
        let mut sets = capabilities(None).unwrap();
        sets.effective -= CapabilitySet::NET_ADMIN;
        set_capabilities(None, sets).unwrap();
        let mut nft = Nft::open().unwrap();
        (nft.apply(&[flannel(Family::V4)]).unwrap_err(), nft.dump().unwrap_err())
    });
    for text in [apply, dump].map(|error| error.to_string()) {
        assert!(text.contains("Operation not permitted") && text.contains("capability NET_ADMIN"), "{text}");
    }
}

#[test]
fn thousands_of_rules_and_elements_go_in_one_transaction() {
    let mut bed = Bed::new();
    let mut table = Table::new(TableId::new(TableFamily::Ip, "policy"));
    let address = |number: u32| Span::address(std::net::Ipv4Addr::from_bits(0x0a00_0000 + number * 2).into());
    let v4 = [KeyType::Ipv4];
    table.sets = vec![
        Set::new("pods", &v4).with((0..10_000).map(address)),
        Set::new("blocks", &v4).with_ranges().with((0..10_000).map(address)),
    ];
    let mut chain = Chain::base("forward", Base::filter(Hook::Forward, 0));
    chain.rules = (0..5_000u16)
        .map(|port| {
            let set = if port % 2 == 0 { "pods" } else { "blocks" };
            let from = in_set(&[Field::Source(Family::V4)], set);
            Rule::new([protocol(Op::Eq, TCP), destination_port(Op::Eq, port), from, counter(), accept()])
        })
        .collect();
    table.chains = vec![chain];
    let wanted = [table];
    for round in ["new", "replaced"] {
        let start = Instant::now();
        bed.nft.apply(&wanted).unwrap();
        let applied = start.elapsed();
        let found = bed.nft.dump_tables(&[wanted[0].id.clone()]).unwrap();
        println!("{round}: applied in {applied:?}, dumped in {:?}", start.elapsed() - applied);
        assert_eq!(differs(&wanted, &found), None);
        assert_eq!(plain(found).tables, wanted);
    }
}

#[test]
fn an_element_more_costs_one_element_and_leaves_rules_and_other_elements_alone() {
    let mut bed = Bed::new();
    let mut table = Table::new(TableId::new(TableFamily::Ip6, "guard"));
    let address = |number: u128| Span::address(std::net::Ipv6Addr::from_bits(0xfd << 120 | number).into());
    let peers = |range: std::ops::Range<u128>| Set::new("peers", &[KeyType::Ipv6]).with(range.map(address));
    let mut chain = Chain::base("input", Base::filter(Hook::Input, 0));
    chain.rules = vec![Rule::new([not_in_set(&[Field::Source(Family::V6)], "peers"), counter(), drop()])];
    (table.sets, table.chains) = (vec![peers(0..20_000)], vec![chain]);
    bed.nft.apply(std::slice::from_ref(&table)).unwrap();
    let before = bed.nft.dump().unwrap();
    table.sets = vec![peers(1..20_002)];
    let Refit::Elements(words, changes) = Refit::of(&table, &before) else { panic!("no elements") };
    assert_eq!(words, "set peers lacks 2 elements and has 1 that should not be there in table ip6 guard");
    let start = Instant::now();
    bed.nft.commit(&changes).unwrap();
    println!("2 elements more, 1 less: {:?}", start.elapsed());
    let after = bed.nft.dump().unwrap();
    assert!(matches!(Refit::of(&table, &after), Refit::Right));
    // The numbers of rules: nothing was replaced.
    assert_eq!(before.tables[0].chains, after.tables[0].chains);
    // What is there may be added once more, and what is not there can't be deleted.
    let Change::DeleteElements { table: id, set } = changes[1].clone() else { panic!("{:?}", changes[1]) };
    bed.nft.commit(&changes[..1]).unwrap();
    let text = bed.nft.commit(&[Change::DeleteElements { table: id, set }]).unwrap_err().to_string();
    assert!(
        text.starts_with("deletion of element 1 of set peers in table ip6 guard: No such file"),
        "{text}"
    );
}

#[test]
fn a_transaction_with_thousands_of_errors_names_the_first() {
    let mut bed = Bed::new();
    let mut table = flannel(Family::V4);
    table.chains[1].rules.extend((0..5_000).map(|_| Rule::new([jump("nowhere")])));
    let text = bed.nft.apply(&[table]).unwrap_err().to_string();
    assert!(text.starts_with("rule 3 of chain forward in table ip flannel-ipv4: No such file"), "{text}");
    // The next conversation isn't disturbed by answers to this one.
    bed.nft.apply(&[flannel(Family::V4)]).unwrap();
    assert_eq!(plain(bed.nft.dump().unwrap()).tables, [flannel(Family::V4)]);
}

#[test]
fn a_dump_never_mixes_two_generations() {
    const VERSIONS: usize = 20;
    let mut bed = Bed::new();
    // All tables always say the same mark. The first is large, so that a transaction takes long to get to
    // the others, which are the ones that are read.
    let version = |mark_now: u32| {
        [("ballast", 4_000), ("a", 10), ("b", 10)].map(|(name, rules)| {
            let mut table = Table::new(TableId::new(TableFamily::Ip, name));
            let mut chain = Chain::regular("c");
            chain.rules = vec![Rule::new([mark(Op::Eq, mark_now), accept()]); rules];
            table.chains.push(chain);
            table
        })
    };
    let [_, a, b] = version(0).map(|table| table.id);
    let read = [a, b];
    /// Ends the writer also when the reader panics.
    struct Done<'a>(&'a AtomicBool);
    impl Drop for Done<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let done = AtomicBool::new(false);
    let mut writer = bed.namespace.run(|| Nft::open().unwrap());
    writer.apply(&version(0)).unwrap();
    thread::scope(|scope| {
        let (done, version) = (&done, &version);
        scope.spawn(move || {
            for number in 1.. {
                if done.load(Ordering::Relaxed) {
                    break;
                }
                writer.apply(&version(number)).unwrap();
                // Faster, and hardly any dump would get through.
                thread::sleep(Duration::from_millis(3));
            }
        });
        let _done = Done(done);
        let mut seen = Vec::new();
        while seen.len() < VERSIONS {
            match bed.nft.dump_tables(&read) {
                Ok(found) => {
                    let rules: Vec<_> =
                        found.tables.iter().flat_map(|table| &table.chains[0].rules).collect();
                    assert_eq!(rules.len(), 20);
                    assert!(rules.iter().all(|rule| rule.exprs == rules[0].exprs));
                    seen.push(rules[0].exprs.clone());
                    seen.dedup();
                }
                Err(NftError::Unsteady) => {}
                Err(error) => panic!("{error}"),
            }
        }
    });
}
