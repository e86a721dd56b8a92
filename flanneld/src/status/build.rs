//! Puts the value together when somebody asks.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use backends::{Peer, PeerTraffic};
use ipnet::IpNet;
use subnet::lease::format_key;
use subnet::{Family, Lease, Subnets};

use super::board::{Board, Published};
use super::model::{
    CountedPeer, Host, NodeStatus, PeerCounts, PeerEntry, PeerHandshake, PeerList, Policy, ProbeStatus,
    SCHEMA,
};
use super::sessions::{self, Sessions};
use super::{host, look, probed};
use crate::probe::Report;
use crate::version;

/// Leases that can't be used, of which more are only counted.
const SKIPPED_LISTED: usize = 50;

/// How far to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Depth {
    /// What is known.
    Known,
    /// The kernel is read as well, and compared with the plan.
    Kernel,
}

/// Conditions of readiness with what is wrong with them.
type Conditions = BTreeMap<&'static str, Result<(), String>>;

/// The value now. May read files and the kernel, so it belongs onto a thread that may block.
pub(crate) fn build(
    board: &Board,
    alive: bool,
    conditions: Conditions,
    notes: BTreeMap<&'static str, Vec<String>>,
    policy: Option<Policy>,
    depth: Depth,
) -> NodeStatus {
    let published = board.published();
    let mut kernel = published.kernel.clone();
    kernel.desired = look::objects(&published.desired);
    if depth == Depth::Kernel && published.node.is_some() {
        look::report(&mut kernel, &published.desired, &published.scope);
    }
    let ready = conditions.values().all(Result::is_ok);
    let mut peers = counts(&published);
    // Of more peers than may have series none is named: each node would have series for each other.
    let few = published.usable <= board.max_series();
    let report = if few { board.probed() } else { board.probed_briefly() };
    let probes = report.map(|report| probes(&published, report, &mut peers));
    let at = seconds(SystemTime::now());
    let sessions = Sessions::read(board, &published, board.max_series(), at);
    NodeStatus {
        schema: SCHEMA,
        version: format!("v{}", version::VERSION),
        commit: version::commit().to_owned(),
        at,
        started: seconds(board.started()),
        alive,
        ready,
        ready_since: board.ready_since().map(seconds),
        conditions: conditions.into_iter().map(|(name, state)| (name.to_owned(), state.err())).collect(),
        notes: notes
            .into_iter()
            .filter(|(_, all)| !all.is_empty())
            .map(|(subject, all)| (subject.to_owned(), all))
            .collect(),
        node: published.node.clone(),
        store: published.store.clone(),
        peers,
        kernel,
        rules: published.rules.clone(),
        host: this_host(board, &published),
        pools: board.pools().of(published.own, &published.cni_directory),
        probes,
        traffic: named_traffic(board, &published, &sessions),
        handshakes: named_handshakes(&published, &sessions),
        wireguard: sessions.counts,
        cni: board.cni().report(),
        policy,
        fast_path: board.fast_path(),
        counters: published.counters.clone(),
        tunnel: board.tunnel(),
    }
}

/// What probes found of all peers, and how many nodes are in which state.
fn probes(published: &Published, report: Report, counts: &mut PeerCounts) -> ProbeStatus {
    let state = |subnet: IpNet| {
        let index = report.states.binary_search_by_key(&subnet, |(known, _)| *known).ok()?;
        Some(report.states[index].1)
    };
    let leases = || published.leases.iter().flat_map(|all| all.leases.values());
    probed::count(counts, leases().filter_map(|lease| lease.subnets.iter().filter_map(state).max()));
    probed::summary(&report, report.peers.iter().map(|peer| (name_of(published, peer.subnet), peer)))
}

/// The name of the node that has a subnet, or the subnet.
fn name_of(published: &Published, subnet: IpNet) -> String {
    let all = published.leases.as_deref();
    let lease = all
        .and_then(|all| all.leases.values().find(|lease| lease.subnets.iter().any(|known| known == subnet)));
    let name = all.zip(lease).and_then(|(all, lease)| all.names.get(&lease.subnets));
    name.map_or_else(|| subnet.to_string(), ToString::to_string)
}

/// Bytes of peers, if they are counted and there are no more usable peers than may have series.
fn traffic(board: &Board, published: &Published) -> BTreeMap<IpNet, PeerTraffic> {
    let few = published.usable <= board.max_series();
    let subnets = published.peers.usable.keys().copied().filter(|_| few).collect();
    board.traffic().of(&subnets)
}

/// The bytes of each peer: counted by nftables where that is asked for, else by those backends that count themselves.
fn named_traffic(board: &Board, published: &Published, sessions: &Sessions) -> Vec<CountedPeer> {
    let named = |subnet, received, transmitted| CountedPeer {
        peer: name_of(published, subnet),
        received,
        transmitted,
    };
    let counted = traffic(board, published);
    let mut all: Vec<CountedPeer> = if counted.is_empty() {
        let sealed =
            sessions.each.iter().map(|(subnet, session)| (*subnet, (session.received, session.sent)));
        let plain = sessions.udp.iter().map(|(subnet, bytes)| (*subnet, *bytes));
        sealed.chain(plain).map(|(subnet, (received, sent))| named(subnet, received, sent)).collect()
    } else {
        counted.into_iter().map(|(subnet, counted)| named(subnet, counted.received, counted.sent)).collect()
    };
    // A node with both families is one peer.
    all.sort_by(|one, other| one.peer.cmp(&other.peer));
    all.dedup_by(|next, kept| {
        let same = next.peer == kept.peer;
        if same {
            kept.received += next.received;
            kept.transmitted += next.transmitted;
        }
        same
    });
    all
}

/// The last handshake with each peer; of a peer with two tunnels the earlier one, because that is the one to look at.
fn named_handshakes(published: &Published, sessions: &Sessions) -> Vec<PeerHandshake> {
    let named = |(subnet, session): &(IpNet, backends::SessionReport)| {
        Some(PeerHandshake { peer: name_of(published, *subnet), at: session.handshake? })
    };
    let mut all: Vec<PeerHandshake> = sessions.each.iter().filter_map(named).collect();
    all.sort_by(|one, other| (&one.peer, one.at).cmp(&(&other.peer, other.at)));
    all.dedup_by(|next, kept| next.peer == kept.peer);
    all
}

fn this_host(board: &Board, published: &Published) -> Host {
    let checksums = board.look_at_checksums();
    let node = published.node.as_ref();
    let devices =
        node.into_iter().flat_map(|node| node.devices.iter().chain([&node.interface, &node.bridge]));
    let names: Vec<&str> = devices.map(String::as_str).filter(|name| !name.is_empty()).collect();
    Host {
        devices: host::devices(&names),
        checksum_errors: checksums.last,
        checksum_errors_new: checksums.since_start(),
        checksum_errors_at: checksums.grown.map(seconds),
        echo_requests: Some(host::echo_requests()),
        process: host::process(),
    }
}

fn counts(published: &Published) -> PeerCounts {
    let others = |leases: &subnet::Leases| {
        leases.leases.len() - usize::from(leases.leases.contains_key(&published.own))
    };
    let skipped = &published.peers.skipped;
    PeerCounts {
        known: published.leases.as_deref().map(others).unwrap_or_default(),
        usable: published.usable,
        programmed: published.programmed,
        skipped: published
            .peers
            .reasons
            .iter()
            .map(|(reason, count)| (reason.name().to_owned(), *count))
            .collect(),
        skipped_why: skipped
            .iter()
            .take(SKIPPED_LISTED)
            .map(|(key, why)| (key.clone(), why.clone()))
            .collect(),
        ..PeerCounts::default()
    }
}

/// All peers, each family by itself, in the order of their subnets.
pub(crate) fn peers(board: &Board) -> PeerList {
    let published = board.published();
    let (mut peers, now) = (Vec::new(), SystemTime::now());
    let found = board.probed().as_mut().map(probed::by_subnet).unwrap_or_default();
    let counted = traffic(board, &published);
    let sessions = Sessions::read(board, &published, usize::MAX, seconds(now));
    if let Some(all) = &published.leases {
        for lease in all.leases.values().filter(|lease| lease.subnets != published.own) {
            let name = all.names.get(&lease.subnets).map(|name| name.to_string());
            for subnet in lease.subnets.iter() {
                let used = published.peers.usable.get(&subnet);
                let mut entry = entry(&published, lease, subnet, name.clone(), used);
                if let Some(peer) = found.get(&subnet) {
                    probed::complete(&mut entry, peer, seconds(now));
                }
                let bytes = counted.get(&subnet).map(|bytes| (bytes.received, bytes.sent));
                let bytes = bytes.or_else(|| sessions.udp.get(&subnet).copied());
                entry.received_bytes = bytes.map(|bytes| bytes.0);
                entry.transmitted_bytes = bytes.map(|bytes| bytes.1);
                if let Some(session) = sessions.by_subnet.get(&subnet) {
                    sessions::complete(&mut entry, session, seconds(now));
                }
                peers.push(entry);
            }
        }
    }
    PeerList { schema: SCHEMA, at: seconds(now), peers }
}

fn entry(
    published: &Published,
    lease: &Lease,
    subnet: IpNet,
    name: Option<String>,
    used: Option<&Peer>,
) -> PeerEntry {
    let (state, way, why) = match used {
        Some(peer) => {
            let way =
                published.active.iter().find(|(id, _)| *id == peer.backend).map(|(_, words)| words.clone());
            let state = if published.unprogrammed.contains(&subnet) { "refused" } else { "programmed" };
            (state, way, None)
        }
        None => ("skipped", None, published.peers.skipped.get(&key_of(&lease.subnets)).cloned()),
    };
    PeerEntry {
        name,
        lease: key_of(&lease.subnets),
        subnet: subnet.to_string(),
        public: lease.public.get(Family::of(subnet.addr())),
        way,
        state: state.to_owned(),
        why,
        ..PeerEntry::default()
    }
}

fn key_of(subnets: &Subnets) -> String {
    format_key(subnets).unwrap_or_else(|| subnets.to_string())
}

/// A moment as seconds since 1970.
pub(crate) fn seconds(at: SystemTime) -> u64 {
    at.duration_since(UNIX_EPOCH).map(|since| since.as_secs()).unwrap_or_default()
}
