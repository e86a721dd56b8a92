//! The ways between nodes as a matrix: rows ask, columns answer.

use std::collections::HashMap;
use std::fmt::Write as _;

use super::html::{escaped, name_of};
use crate::show::answers::NodeAnswer;
use crate::show::milliseconds;
use crate::show::ways::{Grade, MIN_LOSS, WaysFrom, are_measured, keys, known};
use crate::status::PeerEntry;

/// Of more nodes than this, the matrix has those with the worst ways, and a histogram has all ways.
const MAX_NODES: usize = 100;
/// More columns than this are narrow.
const MAX_WIDE: usize = 24;
/// Upper bounds of the classes of round trips in the histogram, in milliseconds.
const BOUNDS: [f64; 7] = [0.25, 0.5, 1.0, 2.5, 5.0, 25.0, 100.0];
/// Writes the matrix, or why there is none.
pub(super) fn write(page: &mut String, nodes: &[NodeAnswer]) {
    if !are_measured(nodes) {
        page.push_str(
            "<h2>Paths</h2>\n<p>Nothing is measured between the nodes yet, or probes are off (<code>--probe-interval=0</code>).</p>\n",
        );
        return;
    }
    let mut shown: Vec<&NodeAnswer> = nodes.iter().collect();
    if nodes.len() > MAX_NODES {
        histogram(page, nodes);
        let blamed = blame(nodes);
        shown.sort_by_cached_key(|node| std::cmp::Reverse(badness(node, &blamed)));
        shown.truncate(MAX_NODES);
        let _ = writeln!(page, "<h2>Paths between the {MAX_NODES} nodes with the worst</h2>");
    } else {
        page.push_str("<h2>Paths from node to node</h2>\n");
    }
    page.push_str(
        "<p class=key>Rows ask, columns answer: round trip in milliseconds. <span class=g>0.3 reachable</span><span class=l>! degraded: \
         loss, or large packets only</span><span class=b>✘ unreachable</span><span class=b>– lease not usable</span>\
         <span class=n>? not measured</span></p>\n",
    );
    table(page, &shown);
}

fn table(page: &mut String, shown: &[&NodeAnswer]) {
    let dense = if shown.len() > MAX_WIDE { " dense" } else { "" };
    let _ = write!(page, "<div class=scroll>\n<table class=\"m{dense}\">\n<tr><th>");
    for node in shown {
        let _ = write!(page, "<th scope=col><span>{}</span>", name_of(&node.name));
    }
    page.push_str("</tr>\n");
    let keys: Vec<Vec<String>> = shown.iter().map(|node| keys(node)).collect();
    for from in shown {
        let ways = WaysFrom::new(from);
        let _ = write!(page, "<tr><th scope=row>{}", name_of(&from.name));
        for (to, keys) in shown.iter().zip(&keys) {
            if std::ptr::eq(*from, *to) {
                page.push_str("<td>·");
                continue;
            }
            match ways.to(keys) {
                Some(entry) => cell(page, &from.name, &to.name, entry),
                None if from.answer.is_err() => {
                    page.push_str("<td class=n title=\"the asking node does not answer\">?")
                }
                None => page.push_str("<td class=n>?"),
            }
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</table>\n</div>\n");
}

/// The style of a cell.
fn class(grade: Grade) -> char {
    match grade {
        Grade::Good => 'g',
        Grade::Lossy => 'l',
        Grade::Bad | Grade::Skipped => 'b',
        Grade::Unknown => 'n',
    }
}

fn cell(page: &mut String, from: &str, to: &str, entry: &PeerEntry) {
    let grade = Grade::of(entry);
    let rtt = entry.rtt_seconds.map(milliseconds);
    let loss = entry.loss.filter(|loss| *loss >= MIN_LOSS).map(|loss| format!("{:.0}%", loss * 100.0));
    let text = match grade {
        Grade::Good => rtt.unwrap_or_else(|| "✔".to_owned()),
        Grade::Lossy => format!("! {}", loss.or(rtt).unwrap_or_default()),
        Grade::Bad => "✘".to_owned(),
        Grade::Skipped => "–".to_owned(),
        Grade::Unknown => "?".to_owned(),
    };
    let class = class(grade);
    if grade == Grade::Good {
        let _ = write!(page, "<td class={class}>{text}");
        return;
    }
    let why = entry.cause.as_deref().or(entry.why.as_deref()).unwrap_or_default();
    let title = escaped(&format!("{from} → {to}: {} {why}", entry.state));
    let _ = write!(page, "<td class={class} title=\"{title}\">{}", text.trim_end());
}

/// How many ways have which round trip.
fn histogram(page: &mut String, nodes: &[NodeAnswer]) {
    let mut counts = [0usize; BOUNDS.len() + 1];
    for rtt in nodes.iter().flat_map(known).filter_map(|entry| entry.rtt_seconds) {
        counts[BOUNDS.iter().position(|bound| rtt * 1000.0 <= *bound).unwrap_or(BOUNDS.len())] += 1;
    }
    let most = counts.iter().copied().max().unwrap_or(0).max(1);
    page.push_str("<h2>Round trips of all ways</h2>\n<table>\n");
    for (index, count) in counts.iter().enumerate() {
        let label = match BOUNDS.get(index) {
            Some(bound) => format!("≤ {bound} ms"),
            None => format!("&gt; {} ms", BOUNDS[BOUNDS.len() - 1]),
        };
        let width = 300 * count / most;
        let _ = writeln!(
            page,
            "<tr><th>{label}<td>{count}<td><span class=bar style=\"width:{width}px\"></span></tr>"
        );
    }
    page.push_str("</table>\n");
}

/// How many nodes say that the way to this public address is bad.
fn blame(nodes: &[NodeAnswer]) -> HashMap<std::net::IpAddr, usize> {
    let mut blamed = HashMap::new();
    for entry in nodes.iter().flat_map(known).filter(|entry| Grade::of(entry) >= Grade::Bad) {
        if let Some(public) = entry.public {
            *blamed.entry(public).or_default() += 1;
        }
    }
    blamed
}

/// A node without an answer first, then by the bad ways from it and to it, then by those that lose something.
fn badness(node: &NodeAnswer, blamed: &HashMap<std::net::IpAddr, usize>) -> (bool, usize, usize) {
    let count = |grade: Grade| known(node).filter(|entry| Grade::of(entry) == grade).count();
    let own = node.answer.as_ref().ok().and_then(|(status, _)| status.node.as_ref());
    let public = own.map(|own| own.public.clone()).unwrap_or_else(|| vec![node.address]);
    let to = public.iter().filter_map(|public| blamed.get(public)).max().copied().unwrap_or_default();
    (node.answer.is_err(), count(Grade::Bad) + count(Grade::Skipped) + to, count(Grade::Lossy))
}
