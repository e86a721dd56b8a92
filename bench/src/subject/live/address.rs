//! A node gets another address while pods ping each other.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use bench::bed::config;
use bench::figure::{Limit, ms};
use subnet::Family;

use super::AFTER;
use super::bed::Cluster;
use super::pings::Mesh;
use super::shown::naming_anywhere;
use crate::Stage;

/// How long the pods of that node may be out of reach.
const LIMIT_MS: f64 = 1000.0;
/// How long anything may name the old address: the filter of the tunnel's port takes what is still under way for 5 s.
const SWEPT: Duration = Duration::from_secs(10);

/// Changes the address of the first node, with each backend that it matters to.
pub(crate) fn measure(stage: &Stage) -> anyhow::Result<()> {
    for backend in ["vxlan", "host-gw"] {
        stage.progress.step(&format!("address: three nodes with {backend}"))?;
        let cluster = Cluster::new(stage, &config(backend, &[Family::V4]), 3)?;
        let pods = cluster.pods(&[Family::V4])?;
        let rows = [
            ("longest silence from and to the node's pods", "ms", Limit::Each(LIMIT_MS)),
            ("pings lost from and to the node's pods", "", Limit::None),
            ("pings lost between the others", "", Limit::Each(0.0)),
            ("lines with the old address", "", Limit::Each(0.0)),
            ("change to no line with the old address", "ms", Limit::None),
        ];
        stage.measure(&format!("address: {backend}"), rows, 100, |round| {
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
            let swept = start.elapsed();
            mesh.again();
            stage.progress.pause(AFTER)?;
            let (with, without) = mesh.finish()?.split(0);
            let (silence, others) = (ms(with.silence()), cluster.lost(stage, &without)?);
            if silence > LIMIT_MS || !lines.is_empty() {
                stage.progress.say(&format!("stale: {lines:#?}\n{}", cluster.logs()))?;
            }
            Ok([silence, with.lost() as f64, others, lines.len() as f64, ms(swept)])
        })?;
    }
    Ok(())
}
