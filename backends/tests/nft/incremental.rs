//! What policies need of nftables: connection marks, frames sent to the host, elements that go by themselves,
//! and changes smaller than a table.

use std::collections::BTreeMap;
use std::time::Duration;

use backends::nft::{
    Base, Chain, Change, Hook, KeyType, Op, Rate, Rule, Set, Span, Table, TableFamily, TableId, Verdict,
    differs, matches::*,
};
use subnet::Family;

use crate::{Bed, plain};

const MASK: u32 = 0xff00_0000;

fn address(last: u8) -> Span {
    Span::address([10, 0, 0, last].into())
}

fn judging() -> Table {
    let mut table = Table::new(TableId::new(TableFamily::Inet, "judging"));
    table.sets = vec![
        Set::new("fresh", &[KeyType::Mark]).with_lifetimes([
            (Span::mark(0x2b00_0000), Duration::from_secs(30)),
            (Span::mark(0), Duration::from_secs(3600)),
        ]),
        Set::new("peers", &[KeyType::Ipv4]).with_size(64).with([address(1)]),
        Set::verdict_map("ports", &[KeyType::Protocol, KeyType::Port]).with_ranges().with_verdicts([(
            Span::concat([Span::protocol(TCP), Span::ports(80..=90)]),
            Verdict::Goto("ok".to_owned()),
        )]),
    ];
    let mut ok = Chain::regular("ok");
    ok.rules = vec![Rule::new([set_ct_mark_bits(MASK, 0x2b00_0000)]), Rule::new([accept()])];
    let mut forward = Chain::base("forward", Base::filter(Hook::Forward, -5));
    let refused = Rate { packets: 10, seconds: 1, burst: 5 };
    forward.rules = vec![
        Rule::new([ct_mark_bits(MASK, Op::Eq, 0x2b00_0000), accept()]),
        Rule::new([ct_reply(true), ct_mark_in_set(MASK, "fresh"), accept()]),
        Rule::new([family(Family::V6), icmpv6_types(133..=137), accept()]),
        Rule::new([
            tcp_flag_bits(tcp_flags::SYN | tcp_flags::ACK, Op::Ne, tcp_flags::SYN),
            source_port(Op::Lt, 32768),
            destination_port(Op::Ge, 32768),
            counter(),
            drop(),
        ]),
        Rule::new([verdict_map(&[Field::Protocol, Field::DestinationPort], "ports")]),
        Rule::new([limit(refused), log(5, "refused ")]),
    ];
    table.chains = vec![ok, forward];
    table
}

fn steering() -> Table {
    let mut table = Table::new(TableId::new(TableFamily::Bridge, "steering"));
    let bridge = [2, 0, 0, 0, 0, 1];
    let mut steer = Chain::base("steer", Base::filter(Hook::BRIDGE_PREROUTING, -300));
    steer.rules = vec![
        Rule::new([ether_destination(Op::Eq, bridge), accept()]),
        Rule::new([
            ether_type(Family::V4),
            source(Op::Eq, "10.244.1.0/24".parse().unwrap()),
            destination(Op::Ne, "10.244.1.1/32".parse().unwrap()),
            to_this_host(bridge),
        ]),
        Rule::new([ether_type(Family::V6), icmpv6_types(133..=137), accept()]),
    ];
    table.chains = vec![steer];
    table
}

#[test]
fn what_policies_say_reads_back_as_written_and_nft_prints_it() {
    let mut bed = Bed::new();
    let wanted = [judging(), steering()];
    bed.nft.apply(&wanted).unwrap();
    let mut found = bed.nft.dump().unwrap();
    assert_eq!(differs(&wanted, &found), None);
    let left = std::mem::take(&mut found.tables[0].sets[0].lifetimes);
    assert!(left[&Span::mark(0x2b00_0000)] <= Duration::from_secs(30), "{left:?}");
    assert!(left[&Span::mark(0)] > Duration::from_secs(3500), "{left:?}");
    found.tables[0].sets[0].lifetimes = wanted[0].sets[0].lifetimes.clone();
    assert_eq!(plain(found).tables, wanted);
    let printed = bed.list("ruleset");
    let expires = |line: &str| line.contains("expires");
    let printed: String =
        printed.lines().filter(|line| !expires(line)).map(|line| format!("{line}\n")).collect();
    assert_eq!(printed, PRINTED);
}

const PRINTED: &str = r#"table inet judging {
	set fresh {
		type mark
		flags timeout
	}

	set peers {
		type ipv4_addr
		size 64
		elements = { 10.0.0.1 }
	}

	map ports {
		type inet_proto . inet_service : verdict
		flags interval
		elements = { tcp . 80-90 : goto ok }
	}

	chain ok {
		ct mark set ct mark & 0x2bffffff | 0x2b000000
		accept
	}

	chain forward {
		type filter hook forward priority filter - 5; policy accept;
		ct mark 0x2b000000/8 accept
		ct direction reply ct mark & 0xff000000 == @fresh accept
		icmpv6 type 133-137 accept
		tcp flags != syn / syn,ack tcp sport < 32768 tcp dport >= 32768 counter packets 0 bytes 0 drop
		meta l4proto . th dport vmap @ports
		limit rate 10/second log prefix "refused " group 5
	}
}
table bridge steering {
	chain steer {
		type filter hook prerouting priority dstnat; policy accept;
		ether daddr 02:00:00:00:00:01 accept
		ip saddr 10.244.1.0/24 ip daddr != 10.244.1.1 ether daddr set 02:00:00:00:00:01 meta pkttype set host
		icmpv6 type 133-137 accept
	}
}
"#;

#[test]
fn an_element_goes_by_itself_when_its_time_is_over() {
    let mut bed = Bed::new();
    let mut table = judging();
    table.sets[0] = Set::new("fresh", &[KeyType::Mark]).with_lifetimes([
        (Span::mark(1), Duration::from_millis(50)),
        (Span::mark(2), Duration::from_secs(3600)),
    ]);
    bed.nft.apply(std::slice::from_ref(&table)).unwrap();
    backends::testing::wait_for("the element's end", Duration::from_secs(20), || {
        let found = bed.nft.dump_tables(std::slice::from_ref(&table.id)).unwrap();
        found.tables[0].sets[0].elements.keys().eq([&Span::mark(2)])
    })
    .unwrap();
}

#[test]
fn sets_chains_and_elements_change_one_by_one_and_all_or_none() {
    let mut bed = Bed::new();
    let mut wanted = judging();
    bed.nft.apply(std::slice::from_ref(&wanted)).unwrap();
    let id = wanted.id.clone();

    let more = Set::new("more", &[KeyType::Ipv4]).with_size(8).with([address(9)]);
    let mut chain = Chain::regular("class");
    chain.rules = vec![
        Rule::new([family(Family::V4), in_set(&[Field::Source(Family::V4)], "more"), goto("ok")]),
        Rule::new([counter(), drop()]),
    ];
    let elements = |spans: &[u8]| BTreeMap::from_iter(spans.iter().map(|last| (address(*last), None)));
    let peers = wanted.sets[1].clone();
    let of = |spans: &[u8]| Set { elements: elements(spans), ..peers.clone() };
    let add = |spans: &[u8]| Change::AddElements { table: id.clone(), set: of(spans) };
    let delete = |spans: &[u8]| Change::DeleteElements { table: id.clone(), set: of(spans) };
    let flush = Change::FlushChain { table: id.clone(), chain: "ok".to_owned() };
    let ok = Chain { rules: vec![Rule::new([accept()])], ..wanted.chains[0].clone() };
    bed.nft
        .commit(&[
            Change::AddTable(id.clone()),
            Change::AddSet { table: id.clone(), set: &more },
            Change::AddChain { table: id.clone(), chain: &chain },
            add(&[2, 3]),
            delete(&[1]),
            flush,
            Change::AddChain { table: id.clone(), chain: &ok },
        ])
        .unwrap();
    wanted.sets[1].elements = elements(&[2, 3]);
    wanted.sets.push(more.clone());
    wanted.chains[0] = ok;
    wanted.chains.push(chain.clone());
    let found = bed.nft.dump_tables(std::slice::from_ref(&id)).unwrap();
    assert_eq!(differs(std::slice::from_ref(&wanted), &found), None);

    // One part that is refused, and nothing of the others is done.
    let refused = bed.nft.commit(&[add(&[7]), delete(&[8])]).unwrap_err();
    let words = refused.to_string();
    assert!(words.starts_with("deletion of element 1 of set peers in table inet judging: "), "{words}");
    let refused =
        bed.nft.commit(&[Change::DeleteSet { table: id.clone(), set: "more".to_owned() }]).unwrap_err();
    assert!(refused.to_string().starts_with("deletion of set more in table inet judging: "), "{refused}");
    let found = bed.nft.dump_tables(std::slice::from_ref(&id)).unwrap();
    assert_eq!(differs(std::slice::from_ref(&wanted), &found), None);

    bed.nft
        .commit(&[
            Change::FlushChain { table: id.clone(), chain: "class".to_owned() },
            Change::DeleteChain { table: id.clone(), chain: "class".to_owned() },
            Change::DeleteSet { table: id.clone(), set: "more".to_owned() },
        ])
        .unwrap();
    wanted.sets.pop();
    wanted.chains.pop();
    let found = bed.nft.dump_tables(&[id]).unwrap();
    assert_eq!(differs(&[wanted], &found), None);
}
