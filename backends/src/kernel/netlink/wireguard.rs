//! The kernel's WireGuard, over its generic netlink family (include/uapi/linux/wireguard.h).

mod opening;
mod sessions;

pub use sessions::wireguard_sessions;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use subnet::wireguard::{PresharedKey, PublicKey};
use zeroize::Zeroizing;

use super::refusal::errno;
use super::{Netlink, failed};
use crate::kernel::KernelError;
use crate::netlink::generic::GenericFamily;
use crate::netlink::wire::{Writer, attributes, find};
use crate::state::name::Name;
use crate::state::wireguard::{WireguardDevice, WireguardEntry, WireguardPeers};
use crate::state::{KernelChange, KernelState, Link, LinkIdentity};
use crate::wg::identity::Identity;

const FAMILY: &str = "wireguard";
const WG_CMD_GET_DEVICE: u8 = 0;
const WG_CMD_SET_DEVICE: u8 = 1;
const WGDEVICE_A_IFINDEX: u16 = 1;
const WGDEVICE_A_IFNAME: u16 = 2;
const WGDEVICE_A_PRIVATE_KEY: u16 = 3;
const WGDEVICE_A_LISTEN_PORT: u16 = 6;
const WGDEVICE_A_PEERS: u16 = 8;
const WGPEER_A_PUBLIC_KEY: u16 = 1;
const WGPEER_A_PRESHARED_KEY: u16 = 2;
const WGPEER_A_FLAGS: u16 = 3;
const WGPEER_A_ENDPOINT: u16 = 4;
const WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL: u16 = 5;
const WGPEER_A_LAST_HANDSHAKE_TIME: u16 = 6;
const WGPEER_A_RX_BYTES: u16 = 7;
const WGPEER_A_TX_BYTES: u16 = 8;
const WGPEER_A_ALLOWEDIPS: u16 = 9;
const WGPEER_F_REMOVE_ME: u32 = 1;
const WGPEER_F_REPLACE_ALLOWEDIPS: u32 = 2;
const WGALLOWEDIP_A_FAMILY: u16 = 1;
const WGALLOWEDIP_A_IPADDR: u16 = 2;
const WGALLOWEDIP_A_CIDR_MASK: u16 = 3;

/// Peers in a message: an attribute holds 64 KiB, and a peer has about 230 bytes.
const PEERS_AT_ONCE: usize = 200;
/// A peer that was heard so long ago may have gone elsewhere, and what its lease says counts.
const HEARD: Duration = Duration::from_secs(180);

/// WireGuard in the network namespace in which it is first used.
#[derive(Default)]
pub(super) struct Module {
    family: Option<GenericFamily>,
    /// Where each peer was said to be last.
    told: BTreeMap<(Name, PublicKey), SocketAddr>,
    /// The kernel's numbers of the devices that were read.
    devices: BTreeSet<u32>,
}

/// Whether the kernel has the module. The question loads it if that is possible (`ctrl_getfamily` of net/netlink/genetlink.c).
/// Where the kernel does not say that it knows no such family, the first device shows.
pub(super) fn is_known() -> bool {
    GenericFamily::open(FAMILY).map_or_else(|error| error.raw_os_error() != Some(libc::ENOENT), |_| true)
}

impl Module {
    fn family(&mut self) -> io::Result<&mut GenericFamily> {
        Ok(match &mut self.family {
            Some(family) => family,
            none => none.insert(GenericFamily::open(FAMILY)?),
        })
    }

    /// What a device has. Endpoints are those that are `wanted` where a peer has only been followed.
    pub(super) fn read(
        &mut self,
        name: Name,
        index: u32,
        wanted: &WireguardDevice,
    ) -> io::Result<WireguardDevice> {
        let request = |w: &mut Writer| w.bytes_attribute(WGDEVICE_A_IFINDEX, &index.to_ne_bytes());
        let mut found = FoundWireguard::default();
        self.family()?.dump(WG_CMD_GET_DEVICE, request, |body| found.add(body))?;
        self.devices.insert(index);
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let told = &self.told;
        let entry = |(key, peer): (PublicKey, FoundPeer)| {
            let wanted = wanted.peers.get(&key);
            let told = told.get(&(name, key));
            let endpoint = peer.placed(wanted.map(|wanted| wanted.endpoint), told.copied(), now);
            let FoundPeer { allowed, psk, keepalive, .. } = peer;
            (key, WireguardEntry { endpoint, allowed, psk, keepalive })
        };
        let peers = found.peers.into_iter().map(entry).collect();
        Ok(WireguardDevice { port: found.port, identity: found.identity, peers })
    }

    /// Sets key and port.
    pub(super) fn set(&mut self, index: u32, port: u16, identity: &Identity) -> io::Result<()> {
        self.family()?.change(WG_CMD_SET_DEVICE, |w| {
            w.bytes_attribute(WGDEVICE_A_IFINDEX, &index.to_ne_bytes());
            w.bytes_attribute(WGDEVICE_A_PRIVATE_KEY, identity.private());
            w.bytes_attribute(WGDEVICE_A_LISTEN_PORT, &port.to_ne_bytes());
        })
    }

    /// Sets and removes peers. With those that were set before, or that take the place of others, a handshake is begun: a peer does not
    /// notice that this node lost its session, or took another key, before fifteen seconds have passed without an answer.
    pub(super) fn change(&mut self, name: Name, index: u32, peers: &WireguardPeers) -> io::Result<()> {
        let is_called = |(key, peer): (&PublicKey, &WireguardEntry)| {
            let called = !peers.remove.is_empty() || self.told.contains_key(&(name, *key));
            (called && peer.keepalive == 0).then_some(*key)
        };
        let called = peers.upsert.iter().filter_map(is_called).collect();
        let removed = peers.remove.iter().map(|key| (key, None));
        let set = peers.upsert.iter().map(|(key, peer)| (key, Some(peer)));
        let steps: Vec<Step<'_>> = removed.chain(set).collect();
        for steps in steps.chunks(PEERS_AT_ONCE) {
            self.family()?.change(WG_CMD_SET_DEVICE, |w| {
                w.bytes_attribute(WGDEVICE_A_IFINDEX, &index.to_ne_bytes());
                w.nest(WGDEVICE_A_PEERS, |w| steps.iter().for_each(|step| w.nest(0, |w| write(w, *step))));
            })?;
        }
        self.call(index, called)?;
        self.told.retain(|(of, key), _| *of != name || !peers.remove.contains(key));
        self.told.extend(peers.upsert.iter().map(|(key, peer)| ((name, *key), peer.endpoint)));
        Ok(())
    }
}

impl Netlink {
    /// Takes in what a device has, if it is one of WireGuard that is wanted.
    pub(super) fn read_wireguard(
        &mut self,
        name: Name,
        index: u32,
        link: &Link,
        desired: &KernelState,
        state: &mut KernelState,
    ) -> Result<(), KernelError> {
        if link.identity == LinkIdentity::Wireguard
            && let Some(wanted) = desired.wireguard.get(&name)
        {
            let found = self.wireguard.read(name, index, wanted).map_err(failed("reading WireGuard"))?;
            state.wireguard.insert(name, Arc::new(found));
        }
        Ok(())
    }

    /// Makes a change to a device.
    pub(super) fn change_wireguard(&mut self, change: &KernelChange, index: Option<u32>) -> io::Result<()> {
        let index = index.ok_or_else(|| io::Error::from_raw_os_error(errno::ENODEV))?;
        match change {
            KernelChange::SetWireguard(_, port, identity) => self.wireguard.set(index, *port, identity),
            KernelChange::SetWireguardPeers(name, peers) => self.wireguard.change(*name, index, peers),
            _ => Ok(()),
        }
    }
}

/// A peer that is set, or that goes.
type Step<'a> = (&'a PublicKey, Option<&'a WireguardEntry>);

fn write(w: &mut Writer, (key, peer): Step<'_>) {
    w.bytes_attribute(WGPEER_A_PUBLIC_KEY, key.bytes());
    let Some(peer) = peer else {
        return w.bytes_attribute(WGPEER_A_FLAGS, &WGPEER_F_REMOVE_ME.to_ne_bytes());
    };
    w.bytes_attribute(WGPEER_A_FLAGS, &WGPEER_F_REPLACE_ALLOWEDIPS.to_ne_bytes());
    // Without a secret the kernel takes this one.
    let secret: &[u8; 32] = peer.psk.as_ref().map_or(&[0; 32], PresharedKey::bytes);
    w.bytes_attribute(WGPEER_A_PRESHARED_KEY, secret);
    w.bytes_attribute(WGPEER_A_ENDPOINT, &socket_address(peer.endpoint));
    w.bytes_attribute(WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL, &peer.keepalive.to_ne_bytes());
    w.nest(WGPEER_A_ALLOWEDIPS, |w| {
        for net in &peer.allowed {
            w.nest(0, |w| {
                let (family, address) = match net.network() {
                    IpAddr::V4(v4) => (libc::AF_INET, v4.octets().to_vec()),
                    IpAddr::V6(v6) => (libc::AF_INET6, v6.octets().to_vec()),
                };
                w.bytes_attribute(WGALLOWEDIP_A_FAMILY, &(family as u16).to_ne_bytes());
                w.bytes_attribute(WGALLOWEDIP_A_IPADDR, &address);
                w.bytes_attribute(WGALLOWEDIP_A_CIDR_MASK, &[net.prefix_len()]);
            });
        }
    });
}

/// `struct sockaddr_in` or `struct sockaddr_in6`.
fn socket_address(at: SocketAddr) -> Vec<u8> {
    let port = at.port().to_be_bytes();
    match at.ip() {
        IpAddr::V4(v4) => [&(libc::AF_INET as u16).to_ne_bytes()[..], &port, &v4.octets(), &[0; 8]].concat(),
        IpAddr::V6(v6) => {
            [&(libc::AF_INET6 as u16).to_ne_bytes()[..], &port, &[0; 4], &v6.octets(), &[0; 4]].concat()
        }
    }
}

fn endpoint(bytes: &[u8]) -> Option<SocketAddr> {
    let family = i32::from(u16::from_ne_bytes(*bytes.first_chunk()?));
    let port = u16::from_be_bytes(*bytes.get(2..)?.first_chunk()?);
    let ip: IpAddr = match family {
        libc::AF_INET => Ipv4Addr::from(*bytes.get(4..)?.first_chunk::<4>()?).into(),
        libc::AF_INET6 => Ipv6Addr::from(*bytes.get(8..)?.first_chunk::<16>()?).into(),
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

/// What a dump has told so far.
#[derive(Default)]
struct FoundWireguard {
    port: u16,
    identity: Option<Arc<Identity>>,
    peers: BTreeMap<PublicKey, FoundPeer>,
}

#[derive(Default)]
struct FoundPeer {
    endpoint: Option<SocketAddr>,
    allowed: BTreeSet<IpNet>,
    psk: Option<PresharedKey>,
    keepalive: u16,
    /// Since 1970; zero: never.
    handshake: Duration,
}

impl FoundWireguard {
    /// Takes in one message. A peer may go on in the next one, with further addresses.
    fn add(&mut self, body: &[u8]) {
        if let Some(port) = find(body, WGDEVICE_A_LISTEN_PORT).and_then(number) {
            self.port = port;
        }
        if let Some(key) = find(body, WGDEVICE_A_PRIVATE_KEY).and_then(|key| <[u8; 32]>::try_from(key).ok())
            && key != [0; 32]
        {
            self.identity = Identity::new(Zeroizing::new(key)).ok().map(Arc::new);
        }
        for (_, peer) in find(body, WGDEVICE_A_PEERS).map(attributes).into_iter().flatten() {
            let key = find(peer, WGPEER_A_PUBLIC_KEY).and_then(|key| key.try_into().ok());
            let Some(key) = key.and_then(|key| PublicKey::new(key).ok()) else { continue };
            self.peers.entry(key).or_default().add(peer);
        }
    }
}

impl FoundPeer {
    fn add(&mut self, peer: &[u8]) {
        if let Some(at) = find(peer, WGPEER_A_ENDPOINT).and_then(endpoint) {
            self.endpoint = Some(at);
        }
        if let Some(secret) =
            find(peer, WGPEER_A_PRESHARED_KEY).and_then(|key| <[u8; 32]>::try_from(key).ok())
        {
            self.psk = (secret != [0; 32]).then(|| secret.into());
        }
        if let Some(seconds) = find(peer, WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL).and_then(number) {
            self.keepalive = seconds;
        }
        if let Some(time) = find(peer, WGPEER_A_LAST_HANDSHAKE_TIME).and_then(|time| time.first_chunk()) {
            self.handshake = Duration::from_secs(i64::from_ne_bytes(*time).max(0).unsigned_abs());
        }
        for (_, allowed) in find(peer, WGPEER_A_ALLOWEDIPS).map(attributes).into_iter().flatten() {
            self.allowed.extend(network(allowed));
        }
    }

    /// Where it is, as far as that matters. Only a peer that is still heard may be elsewhere than it was told, or,
    /// after a start of this process, elsewhere than is wanted.
    fn placed(&self, wanted: Option<SocketAddr>, told: Option<SocketAddr>, now: Duration) -> SocketAddr {
        let unknown = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0);
        let heard = !self.handshake.is_zero() && now.saturating_sub(self.handshake) < HEARD;
        match told.or(wanted) {
            Some(said) if heard => said,
            _ => self.endpoint.unwrap_or(unknown),
        }
    }
}

fn number(bytes: &[u8]) -> Option<u16> {
    bytes.first_chunk().copied().map(u16::from_ne_bytes)
}

fn network(allowed: &[u8]) -> Option<IpNet> {
    let address = find(allowed, WGALLOWEDIP_A_IPADDR)?;
    let address: IpAddr = match *address {
        [a, b, c, d] => Ipv4Addr::new(a, b, c, d).into(),
        _ => Ipv6Addr::from(<[u8; 16]>::try_from(address).ok()?).into(),
    };
    IpNet::new(address, *find(allowed, WGALLOWEDIP_A_CIDR_MASK)?.first()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key(number: u8) -> PublicKey {
        PublicKey::new([number | 2; 32]).unwrap()
    }

    fn entry(endpoint: &str, allowed: &[&str]) -> WireguardEntry {
        WireguardEntry {
            endpoint: endpoint.parse().unwrap(),
            allowed: allowed.iter().map(|net| net.parse().unwrap()).collect(),
            psk: Some([7; 32].into()),
            keepalive: 25,
        }
    }

    /// A message of a dump with these peers, as the kernel writes it.
    fn message(identity: &Identity, peers: &[(PublicKey, WireguardEntry)]) -> Vec<u8> {
        let mut w = Writer::default();
        w.bytes_attribute(WGDEVICE_A_PRIVATE_KEY, identity.private());
        w.bytes_attribute(WGDEVICE_A_LISTEN_PORT, &51820_u16.to_ne_bytes());
        w.nest(WGDEVICE_A_PEERS, |w| {
            peers.iter().for_each(|(key, peer)| w.nest(0, |w| write(w, (key, Some(peer)))));
        });
        w.into_bytes()
    }

    #[test]
    fn a_peer_that_goes_on_in_the_next_message_is_one_peer() {
        let identity = Identity::generate().unwrap();
        let (first, second) = (
            entry("192.0.2.2:51820", &["10.244.2.0/24"]),
            entry("[2001:db8::3]:7", &["10.244.3.0/24", "fd00:0:0:3::/64"]),
        );
        let rest = entry("[2001:db8::3]:7", &["10.244.33.0/24"]);
        let mut found = FoundWireguard::default();
        found.add(&message(&identity, &[(key(1), first.clone()), (key(4), second.clone())]));
        found.add(&message(&identity, &[(key(4), rest)]));
        assert_eq!((found.port, found.identity.as_deref()), (51820, Some(&identity)));
        assert_eq!(found.peers.len(), 2);
        let peer = &found.peers[&key(4)];
        assert_eq!(peer.allowed.len(), 3);
        assert_eq!((peer.endpoint, peer.keepalive), (Some(second.endpoint), 25));
        assert_eq!(peer.psk, second.psk);
        assert_eq!(found.peers[&key(1)].endpoint, Some(first.endpoint));
    }

    #[test]
    fn a_peer_that_is_heard_may_be_elsewhere_and_one_that_is_not_is_put_right() {
        let at = |number: u8| SocketAddr::from(([192, 0, 2, number], 51820));
        let now = Duration::from_secs(10_000);
        let peer = |age: Option<u64>| FoundPeer {
            endpoint: Some(at(9)),
            handshake: age.map_or(Duration::ZERO, |age| now - Duration::from_secs(age)),
            ..FoundPeer::default()
        };
        for (age, wanted, told, placed) in [
            (Some(10), Some(1), Some(1), 1),
            // Its lease says another address since: what was told differs from what is wanted.
            (Some(10), Some(2), Some(1), 1),
            (Some(10), Some(1), None, 1),
            (Some(200), Some(1), Some(1), 9),
            (None, Some(1), Some(1), 9),
            (Some(10), None, None, 9),
        ] {
            let found = peer(age).placed(wanted.map(at), told.map(at), now);
            assert_eq!(found, at(placed), "{age:?} {wanted:?} {told:?}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(v4: [u8; 4], v6: [u8; 16], port: u16, len in 0u8..=32) {
            for ip in [IpAddr::from(v4), IpAddr::from(v6)] {
                let at = SocketAddr::new(ip, port);
                prop_assert_eq!(endpoint(&socket_address(at)), Some(at));
                let net = IpNet::new(ip, len).unwrap().trunc();
                let peer = WireguardEntry { allowed: [net].into(), ..entry("192.0.2.1:1", &[]) };
                let mut found = FoundWireguard::default();
                found.add(&message(&Identity::generate().unwrap(), &[(key(1), peer)]));
                prop_assert_eq!(&found.peers[&key(1)].allowed, &BTreeSet::from([net]));
            }
        }

        #[test]
        fn arbitrary_answers_never_panic(bytes: Vec<u8>) {
            FoundWireguard::default().add(&bytes);
            FoundPeer::default().add(&bytes);
            endpoint(&bytes);
            network(&bytes);
        }
    }
}
