//! From leases to changes of the kernel, for clusters of several sizes.

use std::hint::black_box;

use backends::diff::diff;
use backends::state::nexthop::NexthopSupport;
use backends::{ActiveBackends, KernelState, Macs, Node, Peer, PeerContext, Peers, PlanInput, Underlay};
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

    fn with_context<T>(&self, then: impl FnOnce(PeerContext<'_>) -> T) -> T {
        let before = &KernelState::default();
        let (surroundings, undecided) = (&backends::Surroundings::default(), &Default::default());
        let Self { network, own, active, .. } = self;
        then(PeerContext { network, former: &[], own, active, before, surroundings, undecided })
    }

    fn peers(&self) -> Peers {
        self.with_context(|context| Peers::choose(context, &self.all))
    }

    fn plan(&self, peers: &Peers) -> KernelState {
        let usable: Vec<Peer> = peers.usable.values().copied().collect();
        self.with_input(&usable, |input| self.active.plan(input))
    }

    fn with_input<T>(&self, peers: &[Peer], then: impl FnOnce(PlanInput<'_>) -> T) -> T {
        let public = PublicAddrs { v4: self.own.public.v4, v6: None };
        let name = "eth0".parse().expect("it is a name");
        let underlay = Underlay { index: 2, name, mtu: 1500 };
        let node = Node { underlay, public, local: public, source: public, direct: Default::default() };
        let mut macs = Macs::default();
        macs.set(Family::V4, Mac([2, 0, 0, 0, 0, 1]));
        then(PlanInput { node: &node, own: &self.own.subnets, macs: &macs, peers, all: peers })
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
    let last = *actual.routes.keys().next_back().expect("there is one");
    actual.routes.remove(&last);
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

/// One lease more: from the snapshot to the changes of the kernel.
#[divan::bench(args = SIZES)]
fn one_lease_more(bencher: Bencher<'_, '_>, peers: u32) {
    let mut cluster = Cluster::new(peers);
    let (chosen, before) = (cluster.peers(), cluster.all.clone());
    let mut plan = cluster.plan(&chosen);
    let support = NexthopSupport::default();
    let hops = plan.use_nexthops(&support, &KernelState::default());
    let value =
        br#"{"PublicIP":"172.31.0.1","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:02:00:01"}}"#;
    cluster.all.insert_entry("10.255.255.0-24", value, 1);
    bencher.bench_local(|| {
        let next =
            cluster.with_context(|context| chosen.follow(context, &before, &cluster.all)).expect("peers");
        let planned = cluster
            .with_input(&[], |input| cluster.active.plan_since(input, &plan, &chosen.usable, &next.usable));
        let mut planned = planned.expect("a plan");
        planned.use_nexthops_since(&support, &plan, &hops).expect("nexthop objects");
        let changes = diff(&planned, &plan);
        assert_eq!(changes.len(), 3);
        changes
    });
}
