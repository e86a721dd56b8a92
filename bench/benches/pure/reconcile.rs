//! From leases to changes of the kernel, for clusters of several sizes.

use std::hint::black_box;

use backends::diff::diff;
use backends::{ActiveBackends, KernelState, Macs, Node, PeerContext, Peers, PlanInput, Underlay};
use divan::Bencher;
use subnet::lease::parse_key;
use subnet::{Family, Lease, Leases, Mac, NetworkConfig, PublicAddrs};

use crate::SIZES;

/// A cluster as one of its nodes sees it.
struct Cluster {
    network: NetworkConfig,
    own: Lease,
    all: Leases,
    active: ActiveBackends,
}

impl Cluster {
    /// VXLAN nodes whose subnets, addresses and MACs all differ.
    fn new(peers: u32) -> Self {
        let config = r#"{"Network":"10.0.0.0/8","SubnetLen":24,"Backend":{"Type":"vxlan"}}"#;
        let network = NetworkConfig::parse(config).expect("it is valid");
        let mut all = Leases::default();
        for number in 0..=peers {
            let [_, _, high, low] = number.to_be_bytes();
            let key = format!("10.{high}.{low}.0-24");
            let value = format!(
                r#"{{"PublicIP":"172.16.{high}.{low}","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:00:00:01:{high:02x}:{low:02x}"}}}}"#
            );
            all.insert_entry(&key, value.as_bytes(), u64::from(number));
        }
        let own = all.leases[&parse_key("10.0.1.0-24").expect("it is a key")].clone();
        let active = ActiveBackends::new(&network.backend, &network).expect("vxlan is there");
        Self { network, own, all, active }
    }

    fn peers(&self) -> Peers {
        let before = KernelState::default();
        let Self { network, own, active, .. } = self;
        Peers::choose(
            PeerContext {
                network,
                former: &[],
                own,
                active,
                before: &before,
                surroundings: &backends::Surroundings::default(),
                undecided: &Default::default(),
            },
            &self.all,
        )
    }

    fn plan(&self, peers: &Peers) -> KernelState {
        let public = PublicAddrs { v4: self.own.public.v4, v6: None };
        let name = "eth0".parse().expect("it is a name");
        let underlay = Underlay { index: 2, name, mtu: 1500 };
        let node = Node { underlay, public, local: public, source: public, direct: Default::default() };
        let mut macs = Macs::default();
        macs.set(Family::V4, Mac([2, 0, 0, 0, 0, 1]));
        let all = &peers.usable;
        self.active.plan(PlanInput { node: &node, own: &self.own.subnets, macs: &macs, peers: all, all })
    }

    /// What there should be, for so many peers.
    fn desired(peers: u32) -> KernelState {
        let cluster = Self::new(peers);
        let chosen = cluster.peers();
        assert_eq!(chosen.usable.len(), peers as usize, "{:?}", chosen.skipped);
        cluster.plan(&chosen)
    }
}

#[divan::bench(args = SIZES)]
fn choose_peers(bencher: Bencher<'_, '_>, peers: u32) {
    let cluster = Cluster::new(peers);
    bencher.bench_local(|| black_box(&cluster).peers());
}

#[divan::bench(args = SIZES)]
fn plan(bencher: Bencher<'_, '_>, peers: u32) {
    let cluster = Cluster::new(peers);
    let chosen = cluster.peers();
    bencher.bench_local(|| cluster.plan(black_box(&chosen)));
}

#[divan::bench(args = SIZES)]
fn diff_of_equal_states(bencher: Bencher<'_, '_>, peers: u32) {
    let desired = Cluster::desired(peers);
    let actual = desired.clone();
    assert!(diff(&desired, &actual).is_empty());
    bencher.bench_local(|| diff(black_box(&desired), black_box(&actual)));
}

#[divan::bench(args = SIZES)]
fn diff_of_one_lost_route(bencher: Bencher<'_, '_>, peers: u32) {
    let desired = Cluster::desired(peers);
    let mut actual = desired.clone();
    actual.routes.pop_last();
    assert_eq!(diff(&desired, &actual).len(), 1);
    bencher.bench_local(|| diff(black_box(&desired), black_box(&actual)));
}

#[divan::bench(args = SIZES)]
fn diff_of_everything(bencher: Bencher<'_, '_>, peers: u32) {
    let desired = Cluster::desired(peers);
    let actual = KernelState::default();
    assert!(diff(&desired, &actual).len() >= 3 * peers as usize);
    bencher.bench_local(|| diff(black_box(&desired), black_box(&actual)));
}
