//! What our udp backend counted during a measurement, to explain its figure: how much it moved with one call.

use std::collections::BTreeMap;
use std::time::Duration;

use backends::testing::{Agent, Signal, wait_for_some};

use super::bed::{PacketPath, Pair};

/// The counters of the agents of a pair, the sender's first, by their names.
pub(crate) struct Counted([BTreeMap<String, u64>; 2]);

impl Counted {
    /// The counters now; none of other ways, and of an agent that doesn't tell.
    pub(crate) fn now(pair: &mut Pair) -> Option<Self> {
        if pair.way != PacketPath::Udp {
            return None;
        }
        let [near, far] = [&mut pair.near, &mut pair.far].map(|side| side.agent.as_mut().and_then(ask));
        Some(Self([near?, far?]))
    }

    /// Packets that the datapaths found to be wrong.
    pub(crate) fn unsound(&self) -> u64 {
        let of = |name: &str| self.0.iter().filter_map(|end| end.get(name)).sum::<u64>();
        of("received_unsound") + of("refused_malformed")
    }

    /// What happened since, in a few words.
    pub(crate) fn since(&self, before: &Self) -> String {
        let of = |end: usize, name: &str| {
            let [now, before] = [self, before].map(|one| one.0[end].get(name).copied().unwrap_or_default());
            now.saturating_sub(before)
        };
        let each = |end, packets, calls| of(end, packets) as f64 / of(end, calls).max(1) as f64;
        let fallbacks = of(0, "sent_fallbacks") + of(1, "sent_fallbacks");
        format!(
            "{:.1} packets a read, {:.1} a send, {:.1} a receipt, {:.1} a write, {fallbacks} fallbacks",
            each(0, "sent_packets", "sent_reads"),
            each(0, "sent_packets", "sent_groups"),
            each(1, "received_packets", "received_datagrams"),
            each(1, "received_packets", "received_writes"),
        )
    }
}

/// The agent logs its counters when asked.
fn ask(agent: &mut Agent) -> Option<BTreeMap<String, u64>> {
    let told = |log: &str| log.lines().filter(|line| line.contains(MARK)).count();
    let before = told(&agent.log());
    agent.process().signal(Signal::USR1).ok()?;
    wait_for_some("the counters of an agent", Duration::from_secs(1), || {
        let log = agent.log();
        if told(&log) > before { parse(&log) } else { None }
    })
    .ok()
}

/// What a line with counters has.
const MARK: &str = " udp: sent_packets=";

/// The last counters in a log that are complete.
fn parse(log: &str) -> Option<BTreeMap<String, u64>> {
    let mut lines = log.split_inclusive('\n');
    let (_, words) = lines.rfind(|line| line.ends_with('\n') && line.contains(MARK))?.split_once(" udp: ")?;
    let pairs = words.split_whitespace().filter_map(|word| word.split_once('='));
    Some(pairs.filter_map(|(name, value)| Some((name.to_owned(), value.parse().ok()?))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_counters_in_the_log_are_those_of_now() {
        let log = "I1 1 main.rs:1] udp: sent_packets=1 sent_groups=1\nI1 1 main.rs:1] something\n\
            I1 1 main.rs:1] udp: sent_packets=89 sent_groups=3 received_writes=7\nI1 1 main.rs:1] udp: sent_pack";
        let now = parse(log).unwrap();
        assert_eq!((now["sent_packets"], now["received_writes"]), (89, 7));
        let one = |packets, groups| {
            let counters = [("sent_packets", packets), ("sent_groups", groups)];
            let counters: BTreeMap<_, _> = counters.map(|(name, value)| (name.to_owned(), value)).into();
            Counted([counters.clone(), counters])
        };
        let said = one(89, 3).since(&one(1, 1));
        assert!(said.contains("44.0 a send") && said.contains("0 fallbacks"), "{said}");
    }
}
