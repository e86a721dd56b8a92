//! What the loop publishes after each turn, for those who ask at any moment.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use backends::{BackendId, KernelState, Peers, Scope, Tunnels};
use ipnet::IpNet;
use subnet::{Leases, Subnets};

use super::model::{Counters, KernelStatus, Node, RulesStatus, Store};
use super::pool::Pools;
use super::traffic::TrafficCounts;
use super::{Sources, host};
use crate::cni_calls::CniListener;
use crate::events::{Events, NodeSigns};
use crate::probe::{Probes, Report};

/// What the loop knows after a turn. What grows with the cluster is shared, not copied.
#[derive(Clone, Default)]
pub(crate) struct Published {
    pub(crate) node: Option<Node>,
    pub(crate) store: Store,
    /// Why another node has this node's lease.
    pub(crate) contest: Option<String>,
    /// Without what differs now and what is desired.
    pub(crate) kernel: KernelStatus,
    pub(crate) rules: RulesStatus,
    pub(crate) counters: Counters,
    pub(crate) own: Subnets,
    pub(crate) leases: Option<Arc<Leases>>,
    pub(crate) peers: Arc<Peers>,
    /// Nodes that can be used, and those of them for which the kernel lacks nothing.
    pub(crate) usable: usize,
    pub(crate) programmed: usize,
    /// Subnets of peers for which the kernel lacks something.
    pub(crate) unprogrammed: Arc<BTreeSet<IpNet>>,
    /// What each backend in use is called.
    pub(crate) active: Vec<(BackendId, String)>,
    /// The plan, and whose objects are ours: to look at the kernel with.
    pub(crate) desired: Arc<KernelState>,
    pub(crate) scope: Scope,
    pub(crate) sources: Sources,
    /// Directory of CNI configurations, which say where addresses are reserved.
    pub(crate) cni_directory: PathBuf,
}

/// What repairs of traffic rules are counted as.
const RULES: [&str; 2] = ["rules", "tunnel_filter"];

/// Where it is published. One for a process.
#[derive(Clone)]
pub(crate) struct Board(Arc<BoardState>);

struct BoardState {
    started: SystemTime,
    published: Mutex<Arc<Published>>,
    ready_since: Mutex<Option<SystemTime>>,
    pools: Mutex<Pools>,
    checksums: Mutex<Checksums>,
    tunnel: Mutex<Option<Arc<backends::Counters>>>,
    tunnels: OnceLock<Tunnels>,
    probes: OnceLock<Probes>,
    cni: CniListener,
    /// Devices in the flowtables of the fast path, if there is one.
    fast_path: Mutex<Option<usize>>,
    /// Who is told of what is worth an event.
    events: OnceLock<Events>,
    max_series: AtomicUsize,
    traffic: Mutex<TrafficCounts>,
}

/// So long after a look at the counter of wrong checksums a turn of the loop is no reason for another one.
const CHECKSUMS_EVERY: Duration = Duration::from_secs(30);

/// Datagrams with wrong checksums over time.
#[derive(Clone, Copy, Default)]
pub(crate) struct Checksums {
    first: u64,
    pub(crate) last: u64,
    /// When more of them were seen than before.
    pub(crate) grown: Option<SystemTime>,
    looked: Option<Instant>,
}

impl Checksums {
    /// How many came since the start.
    pub(crate) fn since_start(self) -> u64 {
        self.last.saturating_sub(self.first)
    }

    fn take(&mut self, count: u64, now: SystemTime) {
        if count > self.last {
            self.grown = Some(now);
        }
        self.last = count;
        self.looked = Some(Instant::now());
    }
}

impl Default for Board {
    fn default() -> Self {
        let count = host::checksum_errors();
        Self(Arc::new(BoardState {
            started: SystemTime::now(),
            published: Mutex::default(),
            ready_since: Mutex::default(),
            pools: Mutex::default(),
            checksums: Mutex::new(Checksums { first: count, last: count, ..Checksums::default() }),
            tunnel: Mutex::default(),
            tunnels: OnceLock::new(),
            probes: OnceLock::new(),
            cni: CniListener::default(),
            fast_path: Mutex::default(),
            events: OnceLock::new(),
            max_series: AtomicUsize::default(),
            traffic: Mutex::default(),
        }))
    }
}

impl fmt::Debug for Board {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Board")
    }
}

impl Published {
    fn signs(&self) -> NodeSigns {
        let fallen_back = self.node.as_ref().filter(|node| node.fallback);
        NodeSigns {
            contest: self.contest.clone(),
            fallback: fallen_back.map(|node| node.backend.clone()),
            restored: RULES.iter().filter_map(|object| self.counters.repairs.get(*object)).sum(),
            last: self.counters.last_repair.as_ref().map(|repair| repair.what.clone()),
        }
    }
}

impl Board {
    /// Publishes what is known now.
    pub(crate) fn publish(&self, published: Published) {
        let published = Arc::new(published);
        let before = std::mem::replace(&mut *lock(&self.0.published), Arc::clone(&published));
        if let Some(events) = self.0.events.get() {
            events.node(&before.signs(), &published.signs());
        }
        // The kernel writes all its counters for that, so not with each change of many leases.
        let looked = lock(&self.0.checksums).looked;
        if looked.is_none_or(|at| at.elapsed() >= CHECKSUMS_EVERY) {
            self.look_at_checksums();
        }
    }

    /// What was published last.
    pub(crate) fn published(&self) -> Arc<Published> {
        Arc::clone(&lock(&self.0.published))
    }

    /// More peers than this have no series of their own.
    pub(crate) fn limit_series(&self, peers: usize) {
        self.0.max_series.store(peers, Ordering::Relaxed);
    }

    pub(super) fn max_series(&self) -> usize {
        self.0.max_series.load(Ordering::Relaxed)
    }

    /// Who counts the bytes of peers.
    pub(crate) fn traffic(&self) -> MutexGuard<'_, TrafficCounts> {
        lock(&self.0.traffic)
    }

    /// Where the datapaths of this process count, and their sessions.
    pub(crate) fn count_tunnel(&self, counters: Arc<backends::Counters>, tunnels: Tunnels) {
        *lock(&self.0.tunnel) = Some(counters);
        let _ = self.0.tunnels.set(tunnels);
    }

    /// The tunnels of this process.
    pub(super) fn tunnels(&self) -> Option<&Tunnels> {
        self.0.tunnels.get()
    }

    /// Who is told of what is worth an event.
    pub(crate) fn tell(&self, events: Events) {
        let _ = self.0.events.set(events);
    }

    /// Who probes the peers.
    pub(crate) fn probe(&self, probes: Probes) {
        let _ = self.0.probes.set(probes);
    }

    /// What probes found, if there are any.
    pub(super) fn probed(&self) -> Option<Report> {
        self.0.probes.get().filter(|probes| probes.is_on()).map(Probes::report)
    }

    /// The same without words about each peer.
    pub(super) fn probed_briefly(&self) -> Option<Report> {
        self.0.probes.get().filter(|probes| probes.is_on()).map(Probes::brief)
    }

    /// There is a fast path over so many devices, or none.
    pub(crate) fn offload(&self, devices: Option<usize>) {
        *lock(&self.0.fast_path) = devices;
    }

    pub(super) fn fast_path(&self) -> Option<usize> {
        *lock(&self.0.fast_path)
    }

    /// Who hears of the CNI plugin's calls.
    pub(crate) fn cni(&self) -> &CniListener {
        &self.0.cni
    }

    /// What the datapath of `udp` counted; nothing while it carried nothing.
    pub(super) fn tunnel(&self) -> BTreeMap<String, u64> {
        let counters = lock(&self.0.tunnel).clone();
        let all: BTreeMap<String, u64> =
            counters.iter().flat_map(|all| all.all()).map(|(name, value)| (name.to_owned(), value)).collect();
        if all.values().all(|value| *value == 0) { BTreeMap::new() } else { all }
    }

    /// The node became ready, or is no longer.
    pub(crate) fn ready(&self, ready: bool) {
        *lock(&self.0.ready_since) = ready.then(SystemTime::now);
    }

    pub(super) fn ready_since(&self) -> Option<SystemTime> {
        *lock(&self.0.ready_since)
    }

    pub(super) fn started(&self) -> SystemTime {
        self.0.started
    }

    pub(super) fn pools(&self) -> MutexGuard<'_, Pools> {
        lock(&self.0.pools)
    }

    /// Compares the kernel's counter of wrong checksums with what it was.
    pub(super) fn look_at_checksums(&self) -> Checksums {
        let mut checksums = lock(&self.0.checksums);
        checksums.take(host::checksum_errors(), SystemTime::now());
        *checksums
    }
}

/// Every value that is stored here is whole, so a panic elsewhere is no reason to stop telling.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
