//! Series of single peers.

use std::fmt;

use super::{MAX_LABEL, Out, number};
use crate::status::model::{CountedPeer, ProbeStatus, ProbedPeer};
use crate::text::clean;

impl Out<'_> {
    /// Nothing where there are too many peers.
    pub(super) fn peers_probed(&mut self, probes: &ProbeStatus) -> fmt::Result {
        type Value = fn(&ProbedPeer) -> Option<f64>;
        let metrics: [(&str, &str, Value); 4] = [
            ("peer_up", "Whether the peer is reachable.", |peer| Some(number(peer.up))),
            ("peer_loss_ratio", "What is lost of the last five minutes' probes.", |peer| Some(peer.loss)),
            ("peer_rtt_seconds", "Smoothed round trip to the peer.", |peer| peer.rtt_seconds),
            ("peer_path_mtu_bytes", "The longest packet that reaches the peer.", |peer| {
                peer.path_mtu.map(f64::from)
            }),
        ];
        for (name, help, value) in metrics {
            let one = |peer: &ProbedPeer| Some((vec![("peer", clean(&peer.peer, MAX_LABEL))], value(peer)?));
            let series: Vec<_> = probes.peers.iter().filter_map(one).collect();
            self.gauges(name, help, &series)?;
        }
        Ok(())
    }

    /// Nothing where bytes are not counted.
    pub(super) fn peer_bytes(&mut self, counted: &[CountedPeer]) -> fmt::Result {
        type Bytes = fn(&CountedPeer) -> u64;
        let directions: [(&str, &str, Bytes); 2] = [
            ("peer_receive_bytes", "Bytes from pods of the peer, without tunnel headers.", |peer| {
                peer.received
            }),
            ("peer_transmit_bytes", "Bytes to pods of the peer, without tunnel headers.", |peer| {
                peer.transmitted
            }),
        ];
        for (name, help, bytes) in directions {
            let one = |peer: &CountedPeer| (vec![("peer", clean(&peer.peer, MAX_LABEL))], bytes(peer) as f64);
            self.counters(name, help, &counted.iter().map(one).collect::<Vec<_>>())?;
        }
        Ok(())
    }
}
