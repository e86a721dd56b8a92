//! From what is known of the cluster to what has to change in the kernel, each time only for what changed.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use ipnet::IpNet;
use subnet::Family;

use super::class::{Book, Class, Member};
use super::cluster::Cluster;
use super::demand::Demand;
use super::generation::{FORWARD, Generations};
use super::image::{Content, Delta, Edit, Image, MemberKey, diff, diff_found};
use super::keys::address_of;
use super::layout;
use super::members::Members;
use super::names::stem;
use super::parts::Parts;
use super::pods::Record;
use super::selecting::Selecting;
use super::settings::Settings;
use super::touched::{Touched, TouchedAddresses};
use crate::nft::Table;

/// Compiles policies, and remembers what the kernel holds.
#[derive(Debug)]
pub struct Engine {
    settings: Settings,
    /// What is known of the cluster. Changes take effect with the next [`Self::plan`].
    pub cluster: Cluster,
    mark_shift: u32,
    random: u8,
    book: Book,
    classes: HashMap<(u64, u32), Arc<Class>>,
    members: Members,
    parts: Parts,
    kernel: KnownKernel,
    /// Addresses that mattered and have no pod now: the next pod that gets one must not inherit its connections.
    released: BTreeSet<IpAddr>,
    raise: Raise,
}

/// What the kernel holds, as far as is known.
#[derive(Debug)]
enum KnownKernel {
    /// Not read yet, or what was to be changed was refused.
    Unknown,
    /// There is no table.
    Absent,
    /// The table is exactly this.
    Holds(Box<Held>),
}

#[derive(Debug)]
struct Held {
    image: Image,
    generations: Generations,
    /// Addresses of pods of this node.
    locals: BTreeSet<IpAddr>,
}

/// Whether connections have to be judged once more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Raise {
    No,
    /// As soon as it may be.
    Due,
}

/// What has to change in the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// What becomes of the table before the edits.
    pub table: TableStep,
    /// In this order, in one transaction.
    pub edits: Vec<Edit>,
    /// Whether generations begin again, so that no connection may carry the mark of an earlier one: those that do
    /// would pass without being judged.
    pub forget_marks: bool,
    /// When to plan again though nothing changes.
    pub again: Option<Instant>,
}

/// What becomes of the table as a whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TableStep {
    /// It is there and stays.
    #[default]
    Keep,
    /// It comes.
    Add,
    /// It goes and comes, because what is there can't be changed into what it has to be.
    Replace,
    /// It goes.
    Remove,
}

impl Plan {
    /// Whether nothing has to change.
    pub fn is_empty(&self) -> bool {
        self.table == TableStep::Keep && self.edits.is_empty()
    }

    /// Whether connections that passed until now have to be judged once more: the generation is another one.
    pub(super) fn judges_anew(&self) -> bool {
        let of_forward = |edit: &Edit| matches!(edit, Edit::Rules(chain) if chain.name == FORWARD);
        self.table != TableStep::Keep || self.edits.iter().any(of_forward)
    }
}

/// What there is to count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Pods of this node.
    pub local_pods: usize,
    /// Addresses of pods of this node that a policy isolates.
    pub isolated_addresses: usize,
    /// Pods that are known.
    pub pods: usize,
    /// Policies that are known.
    pub policies: usize,
    /// Elements of selectors' sets.
    pub elements: usize,
    /// The generation, or 0 without tables.
    pub generation: u8,
}

impl Engine {
    /// Knows nothing of the cluster and the kernel yet. `mark_shift` is the lowest of the eight bits of connection
    /// marks that are ours, and `random` the generation to begin with where there is none.
    pub fn new(settings: Settings, mark_shift: u32, random: u8) -> Self {
        Self {
            settings,
            cluster: Cluster::default(),
            mark_shift,
            random,
            book: Book::default(),
            classes: HashMap::new(),
            members: Members::default(),
            parts: Parts::default(),
            kernel: KnownKernel::Unknown,
            released: BTreeSet::new(),
            raise: Raise::No,
        }
    }

    /// Other settings, or other nodes, take effect with the next [`Self::plan`].
    pub fn set_settings(&mut self, settings: Settings) {
        if self.settings == settings {
            return;
        }
        self.cluster.touched.locals = true;
        let before = std::mem::replace(&mut self.settings, settings);
        if (Settings { nodes: self.settings.nodes.clone(), ..before }) == self.settings {
            self.parts.nodes.clear();
        } else {
            self.parts = Parts::default();
        }
    }

    /// The settings.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// What there is to count.
    pub fn summary(&self) -> Summary {
        let held = match &self.kernel {
            KnownKernel::Holds(held) => Some(held),
            KnownKernel::Unknown | KnownKernel::Absent => None,
        };
        let isolated =
            held.map_or(0, |held| ["pol4", "pol6"].iter().map(|name| fixed_len(&held.image, name)).sum());
        Summary {
            local_pods: self.cluster.locals().count(),
            isolated_addresses: isolated,
            pods: self.cluster.pod_count(),
            policies: self.cluster.policy_count(),
            elements: self.members.count(),
            generation: held.map_or(0, |held| held.generations.number()),
        }
    }

    /// The pods of other nodes that have to be watched, as of the last plan.
    pub fn demand(&self) -> Demand {
        self.members.demand(&self.cluster)
    }

    /// The bits of connection marks that are ours.
    pub fn mark_mask(&self) -> u32 {
        0xff << self.mark_shift
    }

    /// Generations, for the walk over connections; `None` without tables.
    pub fn generations(&mut self) -> Option<&mut Generations> {
        match &mut self.kernel {
            KnownKernel::Holds(held) => Some(&mut held.generations),
            KnownKernel::Unknown | KnownKernel::Absent => None,
        }
    }

    /// Whether [`Self::adopt`] has to be called before [`Self::plan`].
    pub fn needs_look(&self) -> bool {
        matches!(self.kernel, KnownKernel::Unknown)
    }

    /// What was planned last was not carried out, or somebody else changed the table.
    pub fn forget_kernel(&mut self) {
        self.kernel = KnownKernel::Unknown;
    }

    /// The networks of pods.
    pub(super) fn networks(&self) -> &[IpNet] {
        &self.settings.networks
    }

    /// The table as it shall be, with everything in it.
    pub fn table(&self) -> Option<Table> {
        match &self.kernel {
            KnownKernel::Holds(held) => Some(held.image.table(layout::empty_table(), &self.members)),
            KnownKernel::Unknown | KnownKernel::Absent => None,
        }
    }

    /// What makes what the kernel has, `found`, as it shall be. The plan has to be carried out, or
    /// [`Self::forget_kernel`] be called.
    pub fn adopt(&mut self, found: Option<&Table>, now: Instant) -> Plan {
        self.start_over();
        if !self.is_wanted() {
            self.kernel = KnownKernel::Absent;
            let table = if found.is_some() { TableStep::Remove } else { TableStep::Keep };
            return Plan { table, ..Plan::default() };
        }
        let adopted = found.and_then(|table| Generations::adopt(self.mark_shift, table, now));
        let forget_marks = adopted.is_none();
        let mut generations =
            adopted.unwrap_or_else(|| Generations::first(self.mark_shift, self.random, now));
        // What somebody changed meanwhile may have let connections pass, and what was taken away before the start
        // is in force only when they are judged again.
        let mut image = self.layout(found);
        layout::stamp(&mut image, &self.settings, &generations, now);
        let empty = layout::empty_table();
        let edits = found.and_then(|found| diff_found(&image, found, &self.members));
        let (table, edits) = match (found, edits) {
            (Some(_), Some(edits)) if edits.is_empty() => (TableStep::Keep, edits),
            (Some(found), Some(edits)) => {
                self.raise = Raise::No;
                if generations.raise(now).is_ok() {
                    layout::stamp(&mut image, &self.settings, &generations, now);
                }
                (TableStep::Keep, diff_found(&image, found, &self.members).unwrap_or(edits))
            }
            (found, _) => {
                let table = if found.is_some() { TableStep::Replace } else { TableStep::Add };
                (table, diff_found(&image, &empty, &self.members).unwrap_or_default())
            }
        };
        let locals = self.local_addresses();
        self.kernel = KnownKernel::Holds(Box::new(Held { image, generations, locals }));
        Plan { table, edits, forget_marks, again: None }
    }

    /// The same where policies are in force for the first time, and there is no table. `make_sets` has a table made that holds
    /// these sets and nothing else, which most of the kernel's work is. Meanwhile the plan is made, which is about the rest.
    pub(super) fn begin(&mut self, now: Instant, make_sets: impl FnOnce(Vec<Edit>)) -> Plan {
        self.start_over();
        let pods = self.members_of_classes(None);
        let sets = self.parts.member_sets(&self.members).map(|set| (set.set.name.clone(), set));
        let made = Image { sets: sets.collect(), ..Image::default() };
        make_sets(diff(&Image::default(), &made, Vec::new(), &self.members));
        let generations = Generations::first(self.mark_shift, self.random, now);
        let mut image = layout::image(&self.settings, &pods, &self.book, &self.members, &mut self.parts);
        layout::stamp(&mut image, &self.settings, &generations, now);
        let edits = diff(&made, &image, Vec::new(), &self.members);
        let locals = self.local_addresses();
        self.kernel = KnownKernel::Holds(Box::new(Held { image, generations, locals }));
        Plan { table: TableStep::Add, edits, forget_marks: true, again: None }
    }

    fn start_over(&mut self) {
        self.cluster.touched = Touched::default();
        self.forget_classes();
        // Sets may have other sizes than they had.
        self.parts = Parts::default();
    }

    /// What has to change because of what changed in the cluster. The plan has to be carried out, or
    /// [`Self::forget_kernel`] be called. `None` when the kernel was not read yet.
    pub fn plan(&mut self, now: Instant) -> Option<Plan> {
        match std::mem::replace(&mut self.kernel, KnownKernel::Unknown) {
            KnownKernel::Unknown => None,
            KnownKernel::Absent => Some(self.adopt(None, now)),
            KnownKernel::Holds(_) if !self.is_wanted() => {
                self.kernel = KnownKernel::Absent;
                self.cluster.touched = Touched::default();
                self.members = Members::default();
                self.parts = Parts::default();
                Some(Plan { table: TableStep::Remove, ..Plan::default() })
            }
            KnownKernel::Holds(held) => Some(self.update(*held, now)),
        }
    }

    fn update(&mut self, mut held: Held, now: Instant) -> Plan {
        let touched = std::mem::take(&mut self.cluster.touched);
        let addresses: Vec<IpAddr> = match touched.addresses {
            TouchedAddresses::Some(addresses) => addresses.into_iter().collect(),
            TouchedAddresses::Any => self.any_addresses(&held.locals),
        };
        let (deltas, too_small) = self.members.refresh(addresses.iter(), &self.cluster, &held.image);
        self.note_members(touched.passed, &addresses, &deltas, &held.locals);
        let mut image = None;
        if touched.policies {
            self.forget_classes();
        }
        if too_small {
            self.parts = Parts::default();
        }
        if touched.policies || touched.locals || too_small {
            let mut new = self.layout(None);
            layout::stamp(&mut new, &self.settings, &held.generations, now);
            self.note_locals(&held, &new);
            held.locals = self.local_addresses();
            image = Some(new);
        }
        let mut again = None;
        if self.raise == Raise::Due {
            match held.generations.raise(now) {
                Ok(()) => {
                    self.raise = Raise::No;
                    let stamped = image.get_or_insert_with(|| held.image.clone());
                    layout::stamp(stamped, &self.settings, &held.generations, now);
                }
                Err(at) => again = Some(at),
            }
        }
        let edits = diff(&held.image, image.as_ref().unwrap_or(&held.image), deltas, &self.members);
        if let Some(image) = image {
            held.image = image;
        }
        self.kernel = KnownKernel::Holds(Box::new(held));
        Plan { edits, again, ..Plan::default() }
    }

    /// Without policies nothing is judged, so there are no tables.
    pub(super) fn is_wanted(&self) -> bool {
        self.cluster.policy_count() > 0 || self.settings.strict
    }

    /// The image of what is known. Sets that are in `found` keep their size.
    fn layout(&mut self, found: Option<&Table>) -> Image {
        let pods = self.members_of_classes(found);
        layout::image(&self.settings, &pods, &self.book, &self.members, &mut self.parts)
    }

    /// The classes of pods, after the members of all selectors that they name were found.
    fn members_of_classes(&mut self, found: Option<&Table>) -> Vec<Member> {
        let pods = self.classes();
        if let Some(wanted) = self.parts.members(&pods, &self.settings, &self.book) {
            self.members.set(&wanted, &self.cluster);
            if let Some(found) = found {
                self.adopt_sizes(found, &wanted);
            }
        }
        pods
    }

    fn adopt_sizes(&mut self, found: &Table, wanted: &HashSet<Arc<MemberKey>>) {
        let stems: HashMap<String, &Arc<MemberKey>> = wanted.iter().map(|key| (stem(key), key)).collect();
        for set in &found.sets {
            let (Some(size), Some((stem, _))) = (set.size, set.name.rsplit_once('-')) else { continue };
            if let Some(key) = stems.get(stem) {
                self.members.adopt_size(key, size);
            }
        }
    }

    fn forget_classes(&mut self) {
        if self.book.tidy(|name| self.cluster.has_policy(name)) {
            self.parts = Parts::default();
        }
        self.classes.clear();
    }

    /// The addresses of each pod of this node, and what policies mean for it.
    fn classes(&mut self) -> Vec<Member> {
        let mut known = std::mem::take(&mut self.classes);
        let mut pods = Vec::new();
        // The policies of namespaces that have a pod of a new class.
        let mut policies: HashMap<&str, Selecting<'_>> = HashMap::new();
        for (local, record) in self.cluster.locals() {
            let groups = self.cluster.groups();
            let key = (groups.serial(record.group), self.cluster.ports_id(record));
            let class = self.classes.get(&key).cloned().or_else(|| known.remove(&key)).unwrap_or_else(|| {
                let namespace = &*local.name.namespace;
                let all = policies
                    .entry(namespace)
                    .or_insert_with(|| Selecting::new(self.cluster.policies_of(namespace), groups));
                let selecting = all.selecting(record.group, groups);
                Arc::new(self.book.class(selecting, self.cluster.ports_of(record)))
            });
            let addresses =
                Family::BOTH.iter().filter_map(|family| self.cluster.own_address(local.number, *family));
            pods.push(Member { addresses: addresses.collect(), class: Arc::clone(&class) });
            self.classes.insert(key, class);
        }
        pods
    }

    fn local_addresses(&self) -> BTreeSet<IpAddr> {
        self.cluster.locals().flat_map(|(local, _)| self.cluster.addresses(local.number)).collect()
    }

    /// All addresses that a change can be about, in order: those that have a pod, and those that had one when somebody looked.
    fn any_addresses(&self, locals: &BTreeSet<IpAddr>) -> Vec<IpAddr> {
        let owned = Family::BOTH.into_iter().flat_map(|family| self.cluster.owned(family));
        let left = self.members.addresses().filter(|address| self.cluster.owner(*address).is_none());
        let mut addresses: Vec<IpAddr> = owned.map(|(address, _)| address).chain(left).collect();
        addresses.extend(locals);
        addresses.sort_unstable();
        addresses.dedup();
        addresses
    }

    /// Whether a living pod lost a right because it left a set, or got an address that somebody else had.
    fn note_members(
        &mut self,
        passed: bool,
        addresses: &[IpAddr],
        deltas: &[Delta],
        locals: &BTreeSet<IpAddr>,
    ) {
        let mut due = passed;
        for key in deltas.iter().flat_map(|delta| &delta.removed) {
            match address_of(key).map(|address| (address, self.cluster.owner(address))) {
                Some((_, Some(_))) => due = true,
                Some((address, None)) => drop(self.released.insert(address)),
                None => {}
            }
        }
        for address in addresses {
            match self.cluster.owner(*address) {
                Some(_) => due |= self.released.contains(address),
                None if locals.contains(address) => drop(self.released.insert(*address)),
                None => {}
            }
        }
        if due {
            self.raise = Raise::Due;
            self.released.clear();
        }
    }

    /// Whether a pod of this node came under a policy, or under others.
    fn note_locals(&mut self, held: &Held, new: &Image) {
        for map in ["in4", "eg4", "in6", "eg6"] {
            let (Some(before), Some(after)) = (fixed(&held.image, map), fixed(new, map)) else { continue };
            for (span, verdict) in after {
                let changed = match before.get(span) {
                    Some(known) => known != verdict,
                    // A pod that was announced before it could speak has no connections yet.
                    None => {
                        let address = address_of(&span.from);
                        let owner = address.and_then(|address| self.cluster.owner(address));
                        let known = address.is_some_and(|address| held.locals.contains(&address));
                        known || !owner.is_some_and(Record::announced)
                    }
                };
                if changed {
                    self.raise = Raise::Due;
                }
            }
        }
    }
}

fn fixed<'a>(
    image: &'a Image,
    name: &str,
) -> Option<&'a BTreeMap<crate::nft::Span, Option<crate::nft::Data>>> {
    match &image.sets.get(name)?.content {
        Content::Fixed(elements) => Some(elements),
        Content::Members(_) | Content::Volatile => None,
    }
}

fn fixed_len(image: &Image, name: &str) -> usize {
    fixed(image, name).map_or(0, BTreeMap::len)
}
