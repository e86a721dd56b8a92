//! What our udp backend counted during a measurement, to explain its figure: how much it moved with one call.

use std::collections::BTreeMap;

use backends::testing::Agent;
use serde_json::Value;

use super::bed::{PacketPath, Pair};

/// The counters of the agents of a pair, the sender's first, by their names.
pub(crate) struct Counted([BTreeMap<String, u64>; 2]);

impl Counted {
    /// The counters now; none of other ways, and of an agent that doesn't tell.
    pub(crate) fn now(pair: &Pair) -> Option<Self> {
        if pair.way != PacketPath::Udp {
            return None;
        }
        let [near, far] = [&pair.near, &pair.far].map(|side| side.agent.as_ref().and_then(ask));
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

/// The counters in the agent's status.
fn ask(agent: &Agent) -> Option<BTreeMap<String, u64>> {
    let (_, text) = agent.get("/status").ok()?;
    let status: Value = serde_json::from_str(&text).ok()?;
    serde_json::from_value(status["tunnel"].clone()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happened_since_is_the_difference_of_two_moments() {
        let one = |packets, groups| {
            let counters = [("sent_packets", packets), ("sent_groups", groups)];
            let counters: BTreeMap<_, _> = counters.map(|(name, value)| (name.to_owned(), value)).into();
            Counted([counters.clone(), counters])
        };
        let said = one(89, 3).since(&one(1, 1));
        assert!(said.contains("44.0 a send") && said.contains("0 fallbacks"), "{said}");
    }
}
