//! Of a node with both families, what peers need for one of them changes alone; and IPv6 is added to running nodes.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Instant;

use anyhow::{Context, ensure};
use bench::bed::{Member, TIMEOUT, config};
use bench::figure::{Limit, Row, ms};
use subnet::Family;

use super::AFTER;
use super::bed::Cluster;
use super::pings::Mesh;
use super::shown::naming;
use crate::Stage;

/// What changes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Change {
    Address(Family),
    /// Of the tunnel device, while the agent is away.
    Mac,
}

impl Change {
    fn family(self) -> Family {
        match self {
            Self::Address(family) => family,
            Self::Mac => Family::V6,
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::Address(Family::V6) => "the IPv6 address",
            Self::Address(Family::V4) => "the IPv4 address",
            Self::Mac => "the MAC of flannel-v6.1",
        }
    }
}

/// Changes one thing after the other while pods ping each other with both families.
pub(crate) fn measure(stage: &Stage) -> anyhow::Result<()> {
    stage.progress.step("family: two nodes with vxlan and both families")?;
    let mut cluster = Cluster::new(stage, &config("vxlan", &Family::BOTH), 2)?;
    let pods = cluster.pods(&Family::BOTH)?;
    for change in [Change::Address(Family::V6), Change::Address(Family::V4), Change::Mac] {
        let (own, other, other_family) = match change.family() {
            Family::V4 => ("IPv4", "IPv6", Family::V6),
            Family::V6 => ("IPv6", "IPv4", Family::V4),
        };
        let from = if change == Change::Mac { "start of the agent" } else { "change" };
        let rows: [Row<'_>; 3] = [
            (&format!("{from} to the peer's entries"), "ms", Limit::None),
            (&format!("{other} pings lost"), "", Limit::Each(0.0)),
            (&format!("longest silence of {own}"), "ms", Limit::None),
        ];
        stage.measure(&format!("family: {}", change.words()), rows, 100, |round| {
            let mesh = Mesh::start(&pods, change.family())?.undisturbed()?;
            let other_mesh = Mesh::start(&pods, other_family)?.undisturbed()?;
            let [changed, peer] = cluster.members.as_mut_slice() else { unreachable!("there are two nodes") };
            let (old, new, start) = carry_out(change, changed, peer, u8::try_from(round)?)?;
            stage.progress.wait_for("the peer's entries", TIMEOUT, || {
                let there = peer.show(&format!("bridge fdb show dev {}", device(change.family())))?;
                Ok(there.contains(&new) && naming(peer, &old)?.is_empty())
            })?;
            let follows = start.elapsed();
            mesh.again();
            stage.progress.pause(AFTER)?;
            let (tally, other_tally) = (mesh.finish()?, other_mesh.finish()?);
            Ok([ms(follows), cluster.lost(stage, &other_tally)?, ms(tally.silence())])
        })?;
    }
    Ok(())
}

/// Adds IPv6 to running nodes with IPv4 while pods ping each other.
pub(crate) fn add(stage: &Stage) -> anyhow::Result<()> {
    let rows = [
        ("IPv4 pings lost", "", Limit::Each(0.0)),
        ("edit to IPv6 in every subnet.env", "ms", Limit::None),
        ("edit to new IPv6 pods reaching each other", "ms", Limit::None),
    ];
    for (backend, rounds) in [("vxlan", u32::MAX), ("host-gw", 1)] {
        stage.measure(&format!("ipv6: added to {backend}"), rows, rounds, |_| {
            let cluster = Cluster::new(stage, &config(backend, &[Family::V4]), 3)?;
            let pods = cluster.pods(&[Family::V4])?;
            let mesh = Mesh::start(&pods, Family::V4)?.undisturbed()?;
            let edited = Instant::now();
            cluster.configure(&config(backend, &Family::BOTH))?;
            cluster.wait("an IPv6 subnet in subnet.env", |member| {
                Ok(member.subnets()?.get(Family::V6).is_some())
            })?;
            let file = edited.elapsed();
            let new = cluster.pods(&[Family::V6])?;
            let new_mesh = Mesh::start(&new, Family::V6)?;
            let reached = edited.elapsed();
            stage.progress.pause(AFTER)?;
            drop(new_mesh);
            Ok([cluster.lost(stage, &mesh.finish()?)?, ms(file), ms(reached)])
        })?;
    }
    Ok(())
}

fn device(family: Family) -> &'static str {
    match family {
        Family::V4 => "flannel.1",
        Family::V6 => "flannel-v6.1",
    }
}

/// Gives the old and the new value, and when peers could begin to follow.
fn carry_out(
    change: Change,
    changed: &mut Member,
    peer: &Member,
    round: u8,
) -> anyhow::Result<(String, String, Instant)> {
    let node = &changed.node;
    let (v4, v6) = (node.address(), node.address_v6());
    let start = Instant::now();
    Ok(match change {
        Change::Address(Family::V6) => {
            let mut segments = v6.segments();
            segments[7] = 0x100 + u16::from(round);
            let new = Ipv6Addr::from(segments);
            node.readdress(v4, new)?;
            (v6.to_string(), new.to_string(), start)
        }
        Change::Address(Family::V4) => {
            let [high, mid, low, _] = v4.octets();
            let new = Ipv4Addr::new(high, mid, low, round.saturating_add(100));
            node.readdress(new, v6)?;
            (v4.to_string(), new.to_string(), start)
        }
        Change::Mac => {
            let device = device(Family::V6);
            let fdb = peer.show(&format!("bridge fdb show dev {device}"))?;
            let line = fdb.lines().find(|line| line.contains(&format!("dst {v6} ")));
            let old = line.and_then(|line| line.split(' ').next()).context("the peer has no FDB entry")?;
            let new = format!("02:00:00:00:77:{round:02x}");
            ensure!(old != new, "the MAC is not another one");
            changed.agent.terminate(TIMEOUT)?;
            node.namespace().ip(&format!("link set {device} address {new}"))?;
            let start = Instant::now();
            changed.start_again()?;
            (old.to_owned(), new, start)
        }
    })
}
