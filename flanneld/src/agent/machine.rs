//! What the agent decides: a machine that takes an event with its moment and answers with actions. It reads no clock,
//! does no I/O and never waits; [`super::Agent`] carries its actions out and tells it what came of them.

mod change;
mod contest;
mod dispute;
mod event;
mod extension;
mod increment;
mod journal;
mod keeper;
mod lease;
mod plan;
mod prerequisites;
mod publish;
mod published;
mod rest;
mod rules;
mod sessions;
mod standing;
mod tally;
mod tenure;
#[cfg(test)]
mod tests;
mod underlay;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use backends::backend::Direct;
use backends::kernel::{NotificationFilter, Observed, Records};
use backends::{ActiveBackends, FoundSessions, KernelChange, KernelError, Name, Report, Settled};
use ipnet::IpNet;
use subnet::env_file::Previous;
use subnet::saved::Saved;
use subnet::{Known, NetworkConfig, PublicAddrs, Subnets, Tenure};
use tokio::time::Instant;

use super::cause::Cause;
use super::claim::Identity;
use super::{BULK, Settings, condition};
use crate::interface::External;
use crate::serve::Health;
use change::Change;
pub(super) use event::{Action, Event, Now, Seen};
use journal::Journal;
use keeper::Keeper;
use lease::OwnLease;
use plan::Planner;
use rules::Rules;
use tally::Tally;
use underlay::Underlay;

/// The configuration in force. What a trial swaps, and a refusal restores, as one value.
#[derive(Clone)]
pub(super) struct InForce {
    pub(super) network: NetworkConfig,
    /// How peers are reached.
    pub(super) active: ActiveBackends,
    /// Differs between any two that were in force.
    pub(super) revision: u64,
}

impl InForce {
    /// Puts another configuration in force. The one before is handed back.
    pub(super) fn replace(&mut self, network: NetworkConfig, active: ActiveBackends) -> Self {
        let revision = self.revision + 1;
        std::mem::replace(self, Self { network, active, revision })
    }
}

/// What an operator is told: conditions and notes, log lines, counters.
pub(super) struct Status {
    pub(super) health: Health,
    journal: Journal,
    tally: Tally,
}

/// Records of what is ours: see `Scope`.
#[derive(Default)]
pub(super) struct Ownership {
    /// What the run before this one had, until its leftovers are swept.
    pub(super) previous: Previous,
    /// Every subnet of which there is a record that this node holds or held it.
    pub(super) held: BTreeSet<IpNet>,
    /// What leases said since the start, and what was saved of them.
    pub(super) records: Arc<Records>,
    /// The tunnel devices that this process made.
    pub(super) made: BTreeSet<Name>,
    /// Addresses that were taken off bridges: none of them a second time.
    pub(super) freed: BTreeSet<(Name, IpNet)>,
    /// A bridge keeps pods from being added until the last one on it is gone.
    pub(super) draining: bool,
}

/// What was seen last.
#[derive(Default)]
pub(super) struct View {
    /// What the store says.
    pub(super) known: Known,
    /// The host, and what of the kernel's notifications matters.
    pub(super) interest: NotificationFilter,
    /// With which peers there are sessions of WireGuard, while that matters.
    pub(super) sessions: FoundSessions,
}

/// How a turn goes on, and how the last one ended.
#[derive(Default)]
pub(super) struct Turn {
    pub(super) now: Option<Now>,
    actions: Vec<Action>,
    /// Nothing that woke the loop says that the kernel is not as it was left.
    knows_kernel: bool,
    /// How many times the kernel was converged in this turn.
    rounds: u8,
    /// When the first of what was held back in this turn is due: that may have been in this turn's last moments.
    held_until: Option<Instant>,
    outcome: Outcome,
    /// Turns in a row that ended with failures.
    failures: u32,
    /// What the kernel says, while bridges are freed.
    report: Report,
    /// Which addresses are being removed from bridges.
    pub(super) freeing: Vec<backends::host::StaleBridge>,
    /// The interface before the kernel was looked at, and whether a refused configuration needs another plan.
    before: Option<External>,
    retry: bool,
    /// Devices and addresses are in order, so pods can be connected, though a way to some peer may fail.
    pub(super) sound: bool,
    /// Much memory was needed for a moment.
    pub(super) bulky: bool,
}

/// How a turn ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Nothing more to do until something happens.
    #[default]
    Done,
    /// Something failed that may succeed later.
    Again,
}

/// Whether this node can go on in another network with the subnets that it has, by the rules of its store.
pub(super) type Admits = dyn Fn(&NetworkConfig, &Subnets) -> Result<(), String> + Send + Sync;

pub(super) struct Machine {
    pub(super) settings: Settings,
    pub(super) status: Status,
    force: InForce,
    change: Change,
    own: OwnLease,
    underlay: Underlay,
    ownership: Ownership,
    pub(super) view: View,
    planner: Planner,
    rules: Rules,
    keeper: Keeper,
    turn: Turn,
}

/// From what an agent begins.
pub(super) struct Start {
    pub(super) settings: Settings,
    pub(super) health: Health,
    /// What comes into force: the store's configuration, or the saved one.
    pub(super) network: NetworkConfig,
    pub(super) active: ActiveBackends,
    /// What was saved by an earlier run, and whether that is in use until the store answers.
    pub(super) saved: Option<Saved>,
    pub(super) recalled: bool,
    /// What that run wrote for the CNI plugin.
    pub(super) previous: Previous,
    /// Where the store answers.
    pub(super) stores: Vec<IpAddr>,
    /// The public addresses that the store gives to this node.
    pub(super) given: PublicAddrs,
    /// The kernel has WireGuard, or is not known to lack it.
    pub(super) wireguard: bool,
    pub(super) admits: Arc<Admits>,
}

impl Machine {
    pub(super) fn new(start: Start, at: Instant) -> Self {
        let Start { mut settings, health, mut network, mut active, saved, recalled, previous, .. } = start;
        let identity = Identity::new(saved.as_ref());
        let mut change = Change::default();
        let former: Vec<IpNet> = previous.networks.iter().collect();
        let held = previous.subnets.iter().collect();
        let mut ownership = Ownership { held, previous, ..Ownership::default() };
        let mut lease = None;
        if let Some(saved) = saved {
            let mut records = Records::default();
            records.learn(&saved.leases, None);
            ownership.records = Arc::new(records);
            ownership.held.extend(saved.own.iter());
            let own = saved.leases.leases.get(&saved.own);
            settings.selectors.prefer = own.map(|lease| lease.public).unwrap_or_default();
            lease = own.filter(|_| recalled).cloned();
            if let Some(before) = Change::since_restart(&saved, &network, at) {
                (change, network, active) = before;
            }
            // Peers may announce what this node announced before it was restarted with something else.
            active.remember(&saved.former, &network);
            active.remember(std::slice::from_ref(&saved.network.backend), &network);
            change.former.extend(saved.network.networks().iter().chain(saved.left.iter().copied()));
        }
        if !start.wireguard {
            active.encrypt_in_process();
        }
        let given = settings.selectors.public;
        settings.selectors.public = or(start.given, given);
        let machine = Self {
            settings,
            status: Status { health, journal: Journal::default(), tally: Tally::default() },
            force: InForce { network, active, revision: 0 },
            change,
            own: OwnLease::new(identity, lease, start.admits),
            underlay: Underlay { given, stores: start.stores, ..Underlay::default() },
            ownership,
            view: View::default(),
            planner: Planner::default(),
            rules: Rules::new(former),
            keeper: Keeper::default(),
            turn: Turn::default(),
        };
        machine.note_stand_in();
        machine
    }

    /// Decides what follows from an event.
    pub(super) fn handle(&mut self, event: Event, now: Now) -> Vec<Action> {
        let housekeeping = self.is_housekeeping(now);
        self.turn.now = Some(now);
        match event {
            Event::Started if self.own.is_recalled() => {}
            // From the first moment: what stands in the way of an interface or a lease may be corrected.
            Event::Started => self.act(Action::Listen),
            Event::Turn { known, tenure, cause } => {
                self.turn.knows_kernel = cause == Cause::Leases || cause == Cause::Timer && housekeeping;
                // What the kernel told counts also if this turn ends without a look at it.
                if !self.turn.knows_kernel {
                    self.planner.settled = None;
                }
                self.begin_turn(known, &tenure);
            }
            Event::Looked(observed, seen) => self.looked(observed, seen),
            Event::Sessions(with, took) => self.found_sessions(with, took),
            Event::Direct(found) => self.found_direct(found),
            Event::Filtered(outcome) => {
                self.filtered(&outcome);
                self.converge();
            }
            Event::Converged(report, seen) => self.converged(report, seen),
            Event::Freed(failures) => {
                self.freed(&failures);
                self.judged();
            }
            Event::Sysctls(sysctls) => {
                self.judge_prerequisites(&sysctls);
                self.end_round();
            }
            Event::Ruled(outcome) => {
                if !self.ruled(&outcome) {
                    self.turn.outcome = Outcome::Again;
                }
                self.write_files();
            }
            Event::Written(written) => {
                self.written(&written);
                self.save();
            }
            Event::Saved(written) => {
                self.saved(&written);
                self.end_turn();
            }
            Event::Leased(lease) => self.leased(lease),
            Event::Lost(loss) => self.lost(loss),
            Event::Told(news) => self.told(news),
            Event::Reconnected => self.reconnected(),
            Event::RulesMoved => self.rules.due(),
            Event::Reload => {
                self.rules.due();
                self.change.reread_key();
            }
        }
        std::mem::take(&mut self.turn.actions)
    }

    pub(super) fn act(&mut self, action: Action) {
        self.turn.actions.push(action);
    }

    /// The moment of the event that is being handled.
    pub(super) fn now(&self) -> Now {
        self.turn.now.expect("an event is being handled")
    }

    fn begin_turn(&mut self, known: Option<Known>, tenure: &Tenure) {
        (self.turn.rounds, self.turn.outcome, self.turn.held_until) = (0, Outcome::Done, None);
        self.own.tenure = tenure.clone();
        self.status.tally.tenure(tenure);
        if let Some(known) = known {
            // Many leases in place of others: what held the old ones lies about in pieces.
            self.turn.bulky |= known.leases.as_ref().is_some_and(|all| {
                let before = self.view.known.leases.clone().unwrap_or_default();
                all.leases.changes(&before.leases).take(BULK).count() == BULK
            });
            self.view.known = known;
        }
        if self.underlay.external.is_none() {
            // Their names are enough for looking at them: one may have the MAC that peers know.
            let mut scope = self.scope();
            scope.devices.extend(self.force.active.devices());
            self.act(Action::Look(scope));
        } else {
            self.proceed();
        }
    }

    fn looked(&mut self, observed: Observed, seen: Seen) {
        self.take_in(seen);
        self.choose(&observed);
        self.planner.nexthops = observed.host.nexthops;
        self.planner.found = Arc::new(observed.state);
        self.proceed();
    }

    fn take_in(&mut self, seen: Seen) {
        self.underlay.reach = seen.reach;
        self.underlay.sysctls_moved |= seen.sysctls_moved;
    }

    /// Everything of a turn that needs no look at the kernel.
    fn go_on(&mut self) {
        self.change.end_hold(self.turn.sound && self.own.lease().is_some(), self.now());
        self.try_candidate();
        self.claim();
        self.hear();
        self.begin_round();
    }

    /// An interface that turns out to have changed meanwhile changes the plan, and so does a configuration that the
    /// kernel refuses: then there is another round.
    fn begin_round(&mut self) {
        self.turn.rounds += 1;
        let addrs = self.peers_to_find();
        // Before asking: the answer may be there before this is back.
        self.watch_neighbours(&addrs);
        if addrs.is_empty() {
            self.found_direct(Direct::default());
        } else {
            self.act(Action::FindDirect(addrs, Arc::clone(&self.underlay.direct)));
        }
    }

    fn found_direct(&mut self, found: Direct) {
        self.direct_is(found);
        self.tell_policies();
        if self.plan().is_none() {
            self.turn.failures = 0;
            return;
        }
        match self.due_filters() {
            Some(action) => self.act(action),
            None => self.converge(),
        }
    }

    fn converged(&mut self, report: Report, seen: Seen) {
        self.take_in(seen);
        let repairs = self.planner.repairs;
        let fights = self.status.journal.report(&report, repairs, self.now().at.into_std());
        let now = self.now();
        let held = !self.status.journal.held(now.at.into_std()).0.is_empty();
        let whole = report.settled && report.failed.is_empty() && report.conflicts.is_empty() && !held;
        let NotificationFilter { desired, scope, .. } = &self.view.interest;
        let settled = Settled::after(&report, desired, scope).filter(|_| !held);
        self.planner.settled = settled.map(Arc::new);
        self.status.tally.converged(&report, repairs, &fights, now.wall);
        self.status.tally.compare(&self.planner.peers, &self.view.interest.desired, &report, whole);
        self.status.health.note("fights", fights);
        self.planner.nexthops.clone_from(&report.observed.host.nexthops);
        self.view.interest.host = Arc::new(report.observed.host.clone());
        self.turn.bulky |= report.applied.len() >= BULK;
        self.turn.report = report;
        // First, so that readiness is about what is so after that.
        let report = std::mem::take(&mut self.turn.report);
        let stale = self.stale_bridges(&report.observed);
        self.turn.report = report;
        match stale {
            Some(changes) => self.act(Action::FreeBridges(changes)),
            None => self.judged(),
        }
    }

    fn freed(&mut self, failures: &[(usize, KernelError)]) {
        self.planner.settled = None;
        let mut observed = std::mem::take(&mut self.turn.report.observed);
        self.note_freed(failures, &mut observed);
        self.turn.report.observed = observed;
    }

    /// What the kernel's state means for the configuration, for readiness, and for what comes next.
    fn judged(&mut self) {
        let report = std::mem::take(&mut self.turn.report);
        // What the kernel refuses of a configuration that is only tried is no fault of the node.
        self.turn.retry = self.judge_change(&report);
        self.turn.outcome = if self.turn.retry { Outcome::Again } else { self.judge(&report) };
        self.judge_left(&report.observed);
        self.turn.before.clone_from(&self.underlay.external);
        self.choose(&report.observed);
        self.judge_underlay(&report.observed);
        match self.due_sysctls(&report.observed) {
            Some(keys) => self.act(Action::ReadSysctls(keys)),
            None => self.end_round(),
        }
    }

    fn end_round(&mut self) {
        const MOST: u8 = 3;
        let same = self.underlay.external == self.turn.before && !self.turn.retry && self.plan_holds();
        if !same {
            self.claim();
            if self.turn.rounds < MOST {
                return self.begin_round();
            }
        }
        self.announce();
        // Whether devices are in order or not: pods reach what is outside of the cluster without any. And before pods may start: none of them shall be seen by an address that it should not have.
        match self.due_rules() {
            Some(action) => self.act(action),
            None => self.write_files(),
        }
    }

    pub(super) fn end_turn(&mut self) {
        if self.turn.sound && std::mem::take(&mut self.turn.bulky) {
            self.act(Action::GiveMemoryBack);
        }
        self.turn.failures = match self.turn.outcome {
            Outcome::Done => 0,
            Outcome::Again => (self.turn.failures + 1).min(6),
        };
    }

    /// What a run of the reconciler means for readiness and for the next turn.
    fn judge(&mut self, report: &Report) -> Outcome {
        let own = self.force.active.own_devices();
        let trouble = report.failed.iter().find(|error| error.concerns_node(&own));
        let state = trouble.map_or(Ok(()), |error| Err(error.to_string()));
        self.status.health.set(condition::KERNEL, state);
        let refused = tally::refused_for_peers(&report.failed, &own);
        self.status.health.note("peers", refused.into_iter().collect());
        report.applied.iter().for_each(|change| note_made(&mut self.ownership.made, change));
        self.judge_lease(report);
        if trouble.is_none() {
            // What the run before left is swept.
            self.ownership.previous = Previous::default();
        }
        self.turn.sound = trouble.is_none();
        self.view.interest.refused = trouble.is_some();
        if report.failed.is_empty() && report.settled { Outcome::Done } else { Outcome::Again }
    }
}

/// Keeps the record of the devices that this process made or set up.
fn note_made(made: &mut BTreeSet<Name>, change: &KernelChange) {
    match change {
        KernelChange::AddLink(name, _)
        | KernelChange::SetLink(name, _)
        | KernelChange::AddAddress(name, _) => {
            made.insert(*name);
        }
        KernelChange::RenameLink(from, to) => {
            made.remove(from);
            made.insert(*to);
        }
        KernelChange::DelLink(name) => {
            made.remove(name);
        }
        _ => {}
    }
}

/// What the store says about this node's public addresses, and what the operator's flags say otherwise.
pub(super) fn or(store: PublicAddrs, flags: PublicAddrs) -> PublicAddrs {
    PublicAddrs { v4: store.v4.or(flags.v4), v6: store.v6.or(flags.v6) }
}
