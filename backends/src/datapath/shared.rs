//! What the threads of a datapath have in common.

use std::ops::Range;
use std::sync::Arc;

use arc_swap::ArcSwap;

use super::counters::Counters;
use super::routing::Routing;
use super::seal::Sealing;
use super::sys::{Tun, UdpSocket};

/// The sockets of a worker, one for each family.
pub(super) type Sockets = Arc<[Arc<UdpSocket>]>;

/// What both directions of a worker work with.
pub(super) struct Shared {
    pub(super) tun: Arc<Tun>,
    /// Those of its queues that are read here.
    pub(super) queues: Range<u32>,
    pub(super) sockets: Sockets,
    pub(super) routing: Arc<ArcSwap<Routing>>,
    pub(super) counters: Arc<Counters>,
    /// Encrypts, if packets are encrypted.
    pub(super) sealing: Option<Arc<Sealing>>,
}
