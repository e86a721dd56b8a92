//! What nodes know of each other's VXLAN ports while these change.

use std::collections::BTreeMap;
use std::time::Instant;

use subnet::{BackendConfig, Family, Leases, Subnets, VxlanConfig};

use super::{ActiveBackends, LINGER};
use crate::plan::backend::Backend;
use crate::plan::vxlan::DEFAULT_PORT;

/// What is known of a change of VXLAN's port. Leases don't say the port, so while it changes they do: nodes
/// that have both say the new one, and a peer that has never said any is taken to be at the old one.
#[derive(Clone, Debug, Default)]
pub(super) struct PortChange {
    /// What nodes have said last since the change began, by their leases.
    pub(super) at: BTreeMap<Subnets, u16>,
    /// The port before the change, where those are that have said nothing; unknown if this node was started
    /// since.
    pub(super) before: Option<u16>,
    /// When this node was started: it may have missed what others said before.
    pub(super) born: Option<Instant>,
    /// Whether this node says its port.
    pub(super) said: bool,
}

impl ActiveBackends {
    /// Takes in what leases say about ports. Says when to ask again.
    pub fn hear_ports(&mut self, all: &Leases, own: &Subnets, now: Instant) -> Option<Instant> {
        let listens_until = *self.ports.born.get_or_insert(now) + 2 * LINGER;
        let changing = self.is_changing();
        if !changing {
            self.ports.at.clear();
            self.ports.before = None;
        }
        if self.port().is_none() {
            self.ports.said = false;
            return None;
        }
        let mut others_say = false;
        for (subnets, lease) in all.leases.iter().filter(|(subnets, _)| *subnets != own) {
            let said = Family::BOTH.iter().find_map(|family| lease.attachment.vtep(*family)?.port);
            others_say |= said.is_some();
            if let Some(port) = said.filter(|_| changing) {
                self.ports.at.insert(*subnets, port);
            }
        }
        // A node that comes while others change tells them that it is there already.
        let listens = others_say && now < listens_until;
        self.ports.said = changing || listens;
        (listens && !changing).then_some(listens_until)
    }

    /// The announced port, if the announced backend has one.
    fn port(&self) -> Option<u16> {
        self.current().vtep().map(|(_, port)| port)
    }

    pub(super) fn vni(&self) -> Option<u32> {
        self.current().vtep().map(|(vni, _)| vni)
    }

    /// The newest of the ports that differ from the announced one.
    pub(super) fn rival_port(&self) -> Option<u16> {
        self.backends().find(|backend| self.is_rival(*backend))?.vtep().map(|(_, port)| port)
    }

    /// Whether a backend uses another port.
    pub(super) fn is_changing(&self) -> bool {
        self.rival_port().is_some()
    }

    /// Whether this backend has the VNI of the current one and another port.
    pub(super) fn is_rival(&self, backend: &dyn Backend) -> bool {
        match (self.current().vtep(), backend.vtep()) {
            (Some((vni, port)), Some((other_vni, other_port))) => vni == other_vni && port != other_port,
            _ => false,
        }
    }

    /// The configuration with its port, where there is a device of another one that would do otherwise.
    pub(super) fn explicit(&self, config: &BackendConfig) -> BackendConfig {
        match config {
            BackendConfig::Vxlan(vxlan) if vxlan.port.is_none() => {
                let port = self
                    .backends()
                    .filter_map(Backend::vtep)
                    .any(|(vni, port)| vni == vxlan.vni && port != DEFAULT_PORT);
                BackendConfig::Vxlan(VxlanConfig { port: port.then_some(DEFAULT_PORT), ..vxlan.clone() })
            }
            other => other.clone(),
        }
    }
}
