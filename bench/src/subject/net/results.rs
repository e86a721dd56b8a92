//! Collects what was measured, and makes figures of it: each way's own, and in each round its ratio to vxlan.

use std::collections::BTreeMap;

use bench::figure::{Figure, Limit};

use super::bed::PacketPath;
use super::plan::{Place, Step, Subject};

/// What a value says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Quantity {
    Rate,
    Slower,
    Offered,
    Received,
    Disordered,
    Trip,
    Lost,
    TaskCost,
    MachineCost,
    Again,
    Volume,
    Arrived,
    Corrupt,
    ChecksumErrors,
    Kept,
    Busy,
}

/// A measured value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Value {
    quantity: Quantity,
    value: f64,
}

impl Quantity {
    /// A value of this.
    pub(crate) fn of(self, value: f64) -> Value {
        Value { quantity: self, value }
    }

    /// What to add to the name of the measurement, the unit, and whether a ratio of it says something.
    fn words(self) -> (&'static str, &'static str, bool) {
        match self {
            Self::Rate => ("", "Gbit/s", true),
            Self::Slower => (", the slower one", "Gbit/s", true),
            Self::Offered => (", offered", "kpps", false),
            Self::Received => (", received", "kpps", true),
            Self::Disordered => (", out of order", "", false),
            Self::Trip => (", mean", "us", true),
            Self::Lost => (", pings lost", "%", false),
            Self::TaskCost => (", CPU of tasks", "s/GB", true),
            Self::MachineCost => (", CPU of the machine", "s/GB", true),
            Self::Again => (", retransmits", "", false),
            Self::Volume => (", stream", "GB", false),
            Self::Arrived => (", datagrams", "million", false),
            Self::Corrupt => (", corrupt", "", false),
            Self::ChecksumErrors => (", wrong checksums", "", false),
            Self::Kept => (", share that is kept", "", false),
            Self::Busy => (", CPU of the flood alone", "%", false),
        }
    }
}

/// One line of what a measurement gave.
pub(crate) fn summary(values: &[Value]) -> String {
    let one = |value: &Value| {
        let (name, unit, _) = value.quantity.words();
        let name = name.trim_start_matches(", ");
        let blank = if name.is_empty() { "" } else { " " };
        let digits = if value.value.fract() == 0.0 { 0 } else { 2 };
        format!("{name}{blank}{:.digits$} {unit}", value.value).trim_end().to_owned()
    };
    values.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// What udp has to keep to, as ratio to vxlan.
fn ratio_limit(step: Step, quantity: Quantity) -> Limit {
    match (step.place, step.subject, quantity) {
        (_, Subject::Tcp1, Quantity::Rate) => Limit::AtLeast(0.85),
        (_, Subject::Tcp4, Quantity::Rate) => Limit::AtLeast(0.65),
        (_, Subject::Wire, Quantity::Rate) | (_, Subject::Udp64, Quantity::Received) => Limit::AtLeast(1.0),
        (Place::Pod, Subject::Tcp1, Quantity::TaskCost) => Limit::Median(1.6),
        (Place::Pod, Subject::Idle | Subject::Awake | Subject::Light, Quantity::Trip) => Limit::Median(5.0),
        _ => Limit::None,
    }
}

/// What udp has to keep to by itself.
fn limit(step: Step, quantity: Quantity) -> Limit {
    match (step.subject, quantity) {
        (Subject::Initiations | Subject::PeerInitiations, Quantity::Kept) => Limit::AtLeast(0.8),
        (Subject::Initiations | Subject::PeerInitiations, Quantity::Busy) => Limit::Median(10.0),
        (Subject::Fair, Quantity::Lost) => Limit::Median(1.0),
        (Subject::Udp64 | Subject::Soak, Quantity::Disordered)
        | (Subject::Soak, Quantity::Corrupt | Quantity::ChecksumErrors) => Limit::Each(0.0),
        _ => Limit::None,
    }
}

/// All values, by what was measured, way and round.
#[derive(Default)]
pub(crate) struct Results {
    values: BTreeMap<(Step, Quantity), BTreeMap<PacketPath, BTreeMap<u32, f64>>>,
}

impl Results {
    /// Keeps what a measurement gave.
    pub(crate) fn add(&mut self, step: Step, way: PacketPath, round: u32, values: Vec<Value>) {
        for Value { quantity, value } in values {
            let paths = self.values.entry((step, quantity)).or_default();
            paths.entry(way).or_default().insert(round, value);
        }
    }

    /// For each thing that was measured the ways, then their ratios.
    pub(crate) fn figures(&self) -> Vec<Figure> {
        let mut figures = Vec::new();
        for (&(step, quantity), paths) in &self.values {
            let (suffix, unit, compares) = quantity.words();
            let what = format!("{step}{suffix}");
            for (&way, rounds) in paths {
                let floods = [Subject::Initiations, Subject::PeerInitiations];
                let judged = way == PacketPath::Udp || floods.contains(&step.subject);
                let limit = if judged { limit(step, quantity) } else { Limit::None };
                let rounds = rounds.values().copied().collect();
                figures.push(Figure { rounds, ..Figure::new(format!("{what}: {way}"), unit, limit) });
            }
            if !compares {
                continue;
            }
            let others =
                paths.keys().filter(|way| **way != PacketPath::Vxlan).map(|way| (*way, PacketPath::Vxlan));
            let of_wireguard =
                [(PacketPath::Wireguard, PacketPath::Udp), (PacketPath::Wireguard, PacketPath::WireguardGo)];
            for (way, reference) in others.chain([(PacketPath::Udp, PacketPath::GoUdp)]).chain(of_wireguard) {
                let rounds = ratios(paths, way, reference);
                if !rounds.is_empty() {
                    let judged = (way, reference) == (PacketPath::Udp, PacketPath::Vxlan);
                    let limit = if judged { ratio_limit(step, quantity) } else { Limit::None };
                    let name = format!("{what}: {way} / {reference}");
                    figures.push(Figure { rounds, ..Figure::new(name, "", limit) });
                }
            }
        }
        figures
    }
}

/// One way's values by another's, of the rounds that have both.
fn ratios(
    paths: &BTreeMap<PacketPath, BTreeMap<u32, f64>>,
    way: PacketPath,
    reference: PacketPath,
) -> Vec<f64> {
    let (Some(rounds), Some(reference)) = (paths.get(&way), paths.get(&reference)) else {
        return Vec::new();
    };
    rounds.iter().filter_map(|(round, value)| Some(value / reference.get(round)?)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_of_one_round_and_only_udp_has_limits() {
        let step = Step { place: Place::Pod, subject: Subject::Tcp1 };
        let mut results = Results::default();
        for (way, round, rate) in [
            (PacketPath::Vxlan, 0, 10.0),
            (PacketPath::Udp, 0, 9.0),
            (PacketPath::HostGw, 0, 12.0),
            (PacketPath::Udp, 1, 8.0),
            (PacketPath::Vxlan, 2, 8.0),
            (PacketPath::Udp, 2, 8.0),
        ] {
            results.add(step, way, round, vec![Quantity::Rate.of(rate), Quantity::Again.of(0.0)]);
        }
        let figures = results.figures();
        let named = |name: &str| figures.iter().find(|figure| figure.name == name).unwrap();
        assert_eq!(named("pods, TCP 1 stream: udp").rounds, [9.0, 8.0, 8.0]);
        let ratio = named("pods, TCP 1 stream: udp / vxlan");
        assert_eq!(ratio.rounds, [0.9, 1.0], "a round without vxlan has no ratio");
        assert!(matches!(ratio.limit, Limit::AtLeast(0.85)));
        assert!(matches!(named("pods, TCP 1 stream: host-gw / vxlan").limit, Limit::None));
        assert!(!figures.iter().any(|figure| figure.name.contains("retransmits: udp / vxlan")));
    }
}
