//! The ways between nodes as a matrix: rows ask, columns answer.

use std::collections::HashMap;
use std::fmt::Write as _;

use super::active;
use super::html::{escaped, name_of};
use crate::show::all::NodeAnswer;
use crate::status::PeerEntry;

/// Of more nodes than this, the matrix has those with the worst ways, and a histogram has all ways.
const MAX_NODES: usize = 100;
/// More columns than this are narrow.
const MAX_WIDE: usize = 24;
/// Upper bounds of the classes of round trips in the histogram, in milliseconds.
const BOUNDS: [f64; 7] = [0.25, 0.5, 1.0, 2.5, 5.0, 25.0, 100.0];
/// Less loss than this is no trouble: one probe of 300.
const MIN_LOSS: f64 = 0.01;

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

    fn class(self) -> char {
        match self {
            Self::Good => 'g',
            Self::Lossy => 'l',
            Self::Bad | Self::Skipped => 'b',
            Self::Unknown => 'n',
        }
    }
}

/// Writes the matrix, or why there is none.
pub(super) fn write(page: &mut String, nodes: &[NodeAnswer]) {
    if !nodes.iter().flat_map(active).any(|entry| entry.loss.is_some()) {
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
        let known = by_key(from);
        let _ = write!(page, "<tr><th scope=row>{}", name_of(&from.name));
        for (to, keys) in shown.iter().zip(&keys) {
            if std::ptr::eq(*from, *to) {
                page.push_str("<td>·");
                continue;
            }
            let active = keys.iter().filter_map(|key| known.get(key.as_str()).copied());
            match active.max_by_key(|entry| Grade::of(entry)) {
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

/// By what others know a node: its subnets, or where it should answer if it does not.
fn keys(node: &NodeAnswer) -> Vec<String> {
    match &node.answer {
        Ok((status, _)) => status.node.as_ref().map(|own| own.subnets.clone()).unwrap_or_default(),
        Err(_) => vec![node.address.to_string()],
    }
}

fn by_key(node: &NodeAnswer) -> HashMap<String, &PeerEntry> {
    let mut known = HashMap::new();
    for entry in active(node) {
        if let Some(public) = entry.public {
            known.insert(public.to_string(), entry);
        }
        known.insert(entry.subnet.clone(), entry);
    }
    known
}

fn cell(page: &mut String, from: &str, to: &str, entry: &PeerEntry) {
    let grade = Grade::of(entry);
    let rtt = entry.rtt_seconds.map(|rtt| milliseconds(rtt * 1000.0));
    let loss = entry.loss.filter(|loss| *loss >= MIN_LOSS).map(|loss| format!("{:.0}%", loss * 100.0));
    let text = match grade {
        Grade::Good => rtt.unwrap_or_else(|| "✔".to_owned()),
        Grade::Lossy => format!("! {}", loss.or(rtt).unwrap_or_default()),
        Grade::Bad => "✘".to_owned(),
        Grade::Skipped => "–".to_owned(),
        Grade::Unknown => "?".to_owned(),
    };
    let class = grade.class();
    if grade == Grade::Good {
        let _ = write!(page, "<td class={class}>{text}");
        return;
    }
    let why = entry.cause.as_deref().or(entry.why.as_deref()).unwrap_or_default();
    let title = escaped(&format!("{from} → {to}: {} {why}", entry.state));
    let _ = write!(page, "<td class={class} title=\"{title}\">{}", text.trim_end());
}

/// In as few characters as say something.
fn milliseconds(value: f64) -> String {
    match value {
        ..0.095 => format!("{value:.2}"),
        0.095..9.95 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

/// How many ways have which round trip.
fn histogram(page: &mut String, nodes: &[NodeAnswer]) {
    let mut counts = [0usize; BOUNDS.len() + 1];
    for rtt in nodes.iter().flat_map(active).filter_map(|entry| entry.rtt_seconds) {
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
    for entry in nodes.iter().flat_map(active).filter(|entry| Grade::of(entry) >= Grade::Bad) {
        if let Some(public) = entry.public {
            *blamed.entry(public).or_default() += 1;
        }
    }
    blamed
}

/// A node without an answer first, then by the bad ways from it and to it, then by those that lose something.
fn badness(node: &NodeAnswer, blamed: &HashMap<std::net::IpAddr, usize>) -> (bool, usize, usize) {
    let count = |grade: Grade| active(node).filter(|entry| Grade::of(entry) == grade).count();
    let own = node.answer.as_ref().ok().and_then(|(status, _)| status.node.as_ref());
    let public = own.map(|own| own.public.clone()).unwrap_or_else(|| vec![node.address]);
    let to = public.iter().filter_map(|public| blamed.get(public)).max().copied().unwrap_or_default();
    (node.answer.is_err(), count(Grade::Bad) + count(Grade::Skipped) + to, count(Grade::Lossy))
}
