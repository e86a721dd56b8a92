//! What very many rules and set elements cost: time in the kernel and out of it, and memory.
//!
//! Each round has a process of its own, because memory tells something only in one that did nothing before.
//! What is kept of it is measured after the allocator was asked to give back what is free, as the agent asks it
//! after large changes of routes, neighbours and FDB entries; its own rules are too few for that to matter.

use std::env;
use std::fs;
use std::io::{self, Write};
use std::net::Ipv4Addr;
use std::time::Instant;

use anyhow::{Context, ensure};
use backends::nft::{
    Base, Chain, Hook, KeyType, Nft, Op, Rule, Set, Span, Table, TableFamily, TableId, differs, matches::*,
};
use backends::testing::Namespace;
use bench::figure::{Limit, Row, ms};
use bench::process::memory_mib;
use clap::ValueEnum;
use ipnet::{IpNet, Ipv4Net};
use serde_json::json;
use subnet::Family;

use crate::Stage;

const RULES: u16 = 5_000;
/// Rules in a chain.
const PER_CHAIN: u16 = 100;
const ELEMENTS: u32 = 20_000;
/// For the transaction.
const LIMIT_MS: f64 = 200.0;
/// For what is kept of the memory.
const LIMIT_MIB: f64 = 2.0;

/// How often everything is done once more, to see whether that takes more memory each time.
const MORE: u32 = 4;
/// Rounds that are enough.
const ROUNDS: u32 = 10;
/// What the elements are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// Single addresses.
    Addresses,
    /// Networks, as ranges of addresses.
    Networks,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Addresses => "addresses",
            Self::Networks => "networks",
        }
    }
}

/// What a round gives; only that with addresses has limits.
const ROWS: [Row<'_>; 10] = [
    ("transaction", "ms", Limit::Each(LIMIT_MS)),
    ("transaction in place of the same", "ms", Limit::None),
    ("dump", "ms", Limit::None),
    ("resident before", "MiB", Limit::None),
    ("resident with the rules as values", "MiB", Limit::None),
    ("resident at most in the transaction", "MiB", Limit::None),
    ("resident at most in the dump", "MiB", Limit::None),
    ("resident after dropping all", "MiB", Limit::None),
    ("kept of the memory", "MiB", Limit::Each(LIMIT_MIB)),
    ("kept besides after four more times", "MiB", Limit::None),
];

/// Measures both kinds of elements.
pub(crate) fn measure(stage: &Stage) -> anyhow::Result<()> {
    for kind in [Kind::Addresses, Kind::Networks] {
        let title = format!("rules-bulk: {RULES} rules, {ELEMENTS} {}", kind.name());
        let limited = |limit| if kind == Kind::Addresses { limit } else { Limit::None };
        let rows = ROWS.map(|(what, unit, limit)| (what, unit, limited(limit)));
        stage.measure(&title, rows, ROUNDS, |_| in_a_process(kind))?;
    }
    Ok(())
}

/// The values of one round in a process and a network namespace of its own.
fn in_a_process(kind: Kind) -> anyhow::Result<[f64; ROWS.len()]> {
    let own = env::current_exe().context("this program's own path is unknown")?;
    let namespace = Namespace::new()?;
    let command = namespace.command(&own).args(["rules", "--bulk-round", kind.name()]);
    serde_json::from_str(&command.ok()?).context("a round doesn't say its values")
}

/// One round in this very process and its network namespace, which should have no rules.
pub(crate) fn round(kind: Kind) -> anyhow::Result<()> {
    let memory = |name| memory_mib("self", name);
    // The code itself takes memory, too, once it has run.
    exercise(&table(kind, PER_CHAIN, 10))?;
    let before = memory("VmRSS")?;
    let (values, [new, again, dump], [peak, peak_dump]) = {
        let wanted = table(kind, RULES, ELEMENTS);
        let values = memory("VmRSS")?;
        let (times, peaks) = exercise(&wanted)?;
        (values, times, peaks)
    };
    backends::memory::give_back();
    let after = memory("VmRSS")?;
    for _ in 0..MORE {
        exercise(&table(kind, RULES, ELEMENTS))?;
    }
    backends::memory::give_back();
    let more = memory("VmRSS")? - after;
    let all = [new, again, dump, before, values, peak, peak_dump, after, after - before, more];
    writeln!(io::stdout(), "{}", json!(all)).context("can't write to the standard output")
}

/// Makes the table, replaces it, reads it back; gives the milliseconds of each and the most memory of the
/// first and of the last.
fn exercise(wanted: &Table) -> anyhow::Result<([f64; 3], [f64; 2])> {
    let mut nft = Nft::open()?;
    forget_peak()?;
    let start = Instant::now();
    nft.apply(std::slice::from_ref(wanted))?;
    let (new, peak) = (ms(start.elapsed()), memory_mib("self", "VmHWM")?);
    let start = Instant::now();
    nft.apply(std::slice::from_ref(wanted))?;
    let again = ms(start.elapsed());
    forget_peak()?;
    let start = Instant::now();
    let found = nft.dump()?;
    let (dump, peak_dump) = (ms(start.elapsed()), memory_mib("self", "VmHWM")?);
    let difference = differs(std::slice::from_ref(wanted), &found);
    ensure!(difference.is_none(), "the kernel has other rules: {}", difference.unwrap_or_default());
    Ok(([new, again, dump], [peak, peak_dump]))
}

/// Chains of rules that each look at source, protocol and port, and a set that one more rule looks up.
fn table(kind: Kind, rules: u16, elements: u32) -> Table {
    let mut table = Table::new(TableId::new(TableFamily::Ip, "bulk"));
    let mut base = Chain::base("forward", Base::filter(Hook::Forward, 0));
    base.rules.push(Rule::new([in_set(&[Field::Source(Family::V4)], "sources"), accept()]));
    let numbers: Vec<u16> = (1..=rules).collect();
    for (number, numbers) in numbers.chunks(PER_CHAIN.into()).enumerate() {
        let mut chain = Chain::regular(format!("part-{number}"));
        base.rules.push(Rule::new([jump(&chain.name)]));
        chain.rules.extend(numbers.iter().map(|&number| rule(number)));
        table.chains.push(chain);
    }
    table.chains.push(base);
    let set = Set::new("sources", &[KeyType::Ipv4]);
    // Every other number: networks that touch would become one.
    let at =
        |number: u32, step: u32| Ipv4Addr::from_bits(u32::from_be_bytes([10, 0, 0, 0]) + 2 * step * number);
    let numbers = 0..elements;
    table.sets.push(match kind {
        Kind::Addresses => set.with(numbers.map(|number| Span::address(at(number, 1).into()))),
        Kind::Networks => {
            let net = |number| Ipv4Net::new_assert(at(number, 16), 28);
            set.with_ranges().with(numbers.map(|number| Span::net(net(number).into())))
        }
    });
    table
}

fn rule(number: u16) -> Rule {
    let [high, low] = number.to_be_bytes();
    let from = IpNet::from(Ipv4Net::new_assert(Ipv4Addr::new(10, 200, high, low), 32));
    Rule::new([source(Op::Eq, from), protocol(Op::Eq, TCP), destination_port(Op::Eq, number), accept()])
}

/// From here on, `VmHWM` is the most since now.
fn forget_peak() -> anyhow::Result<()> {
    const PEAK: &str = "5";
    fs::write("/proc/self/clear_refs", PEAK).context("can't write to /proc/self/clear_refs")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_takes_both_kinds_and_gives_back_the_same() {
        for kind in [Kind::Addresses, Kind::Networks] {
            let small = table(kind, 250, 300);
            assert_eq!(small.sets[0].elements.len(), 300);
            assert_eq!(small.chains.iter().map(|chain| chain.rules.len()).sum::<usize>(), 250 + 3 + 1);
            let namespace = Namespace::new().unwrap();
            let (_, [peak, _]) = namespace.run(|| exercise(&small)).unwrap();
            assert!(peak > 0.0);
        }
    }
}
