//! Changes of the configuration and of this node's own addresses, carried out while packets flow.
//!
//! A new configuration is checked as far as that is possible, then tried: devices first, while the node still
//! announces what it did. Only what the kernel takes is announced. Otherwise the old one stays, and why is
//! said in the log and in readiness.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use backends::host::{HostLink, HostView};
use backends::kernel::{Observed, is_tunnel_name};
use backends::{Kernel, KernelError, Report, Ways};
use ipnet::IpNet;
use subnet::env_file::gateway;
use subnet::net::overlap;
use subnet::saved::Saved;
use subnet::store::LEASE_TTL;
use subnet::{Attachment, Family, Lease, LeaseStore, Leases, NetworkConfig, PublicAddrs, Subnets};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

use super::claim::heed;
use super::tenure::Task;
use super::underlay::node;
use super::{Agent, claim, or};

/// Time between attempts to read what is known to have changed.
const AGAIN: Duration = Duration::from_secs(1);

/// How long a node may take to run as it did before its restart, if it is to run otherwise now.
const AS_BEFORE: Duration = Duration::from_secs(5);

/// How often leases of subnets that the network has moved away from are renewed while pods are in them.
const RENEW_LEFT: Duration = LEASE_TTL.checked_div(2).expect("not by zero");

/// What is being changed.
#[derive(Default)]
pub(super) struct Change {
    pub(super) news: News,
    /// A configuration that is to be tried with every turn until it is carried out or there is another.
    candidate: Option<NetworkConfig>,
    /// Until when it waits for this node to run as before its restart.
    hold: Option<Instant>,
    /// Set where the store had another configuration after a restart than before.
    restarted: Option<Restarted>,
    /// Why it was refused last.
    refused: Option<String>,
    /// What to go back to if the kernel doesn't take the configuration that is being tried.
    trial: Option<(NetworkConfig, Ways)>,
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
}

/// What a node found at its restart.
struct Restarted {
    /// The configuration of the store, which is another one than before.
    with: NetworkConfig,
    /// The subnets that this node held, until it holds a lease again.
    held: Option<Subnets>,
}

/// Something that was decided elsewhere.
pub(super) enum Told {
    /// The configuration was read again, or can't be used.
    Configuration(Box<Result<NetworkConfig, String>>),
    /// The public addresses that the store gives to this node.
    Public(PublicAddrs),
}

/// What is heard of others' decisions, from tasks that end with it.
#[derive(Default)]
pub(super) struct News {
    told: Option<mpsc::Receiver<Told>>,
    _tasks: Vec<Task<()>>,
}

impl News {
    /// Begins to listen.
    pub(super) fn of<S: LeaseStore>(store: &Arc<S>) -> Self {
        let (tell, told) = mpsc::channel(1);
        let configuration = watch_configuration(Arc::clone(store), tell.clone());
        let public = watch_public(Arc::clone(store), tell);
        Self { told: Some(told), _tasks: vec![Task::spawn(configuration), Task::spawn(public)] }
    }

    pub(super) async fn next(&mut self) -> Told {
        if let Some(told) = &mut self.told
            && let Some(news) = told.recv().await
        {
            return news;
        }
        std::future::pending().await
    }
}

async fn watch_configuration<S: LeaseStore>(store: Arc<S>, tell: mpsc::Sender<Told>) {
    loop {
        let read = loop {
            match store.network().await {
                Ok(network) => break Ok(network),
                Err(error) if claim::is_away(&error) => {
                    tracing::debug!(%error, "the configuration can't be read again yet");
                    sleep(AGAIN).await;
                }
                Err(error) => break Err(error.to_string()),
            }
        };
        if tell.send(Told::Configuration(Box::new(read))).await.is_err() {
            return;
        }
        store.network_changed().await;
    }
}

async fn watch_public<S: LeaseStore>(store: Arc<S>, tell: mpsc::Sender<Told>) {
    loop {
        let public = loop {
            match store.node_public().await {
                Ok(public) => break public,
                Err(error) => {
                    tracing::debug!(%error, "what the store says about this node can't be read yet")
                }
            }
            sleep(AGAIN).await;
        };
        if tell.send(Told::Public(public)).await.is_err() {
            return;
        }
        store.stirred().await;
    }
}

impl Change {
    /// A node that was restarted with another configuration goes on as before at first, and then follows the
    /// change like one that was never away: peers send what they were told last, and are told something
    /// else only when this node can take it. Gives what to start with, if there is something to go on with.
    pub(super) fn since_restart(saved: &Saved, now: &NetworkConfig) -> Option<(Self, NetworkConfig, Ways)> {
        if saved.network == *now {
            return None;
        }
        let mut ways = Ways::new(&saved.network.backend, &saved.network).ok()?;
        // Peers may have followed already.
        ways.expect(&now.backend, &saved.network);
        tracing::info!(
            "this is another configuration than before the restart: it comes into force after that one"
        );
        let change = Self {
            candidate: Some(now.clone()),
            hold: Some(Instant::now() + AS_BEFORE),
            restarted: Some(Restarted { with: now.clone(), held: Some(saved.own) }),
            ..Self::default()
        };
        Some((change, saved.network.clone(), ways))
    }

    /// This node holds a lease again.
    pub(super) fn leased(&mut self) {
        if let Some(restarted) = &mut self.restarted {
            restarted.held = None;
        }
    }

    /// How long to wait at most before something has to be tried that was found at the start.
    pub(super) fn held(&mut self, sound: bool) -> Option<Duration> {
        let until = self.hold?;
        let left = if sound { Duration::ZERO } else { until.saturating_duration_since(Instant::now()) };
        if left.is_zero() {
            self.hold = None;
        }
        Some(left)
    }
}

impl<K: Kernel, S: LeaseStore> Agent<'_, K, S> {
    /// Takes in what was decided elsewhere.
    pub(super) fn told(&mut self, news: Told) {
        match news {
            Told::Configuration(read) => match *read {
                Ok(network) if network == self.network => {
                    heed(&self.health, &network);
                    self.change.candidate = None;
                    self.accept();
                }
                Ok(network) => {
                    heed(&self.health, &network);
                    self.change.candidate = Some(network);
                }
                Err(why) => {
                    self.change.candidate = None;
                    self.refuse(why);
                }
            },
            Told::Public(public) => {
                let public = or(public, self.given);
                if self.settings.selectors.public != public {
                    tracing::info!(%public, "the store gives this node other public addresses");
                    self.give_public(public);
                }
            }
        }
    }

    /// The store answers after this node began with what was saved.
    pub(super) fn reconnected(&mut self) {
        self.change.news = News::of(&self.store);
        self.start_claim();
    }

    /// Tries the configuration that was read last, if it is not the one in force.
    pub(super) fn try_candidate(&mut self) {
        let free = self.change.trial.is_none() && self.change.hold.is_none();
        let Some(next) = self.change.candidate.clone().filter(|_| free) else {
            return;
        };
        match self.ready_for(&next) {
            Ok(ways) => self.begin(next, ways),
            Err(why) => self.refuse(why),
        }
    }

    /// What this node would do with another configuration.
    fn ready_for(&mut self, next: &NetworkConfig) -> Result<Ways, String> {
        let ways = if self.sound && self.lease.is_some() {
            let mut ways = self.ways.clone();
            ways.switch(&next.backend, next).map(|()| ways)
        } else {
            // What doesn't work is not kept.
            Ways::new(&next.backend, next)
        };
        let ways = ways.map_err(|error| format!("network configuration: {error}"))?;
        let restarted = self.change.restarted.as_ref();
        let held =
            self.lease.as_ref().map(|lease| lease.subnets).or(restarted.and_then(|before| before.held));
        let host = Arc::clone(&self.interest().host);
        let Some(held) = held else {
            // Nothing works yet that could go on with the other one; what it lacks is waited for.
            return Ok(ways);
        };
        self.store.admits(next, &held)?;
        // A node that was drained and restarted has nothing to lose by another subnet.
        let drained =
            |subnet| restarted.is_some_and(|before| before.with == *next) && !inhabited(&host, subnet);
        if let Some(subnet) = must_shrink(&self.network, next, &held).filter(|subnet| !drained(*subnet)) {
            return Err(format!(
                "SubnetLen, SubnetMin and SubnetMax leave no room for this node's subnet {subnet}, which its pods \
                 use: give them back their values, or drain the node and restart flanneld on it"
            ));
        }
        let external = self.suitable(&host, next)?;
        ways.current().check(&node(&external)).map_err(|error| error.to_string())?;
        Ok(ways)
    }

    fn begin(&mut self, next: NetworkConfig, ways: Ways) {
        let changes = self.network.changes(&next).join(", ");
        tracing::info!(network = %next.networks(), backend = ways.current().words(), "the configuration has changed: {changes}");
        let before = std::mem::replace(&mut self.network, next);
        let old = std::mem::replace(&mut self.ways, ways);
        self.change.former.retain(|known| before.networks().iter().all(|network| network != *known));
        self.change.former.extend(before.networks().iter());
        self.rules.renew(before.networks().iter());
        let shrinks =
            self.lease.as_ref().and_then(|lease| must_shrink(&before, &self.network, &lease.subnets));
        self.change.reclaim |= before.networks() != self.network.networks() || shrinks.is_some();
        if self.lease.is_none() {
            self.claiming = None;
        } else if self.sound {
            self.change.trial = Some((before, old));
        }
        self.health.note("backend", Vec::new());
        if self.external.is_some() {
            let host = Arc::clone(&self.interest().host);
            let network = self.network.clone();
            self.external = self.suitable(&host, &network).ok();
        }
        if self.external.is_none() {
            // The next turn looks for one, and may come late.
            self.moved.notify_one();
        }
        self.plan = None;
        if self.change.trial.is_none() {
            self.tried();
            self.accept();
        }
    }

    /// Decides on what is being tried: says whether there has to be another plan at once.
    pub(super) fn judge_change(&mut self, report: &Report) -> bool {
        let own = self.ways.own_devices();
        let mut troubles = report.failed.iter().filter(|error| error.concerns_node(&own));
        if let Some(why) = troubles.clone().find(|error| lacks_vxlan(error)).map(ToString::to_string)
            && self.fall_back(&why)
        {
            return true;
        }
        let Some((network, ways)) = self.change.trial.take() else { return false };
        if let Some(trouble) = troubles.next() {
            let why = trouble.to_string();
            self.tried();
            self.network = network;
            self.ways = ways;
            self.plan = None;
            self.change.reclaim = false;
            self.rules.due();
            self.refuse(format!("the kernel does not take it: {why}"));
            return true;
        }
        self.tried();
        self.keeper.stale();
        self.accept();
        false
    }

    /// The configuration in force was tried: it is no candidate any more, unless there is another by now.
    fn tried(&mut self) {
        if self.change.candidate.as_ref() == Some(&self.network) {
            self.change.candidate = None;
        }
    }

    /// Takes the backend that the configuration allows instead of VXLAN. Says whether it does.
    fn fall_back(&mut self, why: &str) -> bool {
        match self.ways.fall_back(&self.network) {
            Ok(true) => {
                let what = self.ways.current().words();
                let text =
                    format!("{why}; this node runs on {what} instead (Backend.Fallback), which is slower");
                tracing::warn!("{text}");
                self.health.note("backend", vec![text]);
                self.plan = None;
                true
            }
            Ok(false) => false,
            Err(error) => {
                tracing::error!("Backend.Fallback: {error}");
                false
            }
        }
    }

    /// This node has other subnets than `before`: pods stay in those for a while.
    pub(super) fn leave(&mut self, before: Subnets) {
        let now = self.lease.as_ref().map(|lease| lease.subnets).unwrap_or_default();
        let gone: Vec<IpNet> = before.iter().filter(|subnet| !now.iter().any(|now| now == *subnet)).collect();
        for subnet in &gone {
            tracing::info!("{subnet} stays leased and routed until no pod of this node is in it");
        }
        self.change.left.retain(|subnet| !now.iter().any(|now| now == *subnet) && !gone.contains(subnet));
        self.change.left.extend(gone);
    }

    /// Finds this node's leases in networks that the cluster is leaving, also those from before a restart: a bridge
    /// that still serves one tells that pods are in it.
    pub(super) fn find_left(&mut self, own: &Lease, all: &Leases) {
        let beside = self.change.beside(own, all);
        let gone = self.change.beside.iter().any(|subnets| !all.leases.contains_key(subnets));
        if gone && own.attachment != Attachment::HostGw {
            // A Go node that forgets a lease forgets the MAC too that the other one has.
            self.change.reclaim = true;
        }
        let host = Arc::clone(&self.interest().host);
        let serves = |subnet: &IpNet| {
            let gateway = gateway(*subnet);
            let addresses = |link: &HostLink| link.addresses.iter().any(|own| own.net.addr() == gateway);
            host.links.values().any(|link| link.bridge && addresses(link))
        };
        for subnet in beside.iter().flat_map(Subnets::iter).filter(serves) {
            let is_own = own.subnets.iter().any(|own| own == subnet);
            if !is_own && !self.change.left.contains(&subnet) {
                self.change.left.push(subnet);
            }
        }
        self.change.beside = beside;
    }

    /// Forgets the subnets of earlier networks in which there are no pods any more, and names the others.
    pub(super) fn judge_left(&mut self, observed: &Observed) {
        let used = |subnet: &IpNet| {
            observed.host.links.values().find(|link| {
                !observed.state.links.contains_key(&link.name)
                    && link.addresses.iter().any(|address| subnet.contains(&address.net.addr()))
            })
        };
        let mut notes = Vec::new();
        let before = self.change.left.len();
        self.change.left.retain(|subnet| match used(subnet) {
            Some(link) => {
                notes.push(format!(
                    "{subnet} is of an earlier network and its pods keep it: new pods can only be added once {} is \
                     empty, so drain this node",
                    link.name
                ));
                true
            }
            None => false,
        });
        let renewed = self.change.renewed.is_some_and(|at| at.elapsed() < RENEW_LEFT);
        if self.change.left.is_empty() {
            self.change.renewed = None;
        } else if !renewed {
            self.change.renewed = Some(Instant::now());
            self.change.reclaim = true;
        }
        let draining = !self.change.left.is_empty() || !self.lost.is_empty() || self.draining;
        self.set_interest(|interest| interest.draining = draining);
        if self.change.left.len() < before {
            self.plan = None;
            self.rules.due();
        }
        self.health.note("network", notes);
    }

    /// Publishes what peers need, if it is not what was published last.
    pub(super) fn announce(&mut self) {
        let (Some(lease), Some(external)) = (&self.lease, &self.external) else { return };
        if self.change.trial.is_some() || self.reconnecting.is_some() || self.contest.loss().is_some() {
            return;
        }
        let wanted = (external.public, self.ways.attachment(&self.macs()));
        let so = (lease.public, lease.attachment.clone()) == wanted || self.claimed.as_ref() == Some(&wanted);
        if !so || self.change.reclaim {
            self.change.reclaim = false;
            self.start_claim();
        }
    }

    fn refuse(&mut self, why: String) {
        if self.change.refused.as_ref() != Some(&why) {
            let (networks, backend) = (self.network.networks(), self.ways.current().words());
            tracing::error!(
                "the configuration has changed and can't be followed: {why}; {networks} with {backend} stays"
            );
            self.health.note("configuration", vec![format!("the new configuration is not in force: {why}")]);
            self.change.refused = Some(why);
        }
    }

    fn accept(&mut self) {
        self.change.refused = None;
        self.health.note("configuration", Vec::new());
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

impl Change {
    /// Finds out in which former networks there still are leases. Says whether that is news.
    pub(super) fn find_others(&mut self, network: &NetworkConfig, all: &Leases) -> bool {
        let outside = |former: &IpNet| network.ranges().all(|range| !overlap(range.network, *former));
        let inhabited = |former: &IpNet| {
            all.leases.keys().any(|subnets| subnets.iter().any(|subnet| former.contains(&subnet)))
        };
        let others = if self.former.is_empty() {
            Vec::new()
        } else {
            self.former.iter().copied().filter(|former| outside(former) && inhabited(former)).collect()
        };
        let news = self.others != others;
        self.others = others;
        news
    }

    /// The networks that the cluster is leaving.
    pub(super) fn inhabited(&self) -> Vec<IpNet> {
        self.others.clone()
    }

    /// Which leases in those are this node's.
    fn beside(&self, own: &Lease, all: &Leases) -> BTreeSet<Subnets> {
        if self.others.is_empty() {
            return BTreeSet::new();
        }
        let left = |subnet: IpNet| self.others.iter().any(|network| network.contains(&subnet));
        let beside = all.by_public(&own.public).map(|lease| lease.subnets);
        beside.filter(|subnets| *subnets != own.subnets && subnets.iter().any(left)).collect()
    }

    /// The networks that the cluster is leaving, with this node's subnet in each.
    pub(super) fn others(&self, family: Family) -> Vec<(IpNet, Option<IpNet>)> {
        let of_family = self.others.iter().filter(|network| Family::of(network.addr()) == family);
        let own = |network: &IpNet| self.left.iter().copied().find(|subnet| network.contains(subnet));
        of_family.map(|network| (*network, own(network))).collect()
    }
}

/// Whether the kernel says that it can't make VXLAN devices at all.
fn lacks_vxlan(error: &KernelError) -> bool {
    match error {
        KernelError::Refused { change, source, .. } => {
            source.kind() == io::ErrorKind::Unsupported
                && change.starts_with("link add")
                && change.contains("vxlan")
        }
        _ => false,
    }
}
