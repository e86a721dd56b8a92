//! Observe, diff, apply, until the kernel is as it should be.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::diff::{conflicts, diff};
use crate::kernel::{Kernel, KernelError, Observed, Scope};
use crate::state::{Change, KernelState};

/// A kernel has side effects that no model knows: setting a MAC flushes neighbours, taking the last
/// address flushes routes. A second round repairs what the first one broke; a third is for bad luck.
const ROUNDS: usize = 3;

/// What a run of [`converge`] did.
#[derive(Debug, Default)]
pub struct Report {
    /// The changes made, in order.
    pub applied: Vec<Change>,
    /// The changes that the kernel refused in the last round.
    pub failed: Vec<KernelError>,
    /// Wanted routes that the host's own addresses stand in the way of.
    pub conflicts: Vec<String>,
    /// Whether the kernel was found to be as desired at the end, but for failures and conflicts.
    pub settled: bool,
    /// The kernel as last read: before the changes if the run had only one round.
    pub observed: Observed,
}

/// Makes the kernel agree with `desired`. Failures of single changes are in the report.
///
/// # Errors
/// [`KernelError`] when the kernel can't be read at all.
pub fn converge<K: Kernel>(
    kernel: &mut K,
    desired: &KernelState,
    scope: &Scope,
) -> Result<Report, KernelError> {
    let mut report = Report::default();
    for _ in 0..ROUNDS {
        let observed = kernel.observe(desired, scope)?;
        let mut changes = diff(desired, &observed.state);
        report.conflicts = conflicts(desired, &observed.state);
        report.observed = observed;
        if changes.is_empty() {
            report.failed.clear();
            report.settled = true;
            return Ok(report);
        }
        let failures = kernel.apply(&changes);
        let refused = failures.len();
        for (index, _) in failures.iter().rev() {
            changes.remove(*index);
        }
        let progress = !changes.is_empty();
        report.applied.append(&mut changes);
        report.failed = failures.into_iter().map(|(_, error)| error).collect();
        if refused > 0 && !progress {
            return Ok(report);
        }
    }
    Ok(report)
}

/// Notices when the same object has to be put right again and again: somebody else changes it back.
#[derive(Debug, Default)]
pub struct Fights {
    since: Option<Instant>,
    rounds: BTreeMap<String, u32>,
}

impl Fights {
    /// More often than this within a minute is a fight.
    const TOLERATED: u32 = 5;
    /// Larger repairs are not somebody meddling with one object.
    const MOST: usize = 64;

    /// Begins anew: what is wanted has changed, so what is changed says nothing about others.
    pub fn forget(&mut self) {
        *self = Self::default();
    }

    /// Counts the changes of one run and returns those that are being fought over, each once a minute.
    pub fn record(&mut self, applied: &[Change], now: Instant) -> Vec<String> {
        if self.since.is_none_or(|since| now.duration_since(since) > Duration::from_secs(60)) {
            self.since = Some(now);
            self.rounds.clear();
        }
        if applied.len() > Self::MOST || self.rounds.len() > 16 * Self::MOST {
            return Vec::new();
        }
        let mut fought = Vec::new();
        for change in applied {
            let text = change.to_string();
            let rounds = self.rounds.entry(text.clone()).or_default();
            *rounds += 1;
            if *rounds == Self::TOLERATED + 1 {
                fought.push(text);
            }
        }
        fought
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::fake::FakeKernel;
    use crate::state::{ROUTE_PROTOCOL, Route};

    fn desired() -> KernelState {
        let dst = "10.1.2.0/24".parse().unwrap();
        let via = Some("192.0.2.2".parse().unwrap());
        let dev = Some("eth0".parse().unwrap());
        let route = Route { dst, via, dev, onlink: false, protocol: ROUTE_PROTOCOL, metric: 0, odd: false };
        KernelState { routes: [(dst, route)].into(), ..KernelState::default() }
    }

    #[test]
    fn a_refused_change_is_reported_and_made_later() {
        let mut kernel = FakeKernel::default();
        kernel.failing.insert("route", 101);
        let report = converge(&mut kernel, &desired(), &Scope::default()).unwrap();
        assert!(report.applied.is_empty() && !report.settled);
        assert!(report.failed[0].to_string().starts_with("route replace 10.1.2.0/24"), "{:?}", report.failed);

        kernel.failing.clear();
        let report = converge(&mut kernel, &desired(), &Scope::default()).unwrap();
        assert!(report.failed.is_empty() && report.settled);
        assert_eq!(report.applied.len(), 1);
    }

    #[test]
    fn a_kernel_that_is_right_is_read_once_and_left_alone() {
        let mut kernel = FakeKernel::new(desired());
        let report = converge(&mut kernel, &desired(), &Scope::default()).unwrap();
        assert!(report.applied.is_empty() && report.settled);
        assert_eq!(kernel.observed, 1);
    }

    #[test]
    fn somebody_who_undoes_our_work_is_noticed_once_a_minute() {
        let (mut fights, start) = (Fights::default(), Instant::now());
        let change = diff(&desired(), &KernelState::default());
        let mut noticed = 0;
        for second in 0..90 {
            noticed += fights.record(&change, start + Duration::from_secs(second)).len();
        }
        assert_eq!(noticed, 2);
    }
}
