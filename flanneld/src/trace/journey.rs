//! What became of one packet, put together from what the kernel says about it; pure.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use backends::trace::{Event, Flow, Outcome, Table, TableId, TraceStep};
use serde::Serialize;

/// Names of devices by their index.
pub(super) type Devices = BTreeMap<u32, String>;

/// A packet on its way through this host.
#[derive(Debug, Serialize)]
pub(super) struct Journey {
    /// The kernel's number for it.
    pub(super) packet: u32,
    /// It answers a packet of the flow.
    pub(super) answer: bool,
    /// What it is, in words.
    pub(super) what: String,
    /// The device that it came in by.
    pub(super) incoming: Option<String>,
    /// Decisions of rules and chains, in their order.
    pub(super) decisions: Vec<Decision>,
    /// The hook that it passed last.
    pub(super) passed: Option<Hook>,
    /// What became of it.
    pub(super) fate: Fate,
    /// The device that it leaves by, as far as it was told.
    #[serde(skip)]
    outgoing: Option<String>,
    /// Its addresses and what follows, which stay the same on its way.
    #[serde(skip)]
    content: Vec<u8>,
}

/// What decided on a packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Decision {
    /// The table with its family.
    pub(super) table: String,
    /// The chain.
    pub(super) chain: String,
    /// Position of the rule in the chain, from 1; nothing if the chain's policy decided.
    pub(super) rule: Option<usize>,
    /// The kernel's number for the rule.
    pub(super) handle: Option<u64>,
    /// The rule's comment.
    pub(super) comment: Option<String>,
    /// What was decided.
    pub(super) verdict: String,
    /// Whose rule it is, as far as names tell.
    pub(super) owner: &'static str,
}

/// What became of a packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "is")]
pub(super) enum Fate {
    /// It is not known yet.
    UnderWay,
    /// The last decision dropped it.
    Dropped,
    /// It passed all chains and left by this device.
    Sent {
        /// The device.
        device: String,
    },
    /// It passed all chains to this host itself.
    Delivered,
    /// It passed the last hook, and none came after that.
    Vanished,
}

/// A place in a packet's way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Hook {
    /// All that comes in.
    Prerouting,
    /// What is for this host.
    Input,
    /// What passes through.
    Forward,
    /// What this host sends.
    Output,
    /// All that goes out.
    Postrouting,
}

impl Hook {
    /// The hook of one of the tracer's own chains.
    fn of(chain: &str) -> Option<Self> {
        Some(match chain {
            "prerouting" => Self::Prerouting,
            "input" => Self::Input,
            "forward" => Self::Forward,
            "output" => Self::Output,
            "postrouting" => Self::Postrouting,
            _ => return None,
        })
    }
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Prerouting => "prerouting",
            Self::Input => "input",
            Self::Forward => "forward",
            Self::Output => "output",
            Self::Postrouting => "postrouting",
        })
    }
}

impl Journey {
    pub(super) fn begin(first: &TraceStep, flow: &Flow, devices: &Devices) -> Self {
        let from = source(&first.network);
        let incoming = first.incoming.map(|index| device(devices, index));
        Self {
            packet: first.packet,
            answer: from == Some(flow.destination) && flow.source != flow.destination,
            what: words(first),
            incoming,
            decisions: Vec::new(),
            passed: None,
            fate: Fate::UnderWay,
            outgoing: None,
            content: content(first),
        }
    }

    /// Whether a step with headers is about this packet, although the kernel gives it another number: it does when a
    /// packet leaves a bridge.
    pub(super) fn is_the_same(&self, step: &TraceStep) -> bool {
        !self.is_over() && self.content == content(step)
    }

    /// Takes note of the device that a step names: only the first one in a chain does.
    pub(super) fn note_device(&mut self, step: &TraceStep, devices: &Devices) {
        if let Some(index) = step.outgoing {
            self.outgoing = Some(device(devices, index));
        }
    }

    /// Takes a step of the tracer's own chains: a hook is passed.
    pub(super) fn pass(&mut self, step: &TraceStep) {
        let (Some(hook), Event::Policy { .. }) = (Hook::of(&step.chain), &step.event) else { return };
        self.passed = Some(hook);
        match hook {
            Hook::Postrouting => self.fate = Fate::Sent { device: self.outgoing.clone().unwrap_or_default() },
            Hook::Input => self.fate = Fate::Delivered,
            Hook::Prerouting | Hook::Forward | Hook::Output => {}
        }
    }

    /// Takes a step of another chain. `table` is what it belongs to, to name the rule with.
    pub(super) fn meet(&mut self, step: &TraceStep, table: Option<&Table>) {
        let (handle, verdict) = match &step.event {
            Event::Rule { handle, verdict } => (Some(*handle), verdict.clone()),
            Event::Policy { accepted: true } => (None, Outcome::Accept),
            Event::Policy { accepted: false } => (None, Outcome::Drop),
            Event::Return => return,
        };
        let word = match verdict {
            Outcome::Accept => "accept".to_owned(),
            Outcome::Drop => "drop".to_owned(),
            Outcome::Chain(chain) => format!("into {chain}"),
            Outcome::Return => "return".to_owned(),
            Outcome::Continue => return,
            Outcome::Other(3) => "queue".to_owned(),
            Outcome::Other(2) => "stolen".to_owned(),
            Outcome::Other(code) => format!("verdict {code}"),
        };
        let chain = table.and_then(|table| table.chain(&step.chain));
        let position = chain.and_then(|chain| chain.rules.iter().position(|rule| rule.handle == handle));
        let position = position.filter(|_| handle.is_some());
        let comment = position.and_then(|position| chain?.rules[position].any_comment());
        let owner = owner(&step.table, &step.chain, comment.as_deref());
        if word == "drop" {
            self.fate = Fate::Dropped;
        }
        self.decisions.push(Decision {
            table: step.table.to_string(),
            chain: step.chain.clone(),
            rule: position.map(|position| position + 1),
            handle,
            comment,
            verdict: word,
            owner,
        });
    }

    /// Nothing more is said about it.
    pub(super) fn end(&mut self) {
        if self.fate == Fate::UnderWay {
            self.fate = Fate::Vanished;
        }
    }

    pub(super) fn is_over(&self) -> bool {
        self.fate != Fate::UnderWay
    }

    /// The decision that dropped it.
    pub(super) fn dropped_by(&self) -> Option<&Decision> {
        self.decisions.last().filter(|_| self.fate == Fate::Dropped)
    }
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "table {}, chain {}, ", self.table, self.chain)?;
        match (self.rule, self.handle) {
            (Some(rule), Some(handle)) => write!(f, "rule {rule} (handle {handle})")?,
            (None, Some(handle)) => write!(f, "rule with handle {handle}")?,
            (_, None) => f.write_str("policy")?,
        }
        if let Some(comment) = &self.comment {
            write!(f, " {:?}", crate::text::clean(comment, 100))?;
        }
        Ok(())
    }
}

/// Whose table or chain this is, as far as names tell.
fn owner(table: &TableId, chain: &str, comment: Option<&str>) -> &'static str {
    let name = table.name.as_str();
    let ours = name.starts_with("flannel-")
        || chain.starts_with("FLANNEL-")
        || comment.is_some_and(|comment| comment.starts_with("flanneld"));
    let by_chain = [
        ("KUBE-NWPLCY", "kube-router"),
        ("KUBE-ROUTER", "kube-router"),
        ("KUBE-", "kube-proxy"),
        ("DOCKER", "Docker"),
        ("CNI-", "a CNI plugin"),
        ("cali-", "Calico"),
        ("CILIUM", "Cilium"),
        ("ufw", "ufw"),
        ("f2b-", "fail2ban"),
        ("LIBVIRT", "libvirt"),
        ("NETAVARK", "Podman"),
    ];
    let by_table = [
        ("kube-proxy", "kube-proxy"),
        ("firewalld", "firewalld"),
        ("docker", "Docker"),
        ("libvirt", "libvirt"),
        ("netavark", "Podman"),
        ("f2b", "fail2ban"),
    ];
    if ours {
        return "flannel";
    }
    let named = |text: &str, all: &[(&str, &'static str)]| {
        all.iter().find(|(prefix, _)| text.starts_with(prefix)).map(|(_, owner)| *owner)
    };
    named(chain, &by_chain).or_else(|| named(name, &by_table)).unwrap_or("another program")
}

fn device(devices: &Devices, index: u32) -> String {
    devices.get(&index).cloned().unwrap_or_else(|| format!("device {index}"))
}

/// Whether a step has headers, and they are those of a packet of this flow or of an answer.
pub(super) fn is_of(flow: &Flow, step: &TraceStep) -> bool {
    let ends = addresses(&step.network);
    ends == Some((flow.source, flow.destination)) || ends == Some((flow.destination, flow.source))
}

/// A packet's addresses and what follows its header.
fn content(step: &TraceStep) -> Vec<u8> {
    let from = if step.network.first().is_some_and(|first| first >> 4 == 6) { 8 } else { 12 };
    [step.network.get(from..).unwrap_or_default(), &step.transport].concat()
}

/// The source address of a packet.
fn source(network: &[u8]) -> Option<IpAddr> {
    addresses(network).map(|(source, _)| source)
}

fn addresses(network: &[u8]) -> Option<(IpAddr, IpAddr)> {
    let v4 = |at: usize| Some(IpAddr::from(<[u8; 4]>::try_from(network.get(at..at + 4)?).ok()?));
    let v6 = |at: usize| Some(IpAddr::from(<[u8; 16]>::try_from(network.get(at..at + 16)?).ok()?));
    match network.first()? >> 4 {
        4 => Some((v4(12)?, v4(16)?)),
        6 => Some((v6(8)?, v6(24)?)),
        _ => None,
    }
}

/// What a packet is: protocol, length, ports, flags.
fn words(step: &TraceStep) -> String {
    let TraceStep { network, transport, .. } = step;
    let number = |bytes: &[u8], at: usize| {
        bytes.get(at..at + 2).and_then(|two| two.try_into().ok()).map(u16::from_be_bytes)
    };
    let version = network.first().map_or(0, |first| first >> 4);
    let (protocol, length) = match version {
        4 => (network.get(9), number(network, 2).map(u32::from)),
        6 => (network.get(6), number(network, 4).map(|payload| u32::from(payload) + 40)),
        _ => return "a packet".to_owned(),
    };
    let ports = match (number(transport, 0), number(transport, 2)) {
        (Some(from), Some(to)) => format!(" {from} → {to}"),
        _ => String::new(),
    };
    let name = match protocol {
        Some(6) => {
            let flags = transport.get(13).copied().unwrap_or_default();
            let names = [(0x02, "SYN"), (0x10, "ACK"), (0x01, "FIN"), (0x04, "RST")];
            let set: Vec<&str> =
                names.iter().filter(|(bit, _)| flags & bit != 0).map(|(_, name)| *name).collect();
            let set = if set.is_empty() { String::new() } else { format!(" {}", set.join("+")) };
            format!("tcp{ports}{set}")
        }
        Some(17) => format!("udp{ports}"),
        Some(1) | Some(58) => match transport.first() {
            Some(8 | 128) => "icmp echo request".to_owned(),
            Some(0 | 129) => "icmp echo reply".to_owned(),
            Some(3 | 1) => "icmp unreachable".to_owned(),
            Some(kind) => format!("icmp type {kind}"),
            None => "icmp".to_owned(),
        },
        Some(other) => format!("protocol {other}"),
        None => "a packet".to_owned(),
    };
    match length {
        Some(length) => format!("{name}, {length} bytes"),
        None => name,
    }
}

#[cfg(test)]
mod tests {
    use backends::trace::TableFamily;
    use proptest::prelude::*;

    use super::*;

    fn flow() -> Flow {
        let addr = |text: &str| text.parse().unwrap();
        Flow { source: addr("10.244.1.7"), destination: addr("10.244.7.3"), transport: None, port: None }
    }

    fn step(table: (TableFamily, &str), chain: &str, event: Event) -> TraceStep {
        let mut network = vec![0x45, 0, 0, 60, 0, 0, 0, 0, 64, 6, 0, 0];
        network.extend([10, 244, 1, 7, 10, 244, 7, 3]);
        let mut transport = vec![0x9c, 0x40, 0, 80];
        transport.resize(13, 0);
        transport.push(2);
        TraceStep {
            packet: 1,
            table: TableId::new(table.0, table.1),
            chain: chain.to_owned(),
            event,
            incoming: Some(2),
            outgoing: Some(3),
            network,
            transport,
        }
    }

    const OWN: (TableFamily, &str) = (TableFamily::Inet, "flannel-trace-1");

    fn devices() -> Devices {
        [(2, "cni0".to_owned()), (3, "flannel.1".to_owned())].into()
    }

    fn journey(hooks: &[&str]) -> Journey {
        let passed = Event::Policy { accepted: true };
        let mut journey = Journey::begin(&step(OWN, "first-prerouting", Event::Return), &flow(), &devices());
        for hook in hooks {
            let step = step(OWN, hook, passed.clone());
            journey.note_device(&step, &devices());
            journey.pass(&step);
        }
        journey
    }

    #[test]
    fn a_packet_that_passes_all_hooks_was_sent() {
        let journey = journey(&["prerouting", "forward", "postrouting"]);
        assert_eq!(journey.fate, Fate::Sent { device: "flannel.1".to_owned() });
        assert_eq!((journey.what.as_str(), journey.answer), ("tcp 40000 → 80 SYN, 60 bytes", false));
        assert_eq!(journey.incoming.as_deref(), Some("cni0"));
        assert_eq!(self::journey(&["prerouting", "input"]).fate, Fate::Delivered);
    }

    #[test]
    fn a_packet_of_which_nothing_more_is_heard_vanished_after_the_last_hook() {
        let mut journey = journey(&["prerouting"]);
        assert!(!journey.is_over());
        journey.end();
        assert_eq!((journey.fate, journey.passed), (Fate::Vanished, Some(Hook::Prerouting)));
    }

    #[test]
    fn the_rule_that_drops_is_named_with_its_owner() {
        for (table, chain, event, owner) in [
            (
                (TableFamily::Ip, "filter"),
                "FORWARD",
                Event::Rule { handle: 9, verdict: Outcome::Drop },
                "another program",
            ),
            ((TableFamily::Ip, "filter"), "DOCKER-USER", Event::Policy { accepted: false }, "Docker"),
            ((TableFamily::Inet, "flannel-policy"), "in", Event::Policy { accepted: false }, "flannel"),
            (
                (TableFamily::Inet, "firewalld"),
                "filter_FORWARD",
                Event::Policy { accepted: false },
                "firewalld",
            ),
        ] {
            let mut journey = journey(&["prerouting"]);
            journey.meet(&step(table, "x", Event::Rule { handle: 1, verdict: Outcome::Continue }), None);
            journey.meet(&step(table, "y", Event::Rule { handle: 1, verdict: Outcome::Accept }), None);
            journey.meet(&step(table, chain, event), None);
            journey.end();
            assert_eq!(journey.fate, Fate::Dropped);
            let dropped = journey.dropped_by().unwrap();
            assert_eq!((dropped.owner, dropped.chain.as_str()), (owner, chain));
            assert_eq!(journey.decisions.len(), 2, "what decides nothing is left out");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_headers_never_panic(network: Vec<u8>, transport: Vec<u8>) {
            let step = TraceStep { network, transport, ..step(OWN, "a", Event::Return) };
            words(&step);
            Journey::begin(&step, &flow(), &devices());
        }
    }
}
