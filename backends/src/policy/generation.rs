//! Generations: which connections were judged by the rules that are in force.
//!
//! Accepting a connection writes the generation into a byte of its mark. A change that may take a right away
//! raises the number, so each connection is judged once more with its client's next packet. Replies are not
//! judged: those of a generation that was superseded a moment ago pass for a while, so that a connection that
//! is still allowed doesn't stall until its client speaks.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::nft::matches::{accept, ct_mark_bits};
use crate::nft::{Chain, Expr, KeyType, Op, Rule, Set, Span, Table};

/// The base chain that judges what passes through this node; its first rule holds the number.
pub(super) const FORWARD: &str = "forward";

/// The same for what IPVS sends on: it is taken in and sent out again, with the address of the pod behind the Service.
pub(super) const OUTPUT: &str = "output";

/// How long replies of a superseded generation pass, and with it those of connections that only the server speaks on.
pub const REPLIES_PASS: Duration = Duration::from_secs(30);
/// How often the generation is raised at most.
pub const RAISE_INTERVAL: Duration = Duration::from_secs(1);
/// After so many raises, marks older than the last [`REPLIES_PASS`] have to be taken off connections: see
/// [`Generations::walk_due`].
const WALK_AFTER: u32 = 200;

/// The generation in force, and those before it.
#[derive(Clone, Debug)]
pub struct Generations {
    /// The byte of the mark: bits from this one on.
    shift: u32,
    number: u8,
    /// Superseded ones, until when their replies pass.
    fresh: BTreeMap<u8, Instant>,
    raised: Option<Instant>,
    raises: u32,
}

/// The mark of connections that were never judged.
const NEVER: u8 = 0;

impl Generations {
    /// The first generation on a node without tables: replies of connections from before pass for a while.
    pub fn first(shift: u32, random: u8, now: Instant) -> Self {
        let number = random.max(1);
        Self { shift, number, fresh: [(NEVER, now + REPLIES_PASS)].into(), raised: None, raises: 0 }
    }

    /// The generation of tables that an earlier run left.
    pub fn adopt(shift: u32, found: &Table, now: Instant) -> Option<Self> {
        let chain = found.chain(FORWARD)?;
        let number = generation_of(chain, shift)?;
        let byte =
            |span: &Span| span.from.first_chunk().map(|mark| (u32::from_ne_bytes(*mark) >> shift) as u8);
        let fresh = found.set(&set_name(number)).into_iter().flat_map(|set| &set.lifetimes);
        let fresh = fresh.filter_map(|(span, left)| Some((byte(span)?, now + *left))).collect();
        // How often it was raised before isn't known, so a walk comes rather too early.
        Some(Self { shift, number, fresh, raised: None, raises: WALK_AFTER / 2 })
    }

    /// Raises the number, unless that was done a moment ago: then says when it may be.
    pub(super) fn raise(&mut self, now: Instant) -> Result<(), Instant> {
        if let Some(last) = self.raised
            && now < last + RAISE_INTERVAL
        {
            return Err(last + RAISE_INTERVAL);
        }
        self.fresh.retain(|_, until| *until > now);
        self.fresh.insert(self.number, now + REPLIES_PASS);
        self.fresh.insert(NEVER, now + REPLIES_PASS);
        self.number = self.number.checked_add(1).unwrap_or(1);
        self.fresh.remove(&self.number);
        self.raised = Some(now);
        self.raises += 1;
        Ok(())
    }

    /// Whether marks of connections have to be taken off before a number comes round: all but those that
    /// [`Self::keeps`] keeps.
    pub fn walk_due(&self) -> bool {
        self.raises >= WALK_AFTER
    }

    /// Whether a connection's mark is of a generation in force, or one that was a moment ago.
    pub fn keeps(&self, mark: u32, now: Instant) -> bool {
        let byte = (mark >> self.shift) as u8;
        byte == self.number || self.fresh.get(&byte).is_some_and(|until| *until > now)
    }

    /// The walk is done.
    pub fn walked(&mut self) {
        self.raises = 0;
    }

    /// The bits of the mark that hold the number.
    pub fn mask(&self) -> u32 {
        0xff << self.shift
    }

    /// The number in its place.
    pub fn mark(&self) -> u32 {
        u32::from(self.number) << self.shift
    }

    /// The number.
    pub fn number(&self) -> u8 {
        self.number
    }

    pub(super) fn set_name(&self) -> String {
        set_name(self.number)
    }

    /// The set of generations whose replies pass. Each generation has its own, because an element's time can't be
    /// prolonged.
    pub(super) fn fresh_set(&self, now: Instant) -> Set {
        let alive = self.fresh.iter().filter(|(_, until)| **until > now);
        Set::new(self.set_name(), &[KeyType::Mark]).with_lifetimes(
            alive.map(|(number, until)| (Span::mark(u32::from(*number) << self.shift), *until - now)),
        )
    }
}

/// The generation that a forward chain lets pass.
fn generation_of(forward: &Chain, shift: u32) -> Option<u8> {
    let Expr::Cmp { data, .. } = forward.rules.first()?.exprs.get(2)? else { return None };
    let mark = u32::from_ne_bytes(data.as_slice().try_into().ok()?);
    let number = (mark >> shift) as u8;
    let rule = Rule::new([ct_mark_bits(0xff << shift, Op::Eq, u32::from(number) << shift), accept()]);
    (number != 0 && rule.exprs == forward.rules.first()?.exprs).then_some(number)
}

fn set_name(number: u8) -> String {
    format!("fresh-{number}")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHIFT: u32 = 24;

    fn fresh(generations: &Generations, now: Instant) -> Vec<u8> {
        generations.fresh_set(now).elements.keys().map(|span| span.from[3].max(span.from[0])).collect()
    }

    #[test]
    fn replies_of_superseded_generations_pass_for_half_a_minute() {
        let start = Instant::now();
        let mut generations = Generations::first(SHIFT, 7, start);
        assert_eq!((generations.number(), fresh(&generations, start)), (7, vec![0]));
        let later = start + Duration::from_secs(29);
        generations.raise(later).unwrap();
        assert_eq!((generations.number(), fresh(&generations, later)), (8, vec![0, 7]));
        assert_eq!(generations.raise(later), Err(later + RAISE_INTERVAL));
        let later = later + REPLIES_PASS;
        assert_eq!(fresh(&generations, later), Vec::<u8>::new());
        assert!(generations.keeps(8 << SHIFT | 5, later) && !generations.keeps(7 << SHIFT, later));
    }

    #[test]
    fn a_number_comes_round_only_after_a_walk_was_asked_for() {
        let mut now = Instant::now();
        let mut generations = Generations::first(SHIFT, 255, now);
        for raises in 1..=255u32 {
            now += RAISE_INTERVAL;
            generations.raise(now).unwrap();
            assert_ne!(generations.number(), 0);
            assert_eq!(generations.walk_due(), raises >= WALK_AFTER);
            assert!(!fresh(&generations, now).contains(&generations.number()));
        }
        assert_eq!(generations.number(), 255);
        generations.walked();
        assert!(!generations.walk_due());
    }
}
