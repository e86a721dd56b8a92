//! The underlay's MTU is lowered and raised again under requests that need the whole of it.

use std::fs::File;
use std::io::Write;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use backends::testing::{PingOptions, Pod, Process};
use bench::bed::{Member, TIMEOUT, config};
use bench::figure::{Figure, Limit, ms};
use serde_json::Value;
use subnet::Family;

use super::AFTER;
use super::bed::Cluster;
use super::pings::Mesh;
use crate::Stage;

/// 1,400 bytes with the headers of ICMP and IPv4: more than pods may send while the underlay carries 1,400.
/// They are sent as applications do: with DF, until the sender has learnt the MTU of the path.
const REQUEST: PingOptions =
    PingOptions { size: 1372, dont_fragment: false, interval: Duration::from_millis(10) };
/// What VXLAN needs of each packet.
const OVERHEAD: u32 = 50;
/// How long new pods may still get the old MTU.
const LIMIT_MS: f64 = 1000.0;
/// Until every `ip` waits for orders.
const HANDS_UP: Duration = Duration::from_millis(200);
/// Between two looks.
const INTERVAL: Duration = Duration::from_millis(2);

/// Lowers and raises it.
pub(crate) fn measure(stage: &Stage) -> anyhow::Result<()> {
    stage.progress.step("mtu: three nodes with vxlan")?;
    let cluster = Cluster::new(stage, &config("vxlan", &[Family::V4]), 3)?;
    let pods = cluster.pods(&[Family::V4])?;
    let mut figures = [("lowered", 1400, 1.0), ("raised", 1500, 0.0)].map(|(verb, mtu, most)| {
        let rows = [
            ("pings lost from one pod to one other", "", Limit::Each(most)),
            ("pings lost in six directions", "", Limit::None),
            ("of them dropped by eth0 of a node", "", Limit::None),
            ("until every subnet.env has it", "ms", Limit::Each(LIMIT_MS)),
            ("until every flannel.1 has it", "ms", Limit::Each(LIMIT_MS)),
        ];
        (
            mtu,
            rows.map(|(what, unit, limit)| Figure::new(format!("mtu: {verb} to {mtu}: {what}"), unit, limit)),
        )
    });
    for round in stage.rounds(u32::MAX) {
        // What pods have learnt of their paths would last for ten minutes.
        forget_paths(&pods)?;
        for (mtu, figures) in &mut figures {
            let mesh = Mesh::start_with(&pods, Family::V4, REQUEST)?.undisturbed()?;
            let before = dropped(&cluster)?;
            let (file, device) = change(stage, &cluster, *mtu)?;
            mesh.again();
            stage.progress.pause(AFTER)?;
            let tally = mesh.finish()?;
            let dropped = dropped(&cluster)? - before;
            let lost = [tally.most_lost(), tally.lost(), dropped].map(|count| count as f64);
            stage.progress.step(&format!("mtu: round {round}: {mtu}: {lost:?}, {file:.0?}, {device:.0?}"))?;
            let values = lost.into_iter().chain([ms(file), ms(device)]);
            figures.iter_mut().zip(values).for_each(|(figure, value)| figure.rounds.push(value));
        }
    }
    stage.put(figures.iter().flat_map(|(_, figures)| figures))
}

fn forget_paths(pods: &[Pod]) -> anyhow::Result<()> {
    pods.iter().try_for_each(|pod| pod.command("ip").args(["route", "flush", "cache"]).ok().map(drop))
}

/// Frames that arrived at a node and were dropped there as too long; the kernel counts them.
fn dropped(cluster: &Cluster) -> anyhow::Result<u64> {
    let of_one = |member: &Member| -> anyhow::Result<u64> {
        let shown: Value = serde_json::from_str(&member.show("ip -j -s link show eth0")?)?;
        shown[0]["stats64"]["rx"]["dropped"].as_u64().context("ip counts no dropped frames")
    };
    cluster.members.iter().map(of_one).sum()
}

/// Changes it on all nodes and gives the time until all files and all devices follow.
fn change(stage: &Stage, cluster: &Cluster, mtu: u32) -> anyhow::Result<(Duration, Duration)> {
    let progress = &stage.progress;
    let mut hands = cluster.members.iter().map(Hand::new).collect::<anyhow::Result<Vec<_>>>()?;
    stage.progress.pause(HANDS_UP)?;
    let start = Instant::now();
    hands.iter_mut().try_for_each(|hand| hand.set_mtu(mtu))?;
    let of_one = |member: &Member| -> anyhow::Result<(Duration, Duration)> {
        let (mut file, mut device) = (None, None);
        while file.is_none() || device.is_none() {
            progress.check()?;
            if file.is_none() && member.agent.subnet_env()?.mtu == Some(mtu - OVERHEAD) {
                file = Some(start.elapsed());
            }
            let wanted = format!(" mtu {} ", mtu - OVERHEAD);
            if device.is_none() && member.show("ip -o link show flannel.1")?.contains(&wanted) {
                device = Some(start.elapsed());
            }
            ensure!(start.elapsed() < TIMEOUT, "the MTU is not followed\n{}", cluster.logs());
            thread::sleep(INTERVAL);
        }
        file.zip(device).context("the loop ends with both")
    };
    thread::scope(|scope| {
        let threads: Vec<_> =
            cluster.members.iter().map(|member| scope.spawn(move || of_one(member))).collect();
        let mut slowest = (Duration::ZERO, Duration::ZERO);
        for thread in threads {
            let (file, device) = thread.join().map_err(|_| anyhow!("the watch of the MTU panicked"))??;
            slowest = (slowest.0.max(file), slowest.1.max(device));
        }
        Ok(slowest)
    })
}

/// An `ip` on a node that waits for its orders. All nodes have to change within a fraction of a millisecond:
/// a veth drops what is longer than its own MTU, and what others send meanwhile would be lost, with any
/// agent.
struct Hand {
    orders: File,
    _ip: Process,
}

impl Hand {
    fn new(member: &Member) -> anyhow::Result<Self> {
        let path = member.node.dir().join("orders");
        if !path.exists() {
            let made = Command::new("mkfifo").arg(&path).status().context("mkfifo is in coreutils")?;
            ensure!(made.success(), "no pipe {}", path.display());
        }
        // To open it for reading, too, means not to wait for the reader.
        let orders = File::options().read(true).write(true).open(&path)?;
        // Before everything else that wants a CPU.
        let ip =
            member.node.namespace().command("chrt").args(["-f", "50", "ip", "-batch"]).arg(&path).spawn()?;
        Ok(Self { orders, _ip: ip })
    }

    fn set_mtu(&mut self, mtu: u32) -> anyhow::Result<()> {
        writeln!(self.orders, "link set eth0 mtu {mtu}").context("can't give an order to ip")
    }
}
