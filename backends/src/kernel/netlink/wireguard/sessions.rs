//! Sessions of the kernel's WireGuard with its peers: read when somebody asks, by one dump of each device.

use std::collections::BTreeMap;
use std::io;

use ipnet::IpNet;
use subnet::wireguard::PublicKey;

use super::{
    FAMILY, WG_CMD_GET_DEVICE, WGDEVICE_A_IFNAME, WGDEVICE_A_PEERS, WGPEER_A_ALLOWEDIPS, WGPEER_A_ENDPOINT,
    WGPEER_A_LAST_HANDSHAKE_TIME, WGPEER_A_PUBLIC_KEY, WGPEER_A_RX_BYTES, WGPEER_A_TX_BYTES, endpoint,
    network,
};
use crate::kernel::netlink::refusal::errno;
use crate::netlink::generic::GenericFamily;
use crate::netlink::wire::{Writer, attributes, find};
use crate::state::KernelState;
use crate::wg::ledger::SessionReport;

/// How the session with each peer of the devices in `desired` stands, with the addresses of the peer's pods. In the network
/// namespace of the calling thread.
///
/// # Errors
/// The kernel's, or that it has no WireGuard. A device that does not exist yet has no peers.
pub fn wireguard_sessions(
    desired: &KernelState,
    mut each: impl FnMut(&[IpNet], SessionReport),
) -> io::Result<()> {
    if desired.wireguard.is_empty() {
        return Ok(());
    }
    let mut family = GenericFamily::open(FAMILY)?;
    for name in desired.wireguard.keys() {
        let mut peers = BTreeMap::new();
        let request = |w: &mut Writer| w.string(WGDEVICE_A_IFNAME, &name.to_string());
        match family.dump(WG_CMD_GET_DEVICE, request, |body| add(&mut peers, body)) {
            Err(error) if error.raw_os_error() == Some(errno::ENODEV) => continue,
            outcome => outcome?,
        }
        peers.values().for_each(|(allowed, report)| each(allowed, *report));
    }
    Ok(())
}

type Found = BTreeMap<PublicKey, (Vec<IpNet>, SessionReport)>;

/// Takes in one message. A peer may go on in the next one, with further addresses and the same counters.
fn add(found: &mut Found, body: &[u8]) {
    for (_, peer) in find(body, WGDEVICE_A_PEERS).map(attributes).into_iter().flatten() {
        let key = find(peer, WGPEER_A_PUBLIC_KEY).and_then(|key| key.try_into().ok());
        let Some(key) = key.and_then(|key| PublicKey::new(key).ok()) else { continue };
        let (nets, report) = found.entry(key).or_default();
        let allowed = find(peer, WGPEER_A_ALLOWEDIPS).map(attributes).into_iter().flatten();
        nets.extend(allowed.filter_map(|(_, allowed)| network(allowed)));
        if let Some(at) = find(peer, WGPEER_A_ENDPOINT).and_then(endpoint) {
            report.endpoint = Some(at);
        }
        let number =
            |kind| find(peer, kind).and_then(|bytes| Some(u64::from_ne_bytes(*bytes.first_chunk()?)));
        if let Some(bytes) = number(WGPEER_A_RX_BYTES) {
            report.received = bytes;
        }
        if let Some(bytes) = number(WGPEER_A_TX_BYTES) {
            report.sent = bytes;
        }
        // `struct __kernel_timespec`: seconds come first.
        if let Some(seconds) = number(WGPEER_A_LAST_HANDSHAKE_TIME) {
            report.handshake = Some(seconds).filter(|at| *at > 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;
    use crate::kernel::netlink::wireguard::socket_address;
    use proptest::prelude::*;

    fn message(peers: &[(u8, u64, u64, u64, &[u8])]) -> Vec<u8> {
        let mut w = Writer::default();
        w.nest(WGDEVICE_A_PEERS, |w| {
            for (key, handshake, received, sent, third) in peers {
                w.nest(0, |w| {
                    w.bytes_attribute(WGPEER_A_PUBLIC_KEY, &[*key | 2; 32]);
                    let at = SocketAddr::from(([192, 0, 2, *key], 51_820));
                    w.bytes_attribute(WGPEER_A_ENDPOINT, &socket_address(at));
                    let time = [handshake.to_ne_bytes(), 5_u64.to_ne_bytes()].concat();
                    w.bytes_attribute(WGPEER_A_LAST_HANDSHAKE_TIME, &time);
                    w.bytes_attribute(WGPEER_A_RX_BYTES, &received.to_ne_bytes());
                    w.bytes_attribute(WGPEER_A_TX_BYTES, &sent.to_ne_bytes());
                    w.nest(WGPEER_A_ALLOWEDIPS, |w| {
                        for third in *third {
                            w.nest(0, |w| {
                                w.bytes_attribute(super::super::WGALLOWEDIP_A_IPADDR, &[10, 244, *third, 0]);
                                w.bytes_attribute(super::super::WGALLOWEDIP_A_CIDR_MASK, &[24]);
                            });
                        }
                    });
                });
            }
        });
        w.into_bytes()
    }

    #[test]
    fn each_peer_has_its_last_handshake_and_its_bytes_once() {
        let mut found = Found::new();
        add(&mut found, &message(&[(1, 1_700_000_000, 7, 8, &[1]), (4, 0, 0, 296, &[2])]));
        add(&mut found, &message(&[(4, 0, 0, 296, &[3])]));
        let all: Vec<_> = found.values().cloned().collect();
        let net = |third: u8| format!("10.244.{third}.0/24").parse::<IpNet>().unwrap();
        let at = |number: u8| Some(SocketAddr::from(([192, 0, 2, number], 51_820)));
        let first = SessionReport {
            handshake: Some(1_700_000_000),
            endpoint: at(1),
            received: 7,
            sent: 8,
            ..SessionReport::default()
        };
        let second = SessionReport { endpoint: at(4), sent: 296, ..SessionReport::default() };
        assert_eq!(all, [(vec![net(1)], first), (vec![net(2), net(3)], second)]);
    }

    proptest! {
        #[test]
        fn arbitrary_answers_never_panic(bytes: Vec<u8>) {
            add(&mut Found::new(), &bytes);
        }
    }
}
