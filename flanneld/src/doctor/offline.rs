//! Without an agent: the plan from what it saved, and what of it the kernel lacks.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use backends::KernelState;
use backends::kernel::Records;
use backends::kernel::netlink::Netlink;
use backends::{
    ActiveBackends, Kernel, Macs, Node, Peer, PeerContext, Peers, PlanInput, Scope, Surroundings, Underlay,
};
use subnet::Family;
use subnet::saved::Saved;

use super::seen::Read;
use crate::interface::{self, External, PodPrefixes, Selectors};
use crate::status::differences;

/// How many are named.
const NAMED: usize = 8;

/// What would be changed to have the kernel as the saved state asks for, in words.
pub(super) fn changes(subnet_file: &Path) -> Read<Vec<String>> {
    let state_file = crate::state_file(subnet_file);
    let saved = Saved::read_of_any_store(&state_file)?;
    let saved = saved.ok_or_else(|| format!("{} does not exist", state_file.display()))?;
    let mut active =
        ActiveBackends::new(&saved.network.backend, &saved.network).map_err(|error| error.to_string())?;
    if active.ask_for_direct() {
        return Err("which peers are reached directly is known to the agent alone".to_owned());
    }
    active.remember(&saved.former, &saved.network);
    if active.may_encrypt_in_process() && !Netlink::open().is_ok_and(|mut kernel| kernel.has_wireguard()) {
        active.encrypt_in_process();
    }
    let external = external(&saved)?;
    let (desired, scope) = plan(&saved, active, &external)?;
    let changes = differences(&desired, &scope).map_err(|error| error.to_string())?;
    Ok(changes.iter().take(NAMED).map(ToString::to_string).collect())
}

/// The interface that the agent would choose, had it no flags.
fn external(saved: &Saved) -> Read<External> {
    let own = saved.leases.leases.get(&saved.own).ok_or("the saved state lacks the own lease")?;
    let host = Netlink::open().and_then(|mut kernel| kernel.links_and_addresses());
    let mut host = host.map_err(|error| error.to_string())?;
    // Its default routes are not read: the saved address leads to the interface.
    host.defaults.clear();
    let selectors = Selectors { prefer: own.public, public: own.public, ..Selectors::default() };
    let pods =
        PodPrefixes { networks: saved.network.networks().iter().collect(), own: saved.own.iter().collect() };
    let families: Vec<Family> = own.subnets.iter().map(|subnet| Family::of(subnet.addr())).collect();
    let no_way = |_| Err("it is not asked".to_owned());
    interface::choose(&selectors, &pods, &host, None, no_way, &families).map_err(|error| error.to_string())
}

fn plan(saved: &Saved, mut active: ActiveBackends, external: &External) -> Read<(KernelState, Scope)> {
    let own = saved.leases.leases.get(&saved.own).ok_or("the saved state lacks the own lease")?;
    active.take_up(saved.leases.leases.values().map(|lease| &lease.attachment));
    let mut macs = Macs::default();
    for family in Family::BOTH {
        if let Some(vtep) = own.attachment.vtep(family) {
            macs.set(family, vtep.mac);
        }
    }
    let context = PeerContext {
        network: &saved.network,
        former: &saved.left,
        own,
        active: &active,
        before: &KernelState::default(),
        surroundings: &Surroundings::default(),
        undecided: &BTreeSet::new(),
    };
    let peers = Peers::choose(context, &saved.leases);
    let External { index, name, mtu, addr, source, .. } = *external;
    let node = Node {
        underlay: Underlay { index, name, mtu },
        public: own.public,
        local: addr,
        source,
        direct: Arc::default(),
    };
    let peers: Vec<Peer> = peers.usable.values().copied().collect();
    let input = PlanInput { node: &node, own: &own.subnets, macs: &macs, peers: &peers, all: &peers };
    let mut desired = active.plan(input);
    desired.blackholes.extend(own.subnets.iter());
    let mut records = Records::default();
    records.learn(&saved.leases, None);
    let lens = saved.network.ranges().map(|range| (Family::of(range.network.addr()), range.subnet_len));
    let scope = Scope {
        networks: saved.network.networks().iter().chain(saved.left.iter().copied()).collect(),
        subnets: own.subnets.iter().collect(),
        ranges: saved.network.ranges().copied().collect(),
        subnet_lens: lens.collect(),
        records: Arc::new(records),
        underlay: Some(index),
        devices: active.devices().collect(),
        recalled: true,
    };
    Ok((desired, scope))
}
