//! The backends of one node at a time: the one that it announces, and those by which peers are still
//! reached that announce something else.
//!
//! A cluster changes its backend node by node. Each peer is reached by the backend that it announces, and each node
//! goes on accepting what it announced before for as long as a peer may send it: until some time after the
//! last one has left that backend itself.

mod increment;
mod ports;
mod preparation;
mod tell;

use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use subnet::wireguard::PublicKey;
use subnet::{Attachment, BackendConfig, Family, Lease, Mac, NetworkConfig};

use super::backend::{Backend, BackendError, BackendId, Macs, Peer, PlanInput};
use super::select::select;
use crate::state::name::Name;
use crate::state::tunnel::TunnelPort;
use crate::state::{KernelState, Route};
use ports::PortChange;
use preparation::Preparation;

pub use preparation::{FoundSessions, HeardKeys};

/// How long a backend stays active after the last peer has left it.
const LINGER: Duration = Duration::from_secs(30);

/// More than this many changes at once are no migration.
const MAX_BACKENDS: usize = 8;

/// The active backends of this node; the first one is announced, or will be soon.
#[derive(Clone)]
pub struct ActiveBackends {
    /// The first is the one that this node announces, or prepares.
    all: Vec<ActiveBackend>,
    /// Not in use, and taken up as soon as a peer announces what they lead to.
    standby: Vec<ActiveBackend>,
    /// The announced backend stands in for the configured one, and reaches its peers.
    fallback_for: Option<BackendConfig>,
    /// The kernel of this node has no WireGuard.
    without_module: bool,
    ports: PortChange,
    preparation: Preparation,
}

#[derive(Clone)]
struct ActiveBackend {
    id: BackendId,
    config: BackendConfig,
    backend: Arc<dyn Backend>,
    /// Since when no peer has been reached by it.
    idle: Option<Instant>,
}

impl ActiveBackend {
    fn new(id: BackendId, config: &BackendConfig, network: &NetworkConfig) -> Result<Self, BackendError> {
        Ok(Self { id, config: config.clone(), backend: select(config, network)?, idle: None })
    }

    /// The same with devices that conflict with no other.
    fn on_spare_devices(self) -> Option<Self> {
        Some(Self { backend: self.backend.on_spare_devices()?, ..self })
    }
}

impl ActiveBackends {
    /// One backend, and what else its configuration allows.
    ///
    /// # Errors
    /// [`BackendError`] when the configuration can't be carried out.
    pub fn new(config: &BackendConfig, network: &NetworkConfig) -> Result<Self, BackendError> {
        let mut active = Self {
            all: vec![ActiveBackend::new(BackendId::default(), config, network)?],
            standby: Vec::new(),
            fallback_for: None,
            without_module: false,
            ports: PortChange::default(),
            preparation: Preparation::default(),
        };
        if config.has_fallback() {
            select(&BackendConfig::FALLBACK, network)
                .map_err(|error| BackendError(format!("Backend.Fallback: {error}")))?;
            active.remember(&[BackendConfig::FALLBACK], network);
        }
        Ok(active)
    }

    /// The backend that this node announces.
    pub fn current(&self) -> &dyn Backend {
        &*self.all[0].backend
    }

    /// All backends in use, the announced one first.
    pub fn backends(&self) -> impl Iterator<Item = &dyn Backend> {
        self.all.iter().map(|entry| &*entry.backend)
    }

    /// Whether the announced backend stands in for the one that the configuration asks for.
    pub fn has_fallen_back(&self) -> bool {
        self.fallback_for.is_some()
    }

    /// This node's public keys, by which it announces or announced itself.
    pub fn identities(&self) -> impl Iterator<Item = PublicKey> {
        self.backends().filter_map(Backend::identity)
    }

    /// The backend in use that has this id.
    pub fn backend(&self, id: BackendId) -> Option<&dyn Backend> {
        self.all.iter().find(|entry| entry.id == id).map(|entry| &*entry.backend)
    }

    /// The tunnel devices of the backend that this node announces.
    pub fn own_devices(&self) -> Vec<Name> {
        self.current().devices().into_iter().map(|(_, name)| name).collect()
    }

    /// The tunnel devices of all backends, also of those on standby.
    pub fn devices(&self) -> impl Iterator<Item = Name> {
        self.devices_by_family().into_iter().map(|(_, name)| name)
    }

    /// The same with their families.
    pub fn devices_by_family(&self) -> Vec<(Family, Name)> {
        self.all.iter().chain(&self.standby).flat_map(|entry| entry.backend.devices()).collect()
    }

    /// The ports at which tunnels for packets of this family listen.
    pub fn tunnel_ports(&self, family: Family) -> Vec<TunnelPort> {
        let of_family = |backend: &&dyn Backend| backend.devices().iter().any(|(of, _)| *of == family);
        TunnelPort::merged(
            self.backends().filter(of_family).filter_map(|backend| backend.tunnel_port(family)),
        )
    }

    /// MTU of pods in bytes on an underlay of this MTU: every backend carries it.
    pub fn mtu(&self, underlay: u32) -> u32 {
        self.backends().map(|backend| backend.mtu(underlay)).min().unwrap_or(underlay)
    }

    /// Whether any backend depends on which peers are on this node's own links.
    pub fn ask_for_direct(&self) -> bool {
        self.backends().any(Backend::asks_for_direct)
    }

    /// The configurations that are in use besides the announced one.
    pub fn former(&self) -> Vec<BackendConfig> {
        self.all[1..].iter().map(|entry| entry.config.clone()).collect()
    }

    /// Keeps earlier backends on standby, for peers that still announce them.
    pub fn remember(&mut self, configs: &[BackendConfig], network: &NetworkConfig) {
        for config in configs.iter().filter(|config| leads_anywhere(config)) {
            let Ok(entry) = ActiveBackend::new(self.free_id(), config, network) else { continue };
            let words = entry.backend.words();
            let known = self.all.iter().chain(&self.standby).any(|other| other.backend.words() == words);
            if known || self.standby.len() >= MAX_BACKENDS {
                continue;
            }
            // No lease tells whether it is needed.
            if self.is_rival(&*entry.backend) {
                self.all.extend(entry.on_spare_devices());
            } else {
                self.standby.push(entry);
            }
        }
        self.heed_kernel();
    }

    /// Keeps a backend on standby that this node will announce itself, for peers that announce it already. Another
    /// port needs none: those peers listen at the old one for as long as this node is there.
    pub fn expect(&mut self, config: &BackendConfig, network: &NetworkConfig) {
        let rival = select(config, network).is_ok_and(|backend| self.is_rival(&*backend));
        if !rival {
            self.remember(std::slice::from_ref(config), network);
        }
    }

    /// Announces another backend from now on, and keeps the one before for those who need it.
    ///
    /// # Errors
    /// [`BackendError`] when the configuration can't be carried out; nothing has changed then.
    pub fn switch(&mut self, config: &BackendConfig, network: &NetworkConfig) -> Result<(), BackendError> {
        let mut next = Self::new(&self.explicit(config), network)?;
        let (words, devices) = (next.current().words(), next.current().devices());
        let same = self.all.iter().find(|entry| entry.backend.words() == words);
        next.all[0].id = same.map_or_else(|| self.free_id(), |entry| entry.id);
        for entry in self.all.iter().filter(|entry| leads_anywhere(&entry.config)) {
            if entry.backend.words() == words || next.all.len() >= MAX_BACKENDS {
                continue;
            }
            // An earlier backend takes the network from the new configuration.
            let Ok(backend) = select(&entry.config, network) else { continue };
            let again = ActiveBackend { backend, ..entry.clone() };
            if !again.backend.devices().iter().any(|device| devices.contains(device)) {
                next.all.push(again);
            } else if next.is_rival(&*again.backend) {
                next.all.extend(again.on_spare_devices());
            } else {
                return Err(BackendError(
                    "Backend.GBP can't change while packets flow, since the kernel has one device for a VNI and a \
                     port: give it back its value, or change Backend.VNI or Backend.Port with it"
                        .into(),
                ));
            }
        }
        let standby: Vec<BackendConfig> = self.standby.iter().map(|entry| entry.config.clone()).collect();
        next.remember(&standby, network);
        let born = self.ports.born;
        if next.is_changing() {
            // A port may change again, and back, before everybody has heard of the first time.
            let goes_on = self.is_changing() && next.vni() == self.vni();
            let known = if goes_on { std::mem::take(&mut self.ports) } else { PortChange::default() };
            let newest = || if goes_on { self.rival_port() } else { next.rival_port() };
            next.ports = PortChange { before: known.before.or_else(newest), ..known };
        }
        next.ports.born = born;
        next.preparation = self.preparation_for(&next);
        next.without_module = self.without_module;
        next.heed_kernel();
        *self = next;
        Ok(())
    }

    /// Announces the fallback instead of what the configuration asks for and the kernel doesn't have.
    /// Says whether there is one.
    ///
    /// # Errors
    /// [`BackendError`] when it can't be carried out.
    pub fn fall_back(&mut self, network: &NetworkConfig) -> Result<bool, BackendError> {
        if !self.all[0].config.has_fallback() {
            return Ok(false);
        }
        let instead = ActiveBackend::new(self.free_id(), &BackendConfig::FALLBACK, network)?;
        let words = instead.backend.words();
        self.standby.retain(|entry| entry.backend.words() != words);
        self.all.retain(|entry| entry.backend.words() != words);
        self.fallback_for = Some(std::mem::replace(&mut self.all[0], instead).config);
        Ok(true)
    }

    /// Whether a backend uses WireGuard of the kernel and may do without.
    pub fn may_encrypt_in_process(&self) -> bool {
        self.all.iter().chain(&self.standby).any(|entry| entry.backend.in_process().is_some())
    }

    /// Takes note that the kernel has no WireGuard: this process encrypts instead, where that is allowed. Says whether
    /// anything is another than before.
    pub fn encrypt_in_process(&mut self) -> bool {
        self.without_module = true;
        self.heed_kernel()
    }

    fn heed_kernel(&mut self) -> bool {
        let mut changed = false;
        for entry in self.all.iter_mut().chain(&mut self.standby).filter(|_| self.without_module) {
            if let Some(backend) = entry.backend.in_process() {
                entry.backend = backend;
                changed = true;
            }
        }
        changed
    }

    /// The backend that reaches the node which has this lease.
    pub(crate) fn reaching(&self, lease: &Lease) -> Option<BackendId> {
        let attachment = lease.attachment.announced();
        let says_port = Family::BOTH
            .iter()
            .any(|family| attachment.vtep(*family).is_some_and(|vtep| vtep.port.is_some()));
        if !says_port && self.current().reaches(attachment) {
            let known = self.ports.at.get(&lease.subnets).copied().or(self.ports.before);
            let vtep = self.vni().zip(known.or_else(|| self.rival_port()));
            let there = self.first(|backend| vtep.is_some() && backend.vtep() == vtep);
            if there.is_some() {
                return there;
            }
        }
        let exact = self.first(|backend| backend.reaches(attachment));
        let any = || self.first(|backend| backend.compatible_with(attachment));
        let fallback_for = || match (&self.fallback_for, attachment) {
            (Some(instead_of), attachment) if instead_of.name() == attachment.type_name() => {
                Some(self.current_id())
            }
            _ => None,
        };
        // If this node reaches no peer by itself, no peer counts as unreachable.
        let none = || (!leads_anywhere(&self.all[0].config)).then(|| self.current_id());
        exact.or_else(any).or_else(fallback_for).or_else(none)
    }

    /// The first backend in use that is so.
    fn first(&self, is_so: impl Fn(&dyn Backend) -> bool) -> Option<BackendId> {
        self.all.iter().find(|entry| is_so(&*entry.backend)).map(|entry| entry.id)
    }

    /// The id of the backend that this node announces.
    pub(crate) fn current_id(&self) -> BackendId {
        self.all[0].id
    }

    /// An id that no backend in use or held ready has.
    fn free_id(&self) -> BackendId {
        let taken = |id: &BackendId| self.all.iter().chain(&self.standby).any(|entry| entry.id == *id);
        (0..u8::MAX).map(BackendId).find(|id| !taken(id)).unwrap_or_default()
    }

    /// What this node announces.
    pub fn attachment(&self, macs: &Macs) -> Attachment {
        let mut attachment = self.announced().backend.attachment(macs);
        if let (Attachment::Vxlan { v4, v6 }, Some((_, port))) = (&mut attachment, self.current().vtep())
            && self.ports.said
        {
            for vtep in v4.iter_mut().chain(v6) {
                vtep.port = Some(port);
            }
        }
        match self.current().attachment(macs) {
            Attachment::Wireguard(ends) => attachment.preparing(*ends),
            _ => attachment,
        }
    }

    /// Whether this node reached `subnet` by what it announces, and to which MAC, if its node has moved on
    /// to another backend of ours. That node accepts it, because this one still announces it.
    pub(crate) fn previous_mac(
        &self,
        attachment: &Attachment,
        before: &KernelState,
        subnet: IpNet,
    ) -> Option<Mac> {
        match attachment {
            Attachment::Foreign(_) => None,
            _ => self.current().previous_mac(before, subnet),
        }
    }

    /// Makes those on standby active that a peer announces. Returns whether there was any.
    pub fn take_up<'a>(&mut self, announced: impl Iterator<Item = &'a Attachment>) -> bool {
        if self.standby.is_empty() {
            return false;
        }
        let before = self.all.len();
        for attachment in announced.map(Attachment::announced) {
            if self.backends().any(|backend| backend.reaches(attachment)) {
                continue;
            }
            if let Some(index) = self.standby.iter().position(|entry| entry.backend.reaches(attachment)) {
                let entry = self.standby.remove(index);
                self.all.push(entry);
            }
        }
        self.all.len() > before
    }

    /// Drops the backends that no peer has been reached by for `LINGER`. Returns whether there was any, and
    /// when to ask again.
    pub fn drop_unused<'a>(
        &mut self,
        peers: impl Iterator<Item = &'a Peer> + Clone,
        now: Instant,
    ) -> (bool, Option<Instant>) {
        let (before, kept) = (self.all.len(), [self.current_id(), self.announced().id]);
        let mut next = None;
        let mut gone = Vec::new();
        self.all.retain_mut(|entry| {
            if kept.contains(&entry.id) || peers.clone().any(|peer| peer.backend == entry.id) {
                entry.idle = None;
                return true;
            }
            let end = *entry.idle.get_or_insert(now) + LINGER;
            if end <= now {
                gone.push(ActiveBackend { idle: None, ..entry.clone() });
                return false;
            }
            next = Some(next.map_or(end, |next: Instant| next.min(end)));
            true
        });
        // A peer may announce it again.
        for entry in gone {
            if matches!(entry.config, BackendConfig::Udp { .. }) && self.all[0].config.has_fallback() {
                self.standby.push(entry);
            }
        }
        (self.all.len() < before, next)
    }

    /// The kernel state that reaches every peer, each by its backend.
    pub fn plan(&self, input: PlanInput<'_>) -> KernelState {
        if let [only] = self.all.as_slice() {
            return only.backend.plan(input);
        }
        let mut state = KernelState::default();
        for entry in &self.all {
            let peers: Vec<_> = input.peers.iter().filter(|peer| peer.backend == entry.id).copied().collect();
            let mut planned = entry.backend.plan(PlanInput { peers: &peers, ..input });
            // The network as a whole leads to one device; routes to peers of this backend lead to its own.
            let rivals = |route: &&Route| state.routes.get(&route.dst).is_some_and(|it| it.dev != route.dev);
            let taken: Vec<Route> = planned.routes.values().filter(rivals).copied().collect();
            for route in taken {
                for peer in
                    peers.iter().filter(|peer| route.dst != peer.subnet && route.dst.contains(&peer.subnet))
                {
                    if !planned.routes.contains_key(&peer.subnet) {
                        planned.routes.insert(peer.subnet, Route { dst: peer.subnet, ..route });
                    }
                }
            }
            state.join(planned);
        }
        state
    }
}

/// Whether a backend reaches peers at all. One that has none is never kept for the sake of others.
fn leads_anywhere(config: &BackendConfig) -> bool {
    *config != BackendConfig::Alloc
}
