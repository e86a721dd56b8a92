//! What health is: the loop turns, and every condition for being ready is met.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::status::{self, Board, Depth, NodeStatus, PeerList, Policy};

/// The health of this process, shared between those who know it and the server that tells.
#[derive(Clone, Debug)]
pub(crate) struct Health(Arc<HealthState>);

#[derive(Debug)]
struct HealthState {
    /// How long the loop may take for one turn.
    limit: Duration,
    turned: Mutex<Instant>,
    conditions: Mutex<BTreeMap<&'static str, Result<(), String>>>,
    notes: Mutex<BTreeMap<&'static str, Vec<String>>>,
    /// What there is to measure of network policies; nothing while they are off.
    policy: Mutex<Option<Policy>>,
    /// What the loop published.
    board: Board,
}

impl Health {
    /// Alive as long as [`beat`](Self::beat) is called within `limit`, counted from now; ready when all
    /// of `conditions` are met, which none of them is yet.
    pub(crate) fn new(limit: Duration, conditions: impl IntoIterator<Item = &'static str>) -> Self {
        let unmet = |condition| (condition, Err("not checked yet".to_owned()));
        Self(Arc::new(HealthState {
            limit,
            turned: Mutex::new(Instant::now()),
            conditions: Mutex::new(conditions.into_iter().map(unmet).collect()),
            notes: Mutex::default(),
            policy: Mutex::default(),
            board: Board::default(),
        }))
    }

    /// The loop has turned.
    pub(crate) fn beat(&self) {
        *unpoisoned(&self.0.turned) = Instant::now();
    }

    /// Whether the loop turns.
    ///
    /// # Errors
    /// A sentence with the time since its last turn.
    pub(crate) fn alive(&self) -> Result<(), String> {
        let silent = unpoisoned(&self.0.turned).elapsed();
        if silent <= self.0.limit {
            return Ok(());
        }
        let (silent, limit) = (silent.as_secs(), self.0.limit.as_secs_f64());
        Err(format!("the control loop has not turned for {silent} s; {limit} s are allowed"))
    }

    /// A condition for being ready is met, or why it is not. One that was not known becomes one. Logs when
    /// this process becomes ready, or is no longer.
    pub(crate) fn set(&self, condition: &'static str, state: Result<(), String>) {
        let mut conditions = unpoisoned(&self.0.conditions);
        let was_ready = unmet(&conditions).is_empty();
        conditions.insert(condition, state);
        let unmet = unmet(&conditions);
        match unmet.first() {
            None if !was_ready => {
                self.0.board.ready(true);
                tracing::info!("ready");
            }
            Some((condition, reason)) if was_ready => {
                self.0.board.ready(false);
                tracing::warn!(condition, reason = %reason, "no longer ready");
            }
            _ => {}
        }
    }

    /// A condition doesn't count any more.
    pub(crate) fn forget(&self, condition: &'static str) {
        unpoisoned(&self.0.conditions).remove(condition);
    }

    /// What an operator should know although this process is ready; replaces what was noted before on
    /// this subject.
    pub(crate) fn note(&self, subject: &'static str, notes: Vec<String>) {
        unpoisoned(&self.0.notes).insert(subject, notes);
    }

    /// The same, and each note that was not there before is logged as a warning.
    pub(crate) fn warn(&self, subject: &'static str, notes: &[String]) {
        let before = unpoisoned(&self.0.notes).insert(subject, notes.to_vec()).unwrap_or_default();
        for note in notes.iter().filter(|note| !before.contains(note)) {
            tracing::warn!("{note}");
        }
    }

    /// What there is to measure of network policies now.
    pub(crate) fn measure(&self, policy: &Policy) {
        *unpoisoned(&self.0.policy) = Some(policy.clone());
    }

    /// Where the loop publishes what it knows.
    pub(crate) fn board(&self) -> &Board {
        &self.0.board
    }

    /// How this node stands. May read files and the kernel.
    pub(crate) fn status(&self, depth: Depth) -> NodeStatus {
        let conditions = unpoisoned(&self.0.conditions).clone();
        let notes = unpoisoned(&self.0.notes).clone();
        let policy = unpoisoned(&self.0.policy).clone();
        status::build(&self.0.board, self.alive().is_ok(), conditions, notes, policy, depth)
    }

    /// The peers of this node.
    pub(crate) fn peers(&self) -> PeerList {
        status::peers(&self.0.board)
    }

    /// Every condition with its state, and the notes.
    pub(crate) fn all(&self) -> (BTreeMap<&'static str, Result<(), String>>, Vec<String>) {
        (
            unpoisoned(&self.0.conditions).clone(),
            unpoisoned(&self.0.notes).values().flatten().cloned().collect(),
        )
    }

    /// Whether all conditions for being ready are met.
    ///
    /// # Errors
    /// The unmet conditions with their reasons, in alphabetical order.
    pub(crate) fn ready(&self) -> Result<(), Vec<(&'static str, String)>> {
        let unmet = unmet(&unpoisoned(&self.0.conditions));
        if unmet.is_empty() { Ok(()) } else { Err(unmet) }
    }
}

fn unmet(conditions: &BTreeMap<&'static str, Result<(), String>>) -> Vec<(&'static str, String)> {
    let reason = |(&condition, state): (&&'static str, &Result<(), String>)| {
        state.as_ref().err().map(|reason| (condition, reason.clone()))
    };
    conditions.iter().filter_map(reason).collect()
}

/// Every value that is stored here is whole, so a panic elsewhere is no reason to stop telling.
fn unpoisoned<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn silence_beyond_the_limit_is_no_life_and_the_next_turn_is() {
        let health = Health::new(Duration::from_secs(30), []);
        tokio::time::advance(Duration::from_secs(30)).await;
        assert_eq!(health.alive(), Ok(()));
        tokio::time::advance(Duration::from_secs(1)).await;
        let reason = health.alive().unwrap_err();
        assert_eq!(reason, "the control loop has not turned for 31 s; 30 s are allowed");
        health.beat();
        assert_eq!(health.alive(), Ok(()));
    }

    #[test]
    fn ready_means_that_every_condition_is_met_now() {
        let health = Health::new(Duration::from_secs(1), ["store", "kernel"]);
        let unmet = |health: &Health| {
            health.ready().unwrap_err().into_iter().map(|(name, _)| name).collect::<Vec<_>>()
        };
        assert_eq!(unmet(&health), ["kernel", "store"]);
        health.set("store", Ok(()));
        assert_eq!(unmet(&health), ["kernel"]);
        health.set("kernel", Ok(()));
        assert_eq!(health.ready(), Ok(()));
        health.set("store", Err("it does not answer".into()));
        assert_eq!(health.ready(), Err(vec![("store", "it does not answer".to_owned())]));
        health.set("store", Ok(()));
        health.set("subnet-file", Err("read-only".into()));
        assert_eq!(unmet(&health), ["subnet-file"]);
        assert_eq!(Health::new(Duration::ZERO, []).ready(), Ok(()));
    }
}
