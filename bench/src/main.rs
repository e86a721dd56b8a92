//! `bench SUBJECT`: measures the release programs on the real kernel, in network namespaces of this process.
//! Nothing is left behind, however it ends.

mod plugin;
mod stage;
mod subject;

use std::process::ExitCode;

use clap::Parser;

use stage::Stage;
use subject::{cni, control, kube, live, net, rules};

#[derive(Parser)]
#[command(name = "bench", about = "Measures the release programs in network namespaces")]
enum Bench {
    /// Start, repair, restart and size of the agent and the CNI plugin.
    Control(control::Args),
    /// Clusters of Kubernetes with 2 to 20,000 nodes, heartbeats, waiting pods.
    Kube(kube::Args),
    /// Changes without a restart, while packets flow.
    Live(live::Args),
    /// Traffic rules: repair, restarts, programs run, very many rules.
    Rules(rules::Args),
    /// Throughput and round trips of all backends side by side.
    Net(net::Args),
    /// Many pods at once through the CNI plugin and through its delegate alone.
    Cni(cni::Args),
}

fn main() -> ExitCode {
    let (name, outcome) = match Bench::parse() {
        Bench::Control(args) => ("control", control::run(args)),
        Bench::Kube(args) => ("kube", kube::run(args)),
        Bench::Live(args) => ("live", live::run(args)),
        Bench::Rules(args) => ("rules", rules::run(args)),
        Bench::Net(args) => ("net", net::run(args)),
        Bench::Cni(args) => ("cni", cni::run(args)),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{name}: {error:#}");
            ExitCode::FAILURE
        }
    }
}
