//! IPv6 is added to a running cluster of IPv4.

use std::time::Instant;

use subnet::Family;

use super::AFTER;
use super::bed::Cluster;
use super::pings::Mesh;
use crate::Stage;
use crate::bed::config;
use bench::figure::{Figure, Limit, Record};

/// Adds the family while pods ping each other with the other one.
pub(crate) fn measure(stage: &Stage, record: &mut Record) -> anyhow::Result<()> {
    for (backend, rounds) in [("vxlan", u32::MAX), ("host-gw", 1)] {
        let title = format!("ipv6: added to {backend}");
        let mut lost = Figure::new(format!("{title}: IPv4 pings lost"), "", Limit::Each(0.0));
        let mut file = Figure::new(format!("{title}: edit to IPv6 in every subnet.env"), "ms", Limit::None);
        let mut reached =
            Figure::new(format!("{title}: edit to new IPv6 pods reaching each other"), "ms", Limit::None);
        for round in stage.rounds(rounds) {
            stage.progress.step(&format!("{title}: round {round}"))?;
            let cluster = Cluster::new(stage, &config(backend, &[Family::V4]), 3)?;
            let pods = cluster.pods(&[Family::V4])?;
            let mesh = Mesh::start(&pods, Family::V4)?.undisturbed()?;
            let edited = Instant::now();
            cluster.configure(&config(backend, &Family::BOTH))?;
            cluster.wait("an IPv6 subnet in subnet.env", |member| {
                Ok(member.subnets()?.get(Family::V6).is_some())
            })?;
            file.push_ms(edited.elapsed());
            let new = cluster.pods(&[Family::V6])?;
            let new_mesh = Mesh::start(&new, Family::V6)?;
            reached.push_ms(edited.elapsed());
            stage.progress.pause(AFTER)?;
            drop(new_mesh);
            let tally = mesh.finish()?;
            if tally.lost() > 0 {
                stage.progress.say(&cluster.logs())?;
            }
            lost.rounds.push(tally.lost() as f64);
        }
        stage.put(record, &[lost, file, reached])?;
    }
    Ok(())
}
