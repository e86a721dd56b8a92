//! The rules as iptables text: rendered exactly as Go flannel's (contract §6.1), and compared with what
//! `iptables-save` prints; pure.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::traffic::rules::{Match, SERVICE_MARK, Traffic, TrafficRule, TrafficVerdict};

/// One chain of ours: where it hangs, its comment, its rules.
struct ListedChain {
    table: &'static str,
    parent: &'static str,
    name: &'static str,
    comment: &'static str,
}

const CHAINS: [ListedChain; 2] = [
    ListedChain { table: "nat", parent: "POSTROUTING", name: "FLANNEL-POSTRTG", comment: "flanneld masq" },
    ListedChain { table: "filter", parent: "FORWARD", name: "FLANNEL-FWD", comment: "flanneld forward" },
];

impl ListedChain {
    fn jump(&self) -> String {
        format!("{} -m comment --comment \"{}\" -j {}", self.parent, self.comment, self.name)
    }

    fn rules(&self, wanted: Option<&Traffic>) -> Vec<String> {
        let Some(traffic) = wanted else { return Vec::new() };
        let rules = if self.table == "nat" { traffic.postrouting() } else { traffic.forward() };
        rules.iter().map(|rule| self.rule(rule)).collect()
    }

    /// A rule without the leading `-A`. The comment stands where Go flannel has it: after the matches.
    fn rule(&self, rule: &TrafficRule) -> String {
        let mut text = self.name.to_owned();
        for one in &rule.matches {
            // Writing to a string can't fail.
            let _ = match one {
                Match::Marked => write!(text, " -m mark --mark {SERVICE_MARK:#x}/{SERVICE_MARK:#x}"),
                Match::From(net) => write!(text, " -s {net}"),
                Match::NotFrom(net) => write!(text, " ! -s {net}"),
                Match::To(net) => write!(text, " -d {net}"),
                Match::NotTo(net) => write!(text, " ! -d {net}"),
            };
        }
        let target = match rule.verdict {
            TrafficVerdict::Return => "RETURN",
            TrafficVerdict::Accept => "ACCEPT",
            TrafficVerdict::Masquerade { fully_random: true } => "MASQUERADE --random-fully",
            TrafficVerdict::Masquerade { fully_random: false } => "MASQUERADE",
        };
        let _ = write!(text, " -m comment --comment \"{}\" -j {target}", self.comment);
        text
    }
}

/// The input for one `iptables-restore --noflush` that turns `saved` (the output of `iptables-save`) into
/// what `wanted` asks for, in one transaction for each table; `None` when nothing has to change.
///
/// Chains are replaced whole, so that order, duplicates and rules in between are put right too; a jump
/// that is there stays where it is.
pub(super) fn repair(saved: &str, wanted: Option<&Traffic>) -> Option<String> {
    let tables = read(saved);
    let mut input = String::new();
    for chain in &CHAINS {
        let empty = ListedTable::default();
        let found = tables.get(chain.table).unwrap_or(&empty);
        let lines = table(chain, found, &chain.rules(wanted));
        if !lines.is_empty() {
            let _ = write!(input, "*{}\n{}\nCOMMIT\n", chain.table, lines.join("\n"));
        }
    }
    (!input.is_empty()).then_some(input)
}

fn table(chain: &ListedChain, found: &ListedTable, wanted: &[String]) -> Vec<String> {
    let rules: Vec<&str> = found.rules_of(chain.name).collect();
    let there = found.chains.contains(&chain.name.to_owned());
    let jump = chain.jump();
    let jumps = found.rules_of(chain.parent).filter(|rule| *rule == jump).count();
    let mut lines = Vec::new();
    if wanted.is_empty() {
        lines.extend((0..jumps).map(|_| format!("-D {jump}")));
        if there {
            lines.extend([format!("-F {}", chain.name), format!("-X {}", chain.name)]);
        }
        return lines;
    }
    if !there || rules != wanted {
        // Naming a chain empties it, within the same transaction.
        lines.push(format!(":{} - [0:0]", chain.name));
        lines.extend(wanted.iter().map(|rule| format!("-A {rule}")));
    }
    match jumps {
        0 => lines.push(format!("-A {jump}")),
        many => lines.extend((1..many).map(|_| format!("-D {jump}"))),
    }
    lines
}

#[derive(Default)]
struct ListedTable {
    chains: Vec<String>,
    /// Rules as saved, without the leading `-A`.
    rules: Vec<String>,
}

impl ListedTable {
    fn rules_of<'t>(&'t self, chain: &'t str) -> impl Iterator<Item = &'t str> {
        let of = move |rule: &&str| rule.split(' ').next() == Some(chain);
        self.rules.iter().map(String::as_str).filter(of)
    }
}

fn read(saved: &str) -> BTreeMap<String, ListedTable> {
    let mut tables: BTreeMap<String, ListedTable> = BTreeMap::new();
    let mut current = String::new();
    for line in saved.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix('*') {
            current = name.to_owned();
        }
        let Some(table) = (!current.is_empty()).then(|| tables.entry(current.clone()).or_default()) else {
            continue;
        };
        if let Some(chain) = line.strip_prefix(':') {
            table.chains.extend(chain.split(' ').next().map(str::to_owned));
        } else if let Some(rule) = line.strip_prefix("-A ") {
            table.rules.push(rule.to_owned());
        }
    }
    tables
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::traffic::rules::Masquerade;
    use proptest::prelude::*;

    fn traffic() -> Traffic {
        Traffic {
            network: "10.42.0.0/16".parse().unwrap(),
            subnet: "10.42.1.0/24".parse().unwrap(),
            others: Vec::new(),
            masquerade: Some(Masquerade { fully_random: true, except: Vec::new() }),
            forward: true,
            fast_path: false,
        }
    }

    /// What `iptables-save` prints after the input was taken: a model of `iptables-restore --noflush`.
    fn restored(saved: &str, input: &str) -> String {
        let mut tables = read(saved);
        let mut current = String::new();
        for line in input.lines() {
            if let Some(name) = line.strip_prefix('*') {
                current = name.to_owned();
                continue;
            }
            let table = tables.entry(current.clone()).or_default();
            if let Some(chain) = line.strip_prefix(':') {
                let name = chain.split(' ').next().unwrap().to_owned();
                table.rules.retain(|rule| rule.split(' ').next() != Some(name.as_str()));
                table.chains.retain(|known| *known != name);
                table.chains.push(name);
            } else if let Some(rule) = line.strip_prefix("-A ") {
                table.rules.push(rule.to_owned());
            } else if let Some(rule) = line.strip_prefix("-D ") {
                let first = table.rules.iter().position(|known| known == rule).unwrap();
                table.rules.remove(first);
            } else if let Some(chain) = line.strip_prefix("-F ") {
                table.rules.retain(|rule| rule.split(' ').next() != Some(chain));
            } else if let Some(chain) = line.strip_prefix("-X ") {
                table.chains.retain(|known| known != chain);
            }
        }
        let mut text = String::new();
        for (name, ListedTable { chains, rules }) in tables {
            let chains: String = chains.iter().map(|chain| format!(":{chain} - [0:0]\n")).collect();
            let rules: String = rules.iter().map(|rule| format!("-A {rule}\n")).collect();
            let _ = write!(text, "*{name}\n{chains}{rules}COMMIT\n");
        }
        text
    }

    #[test]
    fn the_text_is_that_of_go_flannel() {
        let expected = "*nat\n:FLANNEL-POSTRTG - [0:0]\n\
            -A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment \"flanneld masq\" -j RETURN\n\
            -A FLANNEL-POSTRTG -s 10.42.1.0/24 -d 10.42.0.0/16 -m comment --comment \"flanneld masq\" -j RETURN\n\
            -A FLANNEL-POSTRTG -s 10.42.0.0/16 -d 10.42.1.0/24 -m comment --comment \"flanneld masq\" -j RETURN\n\
            -A FLANNEL-POSTRTG ! -s 10.42.0.0/16 -d 10.42.1.0/24 -m comment --comment \"flanneld masq\" -j RETURN\n\
            -A FLANNEL-POSTRTG -s 10.42.0.0/16 ! -d 224.0.0.0/4 -m comment --comment \"flanneld masq\" -j MASQUERADE --random-fully\n\
            -A FLANNEL-POSTRTG ! -s 10.42.0.0/16 -d 10.42.0.0/16 -m comment --comment \"flanneld masq\" -j MASQUERADE --random-fully\n\
            -A POSTROUTING -m comment --comment \"flanneld masq\" -j FLANNEL-POSTRTG\nCOMMIT\n\
            *filter\n:FLANNEL-FWD - [0:0]\n\
            -A FLANNEL-FWD -s 10.42.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT\n\
            -A FLANNEL-FWD -d 10.42.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT\n\
            -A FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD\nCOMMIT\n";
        assert_eq!(repair("", Some(&traffic())).unwrap(), expected);
    }

    #[test]
    fn what_is_right_needs_nothing_and_what_is_off_goes() {
        let whole = restored("", &repair("", Some(&traffic())).unwrap());
        assert_eq!(repair(&whole, Some(&traffic())), None);
        let off = restored(&whole, &repair(&whole, None).unwrap());
        assert!(!off.contains("FLANNEL"), "{off}");
        assert_eq!(repair(&off, None), None);
    }

    proptest! {
        /// Rules lost, doubled, moved, or joined by strangers' ones: one repair makes all of it right and
        /// leaves strangers alone.
        #[test]
        fn one_repair_is_enough_after_any_damage(
            damage in prop::collection::vec((0usize..40, 0usize..40, 0u8..4), 0..8), forward: bool, masquerade: bool,
        ) {
            let strangers = "*filter\n:FORWARD DROP [0:0]\n:DOCKER - [0:0]\n-A FORWARD -j DOCKER\n-A FORWARD -i lo -j DROP\nCOMMIT\n\
                *nat\n:POSTROUTING ACCEPT [0:0]\n-A POSTROUTING -o eth9 -j MASQUERADE\nCOMMIT\n";
            let before = restored(strangers, &repair(strangers, Some(&traffic())).unwrap());
            let mut lines: Vec<String> = before.lines().map(str::to_owned).collect();
            for (from, to, kind) in damage {
                let ours: Vec<usize> = (0..lines.len()).filter(|i| lines[*i].contains("flanneld")).collect();
                let Some(index) = ours.get(from % ours.len().max(1)).copied() else { break };
                let near = ours[to % ours.len()];
                match kind {
                    0 => drop(lines.remove(index)),
                    1 => lines.insert(index, lines[index].clone()),
                    2 => lines.swap(index, near),
                    _ => lines.insert(index, "-A FLANNEL-FWD -j DROP".to_owned()),
                }
            }
            // A swap across tables makes no table; only rules of the right table count as damage.
            let damaged: String = lines.iter().map(|line| format!("{line}\n")).collect();
            let wanted = Traffic { forward, masquerade: traffic().masquerade.filter(|_| masquerade), ..traffic() };
            let after = match repair(&damaged, Some(&wanted)) {
                Some(input) => restored(&damaged, &input),
                None => damaged.clone(),
            };
            prop_assert_eq!(repair(&after, Some(&wanted)), None, "{}", after);
            for line in strangers.lines().filter(|line| line.starts_with("-A")) {
                prop_assert!(after.contains(line), "{} lost", line);
            }
        }

        #[test]
        fn arbitrary_text_never_panics(saved in "([*:A-Z-] ?[ a-zA-Z0-9-]{0,20}\n){0,10}") {
            let _ = repair(&saved, Some(&traffic()));
        }
    }
}
