//! The task that owns the compiler and the tables: it gathers what changes, and brings it into the kernel.

mod adds;
mod asked;
mod report;

use std::net::IpAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Context;
use backends::kernel::netlink::{BridgeListener, Netlink};
use backends::policy::{Converged, Enforcer, Engine, Settings, TableStep, own_tables};
use backends::{Moved, NftError, NftListener, Watched};
use subnet::kube::{PolicyApi, Watch};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use super::adding::{AddStage, Adding};
use super::announce::{OldConnections, PolicyRequest, Retry};
use super::kept::{self, Kept};
use super::known::{Effect, Known};
use super::readings::Readings;
use super::steering::{Steered, Steerer};
use super::watches::Watches;
use super::{Figures, PolicyFacts, PolicyOptions};
use crate::lent::Lent;
use crate::serve::Health;
use crate::{fast_path, ipvs};
use adds::{ADD_TIMEOUT, Fetched};

/// The condition of readiness that there is while policies are enforced.
pub(crate) const CONDITION: &str = "network-policy";

/// Changes that follow on each other within the first of these times are one transaction, after the second at the
/// latest.
const GATHER: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(25));
/// News that are taken in before anything else is looked at.
const NEWS_MAX: usize = 2000;
/// Time between attempts after refusals, doubling up to the second.
const RETRY: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(30));
/// How often sysctls are looked at that send no notification.
const SYSCTL_INTERVAL: Duration = Duration::from_secs(1);
/// How often steering is looked at while there are no tables.
const STEER_INTERVAL: Duration = Duration::from_secs(60);
/// How long a change waits for the pods that it speaks of, if they have to be listed first.
const CHANGE_WAITS: Duration = Duration::from_millis(500);
/// More repairs than this within a minute are made no more than one a second.
const REPAIRS_MAX: u32 = 60;

/// What works on the kernel.
struct PolicyKernel {
    enforcer: Enforcer,
    steerer: Steerer,
}

impl PolicyKernel {
    fn open(options: &PolicyOptions) -> anyhow::Result<Self> {
        let settings = options.settings(&PolicyFacts::default());
        let engine = Engine::new(settings, options.mark_shift, backends::random::byte());
        let mut enforcer =
            Enforcer::open(engine).context("--network-policy needs nftables and connection tracking")?;
        enforcer.fast_path = options.fast_path != fast_path::FastPathMode::Off;
        let steerer = Steerer::new(Netlink::open()?, options.steer);
        Ok(Self { enforcer, steerer })
    }

    /// What to be told of when another program changes it.
    fn watched(&self) -> Watched {
        Watched {
            ports: [self.enforcer.port()].into(),
            tables: own_tables().into_iter().collect(),
            ..Watched::default()
        }
    }
}

/// How far the start has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Policies, namespaces, own pods or the lease are not known yet: the tables are left as they are.
    Waiting,
    /// The pods that policies name are being listed. Tables of an earlier run stay until that is done; without any,
    /// no peer is let in for longer than is needed.
    Listing { until: Option<Instant> },
    /// The kernel follows what is known.
    Enforcing,
}

/// Enforces network policies on this node.
pub(crate) struct Policies {
    options: PolicyOptions,
    api: Arc<PolicyApi>,
    health: Health,
    facts: watch::Receiver<Option<PolicyFacts>>,
    requests: mpsc::Receiver<PolicyRequest>,
    tables: NftListener,
    watched: Mutex<Watched>,
    bridges: BridgeListener,
    hands: Lent<PolicyKernel>,
    known: Known,
    kept: Kept,
    watches: Watches,
    phase: Phase,
    /// What changed and is not in the kernel yet: since when, and when it last did.
    gathered: Option<(Instant, Instant)>,
    /// Something waits for the kernel now.
    urgent: bool,
    /// Which pods have to be watched may have changed.
    demand_moved: bool,
    /// Since when pods are missing that policies name.
    missing_since: Option<Instant>,
    /// When to plan again though nothing changes.
    again: Option<Instant>,
    /// When to try again what was refused, and after which delay.
    retry: Option<(Instant, Duration)>,
    refused: Option<String>,
    /// When somebody else changed the tables.
    damaged: Option<Instant>,
    /// The minute in which repairs are counted, and their number.
    repairs: (Instant, u32),
    steer_due: Instant,
    steered: Result<Steered, String>,
    adding: Vec<(u64, Adding)>,
    next_adding: u64,
    readings: Readings,
    releasing: Vec<oneshot::Sender<Result<(), Retry>>>,
    fetching: JoinSet<Fetched>,
    figures: Figures,
    enforced: bool,
    ready: bool,
    /// Told when this becomes ready, or is no longer.
    readiness_moved: Arc<Notify>,
}

impl Policies {
    /// Opens what is needed of the kernel in the calling thread's network namespace.
    ///
    /// # Errors
    /// A sentence about what the kernel or the directory of the subnet file lacks.
    pub(crate) fn open(
        options: PolicyOptions,
        api: PolicyApi,
        subnet_file: &Path,
        facts: watch::Receiver<Option<PolicyFacts>>,
        requests: mpsc::Receiver<PolicyRequest>,
        health: Health,
        readiness_moved: Arc<Notify>,
    ) -> anyhow::Result<Self> {
        let directory = kept::directory(subnet_file);
        let kept = Kept::open(directory.clone()).with_context(|| {
            format!("--network-policy keeps what it is told about pods in {}", directory.display())
        })?;
        let hands = PolicyKernel::open(&options)?;
        let now = Instant::now();
        health.set(CONDITION, Err("network policies were not read yet".to_owned()));
        let mut policies = Self {
            options,
            api: Arc::new(api),
            health,
            facts,
            requests,
            tables: NftListener::open()?,
            watched: Mutex::new(hands.watched()),
            bridges: BridgeListener::open()?,
            hands: Lent::new(hands),
            known: Known::default(),
            kept,
            watches: Watches::default(),
            phase: Phase::Waiting,
            gathered: None,
            urgent: false,
            demand_moved: false,
            missing_since: None,
            again: None,
            retry: None,
            refused: None,
            damaged: None,
            repairs: (now, 0),
            steer_due: now,
            steered: Ok(Steered::Off),
            adding: Vec::new(),
            next_adding: 0,
            readings: Readings::default(),
            releasing: Vec::new(),
            fetching: JoinSet::new(),
            figures: Figures::default(),
            enforced: false,
            ready: false,
            readiness_moved,
        };
        for watch in [Watch::Policies, Watch::Namespaces, Watch::OwnPods] {
            policies.watches.start_for_good(watch, &policies.api, &mut policies.known);
        }
        Ok(policies)
    }

    /// Runs until the kernel's notifications fail for good; stopping is dropping. The tables are left as they are.
    pub(crate) async fn run(mut self) -> anyhow::Error {
        self.take_facts();
        loop {
            let wake = self.wake();
            tokio::select! {
                Some(news) = self.watches.news.recv() => {
                    let mut effect = self.hear(news);
                    for _ in 0..NEWS_MAX {
                        let Ok(news) = self.watches.news.try_recv() else { break };
                        let more = self.hear(news);
                        effect = Effect { cluster: effect.cluster | more.cluster, demand: effect.demand | more.demand };
                    }
                    self.note(effect);
                }
                Some(request) = self.requests.recv() => self.take(request),
                Some(Ok(fetched)) = self.fetching.join_next() => self.fetched(fetched),
                Ok(()) = self.facts.changed() => self.take_facts(),
                moved = self.tables.moved(&self.watched) => match moved {
                    Ok(moved) => self.tables_moved(&moved),
                    Err(error) => return error.into(),
                },
                moved = self.bridges.moved() => match moved {
                    Ok(()) => self.bridges_moved(),
                    Err(error) => return error.into(),
                },
                () = sleep_until(wake) => {}
            }
            self.advance().await;
        }
    }

    /// When to look again though nothing is heard.
    fn wake(&self) -> Instant {
        let now = Instant::now();
        let gathered = self.gathered.map(|(first, last)| (last + GATHER.0).min(first + GATHER.1));
        let waiting = self.phase == Phase::Waiting;
        let adding = self.adding.iter().map(|(_, adding)| match adding.step {
            // No pod is asked for before the first lists are there.
            AddStage::Watched(_) if waiting => adding.since + ADD_TIMEOUT,
            AddStage::Watched(until) | AddStage::Listed(until) => until.min(adding.since + ADD_TIMEOUT),
            AddStage::Asked | AddStage::Found(_) | AddStage::Programmed => adding.since + ADD_TIMEOUT,
        });
        let missing = self.missing_since.map(|since| since + CHANGE_WAITS).filter(|at| *at > now);
        let listing = match self.phase {
            Phase::Listing { until } => until,
            Phase::Waiting | Phase::Enforcing => None,
        };
        let steer = (self.phase == Phase::Enforcing).then_some(self.steer_due);
        let mut wake = now + Duration::from_secs(60);
        let others = [missing, listing, self.again, steer, self.watches.next_end()];
        // While a start or a pause has to be waited for, what was gathered waits, too.
        let gathered =
            gathered.filter(|_| self.phase == Phase::Enforcing).map(|at| at.max(self.held_until(now)));
        for at in others.into_iter().flatten().chain(gathered).chain(adding) {
            wake = wake.min(at);
        }
        wake
    }

    /// Until when no transaction is to be made, because one was refused or repairs are fought over; or because pods are
    /// missing that a change speaks of.
    fn held_until(&self, now: Instant) -> Instant {
        let mut until = now;
        if let Some((at, _)) = self.retry {
            until = until.max(at);
        }
        if self.damaged.is_some() {
            if self.repairs.1 > REPAIRS_MAX {
                until = until.max(self.damaged.unwrap_or(now) + SYSCTL_INTERVAL);
            }
        } else if let Some(since) = self.missing_since {
            until = until.max(since + CHANGE_WAITS);
        }
        until
    }

    fn hear(&mut self, news: subnet::kube::News) -> Effect {
        let cluster = &mut self.hands.get_mut().enforcer.engine.cluster;
        self.known.hear(news.watch, news.told, cluster, &mut self.kept)
    }

    fn note(&mut self, effect: Effect) {
        self.demand_moved |= effect.demand;
        if effect.cluster || effect.demand {
            let now = Instant::now();
            self.gathered = Some((self.gathered.map_or(now, |(first, _)| first), now));
        }
    }

    fn take_facts(&mut self) {
        let Some(facts) = self.facts.borrow_and_update().clone() else { return };
        let hands = self.hands.get_mut();
        hands.enforcer.engine.set_settings(self.options.settings(&facts));
        hands.steerer.forget();
        self.steer_due = Instant::now();
        self.note(Effect { cluster: true, demand: false });
    }

    /// Somebody else changed our tables.
    fn tables_moved(&mut self, moved: &Moved) {
        tracing::debug!(what = %moved, "network policies: another program made a change");
        let hands = self.hands.get_mut();
        hands.enforcer.engine.forget_kernel();
        hands.steerer.forget();
        let now = Instant::now();
        self.damaged.get_or_insert(now);
        self.steer_due = now;
        self.note(Effect { cluster: true, demand: false });
    }

    fn bridges_moved(&mut self) {
        self.hands.get_mut().steerer.doubt_bridges();
        // They come in bursts.
        self.steer_due = self.steer_due.min(Instant::now() + GATHER.1);
    }

    /// Brings everything one step further.
    async fn advance(&mut self) {
        let now = Instant::now();
        self.begin_phase(now).await;
        self.adjust_watches(now);
        self.advance_adding(now);
        self.adjust_watches(now);
        let due = self.gathered.is_some_and(|(first, last)| {
            now >= (last + GATHER.0).min(first + GATHER.1) && now >= self.held_until(now)
        });
        let again = self.again.is_some_and(|at| at <= now);
        if self.phase == Phase::Enforcing && (due || again || self.urgent) {
            self.converge(now).await;
        }
        if self.phase == Phase::Enforcing && self.steer_due <= Instant::now() {
            self.steer().await;
        }
        self.tell();
    }

    /// The start: nothing is changed before all is known.
    async fn begin_phase(&mut self, now: Instant) {
        if self.phase == Phase::Waiting {
            if self.facts.borrow().is_none() || !self.watches.base_complete(&self.known) {
                return;
            }
            // Whether anything holds meanwhile decides how long the pods that policies name may take.
            let there = self.hands.to(|hands| hands.enforcer.is_there()).await;
            let until = if matches!(there, Ok(true)) { None } else { Some(now + CHANGE_WAITS) };
            self.phase = Phase::Listing { until };
            self.demand_moved = true;
            self.adjust_watches(now);
        }
        if let Phase::Listing { until } = self.phase
            && (self.watches.peers_complete(&self.known) || until.is_some_and(|until| until <= now))
        {
            self.phase = Phase::Enforcing;
            self.urgent = true;
        }
    }

    fn adjust_watches(&mut self, now: Instant) {
        let cluster = &mut self.hands.get_mut().enforcer.engine.cluster;
        if std::mem::take(&mut self.demand_moved) && self.phase != Phase::Waiting {
            let demand = self.known.demand(cluster);
            self.watches.demand(demand, &self.api, &mut self.known, now);
        }
        let ended = self.watches.end_idle(&mut self.known, cluster, now);
        if ended {
            self.note(Effect { cluster: true, demand: false });
        }
        if self.watches.peers_complete(&self.known) {
            self.missing_since = None;
        } else {
            self.missing_since.get_or_insert(now);
        }
    }

    async fn converge(&mut self, now: Instant) {
        (self.gathered, self.urgent, self.again) = (None, false, None);
        let (programmed, waiting): (Vec<_>, Vec<_>) = std::mem::take(&mut self.adding)
            .into_iter()
            .partition(|(_, adding)| adding.step == AddStage::Programmed);
        self.adding = waiting;
        let releasing = std::mem::take(&mut self.releasing);
        let started = Instant::now();
        let addresses: Vec<IpAddr> =
            programmed.iter().flat_map(|(_, adding)| adding.pod.addresses.clone()).collect();
        let (converged, old, walked) = self
            .hands
            .to(move |hands| {
                let now = std::time::Instant::now();
                let converged = hands.enforcer.converge(now);
                let old = match &converged {
                    Ok(_) => adds::forget_connections(&mut hands.enforcer, &addresses),
                    Err(_) => OldConnections::Kept,
                };
                let due =
                    hands.enforcer.engine.generations().is_some_and(|generations| generations.walk_due());
                (converged, old, due.then(|| hands.enforcer.forget_old_generations(now)))
            })
            .await;
        if let Some(Err(error)) = walked {
            tracing::warn!(%error, "generations of connections can't be forgotten: load nf_conntrack_netlink");
        }
        self.figures.applied(started.elapsed());
        let outcome = self.converged(&converged, now);
        for (_, adding) in programmed {
            self.figures.added(adding.since.elapsed(), outcome.is_ok());
            adding.end(outcome.clone().map(|()| old));
        }
        for answer in releasing {
            let _ = answer.send(outcome.clone().map_err(|why| Retry { why }));
        }
    }

    /// Takes note of how a transaction went.
    fn converged(&mut self, converged: &Result<Converged, NftError>, now: Instant) -> Result<(), String> {
        match converged {
            Ok(done) => {
                self.figures.changes += done.changes as u64;
                self.again = done.again.map(Instant::from_std);
                (self.retry, self.refused) = (None, None);
                let damaged = self.damaged.take();
                if let Some(since) = damaged.filter(|_| done.changes > 0 || done.table != TableStep::Keep) {
                    self.repaired(since, now);
                }
                if !std::mem::replace(&mut self.enforced, true) {
                    let summary = self.summary();
                    tracing::info!(
                        policies = summary.policies,
                        pods = summary.local_pods,
                        "network policies are enforced"
                    );
                    self.steer_due = now;
                }
                // Whether there are tables decides whether anything is steered.
                self.steer_due = self.steer_due.min(now + SYSCTL_INTERVAL);
                if done.table != TableStep::Keep {
                    self.steer_due = now;
                }
                Ok(())
            }
            Err(error) => {
                let delay = self.retry.map_or(RETRY.0, |(_, delay)| (delay * 2).min(RETRY.1));
                self.retry = Some((now + delay, delay));
                self.gathered = Some((now, now));
                let why = format!("the kernel refuses network policies, those before stay in force: {error}");
                if self.refused.as_ref() != Some(&why) {
                    tracing::error!("{why}");
                }
                self.refused = Some(why.clone());
                Err(why)
            }
        }
    }

    /// Somebody's damage is repaired.
    fn repaired(&mut self, since: Instant, now: Instant) {
        self.figures.repairs += 1;
        if now.duration_since(self.repairs.0) > Duration::from_secs(60) {
            self.repairs = (now, 0);
        }
        self.repairs.1 += 1;
        if self.repairs.1 <= 3 {
            tracing::warn!(
                took = ?since.elapsed(),
                "another program removed or changed the table of network policies: it is put back; connections that \
                 were made meanwhile are judged with their next packet"
            );
        }
    }

    /// Has what IPVS sends judged, if it came.
    fn look_for_ipvs(&mut self) {
        let engine = &mut self.hands.get_mut().enforcer.engine;
        let there = ipvs::is_there();
        if there == engine.settings().ipvs {
            return;
        }
        engine.set_settings(Settings { ipvs: there, ..engine.settings().clone() });
        self.note(Effect { cluster: true, demand: false });
    }

    async fn steer(&mut self) {
        self.look_for_ipvs();
        let subnets = self.facts.borrow().as_ref().map(|facts| facts.subnets.clone()).unwrap_or_default();
        let wanted = self.summary().generation != 0;
        let looked =
            self.hands.to(move |hands| hands.steerer.look(&mut hands.enforcer, &subnets, wanted)).await;
        if let Err(why) = &looked
            && self.steered.as_ref() != Err(why)
        {
            tracing::error!("{why}");
        }
        self.steered = looked;
        // Without tables there is nothing that a sysctl could change.
        self.steer_due = Instant::now() + if wanted { SYSCTL_INTERVAL } else { STEER_INTERVAL };
    }
}
