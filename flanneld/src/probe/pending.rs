//! Requests that wait for their answers; pure.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use backends::echo::{Arrival, Token};
use ipnet::IpNet;

/// An answer that takes longer is late, and its request lost.
pub(super) const TIMEOUT: Duration = Duration::from_secs(1);
/// How long a request is remembered after that, to recognise late and repeated answers.
const MEMORY: Duration = Duration::from_secs(10);

/// What a request is sent for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// To the public address.
    Underlay,
    /// To the address in the pod network.
    Inner,
    /// Of this length, by the way of the pods.
    Large(u16),
}

/// A request, as it was sent.
#[derive(Clone, Copy, Debug)]
pub(super) struct ProbeRequest {
    pub(super) peer: IpNet,
    pub(super) purpose: Purpose,
    pub(super) to: IpAddr,
    pub(super) token: Token,
    pub(super) packet: u16,
    pub(super) sent: Instant,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RequestFate {
    Waiting,
    Answered,
    Lost,
}

/// What an answer turns out to be.
#[derive(Clone, Copy, Debug)]
pub(super) enum Match {
    /// In time, after this time.
    Answer(ProbeRequest, Duration),
    /// Too late; `true` if the request was not known to be lost yet.
    Late(ProbeRequest, bool),
    /// Of a request that was answered before.
    Duplicate(ProbeRequest),
    /// Of no request: another source, number, size or content.
    Stranger,
}

/// The requests of the last seconds, oldest first, with consecutive numbers.
#[derive(Debug)]
pub(super) struct Pending {
    requests: VecDeque<(ProbeRequest, RequestFate)>,
    /// The number of the oldest.
    first: u16,
    /// How many of the oldest have a fate.
    decided: usize,
}

impl Pending {
    pub(super) fn new(first: u16) -> Self {
        Self { requests: VecDeque::new(), first, decided: 0 }
    }

    /// Remembers a request; gives its number.
    pub(super) fn add(&mut self, request: ProbeRequest) -> u16 {
        let number = self.first.wrapping_add(self.requests.len() as u16);
        self.requests.push_back((request, RequestFate::Waiting));
        number
    }

    /// The kernel refuses to send this request.
    pub(super) fn refused(&mut self, number: u16) -> Option<ProbeRequest> {
        let (request, fate) = self.requests.get_mut(usize::from(number.wrapping_sub(self.first)))?;
        (*fate == RequestFate::Waiting).then(|| {
            *fate = RequestFate::Lost;
            *request
        })
    }

    /// Finds what an answer answers.
    pub(super) fn answered(&mut self, now: Instant, arrival: &Arrival) -> Match {
        let index = usize::from(arrival.sequence.wrapping_sub(self.first));
        let Some((request, fate)) = self.requests.get_mut(index) else { return Match::Stranger };
        let fits = arrival.from == request.to
            && arrival.token == request.token
            && arrival.packet == usize::from(request.packet);
        if !fits {
            return Match::Stranger;
        }
        let arrived = now.checked_sub(arrival.age).unwrap_or(now);
        let rtt = arrived.saturating_duration_since(request.sent);
        match (*fate, rtt <= TIMEOUT) {
            (RequestFate::Answered, _) => Match::Duplicate(*request),
            (RequestFate::Waiting, true) => {
                *fate = RequestFate::Answered;
                Match::Answer(*request, rtt)
            }
            (before, _) => {
                *fate = RequestFate::Answered;
                Match::Late(*request, before == RequestFate::Waiting)
            }
        }
    }

    /// The next request whose time is over, if there is one.
    pub(super) fn expire(&mut self, now: Instant) -> Option<ProbeRequest> {
        let mut lost = None;
        while let Some((request, fate)) = self.requests.get_mut(self.decided) {
            if *fate == RequestFate::Waiting {
                if now < request.sent + TIMEOUT {
                    break;
                }
                *fate = RequestFate::Lost;
                lost = Some(*request);
            }
            self.decided += 1;
            if lost.is_some() {
                break;
            }
        }
        while self.decided > 0 && self.requests.front().is_some_and(|(oldest, _)| oldest.sent + MEMORY <= now)
        {
            self.requests.pop_front();
            self.first = self.first.wrapping_add(1);
            self.decided -= 1;
        }
        lost
    }

    /// When the next request is lost unless it is answered before.
    pub(super) fn next_expiry(&self) -> Option<Instant> {
        let waiting = self.requests.iter().skip(self.decided).find(|(_, fate)| *fate == RequestFate::Waiting);
        waiting.map(|(request, _)| request.sent + TIMEOUT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(sent: Instant) -> ProbeRequest {
        let peer = "10.5.2.0/24".parse().unwrap();
        let to = "10.5.2.0".parse().unwrap();
        ProbeRequest { peer, purpose: Purpose::Inner, to, token: [7; 16], packet: 64, sent }
    }

    fn arrival(sequence: u16) -> Arrival {
        Arrival {
            from: "10.5.2.0".parse().unwrap(),
            sequence,
            token: [7; 16],
            packet: 64,
            age: Duration::ZERO,
        }
    }

    #[test]
    fn only_what_fits_in_all_is_an_answer() {
        let now = Instant::now();
        let mut pending = Pending::new(u16::MAX);
        assert_eq!((pending.add(request(now)), pending.add(request(now))), (u16::MAX, 0));
        let good = arrival(0);
        for wrong in [
            Arrival { from: "10.5.3.0".parse().unwrap(), ..good },
            Arrival { token: [8; 16], ..good },
            Arrival { packet: 65, ..good },
            Arrival { sequence: 1, ..good },
            Arrival { sequence: u16::MAX - 1, ..good },
        ] {
            assert!(matches!(pending.answered(now, &wrong), Match::Stranger), "{wrong:?}");
        }
        let later = now + Duration::from_millis(5);
        assert!(
            matches!(pending.answered(later, &good), Match::Answer(_, rtt) if rtt == Duration::from_millis(5))
        );
        assert!(matches!(pending.answered(later, &good), Match::Duplicate(_)));
        assert!(matches!(pending.answered(later, &arrival(u16::MAX)), Match::Answer(..)));
    }

    #[test]
    fn what_the_kernel_received_in_time_is_in_time_however_late_it_is_read() {
        let now = Instant::now();
        let mut pending = Pending::new(0);
        pending.add(request(now));
        pending.add(request(now));
        let read = now + Duration::from_secs(3);
        let early = Arrival { age: Duration::from_millis(2900), ..arrival(0) };
        assert!(
            matches!(pending.answered(read, &early), Match::Answer(_, rtt) if rtt == Duration::from_millis(100))
        );
        assert!(matches!(pending.answered(read, &arrival(1)), Match::Late(_, true)));
        assert!(matches!(pending.answered(read, &arrival(1)), Match::Duplicate(_)));
    }

    #[test]
    fn a_clock_that_is_set_between_arrival_and_reading_makes_no_negative_time() {
        let now = Instant::now();
        let mut pending = Pending::new(0);
        pending.add(request(now));
        let odd = Arrival { age: Duration::from_secs(50), ..arrival(0) };
        assert!(matches!(pending.answered(now, &odd), Match::Answer(_, Duration::ZERO)));
    }

    #[test]
    fn requests_are_lost_after_their_time_and_forgotten_later() {
        let now = Instant::now();
        let mut pending = Pending::new(65_530);
        for _ in 0..10 {
            pending.add(request(now));
        }
        assert!(matches!(pending.answered(now, &arrival(65_531)), Match::Answer(..)));
        assert_eq!(pending.next_expiry(), Some(now + TIMEOUT));
        assert!(pending.expire(now).is_none());
        let mut lost = 0;
        while pending.expire(now + TIMEOUT).is_some() {
            lost += 1;
        }
        assert_eq!((lost, pending.next_expiry()), (9, None));
        let late = now + Duration::from_secs(2);
        assert!(matches!(pending.answered(late, &arrival(65_530)), Match::Late(_, false)));
        assert!(pending.expire(now + MEMORY).is_none() && pending.requests.is_empty());
        assert!(matches!(pending.answered(late, &arrival(2)), Match::Stranger));
        assert_eq!(pending.add(request(late)), 4, "numbers go on");
    }
}
