//! What all nodes answer when they are asked how they stand.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use serde::Deserialize;
use serde_json::{Value, json};

use crate::status::{NodeStatus, PeerEntry, PeerList};

/// A node with what it answered.
pub(super) struct NodeAnswer {
    pub(super) address: IpAddr,
    pub(super) name: String,
    pub(super) answer: Result<(NodeStatus, PeerList), String>,
}

/// A node in what `status --all --json` prints.
#[derive(Deserialize)]
struct SavedNode {
    address: IpAddr,
    name: String,
    status: Option<NodeStatus>,
    #[serde(default)]
    peers: Vec<PeerEntry>,
    error: Option<String>,
}

/// The answers that `status --all --json` printed.
pub(super) fn from_json(text: &[u8]) -> Result<Vec<NodeAnswer>, serde_json::Error> {
    #[derive(Deserialize)]
    struct Saved {
        nodes: Vec<SavedNode>,
    }
    let answered = |saved: SavedNode| {
        let SavedNode { address, name, status, peers, error } = saved;
        let list = PeerList { peers, ..PeerList::default() };
        let answer = status.map(|status| (status, list));
        NodeAnswer {
            address,
            name,
            answer: answer.ok_or_else(|| error.unwrap_or_else(|| "no status".to_owned())),
        }
    };
    Ok(serde_json::from_slice::<Saved>(text)?.nodes.into_iter().map(answered).collect())
}

/// Whom to ask: this node first, then each other one at its first address.
fn nodes(at: SocketAddr, own: &NodeStatus, list: &PeerList) -> Vec<(IpAddr, String)> {
    let mut nodes: Vec<(IpAddr, String)> = Vec::new();
    let (mut seen, mut leases) = (BTreeSet::new(), BTreeSet::new());
    if let Some((node, address)) = own.node.as_ref().and_then(|node| Some((node, *node.public.first()?))) {
        nodes.push((at.ip(), node.name.clone().unwrap_or_else(|| address.to_string())));
        seen.extend(node.public.iter().copied());
    }
    for entry in &list.peers {
        let Some(address) = entry.public.filter(|address| seen.insert(*address)) else { continue };
        // One line for a node with both families, which have one lease: the address is that of the first.
        if !entry.lease.is_empty() && !leases.insert(entry.lease.as_str()) {
            continue;
        }
        nodes.push((address, entry.name.clone().unwrap_or_else(|| address.to_string())));
    }
    nodes
}

/// Asks every node, this one first.
pub(super) fn ask(at: SocketAddr, own: &NodeStatus, list: &PeerList) -> Vec<NodeAnswer> {
    let nodes = nodes(at, own, list);
    let addresses: Vec<IpAddr> = nodes.iter().map(|(address, _)| *address).collect();
    let port = at.port();
    let answers = crate::ask::all(&addresses, |address| {
        let at = SocketAddr::new(address, port);
        Ok((crate::ask::value(at, "/status")?, crate::ask::value(at, "/peers")?))
    });
    let named = nodes.into_iter().zip(answers);
    named.map(|((address, name), answer)| NodeAnswer { address, name, answer }).collect()
}

/// The answers as JSON.
pub(super) fn all_as_json(nodes: &[NodeAnswer]) -> Value {
    let one = |node: &NodeAnswer| match &node.answer {
        Ok((status, list)) => json!({
            "address": node.address, "name": node.name, "status": status, "peers": list.peers,
        }),
        Err(why) => json!({ "address": node.address, "name": node.name, "error": why }),
    };
    json!({ "schema": crate::status::SCHEMA, "nodes": nodes.iter().map(one).collect::<Vec<_>>() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::Node;

    #[test]
    fn a_node_with_both_families_is_asked_once_whether_it_has_a_name_or_not() {
        let entry = |lease: &str, public: &str, name: Option<&str>| PeerEntry {
            name: name.map(str::to_owned),
            lease: lease.to_owned(),
            public: Some(public.parse().unwrap()),
            ..PeerEntry::default()
        };
        let public = vec!["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()];
        let own = NodeStatus { node: Some(Node { public, ..Node::default() }), ..NodeStatus::default() };
        let peers = vec![
            entry("two", "192.0.2.2", None),
            entry("named", "192.0.2.3", Some("a3")),
            entry("own address", "192.0.2.1", None),
            entry("two", "2001:db8::2", None),
            entry("named", "2001:db8::3", Some("a3")),
            entry("", "192.0.2.4", None),
            entry("", "192.0.2.5", None),
        ];
        let list = PeerList { peers, ..PeerList::default() };
        let names: Vec<String> =
            nodes("127.0.0.1:8081".parse().unwrap(), &own, &list).into_iter().map(|(_, name)| name).collect();
        assert_eq!(names, ["192.0.2.1", "192.0.2.2", "a3", "192.0.2.4", "192.0.2.5"]);
    }
}
