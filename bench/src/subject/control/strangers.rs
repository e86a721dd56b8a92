//! What somebody else writes under the prefix of the leases, and whether pods notice.

use std::net::Ipv4Addr;
use std::time::Duration;

use crate::Stage;
use crate::bed::{Cluster, lease};
use bench::figure::{Figure, Limit, Record};
use bench::monitor::Monitor;

/// Writes bad keys and values under a ping between pods.
pub(crate) fn measure(stage: &Stage, record: &mut Record) -> anyhow::Result<()> {
    let mut lost = Figure::new("bad-keys: pings lost", "", Limit::Each(0.0));
    let mut changed = Figure::new("bad-keys: changes to the kernel", "", Limit::Each(0.0));
    for round in stage.rounds(u32::MAX) {
        let cluster = Cluster::small(stage, "vxlan")?;
        let pair = cluster.pair()?;
        let pinger = pair.pinger()?;
        let monitor = Monitor::start(&pair.a.node)?;
        let foreign = |last: u8| lease(Ipv4Addr::new(172, 31, 0, last), last.into());
        for (key, value) in [
            ("hello", foreign(90)),
            ("10.244.77.0-24", "nonsense".to_owned()),
            ("192.168.0.0-16", foreign(91)),
            ("0.0.0.0-0", foreign(92)),
            ("10.244.0.0-16", foreign(93)),
        ] {
            stage.progress.check()?;
            cluster.write(&[(key.to_owned(), value)])?;
            // Each message of the agent about it names it.
            pair.a.wait(&format!("{key} in the log"), || pair.a.agent.log().contains(key))?;
        }
        stage.progress.pause(Duration::from_secs(1))?;
        let changes = monitor.finish(&pair.a.node)?;
        let pings = pinger.finish()?;
        stage
            .progress
            .step(&format!("bad-keys: round {round}: {} pings lost, changes {changes:?}", pings.lost))?;
        lost.rounds.push(pings.lost as f64);
        changed.rounds.push(changes.len() as f64);
    }
    record.put(&lost)?;
    record.put(&changed)
}
