//! What a table of nftables does to a packet, step by step, without a kernel.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use subnet::Family;

use super::Packet;
use crate::nft::matches::TCP;
use crate::nft::{
    Chain, CtKey, CtState, Data, Expr, Lookup, MetaKey, Op, PayloadBase, Rule, Set, Span, Table, Verdict,
    set_flags,
};
use crate::policy::{Edit, Plan, TableStep};

/// What connection tracking knows about a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connection {
    /// Bits of [`CtState`].
    pub state: u32,
    /// Whether the packet goes against the direction of the first one.
    pub reply: bool,
    /// The connection's mark.
    pub mark: u32,
}

impl Connection {
    /// That of a first packet.
    pub const NEW: Self = Self { state: CtState::NEW, reply: false, mark: 0 };
}

/// What became of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It passes, and its connection has this mark.
    Accepted(u32),
    /// It is dropped.
    Dropped,
}

/// A table, prepared for many packets.
pub struct Interpreter<'a> {
    chains: HashMap<&'a str, &'a Chain>,
    sets: HashMap<&'a str, &'a Set>,
}

struct Run<'a> {
    registers: [u8; 64],
    family: Family,
    protocol: u8,
    network: Vec<u8>,
    transport: Vec<u8>,
    connection: &'a mut Connection,
}

/// How a chain ended without a verdict about the packet.
enum End {
    Decided(bool),
    Returned,
}

impl<'a> Interpreter<'a> {
    /// # Panics
    /// When an object is there twice.
    pub fn new(table: &'a Table) -> Self {
        let chains: HashMap<_, _> = table.chains.iter().map(|chain| (chain.name.as_str(), chain)).collect();
        let sets: HashMap<_, _> = table.sets.iter().map(|set| (set.name.as_str(), set)).collect();
        assert_eq!((chains.len(), sets.len()), (table.chains.len(), table.sets.len()), "names are unique");
        Self { chains, sets }
    }

    /// Runs the base chain `chain`; the TCP flags are those of a first packet, or of an answer.
    ///
    /// # Panics
    /// When the table has something that this interpreter doesn't know, or leads to what is not there.
    pub fn run(&self, chain: &str, packet: &Packet, connection: Connection) -> Outcome {
        self.run_with(chain, packet, connection, if connection.reply { 0x12 } else { 0x02 })
    }

    /// The same with these TCP flags.
    ///
    /// # Panics
    /// As [`Self::run`].
    pub fn run_with(
        &self,
        chain: &str,
        packet: &Packet,
        mut connection: Connection,
        tcp_flags: u8,
    ) -> Outcome {
        let mut run = Run {
            registers: [0; 64],
            family: Family::of(packet.source),
            protocol: packet.protocol,
            network: network_header(packet),
            transport: transport_header(packet, tcp_flags),
            connection: &mut connection,
        };
        match self.chain(chain, &mut run, 0) {
            End::Decided(false) => Outcome::Dropped,
            End::Decided(true) | End::Returned => Outcome::Accepted(connection.mark),
        }
    }

    /// How many rules and elements there are on all ways through the table that begin with the base chain `chain`, those that
    /// ways have in common counted once for each: what the kernel goes through when a chain or a verdict changes.
    ///
    /// # Panics
    /// As [`Self::run`].
    pub fn steps_of_all_ways(&self, chain: &str) -> u64 {
        self.steps_from(chain, &mut HashMap::new())
    }

    fn steps_from(&self, name: &str, known: &mut HashMap<String, u64>) -> u64 {
        if let Some(steps) = known.get(name) {
            return *steps;
        }
        let mut steps = 0;
        let exprs = self.chains[name].rules.iter().flat_map(|rule| &rule.exprs);
        for expr in exprs {
            let next: Vec<&Verdict> = match expr {
                Expr::Verdict(verdict) => vec![verdict],
                Expr::Lookup { set, mode: Lookup::Verdict, .. } => {
                    let data = self.sets[set.as_str()].elements.values().flatten();
                    data.filter_map(
                        |data| if let Data::Verdict(verdict) = data { Some(verdict) } else { None },
                    )
                    .collect()
                }
                _ => Vec::new(),
            };
            steps += 1 + next.len() as u64;
            for verdict in next {
                if let Verdict::Jump(to) | Verdict::Goto(to) = verdict {
                    steps += self.steps_from(to, known);
                }
            }
        }
        known.insert(name.to_owned(), steps);
        steps
    }

    fn chain(&self, name: &str, run: &mut Run<'_>, depth: usize) -> End {
        assert!(depth < 16, "the kernel allows no more than 16 jumps");
        let chain = self.chains.get(name).unwrap_or_else(|| panic!("no chain {name}"));
        for rule in &chain.rules {
            match self.rule(rule, run) {
                None => {}
                Some(Verdict::Accept) => return End::Decided(true),
                Some(Verdict::Drop) => return End::Decided(false),
                Some(Verdict::Return) => return End::Returned,
                Some(Verdict::Goto(next)) => return self.chain(&next, run, depth + 1),
                Some(Verdict::Jump(next)) => {
                    if let End::Decided(accepted) = self.chain(&next, run, depth + 1) {
                        return End::Decided(accepted);
                    }
                }
                Some(other) => panic!("{other:?}"),
            }
        }
        End::Returned
    }

    fn rule(&self, rule: &Rule, run: &mut Run<'_>) -> Option<Verdict> {
        for expr in &rule.exprs {
            match expr {
                Expr::Verdict(verdict) => return Some(verdict.clone()),
                Expr::Lookup { set, from, mode } => {
                    let set = self.sets.get(set.as_str()).unwrap_or_else(|| panic!("no set {set}"));
                    let key = run.load(from.0, set.key.len() as usize).to_vec();
                    let found = find(set, &key);
                    match (mode, found) {
                        (Lookup::In, Some(_)) | (Lookup::NotIn, None) => {}
                        (Lookup::In, None) | (Lookup::NotIn, Some(_)) | (Lookup::Verdict, None) => {
                            return None;
                        }
                        (Lookup::Verdict, Some(data)) => match data {
                            Some(Data::Verdict(verdict)) => return Some(verdict.clone()),
                            other => panic!("{other:?}"),
                        },
                    }
                }
                other => {
                    if !run.step(other) {
                        return None;
                    }
                }
            }
        }
        None
    }
}

impl Run<'_> {
    fn load(&self, register: u8, len: usize) -> &[u8] {
        let start = usize::from(register) * 4;
        &self.registers[start..start + len]
    }

    fn store(&mut self, register: u8, bytes: &[u8]) {
        let start = usize::from(register) * 4;
        let end = start + bytes.len().next_multiple_of(4);
        self.registers[start..end].fill(0);
        self.registers[start..start + bytes.len()].copy_from_slice(bytes);
    }

    /// Whether the rule goes on.
    fn step(&mut self, expr: &Expr) -> bool {
        match expr {
            // A limit that is not reached lets the rule go on.
            Expr::Counter { .. } | Expr::Limit(_) | Expr::Log { .. } => {}
            Expr::Meta { key: MetaKey::NfProto, to } => {
                let number = if self.family == Family::V4 { 2 } else { 10 };
                self.store(to.0, &[number]);
            }
            Expr::Meta { key: MetaKey::L4Proto, to } => self.store(to.0, &[self.protocol]),
            Expr::Payload { header, offset, len, to } => {
                let bytes = match header {
                    PayloadBase::Network => &self.network,
                    PayloadBase::Transport => &self.transport,
                    PayloadBase::Link => panic!("no link header here"),
                };
                let range = *offset as usize..(*offset + *len) as usize;
                let Some(bytes) = bytes.get(range).map(<[u8]>::to_vec) else { return false };
                self.store(to.0, &bytes);
            }
            Expr::Ct { key, to } => match key {
                CtKey::State => self.store(to.0, &self.connection.state.to_ne_bytes()),
                CtKey::Direction => self.store(to.0, &[u8::from(self.connection.reply)]),
                CtKey::Mark => self.store(to.0, &self.connection.mark.to_ne_bytes()),
            },
            // A unicast address of another host.
            Expr::SourceType { to } => self.store(to.0, &1u32.to_ne_bytes()),
            Expr::SetCtMark { from } => {
                let mark = self.load(from.0, 4);
                self.connection.mark = u32::from_ne_bytes([mark[0], mark[1], mark[2], mark[3]]);
            }
            Expr::Bitwise { from, to, mask, xor } => {
                let value = self.load(from.0, mask.len()).iter().zip(mask).zip(xor);
                let value: Vec<u8> = value.map(|((value, mask), xor)| value & mask ^ xor).collect();
                self.store(to.0, &value);
            }
            Expr::Cmp { from, op, data } => {
                let value = self.load(from.0, data.len());
                return match op {
                    Op::Eq => value == data,
                    Op::Ne => value != data,
                    Op::Lt => value < data.as_slice(),
                    Op::Le => value <= data.as_slice(),
                    Op::Gt => value > data.as_slice(),
                    Op::Ge => value >= data.as_slice(),
                };
            }
            other => panic!("{other:?}"),
        }
        true
    }
}

fn network_header(packet: &Packet) -> Vec<u8> {
    let mut header = match packet.source {
        IpAddr::V4(_) => vec![0; 12],
        IpAddr::V6(_) => vec![0; 8],
    };
    for address in [packet.source, packet.destination] {
        match address {
            IpAddr::V4(v4) => header.extend(v4.octets()),
            IpAddr::V6(v6) => header.extend(v6.octets()),
        }
    }
    header
}

/// That of ICMP begins with the type, which is an echo request's.
fn transport_header(packet: &Packet, tcp_flags: u8) -> Vec<u8> {
    let mut header = vec![0; 20];
    match packet.protocol {
        1 => header[0] = 8,
        58 => header[0] = 128,
        _ => {
            header[..2].copy_from_slice(&packet.source_port.to_be_bytes());
            header[2..4].copy_from_slice(&packet.destination_port.to_be_bytes());
        }
    }
    if packet.protocol == TCP {
        header[13] = tcp_flags;
    }
    header
}

fn find<'a>(set: &'a Set, key: &[u8]) -> Option<&'a Option<Data>> {
    if set.flags & set_flags::INTERVAL == 0 {
        return set.elements.get(&Span { from: key.into(), to: key.into() });
    }
    // Each field begins at a register of its own.
    let mut bounds = Vec::new();
    let mut at = 0;
    for len in &set.key.fields {
        bounds.push(at..at + *len as usize);
        at += (*len as usize).next_multiple_of(4);
    }
    let inside = |span: &Span| {
        bounds
            .iter()
            .all(|field| (&span.from[field.clone()]..=&span.to[field.clone()]).contains(&&key[field.clone()]))
    };
    set.elements.iter().find(|(span, _)| inside(span)).map(|(_, data)| data)
}

/// Carries out a plan on a table that is a value, as strictly as the kernel would. `None` is no table.
///
/// # Panics
/// When the kernel would refuse.
pub fn apply(table: Option<Table>, plan: &Plan, empty: &Table) -> Option<Table> {
    let mut table = match plan.table {
        TableStep::Keep => table,
        TableStep::Add => {
            assert_eq!(table, None, "a table that is there is not made");
            Some(empty.clone())
        }
        TableStep::Replace => Some(empty.clone()),
        TableStep::Remove => None,
    };
    if plan.edits.is_empty() {
        return table;
    }
    let target = table.as_mut().expect("edits need a table");
    let mut chains: BTreeMap<String, Chain> =
        target.chains.drain(..).map(|one| (one.name.clone(), one)).collect();
    let mut sets: BTreeMap<String, Set> = target.sets.drain(..).map(|one| (one.name.clone(), one)).collect();
    for edit in &plan.edits {
        one(edit, &mut chains, &mut sets);
    }
    target.chains = chains.into_values().collect();
    target.sets = sets.into_values().collect();
    table
}

fn one(edit: &Edit, chains: &mut BTreeMap<String, Chain>, sets: &mut BTreeMap<String, Set>) {
    match edit {
        Edit::AddChain(chain) => {
            let bare = Chain { rules: Vec::new(), ..Chain::clone(chain) };
            assert!(chains.insert(chain.name.clone(), bare).is_none(), "{edit:?}");
        }
        Edit::AddSet(set) => add_set(set, chains, sets),
        Edit::AddKeys(set, keys) => {
            let keys = keys.chunks_exact(set.key.len() as usize);
            let spans = keys.map(|key| Span { from: key.into(), to: key.into() });
            add_set(&set.clone().with(spans), chains, sets);
        }
        Edit::AddRules(chain) | Edit::Rules(chain) => {
            for expr in chain.rules.iter().flat_map(|rule| &rule.exprs) {
                match expr {
                    Expr::Lookup { set, .. } => assert!(sets.contains_key(set), "no set {set}"),
                    Expr::Verdict(Verdict::Jump(to) | Verdict::Goto(to)) => {
                        assert!(chains.contains_key(to), "no chain {to}");
                    }
                    _ => {}
                }
            }
            let known = chains.get_mut(&chain.name).expect("a chain that is there");
            assert!(matches!(edit, Edit::Rules(_)) || known.rules.is_empty(), "{} has rules", chain.name);
            known.rules.clone_from(&chain.rules);
        }
        Edit::DeleteElements(part) => {
            let set = sets.get_mut(&part.name).expect("a set that is there");
            for (key, data) in &part.elements {
                assert_eq!(set.elements.remove(key).as_ref(), Some(data), "{key:?} in {}", part.name);
            }
        }
        Edit::AddElements(part) => {
            leads(chains, part.elements.values());
            let set = sets.get_mut(&part.name).expect("a set that is there");
            for (key, data) in &part.elements {
                assert_eq!(set.elements.insert(key.clone(), data.clone()), None, "{key:?} in {}", part.name);
            }
            assert!(
                set.size.is_none_or(|size| set.elements.len() <= size as usize),
                "{} is too small",
                set.name
            );
        }
        Edit::Empty(name) => chains.get_mut(name).expect("a chain that is there").rules.clear(),
        Edit::DeleteMap(name) | Edit::DeleteSet(name) => {
            let used = |rule: &Rule| {
                rule.exprs.iter().any(|expr| matches!(expr, Expr::Lookup { set, .. } if set == name))
            };
            assert!(!chains.values().flat_map(|chain| &chain.rules).any(used), "{name} is in use");
            assert!(sets.remove(name).is_some(), "no set {name}");
        }
        Edit::DeleteChain(name) => delete_chain(name, chains, sets),
    }
}

fn delete_chain(name: &str, chains: &mut BTreeMap<String, Chain>, sets: &BTreeMap<String, Set>) {
    let to = |verdict: &Verdict| matches!(verdict, Verdict::Jump(to) | Verdict::Goto(to) if to == name);
    let rules = chains.values().flat_map(|chain| &chain.rules).flat_map(|rule| &rule.exprs);
    assert!(
        !rules.clone().any(|expr| matches!(expr, Expr::Verdict(verdict) if to(verdict))),
        "{name} is in use"
    );
    let data = sets.values().flat_map(|set| set.elements.values());
    assert!(
        !data.clone().any(|data| matches!(data, Some(Data::Verdict(verdict)) if to(verdict))),
        "{name} is in use"
    );
    assert!(chains.remove(name).expect("a chain that is there").rules.is_empty());
}

fn add_set(set: &Set, chains: &BTreeMap<String, Chain>, sets: &mut BTreeMap<String, Set>) {
    leads(chains, set.elements.values());
    assert!(set.size.is_none_or(|size| set.elements.len() <= size as usize), "{} is too small", set.name);
    assert!(sets.insert(set.name.clone(), set.clone()).is_none(), "{} is there", set.name);
}

fn leads<'a>(chains: &BTreeMap<String, Chain>, verdicts: impl Iterator<Item = &'a Option<Data>>) {
    for data in verdicts {
        if let Some(Data::Verdict(Verdict::Jump(to) | Verdict::Goto(to))) = data {
            assert!(chains.contains_key(to), "no chain {to}");
        }
    }
}
