//! What the kernel of a node has for its peers, and what it should have.

use std::collections::BTreeSet;

use anyhow::ensure;

use super::bed::Peer;
use crate::bed::{Member, PEER_OBJECTS};

/// The lines in which the kernel differs from what the peers ask for, which are missing or too many.
pub(crate) fn differences(
    member: &Member,
    peers: impl IntoIterator<Item = Peer>,
) -> anyhow::Result<Vec<String>> {
    let mut wanted = [BTreeSet::new(), BTreeSet::new(), BTreeSet::new()];
    for peer in peers {
        let (first, public, mac) = (peer.first(), peer.public(), peer.mac());
        let lines = [
            format!("{first}/24 via {first} proto 70 onlink"),
            format!("{first} lladdr {mac} PERMANENT"),
            format!("{mac} dst {public} self permanent"),
        ];
        for (wanted, line) in wanted.iter_mut().zip(lines) {
            wanted.insert(line);
        }
    }
    let mut differences = Vec::new();
    for (look, wanted) in PEER_OBJECTS.into_iter().zip(wanted) {
        let text = member.show(look)?;
        let found: BTreeSet<String> = text.lines().map(without_nexthop_id).collect();
        differences.extend(wanted.symmetric_difference(&found).cloned());
    }
    Ok(differences)
}

/// A line without the id of the nexthop object that a route uses: its gateway is shown as well.
fn without_nexthop_id(line: &str) -> String {
    match line.trim().split_once(" nhid ") {
        Some((destination, rest)) => format!("{destination} {}", rest.split_once(' ').unwrap_or_default().1),
        None => line.trim().to_owned(),
    }
}

/// An error with some of the differences and the agent's log, if there are any.
pub(crate) fn ensure_equal(member: &Member, peers: impl IntoIterator<Item = Peer>) -> anyhow::Result<()> {
    let differences = differences(member, peers)?;
    let some = &differences[..differences.len().min(10)];
    ensure!(
        differences.is_empty(),
        "{} differences, such as {some:#?}\n{}",
        differences.len(),
        member.agent.log()
    );
    Ok(())
}
