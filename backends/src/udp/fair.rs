//! Keeps one pod's flood from costing the others their packets.
//!
//! The kernel puts packets for the device into rings of its queues and drops what finds its ring full, whose
//! ever it is. It chooses a queue by the flow's hash, unless packets of the flow in the other direction were
//! written to a queue: then it takes that one (drivers/net/tun.c, `tun_automq_select_queue`). So who writes
//! answers decides where the questions queue, and pods that send little can be kept out of the crowd.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// Queues of a device. The more, the fewer flows without answers share a queue with a flood.
pub(super) const QUEUES: usize = 8;
/// Addresses are counted by their hash.
const SENDERS: usize = 256;
/// Counts are halved when so many packets were counted.
const WINDOW: u32 = 2048;
/// A sender is heavy with more than this part of the packets.
const HEAVY: u32 = 8;

/// What the two directions of a datapath tell each other.
#[derive(Debug)]
pub(super) struct Crowd {
    crowded: [AtomicBool; QUEUES],
    senders: Box<[AtomicU32; SENDERS]>,
    total: AtomicU32,
}

impl Crowd {
    pub(super) fn new() -> Self {
        Self {
            crowded: Default::default(),
            senders: Box::new(std::array::from_fn(|_| AtomicU32::new(0))),
            total: AtomicU32::new(0),
        }
    }

    /// Notes whether a queue holds more than is taken from it at once.
    #[inline]
    pub(super) fn set_crowded(&self, queue: usize, crowded: bool) {
        self.crowded[queue].store(crowded, Ordering::Relaxed);
    }

    /// Counts a packet that a pod sent. Only one thread counts.
    #[inline]
    pub(super) fn count(&self, sender: Ipv4Addr) {
        let bump = |counter: &AtomicU32| {
            let value = counter.load(Ordering::Relaxed) + 1;
            counter.store(value, Ordering::Relaxed);
            value
        };
        bump(&self.senders[hash(sender) % SENDERS]);
        if bump(&self.total) >= WINDOW {
            let halve = |counter: &AtomicU32| {
                let half = counter.load(Ordering::Relaxed) / 2;
                counter.store(half, Ordering::Relaxed);
                half
            };
            let sum = self.senders.iter().map(halve).sum();
            self.total.store(sum, Ordering::Relaxed);
        }
    }

    /// The queue that packets to this pod are written to, of so many.
    #[inline]
    pub(super) fn queue_for(&self, pod: Ipv4Addr, queues: usize) -> usize {
        let own = hash(pod) % queues;
        if !self.crowded[own].load(Ordering::Relaxed) || self.is_heavy(pod) {
            return own;
        }
        let others = (1..queues).map(|step| (own + step) % queues);
        others.into_iter().find(|queue| !self.crowded[*queue].load(Ordering::Relaxed)).unwrap_or(own)
    }

    fn is_heavy(&self, pod: Ipv4Addr) -> bool {
        let sent = self.senders[hash(pod) % SENDERS].load(Ordering::Relaxed);
        sent > self.total.load(Ordering::Relaxed) / HEAVY
    }
}

#[inline]
fn hash(address: Ipv4Addr) -> usize {
    (address.to_bits().wrapping_mul(0x9e37_79b1) >> 16) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_sends_little_is_led_around_a_crowd_and_who_makes_it_stays() {
        let crowd = Crowd::new();
        let pods: Vec<Ipv4Addr> = (1..200).map(|last| Ipv4Addr::new(10, 244, 1, last)).collect();
        let flood = pods[0];
        let own = crowd.queue_for(flood, QUEUES);
        (0..10_000).for_each(|_| crowd.count(flood));
        pods.iter().for_each(|pod| crowd.count(*pod));
        let before: Vec<usize> = pods.iter().map(|pod| crowd.queue_for(*pod, QUEUES)).collect();
        assert!((0..QUEUES).all(|queue| before.contains(&queue)), "{before:?}");
        crowd.set_crowded(own, true);
        for (pod, before) in pods.iter().zip(before) {
            let now = crowd.queue_for(*pod, QUEUES);
            // Somebody may share the count of the flood.
            if *pod == flood || hash(*pod) % SENDERS == hash(flood) % SENDERS {
                assert_eq!(now, before);
            } else {
                assert_ne!(now, own);
                assert!(before == own || now == before);
            }
        }
        assert_eq!(crowd.queue_for(flood, 1), 0);
    }
}
