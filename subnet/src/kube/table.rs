//! All nodes that Flannel manages, by name, and the leases that follow from them.

use std::collections::BTreeMap;
use std::collections::btree_map;

use super::node::{Entry, Given, Node, Seen};
use crate::lease::{Attachment, Lease, Leases, Malformed};
use crate::net::Family;
use crate::text::shortened;

/// What is kept of the cluster between two events.
#[derive(Debug, Default)]
pub(super) struct Table(BTreeMap<Box<str>, Entry>);

impl Table {
    /// Takes in what a node says now; whether that is news. `before` is the table that this one
    /// replaces, if it is one that replaces another.
    pub(super) fn put(&mut self, name: &str, seen: Option<Seen>, before: Option<&Self>) -> bool {
        let entry = match seen {
            None => return self.remove(name),
            Some(Seen::Settled(entry)) => entry,
            Some(Seen::Changing(entry)) => match before.unwrap_or(self).0.get(name) {
                Some(known) => known.clone(),
                None => entry,
            },
        };
        match self.0.get_mut(name) {
            Some(known) if *known == entry => false,
            Some(known) => {
                *known = entry;
                true
            }
            None => {
                self.0.insert(name.into(), entry);
                true
            }
        }
    }

    /// Whether a node no longer says what it said, or says another address, while Kubernetes has changed nothing
    /// about it: somebody has deleted or overwritten its annotations, and the node will put them back.
    pub(super) fn lacks(&self, name: &str, seen: Option<&Seen>, node: &Node<'_>) -> bool {
        let Some(known) = self.0.get(name).and_then(|entry| entry.lease.as_ref()) else { return false };
        let now = match seen {
            Some(Seen::Changing(_)) => return false,
            Some(Seen::Settled(entry)) => entry.lease.as_ref(),
            None => None,
        };
        match now {
            None => {
                let given = node.subnets().unwrap_or_default();
                let kept = known.subnets.iter().all(|subnet| given.iter().any(|given| given == subnet));
                kept && node.created() == known.created
            }
            Some(now) => {
                let same_node = (now.subnets, now.created) == (known.subnets, known.created);
                same_node && (now.public != known.public || says_less(&now.attachment, &known.attachment))
            }
        }
    }

    /// The subnets of the node of this name that was created at this moment, if those of these families are known: they never
    /// change.
    pub(super) fn subnets_of(&self, name: &str, created: u64, families: &[Family]) -> Option<Given> {
        let entry = self.0.get(name)?;
        let lease = entry.lease.as_ref()?;
        let has = |family: &Family| lease.subnets.get(*family).is_some();
        let known = !entry.narrowed || families.iter().all(has);
        (lease.created == created && known)
            .then_some(Given { subnets: lease.subnets, narrowed: entry.narrowed })
    }

    /// Takes over what `before` knows of a node.
    pub(super) fn keep(&mut self, name: &str, before: &Self) {
        if let Some(known) = before.0.get(name) {
            self.0.insert(name.into(), known.clone());
        }
    }

    /// Forgets a node; whether it was known.
    pub(super) fn remove(&mut self, name: &str) -> bool {
        self.0.remove(name).is_some()
    }

    /// The leases. Of nodes with the same subnets the oldest has them, and the others are reported.
    pub(super) fn leases(&self) -> Leases {
        let mut all = Leases::default();
        let mut leases: BTreeMap<_, Lease> = BTreeMap::new();
        let mut holders: BTreeMap<_, &str> = BTreeMap::new();
        for (name, entry) in &self.0 {
            if let Some(wrong) = &entry.wrong {
                all.malformed.insert(shortened(name), (**wrong).clone());
            }
            let Some(lease) = &entry.lease else { continue };
            let (loser, holder) = match leases.entry(lease.subnets) {
                btree_map::Entry::Vacant(place) => {
                    place.insert(lease.clone());
                    holders.insert(lease.subnets, name);
                    continue;
                }
                btree_map::Entry::Occupied(mut place) => {
                    let holder = holders.insert(lease.subnets, name).unwrap_or_default();
                    if lease.created < place.get().created {
                        place.insert(lease.clone());
                        (holder, name.as_ref())
                    } else {
                        holders.insert(lease.subnets, holder);
                        (name.as_ref(), holder)
                    }
                }
            };
            let holder = shortened(holder);
            let why = format!("its podCIDR {} is that of node {holder} too, which is older", lease.subnets);
            all.malformed.insert(shortened(loser), Malformed { why, subnets: None });
        }
        all.leases = leases.into_iter().collect();
        all.names = holders.into_iter().map(|(subnets, name)| (subnets, name.into())).collect();
        all
    }
}

/// Whether what a node announces is of no use any more, in some family.
fn says_less(now: &Attachment, known: &Attachment) -> bool {
    let lost = |family| known.has_data(family) && !now.has_data(family);
    matches!(now, Attachment::Foreign(_))
        || matches!(now, Attachment::Vxlan { .. } | Attachment::Wireguard { .. })
            && Family::BOTH.into_iter().any(lost)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::PublicAddrs;

    fn entry(subnet: &str, public: &str, created: u64) -> Entry {
        let lease = Lease {
            subnets: [subnet.parse().unwrap()].into_iter().collect(),
            public: PublicAddrs { v4: Some(public.parse().unwrap()), v6: None },
            attachment: Attachment::HostGw,
            created,
            written: created,
        };
        Entry { lease: Some(lease), wrong: None, narrowed: false }
    }

    #[test]
    fn only_what_is_different_is_news() {
        let mut table = Table::default();
        let one = || Some(Seen::Settled(entry("10.0.1.0/24", "192.0.2.1", 1)));
        assert!(table.put("a", one(), None));
        assert!(!table.put("a", one(), None), "a heartbeat");
        assert!(!table.put("b", None, None), "a node that Flannel doesn't manage");
        assert!(table.put("a", None, None) && !table.remove("a"));
    }

    #[test]
    fn subnets_are_those_of_a_node_and_not_of_another_one_of_its_name() {
        let mut table = Table::default();
        table.put("a", Some(Seen::Settled(entry("10.0.1.0/24", "192.0.2.1", 7))), None);
        let both = &Family::BOTH;
        let known = |created| table.subnets_of("a", created, both).map(|given| given.subnets.to_string());
        assert_eq!((known(7).as_deref(), known(8)), (Some("10.0.1.0/24"), None));
        assert_eq!(table.subnets_of("b", 7, both), None);
        let narrowed = Entry { narrowed: true, ..entry("10.0.1.0/24", "192.0.2.1", 7) };
        table.put("a", Some(Seen::Settled(narrowed)), None);
        assert_eq!(table.subnets_of("a", 7, both), None, "it may have one of IPv6, too");
        let given = table.subnets_of("a", 7, &[Family::V4]);
        assert!(given.is_some_and(|given| given.narrowed), "what is left out stays known as such");
    }

    #[test]
    fn the_first_of_two_patches_changes_nothing_that_is_known() {
        let mut table = Table::default();
        table.put("a", Some(Seen::Settled(entry("10.0.1.0/24", "192.0.2.1", 1))), None);
        let changing = || Some(Seen::Changing(entry("10.0.1.0/24", "192.0.2.2", 1)));
        assert!(!table.put("a", changing(), None));
        let mut next = Table::default();
        next.put("a", changing(), Some(&table));
        assert_eq!(next.leases(), table.leases());
        assert!(next.put("b", changing(), None), "nothing was known");
    }

    #[test]
    fn what_somebody_deletes_or_overwrites_is_told_from_what_a_node_decides() {
        let known = entry("10.0.1.0/24", "192.0.2.1", 0);
        let mut table = Table::default();
        table.put("a", Some(Seen::Settled(known.clone())), None);
        let node = |cidr: &str, created: &str| {
            format!(
                r#"{{"metadata":{{"name":"a","creationTimestamp":{created}}},"spec":{{"podCIDR":"{cidr}"}}}}"#
            )
        };
        let lacks = |seen: Option<Entry>, json: String| {
            let node: Node<'_> = serde_json::from_str(&json).unwrap();
            table.lacks("a", seen.map(Seen::Settled).as_ref(), &node)
        };
        let same = || node("10.0.1.0/24", "null");
        assert!(lacks(None, same()), "its annotations are gone");
        assert!(lacks(Some(entry("10.0.1.0/24", "192.0.2.9", 0)), same()), "another address");
        assert!(!lacks(Some(known.clone()), same()));
        assert!(!lacks(None, node("10.0.2.0/24", "null")), "Kubernetes gave it another subnet");
        assert!(!lacks(None, node("10.0.1.0/24", r#""2026-01-01T00:00:00Z""#)), "registered again");
        assert!(!lacks(Some(entry("10.0.2.0/24", "192.0.2.9", 0)), same()), "another subnet");
        let node: String = same();
        let node: Node<'_> = serde_json::from_str(&node).unwrap();
        assert!(!table.lacks("b", Some(&Seen::Settled(known)), &node), "a new node");
    }

    #[test]
    fn of_nodes_with_the_same_subnet_the_oldest_has_it() {
        let entries = [("a", 5), ("b", 3), ("c", 4)];
        let mut table = Table::default();
        for (index, (name, created)) in entries.into_iter().enumerate() {
            let public = format!("192.0.2.{index}");
            table.put(name, Some(Seen::Settled(entry("10.0.1.0/24", &public, created))), None);
        }
        let all = table.leases();
        assert_eq!(all.leases.values().map(|lease| lease.created).collect::<Vec<_>>(), [3]);
        assert_eq!(all.malformed.keys().collect::<Vec<_>>(), ["a", "c"]);
        assert!(all.malformed["a"].why.contains("node b"), "{}", all.malformed["a"].why);
    }

    #[test]
    fn a_peer_costs_less_than_170_bytes() {
        let size = size_of::<Entry>() + size_of::<Box<str>>();
        assert!(size < 170, "{size}");
    }
}
