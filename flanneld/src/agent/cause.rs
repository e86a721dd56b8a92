//! What woke the loop, for counting.

/// Why the loop takes a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    /// The agent begins.
    Start,
    /// A notification of the kernel about links, addresses, routes or settings.
    Kernel,
    /// A change of traffic rules.
    Rules,
    /// A snapshot of all leases, or trouble of the store.
    Leases,
    /// The own lease.
    Lease,
    /// The configuration, or this node's public addresses in the store.
    Configuration,
    /// Time.
    Timer,
}

impl Cause {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Kernel => "kernel",
            Self::Rules => "rules",
            Self::Leases => "leases",
            Self::Lease => "lease",
            Self::Configuration => "configuration",
            Self::Timer => "timer",
        }
    }
}
