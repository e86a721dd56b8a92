//! The agent's life: a configuration, an interface, a lease, and then the kernel kept as the leases ask.
//!
//! Whatever happens (a snapshot, a notification of the kernel, a failure, time), the loop does the same
//! [`turn`](Agent::turn): look, plan, converge, write `subnet.env`. Nothing here ends the process but a
//! broken netlink socket: what stands in the way is said in the log and in `/readyz`, and tried again.

mod change;
mod claim;
mod contest;
mod dispute;
mod files;
mod journal;
mod plan;
mod prerequisites;
mod recall;
mod rules;
mod standing;
mod tenure;
#[cfg(test)]
mod tests;
mod underlay;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use backends::backend::Direct;
use backends::kernel::{Interest, Notices, Observed, Records};
use backends::{Firewall, Kernel, KernelError, KernelState, Name, Report, Surroundings, Ways, converge_but};
use ipnet::IpNet;
use subnet::env_file::{Previous, SubnetEnv, sweep};
use subnet::net::overlap;
use subnet::store::random_below;
use subnet::{Attachment, Feed, Known, Lease, LeaseStore, Loss, NetworkConfig, PublicAddrs, Subnets};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep};

use crate::interface::{External, Selectors};
use crate::policy::Facts;
use crate::serve::Health;
use change::{Change, News};
use claim::{Beginning, Identity};
use contest::Contest;
use dispute::Disputes;
use journal::Journal;
use prerequisites::Prerequisites;
use recall::Keeper;
use rules::Rules;
use standing::Trouble;
use tenure::{Task, stranded};
use underlay::Choosing;

/// The kernel is compared with the leases this often although nothing was heard of it.
const RESYNC: Duration = Duration::from_secs(60);
/// The loop is taken for dead when it has not turned for three of these.
pub(crate) const LIVENESS: Duration = RESYNC.saturating_mul(3);
/// Notifications come in bursts: the kernel is looked at when none came for this long …
const QUIET: Duration = Duration::from_millis(20);
/// … or when the burst has lasted this long.
const PATIENCE: Duration = Duration::from_millis(200);
/// Time between attempts after failures, doubling up to the second.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// After so many changes at once, or news of so many leases, memory is given back.
const BULK: usize = 1000;

/// The conditions of readiness.
pub(crate) mod condition {
    /// The network configuration was read and can be carried out.
    pub(crate) const CONFIGURATION: &str = "configuration";
    /// There is an external interface.
    pub(crate) const INTERFACE: &str = "interface";
    /// The store lets this node in, and the own lease does not end soon without being renewed.
    pub(crate) const STORE: &str = "store";
    /// This node holds a lease.
    pub(crate) const LEASE: &str = "lease";
    /// The leases of the cluster were read once.
    pub(crate) const PEERS: &str = "peers";
    /// The kernel was brought into the state that the leases ask for.
    pub(crate) const KERNEL: &str = "kernel";
    /// The traffic rules are in place, and no others keep pods' packets from passing.
    pub(crate) const RULES: &str = "rules";
    /// `subnet.env` is written.
    pub(crate) const SUBNET_FILE: &str = "subnet-file";
    /// The CNI configuration is in place; only where one is asked for.
    pub(crate) const CNI_CONF: &str = "cni-conf";
    /// All that there always are.
    pub(crate) const ALL: [&str; 8] =
        [CONFIGURATION, INTERFACE, STORE, LEASE, PEERS, KERNEL, RULES, SUBNET_FILE];
}

/// What the agent is told by its operator.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// How to find the external interface.
    pub(crate) selectors: Selectors,
    /// Where to write `subnet.env`.
    pub(crate) subnet_file: PathBuf,
    /// Where to keep what is known of the cluster, for a start without the store.
    pub(crate) state_file: PathBuf,
    /// A CNI configuration to copy, and where to, once pods can be added (`--cni-conf`).
    pub(crate) cni_conf: Option<(PathBuf, PathBuf)>,
    /// Which traffic rules to install.
    pub(crate) traffic: TrafficSettings,
    /// Switch IP forwarding on at start where it is off (`--ip-forward`).
    pub(crate) ip_forward: bool,
    /// Pods reach Services by rules of kube-proxy, which packets over a bridge have to meet.
    pub(crate) services: bool,
    /// Where the CNI plugin asks for a pod's network policies, if they are enforced.
    pub(crate) policy_socket: Option<PathBuf>,
    /// Who enforces network policies, and has to know the leases for that.
    pub(crate) policies: Option<watch::Sender<Option<Facts>>>,
}

/// Which traffic rules the operator asks for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TrafficSettings {
    /// Masquerade pods that leave the network (`--ip-masq`).
    pub(crate) masquerade: bool,
    /// Choose source ports at random (not `--ip-masq-fully-random-disable`).
    pub(crate) fully_random: bool,
    /// Accept what is forwarded from and to the network (`--iptables-forward-rules`).
    pub(crate) forward: bool,
}

/// What the agent works on the host with.
pub(crate) struct Hands<K> {
    /// Devices, addresses, routes.
    pub(crate) kernel: K,
    /// Traffic rules.
    pub(crate) firewall: Box<dyn Firewall>,
}

/// Runs until the kernel's notifications fail for good; stopping is dropping. The kernel is left as it is.
///
/// `rules_moved` is notified when traffic rules that concern us were changed by somebody.
pub(crate) async fn run<K: Kernel, N: Notices, S: LeaseStore>(
    hands: Hands<K>,
    notices: N,
    rules_moved: &Notify,
    store: S,
    settings: Settings,
    health: Health,
) -> KernelError {
    let (moved, interest) = (Notify::new(), Mutex::new(Interest::default()));
    let life = async {
        if settings.cni_conf.is_some() {
            health.set(condition::CNI_CONF, Err("not written yet".to_owned()));
        }
        for path in [&settings.subnet_file, &settings.state_file] {
            sweep(path);
        }
        let store = Arc::new(store);
        let saved = recall::read(&settings.state_file, &store.describe(), &health);
        let (identity, stores) = (Identity::new(saved.as_ref()), store.endpoints().await);
        let (mut change, mut settings) = (Change::default(), settings);
        let (mut network, mut ways, recalled) =
            match claim::configuration(&*store, saved.clone(), &health).await {
                Beginning::Configured(network, ways) => (network, ways, None),
                Beginning::Refused(saved, ways) => (saved.network.clone(), ways, None),
                Beginning::Recalled(saved, ways, why) => (saved.network.clone(), ways, Some((*saved, why))),
            };
        let (mut records, mut own_before) = (Records::default(), Subnets::default());
        if let Some(saved) = saved {
            records.learn(&saved.leases);
            own_before = saved.own;
            let own = saved.leases.leases.get(&saved.own);
            settings.selectors.prefer = own.map(|lease| lease.public).unwrap_or_default();
            if let Some(before) = Change::since_restart(&saved, &network) {
                (change, network, ways) = before;
            }
            // Peers may announce what this node announced before it was restarted with something else.
            ways.remember(&saved.former, &network);
            ways.remember(std::slice::from_ref(&saved.network.backend), &network);
            change.former.extend(saved.network.networks().iter().chain(saved.left.iter().copied()));
        }
        let given = settings.selectors.public;
        if recalled.is_none() {
            settings.selectors.public = or(claim::node_public(&*store, &health).await, given);
        }
        let previous = Previous::read(&settings.subnet_file);
        let mut held: BTreeSet<IpNet> = previous.subnets.iter().collect();
        held.extend(own_before.iter());
        let former: Vec<_> = previous.networks.iter().collect();
        let (feed, known) = Feed::channel();
        let agent = Agent {
            hands: Some(hands),
            store,
            identity,
            stores,
            surroundings: Surroundings::default(),
            disputes: Disputes::default(),
            settings,
            given,
            health,
            interest: &interest,
            moved: &moved,
            rules_moved,
            network,
            ways,
            change,
            previous,
            feed,
            known,
            external: None,
            choosing: Choosing::default(),
            lease: None,
            plan: None,
            found: Arc::default(),
            direct: Direct::default(),
            expiry: None,
            claiming: None,
            claimed: None,
            following: None,
            holding: None,
            trouble: None,
            lapsed: false,
            reconnecting: None,
            announcing: None,
            lost: Vec::new(),
            held,
            records: Arc::new(records),
            made: BTreeSet::new(),
            freed: BTreeSet::new(),
            draining: false,
            contest: Contest::default(),
            sound: false,
            written: None,
            bulky: false,
            rules: Rules::new(former),
            keeper: Keeper::default(),
            journal: Journal::default(),
            prerequisites: Prerequisites::default(),
        };
        agent.recalling(recalled).live().await
    };
    tokio::select! {
        error = notices.run(&interest, &moved) => error,
        error = life => error,
    }
}

/// What the store says about this node's public addresses, and what the operator's flags say otherwise.
fn or(store: PublicAddrs, flags: PublicAddrs) -> PublicAddrs {
    PublicAddrs { v4: store.v4.or(flags.v4), v6: store.v6.or(flags.v6) }
}

struct Agent<'a, K, S> {
    /// Absent only while a blocking thread works with them.
    hands: Option<Hands<K>>,
    store: Arc<S>,
    settings: Settings,
    /// The public addresses of the operator's flags.
    given: PublicAddrs,
    health: Health,
    interest: &'a Mutex<Interest>,
    moved: &'a Notify,
    rules_moved: &'a Notify,
    network: NetworkConfig,
    /// How peers are reached.
    ways: Ways,
    change: Change,
    identity: Identity,
    /// Where the store answers.
    stores: Vec<IpAddr>,
    /// What of the host's own network no subnet may cover.
    surroundings: Surroundings,
    /// MACs that several nodes announce.
    disputes: Disputes,
    /// What the run before this one had, until its leftovers are swept.
    previous: Previous,
    feed: Feed,
    known: watch::Receiver<Known>,
    external: Option<External>,
    choosing: Choosing,
    lease: Option<Lease>,
    plan: Option<Arc<KernelState>>,
    /// What an earlier run left in the kernel, until there is a plan.
    found: Arc<KernelState>,
    /// The peers on this node's own links, where somebody wants to know.
    direct: Direct,
    /// When the next way that nobody uses any more is given up.
    expiry: Option<Instant>,
    claiming: Option<Task<Lease>>,
    /// What was published last, or is being published.
    claimed: Option<(PublicAddrs, Attachment)>,
    following: Option<Task<std::convert::Infallible>>,
    holding: Option<Task<Loss>>,
    /// What is wrong with the store, if anything.
    trouble: Option<Trouble>,
    /// The own lease ended, or is about to, while it can't be renewed.
    lapsed: bool,
    /// Waits for the store, while this node runs on what was saved.
    reconnecting: Option<Task<()>>,
    /// Tells the cluster that this node's network works; begun once.
    announcing: Option<Task<()>>,
    /// Subnets that were ours and on which pods may still be.
    lost: Vec<Subnets>,
    /// Every subnet of which there is a record that this node holds or held it.
    held: BTreeSet<IpNet>,
    /// What leases said since the start, and what was saved of them.
    records: Arc<Records>,
    /// The tunnel devices that this process made.
    made: BTreeSet<Name>,
    /// Addresses that were taken off bridges: none of them a second time.
    freed: BTreeSet<(Name, IpNet)>,
    /// A bridge keeps pods from being added until the last one on it is gone.
    draining: bool,
    contest: Contest,
    /// Devices and addresses are in order, so pods can be connected, though a way to some peer may fail.
    sound: bool,
    /// What this run wrote to `subnet.env` last.
    written: Option<SubnetEnv>,
    /// Much memory was needed for a moment.
    bulky: bool,
    rules: Rules,
    keeper: Keeper,
    journal: Journal,
    prerequisites: Prerequisites,
}

impl<K: Kernel, S: LeaseStore> Agent<'_, K, S> {
    /// Ends when the kernel can't be read.
    async fn live(mut self) -> KernelError {
        let mut failures = 0;
        if self.reconnecting.is_none() {
            // From the first moment: what stands in the way of an interface or a lease may be corrected.
            self.change.news = News::of(&self.store);
        }
        loop {
            self.health.beat();
            let wait = match self.turn().await {
                Turn::Done => {
                    failures = 0;
                    // Nodes that started together need not look together.
                    RESYNC - Duration::from_millis(random_below(6_000) as u64)
                }
                Turn::Again => {
                    let wait = RETRY.1.min(RETRY.0 * 2u32.pow(failures));
                    failures = (failures + 1).min(5);
                    wait
                }
                Turn::Broken(error) => return error,
            };
            let expiry = self.expiry.map(|at| at.saturating_duration_since(Instant::now()));
            let held = self.change.held(self.sound && self.lease.is_some());
            let (_, fought) = self.journal.held(Instant::now().into_std());
            let rules = self.rules.held();
            let contest = self.contest.wait();
            let wait = [
                self.keeper.again,
                self.keeper.files,
                expiry,
                held,
                contest,
                self.choosing.again(),
                self.rules.again(),
                fought,
                rules,
            ]
            .into_iter()
            .flatten()
            .fold(wait, Duration::min);
            tokio::select! {
                () = self.moved.notified() => settle(self.moved).await,
                () = self.rules_moved.notified() => {
                    settle(self.rules_moved).await;
                    self.rules.due();
                }
                Ok(()) = self.known.changed() => self.known.mark_changed(),
                lease = Task::of(&mut self.claiming) => self.leased(lease),
                loss = Task::of(&mut self.holding) => self.lost(loss),
                () = Task::of(&mut self.reconnecting) => self.reconnected(),
                news = self.change.news.next() => self.told(news),
                () = sleep(wait) => {}
            }
        }
    }

    /// Brings everything one step further, as far as it is known.
    async fn turn(&mut self) -> Turn {
        if self.external.is_none() {
            match self.look().await {
                Ok(observed) => {
                    self.choose(&observed);
                    self.found = Arc::new(observed.state);
                }
                Err(error) => return Turn::Broken(error),
            }
        }
        self.try_candidate();
        self.claim();
        self.hear();
        let mut outcome = Turn::Done;
        // An interface that turns out to have changed meanwhile changes the plan, and so does a
        // configuration that the kernel refuses.
        for _ in 0..3 {
            if let Err(error) = self.find_direct().await {
                return Turn::Broken(error);
            }
            self.tell_policies();
            let Some(plan) = self.plan() else { return Turn::Done };
            self.filter_tunnels().await;
            let mut report = match self.converge(plan).await {
                Ok(report) => report,
                Err(error) => return Turn::Broken(error),
            };
            self.bulky |= report.applied.len() >= BULK;
            // First, so that readiness is about what is so after that.
            self.mend_bridges(&mut report.observed).await;
            // What the kernel refuses of a configuration that is only tried is no fault of the node.
            let retry = self.judge_change(&report);
            outcome = if retry { Turn::Again } else { self.judge(&report) };
            self.judge_left(&report.observed);
            let before = self.external.clone();
            self.choose(&report.observed);
            self.judge_underlay(&report.observed);
            self.look_at_prerequisites(&report.observed);
            // What was found may change the plan: an address that came into a peer's subnet.
            if self.external == before && !retry && self.plan.is_some() {
                break;
            }
            self.claim();
        }
        self.announce();
        if self.sound {
            // Before pods may start: none of them shall be seen by an address that it should not have.
            if !self.keep_rules().await {
                outcome = Turn::Again;
            }
            self.keeper.files = self.write_files();
            self.keeper.again = self.save().await;
            if self.bulky {
                self.bulky = false;
                backends::memory::give_back();
            }
        }
        outcome
    }

    /// Lends the kernel and the firewall to a thread that may block, so that health is answered meanwhile.
    async fn with_hands<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut Hands<K>) -> T + Send + 'static,
    ) -> T {
        let mut hands = self.hands.take().expect("only one piece of work has the hands at a time");
        let done = tokio::task::spawn_blocking(move || {
            let result = work(&mut hands);
            (hands, result)
        });
        let (hands, result) = done.await.expect("work on the host does not panic");
        self.hands = Some(hands);
        result
    }

    async fn look(&mut self) -> Result<Observed, KernelError> {
        // Their names are enough for looking at them: one may have the MAC that peers know.
        let mut scope = self.scope();
        scope.devices.extend(self.ways.devices());
        self.with_hands(move |hands| hands.kernel.observe(&KernelState::default(), &scope)).await
    }

    async fn converge(&mut self, plan: Arc<KernelState>) -> Result<Report, KernelError> {
        let scope = self.scope();
        let repaired = Arc::ptr_eq(&self.interest().desired, &plan);
        let (held, _) = self.journal.held(Instant::now().into_std());
        // Before the changes: their echo has to be recognised as what is wanted.
        self.set_interest(|interest| {
            interest.desired = Arc::clone(&plan);
            interest.scope = scope.clone();
        });
        let work = move |hands: &mut Hands<K>| converge_but(&mut hands.kernel, &plan, &scope, &held);
        let report = self.with_hands(work).await?;
        let fights = self.journal.report(&report, repaired, Instant::now().into_std());
        self.health.note("fights", fights);
        self.set_interest(|interest| interest.host = Arc::new(report.observed.host.clone()));
        Ok(report)
    }

    fn interest(&self) -> MutexGuard<'_, Interest> {
        self.interest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_interest(&self, change: impl FnOnce(&mut Interest)) {
        change(&mut self.interest());
    }

    /// What a run of the reconciler means for readiness and for the next turn.
    fn judge(&mut self, report: &Report) -> Turn {
        let own = self.ways.own_devices();
        let trouble = report.failed.iter().find(|error| error.concerns_node(&own));
        self.health.set(condition::KERNEL, trouble.map_or(Ok(()), |error| Err(error.to_string())));
        report.applied.iter().for_each(|change| note_made(&mut self.made, change));
        let all = self.known.borrow().leases.clone();
        let own = self.lease.as_ref().map(|lease| lease.subnets);
        let taken = |subnet| {
            let mut held = all.iter().flat_map(|all| all.leases.keys()).filter(|held| Some(**held) != own);
            held.any(|held| held.iter().any(|held| overlap(held, subnet)))
        };
        let stranded: Vec<String> =
            self.lost.iter().filter_map(|subnets| stranded(subnets, report, taken)).collect();
        if stranded.is_empty() {
            self.lost.clear();
        }
        let state = match (self.contest.reason(), stranded.is_empty()) {
            (Some(reason), _) => Err(reason),
            (None, false) => Err(stranded.join("; ")),
            (None, true) => Ok(()),
        };
        self.health.set(condition::LEASE, state);
        if trouble.is_none() {
            // What the run before left is swept.
            self.previous = Previous::default();
        }
        self.sound = trouble.is_none();
        if report.failed.is_empty() && report.settled { Turn::Done } else { Turn::Again }
    }
}

/// Keeps the record of the devices that this process made or set up.
fn note_made(made: &mut BTreeSet<Name>, change: &backends::Change) {
    use backends::Change;
    match change {
        Change::AddLink(name, _) | Change::SetLink(name, _) | Change::AddAddress(name, _) => {
            made.insert(*name);
        }
        Change::RenameLink(from, to) => {
            made.remove(from);
            made.insert(*to);
        }
        Change::DelLink(name) => {
            made.remove(name);
        }
        _ => {}
    }
}

/// How a turn ended.
enum Turn {
    /// Nothing more to do until something happens.
    Done,
    /// Something failed that may succeed later.
    Again,
    /// The kernel can't be read.
    Broken(KernelError),
}

/// Waits until a burst of notifications is over.
async fn settle(moved: &Notify) {
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end && tokio::time::timeout(QUIET, moved.notified()).await.is_ok() {}
}
