//! What the machine is told, and what it answers.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use backends::backend::Direct;
use backends::host::ResolvedRoute;
use backends::kernel::Observed;
use backends::prerequisites::Sysctls;
use backends::{FirewallError, FirewallReport, KernelChange, KernelError, KernelState, Look, Name};
use backends::{Report, Scope, Settled, Traffic, TunnelFilter};
use ipnet::IpNet;
use subnet::env_file::SubnetEnv;
use subnet::wireguard::PublicKey;
use subnet::{Family, Known, Lease, Loss, Tenure};
use tokio::time::Instant;

use crate::agent::cause::Cause;
use crate::agent::claim::ClaimFacts;
use crate::agent::files::Written;
use crate::agent::news::NewsItem;
use crate::agent::recall::Keep;

/// The moment of an event, by the clock of timers and by that on the wall.
#[derive(Clone, Copy, Debug)]
pub(in crate::agent) struct Now {
    pub(in crate::agent) at: Instant,
    pub(in crate::agent) wall: SystemTime,
}

impl Now {
    /// How long until `when`.
    pub(in crate::agent) fn until(self, when: Instant) -> Duration {
        when.saturating_duration_since(self.at)
    }
}

/// What was read of the kernel, besides what a report has.
#[derive(Debug, Default)]
pub(in crate::agent) struct Seen {
    /// The way to the address that `--iface-can-reach` names.
    pub(in crate::agent) reach: Option<Result<ResolvedRoute, String>>,
    /// The kernel said that settings below `/proc/sys/net` have changed.
    pub(in crate::agent) sysctls_moved: bool,
}

/// Something that the machine has to know.
pub(in crate::agent) enum Event {
    /// The agent begins to run.
    Started,
    /// It is time to look at everything: something has moved, or time has passed. With what the store says, if that
    /// is news, how this node's lease stands there, and what woke the loop.
    Turn { known: Option<Known>, tenure: Tenure, cause: Cause },
    /// The host, before there is an interface.
    Looked(Observed, Seen),
    /// For which subnets of peers there are sessions of WireGuard, and how long it took to find that out.
    Sessions(BTreeSet<IpNet>, Duration),
    /// Which peers are on this node's own links.
    Direct(Direct),
    /// The filter of tunnel ports was carried out, or not.
    Filtered(Result<FirewallReport, FirewallError>),
    /// The kernel was brought into the state of the plan, as far as it let us.
    Converged(Report, Seen),
    /// The bridges' addresses were removed, but for these.
    Freed(Vec<(usize, KernelError)>),
    /// Settings below `/proc/sys/net`.
    Sysctls(Sysctls),
    /// The traffic rules were carried out, or not.
    Ruled(Result<FirewallReport, FirewallError>),
    /// The files for the CNI plugin were written, or not.
    Written(Written),
    /// What is known was saved, or not.
    Saved(io::Result<bool>),
    /// The store gave this node a lease.
    Leased(Lease),
    /// The lease is lost.
    Lost(Loss),
    /// Somebody decided something elsewhere.
    Told(NewsItem),
    /// The store answers, after this node began with what was saved.
    Reconnected,
    /// Traffic rules that concern us were changed by another program.
    RulesMoved,
    /// The operator wants the host and the WireGuard key looked at again, or the key was replaced.
    Reload,
}

/// Something to do. Of the actions of one event at most the last one is answered with another event.
pub(in crate::agent) enum Action {
    /// Read the host: [`Event::Looked`].
    Look(Scope),
    /// Find out with which peers of these devices there are sessions of WireGuard: [`Event::Sessions`].
    ReadSessions(Arc<KernelState>),
    /// Find out which of these addresses are on this node's own links: [`Event::Direct`].
    FindDirect(Vec<IpAddr>, Direct),
    /// Filter the tunnels' ports: [`Event::Filtered`].
    FilterTunnels {
        filters: Vec<TunnelFilter>,
        former: Vec<IpNet>,
        look: Look,
    },
    /// Bring the kernel into this state, but for what is held back: [`Event::Converged`]. It need not be looked at if it is known
    /// since then.
    Converge {
        plan: Arc<KernelState>,
        scope: Scope,
        held: BTreeSet<String>,
        since: Option<Arc<Settled>>,
    },
    /// Remove addresses of bridges: [`Event::Freed`].
    FreeBridges(Vec<KernelChange>),
    /// Read settings below `/proc/sys/net`: [`Event::Sysctls`].
    ReadSysctls(Vec<String>),
    /// Apply traffic rules: [`Event::Ruled`].
    ApplyRules {
        wanted: Vec<Traffic>,
        former: Vec<IpNet>,
    },
    /// Write the files for the CNI plugin: [`Event::Written`]. `current`: this process wrote this `subnet.env` before.
    WriteFiles {
        env: SubnetEnv,
        current: bool,
    },
    /// Save what is known: [`Event::Saved`].
    Save(Box<Keep>),
    /// Switch forwarding on where it is off, and have routers heard on these devices all the same.
    SwitchForwardingOn {
        families: Vec<Family>,
        outer: Vec<Name>,
    },
    /// Ask the store for a lease, in place of what it was asked before: [`Event::Leased`].
    Claim(Box<ClaimFacts>),
    /// Ask no more.
    StopClaiming,
    /// Keep the lease, follow all leases, listen to what is decided elsewhere; each is begun once.
    Hold,
    Follow,
    Listen,
    /// Tell the cluster that this node's network works; once.
    AnnounceReady,
    /// Tell the store's client that this host has another address.
    Readdressed,
    /// Replace the WireGuard key with this public key: [`Event::Reload`], later.
    RenewKey(PublicKey),
    /// Take another turn soon.
    Wake,
    /// Give memory back to the operating system.
    GiveMemoryBack,
}
