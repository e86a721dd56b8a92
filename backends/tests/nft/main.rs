//! nftables on the real kernel, with the programs `nft` and `iptables-nft` as witnesses.

#![expect(clippy::unwrap_used, reason = "a test panics where something is not as it should be")]

mod fast_path;
mod fixture;
mod foreign;
mod incremental;
mod listener;
mod random;
mod replace;
mod tunnels;

use anyhow::Context;
use backends::nft::{Nft, Ruleset};
use backends::testing::Namespace;

/// A network namespace, and our module in it.
struct Bed {
    namespace: Namespace,
    nft: Nft,
}

impl Bed {
    fn new() -> Self {
        let namespace = Namespace::new().unwrap();
        let nft = namespace.run(|| Nft::open().unwrap());
        Self { namespace, nft }
    }

    /// What `nft` prints when it lists `what`.
    fn list(&self, what: &str) -> String {
        self.namespace.command("nft").arg("list").args(what.split(' ')).ok().unwrap()
    }

    /// Runs commands of `nft`.
    fn script(&self, commands: &str) {
        self.namespace.command("nft").args(["-f", "-"]).input(commands).ok().unwrap();
    }

    /// Runs commands of iptables, each a line that begins with `iptables` or `ip6tables`.
    fn iptables(&self, lines: &str) -> String {
        let mut printed = String::new();
        for line in lines.lines().map(str::trim).filter(|line| !line.is_empty()) {
            let (program, rest) = line.split_once(' ').unwrap();
            // Words in quotes are one argument.
            let args = rest.split('"').enumerate().flat_map(|(i, part)| match i % 2 {
                0 => part.split_whitespace().collect(),
                _ => vec![part],
            });
            let command = self.namespace.command(format!("{program}-nft")).args(args);
            printed +=
                &command.ok().context("this test needs iptables-nft: apt-get install iptables").unwrap();
        }
        printed
    }
}

/// What was found, without the numbers that the kernel gives.
fn plain(mut found: Ruleset) -> Ruleset {
    let chains = found.tables.iter_mut().flat_map(|table| &mut table.chains);
    for rule in chains.flat_map(|chain| &mut chain.rules) {
        rule.handle = None;
    }
    found
}
