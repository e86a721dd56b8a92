//! Random tables: written, and read back.

use backends::nft::{
    Base, Chain, Change, CtState, Expr, Hook, KeyType, Op, Policy, Rule, Ruleset, Set, Span, Table,
    TableFamily, TableId, Transaction, Verdict, differs, masquerade_flags, matches::*,
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, TestRunner};
use subnet::Family;

use crate::{Bed, plain};

fn family_of_addresses() -> impl Strategy<Value = Family> {
    select(&Family::BOTH[..])
}

fn net(family: Family) -> BoxedStrategy<IpNet> {
    match family {
        Family::V4 => (any::<u32>(), 0..=32u8)
            .prop_map(|(bits, len)| IpNet::from(Ipv4Net::new(bits.into(), len).unwrap().trunc()))
            .boxed(),
        Family::V6 => (any::<u128>(), 0..=128u8)
            .prop_map(|(bits, len)| IpNet::from(Ipv6Net::new(bits.into(), len).unwrap().trunc()))
            .boxed(),
    }
}

fn equality() -> impl Strategy<Value = Op> {
    select(vec![Op::Eq, Op::Ne])
}

fn comment() -> impl Strategy<Value = Option<String>> {
    option::of("[a-zA-Z0-9 ,.:äß-]{1,60}")
}

/// The fields and key types of sets; the set called `s` and this number has these.
fn keys() -> Vec<(Vec<Field>, Vec<KeyType>)> {
    let address = |family| (Field::Source(family), KeyType::address(family));
    let [(saddr, v4), (saddr6, v6)] = Family::BOTH.map(address);
    vec![
        (vec![saddr], vec![v4]),
        (vec![saddr6], vec![v6]),
        (vec![Field::DestinationPort], vec![KeyType::Port]),
        (vec![Field::Mark], vec![KeyType::Mark]),
        (vec![Field::InName], vec![KeyType::Interface]),
        (vec![saddr6, Field::Protocol, Field::SourcePort], vec![v6, KeyType::Protocol, KeyType::Port]),
    ]
}

fn span(kind: KeyType, ranges: bool) -> BoxedStrategy<Span> {
    let address = move |family| {
        net(family).prop_map(move |net| if ranges { Span::net(net) } else { Span::address(net.addr()) })
    };
    match kind {
        KeyType::Ipv4 => address(Family::V4).boxed(),
        KeyType::Ipv6 => address(Family::V6).boxed(),
        KeyType::Protocol => any::<u8>().prop_map(Span::protocol).boxed(),
        KeyType::Port if ranges => {
            (any::<u16>(), any::<u16>()).prop_map(|(a, b)| Span::ports(a.min(b)..=a.max(b))).boxed()
        }
        KeyType::Port => any::<u16>().prop_map(Span::port).boxed(),
        KeyType::Mark => any::<u32>().prop_map(Span::mark).boxed(),
        KeyType::Interface => "[a-z][a-z0-9.]{0,14}".prop_map(|name| Span::interface(&name)).boxed(),
    }
}

fn set(number: usize) -> BoxedStrategy<Set> {
    let types = keys()[number].1.clone();
    // The kernel takes overlapping ranges of several fields for an error, and marks aren't in network order.
    let ranges = if types.len() == 1 && types[0] != KeyType::Mark {
        any::<bool>().boxed()
    } else {
        Just(false).boxed()
    };
    (ranges, any::<bool>(), comment())
        .prop_flat_map(move |(ranges, constant, comment)| {
            let fields: Vec<_> = types.iter().map(|kind| span(*kind, ranges)).collect();
            let types = types.clone();
            vec(fields, 0..40).prop_map(move |keys| {
                let mut set = Set::new(format!("s{number}"), &types);
                set = if ranges { set.with_ranges() } else { set };
                set = if constant { set.constant() } else { set };
                set.comment = comment.clone();
                set.with(keys.into_iter().map(|mut fields| match fields.len() {
                    1 => fields.remove(0),
                    _ => Span::concat(fields),
                }))
            })
        })
        .boxed()
}

fn condition(sets: usize) -> BoxedStrategy<Vec<Expr>> {
    let address = (family_of_addresses(), equality(), any::<bool>()).prop_flat_map(|(family, op, from)| {
        net(family).prop_map(move |net| if from { source(op, net) } else { destination(op, net) })
    });
    let name = "[a-z][a-z0-9.]{0,13}[*]?";
    let lookup = (0..sets.max(1), any::<bool>()).prop_map(move |(number, yes)| {
        let name = format!("s{number}");
        match sets {
            0 => Vec::new(),
            _ if yes => in_set(&keys()[number].0, &name),
            _ => not_in_set(&keys()[number].0, &name),
        }
    });
    prop_oneof![
        3 => address,
        3 => lookup,
        1 => family_of_addresses().prop_map(family),
        1 => (equality(), any::<u32>()).prop_map(|(op, value)| mark(op, value)),
        1 => (any::<u32>(), equality(), any::<u32>()).prop_map(|(mask, op, value)| mark_bits(mask, op, value)),
        1 => (equality(), name).prop_map(|(op, name)| in_name(op, &name)),
        1 => (equality(), name).prop_map(|(op, name)| out_name(op, &name)),
        1 => (1..128u32).prop_map(|bits| ct_state(bits | CtState::NEW)),
        1 => (equality(), any::<u8>()).prop_map(|(op, number)| protocol(op, number)),
        1 => (equality(), any::<u16>()).prop_map(|(op, port)| source_port(op, port)),
        1 => (any::<u16>(), any::<u16>()).prop_map(|(a, b)| destination_ports(a.min(b)..=a.max(b))),
        1 => proptest::collection::vec(0..1u32 << 24, 1..4).prop_map(|vnis| vni_is_none_of(&vnis)),
        1 => Just(counter()),
    ]
    .boxed()
}

/// The end of a rule in regular chain `number` of `chains`; a chain leads only to later ones, because the
/// kernel refuses loops.
fn end(number: usize, chains: usize) -> BoxedStrategy<Vec<Expr>> {
    let later = (number + 1)..chains;
    let plain = prop_oneof![Just(accept()), Just(drop()), Just(leave()), Just(Vec::new())];
    if later.is_empty() {
        return plain.boxed();
    }
    let leading = (later, any::<bool>()).prop_map(|(to, back)| {
        let name = format!("c{to}");
        if back { jump(&name) } else { goto(&name) }
    });
    prop_oneof![plain, leading].boxed()
}

fn rule(number: usize, chains: usize, sets: usize) -> impl Strategy<Value = Rule> {
    (vec(condition(sets), 0..4), end(number, chains), comment()).prop_map(|(mut parts, end, comment)| {
        parts.push(end);
        let rule = Rule::new(parts);
        match comment {
            Some(comment) => rule.with_comment(comment),
            None => rule,
        }
    })
}

/// Chain 0 sees forwarded packets, chain 1 does NAT, the others are led to.
fn chain(number: usize, chains: usize, sets: usize) -> impl Strategy<Value = Chain> {
    let masquerading =
        select(vec![0, masquerade_flags::FULLY_RANDOM]).prop_map(|flags| Rule::new([masquerade(flags)]));
    let rules = vec(rule(number.max(1), chains, sets), 0..6);
    (rules, option::of(masquerading), any::<bool>(), -300..300i32, comment()).prop_map(
        move |(rules, masquerade, drops, priority, comment)| {
            let name = format!("c{number}");
            let mut chain = match number {
                0 => Chain::base(name, Base::filter(Hook::Forward, priority)),
                1 => Chain::base(name, Base::nat(Hook::Postrouting, priority.max(-199))),
                _ => Chain::regular(name),
            };
            if let (0, true, Some(base)) = (number, drops, &mut chain.base) {
                base.policy = Policy::Drop;
            }
            chain.comment = comment;
            chain.rules = rules;
            chain.rules.extend(masquerade.filter(|_| number == 1));
            chain
        },
    )
}

fn verdict_map(chains: usize) -> impl Strategy<Value = Set> {
    let verdict = prop_oneof![
        Just(Verdict::Accept),
        Just(Verdict::Drop),
        Just(Verdict::Return),
        (2..chains.max(3)).prop_map(move |to| match chains {
            0..3 => Verdict::Accept,
            _ => Verdict::Jump(format!("c{to}")),
        }),
    ];
    vec((any::<u32>(), verdict), 0..20).prop_map(|elements| {
        let elements =
            elements.into_iter().map(|(bits, to)| (Span::address(std::net::Ipv4Addr::from(bits).into()), to));
        Set::verdict_map("map", &[KeyType::Ipv4]).with_verdicts(elements)
    })
}

fn table() -> impl Strategy<Value = Table> {
    let families = select(vec![TableFamily::Ip, TableFamily::Ip6, TableFamily::Inet]);
    (families, 0..=keys().len(), 0..6usize, any::<bool>(), comment()).prop_flat_map(
        |(family, sets, chains, dormant, comment)| {
            let all_sets: Vec<_> = (0..sets).map(set).collect();
            let all_chains: Vec<_> = (0..chains).map(|number| chain(number, chains, sets)).collect();
            (all_sets, all_chains, verdict_map(chains)).prop_map(move |(mut sets, mut chains, map)| {
                if let Some(forward) = chains.first_mut() {
                    forward.rules.push(Rule::new([verdict_map_of_source()]));
                }
                sets.push(map);
                let comment = comment.clone();
                let id = TableId::new(family, "random");
                Table { comment, dormant, sets, chains, ..Table::new(id) }
            })
        },
    )
}

fn verdict_map_of_source() -> Vec<Expr> {
    backends::nft::matches::verdict_map(&[Field::Source(Family::V4)], "map")
}

#[test]
fn what_is_written_for_random_tables_reads_back_the_same() {
    let mut runner = TestRunner::new(Config::with_cases(256));
    runner
        .run(&table(), |table| {
            let changes = [Change::Replace(&table)];
            let transaction = Transaction::new(&changes, 7).unwrap();
            let read = Ruleset::decode(transaction.bytes());
            prop_assert_eq!(differs(std::slice::from_ref(&table), &read), None);
            prop_assert_eq!(read.tables, [table.clone()]);
            Ok(())
        })
        .unwrap();
}

#[test]
fn the_kernel_gives_random_tables_back_as_they_were() {
    let mut bed = Bed::new();
    let mut runner = TestRunner::new(Config { cases: 48, max_shrink_iters: 2_000, ..Config::default() });
    let id = |family| TableId::new(family, "random");
    let bed = std::cell::RefCell::new(&mut bed);
    runner
        .run(&table(), |table| {
            let mut bed = bed.borrow_mut();
            let others = [TableFamily::Ip, TableFamily::Ip6, TableFamily::Inet]
                .map(|family| Change::DeleteTable(id(family)));
            bed.nft.commit(&others).unwrap();
            bed.nft
                .apply(std::slice::from_ref(&table))
                .map_err(|error| TestCaseError::fail(error.to_string()))?;
            let found = bed.nft.dump().unwrap();
            prop_assert_eq!(differs(std::slice::from_ref(&table), &found), None);
            prop_assert_eq!(plain(found).tables, [table.clone()]);
            Ok(())
        })
        .unwrap();
}

proptest! {
    #[test]
    fn arbitrary_bytes_are_read_without_panic(
        kinds in vec((2560u16..2580, vec((0u16..14, vec(any::<u8>(), 0..40)), 0..8)), 0..6),
        noise: Vec<u8>,
    ) {
        let mut bytes = Vec::new();
        for (kind, attributes) in kinds {
            let start = bytes.len();
            bytes.extend([0, 0, 0, 0]);
            bytes.extend(kind.to_ne_bytes());
            bytes.extend([0; 10]);
            bytes.extend([2, 0, 0, 0]);
            for (kind, value) in attributes {
                bytes.extend((value.len() as u16 + 4).to_ne_bytes());
                bytes.extend(kind.to_ne_bytes());
                bytes.extend(&value);
                bytes.resize(bytes.len().next_multiple_of(4), 0);
            }
            let length = (bytes.len() - start) as u32;
            bytes[start..start + 4].copy_from_slice(&length.to_ne_bytes());
        }
        Ruleset::decode(&bytes);
        bytes.extend(noise);
        Ruleset::decode(&bytes);
    }
}
