//! `flanneld status --all` as text: what every node says of itself, and of the others.

use super::answers::{NodeAnswer, all_as_json};
use super::ways::{self, Grade, MIN_LOSS, WaysFrom};
use super::wrong::{Trouble, Wrong};
use super::{Style, TextTable, Tone, milliseconds};
use crate::text::clean;

/// A matrix of more nodes than this is no longer looked at, and only rows of nodes are shown.
const MAX_MATRIX: usize = 32;
/// Names and troubles are cut to this many characters.
const MAX_NAMES: usize = 300;
const MAX_TROUBLE: usize = 1000;

/// The answers, as text or as JSON.
pub(super) fn text(nodes: &[NodeAnswer], as_json: bool, style: Style) -> String {
    if as_json { format!("{}\n", all_as_json(nodes)) } else { table(nodes, style) }
}

fn table(nodes: &[NodeAnswer], style: Style) -> String {
    let mut table = TextTable::new(&["NODE", "SUBNET", "READY", "STORE", "PEERS", "KERNEL", "REMARK"]);
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
    table.text(style) + &matrix(nodes, style) + &wrong(nodes, style)
}

/// What is wrong, each with its remedy, and who says it.
fn wrong(nodes: &[NodeAnswer], style: Style) -> String {
    let Wrong { troubles, more_of, more } = Wrong::with(nodes);
    let mut text = if troubles.is_empty() { String::new() } else { "\n".to_owned() };
    for Trouble { text: trouble, nodes, others } in troubles {
        let others = if others > 0 { format!(" and {others} more") } else { String::new() };
        let names = clean(&nodes.join(", "), MAX_NAMES);
        text += &style.paint(Tone::Bad, &format!("✘ {names}{others}: {}", clean(&trouble, MAX_TROUBLE)));
        text.push('\n');
    }
    for (name, more) in more_of {
        text +=
            &format!("  {}: {more} more: flanneld status and status --peers there\n", clean(name, MAX_NAMES));
    }
    if more > 0 {
        text += &format!("  and {more} more: flanneld status on the nodes\n");
    }
    text
}

/// Rows ask, columns answer; nothing where nothing is measured.
fn matrix(nodes: &[NodeAnswer], style: Style) -> String {
    if nodes.len() > MAX_MATRIX || !ways::are_measured(nodes) {
        return String::new();
    }
    let headings: Vec<&str> =
        std::iter::once("").chain(nodes.iter().map(|node| node.name.as_str())).collect();
    let mut table = TextTable::new(&headings);
    let keys: Vec<Vec<String>> = nodes.iter().map(ways::keys).collect();
    for from in nodes {
        let ways = WaysFrom::new(from);
        let mut cells = vec![from.name.clone()];
        let mut tone = Tone::Plain;
        for (to, keys) in nodes.iter().zip(&keys) {
            let way = ways.to(keys).filter(|_| !std::ptr::eq(from, to));
            let grade = way.map_or(Grade::Unknown, Grade::of);
            if grade >= Grade::Lossy {
                tone = Tone::Bad;
            }
            let rtt = way.and_then(|way| way.rtt_seconds).map(milliseconds);
            let loss = way.and_then(|way| way.loss).filter(|loss| *loss >= MIN_LOSS);
            cells.push(match grade {
                _ if std::ptr::eq(from, to) => "·".to_owned(),
                Grade::Good => rtt.unwrap_or_else(|| "✔".to_owned()),
                Grade::Lossy => match loss {
                    Some(loss) => format!("{:.0}%!", loss * 100.0),
                    None => format!("{}!", rtt.unwrap_or_default()),
                },
                Grade::Bad => "✘".to_owned(),
                Grade::Skipped => "–".to_owned(),
                Grade::Unknown => "?".to_owned(),
            });
        }
        table.row(tone, cells);
    }
    format!(
        "\nround trips in ms; rows ask, columns answer; !: loses packets, ✘: unreachable, –: lease not usable, ?: not measured\n{}",
        table.text(style)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::show::answers::from_json;
    use crate::status::{Node, NodeStatus, PeerEntry, PeerList};

    #[test]
    fn a_node_that_does_not_answer_has_a_row_and_the_matrix_names_losses() {
        let answer = |name: &str, subnet: &str, peer: PeerEntry| {
            let node = Node { name: Some("a1".into()), subnets: vec![subnet.to_owned()], ..Node::default() };
            let status = NodeStatus { node: Some(node), ..NodeStatus::default() };
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
        let lossy = PeerEntry {
            cause: Some("the tunnel to a2 loses packets".into()),
            remedy: Some("look there".into()),
            ..peer("10.244.2.0/24", 0.5, 0.001)
        };
        let hung = NodeAnswer {
            address: "192.0.2.9".parse().unwrap(),
            name: "hung".into(),
            answer: Err("no answer within 2 s from 192.0.2.9:8081".into()),
        };
        let nodes = [
            answer("a1", "10.244.1.0/24", lossy),
            answer("a2", "10.244.2.0/24", peer("10.244.1.0/24", 0.0, 0.000_31)),
            hung,
        ];
        let text = table(&nodes, Style::PLAIN);
        assert!(
            text.lines().any(|line| line.starts_with("hung") && line.contains("no answer within 2 s")),
            "{text}"
        );
        assert!(text.contains("50%!") && text.contains("0.3"), "{text}");
        assert!(text.contains("✘ a1: the tunnel to a2 loses packets: look there\n"), "{text}");
        let json = all_as_json(&nodes);
        assert_eq!(json["nodes"][2]["error"], "no answer within 2 s from 192.0.2.9:8081");
        assert_eq!(json["nodes"][0]["status"]["node"]["name"], "a1");
        let read = from_json(json.to_string().as_bytes()).unwrap();
        assert_eq!(all_as_json(&read), json, "what was printed is read again");
        assert!(from_json(b"{\"nodes\":[{\"address\":\"x\"}]}").is_err());
    }
}
