//! Feeds random packets to both directions of the udp backend's datapath, to WireGuard and to compiled network policies,
//! without a kernel, and compares what comes out with slow models.
//!
//! Every case follows from a number: a case that fails is told, and `--seed NUMBER --cases 1` repeats it.

mod policies;
mod sessions;
mod wireguard;

use std::panic::catch_unwind;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

use backends::testing::packet::{egress, ingress};
use clap::Parser;

#[derive(Parser)]
#[command(
    name = "fuzz",
    about = "Compares the udp backend's datapath, WireGuard and network policies with slow models over random packets"
)]
struct Args {
    /// How long; without it, as many cases as are asked for.
    #[arg(long)]
    seconds: Option<u64>,
    /// How many cases.
    #[arg(long)]
    cases: Option<u64>,
    /// Only WireGuard: its messages, its sessions and its window.
    #[arg(long)]
    wireguard: bool,
    /// Only network policies.
    #[arg(long, conflicts_with = "wireguard")]
    policies: bool,
    /// How many messages the sessions of a case get; with many, fewer handshakes are needed for as many messages.
    #[arg(long, default_value_t = 1_000)]
    messages: usize,
    /// The number of the first case; another one each time by default.
    #[arg(long)]
    seed: Option<u64>,
}

/// What was fed.
#[derive(Clone, Copy, Debug, Default)]
struct Fed {
    cases: u64,
    /// Packets from the device, and datagrams from peers.
    egress: u64,
    ingress: u64,
    /// Messages, handshakes and counters of WireGuard.
    wireguard: u64,
    /// Packets that network policies decide on.
    policies: u64,
    /// What of this was taken rather than refused.
    taken: u64,
    /// Packets that were merged with others.
    merged: u64,
}

/// What a case has.
#[derive(Clone, Copy)]
struct Size {
    only: Option<Only>,
    messages: usize,
}

/// What a case has alone.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Only {
    Wireguard,
    Policies,
}

/// One case of each, or of one alone.
fn case(seed: u64, size: Size, fed: &mut Fed) {
    fed.cases += 1;
    if size.only != Some(Only::Wireguard) {
        let (packets, passed) = policies::case(seed);
        fed.policies += packets;
        fed.taken += passed;
    }
    if size.only == Some(Only::Policies) {
        return;
    }
    let (inputs, taken) = wireguard::case(seed);
    fed.wireguard += inputs + size.messages as u64;
    let of_sessions = sessions::case(seed, size.messages);
    fed.taken += taken + of_sessions;
    if size.only == Some(Only::Wireguard) {
        return;
    }
    let (packets, taken) = egress::case(seed);
    fed.egress += packets;
    fed.taken += taken;
    let (packets, taken, merged) = ingress::case(seed);
    fed.ingress += packets;
    fed.taken += taken;
    fed.merged += merged;
}

/// Cases from this one on; the number of the one that fails.
fn run(first: u64, cases: u64, until: Option<Instant>, size: Size) -> Result<Fed, u64> {
    let mut fed = Fed::default();
    let mut told = Instant::now();
    for seed in (0..cases).map(|number| first.wrapping_add(number)) {
        if until.is_some_and(|until| Instant::now() >= until) {
            break;
        }
        let mut next = fed;
        fed = catch_unwind(move || {
            case(seed, size, &mut next);
            next
        })
        .map_err(|_| seed)?;
        if told.elapsed() > Duration::from_secs(60) {
            told = Instant::now();
            println!("{fed:?}");
        }
    }
    Ok(fed)
}

fn main() -> ExitCode {
    let args = Args::parse();
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let seed = args.seed.unwrap_or_else(|| u64::from(now.subsec_nanos()) << 32 | now.as_secs());
    let until = args.seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let cases = args.cases.unwrap_or(if until.is_some() { u64::MAX } else { 10_000 });
    println!("first case: --seed {seed}");
    let (only, flag) = match (args.wireguard, args.policies) {
        (true, _) => (Some(Only::Wireguard), " --wireguard"),
        (_, true) => (Some(Only::Policies), " --policies"),
        _ => (None, ""),
    };
    let size = Size { only, messages: args.messages };
    match run(seed, cases, until, size) {
        Ok(fed) => {
            println!("nothing found: {fed:?}");
            ExitCode::SUCCESS
        }
        Err(seed) => {
            eprintln!("found: --seed {seed} --cases 1{flag} --messages {}", args.messages);
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_run_finds_nothing_and_reaches_everything() {
        let alone = run(1, 20, None, Size { only: Some(Only::Wireguard), messages: 1_000 }).unwrap();
        assert!(alone.taken > 10_000 && alone.egress + alone.policies == 0, "{alone:?}");
        let alone = run(1, 20, None, Size { only: Some(Only::Policies), messages: 0 }).unwrap();
        assert!(alone.taken > 1000 && alone.taken < alone.policies && alone.wireguard == 0, "{alone:?}");
        let fed = run(1, 100, None, Size { only: None, messages: 100 }).unwrap();
        assert!(fed.merged > 1000 && fed.taken > 10_000, "{fed:?}");
        assert!(fed.taken < fed.egress + fed.ingress + fed.wireguard + fed.policies, "{fed:?}");
    }
}
