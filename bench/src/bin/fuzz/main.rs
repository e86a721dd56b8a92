//! Feeds random packets to both directions of the udp backend's datapath, without a kernel, and compares what
//! comes out with slow models.
//!
//! Every case follows from a number: a case that fails is told, and `--seed NUMBER --cases 1` repeats it.

mod egress;
mod ingress;
mod model;
mod packets;

use std::panic::catch_unwind;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

use clap::Parser;

#[derive(Parser)]
#[command(
    name = "fuzz",
    about = "Compares the datapath of the udp backend with slow models over random packets"
)]
struct Args {
    /// How long; without it, as many cases as are asked for.
    #[arg(long)]
    seconds: Option<u64>,
    /// How many cases.
    #[arg(long)]
    cases: Option<u64>,
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
    /// What of this was taken rather than refused.
    taken: u64,
    /// Packets that were merged with others.
    merged: u64,
}

/// One case in each direction.
fn case(seed: u64, fed: &mut Fed) {
    let (packets, taken) = egress::case(seed);
    fed.egress += packets;
    fed.taken += taken;
    let (packets, taken, merged) = ingress::case(seed);
    fed.ingress += packets;
    fed.taken += taken;
    fed.merged += merged;
    fed.cases += 1;
}

/// Cases from this one on; the number of the one that fails.
fn run(first: u64, cases: u64, until: Option<Instant>) -> Result<Fed, u64> {
    let mut fed = Fed::default();
    let mut told = Instant::now();
    for seed in (0..cases).map(|number| first.wrapping_add(number)) {
        if until.is_some_and(|until| Instant::now() >= until) {
            break;
        }
        let mut next = fed;
        fed = catch_unwind(move || {
            case(seed, &mut next);
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
    match run(seed, cases, until) {
        Ok(fed) => {
            println!("nothing found: {fed:?}");
            ExitCode::SUCCESS
        }
        Err(seed) => {
            eprintln!("found: --seed {seed} --cases 1");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_run_finds_nothing_and_reaches_everything() {
        let fed = run(1, 200, None).unwrap();
        assert!(fed.merged > 1000 && fed.taken > 10_000 && fed.taken < fed.egress + fed.ingress, "{fed:?}");
    }
}
