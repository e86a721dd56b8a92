//! What commands of the `extension` backend are told, and what waits for them.

use std::sync::Arc;

use backends::Peers;
use subnet::{Attachment, BackendConfig, Leases, NetworkConfig};

use super::Machine;
use crate::extension::{CONDITION, Entries, Entry, ExtensionFacts, ExtensionUse, Hooks, StartupFacts};

impl Machine {
    /// Whether commands of a configuration may be run on this node, if it has any.
    ///
    /// # Errors
    /// A sentence with the remedy.
    pub(super) fn permit_commands(&self, network: &NetworkConfig) -> Result<(), String> {
        let BackendConfig::Extension(config) = &network.backend else { return Ok(()) };
        Hooks::permit(self.settings.hooks.as_ref(), config)
    }

    /// Tells those who run commands what they have to know, if that may be news.
    pub(super) fn tell_hooks(&self, peers: &Peers, all: &Leases) {
        let Some(hooks) = &self.settings.hooks else { return };
        if let Err(why) = self.permit_commands(&self.force.network) {
            self.status.health.set(CONDITION, Err(why));
            return;
        }
        let told = self
            .hook_facts(peers, all)
            .map_or(ExtensionUse::Other, |facts| ExtensionUse::Facts(Arc::new(facts)));
        hooks.told.send_if_modified(|known| {
            let news = *known != told;
            *known = told;
            news
        });
    }

    fn hook_facts(&self, peers: &Peers, all: &Leases) -> Option<ExtensionFacts> {
        let (config, id) = self.force.active.extension()?;
        let start = self.hook_start(config.post_startup.clone())?;
        let reached = |subnets: &subnet::Subnets| {
            subnets.iter().filter_map(|subnet| peers.usable.get(&subnet)).any(|peer| peer.backend == id)
        };
        let entry = |lease: &subnet::Lease| {
            let data = match &lease.attachment {
                Attachment::Extension(Some(text)) => text.to_string(),
                _ => String::new(),
            };
            (lease.subnets, Entry { public: lease.public, data })
        };
        let peers: Entries = all.leases.values().filter(|lease| reached(&lease.subnets)).map(entry).collect();
        Some(ExtensionFacts { config: config.clone(), start, peers })
    }

    fn hook_start(&self, command: String) -> Option<StartupFacts> {
        let (lease, external) = (self.own.lease()?, self.underlay.external.as_ref()?);
        let networks = self.force.network.networks();
        Some(StartupFacts { command, networks, own: lease.subnets, local: external.addr })
    }

    /// Whether pods may be added: commands have run that have to run before.
    pub(super) fn hooks_have_started(&self) -> bool {
        let (BackendConfig::Extension(config), Some(hooks)) =
            (&self.force.network.backend, &self.settings.hooks)
        else {
            return true;
        };
        let wanted = self.hook_start(config.post_startup.clone());
        wanted.is_some() && *hooks.started.borrow() == wanted
    }
}
