//! What others do to the rules, and how soon they are as before.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use backends::nft::{Nft, NftError, Ruleset};
use backends::testing::wait_for;
use bench::bed::TIMEOUT;
use bench::figure::{Limit, ms};
use bench::progress::Progress;

use super::bed::{MODES, Setup, look};
use crate::Stage;

/// How long rules may be other than before.
const LIMIT_MS: f64 = 200.0;
/// Between two looks at the rules.
const INTERVAL: Duration = Duration::from_millis(1);
/// Between two rounds: longer than anything the agent does after a repair.
const REST: Duration = Duration::from_millis(300);

/// The table that nft mode makes, and its chain for leaving packets.
const OWN: (&str, &str) = ("flannel-ipv4", "postrtg");

/// A damage by its name, and the command that does it.
type Damage = (&'static str, fn(&mut Nft) -> anyhow::Result<String>);

/// In nft mode.
const NFT: [Damage; 4] = [
    ("nft flush ruleset", |_| Ok("nft flush ruleset".to_owned())),
    ("a rule deleted by its handle", one_rule),
    ("table deleted", |_| Ok(format!("nft delete table ip {}", OWN.0))),
    ("a foreign rule inserted", |_| Ok(format!("nft insert rule ip {} forward drop", OWN.0))),
];

/// In iptables mode.
const IPTABLES: [Damage; 4] = [
    ("nft flush ruleset", |_| Ok("nft flush ruleset".to_owned())),
    ("iptables -t nat -F FLANNEL-POSTRTG", |_| Ok("iptables -t nat -F FLANNEL-POSTRTG".to_owned())),
    ("a rule deleted", |_| Ok("iptables -t nat -D FLANNEL-POSTRTG 3".to_owned())),
    ("a foreign rule inserted", |_| Ok("iptables -I FLANNEL-FWD -j DROP".to_owned())),
];

/// Does one damage after the other and measures how long the rules are other than before.
pub(crate) fn measure(stage: &Stage) -> anyhow::Result<()> {
    for ((name, flag), damages) in MODES.into_iter().zip([NFT, IPTABLES]) {
        let setup = Setup::new(stage, stage.flanneld(), flag)?;
        let mut nft = setup.nft()?;
        let healthy = look(&mut nft)?;
        for (damage, command) in damages {
            let row = (damage, "ms", Limit::Each(LIMIT_MS));
            stage.measure(&format!("rules-heal: {name}"), [row], u32::MAX, |_| {
                stage.progress.pause(REST)?;
                wait_for("rules as before", TIMEOUT, || look(&mut nft).is_ok_and(|found| found == healthy))?;
                let command = command(&mut nft)?;
                let healed = heal(&stage.progress, &setup, &mut nft, &healthy, &command);
                let log = || format!("{command}; the log:\n{}", setup.member.agent.log());
                Ok([ms(healed.with_context(log)?)])
            })?;
        }
    }
    Ok(())
}

/// Runs the command and looks at the rules all the time. The result is never too short: it counts from the
/// beginning of the last look before the damage to the end of the first one that finds all as before. Where
/// the damage came and went between two looks, it counts from the start of the command.
fn heal(
    progress: &Progress,
    setup: &Setup,
    nft: &mut Nft,
    healthy: &Ruleset,
    command: &str,
) -> anyhow::Result<Duration> {
    let start = Instant::now();
    thread::scope(|scope| {
        let command = scope.spawn(|| setup.member.show(command));
        let (mut well, mut seen) = (start, false);
        loop {
            progress.check()?;
            let (done, began) = (command.is_finished(), Instant::now());
            match look(nft) {
                Ok(found) if found == *healthy && (seen || done) => break,
                Ok(found) if found == *healthy => well = began,
                Ok(_) => seen = true,
                // Somebody changes the rules all the time, so they are not known to be well.
                Err(NftError::Unsteady) => {}
                Err(error) => return Err(error.into()),
            }
            ensure!(start.elapsed() < TIMEOUT, "not repaired: {:#?}", look(nft));
            thread::sleep(INTERVAL);
        }
        let time = if seen { well.elapsed() } else { start.elapsed() };
        command.join().map_err(|_| anyhow!("the thread that does the damage panicked"))??;
        Ok(time)
    })
}

/// Deletes one rule after the other, round after round.
fn one_rule(nft: &mut Nft) -> anyhow::Result<String> {
    static TURN: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
    let (table, chain) = OWN;
    let found = nft.dump()?;
    let tables = found.tables.iter().filter(|one| one.id.name == table);
    let rules = tables.filter_map(|one| one.chain(chain)).flat_map(|chain| &chain.rules);
    let handles: Vec<u64> = rules.filter_map(|rule| rule.handle).collect();
    ensure!(!handles.is_empty(), "table {table} has no rules in chain {chain}");
    let turn = TURN.fetch_add(1, std::sync::atomic::Ordering::Relaxed) % handles.len();
    Ok(format!("nft delete rule ip {table} {chain} handle {}", handles[turn]))
}
