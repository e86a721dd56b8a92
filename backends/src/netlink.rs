//! One way to talk netlink, for routes, nftables, ethtool and every family of generic netlink.
//!
//! [`socket`] has the conversation: batches, dumps, single requests, time limit, errors by message. [`multicast`] has the
//! kernel's notifications, [`wire`] the bytes. What the messages of a family mean is the business of its module.

pub(crate) mod ethtool;
pub(crate) mod generic;
pub(crate) mod multicast;
pub(crate) mod socket;
pub(crate) mod wire;
