//! Whether a process holds a TUN device, as the kernel tells it.

use netlink_packet_core::Nla;
use netlink_packet_route::link::{InfoData, InfoKind, InfoTun, LinkAttribute, LinkInfo, LinkMessage};

/// Attributes of a TUN device since Linux 4.20 (include/uapi/linux/if_link.h).
const IFLA_TUN_OWNER: u16 = 1;
const IFLA_TUN_GROUP: u16 = 2;
const IFLA_TUN_PERSIST: u16 = 6;
const IFLA_TUN_MULTI_QUEUE: u16 = 7;
const IFLA_TUN_NUM_QUEUES: u16 = 8;
const IFLA_TUN_NUM_DISABLED_QUEUES: u16 = 9;

/// What is said of a TUN device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct TunFacts {
    carrier: bool,
    details: Option<Details>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Details {
    /// It is for a user or a group: somebody made it for a program of theirs.
    assigned: bool,
    persistent: bool,
    multi_queue: bool,
    /// Those that processes hold.
    queues: u32,
}

impl TunFacts {
    /// `None` if it is a device of another kind.
    pub(super) fn of(message: &LinkMessage) -> Option<Self> {
        let (mut facts, mut is_tun) = (Self::default(), false);
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::Carrier(carrier) => facts.carrier = *carrier != 0,
                LinkAttribute::LinkInfo(infos) => {
                    for info in infos {
                        match info {
                            LinkInfo::Kind(kind) => is_tun = *kind == InfoKind::Tun,
                            LinkInfo::Data(InfoData::Tun(data)) => facts.details = Details::of(data),
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        is_tun.then_some(facts)
    }

    /// Whether it is one that a process like this has left behind, so that another one may take it over with several queues: nobody
    /// holds it, and it is not for somebody else. An older kernel tells by the carrier alone, which no process means no.
    pub(super) fn is_left(self) -> bool {
        match self.details {
            Some(Details { assigned, persistent, multi_queue, queues }) => {
                persistent && multi_queue && queues == 0 && !assigned
            }
            None => !self.carrier,
        }
    }

    /// Whether nobody holds it, and it is for somebody else.
    pub(super) fn is_for_others(self) -> bool {
        self.details.is_some_and(|details| details.assigned && details.queues == 0)
    }

    /// Whether processes hold more queues than these.
    pub(super) fn has_more_than(self, queues: usize) -> bool {
        self.details.is_some_and(|details| usize::try_from(details.queues).is_ok_and(|all| all > queues))
    }
}

impl Details {
    fn of(data: &[InfoTun]) -> Option<Self> {
        let mut details = Self::default();
        for item in data {
            let mut value = vec![0; item.value_len()];
            item.emit_value(&mut value);
            let yes = value.iter().any(|byte| *byte != 0);
            let number = || value.first_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes));
            match item.kind() {
                IFLA_TUN_OWNER | IFLA_TUN_GROUP => details.assigned = true,
                IFLA_TUN_PERSIST => details.persistent = yes,
                IFLA_TUN_MULTI_QUEUE => details.multi_queue = yes,
                IFLA_TUN_NUM_QUEUES | IFLA_TUN_NUM_DISABLED_QUEUES => {
                    details.queues = details.queues.saturating_add(number());
                }
                _ => {}
            }
        }
        (!data.is_empty()).then_some(details)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_left_that_nobody_holds_and_that_is_for_nobody_else() {
        let left = Details { assigned: false, persistent: true, multi_queue: true, queues: 0 };
        for (details, is_left) in [
            (left, true),
            (Details { queues: 1, ..left }, false),
            (Details { assigned: true, ..left }, false),
            (Details { persistent: false, ..left }, false),
            // With one queue it is taken over as any other.
            (Details { multi_queue: false, ..left }, false),
        ] {
            for carrier in [false, true] {
                let facts = TunFacts { carrier, details: Some(details) };
                assert_eq!(facts.is_left(), is_left, "{facts:?}");
            }
        }
        assert!(TunFacts { carrier: false, details: None }.is_left(), "before Linux 4.20");
        assert!(!TunFacts { carrier: true, details: None }.is_left());
        let held = TunFacts { carrier: true, details: Some(Details { queues: 8, ..left }) };
        assert!(held.has_more_than(7) && !held.has_more_than(8));
    }
}
