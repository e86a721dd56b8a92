//! Fights: the same thing has to be put right again and again because somebody else undoes it.
//!
//! One repair, or one a second by an impatient hand, is made at once. Only what is undone faster than that
//! for seconds is held back, for ever longer pauses: two programs that correct each other would otherwise
//! burn a processor and fill a log for good. One mechanism for all that is put right: changes to the kernel
//! and to traffic rules, each by its text.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// More often than this within a minute is a fight worth a warning.
const TOLERATED: u32 = 5;
/// Larger repairs are not somebody meddling with one object.
const MAX_CHANGES: usize = 64;
/// Things that are remembered at most.
const MAX_ENTRIES: usize = 16 * MAX_CHANGES;
/// Once in this time nothing is ever held back.
const SUSTAINED: Duration = Duration::from_millis(500);
/// So much faster than that, something has to be put right to be held back.
const BURST: u32 = 10;
/// The pauses, doubling from the first to the second.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// What stays as it is for this long is not fought over any more. The other one may be held back as long as this one,
/// and then goes on.
const CALM: Duration = Duration::from_secs(130);
const MINUTE: Duration = Duration::from_secs(60);

/// What is put right how often.
#[derive(Debug, Default)]
pub struct Fights(BTreeMap<String, Fight>);

#[derive(Debug)]
struct Fight {
    /// When the minute began in which repairs are counted, and their number.
    minute: (Instant, u32),
    last: Instant,
    total: u64,
    /// How much faster than [`SUSTAINED`] it was put right.
    debt: Duration,
    stage: FightStage,
}

/// How far it has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FightStage {
    /// Put right now and then.
    Counted,
    /// Undone more often than [`TOLERATED`]. It stays so if the other side is held back, whose pauses make both slow.
    Noted,
    /// Undone so fast that this pause follows each repair.
    HeldBack(Duration),
}

impl Fight {
    fn new(now: Instant) -> Self {
        Self { minute: (now, 0), last: now, total: 0, debt: Duration::ZERO, stage: FightStage::Counted }
    }

    fn until(&self) -> Option<Instant> {
        match self.stage {
            FightStage::HeldBack(pause) => Some(self.last + pause),
            FightStage::Counted | FightStage::Noted => None,
        }
    }

    fn is_over(&self, now: Instant) -> bool {
        let rest = if self.stage == FightStage::Counted { MINUTE } else { CALM };
        now.saturating_duration_since(self.last) > rest
    }

    /// One more repair. Says whether it is worth a line: the sixth in a minute, and each longer pause. From the
    /// longest pause on, it is only counted.
    fn repaired(&mut self, now: Instant) -> bool {
        let elapsed = now.saturating_duration_since(self.last);
        self.last = now;
        self.total += 1;
        if now.saturating_duration_since(self.minute.0) > MINUTE {
            self.minute = (now, 0);
        }
        self.minute.1 += 1;
        self.debt = self.debt.saturating_sub(elapsed) + SUSTAINED;
        if let FightStage::HeldBack(pause) = &mut self.stage {
            let longer = (2 * *pause).min(PAUSE.1);
            return std::mem::replace(pause, longer) < longer;
        }
        if self.debt > SUSTAINED * BURST {
            self.stage = FightStage::HeldBack(PAUSE.0);
        } else if self.minute.1 > TOLERATED {
            self.stage = FightStage::Noted;
        }
        self.minute.1 == TOLERATED + 1
    }
}

/// What there is to say about repairs.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Told {
    /// Repairs that need no line of their own: they were warned about, and are counted.
    pub quiet: BTreeSet<String>,
    /// A warning.
    pub warning: Option<String>,
}

impl Fights {
    /// Counts repairs, each by its text. Not for changes that follow a change of the desired state.
    pub fn record(&mut self, repairs: impl ExactSizeIterator<Item = String>, now: Instant) -> Told {
        self.0.retain(|_, entry| !entry.is_over(now));
        let mut told = Told::default();
        let mut more = 0;
        if repairs.len() > MAX_CHANGES || self.0.len() > MAX_ENTRIES {
            return told;
        }
        let mut seen = BTreeSet::new();
        for text in repairs {
            if !seen.insert(text.clone()) {
                continue;
            }
            let entry = self.0.entry(text.clone()).or_insert_with(|| Fight::new(now));
            let known = entry.stage != FightStage::Counted;
            if entry.repaired(now) {
                match told.warning {
                    None => told.warning = Some(sentence(&text, entry)),
                    Some(_) => more += 1,
                }
            }
            if known {
                told.quiet.insert(text);
            }
        }
        if let Some(warning) = told.warning.as_mut().filter(|_| more > 0) {
            *warning += &format!("; likewise {more} more, which /readyz?verbose lists");
        }
        told
    }

    /// What is not to be put right now.
    pub fn held(&self, now: Instant) -> BTreeSet<String> {
        let held = self.0.iter().filter(|(_, entry)| entry.until().is_some_and(|until| until > now));
        held.map(|(text, _)| text.clone()).collect()
    }

    /// How long until something that is held back may be put right.
    pub fn wait(&self, now: Instant) -> Option<Duration> {
        let waits = self.0.values().filter_map(Fight::until).filter(|until| *until > now);
        waits.min().map(|until| until - now)
    }

    /// What is fought over, in sentences.
    pub fn notes(&self, now: Instant) -> Vec<String> {
        let fought =
            self.0.iter().filter(|(_, entry)| entry.stage != FightStage::Counted && !entry.is_over(now));
        fought.map(|(text, entry)| sentence(text, entry)).collect()
    }
}

fn sentence(text: &str, entry: &Fight) -> String {
    let pause = match entry.stage {
        FightStage::HeldBack(pause) => {
            format!("; it was made {} times and waits {} s from now on", entry.total, pause.as_secs())
        }
        FightStage::Counted | FightStage::Noted => String::new(),
    };
    format!(
        "\"{text}\" was needed more than {TOLERATED} times within a minute: something else on this host undoes it \
         (another network agent, NetworkManager, a script){pause}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "route replace 10.1.2.0/24 via 192.0.2.2 dev eth0 proto 70";

    fn once(fights: &mut Fights, now: Instant) -> Told {
        fights.record([TEXT.to_owned()].into_iter(), now)
    }

    #[test]
    fn somebody_who_undoes_our_work_slowly_is_named_once_a_minute_and_never_waited_for() {
        let (mut fights, start) = (Fights::default(), Instant::now());
        let mut warnings = 0;
        for second in 0..90 {
            let now = start + Duration::from_secs(second);
            assert!(fights.held(now).is_empty());
            warnings += usize::from(once(&mut fights, now).warning.is_some());
        }
        assert_eq!(warnings, 2);
        assert!(fights.notes(start + Duration::from_secs(90))[0].contains(TEXT));
        assert!(fights.notes(start + Duration::from_secs(300)).is_empty());
    }

    #[test]
    fn the_side_that_is_not_held_back_tells_of_the_fight_as_long_as_it_lasts() {
        let (mut fights, start) = (Fights::default(), Instant::now());
        for tick in 0..8 {
            once(&mut fights, start + Duration::from_millis(50 * tick));
        }
        // From now on the other side waits for its longest pause each time.
        let mut now = start + Duration::from_secs(1);
        for _ in 0..20 {
            assert!(fights.notes(now)[0].contains(TEXT) && fights.held(now).is_empty());
            assert!(once(&mut fights, now).quiet.contains(TEXT));
            now += PAUSE.1 + Duration::from_secs(1);
        }
        assert!(fights.notes(now + CALM).is_empty());
    }

    #[test]
    fn twenty_repairs_a_second_become_one_a_minute_with_few_lines() {
        let (mut fights, start) = (Fights::default(), Instant::now());
        let (mut made, mut lines) = (Vec::new(), 0);
        for tick in 0..20 * 900 {
            let now = start + Duration::from_millis(50 * tick);
            if fights.held(now).is_empty() {
                let told = once(&mut fights, now);
                lines += usize::from(told.warning.is_some()) + usize::from(told.quiet.is_empty());
                made.push(now);
            }
        }
        assert!((20..=40).contains(&made.len()), "{} repairs in 15 minutes", made.len());
        let last = made[made.len() - 1] - made[made.len() - 2];
        assert!(last >= PAUSE.1 && last < PAUSE.1 + Duration::from_secs(1), "{last:?}");
        assert!(lines <= 14, "{lines} lines: none at all once the pause is as long as it gets");
        let now = *made.last().unwrap();
        assert!(fights.notes(now)[0].contains(TEXT), "{:?}", fights.notes(now));
        assert_eq!(fights.wait(now), Some(PAUSE.1));
    }

    #[test]
    fn two_that_hold_each_other_back_both_remember_it() {
        let (mut ours, mut theirs, start) = (Fights::default(), Fights::default(), Instant::now());
        let mut now = start;
        for _ in 0..60 {
            // The one that may act first undoes what the other one did.
            let waits = [&ours, &theirs].map(|side| side.wait(now).unwrap_or(Duration::from_millis(50)));
            let turn = if waits[0] <= waits[1] { &mut ours } else { &mut theirs };
            now += waits[0].min(waits[1]).max(Duration::from_millis(1));
            once(turn, now);
            let other = if waits[0] <= waits[1] { &mut theirs } else { &mut ours };
            now += other.wait(now).unwrap_or(Duration::from_millis(50));
            once(other, now);
        }
        assert!(now - start > Duration::from_secs(1000), "{:?}", now - start);
        for side in [&ours, &theirs] {
            assert!(side.notes(now)[0].contains("waits 60 s"), "{:?}", side.notes(now));
        }
    }

    #[test]
    fn a_fight_over_many_things_is_one_line_for_all_of_them_each_time() {
        let (mut fights, start) = (Fights::default(), Instant::now());
        let texts = || (0..40).map(|number| number.to_string()).collect::<Vec<_>>().into_iter();
        let mut warnings = Vec::new();
        for tick in 0..20 {
            warnings.extend(fights.record(texts(), start + Duration::from_millis(50 * tick)).warning);
        }
        assert!(warnings.iter().all(|line| line.contains("likewise 39 more")), "{warnings:?}");
        assert_eq!(fights.notes(start + Duration::from_secs(1)).len(), 40);
    }

    #[test]
    fn a_fight_that_is_over_is_forgotten() {
        let (mut fights, start) = (Fights::default(), Instant::now());
        for tick in 0..40 {
            once(&mut fights, start + Duration::from_millis(50 * tick));
        }
        let later = start + Duration::from_secs(400);
        assert!(fights.notes(later).is_empty() && fights.held(later).is_empty());
        assert_eq!(once(&mut fights, later), Told::default());
    }

    #[test]
    fn a_large_repair_is_no_fight() {
        let (mut fights, now) = (Fights::default(), Instant::now());
        for _ in 0..100 {
            let all = (0..=MAX_CHANGES).map(|number| number.to_string()).collect::<Vec<_>>();
            assert_eq!(fights.record(all.into_iter(), now), Told::default());
        }
        assert!(fights.held(now).is_empty());
    }
}
