//! Which of the cluster's leases this node can use, and why not the others; pure.
//!
//! A lease that can't be used is left out with a reason and never disturbs another one: one bad key or
//! one misconfigured node must not cost anybody else's traffic.

mod flaws;
mod follow;
mod reached;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use subnet::lease::{Malformed, format_key};
use subnet::net::{addr_of, bits_of, overlap};
use subnet::wireguard::PublicKey;
use subnet::{Attachment, Family, Lease, Leases, Mac, NetworkConfig, SharedMap, SharedSet};

use super::active::ActiveBackends;
use super::backend::{Peer, WireguardPeer};
use super::surroundings::Surroundings;
use super::wireguard::known;
use crate::state::KernelState;
use flaws::Flaws;
use reached::{Reached, reached};

/// Why a lease is left out, as a class for counting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SkipReason {
    /// The entry is no lease.
    Malformed,
    /// No subnet of a family that is enabled.
    Family,
    /// Another backend than this node's.
    Backend,
    /// Outside the network.
    Network,
    /// No usable public address, or this node's own.
    Address,
    /// The subnet overlaps another one, or an address that has to be reached.
    Overlap,
    /// No usable tunnel endpoint, or that of another node.
    Mac,
    /// No usable public key of WireGuard, or that of another node.
    Key,
}

impl SkipReason {
    /// Its name as a label.
    pub fn name(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::Family => "family",
            Self::Backend => "backend",
            Self::Network => "network",
            Self::Address => "address",
            Self::Overlap => "overlap",
            Self::Mac => "mac",
            Self::Key => "key",
        }
    }
}

/// The outcome of looking through all leases.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peers {
    /// The peers to reach, by subnet.
    pub usable: SharedMap<IpNet, Peer>,
    /// How many nodes they are: one with both families is one.
    pub nodes: usize,
    /// The leases that were left out, by their key, with the reason.
    pub skipped: BTreeMap<String, String>,
    /// How many were left out for each reason; a lease with two families counts for each.
    pub reasons: BTreeMap<SkipReason, usize>,
    /// The MACs that several nodes announce.
    pub disputed: BTreeSet<Mac>,
    /// How many of the usable ones announce something that this node doesn't know, and are reached as before.
    pub kept: usize,
    /// Each lease is used or left out for itself: none is because of another one.
    pub independent: bool,
    /// Family and MAC of each usable tunnel endpoint, if leases are independent: then no two have the same.
    pub vteps: SharedSet<(Family, Mac)>,
}

/// From what this node looks at the leases.
#[derive(Clone, Copy, Debug)]
pub struct PeerContext<'a> {
    /// The cluster's configuration.
    pub network: &'a NetworkConfig,
    /// Networks of earlier configurations, in which leases may still be.
    pub former: &'a [IpNet],
    /// This node's lease.
    pub own: &'a Lease,
    /// The ways that this node has.
    pub active: &'a ActiveBackends,
    /// Its last desired state of the kernel.
    pub before: &'a KernelState,
    /// What no peer may cover.
    pub surroundings: &'a Surroundings,
    /// Disputed MACs of which it isn't known yet which of the nodes is living: they stay where they are.
    pub undecided: &'a BTreeSet<Mac>,
}

impl Peers {
    /// Looks through `all` from this node.
    pub fn choose(context: PeerContext<'_>, all: &Leases) -> Self {
        let PeerContext { network, own, .. } = context;
        let mut peers = Self::default();
        let mut leases: Vec<&Lease> = all.leases.values().filter(|lease| !is_own(own, lease)).collect();
        // Of leases that overlap, one with the right length beats one with a wrong length, and of two
        // with the right length the older one is right.
        leases.sort_by_cached_key(|lease| (!fits_lengths(network, lease), lease.created, lease.subnets));

        let keys = former_keys(context, &leases);
        let mut chosen = Vec::new();
        let mut flaws = Flaws::of(all);
        for lease in leases {
            judge_alone(context, lease, &keys, |family, outcome| match outcome {
                Ok((peer, kept)) => chosen.push(Claimed { lease, peer, kept }),
                Err((reason, why)) => match flaws.behind(reason, lease) {
                    Some(flaw) => peers.leave_out(key_of(lease), flaw),
                    None => peers.skip(network, lease, family, reason, why),
                },
            });
        }
        flaws.others(all).for_each(|(key, flaw)| peers.leave_out(key.clone(), flaw));
        let alone = chosen.len();
        let rules: [(Rule, SkipReason); 4] = [
            (uncovered, SkipReason::Overlap),
            (first_of_overlapping, SkipReason::Overlap),
            (last_written_of_a_mac, SkipReason::Mac),
            (last_written_of_a_key, SkipReason::Key),
        ];
        for (rule, reason) in rules {
            let (kept, refused) = rule(context, chosen);
            let about_macs = reason == SkipReason::Mac;
            peers.disputed.extend(refused.iter().filter(|_| about_macs).map(|(claimed, _)| claimed.peer.mac));
            for (claimed, why) in refused {
                peers.skip(network, claimed.lease, Some(Family::of(claimed.peer.public)), reason, why);
            }
            chosen = kept;
        }
        peers.kept = chosen.iter().filter(|claimed| claimed.kept).count();
        let apart = chosen.iter().all(|claimed| follow::stands_apart(context, claimed.lease, &claimed.peer));
        // Whether a lease of another backend is reached as before depends on the others.
        let foreign = peers.kept > 0 || peers.reasons.contains_key(&SkipReason::Backend);
        peers.independent = apart && chosen.len() == alone && !foreign;
        peers.nodes = if network.ranges().count() > 1 {
            chosen.iter().map(|claimed| claimed.lease.subnets).collect::<BTreeSet<_>>().len()
        } else {
            chosen.len()
        };
        peers.usable = chosen.into_iter().map(|claimed| (claimed.peer.subnet, claimed.peer)).collect();
        if peers.independent {
            peers.vteps = peers
                .usable
                .values()
                .filter_map(|peer| vtep_of(context, peer))
                .map(|vtep| (vtep, ()))
                .collect();
        }
        peers
    }

    fn count(&mut self, reason: SkipReason) {
        *self.reasons.entry(reason).or_default() += 1;
    }

    /// Leaves out what can't be read, under its key.
    fn leave_out(&mut self, key: String, malformed: &Malformed) {
        if self.skipped.insert(key, malformed.why.clone()).is_none() {
            self.count(SkipReason::Malformed);
        }
    }

    fn skip(
        &mut self,
        network: &NetworkConfig,
        lease: &Lease,
        family: Option<Family>,
        reason: SkipReason,
        why: String,
    ) {
        self.count(reason);
        let family = family.filter(|_| network.ranges().count() > 1);
        let why = family.map_or_else(|| why.clone(), |family| format!("{family}: {why}"));
        let entry = self.skipped.entry(key_of(lease)).or_default();
        if !entry.is_empty() {
            entry.push_str("; ");
        }
        entry.push_str(&why);
    }
}

/// The tunnel endpoint of a peer that is reached by one.
fn vtep_of(context: PeerContext<'_>, peer: &Peer) -> Option<(Family, Mac)> {
    context.active.leads_to_vteps(peer.backend).then(|| (Family::of(peer.public), peer.mac))
}

/// The key by which a lease that is left out is named.
fn key_of(lease: &Lease) -> String {
    format_key(&lease.subnets).unwrap_or_else(|| lease.subnets.to_string())
}

/// What this node had before a family came or went is its own as well.
fn is_own(own: &Lease, lease: &Lease) -> bool {
    lease.subnets == own.subnets
        || lease.public.same_node(&own.public)
            && lease.subnets.iter().any(|subnet| own.subnets.iter().any(|mine| mine == subnet))
}

fn fits_lengths(network: &NetworkConfig, lease: &Lease) -> bool {
    network.ranges().all(|range| {
        let family = Family::of(range.network.addr());
        lease.subnets.get(family).is_none_or(|subnet| subnet.prefix_len() == range.subnet_len)
    })
}

/// A peer and whether it is only reached as before, or why there is none.
type Outcome = Result<(Peer, bool), (SkipReason, String)>;

/// Says what a lease is by itself, for each family that is enabled, or once if it has none of them.
fn judge_alone(
    context: PeerContext<'_>,
    lease: &Lease,
    keys: &BTreeMap<IpNet, WireguardPeer>,
    mut found: impl FnMut(Option<Family>, Outcome),
) {
    let network = context.network;
    let mut any = false;
    for family in Family::BOTH {
        let (Some(range), Some(subnet)) = (network.range(family), lease.subnets.get(family)) else {
            continue;
        };
        any = true;
        found(Some(family), examine(context, range.network, lease, subnet, keys));
    }
    if !any {
        let why = format!("it has no subnet of a family that is enabled ({})", network.networks());
        found(None, Err((SkipReason::Family, why)));
    }
}

/// One family of a lease that is right as long as no other one contradicts it.
struct Claimed<'a> {
    lease: &'a Lease,
    peer: Peer,
    /// It announces something unknown and is reached as before.
    kept: bool,
}

/// Those that a rule leaves, and those that it doesn't, with the reason.
type Sorted<'a> = (Vec<Claimed<'a>>, Vec<(Claimed<'a>, String)>);

/// Says which of these can't be used together with the others.
type Rule = for<'a> fn(PeerContext<'_>, Vec<Claimed<'a>>) -> Sorted<'a>;

/// What is wrong with one family of a lease, independent of the others; or the peer, and whether it is only
/// reached as before.
fn examine(
    context: PeerContext<'_>,
    network: IpNet,
    lease: &Lease,
    subnet: IpNet,
    keys: &BTreeMap<IpNet, WireguardPeer>,
) -> Outcome {
    let PeerContext { former, own, active, surroundings, .. } = context;
    let family = Family::of(subnet.addr());
    let Some(Reached { backend, mac, kept }) = reached(context, lease, subnet) else {
        let name = |attachment: &Attachment| match attachment.type_name() {
            "" => "udp".to_owned(),
            name => name.to_owned(),
        };
        let why = format!(
            "its backend is {}, this node's is {}: both need the same",
            name(&lease.attachment),
            active.name()
        );
        return Err((SkipReason::Backend, why));
    };
    if !network.contains(&subnet) && !former.iter().any(|former| former.contains(&subnet)) {
        return Err((SkipReason::Network, format!("it lies outside the network {network}")));
    }
    if let Some(mine) = own.subnets.get(family).filter(|mine| overlap(*mine, subnet)) {
        return Err((SkipReason::Overlap, format!("it overlaps this node's own subnet {mine}")));
    }
    let no_address = || (SkipReason::Address, "it has no public address".to_owned());
    let public = lease.public.get(family).ok_or_else(no_address)?;
    if Some(public) == own.public.get(family) {
        let why = format!(
            "its public address {public} is this node's own: an old lease of this node, or a node with a duplicate address"
        );
        return Err((SkipReason::Address, why));
    }
    let networks: Vec<IpNet> = context.network.networks().iter().chain(former.iter().copied()).collect();
    if let Some(why) = surroundings.unreachable(public, &networks) {
        return Err((SkipReason::Address, format!("its public address {public} {why}")));
    }
    if let Some(why) = surroundings.covered(subnet) {
        let why = format!(
            "{why}: a route to it would cut that off; give the node another subnet, with a network that does not \
             overlap that of the nodes"
        );
        return Err((SkipReason::Overlap, why));
    }
    let mac = match (lease.attachment.announced(), mac) {
        (_, Some(mac)) => mac,
        (Attachment::Vxlan { .. }, None) if active.leads_to_vteps(backend) => {
            vtep(own, lease, family).map_err(|why| (SkipReason::Mac, why))?
        }
        (_, None) => Mac([0; 6]),
    };
    let former = keys.get(&subnet).copied();
    let sealed = backend == active.current_id();
    let wireguard = if kept { former } else { key_or(former, active, lease, family, sealed)? };
    Ok((Peer { subnet, public, mac, wireguard, backend }, kept))
}

/// The keys of peers that have moved on to another backend and don't say them any more.
fn former_keys(context: PeerContext<'_>, leases: &[&Lease]) -> BTreeMap<IpNet, WireguardPeer> {
    let moved = context.active.identities().next().is_some()
        && leases.iter().any(|lease| !matches!(lease.attachment, Attachment::Wireguard(_)));
    if moved { known(context.before) } else { BTreeMap::new() }
}

/// What the peer says for WireGuard, tells in advance, or said before it moved on to another backend. `sealed`: it is reached by the
/// current backend.
fn key_or(
    former: Option<WireguardPeer>,
    active: &ActiveBackends,
    lease: &Lease,
    family: Family,
    sealed: bool,
) -> Result<Option<WireguardPeer>, (SkipReason, String)> {
    let needed = || wireguard(active, lease, family).map(Some).map_err(|why| (SkipReason::Key, why));
    match lease.attachment {
        Attachment::Wireguard(_) => needed(),
        Attachment::Preparing(_) if sealed && active.current().identity().is_some() => needed(),
        // A key that can't be used costs the peer nothing as long as it announces another backend.
        Attachment::Preparing(_) if active.current().identity().is_some() => {
            Ok(wireguard(active, lease, family).ok().or(former))
        }
        _ => Ok(former),
    }
}

/// What the peer says for WireGuard, or tells in advance.
fn wireguard(active: &ActiveBackends, lease: &Lease, family: Family) -> Result<WireguardPeer, String> {
    let of = |family| lease.attachment.wireguard(family).or(lease.attachment.prepared(family));
    let data = of(family).ok_or("it announces no public key (BackendData)")?;
    if active.identities().any(|own| own == data.key) {
        return Err(format!(
            "its PublicKey {} is this node's own: two nodes have the same key file (a copied disk?); remove it on one of \
             them (wgkey in /run/flannel and /var/lib/flannel, or WIREGUARD_KEY_FILE) and restart flanneld there",
            data.key
        ));
    }
    let main_port = Family::BOTH.into_iter().find_map(of).and_then(|data| data.port);
    let opening = active.opening(&lease.subnets);
    Ok(WireguardPeer { key: data.key, port: data.port, main_port, public: lease.public, opening })
}

/// The peer's tunnel endpoint.
fn vtep(own: &Lease, lease: &Lease, family: Family) -> Result<Mac, String> {
    let mac = lease.attachment.vtep(family).ok_or("it announces no tunnel endpoint (BackendData)")?.mac;
    if !mac.is_unicast() {
        return Err(format!("its VtepMAC {mac} can't be the address of a device"));
    }
    if own.attachment.vtep(family).is_some_and(|mine| mine.mac == mac) {
        return Err(format!("its VtepMAC {mac} is this node's own"));
    }
    Ok(mac)
}

/// Leaves out the subnets that contain the public address of a peer: packets to that node would be taken for
/// packets to a pod.
fn uncovered<'a>(_: PeerContext<'_>, claimed: Vec<Claimed<'a>>) -> Sorted<'a> {
    let publics: BTreeSet<(Family, u128)> =
        claimed.iter().map(|one| (Family::of(one.peer.public), bits_of(one.peer.public))).collect();
    let covered = |subnet: IpNet| {
        let family = Family::of(subnet.addr());
        let (first, last) = (bits_of(subnet.network()), bits_of(subnet.broadcast()));
        publics.range((family, first)..=(family, last)).next().map(|(family, bits)| addr_of(*family, *bits))
    };
    partition(claimed, |one| {
        let public = covered(one.peer.subnet)?;
        Some(format!(
            "it contains the public address {public} of a node: a route to it would cut that node off"
        ))
    })
}

/// Of subnets that overlap leaves the first. A node has one subnet in two leases if the network of its other family
/// has moved: of those the one written last is left, and nothing is wrong with the other.
fn first_of_overlapping<'a>(_: PeerContext<'_>, claimed: Vec<Claimed<'a>>) -> Sorted<'a> {
    // By first address, per family, none overlapping another; with the index in `kept`.
    let mut taken: BTreeMap<(Family, u128), usize> = BTreeMap::new();
    let (mut kept, mut refused): (Vec<Claimed<'a>>, _) = (Vec::with_capacity(claimed.len()), Vec::new());
    for one in claimed {
        let (subnet, family) = (one.peer.subnet, Family::of(one.peer.subnet.addr()));
        let before = taken.range(..=(family, bits_of(subnet.broadcast()))).next_back();
        let before = before.and_then(|(_, index)| kept.get_mut(*index));
        match before.filter(|before| overlap(before.peer.subnet, subnet)) {
            None => {
                taken.insert((family, bits_of(subnet.network())), kept.len());
                kept.push(one);
            }
            Some(other) if other.peer.subnet == subnet && other.lease.public.same_node(&one.lease.public) => {
                if (other.lease.written, other.lease.created) < (one.lease.written, one.lease.created) {
                    *other = one;
                }
            }
            Some(other) => {
                let why =
                    format!("it overlaps {}, which has the right length or is older", other.peer.subnet);
                refused.push((one, why));
            }
        }
    }
    (kept, refused)
}

/// The forwarding database has one entry for a MAC, so two nodes can't share one. A node that has moved leaves
/// its old lease behind: the one written last is the living one.
fn last_written_of_a_mac<'a>(context: PeerContext<'_>, claimed: Vec<Claimed<'a>>) -> Sorted<'a> {
    let mut holders: BTreeMap<(Family, Mac), Holder> = BTreeMap::new();
    let has_vtep = |one: &Claimed<'_>| context.active.leads_to_vteps(one.peer.backend) && !one.kept;
    for one in claimed.iter().filter(|one| has_vtep(one)) {
        let Peer { public, mac, .. } = one.peer;
        let current = context.undecided.contains(&mac)
            && context.before.fdb.iter().any(|((_, known), dst)| *known == mac && *dst == public);
        let mine = Holder { current, written: one.lease.written, public };
        let holder = holders.entry((Family::of(public), mac)).or_insert(mine);
        if (mine.current, mine.written) > (holder.current, holder.written) {
            *holder = mine;
        }
    }
    partition(claimed, |one| {
        let holder = holders.get(&(Family::of(one.peer.public), one.peer.mac)).filter(|_| has_vtep(one))?;
        (holder.public != one.peer.public).then(|| {
            let (mac, public) = (one.peer.mac, holder.public);
            format!("its VtepMAC {mac} is that of the node at {public}, whose lease was written later")
        })
    })
}

/// Which node a MAC is at.
#[derive(Clone, Copy)]
struct Holder {
    /// It is undecided, and this is where it was.
    current: bool,
    written: u64,
    public: IpAddr,
}

/// A tunnel has one peer for a key, so two nodes can't share one: the one whose lease was written last is the living one.
fn last_written_of_a_key<'a>(_: PeerContext<'_>, claimed: Vec<Claimed<'a>>) -> Sorted<'a> {
    let mut holders: BTreeMap<PublicKey, &Lease> = BTreeMap::new();
    for one in &claimed {
        if let Some(data) = one.peer.wireguard {
            let holder = holders.entry(data.key).or_insert(one.lease);
            if one.lease.written > holder.written {
                *holder = one.lease;
            }
        }
    }
    partition(claimed, |one| {
        let key = one.peer.wireguard?.key;
        let holder = holders.get(&key).filter(|holder| holder.subnets != one.lease.subnets)?;
        (!holder.public.same_node(&one.lease.public)).then(|| {
            format!(
                "its PublicKey {key} is that of the node {}, whose lease was written later",
                holder.public
            )
        })
    })
}

fn partition<'a>(
    claimed: Vec<Claimed<'a>>,
    mut refusal: impl FnMut(&Claimed<'a>) -> Option<String>,
) -> Sorted<'a> {
    let (mut kept, mut refused) = (Vec::with_capacity(claimed.len()), Vec::new());
    for one in claimed {
        match refusal(&one) {
            None => kept.push(one),
            Some(why) => refused.push((one, why)),
        }
    }
    (kept, refused)
}

#[cfg(test)]
mod tests;
