//! The agent's life: a configuration, an interface, a lease, and then the kernel kept as the leases ask.
//!
//! After each event (a snapshot, a notification of the kernel, a failure, time), the loop takes the same turn: look,
//! plan, converge, write `subnet.env`. [`Machine`] decides, and this file does what it says. Nothing here ends the
//! process but a broken netlink socket: what stands in the way is said in the log and in `/readyz`, and tried again.

mod begin;
mod cause;
mod claim;
mod files;
mod forwarding;
mod machine;
mod news;
mod recall;
mod task;
#[cfg(test)]
mod tests;

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use backends::kernel::{Notifications, Notified};
use backends::{Firewall, Kernel, KernelError, KernelState, converge_since};
#[cfg(test)]
use subnet::Subnets;
use subnet::saved::Written;
use subnet::store::random_below;
use subnet::{Feed, Known, Lease, LeaseStore, Loss};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep};

use crate::extension::Hooks;
use crate::fast_path::FastPathLink;
use crate::interface::Selectors;
use crate::lent::Lent;
use crate::policy::PolicyFacts;
use crate::probe::Targets;
use crate::serve::Health;
use cause::Cause;
use machine::{Action, Event, Machine, Now, Seen};
use news::News;
use task::Task;

/// The kernel is compared with the leases this often although nothing was heard of it …
const RESYNC: Duration = Duration::from_secs(60);
/// … or so much sooner: nodes that started together need not look together.
const JITTER: Duration = Duration::from_secs(6);
/// So many peers are read of the kernel each minute. With more, the time between looks is a minute for each so many …
const PEERS_PER_MINUTE: usize = 5_000;
/// … up to this. Lost notifications have the kernel looked at, however many peers there are.
const MAX_RESYNC: u32 = 5;
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
    /// No other node has this node's WireGuard key; only where there is one.
    pub(crate) const WIREGUARD_KEY: &str = "wireguard-key";
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
    /// Replace a WireGuard key that the node with an older lease has, too (`--wireguard-new-key`).
    pub(crate) new_key: bool,
    /// Notified when the operator wants the host and the WireGuard key looked at again.
    pub(crate) reload: Arc<Notify>,
    /// Who runs the commands of the `extension` backend.
    pub(crate) hooks: Option<Hooks>,
    /// Who enforces network policies, and has to know the leases for that.
    pub(crate) policies: Option<watch::Sender<Option<PolicyFacts>>>,
    /// Who probes the peers, if anybody does.
    pub(crate) probes: Option<watch::Sender<Targets>>,
    /// Who keeps the fast path of pods' flows.
    pub(crate) fast_path: Option<FastPathLink>,
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
pub(crate) async fn run<K: Kernel, N: Notifications, S: LeaseStore>(
    mut hands: Hands<K>,
    notices: N,
    rules_moved: &Notify,
    store: S,
    settings: Settings,
    health: Health,
) -> KernelError {
    let (moved, notified) = (Notify::new(), Mutex::new(Notified::default()));
    let life = async {
        let store = Arc::new(store);
        let (machine, recalled) = begin::machine(&store, settings, health, &mut hands.kernel).await;
        let (feed, known) = Feed::channel();
        let mut agent = Agent {
            rules_mode: hands.firewall.name(),
            hands: Lent::new(hands),
            store,
            machine,
            notified: &notified,
            moved: &moved,
            rules_moved,
            feed,
            known,
            saved: None,
            tasks: Tasks::default(),
        };
        if let Some((leases, own, why)) = recalled {
            tracing::warn!(subnet = %own, peers = leases.leases.len() - 1, "starting with what was saved");
            agent.feed.recall(&leases);
            agent.machine.recalled();
            let (store, health) = (Arc::clone(&agent.store), agent.machine.status.health.clone());
            let waiting = async move { claim::reconnected(&*store, &health, own, why).await };
            agent.tasks.reconnecting = Some(Task::spawn(waiting));
        }
        agent.live().await
    };
    tokio::select! {
        error = notices.run(&notified, &moved) => error,
        error = life => error,
    }
}

/// The hands of the machine: the host, the store and the clock.
struct Agent<'a, K, S> {
    hands: Lent<Hands<K>>,
    /// What makes traffic rules.
    rules_mode: &'static str,
    store: Arc<S>,
    machine: Machine,
    notified: &'a Mutex<Notified>,
    moved: &'a Notify,
    rules_moved: &'a Notify,
    feed: Feed,
    known: watch::Receiver<Known>,
    /// What the file with the saved state says.
    saved: Option<Written>,
    tasks: Tasks,
}

/// What runs beside the loop.
#[derive(Default)]
struct Tasks {
    claiming: Option<Task<Lease>>,
    following: Option<Task<Infallible>>,
    holding: Option<Task<Loss>>,
    /// Waits for the store, while this node runs on what was saved.
    reconnecting: Option<Task<()>>,
    /// Tells the cluster that this node's network works.
    announcing: Option<Task<()>>,
    news: News,
}

impl<K: Kernel, S: LeaseStore> Agent<'_, K, S> {
    /// Ends when the kernel can't be read.
    async fn live(mut self) -> KernelError {
        let mut next = Some(Event::Started);
        let mut cause = Cause::Start;
        loop {
            let begun = Instant::now();
            if let Some(event) = next
                && let Err(error) = self.drive(event).await
            {
                return error;
            }
            self.machine.status.health.beat();
            let turn = Event::Turn { known: self.news_of_the_store(), tenure: self.store.tenure(), cause };
            if let Err(error) = self.drive(turn).await {
                return error;
            }
            self.machine.turned(cause, begun.elapsed(), SystemTime::now());
            self.publish();
            let resync = RESYNC - Duration::from_millis(random_below(JITTER.as_millis() as usize) as u64);
            let wait = self.machine.rest(now(), resync);
            (cause, next) = self.wait(wait).await;
        }
    }

    /// Lets those who ask know what is known after this turn.
    fn publish(&self) {
        let mut published = self.machine.published();
        published.rules.mode = self.rules_mode.to_owned();
        published.store.name = self.store.describe();
        published.counters.overruns = self.notified().overruns;
        self.machine.status.health.board().publish(published);
    }

    /// Waits until there is a reason for a turn.
    async fn wait(&mut self, at_most: Duration) -> (Cause, Option<Event>) {
        let tasks = &mut self.tasks;
        tokio::select! {
            () = self.moved.notified() => {
                settle(self.moved).await;
                (Cause::Kernel, None)
            }
            () = self.rules_moved.notified() => {
                settle(self.rules_moved).await;
                (Cause::Rules, Some(Event::RulesMoved))
            }
            () = self.machine.settings.reload.notified() => (Cause::Configuration, Some(Event::Reload)),
            Ok(()) = self.known.changed() => {
                self.known.mark_changed();
                (Cause::Leases, None)
            }
            lease = Task::of(&mut tasks.claiming) => (Cause::Lease, Some(Event::Leased(lease))),
            loss = Task::of(&mut tasks.holding) => (Cause::Lease, Some(Event::Lost(loss))),
            () = Task::of(&mut tasks.reconnecting) => (Cause::Lease, Some(Event::Reconnected)),
            news = tasks.news.next() => (Cause::Configuration, Some(Event::Told(news))),
            () = started(self.machine.settings.hooks.as_mut()) => (Cause::Lease, None),
            () = sleep(at_most) => (Cause::Timer, None),
        }
    }

    /// What the store says, if that is news.
    fn news_of_the_store(&mut self) -> Option<Known> {
        let known = self.known.borrow_and_update();
        known.has_changed().then(|| known.clone())
    }

    /// Tells the machine something, and does what it says until there is nothing more to do.
    async fn drive(&mut self, event: Event) -> Result<(), KernelError> {
        let mut next = Some(event);
        while let Some(event) = next.take() {
            let actions = self.machine.handle(event, now());
            self.share_interest();
            for action in actions {
                debug_assert!(next.is_none(), "only the last action of an event is answered");
                next = self.carry_out(action).await?;
            }
        }
        Ok(())
    }

    async fn carry_out(&mut self, action: Action) -> Result<Option<Event>, KernelError> {
        if matches!(action, Action::Look(_) | Action::FindDirect(..) | Action::Converge { .. }) {
            self.notified().begin_read();
        }
        let answer = match action {
            Action::Look(scope) => {
                let look = move |hands: &mut Hands<K>| hands.kernel.observe(&KernelState::default(), &scope);
                let observed = self.hands.to(look).await?;
                Event::Looked(observed, self.seen())
            }
            Action::FindDirect(addrs, before) => {
                Event::Direct(self.hands.to(move |hands| hands.kernel.direct(&addrs, &before)).await?)
            }
            Action::ReadSessions(desired) => {
                let read = move |hands: &mut Hands<K>| {
                    let begun = Instant::now();
                    let with = hands.kernel.wireguard_sessions(&desired);
                    (with, begun.elapsed())
                };
                let (with, took) = self.hands.to(read).await;
                Event::Sessions(with, took)
            }
            Action::Converge { plan, scope, held, since } => {
                let work = move |hands: &mut Hands<K>| {
                    converge_since(&mut hands.kernel, since.as_deref(), &plan, &scope, &held)
                };
                let report = self.hands.to(work).await?;
                Event::Converged(report, self.seen())
            }
            Action::FreeBridges(changes) => {
                Event::Freed(self.hands.to(move |hands| hands.kernel.apply(&changes)).await)
            }
            Action::ReadSysctls(keys) => Event::Sysctls(self.kernel().sysctls(&keys)),
            Action::FilterTunnels { filters, former, look } => {
                let work = move |hands: &mut Hands<K>| hands.firewall.filter_tunnels(&filters, &former, look);
                Event::Filtered(self.hands.to(work).await)
            }
            Action::ApplyRules { wanted, former } => {
                Event::Ruled(self.hands.to(move |hands| hands.firewall.converge(&wanted, &former)).await)
            }
            Action::WriteFiles { env, current } => {
                Event::Written(files::write(&self.machine.settings, env, current))
            }
            Action::Save(keep) => {
                let (path, store) = (self.machine.settings.state_file.clone(), self.store.describe());
                let before = self.saved.take();
                let written = tokio::task::spawn_blocking(move || keep.write(&path, &store, before)).await;
                let written = written.unwrap_or_else(|error| Err(error.into()));
                Event::Saved(written.map(|written| self.saved.insert(written).is_whole()))
            }
            action => {
                self.arrange(action);
                return Ok(None);
            }
        };
        Ok(Some(answer))
    }

    /// Carries out actions without an answer.
    fn arrange(&mut self, action: Action) {
        let (store, tasks) = (Arc::clone(&self.store), &mut self.tasks);
        match action {
            Action::Claim(facts) => {
                let health = self.machine.status.health.clone();
                tasks.claiming = Some(Task::spawn(claim::obtain(store, *facts, health)));
            }
            Action::StopClaiming => tasks.claiming = None,
            Action::Hold if tasks.holding.is_none() => {
                tasks.holding = Some(Task::spawn(async move { store.hold().await }));
            }
            Action::Follow if tasks.following.is_none() => {
                let feed = self.feed.clone();
                tasks.following = Some(Task::spawn(async move { store.follow(&feed).await }));
            }
            Action::AnnounceReady if tasks.announcing.is_none() => {
                tasks.announcing = Some(Task::spawn(async move { store.announce_ready().await }));
            }
            Action::Listen => tasks.news = News::of(&store),
            Action::Readdressed => store.readdressed(),
            Action::Wake => self.moved.notify_one(),
            Action::RenewKey(former) => {
                match backends::renew_key(&former) {
                    Ok(key) => {
                        tracing::warn!(%key, "this node takes another WireGuard key (--wireguard-new-key)")
                    }
                    Err(why) => tracing::error!("--wireguard-new-key: {why}"),
                }
                self.machine.settings.reload.notify_one();
            }
            Action::GiveMemoryBack => backends::memory::give_back(),
            Action::SwitchForwardingOn { families, outer } => {
                forwarding::switch_forwarding_on(self.kernel(), &families, &outer);
            }
            // It runs already, or it is carried out elsewhere.
            _ => {}
        }
    }

    fn kernel(&mut self) -> &mut K {
        &mut self.hands.get_mut().kernel
    }

    /// What is read of the kernel together with the host.
    fn seen(&mut self) -> Seen {
        let sysctls_moved = std::mem::take(&mut self.notified().sysctls_moved);
        let reach = self.machine.settings.selectors.can_reach;
        let reach = reach.map(|addr| self.kernel().route_to(addr).map_err(|error| error.to_string()));
        Seen { reach, sysctls_moved }
    }

    fn notified(&self) -> MutexGuard<'_, Notified> {
        self.notified.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells those who hear the kernel's notifications what matters from now on. What was answered was read before, so
    /// what they heard meanwhile may be news by it.
    fn share_interest(&self) {
        if self.notified().renew(self.machine.view.interest.clone()) {
            self.moved.notify_one();
        }
    }
}

fn now() -> Now {
    Now { at: Instant::now(), wall: SystemTime::now() }
}

/// Waits until commands have run that pods have to wait for.
async fn started(hooks: Option<&mut Hooks>) {
    if let Some(hooks) = hooks
        && hooks.started.changed().await.is_ok()
    {
        return;
    }
    std::future::pending().await
}

/// Waits until a burst of notifications is over.
async fn settle(moved: &Notify) {
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end && tokio::time::timeout(QUIET, moved.notified()).await.is_ok() {}
}
