//! What the machine knows, for those who ask how this node stands.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use backends::KernelState;
use subnet::{Family, PublicAddrs};

use super::Machine;
use super::plan::usable_nodes;
use crate::agent::cause::Cause;
use crate::cni;
use crate::interface::External;
use crate::status::{Node, Published, Sources, Store};

impl Machine {
    /// A turn is over.
    pub(in crate::agent) fn turned(&mut self, cause: Cause, took: Duration, now: SystemTime) {
        self.status.tally.turned(cause, took, now);
    }

    /// The loop goes on with what an earlier run saved.
    pub(in crate::agent) fn recalled(&mut self) {
        self.status.tally.recalled();
    }

    /// What is known now. The shell completes it by what only it knows.
    pub(in crate::agent) fn published(&self) -> Published {
        let peers = Arc::clone(&self.planner.peers);
        let all = self.view.known.leases.clone();
        let usable = peers.nodes;
        let complete = self.status.tally.unprogrammed.is_empty();
        let programmed = || -> Option<usize> {
            let whole = |peer: &&backends::Peer| !self.status.tally.unprogrammed.contains(&peer.subnet);
            Some(usable_nodes(peers.usable.values().filter(whole), all.as_deref()?))
        };
        let mut counters = self.status.tally.counters.clone();
        let known = &self.view.known;
        if known.snapshots > 0 {
            counters.snapshots.insert("store".to_owned(), known.snapshots);
        }
        counters.store_errors =
            known.errors.iter().map(|(kind, count)| ((*kind).to_owned(), *count)).collect();
        Published {
            node: self.node_status(),
            store: self.store_status(),
            contest: self.own.contest.reason(),
            kernel: self.status.tally.kernel.clone(),
            rules: self.status.tally.rules.clone(),
            counters,
            own: self.own.lease().map(|lease| lease.subnets).unwrap_or_default(),
            usable,
            programmed: if complete { usable } else { programmed().unwrap_or_default() },
            unprogrammed: Arc::clone(&self.status.tally.unprogrammed),
            active: self.force.active.named(),
            desired: self.planner.current().unwrap_or_else(|| Arc::new(KernelState::default())),
            scope: self.view.interest.scope.clone(),
            sources: self.sources(),
            cni_directory: self.cni_directory(),
            leases: all,
            peers,
        }
    }

    fn cni_directory(&self) -> std::path::PathBuf {
        let to = self.settings.cni_conf.as_ref().and_then(|(_, to)| to.parent());
        to.map_or_else(|| cni::DEFAULT_CONF_DIR.into(), std::path::Path::to_owned)
    }

    fn sources(&self) -> Sources {
        let external = self.underlay.external.as_ref();
        let addresses =
            |addrs: &PublicAddrs| Family::BOTH.into_iter().filter_map(|family| addrs.get(family)).collect();
        let own = |external: &External| -> Vec<_> {
            [external.public, external.addr].iter().flat_map(|addrs| -> Vec<_> { addresses(addrs) }).collect()
        };
        Sources { peers: self.rules.peers.clone(), own: external.map(own).unwrap_or_default() }
    }

    fn node_status(&self) -> Option<Node> {
        let (lease, external) = (self.own.lease()?, self.underlay.external.as_ref()?);
        let names = self.view.known.leases.as_deref().map(|all| &all.names);
        let own: Vec<_> = lease.subnets.iter().collect();
        let bridge = self.view.interest.host.serving_bridge(&own).map(|link| link.name.to_string());
        let active = &self.force.active;
        Some(Node {
            name: names.and_then(|names| names.get(&lease.subnets)).map(|name| name.to_string()),
            networks: self.force.network.networks().iter().map(|net| net.to_string()).collect(),
            subnets: own.iter().map(ToString::to_string).collect(),
            backend: active.current().words(),
            former: active.backends().skip(1).map(|backend| backend.words()).collect(),
            fallback: active.has_fallen_back(),
            devices: active.own_devices().iter().map(ToString::to_string).collect(),
            bridge: bridge.unwrap_or_default(),
            mtu: active.mtu(external.mtu),
            interface: external.name.to_string(),
            interface_mtu: external.mtu,
            interface_why: external.why.clone(),
            public: Family::BOTH.into_iter().filter_map(|family| external.public.get(family)).collect(),
            ports: self.tunnel_ports(),
            services: self.settings.services,
        })
    }

    fn tunnel_ports(&self) -> Vec<u16> {
        let of_family = |family| self.force.active.tunnel_ports(family).into_iter().map(|port| port.number);
        let all: std::collections::BTreeSet<u16> = Family::BOTH.into_iter().flat_map(of_family).collect();
        all.into_iter().collect()
    }

    fn store_status(&self) -> Store {
        let known = &self.view.known;
        let trouble = self.own.trouble.as_ref();
        let seconds =
            |at: SystemTime| at.duration_since(UNIX_EPOCH).map(|since| since.as_secs()).unwrap_or_default();
        Store {
            connected: self.own.followed && known.trouble.is_none() && known.answered.is_some(),
            refused: known.refused,
            trouble: known.trouble.clone(),
            trouble_since: trouble.map(|trouble| seconds(trouble.since)),
            last_answer: known.answered.map(seconds),
            recalled: self.own.is_recalled(),
            lease_ends: self.own.tenure.ends.map(seconds),
            lease_trouble: self.own.tenure.trouble.clone(),
            ..Store::default()
        }
    }
}
