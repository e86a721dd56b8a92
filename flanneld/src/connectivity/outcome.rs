//! What a test of the way to a peer found, and what it means; pure.

use std::io;
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use serde::Serialize;
use serde_json::json;

use crate::show::milliseconds;
use crate::status::PeerList;

/// A peer to be tested.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct TestedPeer {
    /// The node's name, or its subnet.
    pub(super) name: String,
    pub(super) subnet: IpNet,
    /// Its public address.
    pub(super) underlay: IpAddr,
    /// Its tunnel's address; nothing without a tunnel.
    pub(super) tunnel: Option<IpAddr>,
    /// MTU of pods.
    pub(super) mtu: u16,
}

/// What a series of packets is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Test {
    /// From node to node.
    Underlay,
    /// The way of the pods, with packets of this length.
    Inside(u16),
}

/// Packets of one length to one address.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Series {
    pub(super) test: Test,
    pub(super) to: IpAddr,
    pub(super) size: u16,
    pub(super) sent: u32,
    pub(super) answered: u32,
    /// The kernel did not send so many, because they are longer than the device's MTU.
    pub(super) too_long: u32,
    /// Why others could not be sent.
    pub(super) error: Option<String>,
    rtt_sum_seconds: f64,
}

impl Series {
    pub(super) fn new(test: Test, to: IpAddr, size: u16) -> Self {
        Self { test, to, size, sent: 0, answered: 0, too_long: 0, error: None, rtt_sum_seconds: 0.0 }
    }

    pub(super) fn answered(&mut self, rtt: Duration) {
        self.answered += 1;
        self.rtt_sum_seconds += rtt.as_secs_f64();
    }

    pub(super) fn refused(&mut self, error: &io::Error) {
        const EMSGSIZE: i32 = 90;
        if error.raw_os_error() == Some(EMSGSIZE) {
            self.too_long += 1;
        } else {
            self.error = Some(error.to_string());
        }
    }

    fn is_whole(&self) -> bool {
        self.answered == self.sent
    }

    /// The mean round trip.
    fn rtt(&self) -> Option<f64> {
        (self.answered > 0).then(|| self.rtt_sum_seconds / f64::from(self.answered))
    }

    fn words(&self) -> String {
        match self.rtt() {
            Some(rtt) => format!("{}/{} {} ms", self.answered, self.sent, milliseconds(rtt)),
            None if self.too_long == self.sent => "too long".to_owned(),
            None => format!("0/{}", self.sent),
        }
    }
}

/// What the tests of one peer found.
#[derive(Clone, Debug, Serialize)]
pub(super) struct PeerOutcome {
    pub(super) peer: TestedPeer,
    pub(super) series: Vec<Series>,
    /// Time for a TCP connection to its agent, or why there is none.
    pub(super) tcp: Option<Result<Duration, String>>,
}

impl PeerOutcome {
    /// Where the agent of the peer is asked.
    pub(super) fn health(&self) -> IpAddr {
        self.peer.tunnel.unwrap_or(self.peer.underlay)
    }

    /// What is wrong, with the remedy.
    pub(super) fn trouble(&self) -> Option<String> {
        let TestedPeer { underlay, mtu, .. } = self.peer;
        let of = |test: Test| self.series.iter().find(|series| series.test == test);
        let below = of(Test::Underlay)?;
        // What is longer than the MTU need not pass.
        let mut inside =
            self.series.iter().filter(|series| matches!(series.test, Test::Inside(size) if size <= mtu));
        let bad = inside.find(|series| !series.is_whole())?;
        let Series { answered, sent, size, .. } = bad;
        let lost = sent - answered;
        if let Some(error) = &bad.error {
            return Some(format!("packets to {} can't be sent: {error}", bad.to));
        }
        if bad.too_long > 0 {
            return Some(format!(
                "packets of {size} bytes are longer than this host's device to {} allows, though pods may send {mtu}: \
                 see ip link for a device whose MTU another program has changed",
                bad.to
            ));
        }
        let short = self
            .series
            .iter()
            .any(|series| series.test != Test::Underlay && series.size < *size && series.is_whole());
        Some(match (below.answered, answered) {
            (0, 0) => {
                format!("{underlay} answers neither itself nor {}: the node or the network is down", bad.to)
            }
            (_, 0) if short => format!(
                "packets of {size} bytes are lost, shorter ones arrive: raise the MTU of what is between the nodes, or lower \
                 Backend.MTU"
            ),
            (_, 0) => format!(
                "{underlay} answers, {} does not: the tunnel's port is dropped between the nodes; allow it both ways",
                bad.to
            ),
            _ if !below.is_whole() => format!(
                "{lost} of {sent} packets are lost, and {} of {} between the nodes themselves: look at network cards and \
                 switches",
                below.sent - below.answered,
                below.sent
            ),
            _ => format!(
                "{lost} of {sent} packets of {size} bytes are lost in the tunnel, none between the nodes"
            ),
        })
    }
}

/// The peers in the agent's answer to `/peers`; those that it can't use are left out.
///
/// # Errors
/// When the agent does not probe, and so does not say how peers are reached.
pub(super) fn peers(list: PeerList) -> anyhow::Result<Vec<TestedPeer>> {
    let (all, mut found) = (list.peers.len(), Vec::new());
    for entry in list.peers {
        let Some(probe) = entry.probe else { continue };
        found.push(TestedPeer {
            name: entry.name.unwrap_or_else(|| probe.subnet.to_string()),
            subnet: probe.subnet,
            underlay: probe.underlay_address,
            tunnel: probe.is_tunnelled().then_some(probe.tunnel_address),
            mtu: probe.mtu,
        });
    }
    anyhow::ensure!(
        !found.is_empty() || all == 0,
        "the agent of this node does not probe its peers, so it does not say how to reach them: start it without \
         --probe-interval=0, and with the capability NET_RAW"
    );
    Ok(found)
}

/// All outcomes as a table, those with trouble first, and a line at the end.
pub(super) fn table(outcomes: &[PeerOutcome], took: Duration) -> String {
    let mut rows: Vec<(Vec<String>, Option<String>)> = Vec::new();
    let mut sorted: Vec<&PeerOutcome> = outcomes.iter().collect();
    sorted.sort_by_key(|outcome| outcome.trouble().is_none());
    for outcome in sorted {
        let tcp = match &outcome.tcp {
            Some(Ok(time)) => format!("{} ms", milliseconds(time.as_secs_f64())),
            Some(Err(why)) => why.clone(),
            None => "–".to_owned(),
        };
        let mut row = vec![crate::text::clean(&outcome.peer.name, 60)];
        row.extend(outcome.series.iter().map(|series| match series.test {
            Test::Underlay => format!("node {}", series.words()),
            Test::Inside(size) => format!("{size}: {}", series.words()),
        }));
        row.push(format!("tcp {tcp}"));
        rows.push((row, outcome.trouble()));
    }
    let columns = rows.iter().map(|(row, _)| row.len()).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|(row, _)| row.get(column)).map(|cell| cell.chars().count()).max()
    };
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for (row, trouble) in &rows {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        text += &format!("{} {}\n", if trouble.is_some() { "✘" } else { "✔" }, cells.join("  ").trim_end());
        text.extend(trouble.iter().map(|trouble| format!("    {trouble}\n")));
    }
    let bad = rows.iter().filter(|(_, trouble)| trouble.is_some()).count();
    text + &format!(
        "{}: {} ok, {bad} with trouble, {:.1} s\n",
        ways(rows.len()),
        rows.len() - bad,
        took.as_secs_f64()
    )
}

/// Each family of a peer is a way of its own.
pub(super) fn ways(count: usize) -> String {
    if count == 1 { "1 way".to_owned() } else { format!("{count} ways") }
}

/// All outcomes as JSON.
pub(super) fn json(outcomes: &[PeerOutcome], took: Duration) -> serde_json::Result<String> {
    let peers: Vec<_> = outcomes
        .iter()
        .map(|outcome| {
            json!({ "peer": outcome.peer, "trouble": outcome.trouble(), "series": outcome.series,
            "tcp_seconds": outcome.tcp.as_ref().and_then(|tcp| tcp.as_ref().ok()).map(Duration::as_secs_f64),
            "tcp_error": outcome.tcp.as_ref().and_then(|tcp| tcp.as_ref().err()) })
        })
        .collect();
    serde_json::to_string_pretty(&json!({ "schema": 1, "seconds": took.as_secs_f64(), "peers": peers }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(series: &[(Test, u32, u32)]) -> PeerOutcome {
        let peer = TestedPeer {
            name: "a7".to_owned(),
            subnet: "10.244.7.0/24".parse().unwrap(),
            underlay: "192.0.2.7".parse().unwrap(),
            tunnel: Some("10.244.7.0".parse().unwrap()),
            mtu: 1450,
        };
        let series = series.iter().map(|(test, answered, too_long)| {
            let (to, size) = match test {
                Test::Underlay => (peer.underlay, 64),
                Test::Inside(size) => (peer.tunnel.unwrap(), *size),
            };
            Series { sent: 20, answered: *answered, too_long: *too_long, ..Series::new(*test, to, size) }
        });
        PeerOutcome { series: series.collect(), peer, tcp: None }
    }

    #[test]
    fn trouble_is_told_apart() {
        use Test::{Inside, Underlay};
        for (series, part) in [
            (
                &[(Underlay, 20, 0), (Inside(64), 20, 0), (Inside(1450), 20, 0), (Inside(1451), 0, 20)][..],
                None,
            ),
            (&[(Underlay, 0, 0), (Inside(64), 20, 0), (Inside(1450), 20, 0)], None),
            (&[(Underlay, 20, 0), (Inside(64), 0, 0), (Inside(1450), 0, 0)], Some("port is dropped")),
            (&[(Underlay, 0, 0), (Inside(64), 0, 0), (Inside(1450), 0, 0)], Some("down")),
            (&[(Underlay, 20, 0), (Inside(64), 20, 0), (Inside(1450), 0, 0)], Some("shorter ones arrive")),
            (&[(Underlay, 20, 0), (Inside(64), 20, 0), (Inside(1450), 0, 20)], Some("device")),
            (
                &[(Underlay, 12, 0), (Inside(64), 12, 0), (Inside(1450), 12, 0)],
                Some("between the nodes themselves"),
            ),
            (
                &[(Underlay, 20, 0), (Inside(64), 12, 0), (Inside(1450), 12, 0)],
                Some("in the tunnel, none between"),
            ),
        ] {
            let trouble = outcome(series).trouble();
            match part {
                None => assert_eq!(trouble, None, "{series:?}"),
                Some(part) => {
                    assert!(trouble.as_ref().is_some_and(|text| text.contains(part)), "{trouble:?}")
                }
            }
        }
    }

    #[test]
    fn the_table_has_trouble_first_and_a_sum_last() {
        use Test::{Inside, Underlay};
        let fine = outcome(&[(Underlay, 20, 0), (Inside(64), 20, 0)]);
        let bad = outcome(&[(Underlay, 20, 0), (Inside(64), 0, 0)]);
        let text = table(&[fine, bad], Duration::from_millis(6200));
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].starts_with("✘ a7  node 20/20 0.01 ms  64: 0/20"), "{text}");
        assert!(lines[2].starts_with("✔ a7"), "{text}");
        assert_eq!(lines[3], "2 ways: 1 ok, 1 with trouble, 6.2 s");
    }

    #[test]
    fn only_peers_that_can_be_reached_are_tested() {
        let path = r#"{"state":"reachable","sent":1,"lost":0,"loss":0.0,"rtt_seconds":0.001,"failing_seconds":null}"#;
        let probe = format!(
            r#"{{"subnet":"10.244.7.0/24","underlay_address":"192.0.2.7","tunnel_address":"10.244.7.0","way":"vxlan",
            "state":"reachable","state_seconds":1.0,"verdict":"fine","cause":null,"remedy":null,"underlay":{path},
            "tunnel":{path},"mtu":1450,"path_mtu":null}}"#
        );
        let list = |probe: &str| -> PeerList {
            let text = format!(
                r#"{{"schema":1,"peers":[{{"name":"a7","subnet":"10.244.7.0/24","probe":{probe}}},
                {{"name":null,"subnet":"10.244.8.0/24","state":"skipped","probe":null}}]}}"#
            );
            serde_json::from_str(&text).unwrap()
        };
        let found = peers(list(&probe)).unwrap();
        assert_eq!((found.len(), found[0].name.as_str(), found[0].mtu), (1, "a7", 1450));
        assert_eq!(found[0].tunnel, Some("10.244.7.0".parse().unwrap()));
        assert!(peers(list("null")).unwrap_err().to_string().contains("does not probe"));
        assert_eq!(peers(PeerList::default()).unwrap(), []);
    }
}
