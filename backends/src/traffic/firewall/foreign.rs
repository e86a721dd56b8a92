//! Other people's forward chains: where one ends pods' packets for sure, and the way through it.
//!
//! An accept in a table of our own decides nothing there, so one is put into the foreign
//! chain, right before the point where the packet would end: rules further up, such as those of a network
//! policy, keep their say.

use ipnet::IpNet;
use subnet::Family;

use super::tables;
use crate::nft::matches::family;
use crate::nft::{
    Chain, Change, Expr, Hook, Place, Policy, Rule, Ruleset, Table, TableFamily, TableId, Verdict,
};
use crate::traffic::rules::Traffic;

/// How the rules that we put into foreign chains are known again; behind it stands the network, because
/// every agent on this host has rules of its own there.
const COMMENT: &str = "flanneld forward ";

/// The chain of iptables mode, which makes a way through its parent as well.
const OWN_CHAIN: &str = "FLANNEL-FWD";

/// What is to be done about foreign chains.
#[derive(Debug, Default)]
pub(super) struct Openings {
    pub(super) changes: Vec<Change<'static>>,
    /// The changes in words, one for each chain that gets or loses a way through.
    pub(super) words: Vec<String>,
    /// The chains in which packets would end without a way through.
    pub(super) notes: Vec<String>,
    /// Chains besides base chains that have to be watched.
    pub(super) chains: Vec<(TableId, String)>,
}

/// What our part of a foreign chain is.
#[derive(Clone, Copy)]
pub(super) struct RuleOwnership<'a> {
    /// The tables of our own, in which nothing is foreign.
    pub(super) tables: &'a [TableId],
    /// The networks of this agent, now and before; rules for others are another agent's. None at all
    /// stands for any.
    pub(super) networks: &'a [IpNet],
    /// The rules are made with iptables, whose chain makes a way through its parent as well.
    pub(super) by_iptables: bool,
}

impl RuleOwnership<'_> {
    fn has(&self, rule: &Rule) -> bool {
        let Some(network) = rule.comment.as_deref().and_then(|comment| comment.strip_prefix(COMMENT)) else {
            return false;
        };
        self.networks.is_empty() || network.parse().is_ok_and(|network| self.networks.contains(&network))
    }
}

/// Makes ways through all foreign base chains of the forward hook in `found`.
pub(super) fn openings(found: &Ruleset, ours: RuleOwnership<'_>, wanted: &[Traffic]) -> Openings {
    let mut openings = Openings::default();
    for (table, base) in found.hooked(Hook::Forward).filter(|(table, _)| !ours.tables.contains(&table.id)) {
        let rules = way_through(table.id.family, wanted);
        let end = if rules.is_empty() { None } else { refusal(table, base) };
        for chain in reachable(table, base) {
            let here = end.as_ref().filter(|end| end.chain == chain.name);
            openings.mend(&table.id, chain, here, ours, &rules);
        }
        if let Some(end) = end {
            let place = format!("chain {} of table {}", end.chain, table.id);
            openings.notes.push(format!(
                "{place} ends forwarded packets that nothing accepts; those of the network are accepted right before that \
                 point"
            ));
            openings.chains.push((table.id.clone(), end.chain));
        }
    }
    openings
}

impl Openings {
    /// Puts the rules before the end of a chain, or takes them away where they are of no use.
    fn mend(
        &mut self,
        table: &TableId,
        chain: &Chain,
        end: Option<&End>,
        ours: RuleOwnership<'_>,
        rules: &[Rule],
    ) {
        let there: Vec<&Rule> = chain.rules.iter().filter(|rule| ours.has(rule)).collect();
        let before_end = match end.and_then(|end| end.rule) {
            Some(handle) => chain.rules.iter().take_while(|rule| rule.handle != Some(handle)).count(),
            None => chain.rules.len(),
        };
        let in_time = chain.rules[..before_end].iter().filter(|rule| ours.has(rule)).count() == there.len();
        let own_chain = ours.by_iptables
            && chain.rules[..before_end].iter().any(|rule| rule.leads_to() == Some(OWN_CHAIN));
        let needed: &[Rule] = if end.is_none() || own_chain { &[] } else { rules };
        if in_time && there.iter().map(|rule| &rule.exprs).eq(needed.iter().map(|rule| &rule.exprs)) {
            return;
        }
        let (table, name) = (table.clone(), chain.name.clone());
        for handle in there.iter().filter_map(|rule| rule.handle) {
            self.changes.push(Change::DeleteRule { table: table.clone(), chain: name.clone(), handle });
        }
        let place = end.and_then(|end| end.rule).map_or(Place::Last, Place::Before);
        for rule in needed {
            let (table, chain) = (table.clone(), name.clone());
            self.changes.push(Change::AddRule { table, chain, rule: rule.clone(), place });
        }
        let what = if needed.is_empty() { "removed from" } else { "put into" };
        self.words
            .push(format!("rules that accept the network's packets {what} chain {name} of table {table}"));
    }
}

/// The rules that accept what belongs to the networks, in a table of this family.
fn way_through(table: TableFamily, wanted: &[Traffic]) -> Vec<Rule> {
    let mut rules = Vec::new();
    for traffic in wanted {
        let prefix = match (table, traffic.family()) {
            (TableFamily::Ip, Family::V4) | (TableFamily::Ip6, Family::V6) => Vec::new(),
            (TableFamily::Inet, one) => family(one),
            _ => continue,
        };
        for rule in traffic.forward() {
            let mut exprs = prefix.clone();
            exprs.extend(tables::rule(&rule).exprs);
            rules.push(Rule { exprs, comment: Some(format!("{COMMENT}{}", traffic.network)), handle: None });
        }
    }
    rules
}

/// The point at which packets end that no rule with a condition has decided on.
#[derive(Debug, PartialEq, Eq)]
struct End {
    chain: String,
    /// The rule that ends them; `None` for the policy of a base chain.
    rule: Option<u64>,
}

/// What becomes of packets that meet no condition.
enum Fate {
    End(End),
    Accepted,
    /// They come back to the calling chain.
    Back,
}

fn refusal(table: &Table, base: &Chain) -> Option<End> {
    match fate(table, base, &mut Vec::new()) {
        Fate::End(end) => Some(end),
        Fate::Accepted => None,
        Fate::Back => {
            let drops = base.base.as_ref().is_some_and(|base| base.policy == Policy::Drop);
            drops.then(|| End { chain: base.name.clone(), rule: None })
        }
    }
}

fn fate<'t>(table: &'t Table, chain: &'t Chain, seen: &mut Vec<&'t str>) -> Fate {
    if seen.contains(&chain.name.as_str()) {
        return Fate::Back;
    }
    seen.push(&chain.name);
    for rule in chain.rules.iter().filter(|rule| is_unconditional(rule)) {
        if rule.refuses() {
            return Fate::End(End { chain: chain.name.clone(), rule: rule.handle });
        }
        let next = rule.leads_to().and_then(|name| table.chain(name));
        if let Some(next) = next {
            match fate(table, next, seen) {
                Fate::Back if is_goto(rule) => return Fate::Back,
                Fate::Back => {}
                decided => return decided,
            }
        }
        for expr in &rule.exprs {
            match expr {
                Expr::Verdict(Verdict::Accept) => return Fate::Accepted,
                Expr::Verdict(Verdict::Return) => return Fate::Back,
                _ => {}
            }
        }
    }
    Fate::Back
}

fn is_goto(rule: &Rule) -> bool {
    rule.exprs.iter().any(|expr| matches!(expr, Expr::Verdict(Verdict::Goto(_))))
}

/// Whether a rule applies to every packet: it only counts and decides. Comments of iptables are matches
/// that always hold.
fn is_unconditional(rule: &Rule) -> bool {
    rule.exprs.iter().all(|expr| match expr {
        Expr::Counter { .. } | Expr::Verdict(_) | Expr::Reject { .. } => true,
        other => other.xt_target().is_some() || other.xt_match().is_some_and(|name| name == "comment"),
    })
}

/// A base chain and all chains that its rules lead to.
fn reachable<'t>(table: &'t Table, base: &'t Chain) -> Vec<&'t Chain> {
    let mut found = vec![base];
    let mut next = 0;
    while let Some(chain) = found.get(next).copied() {
        next += 1;
        for chain in chain.rules.iter().filter_map(|rule| table.chain(rule.leads_to()?)) {
            if !found.iter().any(|known| known.name == chain.name) {
                found.push(chain);
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nft::Base;
    use crate::nft::matches::{accept, counter, drop, goto, in_name, jump};
    use crate::nft::{Op, Table};

    const MINE: RuleOwnership<'static> = RuleOwnership { tables: &[], networks: &[], by_iptables: false };

    fn wanted() -> Vec<Traffic> {
        let (network, subnet) = ("10.244.0.0/16".parse().unwrap(), "10.244.1.0/24".parse().unwrap());
        let (others, masquerade) = (Vec::new(), None);
        vec![Traffic { network, subnet, others, masquerade, forward: true, fast_path: false }]
    }

    fn rules(parts: impl IntoIterator<Item = Vec<Vec<Expr>>>) -> Vec<Rule> {
        let numbered = |(number, parts)| Rule { handle: Some(number), ..Rule::new(parts) };
        (10..).zip(parts).map(numbered).collect()
    }

    fn forward(policy: Policy, parts: Vec<Vec<Vec<Expr>>>) -> Chain {
        let base = Base { policy, ..Base::filter(Hook::Forward, 0) };
        Chain { rules: rules(parts), ..Chain::base("FORWARD", base) }
    }

    fn found(chains: Vec<Chain>) -> Ruleset {
        let id = TableId::new(TableFamily::Ip, "filter");
        Ruleset { tables: vec![Table { chains, ..Table::new(id) }] }
    }

    fn places(found: &Ruleset) -> Vec<(String, Place)> {
        let openings = openings(found, MINE, &wanted());
        let place = |change: &Change<'_>| match change {
            Change::AddRule { chain, place, .. } => Some((chain.clone(), *place)),
            _ => None,
        };
        openings.changes.iter().filter_map(place).collect()
    }

    #[test]
    fn a_policy_of_drop_gets_accepts_at_the_end_and_other_chains_get_none() {
        let policy = |policy| places(&found(vec![forward(policy, vec![vec![in_name(Op::Eq, "x"), drop()]])]));
        assert_eq!(policy(Policy::Drop), vec![("FORWARD".to_owned(), Place::Last); 2]);
        assert_eq!(policy(Policy::Accept), vec![]);
    }

    #[test]
    fn a_rule_that_ends_every_packet_gets_accepts_right_before_it_wherever_it_is() {
        let base = forward(
            Policy::Accept,
            vec![vec![in_name(Op::Eq, "eth0"), goto("inner")], vec![counter(), goto("zone")]],
        );
        let zone =
            Chain { rules: rules([vec![jump("inner")], vec![counter(), drop()]]), ..Chain::regular("zone") };
        let inner = Chain { rules: rules([vec![in_name(Op::Eq, "x"), drop()]]), ..Chain::regular("inner") };
        assert_eq!(places(&found(vec![base, zone, inner])), vec![("zone".to_owned(), Place::Before(11)); 2]);
    }

    #[test]
    fn what_accepts_everything_first_needs_no_way_through() {
        let chain = forward(Policy::Drop, vec![vec![counter(), accept()], vec![drop()]]);
        assert_eq!(places(&found(vec![chain])), vec![]);
    }

    #[test]
    fn a_way_through_is_made_once_and_removed_when_it_is_of_no_use() {
        let mut chain = forward(Policy::Drop, vec![]);
        let ours = way_through(TableFamily::Ip, &wanted());
        chain.rules = (1..).zip(ours).map(|(handle, rule)| Rule { handle: Some(handle), ..rule }).collect();
        let open = found(vec![chain.clone()]);
        assert!(openings(&open, MINE, &wanted()).changes.is_empty());
        assert_eq!(openings(&open, MINE, &wanted()).notes.len(), 1);
        assert_eq!(openings(&open, MINE, &[]).changes.len(), 2, "off is gone");
        chain.base.as_mut().unwrap().policy = Policy::Accept;
        assert_eq!(openings(&found(vec![chain]), MINE, &wanted()).changes.len(), 2, "no longer needed");
    }

    #[test]
    fn the_way_of_another_agent_is_left_alone() {
        let mut chain = forward(Policy::Drop, vec![]);
        let theirs = way_through(TableFamily::Ip, &wanted());
        chain.rules = (1..).zip(theirs).map(|(handle, rule)| Rule { handle: Some(handle), ..rule }).collect();
        let network = ["10.99.0.0/16".parse().unwrap()];
        let mine = vec![Traffic { network: network[0], ..wanted().remove(0) }];
        let ours = RuleOwnership { networks: &network, ..MINE };
        let openings = openings(&found(vec![chain]), ours, &mine);
        assert!(openings.changes.iter().all(|change| matches!(change, Change::AddRule { .. })));
        assert_eq!(openings.changes.len(), 2);
    }

    #[test]
    fn the_chain_of_iptables_mode_is_a_way_only_as_long_as_that_is_the_mode() {
        let mut base = forward(Policy::Drop, vec![vec![jump(OWN_CHAIN)]]);
        base.rules[0].handle = Some(1);
        let found = found(vec![base, Chain::regular(OWN_CHAIN)]);
        assert_eq!(openings(&found, RuleOwnership { by_iptables: true, ..MINE }, &wanted()).changes.len(), 0);
        assert_eq!(openings(&found, MINE, &wanted()).changes.len(), 2);
    }

    #[test]
    fn circles_of_chains_end() {
        let base = forward(Policy::Drop, vec![vec![jump("a")]]);
        let a = Chain { rules: rules([vec![jump("b")]]), ..Chain::regular("a") };
        let b = Chain { rules: rules([vec![jump("a")]]), ..Chain::regular("b") };
        assert_eq!(places(&found(vec![base, a, b])).len(), 2);
    }
}
