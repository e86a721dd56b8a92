//! Shows the agent at work: three nodes, pods attached by the CNI plugin, traffic between them, damage
//! and repair.
//!
//! All of it happens in network namespaces of this process; nothing is left behind, however it ends. Only SIGKILL
//! leaves temporary files.

mod cluster;
mod damage;
mod traffic;

use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use bench::progress::{Output, Progress, watch_signals_during};
use clap::{Parser, ValueEnum};

use cluster::Cluster;

#[derive(Parser)]
#[command(name = "demo", about = "Three nodes, real pods, traffic, damage and repair, in namespaces")]
struct Args {
    /// How packets get from node to node.
    #[arg(long, value_enum, default_value = "vxlan")]
    backend: Backend,
    /// Only start the cluster, and keep it until Ctrl-C.
    #[arg(long)]
    keep: bool,
}

/// The backends that the demo can show.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Backend {
    Vxlan,
    HostGw,
    Wireguard,
    Udp,
}

impl Backend {
    /// Its `Type` in `net-conf.json`.
    fn name(self) -> &'static str {
        match self {
            Self::Vxlan => "vxlan",
            Self::HostGw => "host-gw",
            Self::Wireguard => "wireguard",
            Self::Udp => "udp",
        }
    }

    /// The device by which packets leave for other nodes.
    fn device(self) -> &'static str {
        match self {
            Self::Vxlan => "flannel.1",
            Self::HostGw => "eth0",
            Self::Wireguard => "flannel-wg",
            Self::Udp => "flannel0",
        }
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    let work = move |progress: Progress| match args.keep {
        true => keep(args.backend, &progress),
        false => show(args.backend, &progress),
    };
    match watch_signals_during("demo", Output::Standard, work) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Starts the cluster and leaves it to the user.
fn keep(backend: Backend, progress: &Progress) -> anyhow::Result<()> {
    let mut cluster = Cluster::start(backend, progress)?;
    progress.say(&format!("\n{}", cluster.summary()?))?;
    cluster.attach_pods(progress)?;
    progress.say(&cluster.guide()?)?;
    while progress.check().is_ok() {
        thread::sleep(Duration::from_millis(100));
    }
    cluster.stop(progress)?;
    drop(cluster);
    progress.say("everything is removed again")
}

/// The demo from beginning to end.
fn show(backend: Backend, progress: &Progress) -> anyhow::Result<()> {
    let mut cluster = Cluster::start(backend, progress)?;
    progress.say(&format!("\n{}", cluster.summary()?))?;
    cluster.attach_pods(progress)?;

    progress.step("pinging from every pod to every pod of the other nodes")?;
    let trips = traffic::round_trips(&cluster, progress)?;
    progress.say(&format!("\nRound trip from pod (row) to pod (column), mean in ms:\n\n{trips}"))?;
    progress.step("TCP from every node to every other, between pods, 2 s each")?;
    let rates = traffic::throughput(&cluster, progress)?;
    progress.say(&format!("\nTCP from pod to pod:\n\n{rates}"))?;

    progress.step("breaking things on node1 under 100 pings a second to a pod of node2")?;
    let repairs = damage::repair(&mut cluster, progress)?;
    progress.say(&format!("\nDamage and repair:\n\n{repairs}"))?;

    cluster.stop(progress)?;
    drop(cluster);
    progress.step("everything is removed again")
}
