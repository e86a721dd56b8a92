//! A node gets another address while pods ping each other.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use subnet::Family;

use super::AFTER;
use super::bed::Cluster;
use super::pings::Mesh;
use super::shown::naming_anywhere;
use crate::Stage;
use crate::bed::config;
use bench::figure::{Figure, Limit, Record};

/// How long the pods of that node may be out of reach.
const LIMIT_MS: f64 = 1000.0;
/// How long anything may name the old address: the filter of the tunnel's port takes what is still under way for 5 s.
const SWEPT: Duration = Duration::from_secs(10);

/// Changes the address of the first node, with each backend that it matters to.
pub(crate) fn measure(stage: &Stage, record: &mut Record) -> anyhow::Result<()> {
    for backend in ["vxlan", "host-gw"] {
        stage.progress.step(&format!("address: three nodes with {backend}"))?;
        let cluster = Cluster::new(stage, &config(backend, &[Family::V4]), 3)?;
        let pods = cluster.pods(&[Family::V4])?;
        let figure =
            |what: &str, unit, limit| Figure::new(format!("address: {backend}: {what}"), unit, limit);
        let mut silence = figure("longest silence from and to the node's pods", "ms", Limit::Each(LIMIT_MS));
        let mut lost = figure("pings lost from and to the node's pods", "", Limit::None);
        let mut others = figure("pings lost between the others", "", Limit::Each(0.0));
        let mut stale = figure("lines with the old address", "", Limit::Each(0.0));
        let mut swept = figure("change to no line with the old address", "ms", Limit::None);
        for round in stage.rounds(100) {
            let node = &cluster.members[0].node;
            let mesh = Mesh::start(&pods, Family::V4)?.undisturbed()?;
            let old = node.address().to_string();
            let [high, mid, low, _] = node.address().octets();
            let last = u8::try_from(round)?.saturating_add(100);
            let start = Instant::now();
            node.readdress(Ipv4Addr::new(high, mid, low, last), node.address_v6())?;
            let mut lines = naming_anywhere(&cluster, &old)?;
            while !lines.is_empty() && start.elapsed() < SWEPT {
                stage.progress.check()?;
                lines = naming_anywhere(&cluster, &old)?;
            }
            swept.push_ms(start.elapsed());
            mesh.again();
            stage.progress.pause(AFTER)?;
            let (with, without) = mesh.finish()?.split(0);
            stage.progress.step(&format!(
                "address: {backend}: round {round}: silence {:.0?}, {} lost, {} between the others, stale: {lines:#?}",
                with.silence(),
                with.lost(),
                without.lost()
            ))?;
            if with.silence().as_secs_f64() * 1e3 > LIMIT_MS || without.lost() > 0 || !lines.is_empty() {
                stage.progress.say(&cluster.logs())?;
            }
            silence.push_ms(with.silence());
            lost.rounds.push(with.lost() as f64);
            others.rounds.push(without.lost() as f64);
            stale.rounds.push(lines.len() as f64);
        }
        stage.put(record, &[silence, lost, others, stale, swept])?;
    }
    Ok(())
}
