//! Two nodes that move on to WireGuard while packets flow.

use std::collections::BTreeSet;
use std::sync::Arc;

use subnet::lease::parse_key;
use subnet::{BackendConfig, NetworkConfig, PublicAddrs};

use super::*;
use crate::plan::backend::{Macs, Node, Peer, PlanInput, Underlay};
use crate::plan::peers::{PeerContext, Peers};
use crate::plan::surroundings::Surroundings;
use crate::plan::wireguard::Wireguard;
use crate::state::name::Name;
use crate::wg::identity::Identity;

const VXLAN: &str = r#""BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:LAST"}"#;
const HOST_GW: &str = r#""BackendType":"host-gw""#;
const UDP: &str = r#""BackendType":"udp""#;

fn network(backend: &str) -> NetworkConfig {
    NetworkConfig::parse(&format!(r#"{{"Network":"10.244.0.0/16","Backend":{{"Type":"{backend}"}}}}"#))
        .unwrap()
}

fn wireguard(identity: &Identity) -> String {
    let key = identity.public();
    format!(r#""BackendType":"wireguard","BackendData":{{"PublicKey":"{key}","Port":51820}}"#)
}

/// The node 10.244.1.0/24, which announces WireGuard next, and what it last wanted of its kernel.
struct Bed {
    active: ActiveBackends,
    before: KernelState,
    now: Instant,
}

impl Bed {
    /// It has one backend, by which it reaches the second node, which says the same.
    fn new(former: &str, said: &str) -> Self {
        let former = network(former);
        let active = ActiveBackends::new(&former.backend, &former).unwrap();
        let mut bed = Self { active, before: KernelState::default(), now: Instant::now() };
        bed.plan(&[said, said]);
        bed
    }

    /// As a change of the configuration leaves it, but for the key, which is no file.
    fn switch(&mut self, identity: &Arc<Identity>) {
        let next = network("wireguard").backend;
        let BackendConfig::Wireguard(config) = &next else { panic!() };
        let networks = vec!["10.244.0.0/16".parse().unwrap()];
        let wireguard = Wireguard::new(config.clone(), Arc::clone(identity), networks).unwrap();
        let id = BackendId(1);
        self.active
            .all
            .insert(0, ActiveBackend { id, config: next, backend: Arc::new(wireguard), idle: None });
    }

    /// Plans with what the nodes 10.244.1.0/24, 10.244.2.0/24 … say. When to plan again.
    fn plan(&mut self, said: &[&str]) -> Option<Duration> {
        let mut all = Leases::default();
        for (last, said) in (1u8..).zip(said) {
            let value =
                format!(r#"{{"PublicIP":"192.0.2.{last}",{said}}}"#).replace("LAST", &format!("{last:02x}"));
            all.insert_entry(&format!("10.244.{last}.0-24"), value.as_bytes(), u64::from(last));
        }
        let own = all.leases[&parse_key("10.244.1.0-24").unwrap()].clone();
        let again = self.active.hear_keys(&all, &own, &self.before, self.now);
        let context = PeerContext {
            network: &network("wireguard"),
            former: &[],
            own: &own,
            active: &self.active,
            before: &self.before,
            surroundings: &Surroundings::default(),
            undecided: &BTreeSet::new(),
        };
        let peers = Peers::choose(context, &all);
        assert_eq!((peers.usable.len(), peers.skipped.len()), (said.len() - 1, 0), "{:?}", peers.skipped);
        let usable: Vec<Peer> = peers.usable.values().copied().collect();
        let public: PublicAddrs = ["192.0.2.1".parse().unwrap()].into_iter().collect();
        let underlay = Underlay { index: 2, name: "eth0".parse().unwrap(), mtu: 1500 };
        let node = Node { underlay, source: public, local: public, public, direct: Default::default() };
        let mut macs = Macs::default();
        macs.set(Family::V4, Mac([2, 0, 0, 0, 0, 1]));
        let input = PlanInput { node: &node, own: &own.subnets, macs: &macs, peers: &usable, all: &usable };
        self.before = self.active.plan(input);
        again.map(|at| at - self.now)
    }

    /// The device for the pods of a node.
    fn device(&self, last: u8) -> Option<Name> {
        let routes = &self.before.routes;
        let subnet: IpNet = format!("10.244.{last}.0/24").parse().unwrap();
        routes
            .get(&subnet)
            .or_else(|| routes.get(&"10.244.0.0/16".parse().unwrap()))
            .and_then(|route| route.dev)
    }

    /// How many peers the kernel's WireGuard takes packets from.
    fn heard(&self) -> usize {
        self.before.wireguard.values().map(|device| device.peers.len()).sum()
    }
}

/// Two identities, that with the smaller public key first.
fn identities() -> [Arc<Identity>; 2] {
    let mut both = [(); 2].map(|()| Arc::new(Identity::generate().unwrap()));
    both.sort_by_key(|identity| *identity.public().bytes());
    both
}

fn name(text: &str) -> Option<Name> {
    Some(text.parse().unwrap())
}

#[test]
fn a_peer_is_reached_as_before_until_it_can_know_this_nodes_key_and_the_two_do_not_begin_together() {
    for (former, said, device) in
        [("vxlan", VXLAN, "flannel.1"), ("host-gw", HOST_GW, "eth0"), ("udp", UDP, "flannel0")]
    {
        let [small, great] = identities();
        for (mine, theirs, wait) in [(&small, &great, FIRST), (&great, &small, SECOND)] {
            let mut bed = Bed::new(former, said);
            assert_eq!(bed.device(2), name(device));
            bed.switch(mine);
            let (me, peer) = (wireguard(mine), wireguard(theirs));
            // This node tries the configuration, then the peer announces, then this node.
            assert_eq!(bed.plan(&[said, said]), None);
            assert_eq!(bed.device(2), name(device));
            for _ in 0..2 {
                assert_eq!(bed.plan(&[said, &peer]), None, "until the own lease changes");
                assert_eq!((bed.device(2), bed.heard()), (name(device), 1), "{former}");
                bed.now += 2 * SECOND;
            }
            assert_eq!(bed.plan(&[&me, &peer]), Some(wait));
            assert_eq!((bed.device(2), bed.heard()), (name(device), 1), "{former}");
            bed.now += wait / 2;
            assert_eq!(bed.plan(&[&me, &peer]), Some(wait / 2));
            bed.now += wait / 2;
            for _ in 0..2 {
                assert_eq!(bed.plan(&[&me, &peer]), None);
                assert_eq!((bed.device(2), bed.heard()), (name("flannel-wg"), 1), "{former}");
            }
        }
    }
}

#[test]
fn a_node_that_comes_with_wireguard_is_reached_by_that_at_once() {
    for (former, said) in [("vxlan", VXLAN), ("host-gw", HOST_GW), ("udp", UDP)] {
        let [mine, theirs] = identities();
        let third = wireguard(&Identity::generate().unwrap());
        let (me, peer) = (wireguard(&mine), wireguard(&theirs));
        let mut bed = Bed::new(former, said);
        bed.switch(&mine);
        for own in [said, &me] {
            for _ in 0..2 {
                bed.plan(&[own, &peer, &third]);
                assert_eq!(bed.device(3), name("flannel-wg"), "{former}");
                assert_ne!(bed.device(2), name("flannel-wg"), "{former}");
            }
        }
    }
}

#[test]
fn a_peer_that_goes_back_and_forth_is_followed() {
    let [mine, theirs] = identities();
    let (me, peer) = (wireguard(&mine), wireguard(&theirs));
    let mut bed = Bed::new("vxlan", VXLAN);
    bed.switch(&mine);
    for _ in 0..2 {
        assert_eq!(bed.plan(&[&me, &peer]), Some(FIRST));
        assert_eq!(bed.device(2), name("flannel.1"));
        bed.now += FIRST;
        assert_eq!(bed.plan(&[&me, &peer]), None);
        assert_eq!(bed.device(2), name("flannel-wg"));
        bed.plan(&[&me, VXLAN]);
        assert_eq!(bed.device(2), name("flannel.1"));
    }
}
