//! Tells senders about their packets: ICMP errors through the device, not too many.

use std::sync::Arc;
use std::time::Instant;

use subnet::Family;

use super::counters::Counters;
use super::icmp::{self, IcmpError, Limiter};
use super::packet::Header;
use super::routing::Routing;
use super::shared::Shared;
use super::sys::Tun;

pub(super) struct IcmpSender {
    tun: Arc<Tun>,
    counters: Arc<Counters>,
    limiter: Limiter,
}

impl IcmpSender {
    pub(super) fn new(shared: &Shared) -> Self {
        Self {
            tun: Arc::clone(&shared.tun),
            counters: Arc::clone(&shared.counters),
            limiter: Limiter::new(Instant::now()),
        }
    }

    /// Tells the sender of `packet`, unless none may be told.
    pub(super) fn send(&mut self, trouble: IcmpError, routing: &Routing, header: &Header, packet: &[u8]) {
        let mut room = [0; icmp::LONGEST];
        let Some(from) = routing.addresses.get(Family::of(header.src)) else { return };
        let Some(len) = icmp::reply(trouble, from, header, packet, &mut room) else { return };
        if !self.limiter.allows(Instant::now()) {
            return self.counters.icmp_limited.add(1);
        }
        if self.tun.write_plain(&room[..len]).is_ok() {
            self.counters.icmp_errors.add(1);
        }
    }
}
