//! The traffic rules as nftables tables, under the names that Go flannel gives them (contract §6.2); pure.

use ipnet::IpNet;
use subnet::Family;

use crate::nft::matches::{accept, destination, leave, mark_bits, masquerade, source};
pub(super) use crate::nft::name_with_network as own_name;
use crate::nft::{Base, Chain, Expr, Hook, Op, Rule, Table, TableId, masquerade_flags};
use crate::traffic::rules::{self, Match, SERVICE_MARK, Traffic, TrafficVerdict};

/// The name that Go flannel gives its table, so that one that comes back removes it.
pub(super) fn plain_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "flannel-ipv4",
        Family::V6 => "flannel-ipv6",
    }
}

/// Whether a table with the plain name belongs to an agent with one of these networks, rather than to
/// another agent on this host. One without any network belongs to the agent that finds it.
pub(super) fn is_ours(table: &Table, networks: &[IpNet]) -> bool {
    let speaks_of = |exprs: &[Expr], words: &[Expr]| exprs.windows(words.len()).any(|part| part == words);
    let mut others = false;
    for rule in table.chains.iter().flat_map(|chain| &chain.rules) {
        for network in networks {
            for words in [source(Op::Eq, *network), destination(Op::Eq, *network)] {
                if speaks_of(&rule.exprs, &words) {
                    return true;
                }
            }
        }
        others |= rule.exprs.iter().any(|expr| matches!(expr, Expr::Payload { .. }));
    }
    !others
}

/// The table that `traffic` asks for; `None` when all of it is off.
pub(super) fn table(traffic: &Traffic, name: &str) -> Option<Table> {
    let family = traffic.family();
    let mut table = Table::new(TableId::new(family, name));
    table.comment = Some(format!("rules for {name}"));
    let postrouting = traffic.postrouting();
    if !postrouting.is_empty() {
        let mut chain = Chain::base("postrtg", Base::nat(Hook::Postrouting, Base::SOURCE_NAT));
        chain.comment = Some("chain to manage traffic masquerading by flannel".to_owned());
        chain.rules = postrouting.iter().map(rule).collect();
        table.chains.push(chain);
    }
    let forward = traffic.forward();
    // It decides nothing: an accept ends its own base chain alone, and that one lets pass what no rule meets. Each base chain costs all
    // that is forwarded 1 %, so where the fast path needs one at this hook, that takes its place.
    if !forward.is_empty() && !traffic.fast_path {
        let mut chain = Chain::base("forward", Base::filter(Hook::Forward, 0));
        chain.comment = Some("chain to accept flannel traffic".to_owned());
        chain.rules = forward.iter().map(rule).collect();
        table.chains.push(chain);
    }
    (!table.chains.is_empty()).then_some(table)
}

/// One rule in the words of nftables.
pub(super) fn rule(rule: &rules::TrafficRule) -> Rule {
    let conditions = rule.matches.iter().map(|one| match one {
        Match::Marked => mark_bits(SERVICE_MARK, Op::Eq, SERVICE_MARK),
        Match::From(net) => source(Op::Eq, *net),
        Match::NotFrom(net) => source(Op::Ne, *net),
        Match::To(net) => destination(Op::Eq, *net),
        Match::NotTo(net) => destination(Op::Ne, *net),
    });
    let verdict = match rule.verdict {
        TrafficVerdict::Return => leave(),
        TrafficVerdict::Accept => accept(),
        TrafficVerdict::Masquerade { fully_random: true } => masquerade(masquerade_flags::FULLY_RANDOM),
        TrafficVerdict::Masquerade { fully_random: false } => masquerade(0),
    };
    Rule::new(conditions.chain([verdict]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn traffic(network: &str) -> Traffic {
        let network: IpNet = network.parse().unwrap();
        let subnet = IpNet::new(network.network(), 24).unwrap();
        Traffic {
            network,
            subnet,
            others: Vec::new(),
            masquerade: Some(rules::Masquerade::default()),
            forward: true,
            fast_path: false,
        }
    }

    #[test]
    fn a_table_of_another_network_is_another_agents() {
        let net = |text: &str| text.parse::<IpNet>().unwrap();
        let mine = table(&traffic("10.244.0.0/16"), "flannel-ipv4").unwrap();
        assert!(is_ours(&mine, &[net("10.244.0.0/16")]));
        assert!(is_ours(&mine, &[net("10.99.0.0/16"), net("10.244.0.0/16")]), "a former network is ours too");
        assert!(!is_ours(&mine, &[net("10.99.0.0/16")]));
        assert!(is_ours(&Table::new(mine.id), &[net("10.99.0.0/16")]));
    }

    #[test]
    fn off_is_no_table_and_half_off_half_of_it() {
        let all = traffic("10.244.0.0/16");
        let off = Traffic { masquerade: None, forward: false, ..all.clone() };
        assert_eq!(table(&off, "flannel-ipv4"), None);
        let half = table(&Traffic { masquerade: None, ..all }, "flannel-ipv4").unwrap();
        assert_eq!(half.chains.iter().map(|chain| chain.name.as_str()).collect::<Vec<_>>(), ["forward"]);
    }

    #[test]
    fn the_chain_of_the_fast_path_takes_the_place_of_the_one_that_only_accepts() {
        let with = Traffic { fast_path: true, ..traffic("10.244.0.0/16") };
        let whole = table(&traffic("10.244.0.0/16"), "flannel-ipv4").unwrap();
        let table = table(&with, "flannel-ipv4").unwrap();
        assert_eq!(table.chains.iter().map(|chain| chain.name.as_str()).collect::<Vec<_>>(), ["postrtg"]);
        assert_eq!(table.chain("postrtg"), whole.chain("postrtg"));
        // What only accepts, and lets pass what it does not accept.
        let forward = whole.chain("forward").unwrap();
        assert_eq!(forward.base, Chain::base("forward", Base::filter(Hook::Forward, 0)).base);
        assert!(forward.rules.iter().all(|rule| rule.exprs.ends_with(&accept())));
    }
}
