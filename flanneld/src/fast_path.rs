//! The fast path of pods' flows, kept beside the loop: devices come and go with pods, and none of that concerns leases.
//!
//! The loop tells which networks and devices between nodes there are ([`FastPathFacts`]); the task adds the pods' devices, and has
//! the table made ([`NftFirewall::offload`]).

mod choice;

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use backends::fast_path::{Abilities, FastPath, Phase};
use backends::firewall::nftables::{NftFirewall, Offloaded};
use backends::kernel::netlink::{BridgeListener, Netlink};
use backends::{Moved, Name, NftListener, Watched};
use ipnet::IpNet;
use subnet::Family;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep_until, timeout};

use crate::ipvs;
use crate::lent::Lent;
use crate::serve::Health;
use choice::FastPathDecision;
pub(crate) use choice::{FastPathChoice, FastPathMode};

/// The subject of notes about it.
pub(crate) const SUBJECT: &str = "fast-path";

/// A burst of notifications is over when none came for this long, or when it has lasted for the second.
const QUIET: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(100));
/// The table is compared this often although nothing was heard of it, and disarmed if no connection is in its flowtable.
const RESYNC: Duration = Duration::from_secs(60);
/// Time between attempts after failures, doubling up to the second.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(30));

/// What the loop knows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct FastPathFacts {
    /// `FastPath` of the network configuration.
    pub(crate) configured: bool,
    /// The networks of pods, those in force before those that are being left.
    pub(crate) networks: Vec<IpNet>,
    /// This node's subnets.
    pub(crate) subnets: Vec<IpNet>,
    /// The external interface and the tunnel devices.
    pub(crate) outer: BTreeSet<Name>,
}

/// What the loop has of it.
#[derive(Clone, Debug)]
pub(crate) struct FastPathLink {
    /// Whether there is one.
    pub(crate) choice: FastPathChoice,
    /// Where the loop says what it knows.
    pub(crate) facts: watch::Sender<Option<FastPathFacts>>,
}

/// Why the table is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FastPathCause {
    /// The loop knows something else.
    Facts,
    /// Devices have come or gone.
    Links,
    /// The kernel tells that the quota is used up.
    LongConnection,
    /// Another program, or what raises a policy's generation, has touched the table.
    Touched,
    /// It is some time since the last look or failure.
    Due,
    /// An operator asks for it (SIGHUP).
    Asked,
}

impl FastPathCause {
    fn of(moved: &Moved) -> Self {
        match moved {
            Moved::UsedUp(_) => Self::LongConnection,
            Moved::Table(_) | Moved::Chain(..) | Moved::Anything => Self::Touched,
        }
    }

    /// Whether a flowtable without connections is disarmed. Otherwise one that was armed a moment ago, before a connection was
    /// added, would be.
    fn may_disarm(self) -> bool {
        matches!(self, Self::Due | Self::Asked)
    }
}

impl fmt::Display for FastPathCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Facts => "there is another plan",
            Self::Links => "devices have come or gone",
            Self::LongConnection => "the kernel has told of a long connection",
            Self::Touched => "the table was touched",
            Self::Due => "a look was due",
            Self::Asked => "a look was asked for",
        })
    }
}

/// What works on the kernel, and hears of it; closed while there is no fast path.
struct FastPathKernel {
    hands: Lent<KernelHandles>,
    links: BridgeListener,
    tables: NftListener,
    watched: Arc<Mutex<Watched>>,
}

struct KernelHandles {
    firewall: NftFirewall,
    netlink: Netlink,
}

impl FastPathKernel {
    fn open() -> anyhow::Result<Self> {
        let (links, tables) = (BridgeListener::open()?, NftListener::open()?);
        let hands = KernelHandles { firewall: NftFirewall::open()?, netlink: Netlink::open()? };
        let watched = hands.firewall.watched();
        Ok(Self { hands: Lent::new(hands), links, tables, watched })
    }

    /// Waits until devices or the tables have changed.
    async fn moved(&self) -> anyhow::Result<FastPathCause> {
        tokio::select! {
            moved = self.links.links_moved() => {
                moved?;
                let end = Instant::now() + QUIET.1;
                while Instant::now() < end && timeout(QUIET.0, self.links.links_moved()).await.is_ok() {}
                Ok(FastPathCause::Links)
            }
            moved = self.tables.moved(&self.watched) => {
                let moved = moved?;
                tracing::debug!(what = %moved, "fast path: the table has changed");
                Ok(FastPathCause::of(&moved))
            }
        }
    }
}

/// Keeps the fast path.
pub(crate) struct FastPaths {
    choice: FastPathChoice,
    /// Network policies are enforced.
    policies: bool,
    facts: watch::Receiver<Option<FastPathFacts>>,
    /// Somebody asks for a look.
    asked: Arc<Notify>,
    health: Health,
    kernel: Option<FastPathKernel>,
    /// Networks of earlier runs, whose tables are ours.
    former: Vec<IpNet>,
    abilities: Abilities,
    made: TableState,
    /// By the last look.
    phase: Option<Phase>,
}

/// What there shall be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Wanted {
    tables: Vec<FastPath>,
    indexes: BTreeSet<u32>,
}

/// What is in the kernel.
#[derive(Debug, PartialEq, Eq)]
enum TableState {
    /// It has to be read.
    Unknown,
    /// This, by the last look, over devices with these numbers: one that was made again has the name of another, but not its
    /// place in the flowtable.
    Tables(Wanted),
    /// Nothing, and nothing is wanted.
    Nothing,
    /// Nothing, for there are no flowtables.
    Lacking,
}

impl FastPaths {
    /// With the loop's end. `former` are networks of earlier runs; `asked` asks for a look.
    pub(crate) fn new(
        choice: FastPathChoice,
        policies: bool,
        former: Vec<IpNet>,
        asked: Arc<Notify>,
        health: Health,
    ) -> (Self, FastPathLink) {
        let (sender, facts) = watch::channel(None);
        let link = FastPathLink { choice: choice.clone(), facts: sender };
        let abilities = Abilities::default();
        let (kernel, made, phase) = (None, TableState::Unknown, None);
        (Self { choice, policies, facts, asked, health, kernel, former, abilities, made, phase }, link)
    }

    /// Runs until the kernel's notifications fail for good; stopping is dropping. The table is left as it is, so that flows go
    /// on as they are.
    pub(crate) async fn run(mut self) -> anyhow::Error {
        let mut pause = RETRY.0;
        let mut due = Instant::now() + RESYNC;
        loop {
            let cause = tokio::select! {
                changed = self.facts.changed() => match changed {
                    Ok(()) => FastPathCause::Facts,
                    Err(_) => std::future::pending().await,
                },
                moved = moved(self.kernel.as_ref()) => match moved {
                    Ok(cause) => cause,
                    Err(error) => return error,
                },
                () = self.asked.notified() => FastPathCause::Asked,
                () = sleep_until(due) => FastPathCause::Due,
            };
            self.forget(cause);
            let Some(facts) = self.facts.borrow_and_update().clone() else {
                due = Instant::now() + RESYNC;
                continue;
            };
            match self.look(&facts, cause).await {
                Ok(()) => {
                    pause = RETRY.0;
                    // Pods that come and go put it off for nothing.
                    if cause.may_disarm() {
                        due = Instant::now() + RESYNC;
                    }
                }
                Err(why) => {
                    tracing::debug!(why, "fast path: tried again");
                    self.made = TableState::Unknown;
                    due = Instant::now() + pause;
                    // A device that went meanwhile is no failure yet.
                    if pause > RETRY.0 {
                        self.note(Some(self.choice.decide(facts.configured).failure(&why)));
                    }
                    pause = (pause * 2).min(RETRY.1);
                }
            }
        }
    }

    /// What was found is read once more with the next look, where that may tell something; a kernel gets no flowtables while it runs.
    fn forget(&mut self, cause: FastPathCause) {
        let reads = !matches!(cause, FastPathCause::Facts | FastPathCause::Links);
        if reads && matches!(self.made, TableState::Tables(_)) {
            self.made = TableState::Unknown;
        }
    }

    /// Makes the table be as it has to be now.
    async fn look(&mut self, facts: &FastPathFacts, cause: FastPathCause) -> Result<(), String> {
        let decision = self.choice.decide(facts.configured);
        let on = decision == FastPathDecision::On;
        match self.made {
            TableState::Nothing if !on => {
                self.note(decision.note());
                return Ok(());
            }
            TableState::Lacking if on => return Ok(()),
            _ => {}
        }
        if self.kernel.is_none() {
            self.kernel = Some(FastPathKernel::open().map_err(|error| format!("{error:#}"))?);
        }
        let wanted = if on { self.wanted(facts).await? } else { Wanted::default() };
        let routine = match &self.made {
            TableState::Tables(made) if *made == wanted => return Ok(()),
            made => matches!(made, TableState::Tables(_)),
        };
        let Some(kernel) = &mut self.kernel else { return Ok(()) };
        let (tables, former, may_disarm) = (wanted.tables.clone(), self.former.clone(), cause.may_disarm());
        let outcome =
            kernel.hands.to(move |hands| hands.firewall.offload(&tables, &former, may_disarm)).await;
        match outcome.map_err(|error| error.to_string())? {
            Offloaded::Done { changed, phase } => {
                // Pods and long connections come and go.
                let turned = self.phase.is_some_and(|before| before != phase);
                if turned {
                    tracing::debug!("fast path: {phase}, because {cause}");
                }
                self.phase = Some(phase);
                tell(&changed, routine || turned);
                for network in &facts.networks {
                    if !self.former.contains(network) {
                        self.former.push(*network);
                    }
                }
                let devices = if phase == Phase::Armed { wanted.indexes.len() } else { 0 };
                self.health.board().offload(on.then_some(devices));
                self.made = if on { TableState::Tables(wanted) } else { TableState::Nothing };
                self.note(decision.note());
            }
            Offloaded::Only(abilities) => {
                self.abilities = abilities;
                return Err(format!("the kernel takes the table only {abilities}"));
            }
            Offloaded::Lacking => {
                self.made = TableState::Lacking;
                self.note(Some(
                    "the kernel has no nftables flowtables (modules nf_flow_table, nft_flow_offload and nft_numgen), so pods' flows take the \
                     ordinary path: load them and restart flanneld, or switch FastPath off"
                        .to_owned(),
                ));
            }
        }
        if !matches!(self.made, TableState::Tables(_)) {
            self.kernel = None;
        }
        Ok(())
    }

    async fn wanted(&mut self, facts: &FastPathFacts) -> Result<Wanted, String> {
        let Some(kernel) = &mut self.kernel else { return Ok(Wanted::default()) };
        let look = |hands: &mut KernelHandles| hands.netlink.links_and_addresses();
        let host = kernel.hands.to(look).await.map_err(|error| error.to_string())?;
        let mut pods = host.pod_devices(&facts.subnets);
        let (mut outer, mut indexes) = (BTreeSet::new(), BTreeSet::new());
        for link in host.links.values() {
            if facts.outer.contains(&link.name) {
                outer.insert(link.name);
                pods.remove(&link.name);
            }
            if outer.contains(&link.name) || pods.contains(&link.name) {
                indexes.insert(link.index);
            }
        }
        let (requests_only, abilities) = (self.policies || ipvs::is_there(), self.abilities);
        let of_family = |family| {
            let networks: Vec<IpNet> =
                facts.networks.iter().copied().filter(|net| Family::of(net.addr()) == family).collect();
            let (outer, pods) = (outer.clone(), pods.clone());
            (!networks.is_empty()).then_some(FastPath { networks, outer, pods, requests_only, abilities })
        };
        Ok(Wanted { tables: Family::BOTH.into_iter().filter_map(of_family).collect(), indexes })
    }

    fn note(&self, sentence: Option<String>) {
        let notes: Vec<String> = sentence.into_iter().collect();
        self.health.warn(SUBJECT, &notes);
    }
}

fn tell(changed: &[String], routine: bool) {
    for what in changed {
        if routine {
            tracing::debug!("fast path: {what}");
        } else {
            tracing::info!("fast path: {what}");
        }
    }
}

async fn moved(kernel: Option<&FastPathKernel>) -> anyhow::Result<FastPathCause> {
    match kernel {
        Some(kernel) => kernel.moved().await,
        None => std::future::pending().await,
    }
}
