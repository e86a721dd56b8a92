//! What `doctor` saw: the agent's answers, and what it read itself. Everything that the trees decide by.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use backends::firewall::blocking::Blocking;
use backends::prerequisites::Obstacle;
use ipnet::IpNet;
use subnet::Subnets;

use super::direction::Direction;
use crate::cni::ConfFile;
use crate::status::{NodeStatus, PeerEntry};

/// Something that was read, or why it could not be.
pub(super) type Read<T> = Result<T, String>;

/// All of it.
pub(super) struct Observation {
    pub(super) agent: AgentAnswer,
    /// By the agent; empty without one.
    pub(super) peers: Vec<PeerEntry>,
    pub(super) subnet_file: PathBuf,
    pub(super) env: Env,
    /// Settings of the host that keep packets from passing.
    pub(super) obstacles: Read<Vec<Obstacle>>,
    /// The links of the host.
    pub(super) links: Read<Vec<Link>>,
    /// Peers whose public address is not reached by the external interface, with the device or the kernel's refusal.
    pub(super) detours: Read<Vec<(IpAddr, String)>>,
    /// In which direction tunnels lose everything, by the subnets of peers of which that is known.
    pub(super) directions: BTreeMap<String, Direction>,
    /// How many peers were asked about for that.
    pub(super) asked: usize,
    /// Rules that drop what has to pass, with what that is.
    pub(super) blocking: Read<Vec<(String, Blocking)>>,
    /// CNI configurations in their order; none where the directory does not exist, as in most containers.
    pub(super) confs: Option<Vec<ConfFile>>,
    pub(super) cni_conf_dir: PathBuf,
    /// Plugins that the first configuration names and that are in none of the directories; nothing where none of these
    /// exists.
    pub(super) missing_plugins: Option<Vec<String>>,
    pub(super) cni_bin_dirs: Vec<PathBuf>,
    pub(super) addresses: Addresses,
    /// The pod that was asked about.
    pub(super) pod: Option<Pod>,
    /// UDP datagrams with wrong checksums that came while it was looked.
    pub(super) checksum_errors: u64,
}

/// The agent of this node.
#[expect(clippy::large_enum_variant, reason = "there is one of it")]
pub(super) enum AgentAnswer {
    Answers(NodeStatus),
    /// It does not answer, and whether a process holds the subnet file's lock.
    Silent {
        why: String,
        running: Option<String>,
        /// What the kernel lacks of what was saved, as changes that would be made.
        lacking: Read<Vec<String>>,
    },
}

impl AgentAnswer {
    pub(super) fn status(&self) -> Option<&NodeStatus> {
        match self {
            Self::Answers(status) => Some(status),
            Self::Silent { .. } => None,
        }
    }
}

/// `subnet.env`.
pub(super) enum Env {
    Written(Subnets),
    Missing,
    Bad(String),
}

impl Env {
    pub(super) fn subnets(&self) -> Subnets {
        match self {
            Self::Written(subnets) => *subnets,
            Self::Missing | Self::Bad(_) => Subnets::default(),
        }
    }
}

/// A device of the host.
#[derive(Clone)]
pub(super) struct Link {
    pub(super) name: String,
    pub(super) up: bool,
    pub(super) carrier: bool,
    pub(super) bridge: bool,
    pub(super) addresses: Vec<IpNet>,
}

/// Addresses of pods.
pub(super) struct Addresses {
    pub(super) directory: PathBuf,
    /// There is such a directory.
    pub(super) exists: bool,
    /// The pool of each family: subnet, size, used.
    pub(super) pools: Vec<(IpNet, u64, u64)>,
    /// Reserved for pods that are gone, with the files.
    pub(super) leaked: Read<Vec<(IpAddr, PathBuf, Option<u64>)>>,
}

/// The pod that was asked about.
pub(super) struct Pod {
    /// As it was asked for.
    pub(super) asked: String,
    /// Addresses that are reserved for it.
    pub(super) reserved: Vec<IpAddr>,
    /// Those of them that a namespace behind a device of this host has.
    pub(super) living: Read<Vec<IpAddr>>,
}
