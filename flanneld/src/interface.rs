//! Which interface carries the traffic between nodes: a pure choice from what the host looks like.

use std::net::IpAddr;

use regex::bytes::Regex;
use subnet::PublicAddrs;

/// What the operator says about the interface. With none of the first three, the public address decides,
/// and without one the default route.
#[derive(Clone, Debug, Default)]
pub(crate) struct Selectors {
    /// Names or addresses, tried in order; an empty one stands for the default route.
    pub(crate) iface: Vec<String>,
    /// Patterns for addresses, then for names, tried in order.
    pub(crate) regex: Vec<Regex>,
    /// An address that is reached by the interface.
    pub(crate) can_reach: Option<IpAddr>,
    /// The addresses to announce instead of the interface's.
    pub(crate) public: PublicAddrs,
}
