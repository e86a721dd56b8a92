//! What there is to count about network policies.

use std::time::Duration;

use backends::policy::Summary;

pub(crate) use crate::status::Policy as Figures;

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
        self.generation = summary.generation.into();
        self.policies = summary.policies as u64;
        self.elements = summary.elements as u64;
        self.pods_known = summary.pods as u64;
        self.pods_local = summary.local_pods as u64;
        self.isolated_addresses = summary.isolated_addresses as u64;
        self.ignored = ignored as u64;
        self.steering = steering.into();
        self.watches = watches as u64;
    }
}
