//! Echo requests from every pod to every other, a hundred a second each.

use std::time::Duration;

use anyhow::Context;
use backends::testing::{PingOptions, Pinger, Pings, Pod, wait_for};
use bench::bed::TIMEOUT;
use subnet::Family;

/// Requests are this far apart.
const INTERVAL: Duration = Duration::from_millis(10);
/// So many answers come before anything is changed.
const UNDISTURBED: u64 = 30;

/// Pings in all directions, of one family.
pub(crate) struct Mesh(Vec<Direction>);

/// From one pod to another, by their numbers.
struct Direction {
    ends: [usize; 2],
    pinger: Pinger,
}

/// What became of the requests.
pub(crate) struct Tally(Vec<([usize; 2], Pings)>);

impl Mesh {
    /// Starts them, and waits for the first answer of each.
    pub(crate) fn start(pods: &[Pod], family: Family) -> anyhow::Result<Self> {
        Self::start_with(pods, family, PingOptions::default())
    }

    /// The same with requests that differ from the ordinary.
    pub(crate) fn start_with(pods: &[Pod], family: Family, options: PingOptions) -> anyhow::Result<Self> {
        let mut directions = Vec::new();
        for (from, pod) in pods.iter().enumerate() {
            for (to, other) in pods.iter().enumerate().filter(|(to, _)| *to != from) {
                let target = other.addresses().iter().find(|net| Family::of(net.addr()) == family);
                let target = target.context("a pod without an address of this family")?.addr();
                let pinger = Pinger::start_with(pod.namespace(), target, options)?;
                directions.push(Direction { ends: [from, to], pinger });
            }
        }
        let mesh = Self(directions);
        mesh.wait(1)?;
        Ok(mesh)
    }

    /// Waits until they have run undisturbed for a moment.
    pub(crate) fn undisturbed(self) -> anyhow::Result<Self> {
        self.wait(UNDISTURBED)?;
        Ok(self)
    }

    fn wait(&self, answers: u64) -> anyhow::Result<()> {
        for Direction { ends: [from, to], pinger } in &self.0 {
            let what = format!("{answers} answers from pod {to} to pod {from}");
            wait_for(&what, TIMEOUT, || pinger.received() >= answers)?;
        }
        Ok(())
    }

    /// Waits for one more answer of each; no error when there is none, which the tally tells.
    pub(crate) fn again(&self) {
        for way in &self.0 {
            drop(way.pinger.wait_for_reply(TIMEOUT));
        }
    }

    /// Ends them all.
    pub(crate) fn finish(self) -> anyhow::Result<Tally> {
        let finish = |way: Direction| Ok((way.ends, way.pinger.finish()?));
        self.0.into_iter().map(finish).collect::<anyhow::Result<Vec<_>>>().map(Tally)
    }
}

impl Tally {
    /// Requests that were lost in all.
    pub(crate) fn lost(&self) -> u64 {
        self.0.iter().map(|(_, pings)| pings.lost).sum()
    }

    /// The most that one pod lost on the way to one other.
    pub(crate) fn most_lost(&self) -> u64 {
        self.0.iter().map(|(_, pings)| pings.lost).max().unwrap_or_default()
    }

    /// The longest time without an answer on any way, beyond the usual distance of two.
    pub(crate) fn silence(&self) -> Duration {
        let gaps = self.0.iter().map(|(_, pings)| pings.longest_gap);
        gaps.max().unwrap_or_default().saturating_sub(INTERVAL)
    }

    /// The ways that end or begin at one pod, and the others.
    pub(crate) fn split(self, pod: usize) -> (Self, Self) {
        let (with, without) = self.0.into_iter().partition(|(ends, _)| ends.contains(&pod));
        (Self(with), Self(without))
    }
}
