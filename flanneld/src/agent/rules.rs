//! Traffic rules: made with the lease, put right when somebody changes them, gone when they are off.

use std::time::Duration;

use backends::{Kernel, Masquerade, Traffic};
use ipnet::IpNet;
use subnet::{Family, LeaseStore};
use tokio::time::Instant;

use super::{Agent, RESYNC, condition};

/// When the rules were last found to be right.
#[derive(Debug)]
pub(super) struct Rules {
    sound: Option<Instant>,
    /// Networks of the run before this one, until their rules are gone.
    former: Vec<IpNet>,
}

impl Rules {
    pub(super) fn new(former: impl IntoIterator<Item = IpNet>) -> Self {
        Self { sound: None, former: former.into_iter().collect() }
    }

    /// They have to be looked at with the next turn.
    pub(super) fn due(&mut self) {
        self.sound = None;
    }

    /// They have to be made anew, in place of those for other networks.
    pub(super) fn renew(&mut self, former: impl IntoIterator<Item = IpNet>) {
        self.former.extend(former);
        self.due();
    }

    fn are_due(&self) -> bool {
        // A little less than the pause of the loop, so that no turn comes just too early.
        const AGE: Duration = RESYNC.saturating_sub(Duration::from_secs(10));
        self.sound.is_none_or(|at| at.elapsed() >= AGE)
    }
}

impl<K: Kernel, S: LeaseStore> Agent<'_, K, S> {
    /// Makes the traffic rules be as wanted, if that is due. Says whether they are.
    pub(super) async fn keep_rules(&mut self) -> bool {
        if !self.rules.are_due() {
            return true;
        }
        let (wanted, former) = (self.wanted_rules(), self.rules.former.clone());
        let outcome = self.with_hands(move |hands| hands.firewall.converge(&wanted, &former)).await;
        self.journal.rules(&outcome);
        let notes = outcome.as_ref().map(|report| report.notes.clone()).unwrap_or_default();
        self.health.note("rules", notes);
        let state = match &outcome {
            Ok(report) if report.obstacles.is_empty() => Ok(()),
            Ok(report) => Err(report.obstacles.join("; ")),
            Err(error) => Err(error.to_string()),
        };
        self.health.set(condition::RULES, state);
        let sound = outcome.is_ok();
        self.rules.sound = sound.then(Instant::now);
        if sound {
            self.rules.former.clear();
        }
        sound
    }

    fn wanted_rules(&self) -> Vec<Traffic> {
        let settings = self.settings.traffic;
        let Some(lease) = &self.lease else { return Vec::new() };
        let masquerade = settings.masquerade.then(|| Masquerade {
            fully_random: settings.fully_random,
            except: self.network.masquerade_except.clone(),
        });
        let of_family = |family| {
            let (range, subnet) = (self.network.range(family)?, lease.subnets.get(family)?);
            let (masquerade, forward) = (masquerade.clone(), settings.forward);
            let others = self.change.others(family);
            Some(Traffic { network: range.network, subnet, others, masquerade, forward })
        };
        Family::BOTH.into_iter().filter_map(of_family).collect()
    }
}
