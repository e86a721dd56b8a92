//! Which rule drops a packet, told from the rules alone: no packet is sent.
//!
//! A rule of which any step is not understood decides nothing: then nothing is said about the packet in that chain. So
//! what is named here does drop the packet, and not everything that drops it is named.

use std::net::IpAddr;

use super::nftables::NftFirewall;
use super::{FirewallError, nftables};
use crate::nft::matches::{UDP, padded_name};
use crate::nft::{
    Chain, CtKey, CtState, Expr, Hook, MetaKey, Op, POLICY_TABLE, PayloadBase, Policy, Reg, Rule, Ruleset,
    Table, TableFamily, Verdict,
};

/// The first packet of a flow.
#[derive(Clone, Debug)]
pub struct Packet {
    /// Where it passes.
    pub passage: Passing,
    /// The device that it came in by, with its index; empty and 0 for what this host sends.
    pub input: (String, u32),
    /// The device that it leaves by; empty and 0 for what ends here.
    pub output: (String, u32),
    /// Its source.
    pub source: IpAddr,
    /// Its destination, of the same family.
    pub destination: IpAddr,
    /// The destination port of a UDP datagram; another packet is an ICMP echo request.
    pub udp: Option<u16>,
}

/// Which way through this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passing {
    /// It comes in, and leaves by another device.
    Through,
    /// It ends here.
    In,
    /// It begins here.
    Out,
}

impl Passing {
    fn hooks(self) -> &'static [Hook] {
        match self {
            Self::Through => &[Hook::Prerouting, Hook::Forward, Hook::Postrouting],
            Self::In => &[Hook::Prerouting, Hook::Input],
            Self::Out => &[Hook::Output, Hook::Postrouting],
        }
    }
}

/// What drops a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocking {
    /// The table's family and name.
    pub table: String,
    /// The chain.
    pub chain: String,
    /// The rule's place in the chain, from 1; without one it is the chain's policy.
    pub rule: Option<usize>,
    /// The rule's handle, by which `nft delete rule` takes it.
    pub handle: Option<u64>,
}

impl NftFirewall {
    /// What drops each of these packets.
    ///
    /// # Errors
    /// [`FirewallError`] when the rules can't be read.
    pub fn blocking(&mut self, packets: &[Packet]) -> Result<Vec<Option<Blocking>>, FirewallError> {
        let mut found: Vec<(Hook, Ruleset)> = Vec::new();
        for hook in [Hook::Prerouting, Hook::Input, Hook::Forward, Hook::Output, Hook::Postrouting] {
            found.push((
                hook,
                self.dump_hook(hook).map_err(|error| nftables::failed("reading nftables", &error))?,
            ));
        }
        let one = |packet: &Packet| {
            let hooks = packet.passage.hooks().iter();
            let rulesets = hooks.filter_map(|hook| found.iter().find(|(known, _)| known == hook));
            rulesets.filter_map(|(hook, ruleset)| blocked(ruleset, *hook, packet)).next()
        };
        Ok(packets.iter().map(one).collect())
    }
}

/// What drops the packet at this hook. Each base chain decides alone: a packet has to pass all of them.
fn blocked(found: &Ruleset, hook: Hook, packet: &Packet) -> Option<Blocking> {
    let v6 = packet.source.is_ipv6();
    let sees = |family: TableFamily| match family {
        TableFamily::Inet => true,
        TableFamily::Ip => !v6,
        TableFamily::Ip6 => v6,
        _ => false,
    };
    let chains = found.hooked(hook);
    let mut chains = chains.filter(|(table, _)| sees(table.id.family) && table.id.name != POLICY_TABLE);
    chains.find_map(|(table, base)| match walk(table, base, packet, 0) {
        ChainOutcome::Dropped(blocking) => Some(blocking),
        ChainOutcome::Back if base.base.as_ref().is_some_and(|base| base.policy == Policy::Drop) => {
            Some(place(table, base, None))
        }
        _ => None,
    })
}

/// What becomes of the packet in a chain.
enum ChainOutcome {
    Dropped(Blocking),
    Accepted,
    /// No rule has decided.
    Back,
    /// A rule is not understood.
    Unknown,
}

fn walk(table: &Table, chain: &Chain, packet: &Packet, depth: usize) -> ChainOutcome {
    // The kernel allows 16.
    if depth > 16 {
        return ChainOutcome::Unknown;
    }
    for (index, rule) in chain.rules.iter().enumerate() {
        match step(rule, packet) {
            RuleOutcome::Next => {}
            RuleOutcome::Unknown => return ChainOutcome::Unknown,
            RuleOutcome::Drop => return ChainOutcome::Dropped(place(table, chain, Some((index, rule)))),
            RuleOutcome::Accept => return ChainOutcome::Accepted,
            RuleOutcome::Return => return ChainOutcome::Back,
            RuleOutcome::Call(name, jump) => {
                let Some(next) = table.chain(name) else { return ChainOutcome::Unknown };
                match walk(table, next, packet, depth + 1) {
                    ChainOutcome::Back if jump => {}
                    decided => return decided,
                }
            }
        }
    }
    ChainOutcome::Back
}

fn place(table: &Table, chain: &Chain, rule: Option<(usize, &Rule)>) -> Blocking {
    Blocking {
        table: table.id.to_string(),
        chain: chain.name.clone(),
        rule: rule.map(|(index, _)| index + 1),
        handle: rule.and_then(|(_, rule)| rule.handle),
    }
}

/// What a rule does with the packet.
enum RuleOutcome<'r> {
    /// It does not match, or decides nothing.
    Next,
    Unknown,
    Drop,
    Accept,
    Return,
    /// A jump (true) or a goto.
    Call(&'r str, bool),
}

fn step<'r>(rule: &'r Rule, packet: &Packet) -> RuleOutcome<'r> {
    let mut registers = Registers::default();
    let mut understood = true;
    for expr in &rule.exprs {
        let known = match expr {
            Expr::Counter { .. } | Expr::Log { .. } | Expr::Masquerade { .. } => true,
            Expr::Meta { key, to } => registers.load(*to, meta(*key, packet)),
            Expr::Payload { header, offset, len, to } => {
                registers.load(*to, payload(*header, *offset, *len, packet))
            }
            Expr::Ct { key, to } => registers.load(*to, conntrack(*key)),
            Expr::Bitwise { from, to, mask, xor } => {
                let value = registers.get(*from, mask.len()).map(|value| {
                    let pairs = value.iter().zip(mask).zip(xor);
                    pairs.map(|((byte, mask), xor)| (byte & mask) ^ xor).collect()
                });
                registers.load(*to, value)
            }
            Expr::Cmp { from, op, data } => match registers.get(*from, data.len()) {
                Some(value) if !holds(*op, &value, data) => return RuleOutcome::Next,
                value => value.is_some(),
            },
            Expr::Reject { .. } => return if understood { RuleOutcome::Drop } else { RuleOutcome::Unknown },
            Expr::Verdict(_) if !understood => return RuleOutcome::Unknown,
            Expr::Verdict(Verdict::Accept) => return RuleOutcome::Accept,
            Expr::Verdict(Verdict::Drop) => return RuleOutcome::Drop,
            Expr::Verdict(Verdict::Return) => return RuleOutcome::Return,
            Expr::Verdict(Verdict::Jump(chain)) => return RuleOutcome::Call(chain, true),
            Expr::Verdict(Verdict::Goto(chain)) => return RuleOutcome::Call(chain, false),
            other => match other.xt_target().as_deref() {
                Some("DROP" | "REJECT") if understood => return RuleOutcome::Drop,
                Some("MASQUERADE" | "MARK" | "CONNMARK" | "LOG" | "NFLOG") => true,
                _ => other.xt_match().is_some_and(|name| name == "comment"),
            },
        };
        understood &= known;
    }
    // A rule that can't be understood may have a verdict in a map.
    if understood || !decides(rule) { RuleOutcome::Next } else { RuleOutcome::Unknown }
}

/// Whether a rule may end the chain.
fn decides(rule: &Rule) -> bool {
    rule.exprs.iter().any(|expr| {
        matches!(expr, Expr::Verdict(_) | Expr::Reject { .. } | Expr::Lookup { .. })
            || expr.xt_target().is_some()
    })
}

fn holds(op: Op, value: &[u8], data: &[u8]) -> bool {
    match op {
        Op::Eq => value == data,
        Op::Ne => value != data,
        Op::Lt => value < data,
        Op::Le => value <= data,
        Op::Gt => value > data,
        Op::Ge => value >= data,
    }
}

fn meta(key: MetaKey, packet: &Packet) -> Option<Vec<u8>> {
    let v6 = packet.source.is_ipv6();
    Some(match key {
        MetaKey::InIndex => packet.input.1.to_ne_bytes().into(),
        MetaKey::OutIndex => packet.output.1.to_ne_bytes().into(),
        MetaKey::InName => padded_name(&packet.input.0),
        MetaKey::OutName => padded_name(&packet.output.0),
        MetaKey::NfProto => vec![if v6 { 10 } else { 2 }],
        MetaKey::L4Proto => vec![protocol(packet)],
        MetaKey::EtherType => if v6 { [0x86, 0xdd] } else { [8, 0] }.into(),
        MetaKey::Mark => vec![0; 4],
    })
}

fn protocol(packet: &Packet) -> u8 {
    match (packet.udp, packet.source) {
        (Some(_), _) => UDP,
        (None, IpAddr::V4(_)) => 1,
        (None, IpAddr::V6(_)) => 58,
    }
}

/// The parts of headers that are known: addresses, protocol, destination port.
fn payload(header: PayloadBase, offset: u32, len: u32, packet: &Packet) -> Option<Vec<u8>> {
    let (offset, len) = (offset as usize, len as usize);
    let (base, bytes) = match (header, packet.source, packet.destination) {
        (PayloadBase::Network, IpAddr::V4(_), _) if (offset, len) == (9, 1) => (9, vec![protocol(packet)]),
        (PayloadBase::Network, IpAddr::V6(_), _) if (offset, len) == (6, 1) => (6, vec![protocol(packet)]),
        (PayloadBase::Network, IpAddr::V4(source), IpAddr::V4(destination)) => {
            (12, [source.octets(), destination.octets()].concat())
        }
        (PayloadBase::Network, IpAddr::V6(source), IpAddr::V6(destination)) => {
            (8, [source.octets(), destination.octets()].concat())
        }
        (PayloadBase::Transport, ..) => (2, packet.udp?.to_be_bytes().into()),
        _ => return None,
    };
    bytes.get(offset.checked_sub(base)?..)?.get(..len).map(<[u8]>::to_vec)
}

/// Of a new connection.
fn conntrack(key: CtKey) -> Option<Vec<u8>> {
    match key {
        CtKey::State => Some(CtState::NEW.to_ne_bytes().into()),
        CtKey::Direction => Some(vec![0]),
        CtKey::Mark => Some(vec![0; 4]),
    }
}

/// 16 registers of four bytes, of which the known ones are followed.
#[derive(Default)]
struct Registers([Option<[u8; 4]>; 16]);

impl Registers {
    /// Fills registers from `to` on; whether the value is known.
    fn load(&mut self, to: Reg, value: Option<Vec<u8>>) -> bool {
        let first = usize::from(to.0);
        let Some(value) = value else {
            self.0.iter_mut().skip(first).for_each(|register| *register = None);
            return false;
        };
        for (register, chunk) in self.0.iter_mut().skip(first).zip(value.chunks(4)) {
            let mut bytes = [0; 4];
            bytes[..chunk.len()].copy_from_slice(chunk);
            *register = Some(bytes);
        }
        true
    }

    fn get(&self, from: Reg, len: usize) -> Option<Vec<u8>> {
        let first = usize::from(from.0);
        let registers = self.0.get(first..first + len.div_ceil(4))?;
        let all: Option<Vec<[u8; 4]>> = registers.iter().copied().collect();
        let mut bytes = all?.concat();
        bytes.truncate(len);
        Some(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nft::matches::Field;
    use crate::nft::matches::{
        accept, counter, ct_state, destination, destination_port, drop, goto, in_name, in_set, jump,
        protocol, source,
    };
    use crate::nft::{Base, TableId};

    fn tunnel() -> Packet {
        Packet {
            passage: Passing::In,
            input: ("eth0".into(), 2),
            output: (String::new(), 0),
            source: "192.0.2.7".parse().unwrap(),
            destination: "192.0.2.1".parse().unwrap(),
            udp: Some(8472),
        }
    }

    fn pod() -> Packet {
        Packet {
            passage: Passing::Through,
            input: ("cni0".into(), 4),
            output: ("flannel.1".into(), 3),
            source: "10.244.1.2".parse().unwrap(),
            destination: "10.244.7.2".parse().unwrap(),
            udp: None,
        }
    }

    fn in_index(index: u32) -> Vec<Expr> {
        let load = Expr::Meta { key: MetaKey::InIndex, to: Reg(0) };
        vec![load, Expr::Cmp { from: Reg(0), op: Op::Eq, data: index.to_ne_bytes().into() }]
    }

    fn rules(parts: Vec<Vec<Vec<Expr>>>) -> Vec<Rule> {
        (10..).zip(parts).map(|(handle, part)| Rule { handle: Some(handle), ..Rule::new(part) }).collect()
    }

    fn found(hook: Hook, policy: Policy, parts: Vec<Vec<Vec<Expr>>>, more: Vec<Chain>) -> Ruleset {
        let base = Base { policy, ..Base::filter(hook, 0) };
        let mut chains = vec![Chain { rules: rules(parts), ..Chain::base("BASE", base) }];
        chains.extend(more);
        Ruleset { tables: vec![Table { chains, ..Table::new(TableId::new(TableFamily::Inet, "fw")) }] }
    }

    fn place_of(found: &Ruleset, hook: Hook, packet: &Packet) -> Option<(String, Option<usize>)> {
        blocked(found, hook, packet).map(|blocking| (blocking.chain, blocking.rule))
    }

    #[test]
    fn a_policy_of_drop_without_an_accept_for_the_tunnel_is_named() {
        let mut parts = vec![
            vec![ct_state(CtState::ESTABLISHED | CtState::RELATED), accept()],
            vec![in_name(Op::Eq, "lo"), accept()],
            vec![in_index(1), accept()],
            vec![protocol(Op::Eq, 6), destination_port(Op::Eq, 22), accept()],
        ];
        let closed = found(Hook::Input, Policy::Drop, parts.clone(), vec![]);
        assert_eq!(place_of(&closed, Hook::Input, &tunnel()), Some(("BASE".into(), None)));
        parts.push(vec![protocol(Op::Eq, UDP), destination_port(Op::Eq, 8472), accept()]);
        assert_eq!(place_of(&found(Hook::Input, Policy::Drop, parts, vec![]), Hook::Input, &tunnel()), None);
    }

    #[test]
    fn a_rule_that_drops_pods_is_named_with_its_chain_and_place() {
        let net = |text: &str| text.parse().unwrap();
        let parts = vec![vec![counter(), source(Op::Eq, net("10.9.0.0/16")), drop()], vec![jump("ZONE")]];
        let zone = |part| Chain {
            rules: rules(vec![vec![in_name(Op::Eq, "docker0"), drop()], part]),
            ..Chain::regular("ZONE")
        };
        for (part, expected) in [
            (
                vec![destination(Op::Eq, net("10.244.0.0/16")), counter(), drop()],
                Some(("ZONE".to_owned(), Some(2))),
            ),
            (vec![destination(Op::Eq, net("10.244.0.0/20")), drop()], Some(("ZONE".to_owned(), Some(2)))),
            (vec![destination(Op::Eq, net("10.244.16.0/20")), drop()], None),
            (
                vec![in_name(Op::Eq, "cni*"), vec![Expr::Reject { kind: 0, code: 1 }]],
                Some(("ZONE".to_owned(), Some(2))),
            ),
            (vec![goto("nowhere")], None),
        ] {
            let all = found(Hook::Forward, Policy::Accept, parts.clone(), vec![zone(part)]);
            assert_eq!(place_of(&all, Hook::Forward, &pod()), expected);
        }
    }

    #[test]
    fn what_is_not_understood_is_not_accused() {
        let unknown = vec![Expr::Unknown { name: "fib".into(), bytes: vec![] }];
        for parts in [
            vec![vec![unknown.clone(), drop()]],
            vec![vec![in_set(&[Field::Source(subnet::Family::V4)], "blocked"), drop()]],
            vec![vec![unknown, accept()], vec![drop()]],
        ] {
            let all = found(Hook::Forward, Policy::Accept, parts, vec![]);
            assert_eq!(place_of(&all, Hook::Forward, &pod()), None);
        }
    }

    #[test]
    fn chains_of_other_hooks_and_families_do_not_count() {
        let all = found(Hook::Forward, Policy::Accept, vec![vec![drop()]], vec![]);
        assert_eq!(place_of(&all, Hook::Input, &tunnel()), None);
        let mut v6 = all.clone();
        v6.tables[0].id = TableId::new(TableFamily::Ip6, "fw");
        assert_eq!(place_of(&v6, Hook::Forward, &pod()), None);
        let mut ours = all;
        ours.tables[0].id.name = POLICY_TABLE.to_owned();
        assert_eq!(place_of(&ours, Hook::Forward, &pod()), None);
    }
}
