//! The page as text; `make report-check` looks at it in a browser.

use super::*;
use crate::status::{Node, PeerEntry, PeerList, Pool};

fn node(number: u8, name: &str, nodes: u8, entry: impl Fn(u8) -> PeerEntry) -> NodeAnswer {
    let subnet = |number: u8| format!("10.244.{number}.0/24");
    let address = |number: u8| std::net::IpAddr::from([192, 0, 2, number]);
    let status = NodeStatus {
        ready: true,
        node: Some(Node {
            subnets: vec![subnet(number)],
            public: vec![address(number)],
            backend: "vxlan".into(),
            ..Node::default()
        }),
        pools: vec![Pool { size: 253, used: 83, leaked: Some(2), ..Pool::default() }],
        ..NodeStatus::default()
    };
    let others = (1..=nodes).filter(|other| *other != number);
    let peers =
        others.map(|other| PeerEntry { subnet: subnet(other), public: Some(address(other)), ..entry(other) });
    let list = PeerList { peers: peers.collect(), ..PeerList::default() };
    NodeAnswer { address: address(number), name: name.to_owned(), answer: Ok((status, list)) }
}

fn fine(_: u8) -> PeerEntry {
    PeerEntry {
        state: "reachable".into(),
        loss: Some(0.0),
        rtt_seconds: Some(0.0003),
        ..PeerEntry::default()
    }
}

fn bad(cause: &str) -> PeerEntry {
    PeerEntry {
        state: "unreachable".into(),
        loss: Some(1.0),
        cause: Some(cause.into()),
        remedy: Some("allow it".into()),
        ..PeerEntry::default()
    }
}

fn silent(number: u8) -> NodeAnswer {
    let address = std::net::IpAddr::from([192, 0, 2, number]);
    NodeAnswer { address, name: format!("a{number}"), answer: Err("no answer within 2 s".into()) }
}

#[test]
fn the_matrix_shows_who_does_not_reach_whom() {
    let lossy = |other: u8| match other {
        2 => bad("UDP port 8472 is dropped"),
        3 => PeerEntry { state: "degraded".into(), loss: Some(0.12), ..fine(3) },
        _ => fine(other),
    };
    let nodes = [node(1, "a1", 4, lossy), node(2, "a2", 4, fine), node(3, "a3", 4, fine), silent(4)];
    let page = page(&nodes);
    for part in [
        "<b>4</b> nodes",
        "<li class=g><b>3</b> ✔ ready",
        "<li class=b><b>1</b> ✘ without an answer",
        "<li class=b><b>1</b> ✘ ways unreachable",
        "<tr><th scope=row>a1<td>·<td class=b title=\"a1 → a2: unreachable UDP port 8472 is dropped\">✘<td class=l title=\"a1 → a3: \
         degraded \">! 12%<td class=g>0.3</tr>",
        "<b>a1</b>: UDP port 8472 is dropped: allow it",
        "<tr><th scope=row>a4<td class=n title=\"the asking node does not answer\">?",
        "<tr><th scope=row>a4<td class=b>✘ no answer<td>192.0.2.4<td colspan=7>no answer within 2 s",
        "83 of 253, 2 leaked",
    ] {
        assert!(page.contains(part), "{part} in\n{page}");
    }
}

#[test]
fn names_and_texts_of_others_are_text_and_no_markup() {
    let hostile = "<script>alert(\"1\")</script>'\u{202e}\n&";
    let long = "n".repeat(253);
    let page =
        page(&[node(1, hostile, 3, |_| bad(hostile)), node(2, hostile, 3, fine), node(3, &long, 3, fine)]);
    assert!(
        !page.contains("<script")
            && page.contains("&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;&#39;··&amp;"),
        "{page}"
    );
    assert!(page.contains(&format!("title=\"{long}\"")), "{page}");
    assert!(page.contains(&format!(">{}…<", "n".repeat(31))), "{page}");
    for outer in ["http:", "https:", "src=\"", "@import", "url("] {
        assert!(!page.contains(outer), "{outer}");
    }
}

#[test]
fn what_many_nodes_say_is_said_once() {
    let nodes: Vec<NodeAnswer> = (1..=12)
        .map(|number| {
            node(number, &format!("a{number}"), 13, |other| {
                if other == 13 { bad("a13 is down") } else { fine(other) }
            })
        })
        .collect();
    let page = page(&nodes);
    assert!(
        page.contains("<li><b>a1, a2, a3, a4, a5, a6, a7, a8 and 4 more</b>: a13 is down: allow it</li>"),
        "{page}"
    );
}

#[test]
fn what_one_node_says_of_all_others_does_not_fill_the_page() {
    let nodes = [node(1, "a1", 90, |other| bad(&format!("a{other} is lost"))), node(2, "a2", 90, fine)];
    let page = page(&nodes);
    assert_eq!(page.matches("<li><b>a1</b>").count(), 4);
    assert!(page.contains("<li><b>a1</b>: 86 more: "), "{page}");
}

#[test]
fn of_very_many_nodes_the_worst_are_shown_and_all_are_counted() {
    let worst = |other: u8| if other == 1 { bad("x") } else { fine(other) };
    let nodes: Vec<NodeAnswer> = (1..=120)
        .map(|number| {
            if number == 77 {
                node(77, "worst", 120, worst)
            } else {
                node(number, &format!("n{number}"), 120, fine)
            }
        })
        .collect();
    let page = page(&nodes);
    assert!(
        page.contains("the 100 nodes with the worst") && page.contains("<th scope=col><span>worst</span>")
    );
    assert!(page.contains("<th scope=col><span>n1</span>"), "the one that is not reached");
    assert!(page.contains(&format!("<th>≤ 0.5 ms<td>{}<", 120 * 119 - 1)));
    assert_eq!(page.matches("<td>·").count(), 100);
    assert!(page.len() < 600_000, "{}", page.len());
}

#[test]
fn both_families_of_a_node_are_one_cell_with_the_worse_of_them() {
    let both = |mut answer: NodeAnswer, second: &str, entry: PeerEntry| {
        let (status, list) = answer.answer.as_mut().unwrap();
        status.node.as_mut().unwrap().subnets.push(second.to_owned());
        list.peers.push(entry);
        answer
    };
    let worse = PeerEntry { subnet: "fd00:2::/64".into(), ..bad("IPv6 is lost") };
    let nodes = [
        both(node(1, "a1", 2, fine), "fd00:1::/64", worse),
        both(node(2, "a2", 2, fine), "fd00:2::/64", PeerEntry { subnet: "fd00:1::/64".into(), ..fine(1) }),
    ];
    let page = page(&nodes);
    assert!(
        page.contains("a1 → a2: unreachable IPv6 is lost")
            && page.contains("<tr><th scope=row>a2<td class=g>0.3<td>·"),
        "{page}"
    );
}

#[test]
fn nothing_measured_is_said_and_no_way_is_called_good() {
    let nothing = |_| PeerEntry { state: "programmed".into(), ..PeerEntry::default() };
    let page = page(&[node(1, "a1", 2, nothing), node(2, "a2", 2, nothing)]);
    assert!(
        page.contains("Nothing is measured") && page.contains("<li class=n><b>0</b> ✔ ways reachable"),
        "{page}"
    );
}
