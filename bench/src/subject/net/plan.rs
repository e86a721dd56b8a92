//! What is measured between which ends, and how long all of it takes.

use std::fmt;
use std::time::{Duration, Instant};

use clap::ValueEnum;

use super::Job;
use super::bed::{PacketPath, Pair};

/// What can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Subject {
    /// TCP, one stream.
    Tcp1,
    /// TCP, four streams.
    Tcp4,
    /// TCP in both directions at once.
    Duplex,
    /// TCP, one stream, in frames as a real wire has them.
    Wire,
    /// UDP with 64 bytes a datagram, as fast as it goes.
    Udp64,
    /// Round trip when nothing else goes on; CPUs fall asleep in between.
    Idle,
    /// Round trip when nothing else goes on, but ping keeps its CPU awake.
    Awake,
    /// Round trip beside a light load.
    Light,
    /// Round trip beside a TCP stream that takes all it can get.
    Loaded,
    /// Another pod's ping beside a flood of small datagrams.
    Fair,
    /// TCP, one stream, beside 100,000 handshake initiations of a stranger a second; of wireguard, only where it is named.
    Initiations,
    /// The same from the address of a peer.
    PeerInitiations,
    /// 10 GB and ten million datagrams, every byte compared; only where it is named.
    Soak,
}

/// Between what it is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Place {
    /// Pods behind the nodes.
    Pod,
    /// The nodes themselves, by the addresses that they have in their subnets.
    Host,
}

/// One measurement of one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Step {
    pub(crate) place: Place,
    pub(crate) subject: Subject,
}

impl Step {
    /// Whether there is such a thing: the bare underlay has no routes to pods.
    pub(crate) fn suits(self, way: PacketPath) -> bool {
        match self.subject {
            Subject::Initiations | Subject::PeerInitiations => way == PacketPath::Wireguard,
            _ => way != PacketPath::Bare || self.place == Place::Host,
        }
    }

    /// How long it takes if iperf3 sends for `seconds`.
    fn time(self, seconds: u32) -> Duration {
        /// To start programs, connect, and end.
        const AROUND: Duration = Duration::from_millis(300);
        let whole = Duration::from_secs(seconds.into());
        AROUND
            + match self.subject {
                Subject::Soak => Duration::from_secs(120),
                // Less time gives enough round trips.
                Subject::Idle | Subject::Awake | Subject::Light | Subject::Loaded => whole * 3 / 5,
                _ => whole,
            }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.place {
            Place::Pod => "pods, ",
            Place::Host => "nodes, ",
        })?;
        f.write_str(match self.subject {
            Subject::Tcp1 => "TCP 1 stream",
            Subject::Tcp4 => "TCP 4 streams",
            Subject::Duplex => "TCP both directions",
            Subject::Wire => "TCP wire-like",
            Subject::Udp64 => "UDP 64 B",
            Subject::Idle => "round trip, idle",
            Subject::Awake => "round trip, idle, CPU awake",
            Subject::Light => "round trip, light load",
            Subject::Loaded => "round trip, heavy load",
            Subject::Fair => "beside a 64 B flood",
            Subject::Initiations => "TCP 1 stream beside initiations of a stranger",
            Subject::PeerInitiations => "TCP 1 stream beside initiations from a peer's address",
            Subject::Soak => "every byte compared",
        })
    }
}

/// The measurements of one round, in their order.
pub(crate) fn steps(quick: bool, only: &[String], place: Option<Place>) -> Vec<Step> {
    use Subject::{Awake, Duplex, Idle, Initiations, Light, PeerInitiations, Soak, Tcp1, Tcp4, Udp64};
    let only: Vec<Subject> = only.iter().filter_map(|name| Subject::from_str(name, false).ok()).collect();
    let wanted = |step: &Step| {
        let usual = match (quick, step.place) {
            _ if !only.is_empty() => only.contains(&step.subject),
            (true, Place::Pod) => [Tcp1, Udp64, Idle, Awake, Light].contains(&step.subject),
            (true, Place::Host) => step.subject == Tcp1,
            (false, _) => ![Initiations, PeerInitiations, Soak].contains(&step.subject),
        };
        let hosts = [Tcp1, Tcp4, Duplex, Udp64, Idle, Soak].contains(&step.subject);
        usual && (step.place == Place::Pod || hosts) && place.is_none_or(|place| place == step.place)
    };
    let at = |place| Subject::value_variants().iter().map(move |&subject| Step { place, subject });
    at(Place::Pod).chain(at(Place::Host)).filter(wanted).collect()
}

/// Estimates how long the rest takes, from how long what is done took.
pub(crate) struct Clock {
    start: Instant,
    seconds: u32,
    done: Duration,
    all: Duration,
}

impl Clock {
    pub(crate) fn start(job: &Job, rounds: u32, pairs: &[Pair]) -> Self {
        let suiting = |step: &Step| pairs.iter().filter(|pair| step.suits(pair.way)).count();
        let each = job.steps.iter().map(|step| step.time(job.seconds) * suiting(step) as u32);
        let all = each.sum::<Duration>() * rounds;
        Self { start: Instant::now(), seconds: job.seconds, done: Duration::ZERO, all }
    }

    pub(crate) fn done(&mut self, step: Step) {
        self.done += step.time(self.seconds);
    }

    /// `about 12:05 left`.
    pub(crate) fn left(&self) -> String {
        let pace = self.start.elapsed().as_secs_f64() / self.done.as_secs_f64().max(1e-3);
        let left = (self.all.saturating_sub(self.done).as_secs_f64() * pace).round();
        format!("about {:.0}:{:02.0} left", (left / 60.0).floor(), left % 60.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_choice_narrows_what_is_measured_and_pods_are_not_on_the_bare_underlay() {
        let all = steps(false, &[], None);
        assert_eq!(all.len(), 15);
        assert_eq!(all.iter().filter(|step| step.suits(PacketPath::Bare)).count(), 5);
        assert_eq!(steps(false, &["tcp1".to_owned()], None).len(), 2);
        assert_eq!(steps(false, &["wire".to_owned()], Some(Place::Host)), []);
        assert!(steps(true, &[], None).len() < all.len());
        assert_eq!(steps(true, &["fair".to_owned()], None).len(), 1, "what is named is done");
    }

    #[test]
    fn the_default_takes_at_most_half_an_hour_with_all_ways_and_the_quick_one_two_minutes() {
        for (quick, seconds, rounds, limit) in [(false, 4, 5, 1800), (true, 2, 2, 120)] {
            let paths = || PacketPath::value_variants().iter().filter(|way| way.is_usual());
            let each = steps(quick, &[], None)
                .into_iter()
                .map(|step| step.time(seconds) * paths().filter(|way| step.suits(**way)).count() as u32);
            let all = each.sum::<Duration>() * rounds;
            assert!(all.as_secs() * 10 / 9 < limit, "{all:?}");
        }
    }
}
