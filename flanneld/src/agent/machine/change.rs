//! Changes of the configuration and of this node's own addresses, carried out while packets flow.
//!
//! A new configuration is checked as far as that is possible, then tried: devices first, while the node still
//! announces what it did. Only what the kernel takes is announced. Otherwise the old one stays, and why is
//! said in the log and in readiness.

mod leaving;

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use backends::host::{HostLink, HostView};
use backends::kernel::is_tunnel_name;
use backends::{ActiveBackends, KernelError, Report};
use ipnet::IpNet;
use subnet::saved::Saved;
use subnet::wireguard::PublicKey;
use subnet::{Family, NetworkConfig, Subnets};
use tokio::time::Instant;

use super::underlay::node;
use super::{Action, InForce, Machine, Now, or};
use crate::agent::claim::heed;
use crate::agent::news::NewsItem;
use crate::extension;

/// How long a node may take to run as it did before its restart, if it is to run otherwise now.
const AS_BEFORE: Duration = Duration::from_secs(5);

/// What becomes of the configuration in force.
#[derive(Default)]
enum ConfigState {
    /// The store has no other one that can be used.
    #[default]
    Steady,
    /// This one is tried with every turn until it is carried out or there is another.
    Candidate(NetworkConfig),
    /// The one in force is being tried. `before` is restored if the kernel doesn't take it; `next` came meanwhile.
    Trial { before: Box<InForce>, next: Option<NetworkConfig> },
}

/// What is being changed.
#[derive(Default)]
pub(super) struct Change {
    state: ConfigState,
    /// Until when a candidate waits for this node to run as before its restart.
    hold: Option<Instant>,
    /// Set where the store had another configuration after a restart than before.
    restarted: Option<Restarted>,
    /// Why a candidate was refused last.
    refused: Option<String>,
    /// The networks of earlier configurations: what is in them is ours to change.
    pub(super) former: Vec<IpNet>,
    /// Those of them in which there are leases.
    others: Vec<IpNet>,
    /// This node's subnets of earlier configurations, as long as pods are in them.
    pub(super) left: Vec<IpNet>,
    /// When the leases of `left` were last renewed.
    renewed: Option<Instant>,
    /// This node's leases in networks that the cluster is leaving.
    beside: BTreeSet<Subnets>,
    /// The lease has to be taken again: the network is another one.
    pub(super) reclaim: bool,
    /// The file with WireGuard's key may have another one than is in force.
    reread_key: bool,
}

/// What a node found at its restart.
struct Restarted {
    /// The configuration of the store, which is another one than before.
    with: NetworkConfig,
    /// The subnets that this node held, until it holds a lease again.
    held: Option<Subnets>,
}

impl Change {
    /// A node that was restarted with another configuration goes on as before at first, and then follows the
    /// change like one that was never away: peers send what they were told last, and are told something
    /// else only when this node can take it. Gives what to start with, if there is something to go on with.
    pub(super) fn since_restart(
        saved: &Saved,
        now: &NetworkConfig,
        at: Instant,
    ) -> Option<(Self, NetworkConfig, ActiveBackends)> {
        if saved.network == *now {
            return None;
        }
        let mut active = ActiveBackends::new(&saved.network.backend, &saved.network).ok()?;
        // Peers may have followed already.
        active.expect(&now.backend, &saved.network);
        tracing::info!(
            "this is another configuration than before the restart: it comes into force after that one"
        );
        let change = Self {
            state: ConfigState::Candidate(now.clone()),
            hold: Some(at + AS_BEFORE),
            restarted: Some(Restarted { with: now.clone(), held: Some(saved.own) }),
            ..Self::default()
        };
        Some((change, saved.network.clone(), active))
    }

    /// This node holds a lease again.
    pub(super) fn leased(&mut self) {
        if let Some(restarted) = &mut self.restarted {
            restarted.held = None;
        }
    }

    /// How long to wait at most before something has to be tried that was found at the start. `ready`: this node runs
    /// as before its restart.
    pub(super) fn held(&self, ready: bool, now: Now) -> Option<Duration> {
        self.hold.map(|until| if ready { Duration::ZERO } else { now.until(until) })
    }

    /// Lets it be tried, if its time has come.
    pub(super) fn end_hold(&mut self, ready: bool, now: Now) {
        if self.held(ready, now).is_some_and(|left| left.is_zero()) {
            self.hold = None;
        }
    }

    /// The store has another configuration, or none that can be used but the one in force.
    pub(super) fn consider(&mut self, candidate: Option<NetworkConfig>) {
        match (&mut self.state, candidate) {
            (ConfigState::Trial { next, .. }, candidate) => *next = candidate,
            (state, Some(candidate)) => *state = ConfigState::Candidate(candidate),
            (state, None) => *state = ConfigState::Steady,
        }
    }

    /// Has WireGuard's key read again, with the next turn in which nothing else is tried.
    pub(super) fn reread_key(&mut self) {
        self.reread_key = true;
    }

    /// The configuration that is to be tried next.
    pub(super) fn candidate(&self) -> Option<&NetworkConfig> {
        match &self.state {
            ConfigState::Candidate(next) => Some(next),
            ConfigState::Steady | ConfigState::Trial { .. } => None,
        }
    }

    /// A configuration is tried, and this is what to go back to.
    pub(super) fn try_instead_of(&mut self, before: InForce) {
        self.state = ConfigState::Trial { before: Box::new(before), next: None };
    }

    /// Whether the one in force is being tried.
    pub(super) fn is_trial(&self) -> bool {
        matches!(self.state, ConfigState::Trial { .. })
    }

    /// The trial is over. What was in force before it, if there was one.
    pub(super) fn end_trial(&mut self) -> Option<InForce> {
        match std::mem::take(&mut self.state) {
            ConfigState::Trial { before, next } => {
                self.consider(next);
                Some(*before)
            }
            other => {
                self.state = other;
                None
            }
        }
    }
}

impl Machine {
    /// Takes in what was decided elsewhere.
    pub(super) fn told(&mut self, news: NewsItem) {
        match news {
            NewsItem::Configuration(read) => match *read {
                Ok(network) if network == self.force.network => {
                    heed(&self.status.health, &network);
                    self.change.consider(None);
                    self.accept();
                }
                Ok(network) => {
                    heed(&self.status.health, &network);
                    self.change.consider(Some(network));
                }
                Err(why) => {
                    self.change.consider(None);
                    self.refuse(why);
                }
            },
            NewsItem::Public(public) => {
                let public = or(public, self.underlay.given);
                if self.settings.selectors.public != public {
                    tracing::info!(%public, "the store gives this node other public addresses");
                    self.give_public(public);
                }
            }
        }
    }

    /// The store answers after this node began with what was saved.
    pub(super) fn reconnected(&mut self) {
        self.own.reconnected();
        self.act(Action::Listen);
        self.start_claim();
    }

    /// Tries the configuration that was read last, if it is not the one in force.
    pub(super) fn try_candidate(&mut self) {
        let free = self.change.hold.is_none();
        let Some(next) = self.change.candidate().filter(|_| free).cloned() else {
            return self.try_key();
        };
        match self.ready_for(&next) {
            Ok(active) => self.begin(next, active),
            Err(why) => self.refuse(why),
        }
    }

    /// Tries the key that is in WireGuard's file by now, if it is not the one in force.
    fn try_key(&mut self) {
        if self.change.is_trial() || !std::mem::take(&mut self.change.reread_key) {
            return;
        }
        let keys: BTreeSet<PublicKey> = self.force.active.identities().collect();
        if keys.is_empty() {
            return;
        }
        let network = self.force.network.clone();
        match self.ready_for(&network) {
            Ok(active) if active.identities().collect::<BTreeSet<_>>() == keys => {}
            Ok(active) => self.begin(network, active),
            Err(why) => tracing::error!("the WireGuard key stays what it was: {why}"),
        }
    }

    /// What this node would do with another configuration.
    fn ready_for(&mut self, next: &NetworkConfig) -> Result<ActiveBackends, String> {
        let active = if self.turn.sound {
            let mut active = self.force.active.clone();
            active.switch(&next.backend, next).map(|()| active)
        } else {
            // What doesn't work is not kept.
            ActiveBackends::new(&next.backend, next)
        };
        let active = active.map_err(|error| format!("network configuration: {error}"))?;
        let restarted = self.change.restarted.as_ref();
        let held = self.own.lease().map(|lease| lease.subnets).or(restarted.and_then(|before| before.held));
        let host = Arc::clone(&self.view.interest.host);
        let Some(held) = held else {
            // Nothing works yet that could go on with the other one; what it lacks is waited for.
            return Ok(active);
        };
        (self.own.admits)(next, &held)?;
        // A node that was drained and restarted has nothing to lose by another subnet.
        let drained =
            |subnet| restarted.is_some_and(|before| before.with == *next) && !inhabited(&host, subnet);
        if let Some(subnet) = must_shrink(&self.force.network, next, &held).filter(|subnet| !drained(*subnet))
        {
            return Err(format!(
                "SubnetLen, SubnetMin and SubnetMax leave no room for this node's subnet {subnet}, which its pods \
                 use: give them back their values, or drain the node and restart flanneld on it"
            ));
        }
        self.permit_commands(next)?;
        let external = self.suitable(&host, next)?;
        active.current().check(&node(&external)).map_err(|error| error.to_string())?;
        Ok(active)
    }

    fn begin(&mut self, next: NetworkConfig, active: ActiveBackends) {
        let what = match self.force.network.changes(&next).as_slice() {
            [] => "the WireGuard key has changed".to_owned(),
            changes => format!("the configuration has changed: {}", changes.join(", ")),
        };
        tracing::info!(network = %next.networks(), backend = active.current().words(), "{what}");
        if self.force.active.extension().is_some() && active.extension().is_none() {
            self.status.health.forget(extension::CONDITION);
        }
        let before = self.force.replace(next, active);
        let networks = before.network.networks();
        self.change.former.retain(|known| networks.iter().all(|network| network != *known));
        self.change.former.extend(networks.iter());
        self.rules.renew(networks.iter());
        let shrinks = self
            .own
            .lease()
            .and_then(|lease| must_shrink(&before.network, &self.force.network, &lease.subnets));
        self.change.reclaim |= networks != self.force.network.networks() || shrinks.is_some();
        self.change.state = ConfigState::Steady;
        if self.own.lease().is_none() {
            self.own.claiming.end();
            self.act(Action::StopClaiming);
        } else if self.turn.sound {
            self.change.try_instead_of(before);
        }
        self.note_stand_in();
        if self.underlay.external.is_some() {
            let host = Arc::clone(&self.view.interest.host);
            let network = self.force.network.clone();
            self.underlay.external = self.suitable(&host, &network).ok();
        }
        if self.underlay.external.is_none() {
            // The next turn looks for one, and may come late.
            self.act(Action::Wake);
        }
        if !self.change.is_trial() {
            self.accept();
        }
    }

    /// Decides on what is being tried: says whether there has to be another plan at once.
    pub(super) fn judge_change(&mut self, report: &Report) -> bool {
        let own = self.force.active.own_devices();
        let mut troubles = report.failed.iter().filter(|error| error.concerns_node(&own));
        if let Some(why) = troubles
            .clone()
            .find(|error| lacks(error, "vxlan") || lacks(error, "ipip"))
            .map(ToString::to_string)
            && self.fall_back(&why)
        {
            return true;
        }
        if let Some(why) =
            report.failed.iter().find(|error| lacks(error, "wireguard")).map(ToString::to_string)
            && self.force.active.encrypt_in_process()
        {
            tracing::info!("{why}; flanneld encrypts instead (Backend.Userspace)");
            self.note_stand_in();
            self.force.revision += 1;
            return true;
        }
        let Some(before) = self.change.end_trial() else { return false };
        if let Some(trouble) = troubles.next() {
            let why = trouble.to_string();
            self.force.replace(before.network, before.active);
            self.change.reclaim = false;
            self.rules.due();
            self.refuse(format!("the kernel does not take it: {why}"));
            return true;
        }
        self.keeper.stale();
        self.accept();
        false
    }

    /// Notes that flanneld does what the configuration would rather have the kernel do.
    pub(super) fn note_stand_in(&self) {
        let text = self.force.active.current().stands_in();
        text.iter().for_each(|text| tracing::warn!("{text}"));
        self.status.health.note("backend", text.into_iter().map(str::to_owned).collect());
    }

    /// Takes the backend that the configuration allows instead of a tunnel of the kernel. Says whether it does.
    fn fall_back(&mut self, why: &str) -> bool {
        match self.force.active.fall_back(&self.force.network) {
            Ok(true) => {
                let what = self.force.active.current().words();
                let text =
                    format!("{why}; this node runs on {what} instead (Backend.Fallback), which is slower");
                tracing::warn!("{text}");
                self.status.health.note("backend", vec![text]);
                self.force.revision += 1;
                true
            }
            Ok(false) => false,
            Err(error) => {
                tracing::error!("Backend.Fallback: {error}");
                false
            }
        }
    }

    /// Publishes what peers need, if it is not what was published last.
    pub(super) fn announce(&mut self) {
        let (Some(lease), Some(external)) = (self.own.lease(), &self.underlay.external) else { return };
        if self.change.is_trial() || self.own.is_recalled() || self.own.contest.loss().is_some() {
            return;
        }
        let wanted = (external.public, self.force.active.attachment(&self.macs()));
        let so = (lease.public, lease.attachment.clone()) == wanted
            || self.own.claiming.announced() == Some(&wanted);
        if !so || self.change.reclaim {
            self.change.reclaim = false;
            self.start_claim();
        }
    }

    fn refuse(&mut self, why: String) {
        if self.change.refused.as_ref() != Some(&why) {
            let (networks, backend) = (self.force.network.networks(), self.force.active.current().words());
            tracing::error!(
                "the configuration has changed and can't be followed: {why}; {networks} with {backend} stays"
            );
            self.status
                .health
                .note("configuration", vec![format!("the new configuration is not in force: {why}")]);
            self.change.refused = Some(why);
        }
    }

    fn accept(&mut self) {
        self.change.refused = None;
        self.status.health.note("configuration", Vec::new());
    }
}

/// Whether pods use a subnet on this host: a bridge has a port, or another device an address in it.
fn inhabited(host: &HostView, subnet: IpNet) -> bool {
    let serves = |link: &&HostLink| {
        link.addresses.iter().any(|own| subnet.contains(&own.net.addr())) && !is_tunnel_name(&link.name)
    };
    let has_port = |bridge: &HostLink| host.links.values().any(|port| port.controller == Some(bridge.index));
    host.links.values().filter(serves).any(|link| !link.bridge || has_port(link))
}

/// The subnet of this node that lies in the next network and that it may not have there. One that lies outside
/// is another matter: the node then has two, for as long as pods are in the old one.
fn must_shrink(before: &NetworkConfig, next: &NetworkConfig, own: &Subnets) -> Option<IpNet> {
    own.iter().find(|subnet| {
        let range = |network: &'_ NetworkConfig| network.range(Family::of(subnet.addr())).copied();
        let was_allowed = range(before).is_none_or(|range| range.allows(*subnet));
        was_allowed
            && range(next).is_some_and(|range| range.network.contains(subnet) && !range.allows(*subnet))
    })
}

/// Whether the kernel says that it can't make devices of this kind at all.
fn lacks(error: &KernelError, kind: &str) -> bool {
    match error {
        KernelError::Refused { change, source, .. } => {
            source.kind() == io::ErrorKind::Unsupported
                && change.starts_with("link add")
                && change.contains(&format!("type {kind} "))
        }
        _ => false,
    }
}
