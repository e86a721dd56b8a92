//! How a node goes on to WireGuard while packets flow: it tells its key while it still announces the former backend, has handshakes
//! with the peers that tell theirs, and announces WireGuard then.
//!
//! The kernel's module forgets the handshake that it began when the peer's initiation arrives (`wg_noise_handshake_consume_initiation`).
//! If two nodes begin at the same time, neither gets a session, and both try again five seconds later; they do so at the same time
//! again if packets take longer from one to the other than the third of a second by which the module varies that. So of two nodes
//! only the one with the smaller key begins, and neither sends packets by the tunnel before there is a session. Both have been
//! told the keys by then, and the former backend carries the packets.
//!
//! ```text
//! this node    the peer     with a session            without one
//! prepares     prepares     by the former backend     by the former backend
//! prepares     announces    by WireGuard              by the former backend
//! announces    prepares     by WireGuard              by the former backend
//! announces    announces    by WireGuard              by WireGuard
//! ```
//!
//! A node that announces WireGuard has changed its own routes before. So once both announce it nothing is readable between them.
//!
//! A node that does not have the backend that a preparing peer announces (it has joined with WireGuard alone) sends by WireGuard with
//! or without a session, since nothing else leads to that peer.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use subnet::wireguard::PublicKey;
use subnet::{Attachment, BackendConfig, Family, Lease, Leases, Mac, Subnets};

use super::{ActiveBackend, ActiveBackends};
use crate::plan::backend::BackendId;
use crate::state::KernelState;
use crate::state::name::Name;
use crate::wg::Opening;

/// For so long a node waits for keys of others: a changed configuration reaches them at the same moment.
const LISTEN: Duration = Duration::from_secs(2);
/// So long after two nodes can know each other's key, one of them begins. What it sends to a peer that does not know its key yet is
/// lost, and the module repeats it after five seconds only.
const LEAD: Duration = Duration::from_millis(500);
/// A node that began a handshake has the session before the other one, and waits so long until that has it, too.
const SETTLE: Duration = Duration::from_secs(1);
/// No longer than this a node waits for sessions: two repetitions of an initiation.
const LIMIT: Duration = Duration::from_secs(15);
/// A peer that still prepares after so long is not there any more.
const GONE: Duration = Duration::from_secs(30);
/// Sessions are looked at again after so long …
const AGAIN: Duration = Duration::from_millis(250);
/// … or after so many times what the last look took: the kernel tells of all peers of a device, of which there may be thousands.
const PAUSE: u32 = 20;

/// How far this node is, and the peers with which it is not over.
#[derive(Clone, Debug, Default)]
pub(super) struct Preparation {
    stage: Stage,
    /// Of this node and each of these at least one prepares.
    pairs: BTreeMap<Subnets, KeyedPeer>,
}

/// What this node announces.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stage {
    /// The current backend.
    #[default]
    Announced,
    /// The former one. The store does not have the key yet.
    Untold { former: BackendId },
    /// The former one, with the key since then.
    Told { former: BackendId, since: Instant },
}

/// A peer that has told its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct KeyedPeer {
    key: PublicKey,
    /// It announces WireGuard already.
    announced: bool,
    /// Since when both keys are in the store, as far as this node knows.
    since: Option<Instant>,
    /// Since when there is a session for each family of its pods.
    session: Option<Instant>,
    opening: Opening,
}

/// What follows from the keys in leases.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HeardKeys {
    /// When to ask again.
    pub again: Option<Instant>,
    /// The preparation has ended now, and there is no session with so many peers.
    pub ended_without: Option<usize>,
}

/// With which peers there are sessions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FoundSessions {
    /// The subnets of these peers.
    pub with: BTreeSet<IpNet>,
    /// When that was looked at last, and how long it took; `None`: never.
    pub looked: Option<(Instant, Duration)>,
}

impl FoundSessions {
    /// When to look again; `None`: now.
    pub fn again(&self) -> Option<Instant> {
        self.looked.map(|(at, took)| at + AGAIN.max(took * PAUSE))
    }
}

/// From what the next stage follows.
struct Facts<'a> {
    own: PublicKey,
    lease: &'a Lease,
    all: &'a Leases,
    /// The families of the packets that the tunnels carry.
    carried: BTreeSet<Family>,
    sessions: &'a FoundSessions,
    now: Instant,
}

impl Stage {
    fn former(self) -> Option<BackendId> {
        match self {
            Self::Announced => None,
            Self::Untold { former } | Self::Told { former, .. } => Some(former),
        }
    }

    /// After the store was read: it may have the key now.
    fn heard(self, own: PublicKey, lease: &Lease, now: Instant) -> Self {
        let of = |family| lease.attachment.prepared(family).or(lease.attachment.wireguard(family));
        let told = Family::BOTH.into_iter().find_map(of).is_some_and(|data| data.key == own);
        match self {
            Self::Untold { former } if told => Self::Told { former, since: now },
            other => other,
        }
    }

    /// Whether the preparation is over: there is a session with each peer that has told its key, or it is waited no longer.
    fn is_over(self, lacking: usize, now: Instant) -> bool {
        match self {
            Self::Told { since, .. } => now >= since + if lacking == 0 { LISTEN } else { LIMIT },
            Self::Announced | Self::Untold { .. } => false,
        }
    }
}

impl Preparation {
    fn hear(&mut self, facts: &Facts<'_>) -> HeardKeys {
        let now = facts.now;
        self.stage = self.stage.heard(facts.own, facts.lease, now);
        self.pair(facts);
        let settled = |pair: &KeyedPeer| pair.session.is_some_and(|since| now >= since + SETTLE);
        let lacking = self.pairs.values().filter(|pair| !settled(pair)).count();
        let over = self.stage.is_over(lacking, now);
        if over {
            self.stage = Stage::Announced;
            self.pair(facts);
        }
        let later = |at: Option<Instant>, wait: Duration| at.map(|at| at + wait).filter(|at| *at > now);
        let of_pair = |pair: &KeyedPeer| {
            [later(pair.since, LEAD), later(pair.since, GONE), later(pair.session, SETTLE)]
        };
        let of_pairs = self.pairs.values().flat_map(of_pair);
        let told = match self.stage {
            Stage::Told { since, .. } => Some(since),
            Stage::Announced | Stage::Untold { .. } => None,
        };
        let missing = self.pairs.values().any(|pair| pair.session.is_none() && pair.opening != Opening::Over);
        let poll = missing.then(|| facts.sessions.again().filter(|at| *at > now).unwrap_or(now + AGAIN));
        let own = [later(told, LISTEN), later(told, LIMIT), poll];
        HeardKeys {
            again: own.into_iter().chain(of_pairs).flatten().min(),
            ended_without: over.then_some(lacking),
        }
    }

    /// Takes in which peers there are.
    fn pair(&mut self, facts: &Facts<'_>) {
        let before = std::mem::take(&mut self.pairs);
        let preparing = self.stage != Stage::Announced;
        for (subnets, lease) in
            facts.all.leases.iter().filter(|(subnets, _)| **subnets != facts.lease.subnets)
        {
            let said = |of: fn(&Attachment, Family) -> Option<subnet::wireguard::WireguardData>| {
                Family::BOTH.into_iter().find_map(|family| of(&lease.attachment, family)).map(|data| data.key)
            };
            let (announced, prepared) = (said(Attachment::wireguard), said(Attachment::prepared));
            let Some(key) = prepared.or(announced.filter(|_| preparing)) else { continue };
            if key == facts.own || lease.public.same_node(&facts.lease.public) {
                continue;
            }
            let known = before.get(subnets).filter(|known| known.key == key);
            let told = !matches!(self.stage, Stage::Untold { .. });
            let since = told.then(|| known.and_then(|known| known.since).unwrap_or(facts.now));
            let pair = facts.pair(*subnets, key, prepared.is_none(), since);
            // Before the kernel has this key, a session is one of another key.
            let session = pair.session.filter(|_| known.is_some());
            let session = session.map(|now| known.and_then(|known| known.session).unwrap_or(now));
            self.pairs.insert(*subnets, KeyedPeer { session, ..pair });
        }
    }
}

impl Facts<'_> {
    fn pair(&self, subnets: Subnets, key: PublicKey, announced: bool, since: Option<Instant>) -> KeyedPeer {
        let mut carried =
            subnets.iter().filter(|subnet| self.carried.contains(&Family::of(subnet.addr()))).peekable();
        let session = carried.peek().is_some() && carried.all(|subnet| self.sessions.with.contains(&subnet));
        let opening = match since {
            Some(since) if self.now >= since + GONE => Opening::Over,
            Some(since) if self.now >= since + LEAD && self.own < key => Opening::Here,
            _ => Opening::There,
        };
        let session = (session && opening != Opening::Over).then_some(self.now);
        KeyedPeer { key, announced, since, session, opening }
    }
}

impl ActiveBackends {
    /// Takes in what leases say about keys, and with which peers there are sessions.
    pub fn hear_keys(
        &mut self,
        all: &Leases,
        lease: &Lease,
        sessions: &FoundSessions,
        now: Instant,
    ) -> HeardKeys {
        let Some(own) = self.current().identity() else {
            self.preparation = Preparation::default();
            return HeardKeys::default();
        };
        let carried = self.current().devices().into_iter().map(|(family, _)| family).collect();
        self.preparation.hear(&Facts { own, lease, all, carried, sessions, now })
    }

    /// Whether it matters with which peers there are sessions.
    pub fn wants_sessions(&self) -> bool {
        self.preparation.pairs.values().any(|pair| pair.opening != Opening::Over)
    }

    /// The backend that this node announces while it prepares another one.
    pub fn announced_meanwhile(&self) -> Option<String> {
        self.preparation.stage.former().map(|_| self.announced().backend.words())
    }

    /// What this node announces.
    pub(super) fn announced(&self) -> &ActiveBackend {
        let former = self.preparation.stage.former();
        self.all.iter().find(|entry| Some(entry.id) == former).unwrap_or(&self.all[0])
    }

    /// What is to be prepared if `next` takes the place of this.
    pub(super) fn preparation_for(&self, next: &Self) -> Preparation {
        let former = self.announced();
        let goes_on = next.all.iter().skip(1).any(|entry| entry.id == former.id);
        let apart =
            matches!(former.config, BackendConfig::Extension(_)) || former.backend.identity().is_some();
        if next.current().identity().is_none() || !goes_on || apart {
            return Preparation::default();
        }
        match self.preparation.stage {
            Stage::Announced => {
                Preparation { stage: Stage::Untold { former: former.id }, pairs: BTreeMap::new() }
            }
            Stage::Untold { .. } | Stage::Told { .. } => self.preparation.clone(),
        }
    }

    /// Who begins the first handshake with the node that has these subnets.
    pub(crate) fn opening(&self, subnets: &Subnets) -> Opening {
        self.preparation.pairs.get(subnets).map_or(Opening::Either, |pair| pair.opening)
    }

    /// WireGuard, for a peer that only tells its key, where no backend of this node reaches what that peer announces: the peer takes
    /// what comes by a session, and waits for one before it announces WireGuard.
    pub(crate) fn reaching_by_prepared_key(&self, lease: &Lease) -> Option<BackendId> {
        let prepares = matches!(lease.attachment, Attachment::Preparing(_));
        (prepares && self.current().identity().is_some()).then(|| self.current_id())
    }

    /// Whether a device belongs to another backend than the current one.
    fn is_of_former(&self, device: Name) -> bool {
        let has = |entry: &ActiveBackend| entry.backend.devices().iter().any(|(_, name)| *name == device);
        self.all.iter().skip(1).any(has)
    }

    /// The backend, and the MAC there, by which a peer is reached other than it announces, because one of the two nodes prepares
    /// WireGuard, or has not even begun to. A peer accepts what this node announces, and what comes by a session that it has.
    pub(crate) fn meanwhile(
        &self,
        lease: &Lease,
        before: &KernelState,
        subnet: IpNet,
    ) -> Option<(BackendId, Mac)> {
        if self.current().identity().is_none() {
            // A node that leaves WireGuard reaches those that have not left it as it did: they know its key. Where not even the key
            // is told, after a restart, packets go as they did before, too.
            let sealed = matches!(lease.attachment, Attachment::Wireguard(_));
            if !sealed || device_to(before, subnet).is_some_and(|device| self.is_of_former(device)) {
                return None;
            }
            return Some((self.current_id(), self.current().previous_mac(before, subnet)?));
        }
        let pair = self.preparation.pairs.get(&lease.subnets)?;
        match (self.preparation.stage, pair.announced, pair.session.is_some()) {
            (Stage::Announced, false, true) => Some((self.current_id(), Mac([0; 6]))),
            (Stage::Untold { .. } | Stage::Told { .. }, true, false) => {
                let reached =
                    |entry: &ActiveBackend| Some((entry.id, entry.backend.previous_mac(before, subnet)?));
                self.all.iter().skip(1).find_map(reached)
            }
            _ => None,
        }
    }
}

/// The device by which packets for a subnet went: that of its own route, or of one for more.
fn device_to(before: &KernelState, subnet: IpNet) -> Option<Name> {
    let wider = std::iter::successors(Some(subnet), IpNet::supernet);
    wider.filter_map(|net| before.routes.get(&net)).find_map(|route| route.dev)
}

#[cfg(test)]
mod tests;
