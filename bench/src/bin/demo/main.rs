//! Shows the agent at work: three nodes, pods attached through the CNI chain, traffic between them, damage
//! and repair.
//!
//! All of it happens in network namespaces of this process; nothing is left behind, however it ends.

mod cluster;
mod damage;
mod table;
mod traffic;

use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use backends::testing::wait_for_some;
use clap::{Parser, ValueEnum};
use tokio::signal::unix::{SignalKind, signal};

use cluster::{Cluster, PATIENCE};

#[derive(Parser)]
#[command(name = "demo", about = "Three nodes, real pods, traffic, damage and repair, in namespaces")]
struct Args {
    /// How packets get from node to node.
    #[arg(long, value_enum, default_value = "vxlan")]
    backend: Backend,
}

/// The backends that the demo can show.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Backend {
    Vxlan,
    HostGw,
    Udp,
}

impl Backend {
    /// Its `Type` in `net-conf.json`.
    fn name(self) -> &'static str {
        match self {
            Self::Vxlan => "vxlan",
            Self::HostGw => "host-gw",
            Self::Udp => "udp",
        }
    }

    /// The device by which packets leave for other nodes.
    fn device(self) -> &'static str {
        match self {
            Self::Vxlan => "flannel.1",
            Self::HostGw => "eth0",
            Self::Udp => "flannel0",
        }
    }
}

/// Where progress is told, and whether someone asked to stop.
struct Stage {
    start: Instant,
    stopped: AtomicBool,
}

impl Stage {
    /// An error once the user asked to stop, so that the guards clean up.
    fn check(&self) -> anyhow::Result<()> {
        ensure!(!self.stopped.load(Ordering::Relaxed), "interrupted");
        Ok(())
    }

    /// Polls `condition` until it holds; an error when that takes too long or the user asked to stop.
    fn wait_for(
        &self,
        what: &str,
        mut condition: impl FnMut() -> anyhow::Result<bool>,
    ) -> anyhow::Result<()> {
        wait_for_some(what, PATIENCE, || match self.check().and_then(|()| condition()) {
            Ok(false) => None,
            Ok(true) => Some(Ok(())),
            Err(error) => Some(Err(error)),
        })?
    }

    /// Prints a line of progress.
    fn step(&self, text: &str) -> anyhow::Result<()> {
        self.check()?;
        self.say(&format!("{:5.1} s  {text}", self.start.elapsed().as_secs_f64()))
    }

    /// Prints text as it is.
    fn say(&self, text: &str) -> anyhow::Result<()> {
        writeln!(io::stdout(), "{text}").context("can't write to the standard output")
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    match watch_signals_during(move |stage| show(args.backend, stage)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The demo from beginning to end.
fn show(backend: Backend, stage: &Stage) -> anyhow::Result<()> {
    let mut cluster = Cluster::start(backend, stage)?;
    stage.say(&format!("\n{}", cluster.summary()?))?;
    cluster.attach_pods(stage)?;

    stage.step("pinging from every pod to every pod of the other nodes")?;
    let trips = traffic::round_trips(&cluster, stage)?;
    stage.say(&format!("\nRound trip from pod (row) to pod (column), mean in ms:\n\n{trips}"))?;
    stage.step("TCP from every node to every other, between pods, 2 s each")?;
    let rates = traffic::throughput(&cluster, stage)?;
    stage.say(&format!("\nTCP from pod to pod:\n\n{rates}"))?;

    stage.step("breaking things on node1 under 100 pings a second to a pod of node2")?;
    let repairs = damage::repair(&mut cluster, stage)?;
    stage.say(&format!("\nDamage and repair:\n\n{repairs}"))?;

    cluster.stop(stage)?;
    drop(cluster);
    stage.step("everything is removed again")
}

/// Runs `work` on a thread of its own. The first SIGINT, SIGTERM or SIGHUP asks it to stop, a second one
/// ends the process at once: the kernel then removes the namespaces, and only temporary files stay.
fn watch_signals_during(
    work: impl FnOnce(&Stage) -> anyhow::Result<()> + Send + 'static,
) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let stage = Arc::new(Stage { start: Instant::now(), stopped: AtomicBool::new(false) });
    let outcome = runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut hangup = signal(SignalKind::hangup())?;
        let worker = Arc::clone(&stage);
        let mut working = tokio::task::spawn_blocking(move || work(&worker));
        loop {
            tokio::select! {
                outcome = &mut working => return outcome.context("the demo panicked")?,
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                _ = hangup.recv() => {}
            }
            if stage.stopped.swap(true, Ordering::Relaxed) {
                bail!("interrupted twice: not waiting for the end of the current step");
            }
            eprintln!("demo: stopping and removing everything; once more to end at once");
        }
    });
    runtime.shutdown_timeout(Duration::ZERO);
    outcome
}
