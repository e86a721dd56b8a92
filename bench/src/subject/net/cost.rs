//! CPU time that a measurement takes: of the programs that take part, and of the whole machine.

use std::fs;
use std::time::Duration;

use anyhow::Context;
use bench::process::{cpu_time, cpu_time_of_children};

/// CPU time in seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Cost {
    /// Of the tasks of both iperf3 and of the agents. The kernel counts its work for packets that it does in
    /// an interrupt to the task that was interrupted, which may be any.
    pub(crate) tasks: f64,
    /// Of everything on this machine.
    pub(crate) machine: f64,
}

/// Measures from its start to its end; meanwhile nothing else than iperf3 may end that this process started.
pub(crate) struct Meter<'a> {
    agents: &'a [u32],
    tasks: Duration,
    machine: u64,
}

impl<'a> Meter<'a> {
    /// Starts with these agents.
    pub(crate) fn start(agents: &'a [u32]) -> anyhow::Result<Self> {
        Ok(Self { tasks: tasks(agents)?, machine: busy_ticks()?, agents })
    }

    /// What it took, once iperf3 has ended on both sides.
    pub(crate) fn stop(self) -> anyhow::Result<Cost> {
        let tasks = tasks(self.agents)?.saturating_sub(self.tasks).as_secs_f64();
        // USER_HZ is 100 on all architectures that we build for.
        let machine = busy_ticks()?.saturating_sub(self.machine) as f64 / 100.0;
        Ok(Cost { tasks, machine })
    }
}

/// Of children that were waited for, and of the agents so far.
fn tasks(agents: &[u32]) -> anyhow::Result<Duration> {
    let agents = agents.iter().map(|&agent| cpu_time(agent)).sum::<anyhow::Result<Duration>>()?;
    Ok(cpu_time_of_children()? + agents)
}

fn busy_ticks() -> anyhow::Result<u64> {
    let text = fs::read_to_string("/proc/stat").context("can't read /proc/stat")?;
    busy(&text).context("no sum of all CPUs in /proc/stat")
}

/// All but idle and waiting for a disk; the time of guests is part of user time already.
fn busy(stat: &str) -> Option<u64> {
    let line = stat.lines().next()?.strip_prefix("cpu ")?;
    let fields: Vec<u64> = line.split_whitespace().map_while(|field| field.parse().ok()).collect();
    let [user, nice, system, _idle, _wait, hard, soft, ..] = fields[..] else { return None };
    Some(user + nice + system + hard + soft)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_stolen_and_guests_time_is_none_of_ours() {
        assert_eq!(busy("cpu  1 2 4 1000 1000 8 16 1000 1000 1000\ncpu0 1 2\n"), Some(31));
        assert_eq!(busy("intr 5\n"), None);
    }

    #[test]
    fn a_child_that_worked_is_counted_when_it_has_ended() {
        let meter = Meter::start(&[]).unwrap();
        let work = "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done";
        std::process::Command::new("sh").args(["-c", work]).status().unwrap();
        assert!(meter.stop().unwrap().tasks > 0.01);
    }
}
