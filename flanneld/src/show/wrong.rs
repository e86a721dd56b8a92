//! What is wrong with a cluster, from the answers of its nodes: each trouble once, with who says it.

use std::collections::BTreeMap;

use super::answers::NodeAnswer;

/// Of more troubles than this, the rest is counted.
const MAX_TROUBLES: usize = 50;
/// A trouble that more nodes have than this names the first of them.
const MAX_NAMED: usize = 8;
/// Of more troubles that one node alone has, the rest is counted.
const MAX_OF_ONE: usize = 3;

/// A trouble, with its remedy at the end.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Trouble<'a> {
    pub(super) text: String,
    /// The first of the nodes that say it.
    pub(super) nodes: Vec<&'a str>,
    /// How many more say it.
    pub(super) others: usize,
}

/// All troubles that are shown, and what there is besides.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Wrong<'a> {
    /// What most nodes say comes first.
    pub(super) troubles: Vec<Trouble<'a>>,
    /// Nodes with more troubles of their own than are shown, and how many.
    pub(super) more_of: Vec<(&'a str, usize)>,
    /// Troubles that are not shown at all.
    pub(super) more: usize,
}

impl<'a> Wrong<'a> {
    pub(super) fn with(nodes: &'a [NodeAnswer]) -> Self {
        let mut said: BTreeMap<String, Vec<&str>> = BTreeMap::new();
        for node in nodes {
            for text in sentences(node) {
                said.entry(text).or_default().push(&node.name);
            }
        }
        let mut said: Vec<(String, Vec<&str>)> = said.into_iter().collect();
        said.sort_by_key(|(_, by)| std::cmp::Reverse(by.len()));
        let mut alone: BTreeMap<&str, usize> = BTreeMap::new();
        said.retain(|(_, by)| {
            let [name] = by[..] else { return true };
            let count = alone.entry(name).or_default();
            *count += 1;
            *count <= MAX_OF_ONE
        });
        let more = said.len().saturating_sub(MAX_TROUBLES);
        said.truncate(MAX_TROUBLES);
        let beyond = alone.into_iter().filter(|(_, count)| *count > MAX_OF_ONE);
        Self {
            troubles: said.into_iter().map(|(text, by)| Trouble::of(text, by)).collect(),
            more_of: beyond.map(|(name, count)| (name, count - MAX_OF_ONE)).collect(),
            more,
        }
    }

    pub(super) fn is_nothing(&self) -> bool {
        self.troubles.is_empty()
    }
}

impl<'a> Trouble<'a> {
    fn of(text: String, mut nodes: Vec<&'a str>) -> Self {
        let others = nodes.len().saturating_sub(MAX_NAMED);
        nodes.truncate(MAX_NAMED);
        Self { text, nodes, others }
    }
}

/// What a node says of itself and of the ways to others.
fn sentences(node: &NodeAnswer) -> impl Iterator<Item = String> {
    let answers = node.answer.iter();
    answers.flat_map(|(status, list)| {
        let unmet =
            status.conditions.iter().filter_map(|(name, why)| Some(format!("{name}: {}", why.as_ref()?)));
        let ways = list.peers.iter().filter_map(|peer| {
            let remedy = peer.remedy.as_deref().map(|remedy| format!(": {remedy}")).unwrap_or_default();
            Some(format!("{}{remedy}", peer.cause.as_ref()?))
        });
        let skipped = list.peers.iter().filter(|peer| peer.state == "skipped");
        let left_out = skipped.filter_map(|peer| {
            let why = peer.why.as_ref()?;
            Some(format!("{} is left out: {why}", peer.name.as_ref().unwrap_or(&peer.subnet)))
        });
        unmet.chain(ways).chain(left_out).chain(status.notes.values().flatten().cloned())
    })
}
