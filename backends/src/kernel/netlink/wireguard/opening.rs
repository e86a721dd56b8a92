//! Handshakes that this node begins without a packet for the peer: where this node has lost a session, the peer goes on by it, and
//! would notice after fifteen seconds without an answer.

use std::io;
use std::time::{Duration, SystemTime};

use subnet::wireguard::PublicKey;

use super::{
    FoundPeer, FoundWireguard, HEARD, Module, PEERS_AT_ONCE, WG_CMD_GET_DEVICE, WG_CMD_SET_DEVICE,
    WGDEVICE_A_IFINDEX, WGDEVICE_A_PEERS, WGPEER_A_FLAGS, WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL,
    WGPEER_A_PUBLIC_KEY,
};
use crate::netlink::wire::Writer;
use crate::state::wireguard::OPENING;

/// Sets what is said of a peer that there is, and makes none.
const WGPEER_F_UPDATE_ONLY: u32 = 4;

impl Module {
    /// Begins handshakes with the peers that may have a session: the device was down, and the module ends all sessions of a device
    /// then (drivers/net/wireguard/device.c, `wg_stop`). When it is up again, the module itself calls those with keepalives only.
    pub(in crate::kernel::netlink) fn was_down(&mut self, index: u32) -> io::Result<()> {
        if !self.devices.contains(&index) {
            return Ok(());
        }
        let mut found = FoundWireguard::default();
        let request = |w: &mut Writer| w.bytes_attribute(WGDEVICE_A_IFINDEX, &index.to_ne_bytes());
        self.family()?.dump(WG_CMD_GET_DEVICE, request, |body| found.add(body))?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let lost = found.peers.iter().filter(|(_, peer)| peer.may_have_lost_session(now));
        self.call(index, lost.map(|(key, _)| *key).collect())
    }

    /// Begins handshakes with these peers, which have no keepalives: the module sends the first one when an interval takes the place of
    /// none, and for that it needs a session.
    pub(super) fn call(&mut self, index: u32, peers: Vec<PublicKey>) -> io::Result<()> {
        for peers in peers.chunks(PEERS_AT_ONCE) {
            self.family()?.change(WG_CMD_SET_DEVICE, |w| {
                w.bytes_attribute(WGDEVICE_A_IFINDEX, &index.to_ne_bytes());
                w.nest(WGDEVICE_A_PEERS, |w| {
                    for (key, seconds) in peers.iter().flat_map(|key| [(key, OPENING), (key, 0)]) {
                        w.nest(0, |w| {
                            w.bytes_attribute(WGPEER_A_PUBLIC_KEY, key.bytes());
                            w.bytes_attribute(WGPEER_A_FLAGS, &WGPEER_F_UPDATE_ONLY.to_ne_bytes());
                            let interval = seconds.to_ne_bytes();
                            w.bytes_attribute(WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL, &interval);
                        });
                    }
                });
            })?;
        }
        Ok(())
    }
}

impl FoundPeer {
    /// Whether it may send by a session that its device has lost, and is not called by the module itself. No session is older than
    /// three minutes.
    fn may_have_lost_session(&self, now: Duration) -> bool {
        self.keepalive == 0 && !self.handshake.is_zero() && now.saturating_sub(self.handshake) < HEARD
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_are_called_that_may_have_a_session_and_are_not_called_by_the_module() {
        let now = Duration::from_secs(10_000);
        for (age, keepalive, called) in [
            (Some(0), 0, true),
            (Some(179), 0, true),
            (Some(180), 0, false),
            (None, 0, false),
            (Some(10), 25, false),
        ] {
            let handshake = age.map_or(Duration::ZERO, |age| now - Duration::from_secs(age));
            let peer = FoundPeer { handshake, keepalive, ..FoundPeer::default() };
            assert_eq!(peer.may_have_lost_session(now), called, "{age:?} {keepalive}");
        }
    }
}
