//! All nodes that Flannel manages, by name, and the leases that follow from them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::node::{Entry, Given, Node, Seen};
use crate::lease::{Attachment, Lease, Leases, Malformed};
use crate::net::{Family, Subnets};
use crate::text::shortened;

/// What is kept of the cluster between two events. A lease is there once, in what is published: of 20,000 nodes a second one
/// each would be 3 MB.
#[derive(Debug, Default)]
pub(super) struct NodeTable {
    nodes: BTreeMap<Arc<str>, KnownNode>,
    /// What is published. Nodes whose subnets no other node has hold their leases here.
    leases: Arc<Leases>,
    /// The nodes of which something is reported, because it can't be used, and whether that is to be put down again.
    reported: BTreeSet<Arc<str>>,
    report_due: bool,
    /// Those whose subnets an older node has.
    losers: BTreeMap<Subnets, BTreeSet<Arc<str>>>,
}

/// What is kept of one node.
#[derive(Debug)]
struct KnownNode {
    place: LeasePlace,
    wrong: Option<Box<Malformed>>,
    narrowed: bool,
}

/// Where the lease of a node is.
#[derive(Debug)]
enum LeasePlace {
    /// It has none that could be used.
    None,
    /// Among those that are published.
    Holds(Subnets),
    /// Here, because an older node has the same subnets.
    Loses(Box<Lease>),
}

impl NodeTable {
    /// Takes in what a node says now; whether that is news. `before` is the table that this one
    /// replaces, if it is one that replaces another.
    pub(super) fn put(&mut self, name: &str, seen: Option<Seen>, before: Option<&Self>) -> bool {
        let entry = match seen {
            None => return self.remove(name),
            Some(Seen::Settled(entry)) => entry,
            Some(Seen::Changing(entry)) => before.unwrap_or(self).entry(name).unwrap_or(entry),
        };
        match self.nodes.get(name) {
            Some(known) if self.says(known, &entry) => false,
            _ => {
                self.set(name, entry);
                true
            }
        }
    }

    /// Whether a node no longer says what it said, or says another address, while Kubernetes has changed nothing
    /// about it: somebody has deleted or overwritten its annotations, and the node will put them back.
    pub(super) fn lacks(&self, name: &str, seen: Option<&Seen>, node: &Node<'_>) -> bool {
        let Some(known) = self.lease_of(name) else { return false };
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
        let narrowed = self.nodes.get(name)?.narrowed;
        let lease = self.lease_of(name)?;
        let has = |family: &Family| lease.subnets.get(*family).is_some();
        let known = !narrowed || families.iter().all(has);
        (lease.created == created && known).then_some(Given { subnets: lease.subnets, narrowed })
    }

    /// Takes over what `before` knows of a node.
    pub(super) fn keep(&mut self, name: &str, before: &Self) {
        if let Some(entry) = before.entry(name) {
            self.set(name, entry);
        }
    }

    /// Forgets a node; whether it was known.
    pub(super) fn remove(&mut self, name: &str) -> bool {
        let Some((name, known)) = self.nodes.remove_entry(name) else { return false };
        self.vacate(&name, known.place);
        self.report_due |= self.reported.remove(&name);
        true
    }

    /// The leases. Of nodes with the same subnets the oldest has them, and the others are reported.
    pub(super) fn leases(&mut self) -> &Arc<Leases> {
        if std::mem::take(&mut self.report_due) {
            self.report();
        }
        &self.leases
    }

    /// Makes this table, which was filled from nothing, the one after `before`: what both have in common is there once.
    pub(super) fn succeed(&mut self, before: &Self) {
        let leases = Arc::make_mut(&mut self.leases);
        leases.pack();
        *leases = leases.sharing_with(&before.leases);
    }

    fn lease_of(&self, name: &str) -> Option<&Lease> {
        self.lease_at(&self.nodes.get(name)?.place)
    }

    fn lease_at<'a>(&'a self, place: &'a LeasePlace) -> Option<&'a Lease> {
        match place {
            LeasePlace::None => None,
            LeasePlace::Holds(subnets) => self.leases.leases.get(subnets),
            LeasePlace::Loses(lease) => Some(lease),
        }
    }

    fn entry(&self, name: &str) -> Option<Entry> {
        let KnownNode { place, wrong, narrowed } = self.nodes.get(name)?;
        Some(Entry { lease: self.lease_at(place).cloned(), wrong: wrong.clone(), narrowed: *narrowed })
    }

    fn says(&self, known: &KnownNode, entry: &Entry) -> bool {
        let Entry { lease, wrong, narrowed } = entry;
        known.wrong == *wrong && known.narrowed == *narrowed && self.lease_at(&known.place) == lease.as_ref()
    }

    /// Has a node say this alone.
    fn set(&mut self, name: &str, Entry { lease, wrong, narrowed }: Entry) {
        let (name, before) = match self.nodes.remove_entry(name) {
            Some((name, known)) => (name, known.place),
            None => (Arc::from(name), LeasePlace::None),
        };
        // What it holds already is exchanged in its place.
        let stays = match (&before, &lease) {
            (LeasePlace::Holds(subnets), Some(lease)) => {
                *subnets == lease.subnets && !self.losers.contains_key(subnets)
            }
            _ => false,
        };
        if !stays {
            self.vacate(&name, before);
        }
        self.report_due |= self.reported.remove(&name);
        let place = lease.map_or(LeasePlace::None, |lease| self.place(&name, lease));
        if wrong.is_some() || matches!(place, LeasePlace::Loses(_)) {
            self.reported.insert(Arc::clone(&name));
            self.report_due = true;
        }
        self.nodes.insert(name, KnownNode { place, wrong, narrowed });
    }

    /// Gives a lease to the node of this name, which is not among the others, or finds that an older one has its subnets.
    fn place(&mut self, name: &Arc<str>, lease: Lease) -> LeasePlace {
        let subnets = lease.subnets;
        if let Some((holder, held)) = self.holder(&subnets).filter(|(holder, _)| holder != name) {
            if (held.created, &holder) < (lease.created, name) {
                self.losers.entry(subnets).or_default().insert(Arc::clone(name));
                return LeasePlace::Loses(Box::new(lease));
            }
            self.losers.entry(subnets).or_default().insert(Arc::clone(&holder));
            self.reported.insert(Arc::clone(&holder));
            if let Some(known) = self.nodes.get_mut(&holder) {
                known.place = LeasePlace::Loses(Box::new(held));
            }
            self.report_due = true;
        }
        self.publish(name, lease);
        LeasePlace::Holds(subnets)
    }

    fn holder(&self, subnets: &Subnets) -> Option<(Arc<str>, Lease)> {
        let name = self.leases.names.get(subnets)?;
        Some((Arc::clone(name), self.leases.leases.get(subnets)?.clone()))
    }

    fn publish(&mut self, name: &Arc<str>, lease: Lease) {
        let leases = Arc::make_mut(&mut self.leases);
        if leases.names.get(&lease.subnets) != Some(name) {
            leases.names.insert(lease.subnets, Arc::clone(name));
        }
        leases.leases.insert(lease.subnets, lease);
    }

    /// Takes a place from the node of this name, which is not among the others. Who waited for it longest has it then.
    fn vacate(&mut self, name: &Arc<str>, place: LeasePlace) {
        let subnets = match place {
            LeasePlace::None => return,
            LeasePlace::Holds(subnets) => subnets,
            LeasePlace::Loses(lease) => return self.lose_no_more(&lease.subnets, name),
        };
        let leases = Arc::make_mut(&mut self.leases);
        leases.leases.remove(&subnets);
        leases.names.remove(&subnets);
        let age = |name: &&Arc<str>| (self.lease_of(name).map(|lease| lease.created), Arc::clone(name));
        let Some(next) = self.losers.get(&subnets).and_then(|names| names.iter().min_by_key(age)).cloned()
        else {
            return;
        };
        self.lose_no_more(&subnets, &next);
        let Some(known) = self.nodes.get_mut(&next) else { return };
        if let LeasePlace::Loses(lease) = std::mem::replace(&mut known.place, LeasePlace::Holds(subnets)) {
            if known.wrong.is_none() {
                self.reported.remove(&next);
            }
            self.publish(&next, *lease);
        }
        self.report_due = true;
    }

    fn lose_no_more(&mut self, subnets: &Subnets, name: &Arc<str>) {
        if let Some(names) = self.losers.get_mut(subnets) {
            names.remove(name);
            if names.is_empty() {
                self.losers.remove(subnets);
            }
        }
    }

    /// Puts down what can't be used and why, of the few nodes of which something is reported.
    fn report(&mut self) {
        let of_node = |name: &Arc<str>| {
            let known = self.nodes.get(name)?;
            let malformed = match &known.place {
                LeasePlace::Loses(lease) => {
                    let holder = shortened(self.leases.names.get(&lease.subnets)?);
                    let why =
                        format!("its podCIDR {} is that of node {holder} too, which is older", lease.subnets);
                    Malformed { why, subnets: None, lease: None }
                }
                _ => Malformed::clone(known.wrong.as_ref()?),
            };
            Some((shortened(name), malformed))
        };
        let malformed = self.reported.iter().filter_map(of_node).collect();
        Arc::make_mut(&mut self.leases).malformed = malformed;
    }
}

/// Whether what a node announces is of no use any more, in some family.
fn says_less(now: &Attachment, known: &Attachment) -> bool {
    let lost = |family| known.has_data(family) && !now.has_data(family);
    matches!(now, Attachment::Foreign(_))
        || matches!(now.announced(), Attachment::Vxlan { .. } | Attachment::Wireguard(_))
            && Family::BOTH.into_iter().any(lost)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

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
        let mut table = NodeTable::default();
        let one = || Some(Seen::Settled(entry("10.0.1.0/24", "192.0.2.1", 1)));
        assert!(table.put("a", one(), None));
        assert!(!table.put("a", one(), None), "a heartbeat");
        assert!(!table.put("b", None, None), "a node that Flannel doesn't manage");
        assert!(table.put("a", None, None) && !table.remove("a"));
    }

    #[test]
    fn subnets_are_those_of_a_node_and_not_of_another_one_of_its_name() {
        let mut table = NodeTable::default();
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
        let mut table = NodeTable::default();
        table.put("a", Some(Seen::Settled(entry("10.0.1.0/24", "192.0.2.1", 1))), None);
        let changing = || Some(Seen::Changing(entry("10.0.1.0/24", "192.0.2.2", 1)));
        assert!(!table.put("a", changing(), None));
        let mut next = NodeTable::default();
        next.put("a", changing(), Some(&table));
        assert_eq!(next.leases(), table.leases());
        assert!(next.put("b", changing(), None), "nothing was known");
    }

    #[test]
    fn what_somebody_deletes_or_overwrites_is_told_from_what_a_node_decides() {
        let known = entry("10.0.1.0/24", "192.0.2.1", 0);
        let mut table = NodeTable::default();
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
        let mut table = NodeTable::default();
        for (index, (name, created)) in entries.into_iter().enumerate() {
            let public = format!("192.0.2.{index}");
            table.put(name, Some(Seen::Settled(entry("10.0.1.0/24", &public, created))), None);
        }
        let all = table.leases();
        assert_eq!(all.leases.values().map(|lease| lease.created).collect::<Vec<_>>(), [3]);
        assert_eq!(all.malformed.keys().collect::<Vec<_>>(), ["a", "c"]);
        assert!(all.malformed["a"].why.contains("node b"), "{}", all.malformed["a"].why);
    }

    /// The leases that follow from a look at all nodes.
    fn of_all(nodes: &BTreeMap<u8, (u8, u8, u64)>) -> Vec<(String, u64)> {
        let mut holders: BTreeMap<u8, (u64, u8)> = BTreeMap::new();
        for (name, (subnet, _, created)) in nodes {
            let holder = holders.entry(*subnet).or_insert((*created, *name));
            *holder = (*holder).min((*created, *name));
        }
        holders.into_values().map(|(created, name)| (name.to_string(), created)).collect()
    }

    proptest! {
        #[test]
        fn what_follows_from_each_event_is_what_follows_from_all_nodes(
            events in prop::collection::vec((0u8..6, prop::option::of((0u8..4, 0u8..3, 0u64..3))), 1..40),
        ) {
            let (mut table, mut nodes) = (NodeTable::default(), BTreeMap::new());
            for (name, says) in events {
                let known = match says {
                    Some(says) => nodes.insert(name, says),
                    None => nodes.remove(&name),
                };
                let seen = says.map(|(subnet, public, created)| {
                    Seen::Settled(entry(&format!("10.0.{subnet}.0/24"), &format!("192.0.2.{public}"), created))
                });
                prop_assert_eq!(table.put(&name.to_string(), seen, None), known != says);
                let all = Arc::clone(table.leases());
                let holders = all.names.values().map(|name| name.to_string());
                let holders: Vec<_> = holders.zip(all.leases.values().map(|lease| lease.created)).collect();
                prop_assert_eq!(&holders, &of_all(&nodes));
                prop_assert!(all.leases.keys().eq(all.names.keys()));
                let losers = nodes.keys().map(u8::to_string).filter(|name| !holders.iter().any(|(held, _)| held == name));
                prop_assert!(all.malformed.keys().cloned().eq(losers));
                let mut listed = NodeTable::default();
                for (name, (subnet, public, created)) in &nodes {
                    let entry = entry(&format!("10.0.{subnet}.0/24"), &format!("192.0.2.{public}"), *created);
                    listed.put(&name.to_string(), Some(Seen::Settled(entry)), Some(&table));
                }
                listed.succeed(&table);
                prop_assert_eq!(listed.leases(), &all);
                if nodes.len() % 2 == 0 {
                    table = listed;
                }
            }
        }
    }

    #[test]
    fn a_list_that_brings_nothing_new_shares_all_with_what_is_published() {
        let filled = || {
            let mut table = NodeTable::default();
            for number in 0..1000 {
                let entry = entry(&format!("10.{}.{}.0/24", number / 250, number % 250), "192.0.2.1", 1);
                table.put(&format!("p{number:04}"), Some(Seen::Settled(entry)), None);
            }
            table
        };
        let (mut first, mut second) = (filled(), filled());
        second.succeed(&first);
        assert!(second.leases().leases.shares_all_with(&first.leases().leases));
        assert!(second.leases().names.shares_all_with(&first.leases().names));
    }

    #[test]
    fn a_node_costs_less_than_60_bytes_besides_its_lease() {
        let size = size_of::<KnownNode>() + size_of::<Arc<str>>();
        assert!(size < 60, "{size}");
    }
}
