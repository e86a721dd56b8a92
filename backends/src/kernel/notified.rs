//! What the agent and those who hear the kernel's notifications share: what the notifications are compared with, and what came of
//! them.

use super::NotificationFilter;
use crate::netlink::wire::messages;

/// Bytes of notifications that are kept during one read.
const ROOM: usize = 64 * 1024;

/// What notifications are compared with, and what is remembered of them until the agent's next look.
#[derive(Debug, Default)]
pub struct Notified {
    /// What the agent cares about, by what it read last.
    filter: NotificationFilter,
    /// The kernel said that a setting of a device, or of all, has changed (`RTM_NEWNETCONF`); the look
    /// that follows takes it back.
    pub sysctls_moved: bool,
    /// How often notifications were lost because the socket's buffer was full.
    pub overruns: u64,
    undecided: Undecided,
}

/// What came since a read of the kernel began. The kernel sends a notification after the change, so the read finds what was
/// notified before it. A notification that comes during the read may tell of something that the read did not find any more, and
/// yet not differ from what was read before: a carrier that is lost, read as lost, and back.
#[derive(Debug, Default)]
enum Undecided {
    /// Nothing is being read.
    #[default]
    Nothing,
    /// Netlink messages, one after another, that told nothing new by what was read before.
    Messages(Vec<u8>),
    /// More than there is room for, so anything may have changed.
    TooMuch,
}

impl Notified {
    /// Compares with this.
    pub fn new(filter: NotificationFilter) -> Self {
        Self { filter, ..Self::default() }
    }

    /// What the filter compares with is read from now until [`Self::renew`].
    pub fn begin_read(&mut self) {
        if matches!(self.undecided, Undecided::Nothing) {
            self.undecided = Undecided::Messages(Vec::new());
        }
    }

    /// Whether one of these notifications tells something that is new.
    pub(crate) fn hear(&mut self, datagram: &[u8]) -> bool {
        let concerned = self.is_news(datagram);
        if !concerned {
            self.undecided.keep(datagram);
        }
        concerned
    }

    /// Compares with this from now on, and ends a read. Says whether a notification that came during the read tells something
    /// that is new by what was read.
    #[must_use]
    pub fn renew(&mut self, filter: NotificationFilter) -> bool {
        self.filter = filter;
        match std::mem::take(&mut self.undecided) {
            Undecided::Nothing => false,
            Undecided::Messages(kept) => self.is_news(&kept),
            Undecided::TooMuch => true,
        }
    }

    fn is_news(&mut self, datagram: &[u8]) -> bool {
        let settings = self.filter.hears_of_settings(datagram);
        self.sysctls_moved |= settings;
        settings || messages(datagram).any(|message| self.filter.concerned_by(&message))
    }
}

impl Undecided {
    fn keep(&mut self, datagram: &[u8]) {
        let Self::Messages(kept) = self else { return };
        if kept.len() + datagram.len() > ROOM {
            *self = Self::TooMuch;
            return;
        }
        kept.extend(datagram);
        kept.resize(kept.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A message without content.
    const MESSAGE: [u8; 16] = [16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

    #[test]
    fn notifications_are_kept_while_something_is_read_and_too_many_are_news() {
        let mut notified = Notified::default();
        notified.hear(&[0; ROOM + 1]);
        assert!(!notified.renew(NotificationFilter::default()), "nothing was being read");

        notified.begin_read();
        notified.hear(&MESSAGE);
        assert!(!notified.renew(NotificationFilter::default()), "a message about nothing");

        notified.begin_read();
        notified.hear(&[0; ROOM]);
        notified.hear(&MESSAGE);
        notified.begin_read();
        assert!(notified.renew(NotificationFilter::default()), "anything may have changed");
        assert!(!notified.renew(NotificationFilter::default()), "and is told once");
    }
}
