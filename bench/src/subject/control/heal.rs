//! What others break on a node, and how long it stays broken.

use std::time::{Duration, Instant};

use anyhow::Context;
use backends::testing::wait_for;
use bench::bed::{Member, Pair, TIMEOUT};
use bench::figure::{Limit, ms};

use crate::Stage;

/// Requests of the ping are this far apart when nothing is wrong.
pub(crate) const INTERVAL: Duration = Duration::from_millis(10);
/// How long the link to the other nodes is down.
const DOWN: Duration = Duration::from_secs(1);
const LIMIT_MS: f64 = 500.0;

/// What is measured of each damage.
const ROWS: [&str; 2] = ["silence", "kernel right"];

/// What the ping and the looks at the kernel show when all is well.
const BASELINE: &str = "nothing broken";

/// A thing that is broken, and the command that breaks it.
type Damage = (&'static str, String);

/// Breaks one thing after the other and measures the silence of a ping between pods, and the time until the
/// kernel is as it was.
pub(crate) fn measure(stage: &Stage) -> anyhow::Result<()> {
    stage.progress.step("heal: two nodes with vxlan")?;
    let cluster = stage.cluster("vxlan")?;
    let pair = cluster.pair()?;
    let damages = tunnel_damages(&pair)?;
    by_commands(stage, &pair, &damages)?;
    drop((pair, cluster));

    stage.progress.step("heal: two nodes with host-gw")?;
    let cluster = stage.cluster("host-gw")?;
    let pair = cluster.pair()?;
    let route = format!("ip route del {}", pair.b.subnet()?);
    by_commands(stage, &pair, &[("host-gw route deleted", route)])?;
    underlay(stage, &pair)
}

fn tunnel_damages(pair: &Pair) -> anyhow::Result<Vec<Damage>> {
    let (peer, public) = (pair.b.subnet()?, pair.b.node.address());
    let gateway = peer.network();
    let fdb = pair.a.show("bridge fdb show dev flannel.1")?;
    let mac = fdb.split(' ').next().context("the peer has no FDB entry")?;
    Ok(vec![
        (BASELINE, "true".to_owned()),
        ("route deleted", format!("ip route del {peer}")),
        ("route replaced by a wrong one", format!("ip route replace {peer} via 172.31.0.254")),
        ("FDB entry deleted", format!("bridge fdb del {mac} dev flannel.1 dst {public} self")),
        ("FDB entry elsewhere", format!("bridge fdb replace {mac} dev flannel.1 dst 172.31.0.99 self")),
        ("neighbour deleted", format!("ip neigh del {gateway} dev flannel.1")),
        ("VTEP address flushed", "ip address flush dev flannel.1".to_owned()),
        ("VTEP down", "ip link set flannel.1 down".to_owned()),
        ("VTEP MAC changed", "ip link set flannel.1 address 02:00:00:00:00:77".to_owned()),
        ("VTEP deleted", "ip link del flannel.1".to_owned()),
        ("VTEP MTU changed", "ip link set flannel.1 mtu 1280".to_owned()),
        ("all neighbours flushed", "ip neigh flush dev flannel.1 nud permanent".to_owned()),
        ("all routes flushed", "ip route flush dev flannel.1".to_owned()),
    ])
}

fn by_commands(stage: &Stage, pair: &Pair, damages: &[Damage]) -> anyhow::Result<()> {
    let healthy = state(&pair.a)?;
    for (name, command) in damages {
        let limit = if *name == BASELINE { Limit::None } else { Limit::Each(LIMIT_MS) };
        let rows = ROWS.map(|what| (what, "ms", limit));
        stage.measure(&format!("heal: {name}"), rows, u32::MAX, |_| {
            let pinger = pair.pinger()?;
            let start = Instant::now();
            pair.a.show(command)?;
            let repair = time_to(&pair.a, &healthy, start).with_context(|| command.clone())?;
            pinger.wait_for_reply(TIMEOUT).with_context(|| command.clone())?;
            // Half a second more: what the repair itself breaks counts, too.
            stage.progress.pause(Duration::from_millis(500))?;
            Ok([ms(pinger.finish()?.longest_gap.saturating_sub(INTERVAL)), ms(repair)])
        })?;
    }
    Ok(())
}

/// The link to the other nodes goes down for a while; time counts from the moment it is set up again.
fn underlay(stage: &Stage, pair: &Pair) -> anyhow::Result<()> {
    let healthy = state(&pair.a)?;
    let rows = ROWS.map(|what| (what, "ms", Limit::Each(LIMIT_MS)));
    stage.measure("heal: host-gw underlay was down 1 s", rows, u32::MAX, |_| {
        let pinger = pair.pinger()?;
        pair.a.node.link_down()?;
        stage.progress.pause(DOWN)?;
        let start = Instant::now();
        let (answer, repaired) = std::thread::scope(|scope| {
            let answer = scope.spawn(|| pinger.wait_for_reply(TIMEOUT).map(|()| start.elapsed()));
            let repaired = pair.a.node.link_up().and_then(|()| time_to(&pair.a, &healthy, start));
            (answer.join(), repaired)
        });
        let answer = answer.map_err(|_| anyhow::anyhow!("the watch of the ping panicked"))??;
        pinger.finish()?;
        Ok([ms(answer), ms(repaired?)])
    })
}

/// The time from `start` to the end of the first look that finds the node `healthy`.
fn time_to(member: &Member, healthy: &[String], start: Instant) -> anyhow::Result<Duration> {
    wait_for("the kernel to be as it was", TIMEOUT, || state(member).is_ok_and(|state| state == healthy))
        .with_context(|| format!("is {:#?}, was {healthy:#?}", state(member)))?;
    Ok(start.elapsed())
}

/// Every route, neighbour and FDB entry, and the tunnel device with its settings, in one order. The index
/// of the device is left out: a recreated one has another.
fn state(member: &Member) -> anyhow::Result<Vec<String>> {
    let lines = "route show\nneigh show dev flannel.1\naddress show dev flannel.1\n";
    let ip = member
        .node
        .namespace()
        .command("ip")
        .args(["-4", "-d", "-force", "-batch", "-"])
        .input(lines)
        .output()?;
    let text = String::from_utf8(ip.stdout).context("ip prints no UTF-8")?
        + &member.show("bridge fdb show dev flannel.1").unwrap_or_default();
    let without_index = |line: &str| match line.split_once(": flannel.1: ") {
        Some((_, rest)) => rest.to_owned(),
        None => line.trim().to_owned(),
    };
    let mut state: Vec<String> = text.lines().map(without_index).collect();
    state.sort();
    Ok(state)
}
