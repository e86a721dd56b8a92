//! A hundred echo requests a second, to see what gets lost and how long an outage lasts.

use std::io::{BufRead, BufReader};
use std::net::IpAddr;
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, ensure};
use rustix::process::Signal;

use super::namespace::Namespace;
use super::process::Process;
use super::{wait_for, wait_for_some};

/// Time between two requests, unless the options say otherwise.
const INTERVAL: Duration = Duration::from_millis(10);
/// An answer that takes longer does not come any more.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);
/// Requests without an answer that mean silence: fewer may be what a busy machine took its time for.
const IN_VAIN: u64 = 20;
/// So many of the last requests may still be under way.
const UNDER_WAY: u64 = 100;
/// Ends what does not end by itself; no measurement waits for it when all is well.
const FINISH_TIMEOUT: Duration = Duration::from_secs(30);

/// A running `ping`.
pub struct Pinger {
    process: Process,
    seen: Arc<Mutex<Seen>>,
    reader: Option<JoinHandle<()>>,
}

/// What a `Pinger` saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pings {
    /// Echo requests, without those still under way at the end.
    pub sent: u64,
    /// Echo requests that were answered.
    pub received: u64,
    /// The difference.
    pub lost: u64,
    /// The longest time without an answer; about the interval of 10 ms when nothing is lost.
    pub longest_gap: Duration,
    /// The mean round trip.
    pub mean: Duration,
}

/// What may differ from ping to ping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PingOptions {
    /// Bytes of payload, at least 16. The packet has 28 more with IPv4, 48 more with IPv6.
    pub size: u16,
    /// Whether requests that are too long for their path get lost; else the system may divide them.
    pub dont_fragment: bool,
    /// Time between two requests.
    pub interval: Duration,
}

impl Default for PingOptions {
    fn default() -> Self {
        Self { size: 56, dont_fragment: false, interval: INTERVAL }
    }
}

impl Pinger {
    /// Starts to ping `target` from inside `namespace`.
    pub fn start(namespace: &Namespace, target: IpAddr) -> anyhow::Result<Self> {
        Self::start_with(namespace, target, PingOptions::default())
    }

    /// The same with requests that differ from the ordinary.
    pub fn start_with(namespace: &Namespace, target: IpAddr, options: PingOptions) -> anyhow::Result<Self> {
        let PingOptions { size, dont_fragment, interval } = options;
        ensure!(size >= 16, "ping measures no round trips with {size} bytes of payload: give it 16 or more");
        let mut command = namespace
            .command("ping")
            .args(["-n", "-D", "-O", "-i", &interval.as_secs_f64().to_string(), "-s", &size.to_string()])
            .stdout(Stdio::piped());
        if dont_fragment {
            // It complains of every request that is too long for the first link.
            command = command.args(["-M", "do"]).stderr(Stdio::null());
        }
        let mut process = command.arg(target.to_string()).spawn()?;
        let output = process.take_stdout().context("ping has no output")?;
        let seen = Arc::new(Mutex::new(Seen::default()));
        let shared = Arc::clone(&seen);
        let reader = thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                lock(&shared).line(&line);
            }
        });
        Ok(Self { process, seen, reader: Some(reader) })
    }

    /// How many answers have come in so far.
    pub fn received(&self) -> u64 {
        lock(&self.seen).replies.len() as u64
    }

    /// Waits for one more answer.
    pub fn wait_for_reply(&self, limit: Duration) -> anyhow::Result<()> {
        let before = self.received();
        wait_for("an answer to ping", limit, || self.received() > before)
    }

    /// Waits for one more request that has no answer yet when the next one goes out.
    pub fn wait_for_loss(&self, limit: Duration) -> anyhow::Result<()> {
        let before = lock(&self.seen).unanswered;
        wait_for("a ping without answer", limit, || lock(&self.seen).unanswered > before)
    }

    /// Waits until `time` has passed without an answer to what was asked meanwhile: a `ping` that does not run asks nothing.
    pub fn wait_for_silence(&self, time: Duration, limit: Duration) -> anyhow::Result<()> {
        wait_for("silence of ping", limit, || {
            let seen = lock(&self.seen);
            let last = seen.replies.last().map_or(Duration::ZERO, |reply| reply.at);
            now().saturating_sub(last) > time && seen.in_vain > 1
        })
    }

    /// Stops and counts. It waits for one more answer, and then for answers to what was asked before that one, so that a
    /// request under way does not count as lost. Once `IN_VAIN` requests in a row have had no answer for a second,
    /// everything after the last answer counts as lost.
    pub fn finish(mut self) -> anyhow::Result<Pings> {
        let (before, start) = (self.received(), Instant::now());
        let alive = wait_for_some("an answer to ping, or silence", FINISH_TIMEOUT, || {
            let has_ended = !matches!(self.process.ended(), Ok(None));
            let seen = lock(&self.seen);
            if seen.replies.len() as u64 > before {
                return Some(true);
            }
            (has_ended || start.elapsed() > ANSWER_TIMEOUT && seen.in_vain >= IN_VAIN).then_some(false)
        })?;
        let (last, end) = (lock(&self.seen).last(), now());
        if alive {
            // Answers that were overtaken. What is missing after that is lost, and told by the numbers.
            let _ =
                wait_for("answers that were overtaken", ANSWER_TIMEOUT, || lock(&self.seen).is_whole(last));
        }
        self.process.signal(Signal::INT)?;
        self.process.wait(FINISH_TIMEOUT)?;
        if let Some(reader) = self.reader.take() {
            ensure!(reader.join().is_ok(), "the reader of ping's output panicked");
        }
        lock(&self.seen).summary(if alive { End::Answer(last) } else { End::Silence(end) })
    }
}

/// How a measurement ends.
#[derive(Clone, Copy, Debug)]
enum End {
    /// With the answer to the request of this number: later ones don't count.
    Answer(u64),
    /// In silence, which is known to last until then: all requests count.
    Silence(Duration),
}

#[derive(Default)]
struct Seen {
    replies: Vec<Reply>,
    unanswered: u64,
    /// Requests without an answer since the last answer.
    in_vain: u64,
    transmitted: Option<u64>,
}

#[derive(Clone, Copy)]
struct Reply {
    sequence: u64,
    at: Duration,
    trip: Duration,
}

impl Seen {
    fn line(&mut self, line: &str) {
        if let Some(reply) = self.reply(line) {
            self.replies.push(reply);
            self.in_vain = 0;
        } else if line.contains("] no answer yet for ") {
            self.unanswered += 1;
            self.in_vain += 1;
        } else if let Some((count, _)) = line.split_once(" packets transmitted") {
            self.transmitted = count.parse().ok();
        }
    }

    /// `[1700000000.123456] 64 bytes from 10.244.1.2: icmp_seq=7 ttl=62 time=0.213 ms`
    fn reply(&self, line: &str) -> Option<Reply> {
        if line.ends_with("(DUP!)") {
            return None;
        }
        let after = |key: &str| line.split_once(key)?.1.split([' ', ']']).next();
        let at = Duration::try_from_secs_f64(after("[")?.parse().ok()?).ok()?;
        let trip = Duration::try_from_secs_f64(after(" time=")?.parse::<f64>().ok()? / 1000.0).ok()?;
        let low: u64 = after(" icmp_seq=")?.parse().ok()?;
        // Sequence numbers have 16 bits and count on from 65535 to 0.
        let last = self.replies.last().map_or(0, |reply| reply.sequence);
        let turns = last.saturating_sub(low).saturating_add(0x8000) >> 16;
        Some(Reply { sequence: (turns << 16) + low, at, trip })
    }

    /// The greatest number of a request that was answered.
    fn last(&self) -> u64 {
        self.replies.iter().map(|reply| reply.sequence).max().unwrap_or_default()
    }

    /// Whether each of the last requests up to this one was answered that may still be under way.
    fn is_whole(&self, last: u64) -> bool {
        let first = last.saturating_sub(UNDER_WAY) + 1;
        let late = self.replies.iter().rev().take(2 * UNDER_WAY as usize);
        late.filter(|reply| (first..=last).contains(&reply.sequence)).count() as u64 > last - first
    }

    fn summary(&self, end: End) -> anyhow::Result<Pings> {
        let transmitted = self.transmitted.context("ping ended without its statistics")?;
        let sent = match end {
            End::Answer(last) => last,
            End::Silence(_) => transmitted,
        };
        let counted: Vec<&Reply> = self.replies.iter().filter(|reply| reply.sequence <= sent).collect();
        let mut times: Vec<Duration> = counted.iter().map(|reply| reply.at).collect();
        times.sort();
        let received = times.len() as u64;
        if let End::Silence(until) = end {
            times.push(until);
        }
        let longest_gap = times.windows(2).map(|pair| pair[1].saturating_sub(pair[0])).max();
        let total: Duration = counted.iter().map(|reply| reply.trip).sum();
        Ok(Pings {
            sent,
            received,
            lost: sent.saturating_sub(received),
            longest_gap: longest_gap.unwrap_or_default(),
            mean: total.checked_div(u32::try_from(received)?).unwrap_or_default(),
        })
    }
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().expect("no holder of this lock panics")
}

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(lines: &[&str]) -> Seen {
        let mut seen = Seen::default();
        lines.iter().for_each(|line| seen.line(line));
        seen
    }

    #[test]
    fn a_hole_in_the_sequence_is_loss_and_its_length_the_gap() {
        let pings = seen(&[
            "PING 10.0.0.1 (10.0.0.1) 56(84) bytes of data.",
            "[1700000000.000000] 64 bytes from 10.0.0.1: icmp_seq=1 ttl=64 time=1.00 ms",
            "[1700000000.000100] 64 bytes from 10.0.0.1: icmp_seq=1 ttl=64 time=1.00 ms (DUP!)",
            "[1700000000.020000] no answer yet for icmp_seq=2",
            "[1700000000.250000] 64 bytes from 10.0.0.1: icmp_seq=3 ttl=64 time=3.00 ms",
            "4 packets transmitted, 2 received, +1 duplicates, 50% packet loss, time 30ms",
        ])
        .summary(End::Answer(3))
        .unwrap();
        assert_eq!((pings.sent, pings.received, pings.lost), (3, 2, 1));
        assert_eq!(pings.longest_gap.as_millis(), 250);
        assert_eq!(pings.mean.as_millis(), 2);
    }

    #[test]
    fn silence_at_the_end_counts_as_loss() {
        let seen = seen(&[
            "[1700000000.000000] 64 bytes from fd31::1: icmp_seq=1 ttl=64 time=0.1 ms",
            "5 packets transmitted, 1 received, 80% packet loss, time 40ms",
        ]);
        let pings = seen.summary(End::Silence(Duration::from_secs(1_700_000_002))).unwrap();
        assert_eq!((pings.sent, pings.lost, pings.longest_gap.as_secs()), (5, 4, 2));
    }

    #[test]
    fn an_answer_that_was_overtaken_is_waited_for_and_what_is_asked_meanwhile_does_not_count() {
        let mut seen = seen(&[
            "[1700000000.000000] 64 bytes from 10.0.0.1: icmp_seq=1 ttl=64 time=0.1 ms",
            "[1700000000.020000] no answer yet for icmp_seq=2",
            "[1700000000.030000] 64 bytes from 10.0.0.1: icmp_seq=3 ttl=64 time=0.1 ms",
        ]);
        assert_eq!((seen.last(), seen.is_whole(3), seen.in_vain), (3, false, 0));
        seen.line("[1700000000.040000] 64 bytes from 10.0.0.1: icmp_seq=4 ttl=64 time=0.1 ms");
        assert!(!seen.is_whole(3), "another one is no answer to it");
        seen.line("[1700000000.041000] 64 bytes from 10.0.0.1: icmp_seq=2 ttl=64 time=21.0 ms");
        assert!(seen.is_whole(3));
        seen.line("5 packets transmitted, 4 received, 20% packet loss, time 40ms");
        let pings = seen.summary(End::Answer(3)).unwrap();
        assert_eq!((pings.sent, pings.received, pings.lost), (3, 3, 0));
    }

    #[test]
    fn silence_is_what_was_asked_in_vain_and_not_what_was_not_asked() {
        let mut seen = seen(&["[1.0] 64 bytes from 10.0.0.1: icmp_seq=1 ttl=64 time=0.1 ms"]);
        assert_eq!(seen.in_vain, 0, "a ping that is stopped asks nothing");
        for number in 2..=21 {
            seen.line(&format!("[1.2] no answer yet for icmp_seq={number}"));
        }
        assert_eq!((seen.in_vain, seen.unanswered), (IN_VAIN, 20));
        seen.line("[1.3] 64 bytes from 10.0.0.1: icmp_seq=22 ttl=64 time=0.1 ms");
        assert_eq!((seen.in_vain, seen.unanswered), (0, 20));
    }

    #[test]
    fn sequence_numbers_count_on_after_sixteen_bits() {
        let mut seen = Seen::default();
        for low in [65_534, 65_535, 0, 1] {
            seen.line(&format!("[1.0] 64 bytes from 10.0.0.1: icmp_seq={low} ttl=64 time=0.1 ms"));
        }
        let sequences: Vec<u64> = seen.replies.iter().map(|reply| reply.sequence).collect();
        assert_eq!(sequences, [65_534, 65_535, 65_536, 65_537]);
    }
}
