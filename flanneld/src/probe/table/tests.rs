//! Peers over networks that lose packets by a rule, in simulated time.

use std::sync::Arc;

use proptest::prelude::*;

use super::super::path::PathState;
use super::super::pending::TIMEOUT;
use super::super::target::{Inner, Target};
use super::*;

const INTERVAL: Duration = Duration::from_secs(10);
const RTT: Duration = Duration::from_micros(300);

/// What the network does with a packet: of a peer's public address or not, of this length.
type Fate<'a> = dyn FnMut(bool, u16) -> Option<Duration> + 'a;

fn target(number: u16) -> Target {
    let [high, low] = number.to_be_bytes();
    let subnet: IpNet = format!("10.{}.{low}.0/24", 16 + high).parse().unwrap();
    let underlay = format!("192.0.{high}.{low}").parse().unwrap();
    Target {
        subnet,
        underlay,
        inner: Inner::Tunnel(subnet.network()),
        mtu: 1450,
        way: Arc::from("vxlan VNI 1 port 8472"),
    }
}

fn direct(number: u16) -> Target {
    let target = target(number);
    let bridge = subnet::env_file::gateway(target.subnet);
    Target { inner: Inner::Bridge(bridge), way: Arc::from("host-gw"), ..target }
}

/// These as the loop tells them.
fn told(targets: &[Target]) -> Targets {
    let first = targets.first().expect("there is one");
    let tunnels = matches!(first.inner, Inner::Tunnel(_));
    let told = Targets::by(tunnels, first.mtu, targets.iter().map(|target| (target.subnet, target.underlay)));
    assert!(targets.iter().all(|target| told.get(&target.subnet).as_ref() == Some(target)));
    told
}

/// A table and its network.
struct Sim {
    table: Table,
    now: Instant,
    /// Answers under way, by the time at which they arrive.
    answers: Vec<(Instant, Arrival)>,
    sent: u64,
    turns: u64,
    news: Vec<(Duration, Verdict)>,
    start: Instant,
    random: u32,
}

impl Sim {
    fn new(targets: Vec<Target>) -> Self {
        let now = Instant::now();
        let mut table = Table::new(INTERVAL, now, 65_500);
        let mut number = 0u16;
        let mut spread = || {
            number = number.wrapping_add(40_503);
            number
        };
        table.set(&told(&targets), now, &mut spread);
        Self { table, now, answers: Vec::new(), sent: 0, turns: 0, news: Vec::new(), start: now, random: 1 }
    }

    /// Lets time pass; the network does with each packet what `fate` says, until `stop` is true of the table.
    fn run_until(
        &mut self,
        time: Duration,
        fate: &mut Fate<'_>,
        stop: impl FnMut(&Table) -> bool,
    ) -> Duration {
        self.run_until_of(time, &mut |to, packet| fate(to.to_string().starts_with("192."), packet), stop)
    }

    /// The same with a network that knows the peers.
    fn run_until_of(
        &mut self,
        time: Duration,
        fate: &mut dyn FnMut(IpAddr, u16) -> Option<Duration>,
        mut stop: impl FnMut(&Table) -> bool,
    ) -> Duration {
        let (begin, end) = (self.now, self.now + time);
        while self.now < end && !stop(&self.table) {
            let arrival = self.answers.iter().map(|(at, _)| *at).min();
            let next = self.table.wake().into_iter().chain(arrival).chain([end]).min().unwrap();
            self.now = next.max(self.now);
            self.turns += 1;
            let now = self.now;
            let (due, later) = std::mem::take(&mut self.answers).into_iter().partition(|(at, _)| *at <= now);
            self.answers = later;
            let due: Vec<(Instant, Arrival)> = due;
            for (_, arrival) in due {
                self.table.answered(now, &arrival);
            }
            self.table.expire(now);
            let random = &mut self.random;
            let mut token = || {
                *random = random.wrapping_add(1);
                let mut token = [0; 16];
                token[..4].copy_from_slice(&random.to_be_bytes());
                token
            };
            for Probe { to, sequence, token, packet } in self.table.due(now, &mut token) {
                self.sent += 1;
                if let Some(after) = fate(to, packet) {
                    let age = Duration::ZERO;
                    let packet = packet.into();
                    self.answers.push((now + after, Arrival { from: to, sequence, token, packet, age }));
                }
            }
            let at = now.duration_since(self.start);
            self.news.extend(self.table.news(now).into_iter().map(|news| (at, news.verdict)));
        }
        self.now.duration_since(begin)
    }

    fn run(&mut self, seconds: u64, fate: &mut Fate<'_>) {
        self.run_until(Duration::from_secs(seconds), fate, |_| false);
    }

    fn report(&self) -> Report {
        self.table.report(ProbeMode::On, self.now)
    }

    fn verdict(&self) -> Verdict {
        self.report().peers[0].verdict
    }

    fn state(&self) -> PathState {
        self.report().peers[0].state
    }
}

fn all(_: bool, _: u16) -> Option<Duration> {
    Some(RTT)
}

/// Random numbers that are the same in each run of the test.
fn xorshift(seed: u64) -> impl FnMut() -> f64 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[test]
fn a_healthy_cluster_stays_fine_within_its_budget() {
    for (peers, per_second) in [(1, 0.6), (50, 30.0), (500, 12.0)] {
        let mut sim = Sim::new((0..peers).map(target).collect());
        sim.run(600, &mut all);
        assert!(sim.news.is_empty(), "{:?}", sim.news);
        let report = sim.report();
        let fine = |peer: &super::super::report::PeerReport| {
            peer.verdict == Verdict::Fine && peer.state == PathState::Reachable && peer.cause.is_none()
        };
        assert!(report.peers.iter().all(fine) && report.rejected == 0);
        assert_eq!(report.totals.overlay.lost + report.totals.underlay.lost + report.totals.large.lost, 0);
        assert!(peers > 50 || report.peers.iter().all(|peer| peer.path_mtu == Some(1450)));
        let rate = sim.sent as f64 / 600.0;
        assert!(rate <= per_second, "{peers} peers: {rate} probes a second");
    }
}

#[test]
fn thousands_of_silent_peers_are_looked_at_in_turn() {
    let mut sim = Sim::new((0..5000).map(target).collect());
    for _ in 0..5 {
        sim.run(60, &mut |_, _| None);
        let soon = sim.table.moment(sim.now + Duration::from_secs(1));
        let looks = sim.table.queue.iter().filter(|Reverse((at, _))| *at <= soon).count();
        assert!(looks <= 100, "{looks} peers are looked at in the next second");
    }
    assert!(sim.sent < 300 * 15, "{} probes", sim.sent);
    // One turn for each four seconds, and the first ones until peers wait for each other.
    assert!(sim.turns < 300 / 4 + 10, "{} turns", sim.turns);
}

#[test]
fn one_silent_peer_of_thousands_is_probed_each_second_until_it_is_unreachable() {
    let mut sim = Sim::new((0..2000).map(target).collect());
    let silent = target(7);
    let mut fate = |to: IpAddr, _: u16| (to != silent.underlay && to != silent.inner.addr()).then_some(RTT);
    // In the first round each is unknown.
    sim.run(420, &mut all);
    (sim.turns, sim.sent) = (0, 0);
    sim.run(400, &mut all);
    // Requests leave in one turn, and answers come in the next.
    assert!(sim.turns <= 2 * 400 / 4 + 1, "{} turns among peers that answer", sim.turns);
    // Three for each peer: the second round has one of full length.
    assert!(sim.sent <= 3 * 2000, "{} probes", sim.sent);
    let peer = |table: &Table| table.peers[&target(7).subnet].clone();
    let doubted = |table: &Table| peer(table).next_due() < peer(table).usual_due();
    let took = sim.run_until_of(Duration::from_secs(500), &mut fate, doubted);
    assert!(took < Duration::from_secs(410), "{took:?}");
    let unreachable = |table: &Table| peer(table).state() == PathState::Unreachable;
    let took = sim.run_until_of(Duration::from_secs(100), &mut fate, unreachable);
    assert!(took <= Duration::from_secs(20), "{took:?}");
}

type Fault = (&'static str, Vec<Target>, Box<Fate<'static>>, Verdict);

/// Faults of the network, with the verdict on each.
fn faults() -> Vec<Fault> {
    let tunnelled = || vec![target(1)];
    let routed = || vec![direct(1)];
    let lossy = |share: f64, underlay_too: bool| {
        let mut random = xorshift(7);
        move |underlay: bool, _: u16| (underlay && !underlay_too || random() >= share).then_some(RTT)
    };
    vec![
        (
            "the tunnel is cut",
            tunnelled(),
            Box::new(|underlay, _| underlay.then_some(RTT)),
            Verdict::PortBlocked,
        ),
        ("all is cut", tunnelled(), Box::new(|_, _| None), Verdict::Down),
        ("all is cut, without a tunnel", routed(), Box::new(|_, _| None), Verdict::Down),
        (
            "ICMP is refused at the host",
            tunnelled(),
            Box::new(|underlay, _| (!underlay).then_some(RTT)),
            Verdict::Fine,
        ),
        (
            "ICMP is refused at the host, without a tunnel",
            routed(),
            Box::new(|underlay, _| (!underlay).then_some(RTT)),
            Verdict::Fine,
        ),
        ("no pod, so no bridge", routed(), Box::new(|underlay, _| underlay.then_some(RTT)), Verdict::Fine),
        (
            "large packets are lost",
            tunnelled(),
            Box::new(|_, size| (size <= 1350).then_some(RTT)),
            Verdict::PathMtu,
        ),
        (
            "large packets are lost, routed",
            routed(),
            Box::new(|_, size| (size <= 1350).then_some(RTT)),
            Verdict::PathMtu,
        ),
        ("half is lost in the tunnel", tunnelled(), Box::new(lossy(0.5, false)), Verdict::LossyTunnel),
        ("half is lost everywhere", tunnelled(), Box::new(lossy(0.5, true)), Verdict::LossyNetwork),
    ]
}

#[test]
fn faults_are_told_apart() {
    for (what, targets, mut fate, expected) in faults() {
        let mut sim = Sim::new(targets.clone());
        sim.run(120, &mut all);
        let before = sim.now;
        sim.run(300, &mut fate);
        assert_eq!(sim.verdict(), expected, "{what}");
        if expected == Verdict::Fine {
            let peer = &sim.report().peers[0];
            assert_eq!(
                (peer.state, peer.main().state),
                (PathState::Reachable, PathState::Reachable),
                "{what}"
            );
        }
        let told: Vec<Verdict> = sim.news.iter().map(|(_, verdict)| *verdict).collect();
        let expected_news = if expected.is_trouble() { vec![expected] } else { vec![] };
        assert_eq!(told, expected_news, "{what}: one line");
        if expected.is_trouble() {
            let peer = &sim.report().peers[0];
            let cause = peer.cause.as_ref().unwrap();
            assert!(cause.contains("192.0.0.1") && peer.remedy.is_some(), "{what}: {cause}");
            let took = sim.news[0].0 - before.duration_since(sim.start);
            assert!(took <= Duration::from_secs(150), "{what}: told after {took:?}");
        }
        sim.run(300, &mut all);
        assert_eq!((sim.verdict(), sim.state()), (Verdict::Fine, PathState::Reachable), "{what}: it ends");
        assert_eq!(sim.news.len(), 2 * told.len(), "{what}: and the end is told");

        // The same from the start, when nothing has ever been answered.
        let mut sim = Sim::new(targets);
        sim.run(300, &mut fate);
        let expected = if expected == Verdict::Down { Verdict::Silent } else { expected };
        assert_eq!(sim.verdict(), expected, "{what}, from the start");
    }
}

#[test]
fn an_outage_is_noticed_soon_and_so_is_its_end() {
    let mut sim = Sim::new((0..50).map(target).collect());
    sim.run(100, &mut all);
    let all_are = |state: PathState| {
        move |table: &Table| {
            table.report(ProbeMode::On, Instant::now()).peers.iter().all(|peer| peer.state == state)
        }
    };
    // All at once, with all extra probes in use.
    let took = sim.run_until(Duration::from_secs(200), &mut |_, _| None, all_are(PathState::Unreachable));
    assert!(took <= Duration::from_secs(60), "{took:?}");
    let took = sim.run_until(Duration::from_secs(200), &mut all, all_are(PathState::Reachable));
    assert!(took <= Duration::from_secs(30), "{took:?}");

    let mut sim = Sim::new((0..50).map(target).collect());
    sim.run(100, &mut all);
    let mut one = |_: bool, _: u16| None;
    sim.table.set(&told(&[target(1)]), sim.now, &mut || 0);
    let took = sim.run_until(Duration::from_secs(100), &mut one, all_are(PathState::Unreachable));
    assert!(took <= Duration::from_secs(25), "{took:?}");
}

#[test]
fn the_path_mtu_is_found_exactly() {
    let mut sim = Sim::new(vec![target(1)]);
    sim.run(300, &mut |_, size| (size <= 1397).then_some(RTT));
    let peer = &sim.report().peers[0];
    assert_eq!((peer.path_mtu, peer.mtu), (Some(1397), 1450));
    assert!(peer.remedy.as_ref().unwrap().contains("by 53"), "{:?}", peer.remedy);
}

#[test]
fn a_path_that_became_narrow_in_an_outage_is_found_soon_after_it() {
    let mut sim = Sim::new(vec![target(1)]);
    sim.run(120, &mut all);
    sim.run(90, &mut |_, _| None);
    // A tenth of the last five minutes' probes stay lost for minutes.
    let narrow = |_: bool, size: u16| (size <= 1350).then_some(RTT);
    let limited =
        |table: &Table| table.report(ProbeMode::On, Instant::now()).peers[0].verdict == Verdict::PathMtu;
    let took = sim.run_until(Duration::from_secs(600), &mut { narrow }, limited);
    assert!(took <= Duration::from_secs(150), "{took:?}");
}

#[test]
fn large_packets_that_are_lost_like_others_are_no_limit() {
    for seed in 0..50 {
        let mut random = xorshift(seed);
        let mut sim = Sim::new(vec![target(1)]);
        sim.run(900, &mut |_, _| (random() >= 0.05).then_some(RTT));
        assert_ne!(sim.verdict(), Verdict::PathMtu, "seed {seed}");
    }
}

#[test]
fn no_state_alternates_at_five_percent_in_ten_minutes() {
    for seed in 0..250 {
        let mut random = xorshift(seed);
        let mut sim = Sim::new(vec![target(1)]);
        let state = |table: &Table, now: Instant| table.report(ProbeMode::On, now).peers[0].state;
        sim.run(60, &mut all);
        let now = sim.now;
        let left =
            sim.run_until(Duration::from_secs(600), &mut |_, _| (random() >= 0.05).then_some(RTT), |table| {
                state(table, now) != PathState::Reachable
            });
        assert!(left >= Duration::from_secs(600), "seed {seed}: left the state after {left:?}");
        assert!(sim.news.is_empty());
    }
}

#[test]
fn half_of_the_packets_lost_is_degraded_within_a_minute() {
    for seed in 0..100 {
        let mut random = xorshift(seed);
        let mut sim = Sim::new((0..50).map(target).collect());
        sim.run(60, &mut all);
        let now = sim.now;
        let took = sim.run_until(
            Duration::from_secs(120),
            // Of the first peer's tunnel and of all others: the same rule for every packet.
            &mut |_, _| (random() >= 0.5).then_some(RTT),
            |table| table.report(ProbeMode::On, now).peers[0].state == PathState::Degraded,
        );
        assert!(took <= Duration::from_secs(60), "seed {seed}: {took:?}");
    }
}

proptest! {
    #[test]
    fn loss_is_reported_as_it_was(share in 0.0f64..0.6, seed: u64) {
        let mut random = xorshift(seed);
        let mut sim = Sim::new(vec![target(1)]);
        let (mut sent, mut lost) = (0u32, 0u32);
        // The window is five minutes, in which a path has 120 probes and more if it is in doubt.
        sim.run(297, &mut |underlay, size| {
            let gone = random() < share;
            if !underlay && size < 100 {
                sent += 1;
                lost += u32::from(gone);
            }
            (!gone).then_some(RTT)
        });
        let reported = f64::from(sim.report().peers[0].tunnel.loss);
        let actual = f64::from(lost) / f64::from(sent);
        prop_assert!((reported - actual).abs() <= 0.03, "{reported} instead of {actual}");
    }

    #[test]
    fn any_answers_at_any_time_neither_panic_nor_count_as_what_they_are_not(
        steps in proptest::collection::vec((0u64..3000, any::<u16>(), any::<bool>(), 0u64..5000), 1..200),
    ) {
        let mut sim = Sim::new((0..3).map(target).collect());
        for (wait, sequence, good_source, age) in steps {
            sim.now += Duration::from_millis(wait);
            let from = if good_source { target(1).underlay } else { "203.0.113.9".parse().unwrap() };
            let age = Duration::from_millis(age);
            sim.table.answered(sim.now, &Arrival { from, sequence, token: [9; 16], packet: 64, age });
            sim.table.expire(sim.now);
            sim.table.due(sim.now, &mut || [1; 16]);
            sim.table.news(sim.now);
        }
        let totals = &sim.report().totals;
        prop_assert_eq!(totals.overlay.answered + totals.underlay.answered + totals.large.answered, 0);
        prop_assert!(sim.report().rejected > 0);
    }
}

#[test]
fn peers_come_go_and_move_without_losing_what_is_known_of_others() {
    let mut sim = Sim::new(vec![target(1), target(2)]);
    sim.run(60, &mut all);
    let resized = |target: Target| Target { mtu: 1400, ..target };
    let moved = Target { underlay: "192.0.9.9".parse().unwrap(), ..resized(target(2)) };
    let now = sim.now;
    sim.table.set(&told(&[resized(target(1)), moved, resized(target(3))]), now, &mut || 0);
    let report = sim.report();
    let states: Vec<_> = report.peers.iter().map(|peer| (peer.state, peer.path_mtu)).collect();
    assert_eq!(states[0], (PathState::Reachable, None), "its length is to be found out again");
    assert_eq!(states[1..], [(PathState::Unknown, None); 2]);
    // An answer to a request to the old address says nothing about the new one.
    sim.run(30, &mut all);
    assert!(sim.report().peers.iter().all(|peer| peer.verdict == Verdict::Fine));
    assert_eq!(sim.report().peers[0].path_mtu, Some(1400));
    sim.table.set(&Targets::default(), sim.now, &mut || 0);
    sim.run(60, &mut all);
    assert!(sim.report().peers.is_empty());
    assert_eq!(sim.table.wake(), None, "nothing to do");
}

#[test]
fn a_request_that_the_kernel_refuses_is_lost_at_once() {
    let mut sim = Sim::new(vec![target(1)]);
    let now = sim.now + Duration::from_secs(3);
    let probes = sim.table.due(now, &mut || [1; 16]);
    assert!(!probes.is_empty());
    for probe in &probes {
        sim.table.refused(now, probe.sequence);
        sim.table.refused(now, probe.sequence);
    }
    sim.table.expire(now + TIMEOUT);
    let totals = sim.report().totals;
    assert_eq!(totals.overlay.lost + totals.underlay.lost, probes.len() as u64);
}

#[test]
fn a_process_that_was_stopped_for_hours_goes_on_as_before() {
    let mut sim = Sim::new((0..50).map(target).collect());
    sim.run(60, &mut all);
    sim.answers.clear();
    sim.now += Duration::from_secs(7200);
    let before = sim.sent;
    sim.run(1, &mut all);
    assert!(sim.sent - before <= 200, "no burst: {}", sim.sent - before);
    sim.run(60, &mut all);
    assert!(sim.news.is_empty() && sim.verdict() == Verdict::Fine);
}
