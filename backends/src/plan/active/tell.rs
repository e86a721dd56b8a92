//! What a node's ways tell of themselves: names, and what single backends need elsewhere.

use std::fmt;

use subnet::{BackendConfig, ExtensionConfig, Family};

use super::{ActiveBackend, ActiveBackends};
use crate::plan::backend::{Backend, BackendId};
use crate::state::tunnel::IpipTunnel;

impl ActiveBackends {
    /// The backends in use with their words.
    pub fn named(&self) -> Vec<(BackendId, String)> {
        self.all.iter().map(|entry| (entry.id, entry.backend.words())).collect()
    }

    /// Whether the backend sends to VXLAN tunnel endpoints.
    pub(crate) fn leads_to_vteps(&self, id: BackendId) -> bool {
        self.all.iter().any(|entry| entry.id == id && matches!(entry.config, BackendConfig::Vxlan(_)))
    }

    /// The type of the backend that this node announces, as its configuration spells it.
    pub(crate) fn name(&self) -> &str {
        self.all[0].config.name()
    }

    /// The commands of the `extension` backend that lead to peers, and what its peers are known by.
    pub fn extension(&self) -> Option<(&ExtensionConfig, BackendId)> {
        self.all.iter().find_map(|way| match &way.config {
            BackendConfig::Extension(config) => Some((config, way.id)),
            _ => None,
        })
    }

    /// Whether routes to peers are made by others, so that one that looks like a node's is not left over.
    pub fn leave_routes_to_others(&self) -> bool {
        let others =
            |way: &ActiveBackend| matches!(way.config, BackendConfig::Alloc | BackendConfig::Extension(_));
        self.all.iter().any(others)
    }

    /// The device for packets of this family at which IP-in-IP packets arrive.
    pub fn ipip_tunnel(&self, family: Family) -> Option<IpipTunnel> {
        (family == Family::V4).then(|| self.backends().find_map(Backend::ipip_tunnel)).flatten()
    }
}

impl fmt::Debug for ActiveBackends {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.backends().map(Backend::words)).finish()
    }
}

impl fmt::Display for ActiveBackends {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.current().words())?;
        if let Some(announced) = self.announced_meanwhile() {
            write!(f, ", prepared while {announced} is announced,")?;
        }
        let former: Vec<String> = self.backends().skip(1).map(Backend::words).collect();
        if former.is_empty() { Ok(()) } else { write!(f, " and still {}", former.join(", ")) }
    }
}
