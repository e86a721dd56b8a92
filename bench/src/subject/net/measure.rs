//! Takes one measurement of one pair, and proves that the traffic went where it should.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};

use bench::iperf::{self, Load, Stream};
use bench::ping::{
    self,
    PingPace::{Asleep, Awake},
};
use bench::process::cpu_time;

use super::bed::Pair;
use super::cost::Meter;
use super::flow::{Flow, Initiations, Origin, Pace};
use super::plan::{Place, Step, Subject};
use super::results::{Quantity, Value};
use super::soak;
use super::wire::Segmented;

/// Bytes of a small datagram.
const SMALL: usize = 64;

/// A light load: 5,000 datagrams a second, 40 Mbit/s.
const LIGHT: Pace = Pace { size: 1000, bursts: Some((5, Duration::from_millis(1))) };

/// As many small datagrams as the kernel takes.
const FLOOD: Pace = Pace { size: SMALL, bursts: None };

/// How long a load runs before round trips are measured beside it.
const WARM: Duration = Duration::from_millis(300);

/// Measures; `time` is how long iperf3 sends.
pub(crate) fn take(pair: &Pair, step: Step, time: Duration) -> anyhow::Result<Vec<Value>> {
    let place = step.place;
    let trips = time * 3 / 5;
    match step.subject {
        Subject::Tcp1 => tcp(pair, place, time, &["-P1"]),
        Subject::Tcp4 => tcp(pair, place, time, &["-P4"]),
        Subject::Duplex => duplex(pair, place, time),
        Subject::Wire => wire(pair, place, time),
        Subject::Udp64 => udp(pair, place, time),
        Subject::Idle => echo(pair, place, Asleep, trips),
        Subject::Awake => echo(pair, place, Awake, trips),
        Subject::Light => {
            let flow = Flow::start(pair.ends(place), LIGHT)?;
            thread::sleep(WARM);
            let values = echo(pair, place, Asleep, trips)?;
            let moved = flow.finish()?;
            ensure!(moved.received > 0.5 * moved.offered, "of the light load arrived {moved:?}");
            Ok(values)
        }
        Subject::Loaded => {
            let mut load = Load::start(pair.ends(place), WARM + trips * 10)?;
            thread::sleep(WARM);
            let values = echo(pair, place, Asleep, trips)?;
            load.still_runs()?;
            Ok(values)
        }
        Subject::Fair => fair(pair, time),
        Subject::Initiations => initiations(pair, place, time, Origin::Stranger),
        Subject::PeerInitiations => initiations(pair, place, time, Origin::Peer),
        Subject::Soak => soak(pair, place),
    }
}

/// Round trips by one ping.
fn echo(pair: &Pair, place: Place, pace: ping::PingPace, time: Duration) -> anyhow::Result<Vec<Value>> {
    let [from, to] = pair.ends(place);
    let trips = ping::run(from.namespace, to.address, pace, time)?;
    let mean = trips.mean.context("no echo request was answered")?;
    Ok(vec![Quantity::Trip.of(mean), Quantity::Lost.of(trips.lost)])
}

/// TCP from the near end to the far end.
fn tcp(pair: &Pair, place: Place, time: Duration, args: &[&str]) -> anyhow::Result<Vec<Value>> {
    let before = pair.carried()?;
    let meter = Meter::start(&pair.agents)?;
    let stream = iperf::run(pair.ends(place), time, args)?.forward()?;
    let cost = meter.stop()?;
    check_tunnel(pair, before, stream.bytes, with_retransmits(stream))?;
    let gigabytes = stream.bytes as f64 / 1e9;
    Ok(vec![
        Quantity::Rate.of(stream.rate),
        Quantity::Again.of(stream.again as f64),
        Quantity::TaskCost.of(cost.tasks / gigabytes),
        Quantity::MachineCost.of(cost.machine / gigabytes),
    ])
}

/// TCP without and then with a flood of handshake initiations, and what that alone takes of the flooded agent's CPU.
fn initiations(pair: &Pair, place: Place, time: Duration, origin: Origin) -> anyhow::Result<Vec<Value>> {
    let flooded = *pair.agents.last().context("no agent")?;
    let rate = || anyhow::Ok(iperf::run(pair.ends(place), time / 2, &["-P1"])?.forward()?.rate);
    let alone = rate()?;
    let flood = Initiations::start(pair, origin)?;
    thread::sleep(WARM);
    let beside = rate();
    let (before, start) = (cpu_time(flooded)?, Instant::now());
    thread::sleep(time / 4);
    let busy = (cpu_time(flooded)? - before).as_secs_f64() / start.elapsed().as_secs_f64();
    let sent = flood.finish()?;
    let beside = beside.with_context(|| format!("the flood takes {:.0} % of a CPU", busy * 100.0))?;
    Ok(vec![
        Quantity::Rate.of(beside),
        Quantity::Kept.of(beside / alone),
        Quantity::Offered.of(sent / 1e3),
        Quantity::Busy.of(busy * 100.0),
    ])
}

fn duplex(pair: &Pair, place: Place, time: Duration) -> anyhow::Result<Vec<Value>> {
    let before = pair.carried()?;
    let report = iperf::run(pair.ends(place), time, &["--bidir"])?;
    let (forward, backward) = (report.forward()?, report.backward()?);
    // Acknowledgements of the other direction go the same way.
    check_tunnel(pair, before, forward.bytes, 1.5)?;
    Ok(vec![
        Quantity::Rate.of(forward.rate + backward.rate),
        Quantity::Slower.of(forward.rate.min(backward.rate)),
        Quantity::Again.of((forward.again + backward.again) as f64),
    ])
}

fn wire(pair: &Pair, place: Place, time: Duration) -> anyhow::Result<Vec<Value>> {
    let wire = Segmented::start(pair)?;
    let values = tcp(pair, place, time, &["-P1"])?;
    wire.check()?;
    Ok(values)
}

fn udp(pair: &Pair, place: Place, time: Duration) -> anyhow::Result<Vec<Value>> {
    let before = pair.carried()?;
    let size = SMALL.to_string();
    let report = iperf::run(pair.ends(place), time, &["-u", "-b0", "-l", &size])?;
    let moved = report.datagrams(SMALL as u64)?;
    // Headers may be counted once for many datagrams.
    check_tunnel(pair, before, moved.bytes, f64::INFINITY)?;
    Ok(vec![
        Quantity::Offered.of(moved.offered / 1e3),
        Quantity::Received.of(moved.received / 1e3),
        Quantity::Disordered.of(moved.disordered as f64),
    ])
}

/// A ping of a pod while another one floods.
fn fair(pair: &Pair, time: Duration) -> anyhow::Result<Vec<Value>> {
    let before = pair.carried()?;
    let [from, to] = pair.neighbours();
    // Else the first of them would ask for addresses under the flood.
    ensure!(from.namespace.reaches(to.address)?, "the other pod doesn't get through");
    let flow = Flow::start(pair.ends(Place::Pod), FLOOD)?;
    thread::sleep(WARM);
    let ping = || ping::run(from.namespace, to.address, Asleep, time);
    // Two together ask about a hundred times a second.
    let pings = thread::scope(|scope| [scope.spawn(ping), scope.spawn(ping)].map(|ping| ping.join()));
    let [one, other] =
        pings.map(|ping| ping.map_err(|_| anyhow!("a ping's thread panicked")).and_then(|trips| trips));
    let (one, other) = (one?, other?);
    let moved = flow.finish()?;
    ensure!(moved.count > 0, "nothing of the flood arrived");
    check_tunnel(pair, before, moved.count * SMALL as u64, f64::INFINITY)?;
    let mut values = vec![
        Quantity::Lost.of((one.lost + other.lost) / 2.0),
        Quantity::Offered.of(moved.offered / 1e3),
        Quantity::Received.of(moved.received / 1e3),
    ];
    // Where everything was lost there is no mean.
    values.extend(one.mean.zip(other.mean).map(|(one, other)| Quantity::Trip.of((one + other) / 2.0)));
    Ok(values)
}

/// Much of everything; what it moved went the right way.
fn soak(pair: &Pair, place: Place) -> anyhow::Result<Vec<Value>> {
    let before = pair.carried()?;
    let values = soak::take(pair, place)?;
    check_tunnel(pair, before, soak::BYTES, f64::INFINITY)?;
    Ok(values)
}

/// How many bytes a device may carry for each one that arrives: headers, and what TCP had to send again.
fn with_retransmits(stream: Stream) -> f64 {
    const SEGMENT: f64 = 1500.0;
    1.15 + stream.again as f64 * SEGMENT / stream.bytes as f64
}

/// An error unless what arrived went through the device of the way, at both ends, and little else did.
fn check_tunnel(pair: &Pair, before: [u64; 2], bytes: u64, most: f64) -> anyhow::Result<()> {
    let device = pair.way.device(pair.family());
    for ((now, before), end) in pair.carried()?.into_iter().zip(before).zip(["sent", "received"]) {
        let share = now.saturating_sub(before) as f64 / bytes as f64;
        ensure!(
            (0.98..most).contains(&share),
            "{device} {end} {share:.3} times as many bytes as arrived: this is not the way that was to be measured"
        );
    }
    Ok(())
}
