//! Handshakes and sessions of WireGuard.

use std::fmt;

use super::{MAX_LABEL, Out};
use crate::status::model::NodeStatus;
use crate::text::clean;

impl Out<'_> {
    /// Nothing without WireGuard. The kernel's module does not count handshakes, only when the last ones were.
    pub(super) fn wireguard(&mut self, status: &NodeStatus) -> fmt::Result {
        let Some(counts) = &status.wireguard else { return Ok(()) };
        let states = [("current", counts.current), ("idle", counts.idle), ("failing", counts.failing)];
        let states = states.map(|(state, count)| (vec![("session", state.to_owned())], count as f64));
        self.gauges(
            "wireguard_peers",
            "WireGuard peers by session: current, idle, or failing because handshakes are not answered.",
            &states,
        )?;
        if !status.tunnel.is_empty() {
            self.handshakes(|name| status.tunnel.get(name).copied().unwrap_or_default())?;
        }
        let last: Vec<_> = status
            .handshakes
            .iter()
            .map(|one| (vec![("peer", clean(&one.peer, MAX_LABEL))], one.at as f64))
            .collect();
        self.gauges("peer_handshake_timestamp_seconds", "When the last handshake succeeded.", &last)
    }

    fn handshakes(&mut self, of: impl Fn(&str) -> u64) -> fmt::Result {
        let (begun, misanswered) = (of("handshakes_begun"), of("handshakes_misanswered"));
        let results = [
            ("initiator", "completed", begun),
            ("initiator", "unanswered", of("handshakes_unanswered")),
            ("initiator", "challenged", of("handshakes_proving")),
            ("initiator", "refused", misanswered),
            ("responder", "completed", of("handshakes").saturating_sub(begun)),
            ("responder", "challenged", of("handshakes_asked")),
            ("responder", "refused", of("refused_handshakes").saturating_sub(misanswered)),
            ("responder", "dropped", of("dropped_handshakes")),
        ];
        let series = results.map(|(role, result, count)| {
            (vec![("role", role.to_owned()), ("result", result.to_owned())], count as f64)
        });
        self.counters(
            "wireguard_handshakes",
            "Handshakes in this process, by role and result; unanswered ones are repeated.",
            &series,
        )
    }
}
