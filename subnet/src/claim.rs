//! What a claim means, for every store alike: which subnets a node takes, and whether it still has them.

use ipnet::IpNet;

use crate::allocate::allocate;
use crate::config::{NetworkConfig, Range};
use crate::lease::{Lease, Leases, format_key};
use crate::net::{Family, Subnets, overlap};
use crate::store::{Claim, Loss, StoreError, random_below};

/// What has become of the lease that a node holds, seen from the store.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is there and ours.
    Kept,
    /// It is gone and no other node has taken it: put it back.
    Deleted,
    /// Somebody else has it.
    Lost(Loss),
}

/// Compares the lease that a node holds with what the store has now.
pub(crate) fn judge(mine: &Lease, now: Option<&Lease>) -> Verdict {
    match now {
        None => Verdict::Deleted,
        Some(now) if now.public == mine.public && now.attachment == mine.attachment => Verdict::Kept,
        Some(now) if now.public.same_node(&mine.public) => {
            Verdict::Lost(Loss::Contested { subnets: mine.subnets, public: mine.public })
        }
        Some(now) => Verdict::Lost(Loss::Taken { subnets: mine.subnets, holder: now.public }),
    }
}

/// What a node should claim.
#[derive(Debug)]
pub(crate) struct Choice {
    pub(crate) subnets: Subnets,
    /// The lease that the node has already, kept or not.
    pub(crate) known: Option<Lease>,
    /// Whether the claim takes the place of `known`, which has other subnets and then must go in the same
    /// step. Otherwise such a lease ends by itself: pods may still use what the network has moved away from.
    pub(crate) replaces: bool,
}

/// Whether the network of a family has moved away from a lease. Such a lease stays whole, also where the claim that
/// follows it keeps the subnet of the other family: a lease of one family alone would end Go nodes with both families
/// that look for a free subnet, and one of IPv6 alone has the IPv4 subnet `0.0.0.0/0` for them (contract §9 B18).
fn moved_away(network: &NetworkConfig, lease: &Lease) -> bool {
    let outside = |subnet: IpNet| {
        let range = network.range(Family::of(subnet.addr()));
        range.is_some_and(|range| !overlap(range.network, subnet))
    };
    lease.subnets.iter().any(outside)
}

/// The other leases of a node in which its pods still are: they get a new time to live with each claim, and what the
/// node announces now.
pub(crate) fn still_used<'a>(
    claim: &'a Claim<'_>,
    choice: &'a Choice,
    leases: &'a Leases,
) -> impl Iterator<Item = &'a Lease> {
    let own = move |lease: &&Lease| {
        let before = choice.known.as_ref().map(|known| known.public);
        lease.public.same_node(&claim.public) || before.is_some_and(|before| lease.public.same_node(&before))
    };
    let used = move |lease: &&Lease| lease.subnets.iter().any(|subnet| claim.left.contains(&subnet));
    let other = move |lease: &&Lease| {
        let replaced =
            choice.replaces && choice.known.as_ref().is_some_and(|known| known.subnets == lease.subnets);
        lease.subnets != choice.subnets && !replaced
    };
    leases.leases.values().filter(used).filter(own).filter(other)
}

/// What a claim leaves behind if its node is interrupted between taking a lease and removing the one before: the
/// node's other leases that share an address with what it took, and are not kept for pods.
#[cfg(feature = "file")]
pub(crate) fn leftovers<'a>(
    network: &'a NetworkConfig,
    claim: &'a Claim<'_>,
    taken: Subnets,
    leases: &'a Leases,
) -> impl Iterator<Item = &'a Lease> {
    let kept = move |lease: &Lease| {
        moved_away(network, lease) || lease.subnets.iter().any(|subnet| claim.left.contains(&subnet))
    };
    let own = leases.by_public(&claim.public);
    own.filter(move |lease| lease.subnets != taken && lease.subnets.overlaps(&taken) && !kept(lease))
}

/// The subnets to claim, in the order of [`LeaseStore::acquire`], each family for itself. `None` when
/// nothing is free.
///
/// [`LeaseStore::acquire`]: crate::store::LeaseStore::acquire
pub(crate) fn choose(
    network: &NetworkConfig,
    claim: &Claim<'_>,
    held: Option<&Lease>,
    leases: &Leases,
) -> Option<Choice> {
    let held = held.and_then(|held| {
        leases.leases.get(&held.subnets).filter(|now| judge(held, Some(now)) == Verdict::Kept)
    });
    // What this node can prove to be its own goes before what has its address: that may be another's old one.
    let moved = leases.leases.values().filter(|lease| claim.recognises(lease));
    let candidates = held.into_iter().chain(moved).chain(leases.by_public(&claim.public));
    // The first of those of which most can be kept.
    let known = candidates.min_by_key(|known| {
        let keep = keepable(network, claim, known, leases);
        (keep != known.subnets || !network.allows(&keep), std::cmp::Reverse(keep.iter().count()))
    });
    let mut subnets = known.map(|known| keepable(network, claim, known, leases)).unwrap_or_default();
    let keeps = !subnets.is_empty();
    for range in network.ranges() {
        let family = Family::of(range.network.addr());
        let free = |wanted: &IpNet| {
            let taken = || leases.taken().filter_map(|taken| taken.get(family));
            range.allows(*wanted)
                && !reserved(claim, *wanted)
                && !taken().any(|taken| overlap(taken, *wanted))
        };
        if let (None, Some(previous)) = (subnets.get(family), claim.previous.get(family).filter(free)) {
            subnets.set(previous);
        }
    }
    // The place of a lease that does not fit any more is used if there is no other.
    let others = || leases.taken().filter(|taken| known.is_none_or(|known| known.subnets != *taken));
    let known_public = known.map(|known| known.public).unwrap_or_default();
    let strangers = leases.leases.values().map(|lease| lease.public).filter(|public| *public != known_public);
    let publics =
        strangers.flat_map(|public| Family::BOTH.into_iter().filter_map(move |family| public.get(family)));
    let avoided: Vec<IpNet> = claim.reserved.iter().copied().chain(publics.map(IpNet::from)).collect();
    let apart = |taken: Vec<Subnets>, avoided: &[IpNet]| {
        let avoided = avoided.iter().map(|net| [*net].into_iter().collect());
        allocate(network, subnets, taken.into_iter().chain(avoided), random_below)
    };
    let with_lans: Vec<IpNet> = avoided.iter().chain(claim.lans).copied().collect();
    let subnets = apart(leases.taken().collect(), &with_lans)
        .or_else(|| apart(leases.taken().collect(), &avoided))
        .or_else(|| apart(others().collect(), &avoided))?;
    // One that the network allows was not kept because an older one has its place.
    let usurped =
        |known: &Lease| network.ranges().any(|range| known.subnets.iter().any(|subnet| range.allows(subnet)));
    let replaces = known.is_some_and(|known| {
        known.subnets != subnets
            && !moved_away(network, known)
            && (keeps || usurped(known) || known.subnets.overlaps(&subnets))
    });
    Some(Choice { subnets, known: known.cloned(), replaces })
}

/// Whether a subnet contains an address that is not a pod's.
fn reserved(claim: &Claim<'_>, subnet: IpNet) -> bool {
    claim.reserved.iter().any(|net| overlap(*net, subnet))
}

/// Those subnets that a node may keep of a lease that it has: the network allows them, no older lease of
/// another node overlaps them, and they contain no address of the host itself.
fn keepable(network: &NetworkConfig, claim: &Claim<'_>, known: &Lease, leases: &Leases) -> Subnets {
    let allowed = |subnet: IpNet| {
        let range = network.range(Family::of(subnet.addr()))?;
        (range.allows(subnet) && !reserved(claim, subnet)).then_some(subnet)
    };
    let older = |other: &&Lease| other.created < known.created && !other.public.same_node(&known.public);
    let usurped = |subnet: &IpNet| {
        let older = leases.leases.values().filter(older);
        older.flat_map(|other| other.subnets.iter()).filter_map(allowed).any(|other| overlap(other, *subnet))
    };
    known.subnets.iter().filter_map(allowed).filter(|subnet| !usurped(subnet)).collect()
}

/// Who stands in the way of putting a lease back that is not there any more. Another lease of this node doesn't:
/// pods are in a subnet that the network has moved away from.
pub(crate) fn rival(mine: &Lease, leases: &Leases) -> Option<Loss> {
    let own =
        |taken: &Subnets| leases.leases.get(taken).is_some_and(|lease| lease.public.same_node(&mine.public));
    let other = |taken: &Subnets| *taken != mine.subnets && taken.overlaps(&mine.subnets) && !own(taken);
    let subnets = leases.taken().find(other)?;
    let holder = leases.leases.get(&subnets).map(|lease| lease.public).unwrap_or_default();
    Some(Loss::Taken { subnets: mine.subnets, holder })
}

/// The error for a network without a free subnet, with the lease that takes all of it alone if there is one.
pub(crate) fn exhausted(network: &NetworkConfig, leases: &Leases) -> StoreError {
    let ranges = network.ranges().map(|range| {
        let Range { network, subnet_len, min, max } = range;
        let family = Family::of(network.addr());
        let prefix = if family == Family::V4 { "" } else { "IPv6" };
        let whole = |taken: &Subnets| {
            taken.get(family).is_some_and(|taken| taken.contains(min) && taken.contains(max))
        };
        let by = leases.taken().find(whole).filter(|_| min != max).and_then(|taken| format_key(&taken));
        let by = by.map(|key| format!(" (all of them by the one lease {key})")).unwrap_or_default();
        format!(
            "every /{subnet_len} of {network} from {prefix}SubnetMin {min} to {prefix}SubnetMax {max}{by}"
        )
    });
    StoreError::Exhausted { ranges: ranges.collect::<Vec<_>>().join(" or ") }
}

/// Refuses a node that could not be recognised again: Flannel's stores know nodes by their IPv4 address,
/// and by IPv6 only where there is no IPv4.
#[cfg(any(feature = "etcd", feature = "file"))]
pub(crate) fn require_public(
    network: &NetworkConfig,
    public: &crate::net::PublicAddrs,
    store: &str,
) -> Result<(), StoreError> {
    let (family, flag) = match network.range(Family::V4) {
        Some(_) => (Family::V4, "--public-ip"),
        None => (Family::V6, "--public-ipv6"),
    };
    match public.get(family) {
        Some(_) => Ok(()),
        None => Err(StoreError::Unusable(format!(
            "{store} recognises a node by its public {family} address and this node has none: give one with {flag} or --iface"
        ))),
    }
}

#[cfg(test)]
#[path = "claim/tests.rs"]
mod tests;
