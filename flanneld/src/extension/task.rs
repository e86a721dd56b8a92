//! The task that runs commands until they have run for what there is.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::time::Duration;

use subnet::Subnets;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use super::entry::{Entries, EntryChange, Memory, Noted, due, variables};
use super::run::{self, run};
use super::words::Variables;
use super::{CONDITION, ExtensionFacts, ExtensionTask, ExtensionUse, StartupFacts};

/// How many commands run at a time, each about another peer: one that hangs keeps only some others waiting.
const MAX_RUNNING: usize = 4;

/// Time between attempts after failures, doubling up to the second.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// More reasons than this are not listed in readiness.
const MAX_NOTES: usize = 5;

/// A command that failed.
struct FailedCommand {
    why: String,
    step: EntryChange,
    pause: Duration,
    again: Instant,
}

/// What a command that has ended was about.
enum CommandEnd {
    Start(StartupFacts, Result<(), String>),
    Step(Subnets, EntryChange, String, Result<(), String>),
}

/// What the task does at the moment.
struct Work {
    memory: Memory,
    running: JoinSet<CommandEnd>,
    /// The peers that commands are running for.
    busy: BTreeSet<Subnets>,
    failures: BTreeMap<Subnets, FailedCommand>,
    starting: bool,
    start_failure: Option<(Duration, Instant)>,
    /// What is on disk is not what is known.
    unsaved: bool,
    /// There is a condition of readiness.
    conditional: bool,
}

impl Work {
    fn succeeded(&mut self, subnets: Subnets, step: &EntryChange, command: String) {
        if !command.trim().is_empty() {
            tracing::info!(%subnets, "{} succeeded", step.hook());
        }
        self.failures.remove(&subnets);
        self.unsaved = true;
        match step {
            EntryChange::Add(_) => {
                if let Some(noted) = self.memory.peers.get_mut(&subnets) {
                    noted.by = Some(command);
                }
            }
            EntryChange::Remove(_) => drop(self.memory.peers.remove(&subnets)),
        }
    }

    fn failed(&mut self, subnets: Subnets, step: EntryChange, why: &str) {
        let before = self.failures.get(&subnets).filter(|failed| failed.step == step);
        let pause = before.map_or(RETRY.0, |failed| RETRY.1.min(failed.pause * 2));
        let why = format!("{} for {subnets}: {why}", step.hook());
        if before.is_none_or(|failed| failed.why != why) {
            tracing::error!("{why}");
        }
        self.failures.insert(subnets, FailedCommand { why, step, pause, again: Instant::now() + pause });
    }
}

impl ExtensionTask {
    /// Runs for as long as the process does.
    pub(crate) async fn run(mut self) -> Infallible {
        let memory = Memory::read(&self.file).unwrap_or_else(|why| {
            tracing::error!("for which peers SubnetAddCommand ran before is not known: {why}");
            Memory::default()
        });
        let mut work = Work {
            memory,
            running: JoinSet::new(),
            busy: BTreeSet::new(),
            failures: BTreeMap::new(),
            starting: false,
            start_failure: None,
            unsaved: false,
            conditional: false,
        };
        loop {
            let told = self.told.borrow_and_update().clone();
            let again = self.advance(&mut work, &told);
            let wake = async {
                match again {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                changed = self.told.changed() => if changed.is_err() { std::future::pending().await },
                Some(ended) = work.running.join_next(), if !work.running.is_empty() => {
                    if let Ok(ended) = ended {
                        self.ended(&mut work, ended);
                    }
                }
                () = wake => {}
            }
        }
    }

    /// Starts what can be started. Says when to come back although nothing has happened.
    fn advance(&self, work: &mut Work, told: &ExtensionUse) -> Option<Instant> {
        let none = Entries::new();
        let (wanted, add, remove) = match told {
            ExtensionUse::Nothing => return None,
            ExtensionUse::Other => (&none, String::new(), work.memory.remove.clone()),
            ExtensionUse::Facts(facts) => {
                let ExtensionFacts { config, peers, .. } = &**facts;
                (peers, config.subnet_add.clone(), config.subnet_remove.clone())
            }
        };
        if matches!(told, ExtensionUse::Other) && !work.memory.peers.is_empty() && !self.allowed {
            self.note(&[format!(
                "SubnetAddCommand ran for peers before, and SubnetRemoveCommand may not run any more: start flanneld \
                 with --allow-extension-commands once, or undo by hand what was made and delete {}",
                self.file.display()
            )]);
            return None;
        }
        let started = match told {
            ExtensionUse::Facts(facts) => self.start(work, &facts.start),
            ExtensionUse::Nothing | ExtensionUse::Other => {
                self.publish(None);
                if std::mem::take(&mut work.conditional) {
                    self.health.forget(CONDITION);
                }
                true
            }
        };
        if work.memory.remove != remove {
            work.memory.remove.clone_from(&remove);
            work.unsaved = true;
        }
        work.failures
            .retain(|subnets, _| wanted.contains_key(subnets) || work.memory.peers.contains_key(subnets));
        let now = Instant::now();
        // What needs no command is done at once, and something else may follow.
        while started && self.step(work, wanted, &add, &remove, now) {}
        self.save(work);
        let reasons: Vec<String> = work.failures.values().map(|failure| failure.why.clone()).collect();
        self.note(&reasons);
        let failures = work.failures.iter().filter(|(subnets, _)| !work.busy.contains(subnets));
        let again = failures.map(|(_, failure)| failure.again);
        again
            .chain(work.start_failure.filter(|_| !started).map(|(_, again)| again))
            .filter(|at| *at > now)
            .min()
    }

    /// Sees to `PostStartupCommand`. Says whether it has succeeded for this lease.
    fn start(&self, work: &mut Work, start: &StartupFacts) -> bool {
        if self.started.borrow().as_ref() == Some(start) {
            return true;
        }
        if work.starting || work.start_failure.is_some_and(|(_, again)| again > Instant::now()) {
            return false;
        }
        if start.command.trim().is_empty() {
            self.has_started(work, start.clone());
            return true;
        }
        work.starting = true;
        if !std::mem::replace(&mut work.conditional, true) {
            self.health.set(CONDITION, Err("PostStartupCommand has not ended yet".to_owned()));
        }
        let mut variables: Variables = variables(&start.own, &start.local);
        let network = start.networks.v4.map_or_else(|| "0.0.0.0/0".to_owned(), |network| network.to_string());
        variables.insert("NETWORK".to_owned(), network);
        let start = start.clone();
        work.running.spawn(async move {
            let outcome = run(&start.command, &variables, "", run::TIMEOUT).await;
            CommandEnd::Start(start, outcome.map(drop))
        });
        false
    }

    fn has_started(&self, work: &mut Work, start: StartupFacts) {
        (work.start_failure, work.conditional) = (None, true);
        self.health.set(CONDITION, Ok(()));
        self.publish(Some(start));
    }

    /// Tells the loop, if it is news, for which lease `PostStartupCommand` has succeeded.
    fn publish(&self, start: Option<StartupFacts>) {
        self.started.send_if_modified(|known| {
            let news = *known != start;
            *known = start;
            news
        });
    }

    /// Starts commands about peers, and notes on disk before that they may make something. Says whether something was
    /// done for which there is no command.
    fn step(&self, work: &mut Work, wanted: &Entries, add: &str, remove: &str, now: Instant) -> bool {
        let mut done = false;
        for (subnets, step) in due(wanted, add, &work.memory.peers) {
            if work.busy.len() >= MAX_RUNNING {
                break;
            }
            let waits =
                work.failures.get(&subnets).is_some_and(|failed| failed.step == step && failed.again > now);
            if work.busy.contains(&subnets) || waits {
                continue;
            }
            let (command, entry) = match &step {
                EntryChange::Add(entry) => {
                    work.memory.peers.insert(subnets, Noted { entry: entry.clone(), by: None });
                    work.unsaved = true;
                    (add.to_owned(), entry.clone())
                }
                EntryChange::Remove(entry) => (remove.to_owned(), entry.clone()),
            };
            self.save(work);
            if command.trim().is_empty() {
                self.ended(work, CommandEnd::Step(subnets, step, command, Ok(())));
                done = true;
                continue;
            }
            work.busy.insert(subnets);
            work.running.spawn(async move {
                let variables = variables(&subnets, &entry.public);
                let outcome = run(&command, &variables, &entry.data, run::TIMEOUT).await;
                CommandEnd::Step(subnets, step, command, outcome.map(drop))
            });
        }
        done
    }

    /// Takes note of how a command ended.
    fn ended(&self, work: &mut Work, ended: CommandEnd) {
        match ended {
            CommandEnd::Start(start, Ok(())) => {
                work.starting = false;
                tracing::info!(subnet = %start.own, "PostStartupCommand succeeded");
                self.has_started(work, start);
            }
            CommandEnd::Start(_, Err(why)) => {
                work.starting = false;
                let pause = work.start_failure.map_or(RETRY.0, |(pause, _)| RETRY.1.min(pause * 2));
                work.start_failure = Some((pause, Instant::now() + pause));
                let why = format!("PostStartupCommand: {why}");
                tracing::error!("{why}");
                self.health.set(CONDITION, Err(why));
            }
            CommandEnd::Step(subnets, step, command, outcome) => {
                work.busy.remove(&subnets);
                match outcome {
                    Ok(()) => work.succeeded(subnets, &step, command),
                    Err(why) => work.failed(subnets, step, &why),
                }
            }
        }
    }

    fn save(&self, work: &mut Work) {
        if !work.unsaved {
            return;
        }
        match work.memory.write(&self.file) {
            Ok(()) => work.unsaved = false,
            Err(error) => tracing::error!("for which peers commands ran can't be noted: {error}"),
        }
    }

    fn note(&self, reasons: &[String]) {
        let more = reasons.len().saturating_sub(MAX_NOTES);
        let mut notes: Vec<String> = reasons.iter().take(MAX_NOTES).cloned().collect();
        if more > 0 {
            notes.push(format!("commands failed for {more} more peers"));
        }
        self.health.note(CONDITION, notes);
    }
}
