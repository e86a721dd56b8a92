//! The ways between nodes, as the nodes themselves judge them.

use std::collections::HashMap;

use super::answers::NodeAnswer;
use crate::status::PeerEntry;

/// Less loss than this is no trouble: one probe of 300.
pub(super) const MIN_LOSS: f64 = 0.01;

/// How good a way is, from best to worst.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Grade {
    /// Nothing is measured.
    Unknown,
    Good,
    /// Loses packets, or large ones only.
    Lossy,
    /// Nothing arrives, or the kernel lacks it.
    Bad,
    /// The lease of that node can't be used.
    Skipped,
}

impl Grade {
    pub(super) fn of(entry: &PeerEntry) -> Self {
        match (entry.state.as_str(), entry.loss) {
            ("skipped", _) => Self::Skipped,
            ("unreachable" | "refused", _) => Self::Bad,
            ("degraded", _) => Self::Lossy,
            _ if entry.cause.is_some() => Self::Lossy,
            (_, Some(loss)) if loss >= MIN_LOSS => Self::Lossy,
            (_, Some(_)) => Self::Good,
            (_, None) => Self::Unknown,
        }
    }
}

/// What a node knows of the others.
pub(super) fn known(node: &NodeAnswer) -> impl Iterator<Item = &PeerEntry> {
    node.answer.iter().flat_map(|(_, list)| &list.peers)
}

/// Whether anything is measured between nodes.
pub(super) fn are_measured(nodes: &[NodeAnswer]) -> bool {
    nodes.iter().flat_map(known).any(|entry| entry.loss.is_some())
}

/// By what others know a node: its subnets, or where it should answer if it does not.
pub(super) fn keys(node: &NodeAnswer) -> Vec<String> {
    match &node.answer {
        Ok((status, _)) => status.node.as_ref().map(|own| own.subnets.clone()).unwrap_or_default(),
        Err(_) => vec![node.address.to_string()],
    }
}

/// The ways from one node, by subnet and by public address.
pub(super) struct WaysFrom<'a>(HashMap<String, &'a PeerEntry>);

impl<'a> WaysFrom<'a> {
    pub(super) fn new(node: &'a NodeAnswer) -> Self {
        let mut ways = HashMap::new();
        for entry in known(node) {
            if let Some(public) = entry.public {
                ways.insert(public.to_string(), entry);
            }
            ways.insert(entry.subnet.clone(), entry);
        }
        Self(ways)
    }

    /// The way to the node with these keys; of two families the worse one.
    pub(super) fn to(&self, keys: &[String]) -> Option<&'a PeerEntry> {
        keys.iter().filter_map(|key| self.0.get(key).copied()).max_by_key(|entry| Grade::of(entry))
    }
}
