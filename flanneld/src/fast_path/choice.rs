//! Whether this node has a fast path, and what is said where it can't be made; pure but for what the kernel calls itself.

use backends::fast_path::suits_release;

/// Whether this node has a fast path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum FastPathMode {
    /// As `FastPath` of the network configuration says, on kernels without known faults.
    #[default]
    Auto,
    /// Independent of the configuration and of the kernel's version.
    On,
    /// Not at all.
    Off,
}

/// What decides on it beside the network configuration; the same as long as the process lives.
#[derive(Clone, Debug)]
pub(crate) struct FastPathChoice {
    mode: FastPathMode,
    /// Or a sentence about the kernel.
    suits: Result<(), String>,
}

/// What is decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum FastPathDecision {
    /// There shall be one.
    On,
    /// There shall be none.
    Off,
    /// One is asked for, and this sentence says why there is none.
    Unsuited(String),
}

impl FastPathChoice {
    /// For the kernel that runs.
    pub(crate) fn new(mode: FastPathMode) -> Self {
        Self { mode, suits: suits_release(&read("/proc/sys/kernel/osrelease"), &more_versions()) }
    }

    /// What follows where `FastPath` of the network configuration is so.
    pub(super) fn decide(&self, configured: bool) -> FastPathDecision {
        match (self.mode, &self.suits) {
            (FastPathMode::Off, _) => FastPathDecision::Off,
            (FastPathMode::Auto, _) if !configured => FastPathDecision::Off,
            (FastPathMode::Auto, Err(why)) => FastPathDecision::Unsuited(why.clone()),
            (FastPathMode::Auto, Ok(())) | (FastPathMode::On, _) => FastPathDecision::On,
        }
    }

    /// Whether there shall be one where `FastPath` of the network configuration is so.
    pub(crate) fn has_one(&self, configured: bool) -> bool {
        self.decide(configured) == FastPathDecision::On
    }
}

impl FastPathDecision {
    /// What a node says that is as decided.
    pub(super) fn note(&self) -> Option<String> {
        match self {
            Self::On | Self::Off => None,
            Self::Unsuited(why) => Some(why.clone()),
        }
    }

    /// What a node says that can't be made so, and why.
    pub(super) fn failure(&self, why: &str) -> String {
        match self {
            Self::On => format!("pods' flows take the ordinary path: {why}"),
            Self::Off | Self::Unsuited(_) => {
                format!(
                    "if an earlier run has left a fast path, its flows stay on it, because it can't be removed: {why}"
                )
            }
        }
    }
}

/// Where distributions say the patch level of their kernel.
fn more_versions() -> String {
    ["/proc/sys/kernel/version", "/proc/version_signature"].map(read).join("\n")
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flag_overrides_the_configuration_and_the_kernel() {
        let decide = |mode, suits: Result<(), &str>, configured| {
            FastPathChoice { mode, suits: suits.map_err(str::to_owned) }.decide(configured)
        };
        let old = Err("too old");
        for (mode, suits, configured, decision) in [
            (FastPathMode::Auto, Ok(()), true, FastPathDecision::On),
            (FastPathMode::Auto, Ok(()), false, FastPathDecision::Off),
            (FastPathMode::Auto, old, true, FastPathDecision::Unsuited("too old".into())),
            (FastPathMode::Auto, old, false, FastPathDecision::Off),
            (FastPathMode::On, old, false, FastPathDecision::On),
            (FastPathMode::Off, Ok(()), true, FastPathDecision::Off),
        ] {
            assert_eq!(decide(mode, suits, configured), decision, "{mode:?}, {suits:?}, {configured}");
        }
    }

    #[test]
    fn where_there_shall_be_none_nothing_is_said_of_the_ordinary_path() {
        let why = "opening nftables: Too many open files";
        assert!(FastPathDecision::On.failure(why).starts_with("pods' flows take the ordinary path"));
        for off in [FastPathDecision::Off, FastPathDecision::Unsuited("too old".into())] {
            let said = off.failure(why);
            assert!(
                !said.contains("ordinary path") && said.contains("earlier run") && said.ends_with(why),
                "{said}"
            );
        }
    }
}
