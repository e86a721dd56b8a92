//! Who works when: one thread for both directions while there is little to do, a second one to help while
//! there is much.
//!
//! A packet that wakes a sleeping thread on a sleeping CPU waits longer for that than for everything else. So
//! the answer to what comes in is sent by the thread that is awake already, and after work that is usually
//! followed by more within some microseconds, the thread looks for it before it sleeps. With two threads from
//! the start there would be four wake-ups in a round trip, so there are two. But a stream is faster with
//! both directions at the same time: then the way out is lent to the other thread.

use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::egress::{Egress, EgressStats};
use super::ingress::Ingress;
use super::sys::{Tun, UdpSocket};

/// So many bytes at once are a stream.
const STREAM: usize = 32 * 1024;
/// So many packets at once are a flood.
const FLOOD: u64 = 8;
/// The helper gives back what it was lent after so long without work.
const REST: Timespec = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
const AT_ONCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };
/// So often a queue that is not empty is read again before the others are looked at.
const TURNS: u32 = 4;
/// How long a stream or a flood is let gather. The kernel adds up to 50 µs (`PR_SET_TIMERSLACK`).
const NAP: Duration = Duration::from_micros(30);
/// How long to look for more before sleeping.
const SPIN: Duration = Duration::from_micros(120);

/// The way out, and who has it.
pub(super) struct SharedEgress {
    /// The queues of the device that it begins at.
    queues: Range<u32>,
    egress: Mutex<Egress>,
    /// The helper has it. Set by the lender, cleared by the helper.
    lent: AtomicBool,
    /// Wakes the helper.
    lend: OwnedFd,
    /// Wakes the lender.
    back: OwnedFd,
}

impl SharedEgress {
    pub(super) fn new(egress: Egress, queues: Range<u32>) -> io::Result<Self> {
        let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        Ok(Self {
            queues,
            egress: Mutex::new(egress),
            lent: AtomicBool::new(false),
            lend: event()?,
            back: event()?,
        })
    }

    /// To be polled, in order.
    fn files<'a>(&self, tun: &'a Tun) -> impl Iterator<Item = PollFd<'a>> {
        let queues = &tun.queues()[self.queues.start as usize..self.queues.end as usize];
        queues.iter().map(|queue| PollFd::new(queue, PollFlags::IN))
    }

    /// The bits of the queues in which something is.
    fn ready(&self, queues: &[PollFd<'_>]) -> u32 {
        ready(queues) << self.queues.start
    }

    fn turn(&self, ready: u32) -> io::Result<EgressStats> {
        self.egress.lock().unwrap_or_else(PoisonError::into_inner).turn(ready)
    }

    fn lend(&self) -> io::Result<()> {
        self.lent.store(true, Ordering::Release);
        Ok(notify(&self.lend)?)
    }

    fn give_back(&self) -> io::Result<()> {
        self.lent.store(false, Ordering::Release);
        Ok(notify(&self.back)?)
    }
}

fn notify(event: &OwnedFd) -> rustix::io::Result<()> {
    rustix::io::write(event, &1u64.to_ne_bytes()).map(drop)
}

/// Forgets that it was rung.
fn clear(event: &OwnedFd) {
    let _ = rustix::io::read(event, &mut [0; 8]);
}

/// The bits of the files in which something is.
fn ready(files: &[PollFd<'_>]) -> u32 {
    let bit = |(number, file): (usize, &PollFd<'_>)| u32::from(!file.revents().is_empty()) << number;
    files.iter().enumerate().map(bit).sum()
}

fn wait(files: &mut [PollFd<'_>], timeout: Option<&Timespec>) -> io::Result<usize> {
    loop {
        match poll(files, timeout) {
            Err(rustix::io::Errno::INTR) => {}
            outcome => return Ok(outcome?),
        }
    }
}

/// Works for both directions until told to stop.
pub(super) fn serve(
    tun: &Tun,
    sockets: &[Arc<UdpSocket>],
    egress: &SharedEgress,
    mut ingress: Ingress,
    stop: &OwnedFd,
) -> io::Result<()> {
    const FIRST: usize = 2;
    let own = FIRST + sockets.len();
    let mut files: Vec<PollFd<'_>> =
        vec![PollFd::new(stop, PollFlags::IN), PollFd::new(&egress.back, PollFlags::IN)];
    files.extend(sockets.iter().map(|socket| PollFd::new(socket, PollFlags::IN)));
    files.extend(egress.files(tun));
    let mut search = Search { patience: Patience::new(), since: None };
    let mut more = 0;
    loop {
        let lent = egress.lent.load(Ordering::Acquire);
        let watched = if lent { own } else { files.len() };
        let timeout = (search.since.is_some() || more != 0).then_some(&AT_ONCE);
        if wait(&mut files[..watched], timeout)? == 0 && more == 0 {
            search.found_nothing();
            continue;
        }
        if !files[0].revents().is_empty() {
            return Ok(());
        }
        if !files[1].revents().is_empty() {
            clear(&egress.back);
        }
        search.succeeded();
        let heard = ready(&files[FIRST..own]);
        let came = if heard == 0 { 0 } else { ingress.turn(heard)? };
        let mut went = EgressStats::default();
        if !lent {
            if came > 0 {
                // What came in may have been answered already.
                wait(&mut files[own..], Some(&AT_ONCE))?;
            }
            let ready = egress.ready(&files[own..]);
            if ready | more != 0 {
                went = egress.turn(ready)?;
            }
            more = went.more;
            if came.max(went.bytes) >= STREAM {
                more = 0;
                egress.lend()?;
            } else if went.reads >= FLOOD && more == 0 {
                // With a few packets a send, and a look at all queues for each, a CPU is soon full.
                thread::sleep(NAP);
                continue;
            }
        }
        // Beside a stream, looking would only take the CPU from it.
        if !lent {
            search.begin(came, went.bytes);
        }
    }
}

/// Works for the way out whenever it is lent, until told to stop.
pub(super) fn help(tun: &Tun, egress: &SharedEgress, stop: &OwnedFd) -> io::Result<()> {
    const OWN: usize = 2;
    let mut files: Vec<PollFd<'_>> =
        vec![PollFd::new(stop, PollFlags::IN), PollFd::new(&egress.lend, PollFlags::IN)];
    files.extend(egress.files(tun));
    let (mut lent, mut more) = (false, 0);
    loop {
        let (watched, timeout) = match (lent, more) {
            (false, _) => (OWN, None),
            (true, 0) => (files.len(), Some(&REST)),
            (true, _) => (files.len(), Some(&AT_ONCE)),
        };
        if wait(&mut files[..watched], timeout)? == 0 && more == 0 {
            lent = false;
            egress.give_back()?;
            continue;
        }
        if !files[0].revents().is_empty() {
            return Ok(());
        }
        let mut ready = if watched > OWN { egress.ready(&files[OWN..]) } else { 0 };
        if !files[1].revents().is_empty() {
            clear(&egress.lend);
            lent = true;
            // What the lender has begun is to be finished.
            more = egress.turn(ready)?.more;
            continue;
        }
        for _ in 0..TURNS {
            let went = egress.turn(ready)?;
            more = went.more;
            if more == 0 && (went.bytes >= STREAM || went.reads >= FLOOD) {
                // More is on its way. With some of it together, and no wake-up for each piece, a
                // stream costs less.
                thread::sleep(NAP);
            } else if more == 0 {
                break;
            } else {
                ready = more;
            }
        }
    }
}

/// Looking for more before sleeping.
struct Search {
    patience: Patience,
    /// After what it began, and when.
    since: Option<(TurnEnd, Instant)>,
}

impl Search {
    /// Begins after so many bytes, unless it hasn't been worth it lately.
    fn begin(&mut self, came: usize, went: usize) {
        let moved = TurnEnd::of(came, went).filter(|moved| self.patience.is_worth_it(*moved));
        self.since = moved.map(|moved| (moved, Instant::now()));
    }

    /// There is nothing yet: lets others have the CPU, and ends after [`SPIN`].
    fn found_nothing(&mut self) {
        match self.since {
            Some((_, since)) if since.elapsed() < SPIN => thread::yield_now(),
            Some((moved, _)) => {
                self.patience.failed(moved);
                self.since = None;
            }
            None => {}
        }
    }

    fn succeeded(&mut self) {
        if let Some((moved, _)) = self.since.take() {
            self.patience.succeeded(moved);
        }
    }
}

/// Which way packets went last; what follows depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TurnEnd {
    Out,
    In,
    Both,
}

impl TurnEnd {
    fn of(came: usize, went: usize) -> Option<Self> {
        match (came > 0, went > 0) {
            (false, true) => Some(Self::Out),
            (true, false) => Some(Self::In),
            (true, true) => Some(Self::Both),
            (false, false) => None,
        }
    }
}

/// Learns whether looking for more has been worth it lately: else the time is better spent asleep.
#[derive(Debug)]
struct Patience {
    /// By what moved.
    credit: [u8; 3],
    skipped: [u8; 3],
}

impl Patience {
    const MAX_CREDIT: u8 = 8;
    /// Without credit, one try in so many.
    const TRY: u8 = 32;

    fn new() -> Self {
        Self { credit: [2; 3], skipped: [0; 3] }
    }

    fn is_worth_it(&mut self, moved: TurnEnd) -> bool {
        if self.credit[moved as usize] > 0 {
            return true;
        }
        let skipped = &mut self.skipped[moved as usize];
        *skipped = (*skipped + 1) % Self::TRY;
        *skipped == 0
    }

    fn succeeded(&mut self, moved: TurnEnd) {
        let credit = &mut self.credit[moved as usize];
        *credit = Self::MAX_CREDIT.min(*credit + 2);
    }

    fn failed(&mut self, moved: TurnEnd) {
        let credit = &mut self.credit[moved as usize];
        *credit = credit.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_is_kept_where_it_is_rewarded_and_lost_elsewhere() {
        let mut patience = Patience::new();
        let mut looked = [0; 2];
        for _ in 0..320 {
            if patience.is_worth_it(TurnEnd::Out) {
                looked[0] += 1;
                patience.succeeded(TurnEnd::Out);
            }
            if patience.is_worth_it(TurnEnd::In) {
                looked[1] += 1;
                patience.failed(TurnEnd::In);
            }
        }
        assert_eq!(looked[0], 320);
        assert!((10..=12).contains(&looked[1]), "{}", looked[1]);
    }
}
