//! What tunnels count for their peers, read when somebody asks: sessions of WireGuard, of the datapath in this process or of
//! the kernel's module, and bytes of `udp`.

use std::collections::BTreeMap;

use backends::{HandshakeFault, SessionReport, SessionState};
use ipnet::IpNet;

use super::board::{Board, Published};
use super::model::{PeerEntry, SessionCounts};
use crate::probe::Verdict;

/// The sessions at one moment.
#[derive(Default)]
pub(super) struct Sessions {
    /// By the pod subnets of each peer.
    pub(super) by_subnet: BTreeMap<IpNet, SessionReport>,
    /// Each session once, by the first of these subnets.
    pub(super) each: Vec<(IpNet, SessionReport)>,
    /// Bytes from and to the peers of `udp`, by subnet.
    pub(super) udp: BTreeMap<IpNet, (u64, u64)>,
    /// How many peers are in which state; nothing without WireGuard.
    pub(super) counts: Option<SessionCounts>,
}

impl Sessions {
    /// Reads them at `now`, in seconds since 1970. Single peers are kept only if there are few enough for `limit`.
    pub(super) fn read(board: &Board, published: &Published, limit: usize, now: u64) -> Self {
        let mut sessions = Self::default();
        let keep = published.usable <= limit;
        if let Some(tunnels) = board.tunnels().filter(|_| keep) {
            tunnels.bytes(|subnet, received, sent| {
                sessions.udp.insert(subnet, (received, sent));
            });
        }
        let mut take = |subnets: &[IpNet], report| sessions.take(subnets, report, keep, now);
        board.tunnels().iter().for_each(|tunnels| tunnels.sessions(&mut take));
        if let Err(error) = backends::wireguard_sessions(&published.desired, take) {
            tracing::debug!(%error, "the sessions of WireGuard can't be read");
        }
        sessions
    }

    fn take(&mut self, subnets: &[IpNet], report: SessionReport, keep: bool, now: u64) {
        let counts = self.counts.get_or_insert_default();
        match report.state(now) {
            SessionState::Current => counts.current += 1,
            SessionState::Idle => counts.idle += 1,
            SessionState::Failing => counts.failing += 1,
        }
        if keep {
            self.by_subnet.extend(subnets.iter().map(|subnet| (*subnet, report)));
            self.each.extend(subnets.first().map(|first| (*first, report)));
        }
    }
}

/// Adds what is known of the session with a peer at `now`. Where it says more than probes do about why nothing arrives, it
/// replaces their cause.
pub(super) fn complete(entry: &mut PeerEntry, report: &SessionReport, now: u64) {
    // A peer that announces another backend by now is reached by that.
    if !entry.is_encrypted() {
        return;
    }
    entry.handshake = report.handshake;
    entry.received_bytes.get_or_insert(report.received);
    entry.transmitted_bytes.get_or_insert(report.sent);
    let (Some(public), Some(endpoint)) = (entry.public, report.endpoint) else { return };
    let carrier = format!("UDP port {}", endpoint.port());
    let verdict = entry.probe.as_ref().map(|probe| probe.verdict);
    let age = report.handshake.map(|at| now.saturating_sub(at));
    let failing = entry.probe.as_ref().and_then(|probe| probe.tunnel.failing_seconds);
    // Evidence that the port is open is only a handshake after the last answer.
    let since_then = age.zip(failing).is_some_and(|(age, failing)| (age as f64) < failing);
    let (cause, remedy) = match (report.state(now), report.fault, verdict) {
        (SessionState::Failing, Some(fault), _) => faulty(fault, public),
        (SessionState::Current, _, Some(Verdict::PortBlocked)) if since_then => {
            let age = age.unwrap_or_default();
            (
                format!(
                    "handshakes of WireGuard with {public} succeed (the last one {age} s ago), so {carrier} is open and the keys \
                     agree, but {} does not answer: {public} drops what comes out of the tunnel",
                    entry.subnet
                ),
                format!(
                    "on {public}, look for rules that drop packets of its tunnel device: flanneld doctor names them"
                ),
            )
        }
        // Without probes nothing else tells of it; with them, the underlay may be what is down.
        (_, _, Some(Verdict::PortBlocked)) | (SessionState::Failing, _, None) => {
            let answers = if verdict.is_some() { format!("{public} answers, but ") } else { String::new() };
            let since = age.map(|age| format!(" for {age} s")).unwrap_or_default();
            (
                format!(
                    "{answers}no handshake of WireGuard with {public} has succeeded{since}: {carrier} is dropped between the \
                     nodes, or the keys differ"
                ),
                format!(
                    "allow {carrier} both ways between this node and {public} (cloud security group, firewall of either host); \
                     on {public}, see that flanneld is ready and that both nodes have the same PSK"
                ),
            )
        }
        _ => return,
    };
    (entry.cause, entry.remedy) = (Some(cause), Some(remedy));
}

/// What the peer's messages show.
fn faulty(fault: HandshakeFault, public: std::net::IpAddr) -> (String, String) {
    match fault {
        HandshakeFault::PresharedKey => (
            format!(
                "{public} answers handshakes of WireGuard, but with another preshared key: PSK differs between the nodes"
            ),
            "give both nodes the same PSK in the Backend of net-conf.json; a node that reads its configuration from a file or an \
             environment needs a restart of flanneld"
                .to_owned(),
        ),
        HandshakeFault::UnknownKey => (
            format!("handshakes of WireGuard from {public} use a public key that its lease does not announce"),
            format!(
                "restart flanneld on {public}, so that it announces its key; if another WireGuard device of that host uses \
                 this port, give that one another port"
            ),
        ),
        HandshakeFault::ForeignKey => (
            format!("handshakes of WireGuard from {public} are addressed to another public key than this node's"),
            format!(
                "see that flanneld on {public} reaches the store and is ready: it has not read the lease with this node's key; or \
                 another WireGuard there uses this node's port"
            ),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::PeerReport;

    const NOW: u64 = 10_000;

    fn entry(verdict: Option<&str>) -> PeerEntry {
        let path =
            r#"{"state":"reachable","sent":1,"lost":0,"loss":0.0,"rtt_seconds":null,"failing_seconds":60.0}"#;
        let probe = |verdict| -> PeerReport {
            serde_json::from_str(&format!(
                r#"{{"subnet":"10.244.7.0/24","underlay_address":"192.0.2.7","tunnel_address":"10.244.7.0","way":"wireguard",
                    "state":"unreachable","state_seconds":1.0,"verdict":"{verdict}","cause":null,"remedy":null,"underlay":{path},
                    "tunnel":{path},"mtu":1420,"path_mtu":null}}"#
            ))
            .unwrap()
        };
        PeerEntry {
            subnet: "10.244.7.0/24".into(),
            public: Some("192.0.2.7".parse().unwrap()),
            way: Some("wireguard".into()),
            cause: Some("of probes".into()),
            remedy: Some("of probes".into()),
            probe: verdict.map(probe),
            ..PeerEntry::default()
        }
    }

    #[test]
    fn a_session_says_why_a_tunnel_is_silent_where_it_knows_more_than_probes() {
        let known =
            SessionReport { endpoint: Some("192.0.2.7:51820".parse().unwrap()), ..SessionReport::default() };
        let never = SessionReport { sent: 900, unanswered: 5, ..known };
        let faulty = |fault| SessionReport { fault: Some(fault), ..never };
        let current = SessionReport { handshake: Some(NOW - 20), ..known };
        let blocked = Some("port-blocked");
        for (report, verdict, cause, remedy) in [
            (never, blocked, "192.0.2.7 answers, but no handshake", "allow UDP port 51820 both ways"),
            (
                never,
                None,
                "no handshake of WireGuard with 192.0.2.7 has succeeded: UDP port 51820",
                "same PSK",
            ),
            (never, Some("down"), "of probes", "of probes"),
            (
                SessionReport { handshake: Some(NOW - 600), ..never },
                blocked,
                "has succeeded for 600 s",
                "both ways",
            ),
            (faulty(HandshakeFault::PresharedKey), blocked, "PSK differs", "the same PSK"),
            (faulty(HandshakeFault::PresharedKey), None, "PSK differs", "the same PSK"),
            (
                faulty(HandshakeFault::UnknownKey),
                blocked,
                "its lease does not announce",
                "restart flanneld on 192.0.2.7",
            ),
            (
                faulty(HandshakeFault::ForeignKey),
                blocked,
                "another public key than this node's",
                "reaches the store",
            ),
            (
                current,
                blocked,
                "(the last one 20 s ago), so UDP port 51820 is open",
                "drop packets of its tunnel",
            ),
            (current, Some("fine"), "of probes", "of probes"),
            (known, Some("lossy-tunnel"), "of probes", "of probes"),
            // The port may have been closed after that handshake.
            (
                SessionReport { handshake: Some(NOW - 90), ..known },
                blocked,
                "has succeeded for 90 s",
                "both ways",
            ),
        ] {
            let mut entry = entry(verdict);
            complete(&mut entry, &report, NOW);
            let (said, what) = (entry.cause.unwrap(), entry.remedy.unwrap());
            assert!(said.contains(cause), "{cause}: {said}");
            assert!(what.contains(remedy), "{remedy}: {what}");
            assert_eq!(entry.handshake, report.handshake);
        }
    }

    #[test]
    fn what_pods_send_is_not_overwritten_by_what_sessions_count() {
        let report = SessionReport { received: 5, sent: 6, ..SessionReport::default() };
        let mut counted = PeerEntry { received_bytes: Some(1), transmitted_bytes: Some(2), ..entry(None) };
        complete(&mut counted, &report, NOW);
        assert_eq!((counted.received_bytes, counted.transmitted_bytes), (Some(1), Some(2)));
        let mut uncounted = entry(None);
        complete(&mut uncounted, &report, NOW);
        assert_eq!((uncounted.received_bytes, uncounted.transmitted_bytes), (Some(5), Some(6)));
    }

    #[test]
    fn peers_are_counted_by_state_although_they_are_too_many_to_be_named() {
        let mut sessions = Sessions::default();
        let net = |third: u8| -> IpNet { format!("10.244.{third}.0/24").parse().unwrap() };
        let failing = SessionReport { unanswered: 2, ..SessionReport::default() };
        let current = SessionReport { handshake: Some(NOW), ..SessionReport::default() };
        for (keep, known) in [(false, 0), (true, 2)] {
            sessions.take(&[net(1), net(2)], current, keep, NOW);
            sessions.take(&[net(3)], failing, false, NOW);
            assert_eq!((sessions.by_subnet.len(), sessions.each.len()), (known, known / 2));
        }
        sessions.take(&[], SessionReport::default(), true, NOW);
        let counts = sessions.counts.unwrap();
        assert_eq!((counts.current, counts.idle, counts.failing), (2, 1, 2));
    }
}
