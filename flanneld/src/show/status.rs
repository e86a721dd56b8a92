//! `flanneld status`: how a node, its peers, or all nodes stand.

use std::io::Write;
use std::net::SocketAddr;
use std::time::{Duration, UNIX_EPOCH};

use super::answers::{self, NodeAnswer};
use super::{Style, TextTable, Tone, milliseconds, span};
use crate::ask;
use crate::log::moment;
use crate::status::{NodeStatus, PeerEntry, PeerList};
use crate::text::clean;

/// Of more notes than this, the first are shown.
const MAX_NOTES: usize = 16;

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StatusExtent {
    Node,
    Peers,
    All,
}

/// What `status` runs with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StatusOptions {
    pub(crate) extent: StatusExtent,
    pub(crate) json: bool,
    /// Where the agent of this node serves health.
    pub(crate) at: SocketAddr,
}

/// Asks, and prints.
///
/// # Errors
/// A sentence, when the agent of this node does not answer.
pub(crate) fn run(options: &StatusOptions) -> anyhow::Result<()> {
    let text = match options.extent {
        StatusExtent::Node if options.json => {
            String::from_utf8_lossy(&ask(options, "/status?look")?).into_owned() + "\n"
        }
        StatusExtent::Peers if options.json => {
            String::from_utf8_lossy(&ask(options, "/peers")?).into_owned() + "\n"
        }
        StatusExtent::Node => node(&value(options, "/status?look")?, Style::of_stdout()),
        StatusExtent::Peers => {
            let list: PeerList = value(options, "/peers")?;
            peers(list.peers, list.at, Style::of_stdout())
        }
        StatusExtent::All => super::all::text(&ask_all(options.at)?, options.json, Style::of_stdout()),
    };
    crate::output::stdout().write_all(text.as_bytes())?;
    Ok(())
}

/// What every node answers, this one first.
///
/// # Errors
/// A sentence, when the agent of this node does not answer.
pub(super) fn ask_all(at: SocketAddr) -> anyhow::Result<Vec<NodeAnswer>> {
    let status = ask::value(at, "/status").map_err(unanswered)?;
    let list = ask::value(at, "/peers").map_err(unanswered)?;
    Ok(answers::ask(at, &status, &list))
}

fn ask(options: &StatusOptions, path: &str) -> anyhow::Result<Vec<u8>> {
    ask::text(options.at, path).map_err(unanswered)
}

fn value<T: serde::de::DeserializeOwned>(options: &StatusOptions, path: &str) -> anyhow::Result<T> {
    ask::value(options.at, path).map_err(unanswered)
}

fn unanswered(why: String) -> anyhow::Error {
    anyhow::anyhow!(
        "{why}: is flanneld running on this node, and with this --healthz-port? flanneld doctor looks further"
    )
}

/// How one node stands.
fn node(status: &NodeStatus, style: Style) -> String {
    let mut text = headline(status, style);
    for (word, tone, line) in [store(status), peers_line(status), kernel(status), rules(status), pods(status)]
    {
        text += &style.paint(tone, &format!("{word:<9}{line}"));
        text.push('\n');
    }
    let unmet = status.conditions.iter().filter_map(|(name, why)| Some((name, why.as_ref()?)));
    for (name, why) in unmet {
        text += &style.paint(Tone::Bad, &format!("✘ {name}: {}", clean(why, 1000)));
        text.push('\n');
    }
    let notes: Vec<&String> = status.notes.values().flatten().collect();
    for note in notes.iter().take(MAX_NOTES) {
        text += &format!("! {}\n", clean(note, 1000));
    }
    if notes.len() > MAX_NOTES {
        text += &format!("! and {} more: flanneld status --json\n", notes.len() - MAX_NOTES);
    }
    text
}

fn headline(status: &NodeStatus, style: Style) -> String {
    let Some(node) = &status.node else {
        return style.paint(Tone::Bad, "this node has no lease and no interface yet") + "\n";
    };
    let name = node.name.as_deref().map(|name| format!("node {} · ", clean(name, 253))).unwrap_or_default();
    let former =
        if node.former.is_empty() { String::new() } else { format!(" and still {}", node.former.join(", ")) };
    let public = node.public.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
    let ready = match (status.ready, status.ready_since) {
        (true, Some(since)) => {
            style.paint(Tone::Good, &format!("ready {}", span(status.at.saturating_sub(since))))
        }
        (true, None) => style.paint(Tone::Good, "ready"),
        (false, _) => style.paint(Tone::Bad, "not ready"),
    };
    let fallback = if node.fallback { " (fallback)" } else { "" };
    format!(
        "{name}{} · {}{fallback}{former} · mtu {} · {} {public} · {ready}\n",
        node.subnets.join(" "),
        node.backend,
        node.mtu,
        node.interface,
    )
}

type Line = (&'static str, Tone, String);

fn store(status: &NodeStatus) -> Line {
    let store = &status.store;
    let answer = store
        .last_answer
        .map(|at| format!(", last answer {} ago", span(status.at.saturating_sub(at))))
        .unwrap_or_default();
    let lease = match store.lease_ends {
        Some(ends) => format!(", lease until {}", moment(UNIX_EPOCH + Duration::from_secs(ends))),
        None => String::new(),
    };
    let name = clean(&store.name, 200);
    match (store.trouble.as_ref().or(store.lease_trouble.as_ref()), store.connected) {
        (Some(why), _) => ("store", Tone::Bad, format!("{name}: {}{answer}{lease}", clean(why, 500))),
        (None, true) => ("store", Tone::Plain, format!("{name} connected{answer}{lease}")),
        (None, false) => ("store", Tone::Unsure, format!("{name} has not answered yet{lease}")),
    }
}

fn peers_line(status: &NodeStatus) -> Line {
    let peers = &status.peers;
    let mut line = format!("{} known, {} programmed", peers.known, peers.programmed);
    let probed =
        [(peers.reachable, "reachable"), (peers.degraded, "degraded"), (peers.unreachable, "unreachable")];
    let probed: Vec<String> =
        probed.into_iter().filter_map(|(count, word)| Some(format!("{} {word}", count?))).collect();
    if !probed.is_empty() {
        line += &format!("; {}", probed.join(", "));
    }
    let failing = status.wireguard.map_or(0, |sessions| sessions.failing);
    if failing > 0 {
        line += &format!("; {failing} do not answer handshakes of WireGuard");
    }
    let skipped: usize = peers.skipped.values().sum();
    if skipped > 0 {
        let why = peers.skipped.iter().map(|(reason, count)| format!("{count} {reason}")).collect::<Vec<_>>();
        line += &format!("; skipped: {}", why.join(", "));
    }
    let bad = peers.programmed < peers.usable || peers.unreachable.unwrap_or_default() > 0 || failing > 0;
    let unsure = skipped > 0 || peers.degraded.unwrap_or_default() > 0;
    let tone = if bad {
        Tone::Bad
    } else if unsure {
        Tone::Unsure
    } else {
        Tone::Plain
    };
    ("peers", tone, line)
}

fn kernel(status: &NodeStatus) -> Line {
    let kernel = &status.kernel;
    let differing: usize = kernel.differing.iter().flatten().map(|(_, count)| count).sum();
    let repair = status.counters.last_repair.as_ref().map(|repair| {
        let at = moment(UNIX_EPOCH + Duration::from_secs(repair.at));
        format!("; last repair {at}: {} (another program had undone it)", clean(&repair.what, 120))
    });
    let repair = repair.unwrap_or_default();
    let first =
        |all: &[String]| all.first().map(|text| format!(": {}", clean(text, 200))).unwrap_or_default();
    if !kernel.fights.is_empty() {
        return (
            "kernel",
            Tone::Bad,
            format!("{} changes are fought over{}", kernel.fights.len(), first(&kernel.fights)),
        );
    }
    if !kernel.refused.is_empty() {
        return (
            "kernel",
            Tone::Bad,
            format!("{} changes are refused{}", kernel.refused.len(), first(&kernel.refused)),
        );
    }
    match (kernel.seen, differing) {
        (None, _) => ("kernel", Tone::Unsure, "not looked at yet".to_owned()),
        (_, 0) => ("kernel", Tone::Plain, format!("as desired{repair}")),
        (_, many) => {
            ("kernel", Tone::Unsure, format!("{many} objects differ{}{repair}", first(&kernel.changes)))
        }
    }
}

fn rules(status: &NodeStatus) -> Line {
    let rules = &status.rules;
    let dropping = match rules.dropping_chains {
        0 => String::new(),
        1 => "; a chain of another program drops, a way through is open".to_owned(),
        many => format!("; {many} chains of other programs drop, ways through are open"),
    };
    match (&rules.failed, rules.obstacles.first(), rules.sound) {
        (Some(why), ..) => ("rules", Tone::Bad, format!("{}: {}", rules.mode, clean(why, 500))),
        (None, Some(obstacle), _) => {
            ("rules", Tone::Bad, format!("{}: {}", rules.mode, clean(obstacle, 500)))
        }
        (None, None, Some(_)) => ("rules", Tone::Plain, format!("{}, whole{dropping}", rules.mode)),
        (None, None, None) => ("rules", Tone::Unsure, format!("{}, not made yet", rules.mode)),
    }
}

fn pods(status: &NodeStatus) -> Line {
    let mut tone = Tone::Plain;
    let of_pool = |pool: &crate::status::Pool| {
        let leaked = pool.leaked.filter(|leaked| *leaked > 0);
        if leaked.is_some() || pool.used * 10 >= pool.size.saturating_mul(9) {
            tone = Tone::Unsure;
        }
        let leaked = leaked.map(|leaked| format!(", {leaked} leaked")).unwrap_or_default();
        let size = if pool.size > 1 << 32 { String::new() } else { format!(" of {}", pool.size) };
        format!("{}{size} addresses{leaked}", pool.used)
    };
    let pools: Vec<String> = status.pools.iter().map(of_pool).collect();
    let policy = match &status.policy {
        Some(policy) => format!(
            "; {} network policies, {} addresses isolated",
            policy.policies, policy.isolated_addresses
        ),
        None => String::new(),
    };
    let fast_path = match status.fast_path {
        Some(devices) => format!("; fast path over {devices} devices"),
        None => String::new(),
    };
    let text = if pools.is_empty() { "no pool yet".to_owned() } else { pools.join("; ") };
    ("pods", tone, text + &policy + &fast_path)
}

/// How bad a state is: the worst first.
fn rank(entry: &PeerEntry) -> (u8, i64) {
    let state = match entry.state.as_str() {
        "unreachable" => 0,
        "refused" => 1,
        "degraded" => 2,
        "skipped" => 3,
        _ => 4,
    };
    (state, -(entry.loss.unwrap_or_default() * 1e6) as i64)
}

/// The peers, the worst first.
fn peers(mut all: Vec<PeerEntry>, now: u64, style: Style) -> String {
    all.sort_by_key(rank);
    // Only where some are reached by WireGuard.
    let handshakes = all.iter().any(PeerEntry::is_encrypted);
    let mut headings = vec!["PEER", "SUBNET", "ADDRESS", "WAY", "LOSS", "RTT", "MTU"];
    headings.extend(handshakes.then_some("HANDSHAKE"));
    headings.push("STATE");
    let mut table = TextTable::new(&headings);
    for entry in &all {
        let dash = || "-".to_owned();
        let since = entry.since.map(|at| format!(" {}", span(now.saturating_sub(at)))).unwrap_or_default();
        let why = entry.why.as_deref().map(|why| format!(": {why}")).unwrap_or_default();
        let tone = match rank(entry).0 {
            0 | 1 => Tone::Bad,
            2 | 3 => Tone::Unsure,
            _ => Tone::Plain,
        };
        let mut cells = vec![
            entry.name.clone().unwrap_or_else(dash),
            entry.subnet.clone(),
            entry.public.map_or_else(dash, |addr| addr.to_string()),
            entry.way.clone().unwrap_or_else(dash),
            entry.loss.map_or_else(dash, |loss| format!("{:.0}%", loss * 100.0)),
            entry.rtt_seconds.map_or_else(dash, |rtt| format!("{}ms", milliseconds(rtt))),
            entry.path_mtu.map_or_else(dash, |mtu| mtu.to_string()),
        ];
        cells.extend(handshakes.then(|| match entry.handshake {
            Some(at) => format!("{} ago", span(now.saturating_sub(at))),
            None if entry.is_encrypted() => "never".to_owned(),
            None => dash(),
        }));
        cells.push(format!("{}{since}{why}", entry.state));
        table.row(tone, cells);
    }
    table.text(style)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::model::{PeerCounts, SessionCounts};
    use crate::status::{KernelStatus, Node, Pool, Repair, RulesStatus, Store};

    fn status() -> NodeStatus {
        let day = 86_400;
        NodeStatus {
            at: 10 * day,
            ready: true,
            ready_since: Some(7 * day - 4 * 3600),
            node: Some(Node {
                name: Some("a1".into()),
                subnets: vec!["10.244.1.0/24".into()],
                backend: "vxlan VNI 1 port 8472".into(),
                mtu: 1450,
                interface: "eth0".into(),
                public: vec!["192.0.2.1".parse().unwrap()],
                ..Node::default()
            }),
            store: Store {
                name: "etcd".into(),
                connected: true,
                last_answer: Some(10 * day - 2),
                lease_ends: Some(11 * day),
                ..Store::default()
            },
            peers: PeerCounts { known: 41, usable: 41, programmed: 41, ..PeerCounts::default() },
            kernel: KernelStatus { seen: Some(1), settled: true, ..KernelStatus::default() },
            rules: RulesStatus {
                mode: "nftables".into(),
                sound: Some(1),
                dropping_chains: 1,
                ..RulesStatus::default()
            },
            pools: vec![Pool { size: 253, used: 83, leaked: Some(2), ..Pool::default() }],
            ..NodeStatus::default()
        }
    }

    #[test]
    fn one_look_says_how_a_node_is() {
        assert_eq!(
            node(&status(), Style::PLAIN),
            "node a1 · 10.244.1.0/24 · vxlan VNI 1 port 8472 · mtu 1450 · eth0 192.0.2.1 · ready 3d04h\n\
             store    etcd connected, last answer 2s ago, lease until 01-12 00:00:00 UTC\n\
             peers    41 known, 41 programmed\n\
             kernel   as desired\n\
             rules    nftables, whole; a chain of another program drops, a way through is open\n\
             pods     83 of 253 addresses, 2 leaked\n"
        );
    }

    #[test]
    fn what_is_wrong_is_in_its_line_with_the_reason() {
        let mut status = status();
        status.ready = false;
        status.store.trouble = Some("etcd does not answer".into());
        status.peers.programmed = 40;
        status.peers.skipped = [("backend".to_owned(), 2)].into();
        status.kernel.fights = vec!["\"link set flannel.1 up\" was needed".into()];
        status.rules.obstacles = vec!["chain FORWARD ends packets".into()];
        status.conditions.insert("lease".into(), Some("taken by \u{1b}[31m192.0.2.9".into()));
        status.notes.insert("surroundings".into(), vec!["a note".into()]);
        status.counters.last_repair = Some(Repair { at: 0, what: "route".into() });
        let text = node(&status, Style::PLAIN);
        for part in [
            "not ready",
            "etcd does not answer",
            "41 known, 40 programmed; skipped: 2 backend",
            "1 changes are fought over: \"link set flannel.1 up\"",
            "chain FORWARD ends packets",
            "✘ lease: taken by ·[31m192.0.2.9",
            "! a note",
        ] {
            assert!(text.contains(part), "{part} in\n{text}");
        }
        assert!(node(&NodeStatus::default(), Style::PLAIN).starts_with("this node has no lease"));
    }

    #[test]
    fn the_worst_peers_come_first() {
        let entry = |state: &str, loss| PeerEntry {
            name: Some(format!("n-{state}")),
            state: state.to_owned(),
            loss,
            ..PeerEntry::default()
        };
        let all = vec![
            entry("programmed", None),
            entry("degraded", Some(0.12)),
            entry("skipped", None),
            entry("unreachable", Some(1.0)),
        ];
        let text = peers(all, 0, Style::PLAIN);
        let order: Vec<&str> = text.lines().skip(1).map(|line| line.split(' ').next().unwrap()).collect();
        assert_eq!(order, ["n-unreachable", "n-degraded", "n-skipped", "n-programmed"]);
        assert!(text.contains("12%") && !text.contains("HANDSHAKE"), "{text}");
    }

    #[test]
    fn peers_of_wireguard_have_the_age_of_their_last_handshake() {
        let entry = |way: &str, handshake| PeerEntry {
            way: Some(way.to_owned()),
            handshake,
            state: "programmed".into(),
            ..PeerEntry::default()
        };
        let all = vec![entry("wireguard", Some(88)), entry("wireguard", None), entry("vxlan VNI 1", None)];
        let text = peers(all, 100, Style::PLAIN);
        let column = |line: &str| line.split_whitespace().rev().nth(1).unwrap().to_owned();
        let cells: Vec<String> = text.lines().map(column).collect();
        assert_eq!(cells, ["HANDSHAKE", "ago", "never", "-"], "{text}");
        assert!(text.contains("12s ago"), "{text}");
        let status = NodeStatus {
            wireguard: Some(SessionCounts { current: 1, failing: 2, ..SessionCounts::default() }),
            ..status()
        };
        assert!(node(&status, Style::PLAIN).contains("; 2 do not answer handshakes of WireGuard"));
    }
}
