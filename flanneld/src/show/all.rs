//! `flanneld status --all`: what every node says of itself, and of the others.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use serde::Deserialize;
use serde_json::{Value, json};

use super::{Style, Table, Tone};
use crate::status::{PeerEntry, PeerList, Status};

/// A matrix of more nodes than this is no longer looked at, and only rows of nodes are shown.
const MAX_MATRIX: usize = 32;

/// A node with what it answered.
pub(super) struct NodeAnswer {
    pub(super) address: IpAddr,
    pub(super) name: String,
    pub(super) answer: Result<(Status, PeerList), String>,
}

/// A node in what `status --all --json` prints.
#[derive(Deserialize)]
struct SavedNode {
    address: IpAddr,
    name: String,
    status: Option<Status>,
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

/// Asks every node, this one first.
pub(super) fn ask(at: SocketAddr, own: &Status, list: &PeerList) -> Vec<NodeAnswer> {
    let mut nodes: Vec<(IpAddr, String)> = Vec::new();
    let mut seen = BTreeSet::new();
    if let Some((node, address)) = own.node.as_ref().and_then(|node| Some((node, *node.public.first()?))) {
        nodes.push((at.ip(), node.name.clone().unwrap_or_else(|| address.to_string())));
        seen.extend(node.public.iter().copied());
    }
    for entry in &list.peers {
        // One line for a node with both families: the first address is that of its first family.
        let Some(address) = entry.public.filter(|address| seen.insert(*address)) else { continue };
        let same = |other: &&PeerEntry| other.name.is_some() && other.name == entry.name;
        if list.peers.iter().find(same).and_then(|first| first.public).is_some_and(|first| first != address) {
            continue;
        }
        nodes.push((address, entry.name.clone().unwrap_or_else(|| address.to_string())));
    }
    let addresses: Vec<IpAddr> = nodes.iter().map(|(address, _)| *address).collect();
    let port = at.port();
    let answers = crate::ask::all(&addresses, |address| {
        let at = SocketAddr::new(address, port);
        Ok((crate::ask::value(at, "/status")?, crate::ask::value(at, "/peers")?))
    });
    let named = nodes.into_iter().zip(answers);
    named.map(|((address, name), answer)| NodeAnswer { address, name, answer }).collect()
}

/// The answers, as text or as JSON.
pub(super) fn text(nodes: &[NodeAnswer], as_json: bool, style: Style) -> String {
    if as_json { format!("{}\n", all_as_json(nodes)) } else { table(nodes, style) }
}

fn all_as_json(nodes: &[NodeAnswer]) -> Value {
    let one = |node: &NodeAnswer| match &node.answer {
        Ok((status, list)) => json!({
            "address": node.address, "name": node.name, "status": status, "peers": list.peers,
        }),
        Err(why) => json!({ "address": node.address, "name": node.name, "error": why }),
    };
    json!({ "schema": crate::status::SCHEMA, "nodes": nodes.iter().map(one).collect::<Vec<_>>() })
}

fn table(nodes: &[NodeAnswer], style: Style) -> String {
    let mut table = Table::new(&["NODE", "SUBNET", "READY", "STORE", "PEERS", "KERNEL", "REMARK"]);
    for node in nodes {
        match &node.answer {
            Ok((status, _)) => {
                let own = status.node.as_ref();
                let subnets = own.map(|own| own.subnets.join(" ")).unwrap_or_default();
                let remark = status
                    .conditions
                    .iter()
                    .find_map(|(name, why)| Some(format!("{name}: {}", why.as_ref()?)));
                let note = || status.notes.values().flatten().next().cloned();
                let tone = if status.ready { Tone::Plain } else { Tone::Bad };
                let kernel = if !status.kernel.fights.is_empty() {
                    "fight"
                } else if status.kernel.refused.is_empty() {
                    "ok"
                } else {
                    "refuses"
                };
                let cells = [
                    node.name.clone(),
                    subnets,
                    if status.ready { "yes" } else { "no" }.to_owned(),
                    if status.store.connected { "ok" } else { "away" }.to_owned(),
                    format!("{}/{}", status.peers.programmed, status.peers.known),
                    kernel.to_owned(),
                    remark.or_else(note).unwrap_or_default(),
                ];
                table.row(tone, cells);
            }
            Err(why) => {
                let cells = [node.name.as_str(), "", "", "", "", "", &format!("no answer: {why}")];
                table.row(Tone::Bad, cells);
            }
        }
    }
    table.text(style) + &matrix(nodes, style)
}

/// Rows ask, columns answer; nothing where nothing is measured.
fn matrix(nodes: &[NodeAnswer], style: Style) -> String {
    let measured = |node: &NodeAnswer| {
        node.answer.as_ref().is_ok_and(|(_, list)| list.peers.iter().any(|peer| peer.loss.is_some()))
    };
    if nodes.len() > MAX_MATRIX || !nodes.iter().any(measured) {
        return String::new();
    }
    let subnet = |node: &NodeAnswer| {
        let own = node.answer.as_ref().ok()?.0.node.as_ref()?;
        own.subnets.first().cloned()
    };
    let headings: Vec<&str> =
        std::iter::once("").chain(nodes.iter().map(|node| node.name.as_str())).collect();
    let mut table = Table::new(&headings);
    for from in nodes {
        let mut cells = vec![from.name.clone()];
        let mut tone = Tone::Plain;
        for to in nodes {
            let entry = from
                .answer
                .as_ref()
                .ok()
                .zip(subnet(to))
                .and_then(|((_, list), subnet)| list.peers.iter().find(|peer| peer.subnet == subnet));
            cells.push(match entry {
                _ if from.address == to.address => "·".to_owned(),
                Some(PeerEntry { loss: Some(loss), .. }) if *loss >= 0.01 => {
                    tone = Tone::Bad;
                    format!("{:.0}%!", loss * 100.0)
                }
                Some(PeerEntry { rtt_seconds: Some(rtt), .. }) => format!("{:.1}", rtt * 1000.0),
                _ => "?".to_owned(),
            });
        }
        table.row(tone, cells);
    }
    format!("\nround trips in ms, or what is lost; rows ask, columns answer\n{}", table.text(style))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::Node;

    #[test]
    fn a_node_that_does_not_answer_has_a_row_and_the_matrix_names_losses() {
        let answer = |name: &str, subnet: &str, peer: PeerEntry| {
            let node = Node { name: Some("a1".into()), subnets: vec![subnet.to_owned()], ..Node::default() };
            let status = Status { node: Some(node), ..Status::default() };
            NodeAnswer {
                address: format!("192.0.2.{}", subnet.split('.').nth(2).unwrap()).parse().unwrap(),
                name: name.to_owned(),
                answer: Ok((status, PeerList { peers: vec![peer], ..PeerList::default() })),
            }
        };
        let peer = |subnet: &str, loss, rtt| PeerEntry {
            subnet: subnet.to_owned(),
            loss: Some(loss),
            rtt_seconds: Some(rtt),
            ..PeerEntry::default()
        };
        let hung = NodeAnswer {
            address: "192.0.2.9".parse().unwrap(),
            name: "hung".into(),
            answer: Err("no answer within 2 s from 192.0.2.9:8081".into()),
        };
        let nodes = [
            answer("a1", "10.244.1.0/24", peer("10.244.2.0/24", 0.5, 0.001)),
            answer("a2", "10.244.2.0/24", peer("10.244.1.0/24", 0.0, 0.000_31)),
            hung,
        ];
        let text = table(&nodes, Style::PLAIN);
        assert!(
            text.lines().any(|line| line.starts_with("hung") && line.contains("no answer within 2 s")),
            "{text}"
        );
        assert!(text.contains("50%!") && text.contains("0.3"), "{text}");
        let json = all_as_json(&nodes);
        assert_eq!(json["nodes"][2]["error"], "no answer within 2 s from 192.0.2.9:8081");
        assert_eq!(json["nodes"][0]["status"]["node"]["name"], "a1");
        let read = from_json(json.to_string().as_bytes()).unwrap();
        assert_eq!(all_as_json(&read), json, "what was printed is read again");
        assert!(from_json(b"{\"nodes\":[{\"address\":\"x\"}]}").is_err());
    }
}
