//! What there is to count about network policies, as Prometheus reads it.

use std::fmt::Write;
use std::time::Duration;

use backends::policy::Summary;

/// Upper bounds of the classes in which times are counted, in seconds.
const BOUNDS: [f64; 6] = [0.001, 0.005, 0.025, 0.1, 1.0, 5.0];

/// Times, counted by class.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Times {
    classes: [u64; BOUNDS.len()],
    count: u64,
    sum: Duration,
}

impl Times {
    fn add(&mut self, time: Duration) {
        for (class, bound) in self.classes.iter_mut().zip(BOUNDS) {
            *class += u64::from(time.as_secs_f64() <= bound);
        }
        self.count += 1;
        self.sum += time;
    }

    fn write(&self, out: &mut String, name: &str, help: &str) {
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} histogram");
        for (class, bound) in self.classes.iter().zip(BOUNDS) {
            let _ = writeln!(out, "{name}_bucket{{le=\"{bound}\"}} {class}");
        }
        let _ = writeln!(out, "{name}_bucket{{le=\"+Inf\"}} {}", self.count);
        let _ = writeln!(out, "{name}_sum {}\n{name}_count {}", self.sum.as_secs_f64(), self.count);
    }
}

/// All there is to count.
#[derive(Clone, Debug, Default)]
pub(crate) struct Figures {
    /// Changes of objects in the kernel.
    pub(super) changes: u64,
    /// How often damage by other programs was repaired.
    pub(super) repairs: u64,
    apply: Times,
    add: Times,
    add_failures: u64,
    summary: Summary,
    steering: bool,
    watches: usize,
    ignored: usize,
}

impl Figures {
    /// A transaction took so long, compiling included.
    pub(super) fn applied(&mut self, took: Duration) {
        self.apply.add(took);
    }

    /// An ADD was answered after so long.
    pub(super) fn added(&mut self, took: Duration, done: bool) {
        self.add.add(took);
        self.add_failures += u64::from(!done);
    }

    /// An ADD was refused before it came to the kernel.
    pub(super) fn refused(&mut self) {
        self.add_failures += 1;
    }

    /// How things stand.
    pub(super) fn update(&mut self, summary: &Summary, steering: bool, watches: usize, ignored: usize) {
        (self.summary, self.steering, self.watches, self.ignored) = (*summary, steering, watches, ignored);
    }

    /// In Prometheus' text format.
    pub(crate) fn text(&self) -> String {
        let mut out = String::with_capacity(4096);
        self.apply.write(
            &mut out,
            "flannel_policy_apply_seconds",
            "Time of a change from what is known to the kernel.",
        );
        self.add.write(
            &mut out,
            "flannel_policy_add_seconds",
            "Time that the ADD of a pod waited for its policies.",
        );
        let summary = &self.summary;
        let mut put = |name: &str, kind: &str, help: &str, value: usize| {
            let _ = writeln!(
                out,
                "# HELP flannel_policy_{name} {help}\n# TYPE flannel_policy_{name} {kind}\nflannel_policy_{name} {value}"
            );
        };
        put("changes_total", "counter", "Objects of nftables that were changed.", self.changes as usize);
        put("repairs_total", "counter", "Damage by other programs that was repaired.", self.repairs as usize);
        put("add_failures_total", "counter", "Pods whose ADD was refused.", self.add_failures as usize);
        put(
            "generation",
            "gauge",
            "The generation of connections in force; 0 without tables.",
            summary.generation.into(),
        );
        put("policies", "gauge", "Policies that are known.", summary.policies);
        put("elements", "gauge", "Addresses in the sets of selectors.", summary.elements);
        put("pods_known", "gauge", "Pods that are known.", summary.pods);
        put("pods_local", "gauge", "Pods of this node.", summary.local_pods);
        put(
            "isolated_addresses",
            "gauge",
            "Addresses of this node's pods that a policy isolates.",
            summary.isolated_addresses,
        );
        put(
            "ignored",
            "gauge",
            "Members of policies that are not understood and allow nothing.",
            self.ignored,
        );
        put("steering", "gauge", "Whether frames between this node's pods are routed.", self.steering.into());
        put("watches", "gauge", "Watches of the API server.", self.watches);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_counted_in_every_class_that_they_fit_into() {
        let mut figures = Figures::default();
        for milliseconds in [2, 3, 50, 9000] {
            figures.applied(Duration::from_millis(milliseconds));
        }
        let text = figures.text();
        for line in [
            "flannel_policy_apply_seconds_bucket{le=\"0.001\"} 0",
            "flannel_policy_apply_seconds_bucket{le=\"0.005\"} 2",
            "flannel_policy_apply_seconds_bucket{le=\"0.1\"} 3",
            "flannel_policy_apply_seconds_bucket{le=\"+Inf\"} 4",
            "flannel_policy_apply_seconds_sum 9.055",
            "flannel_policy_apply_seconds_count 4",
            "flannel_policy_generation 0",
            "# TYPE flannel_policy_repairs_total counter",
        ] {
            assert!(text.lines().any(|one| one == line), "{line} in\n{text}");
        }
    }
}
