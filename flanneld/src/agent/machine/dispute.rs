//! MACs that more than one node announces: who keeps one, and how long peers wait until that is settled.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use subnet::{Family, Lease, Leases, Mac};
use tokio::time::Instant;

use super::Machine;

/// A living node whose MAC somebody else announces writes its lease again, or takes another MAC, well within this.
/// Until then packets go where they went.
const GRACE: Duration = Duration::from_secs(3);
/// The lease is not written more often than this for the sake of a MAC.
const APART: Duration = Duration::from_secs(10);

/// What is known about disputed MACs.
#[derive(Debug, Default)]
pub(super) struct Disputes {
    /// Since when each is disputed.
    since: BTreeMap<Mac, Instant>,
    /// When the own lease was last written because of one.
    asserted: Option<Instant>,
}

impl Disputes {
    /// Takes note of what is disputed now. Says which of it is not decided yet, and when the next of that will be.
    pub(super) fn weigh_at(
        &mut self,
        disputed: &BTreeSet<Mac>,
        now: Instant,
    ) -> (BTreeSet<Mac>, Option<Instant>) {
        self.since.retain(|mac, _| disputed.contains(mac));
        for mac in disputed {
            self.since.entry(*mac).or_insert(now);
        }
        let open = self.since.iter().filter(|(_, since)| now - **since < GRACE);
        let next = open.clone().map(|(_, since)| *since + GRACE).min();
        (open.map(|(mac, _)| *mac).collect(), next)
    }
}

/// What to do about another lease with a MAC or a key of ours.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// That one was there first: take another MAC, or another key.
    Renounce,
    /// This one was: write it again, so that peers see which of the two is living.
    Assert,
    /// It is the one written last already.
    Nothing,
}

pub(super) fn answer(own: &Lease, rival: &Lease) -> Answer {
    if (rival.created, rival.subnets) < (own.created, own.subnets) {
        Answer::Renounce
    } else if rival.written >= own.written {
        Answer::Assert
    } else {
        Answer::Nothing
    }
}

impl Machine {
    /// Makes sure that no other living node announces this node's MAC.
    pub(super) fn defend_macs(&mut self, all: &Leases) {
        let Some(lease) = self.own.lease() else { return };
        if self.own.contest.loss().is_some() || self.own.is_recalled() || self.own.claiming.is_running() {
            return;
        }
        let Some(own) = all.leases.get(&lease.subnets).filter(|now| *now == lease).cloned() else { return };
        for family in Family::BOTH {
            let Some(mac) = own.attachment.vtep(family).map(|vtep| vtep.mac) else { continue };
            let rivals = all.leases.values().filter(|other| {
                other.attachment.vtep(family).is_some_and(|vtep| vtep.mac == mac)
                    && !other.public.same_node(&own.public)
            });
            for rival in rivals {
                match answer(&own, rival) {
                    Answer::Nothing => {}
                    Answer::Renounce => {
                        tracing::warn!(
                            "{rival} has the VtepMAC {mac} too and is older (a copy of this machine, or its lease from before it \
                             was renamed): this node takes another MAC"
                        );
                        self.own.identity.renounce(family);
                        break;
                    }
                    Answer::Assert => {
                        let now = self.now().at;
                        if self.own.disputes.asserted.is_none_or(|at| now - at >= APART) {
                            self.own.disputes.asserted = Some(now);
                            tracing::warn!(
                                "{rival} has this node's VtepMAC {mac} too: the own lease is written again"
                            );
                            self.start_claim();
                        }
                        return;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use subnet::Attachment;

    #[test]
    fn the_older_lease_keeps_the_mac_and_is_the_one_written_last() {
        let lease = |subnet: &str, created, written| Lease {
            subnets: [subnet.parse().unwrap()].into_iter().collect(),
            public: Default::default(),
            attachment: Attachment::HostGw,
            created,
            written,
        };
        let (old, young) = (lease("10.1.1.0/24", 1, 1), lease("10.1.2.0/24", 2, 2));
        assert_eq!(answer(&young, &old), Answer::Renounce);
        assert_eq!(answer(&old, &young), Answer::Assert);
        assert_eq!(answer(&lease("10.1.1.0/24", 1, 3), &young), Answer::Nothing);
        // Of the same age one of them gives way all the same.
        let twin = lease("10.1.2.0/24", 1, 1);
        assert_eq!((answer(&old, &twin), answer(&twin, &old)), (Answer::Assert, Answer::Renounce));
    }

    #[test]
    fn a_dispute_is_decided_after_a_while_and_forgotten_when_it_ends() {
        let (mut disputes, mac) = (Disputes::default(), Mac([2, 0, 0, 0, 0, 1]));
        let (disputed, mut now) = (BTreeSet::from([mac]), Instant::now());
        assert_eq!(disputes.weigh_at(&disputed, now), (disputed.clone(), Some(now + GRACE)));
        now += GRACE;
        assert_eq!(disputes.weigh_at(&disputed, now), (BTreeSet::new(), None));
        disputes.weigh_at(&BTreeSet::new(), now);
        assert_eq!(disputes.weigh_at(&disputed, now).0, disputed);
    }
}
