//! A hundred echo requests a second, to see what gets lost and how long an outage lasts.

use std::io::{BufRead, BufReader};
use std::net::IpAddr;
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, ensure};
use rustix::process::Signal;

use super::namespace::Namespace;
use super::process::Process;
use super::wait_for;

/// Time between two requests.
const INTERVAL: &str = "0.01";

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
}

impl Default for PingOptions {
    fn default() -> Self {
        Self { size: 56, dont_fragment: false }
    }
}

impl Pinger {
    /// Starts to ping `target` from inside `namespace`.
    pub fn start(namespace: &Namespace, target: IpAddr) -> anyhow::Result<Self> {
        Self::start_with(namespace, target, PingOptions::default())
    }

    /// The same with requests that differ from the ordinary.
    pub fn start_with(namespace: &Namespace, target: IpAddr, options: PingOptions) -> anyhow::Result<Self> {
        let PingOptions { size, dont_fragment } = options;
        ensure!(size >= 16, "ping measures no round trips with {size} bytes of payload: give it 16 or more");
        let mut command = namespace
            .command("ping")
            .args(["-n", "-D", "-O", "-i", INTERVAL, "-s", &size.to_string()])
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

    /// Waits until `time` has passed without an answer.
    pub fn wait_for_silence(&self, time: Duration, limit: Duration) -> anyhow::Result<()> {
        wait_for("silence of ping", limit, || {
            let last = lock(&self.seen).replies.last().map_or(Duration::ZERO, |reply| reply.at);
            now().saturating_sub(last) > time
        })
    }

    /// Stops and counts. It waits up to a second for one more answer, so that a request under way does not
    /// count as lost; without one, everything after the last answer does.
    pub fn finish(mut self) -> anyhow::Result<Pings> {
        let alive = self.wait_for_reply(Duration::from_secs(1)).is_ok();
        let end = now();
        self.process.signal(Signal::INT)?;
        self.process.wait(Duration::from_secs(10))?;
        if let Some(reader) = self.reader.take() {
            ensure!(reader.join().is_ok(), "the reader of ping's output panicked");
        }
        lock(&self.seen).summary((!alive).then_some(end))
    }
}

#[derive(Default)]
struct Seen {
    replies: Vec<Reply>,
    unanswered: u64,
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
        } else if line.contains("] no answer yet for ") {
            self.unanswered += 1;
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

    fn summary(&self, silent_until: Option<Duration>) -> anyhow::Result<Pings> {
        let transmitted = self.transmitted.context("ping ended without its statistics")?;
        let mut times: Vec<Duration> = self.replies.iter().map(|reply| reply.at).collect();
        times.sort();
        let received = times.len() as u64;
        let sent = match (silent_until, self.replies.iter().map(|reply| reply.sequence).max()) {
            (None, Some(last)) => last,
            _ => transmitted,
        };
        times.extend(silent_until);
        let longest_gap = times.windows(2).map(|pair| pair[1].saturating_sub(pair[0])).max();
        let total: Duration = self.replies.iter().map(|reply| reply.trip).sum();
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
        .summary(None)
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
        let pings = seen.summary(Some(Duration::from_secs(1_700_000_002))).unwrap();
        assert_eq!((pings.sent, pings.lost, pings.longest_gap.as_secs()), (5, 4, 2));
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
