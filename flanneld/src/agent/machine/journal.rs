//! What the agent tells the log: each fact once, when it begins and when it ends, never once a turn.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use backends::backend::Direct;
use backends::fights::Told;
use backends::host::StaleBridge;
use backends::{
    ActiveBackends, Fights, FirewallError, FirewallReport, HeardKeys, KernelChange, KernelError, Peers,
    Report,
};
use subnet::env_file::SubnetEnv;
use subnet::{Family, Lease, Loss, Subnets};
use tracing::{debug, error, info, warn};

use crate::interface::External;

/// More changes than this in one run are counted instead of listed.
const LISTED: usize = 16;

/// What was said last.
#[derive(Debug, Default)]
pub(super) struct Journal {
    skipped: BTreeMap<String, String>,
    usable: Option<usize>,
    refused: BTreeSet<String>,
    bridges: BTreeSet<String>,
    rules: BTreeSet<String>,
    tunnel: Vec<String>,
    surroundings: BTreeSet<String>,
    trouble: Option<String>,
    no_interface: Option<String>,
    subnet_file: Option<String>,
    rewritten: Option<String>,
    cni_conf: Option<String>,
    kept: Option<String>,
    fights: Fights,
    active: Option<String>,
    kept_peers: usize,
    ready: bool,
    prerequisites: BTreeSet<String>,
    carrier: BTreeSet<String>,
}

impl Journal {
    pub(super) fn interface(&mut self, external: &External, remark: Option<String>) {
        self.no_interface = None;
        let External { name, mtu, addr, public, why, .. } = external;
        info!(interface = %name, %mtu, address = %addr, public = %public, why, "external interface");
        if let Some(remark) = remark {
            warn!("{remark}");
        }
    }

    pub(super) fn no_interface(&mut self, why: &str) {
        if self.no_interface.as_deref() != Some(why) {
            error!("{why}");
            self.no_interface = Some(why.to_owned());
        }
    }

    /// What the host lacks, each once, and the end of it.
    pub(super) fn prerequisites(&mut self, notes: &[String]) {
        say_news(&mut self.prerequisites, notes, "the host has what pods' packets need");
    }

    pub(super) fn carrier(&mut self, notes: &[String]) {
        say_news(&mut self.carrier, notes, "the external interface has its carrier again");
    }

    pub(super) fn leased(&mut self, lease: &Lease, old: Option<Subnets>) {
        let (subnet, public) = (lease.subnets, lease.public);
        let has = |subnets: &Subnets, family| subnets.get(family).is_some();
        match old {
            Some(old)
                if old != subnet
                    && Family::BOTH.iter().all(|family| has(&old, *family) == has(&subnet, *family)) =>
            {
                warn!(%subnet, was = %old, "this node has another subnet than before")
            }
            // A family came or went.
            Some(old) if old != subnet && old.iter().any(|kept| subnet.iter().any(|now| now == kept)) => {
                info!(%subnet, was = %old, "lease held, of other families than before");
            }
            Some(old) if old != subnet => {
                warn!(%subnet, was = %old, "this node has another subnet than before")
            }
            _ => info!(%subnet, %public, "lease held"),
        }
    }

    pub(super) fn lost(&mut self, loss: &Loss) {
        error!(
            "{loss}; taking another subnet, this node is not ready until the pods of the old one are gone"
        );
    }

    pub(super) fn contested(&mut self, reason: &str) {
        error!("{reason}");
    }

    pub(super) fn surroundings(&mut self, notes: &[String]) {
        say_news(
            &mut self.surroundings,
            notes,
            "nothing of this host is in the way of the pods' network any more",
        );
    }

    pub(super) fn store(&mut self, trouble: Option<&str>, refused: bool) {
        match trouble {
            Some(now) if self.trouble.as_deref() != Some(now) && refused => {
                error!("{now}; keeping all leases that are known, until the own one ends");
            }
            Some(now) if self.trouble.as_deref() != Some(now) => {
                warn!("{now}; keeping all leases that are known");
            }
            None if self.trouble.is_some() => info!("the store answers again"),
            _ => {}
        }
        self.trouble = trouble.map(str::to_owned);
    }

    pub(super) fn peers(&mut self, peers: &Peers) {
        let usable = peers.nodes;
        for (key, why) in &peers.skipped {
            if self.skipped.get(key) != Some(why) {
                warn!(key, "lease skipped: {why}");
            }
        }
        for key in self.skipped.keys().filter(|key| !peers.skipped.contains_key(*key)) {
            info!(key, "lease no longer skipped");
        }
        let skipped = peers.skipped.len();
        if self.usable != Some(usable) || self.skipped.len() != skipped {
            info!(usable, skipped, "peers");
        }
        if peers.kept > 0 && peers.kept != self.kept_peers {
            info!(
                "{} peers announce a backend that this node's configuration doesn't know yet: they are reached as before",
                peers.kept
            );
        }
        self.kept_peers = peers.kept;
        self.usable = Some(usable);
        self.skipped.clone_from(&peers.skipped);
    }

    /// What is held back because somebody undoes it, and how long the first of it waits.
    pub(super) fn held(&self, now: Instant) -> (BTreeSet<String>, Option<Duration>) {
        (self.fights.held(now), self.fights.wait(now))
    }

    /// How peers are reached, when it is not as simple as it usually is.
    pub(super) fn active(&mut self, active: &ActiveBackends) {
        let now = active.to_string();
        let before = self.active.replace(now.clone());
        if before.is_some_and(|before| before != now) {
            info!("this node has {now}");
        }
    }

    /// The end of a preparation of WireGuard.
    pub(super) fn heard_keys(&self, keys: HeardKeys) {
        match keys.ended_without {
            None => {}
            Some(0) => {
                info!("wireguard is announced: there are sessions with all peers that have told their keys")
            }
            Some(lacking) => warn!(
                lacking,
                "wireguard is announced after 15 s without a session with {lacking} peers that have told their keys: packets \
                 to them wait until there is one"
            ),
        }
    }

    /// Peers that are reached without a tunnel from now on, or no more.
    pub(super) fn direct(&mut self, before: &Direct, now: &Direct) {
        let came: Vec<String> =
            now.keys().filter(|addr| !before.contains_key(addr)).map(ToString::to_string).collect();
        let went: Vec<String> =
            before.keys().filter(|addr| !now.contains_key(addr)).map(ToString::to_string).collect();
        for (which, what) in [(came, "reached directly"), (went, "no longer reached directly")] {
            match which.len() {
                0 => {}
                few if few <= LISTED => info!("{what}: {}", which.join(", ")),
                many => info!("{many} peers are {what}"),
            }
        }
    }

    /// Tells what was changed and what failed. `repaired`: the desired state was the same before. Gives the
    /// notes about what is fought over.
    pub(super) fn report(&mut self, report: &Report, repaired: bool, now: Instant) -> Vec<String> {
        let told = if repaired {
            self.fights.record(report.applied.iter().map(ToString::to_string), now)
        } else {
            Told::default()
        };
        if report.applied.len() <= LISTED {
            let lines = report.applied.iter().map(ToString::to_string);
            lines.filter(|line| !told.quiet.contains(line)).for_each(|line| info!("{line}"));
        } else {
            info!("{} changes: {}", report.applied.len(), counted(&report.applied));
            report.applied.iter().for_each(|change| debug!("{change}"));
        }
        told.warning.iter().chain(&report.replaced).for_each(|warning| warn!("{warning}"));
        let failed = report.failed.iter().map(ToString::to_string).chain(report.conflicts.iter().cloned());
        let refused: BTreeSet<String> = failed.collect();
        let news = refused.difference(&self.refused);
        news.clone().take(LISTED).for_each(|text| error!("{text}"));
        let more = news.count().saturating_sub(LISTED);
        if more > 0 {
            error!("and {more} more changes that the kernel refuses");
        }
        if refused.is_empty() && !self.refused.is_empty() {
            info!("the kernel refuses nothing any more");
        }
        self.refused = refused;
        self.fights.notes(now)
    }

    /// Bridges with addresses of other subnets that stay: pods hang on them, or the address came back after
    /// it was removed once. Gives the sentences.
    pub(super) fn busy_bridges(
        &mut self,
        busy: &[StaleBridge],
        back: &[StaleBridge],
        own: &Subnets,
    ) -> Vec<String> {
        let busy = busy.iter().map(|StaleBridge { name, net, ports }| {
            format!(
                "{name} has the address {net} of another subnet than this node's ({own}), so no pod can be added to \
                 it; {ports} devices hang on it: drain this node's pods, and the address is removed"
            )
        });
        let back = back.iter().map(|StaleBridge { name, net, .. }| {
            format!(
                "{name} has the address {net} again, which lies in another node's subnet and was removed once: \
                 something on this host wants it, so it stays; remove it if it is a leftover \
                 (ip address del {net} dev {name})"
            )
        });
        let texts: BTreeSet<String> = busy.chain(back).collect();
        texts.difference(&self.bridges).for_each(|text| warn!("{text}"));
        self.bridges.clone_from(&texts);
        texts.into_iter().collect()
    }

    pub(super) fn mended_bridges(&mut self, made: &[KernelChange], failures: &[(usize, KernelError)]) {
        for (index, change) in made.iter().enumerate() {
            match failures.iter().find(|(failed, _)| *failed == index) {
                Some((_, error)) => error!("{error}"),
                None => info!("{change}: it was the gateway of an earlier subnet and nothing hung on it"),
            }
        }
    }

    pub(super) fn rules(&mut self, outcome: &Result<FirewallReport, FirewallError>, told: &Told) {
        told.warning.iter().for_each(|warning| warn!("{warning}"));
        let said: BTreeSet<String> = match outcome {
            Ok(report) => {
                let news = report.changed.iter().filter(|change| !told.quiet.contains(*change));
                news.for_each(|change| info!("{change}"));
                report
                    .notes
                    .iter()
                    .filter(|note| !self.rules.contains(*note))
                    .for_each(|note| info!("{note}"));
                report
                    .obstacles
                    .iter()
                    .filter(|text| !self.rules.contains(*text))
                    .for_each(|text| error!("{text}"));
                report.notes.iter().chain(&report.obstacles).cloned().collect()
            }
            Err(error) => {
                let text = error.to_string();
                if !self.rules.contains(&text) {
                    error!("{text}");
                }
                [text].into()
            }
        };
        self.rules = said;
    }

    pub(super) fn tunnel_filter(
        &mut self,
        outcome: &Result<FirewallReport, FirewallError>,
        notes: &[String],
        told: &Told,
    ) {
        told.warning.iter().for_each(|warning| warn!("{warning}"));
        let changed = outcome.iter().flat_map(|report| &report.changed);
        changed.filter(|change| !told.quiet.contains(*change)).for_each(|change| info!("{change}"));
        notes.iter().filter(|note| !self.tunnel.contains(note)).for_each(|note| warn!("{note}"));
        self.tunnel = notes.to_vec();
    }

    pub(super) fn subnet_file(&mut self, path: &Path, env: &SubnetEnv, written: &io::Result<bool>) {
        match written {
            Ok(true) => {
                info!(path = %path.display(), subnet = %env.subnets, mtu = env.mtu, "subnet file written");
                self.subnet_file = None;
            }
            Ok(false) => self.subnet_file = None,
            Err(error) => {
                let text = error.to_string();
                if self.subnet_file.as_ref() != Some(&text) {
                    error!(
                        "the subnet file can't be written, so no pod can be connected: {text}; {}",
                        remedy(error.kind())
                    );
                    self.subnet_file = Some(text);
                }
            }
        }
    }

    /// Another program rewrote the subnet file, or no longer has.
    pub(super) fn rewritten(&mut self, note: Option<&str>) {
        if let Some(note) = note.filter(|note| self.rewritten.as_deref() != Some(*note)) {
            info!("{note}");
        }
        self.rewritten = note.map(str::to_owned);
    }

    pub(super) fn cni_conf(&mut self, to: &Path, copied: &io::Result<bool>) {
        let text = copied.as_ref().err().map(ToString::to_string);
        match (copied, &text) {
            (Ok(true), _) => info!(path = %to.display(), "CNI configuration written"),
            (Err(_), Some(text)) if self.cni_conf.as_ref() != Some(text) => {
                error!(
                    "the CNI configuration can't be written, so the container runtime knows no network: {text}"
                );
            }
            _ => {}
        }
        self.cni_conf = text;
    }

    pub(super) fn kept(&mut self, path: &Path, written: &io::Result<bool>) {
        let text = written.as_ref().err().map(ToString::to_string);
        if let Some(text) = text.as_ref().filter(|text| self.kept.as_ref() != Some(*text)) {
            warn!(
                path = %path.display(),
                "what is known of the cluster can't be kept, so a start without the store won't be possible: {text}"
            );
        }
        self.kept = text;
    }

    pub(super) fn ready(&mut self) {
        if !self.ready {
            self.ready = true;
            // No service manager is no failure.
            let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
        }
    }
}

/// What to do about a file that can't be written.
fn remedy(kind: io::ErrorKind) -> &'static str {
    match kind {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "make room on its file system: it is written again as soon as there is some"
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            "make its directory writable, or give another --subnet-file"
        }
        _ => "look at its file system, or give another --subnet-file",
    }
}

/// Warns of what was not said before, and tells when nothing is left of it.
fn say_news(said: &mut BTreeSet<String>, now: &[String], over: &str) {
    let now: BTreeSet<String> = now.iter().cloned().collect();
    now.difference(said).for_each(|text| warn!("{text}"));
    if now.is_empty() && !said.is_empty() {
        info!("{over}");
    }
    *said = now;
}

fn counted(changes: &[KernelChange]) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for change in changes {
        *counts.entry(change.object()).or_default() += 1;
    }
    let counts: Vec<String> = counts.iter().map(|(object, count)| format!("{count} {object}")).collect();
    counts.join(", ")
}
