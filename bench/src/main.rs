//! `bench SUBJECT`: measures the release programs on the real kernel, in network namespaces of this process.
//! Nothing is left behind, however it ends.

mod plugin;
mod stage;
mod subject;

use std::process::ExitCode;

use clap::builder::{PossibleValue, PossibleValuesParser};
use clap::{CommandFactory, FromArgMatches, Parser, ValueEnum};

use stage::{Stage, names};
use subject::{cni, control, kube, live, net, policy, rules};

#[derive(Parser)]
#[command(name = "bench", about = "Measures the release programs in network namespaces")]
enum Bench {
    /// Start, repair, restart and size of the agent.
    Control(control::Args),
    /// Clusters of Kubernetes with 2 to 20,000 nodes, heartbeats, waiting pods.
    Kube(kube::Args),
    /// Changes without a restart, while packets flow.
    Live(live::Args),
    /// Traffic rules: repair, restarts, programs run, very many rules.
    Rules(rules::Args),
    /// Throughput and round trips of all backends side by side.
    Net(net::Args),
    /// Pods through the CNI plugin and through its delegate alone, many at once and one after the other.
    Cni(cni::Args),
    /// Network policies: from nothing, a pod's arrival, memory.
    Policy(policy::Args),
}

/// The command line, which takes after `--only` what each subcommand can measure.
fn parse() -> Result<Bench, clap::Error> {
    let steps = net::Subject::value_variants().iter().filter_map(ValueEnum::to_possible_value);
    let subcommands: [(&str, Vec<PossibleValue>); 7] = [
        ("control", names(control::SUBJECTS)),
        ("kube", names(kube::SUBJECTS)),
        ("live", names(live::SUBJECTS)),
        ("rules", names(rules::SUBJECTS)),
        ("net", steps.collect()),
        ("cni", names(cni::SUBJECTS)),
        ("policy", names(policy::SUBJECTS)),
    ];
    let command = subcommands.into_iter().fold(Bench::command(), |command, (name, subjects)| {
        let only = PossibleValuesParser::new(subjects);
        command.mut_subcommand(name, |command| command.mut_arg("only", |arg| arg.value_parser(only)))
    });
    Bench::from_arg_matches(&command.get_matches())
}

fn main() -> ExitCode {
    let (name, outcome) = match parse().unwrap_or_else(|error| error.exit()) {
        Bench::Control(args) => ("control", control::run(args)),
        Bench::Kube(args) => ("kube", kube::run(args)),
        Bench::Live(args) => ("live", live::run(args)),
        Bench::Rules(args) => ("rules", rules::run(args)),
        Bench::Net(args) => ("net", net::run(args)),
        Bench::Cni(args) => ("cni", cni::run(args)),
        Bench::Policy(args) => ("policy", policy::run(args)),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{name}: {error:#}");
            ExitCode::FAILURE
        }
    }
}
