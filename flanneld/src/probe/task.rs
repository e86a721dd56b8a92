//! The task that sends probes and takes their answers.

use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use backends::echo::{EchoSocket, Token};
use subnet::Family;
use tokio::sync::watch;
use tokio::time::sleep_until;

use super::report::{ProbeMode, Report};
use super::table::{Table, VerdictChange};
use super::target::Targets;

/// So many answers are read in a row before something is sent again.
const BATCH: usize = 256;
/// So many changed verdicts are logged one by one in a minute; others are counted.
const MAX_LINES: u32 = 5;
const LINES_TIME: Duration = Duration::from_secs(60);
/// Without peers there is nothing to do.
const IDLE: Duration = Duration::from_secs(3600);
/// How long to wait after the sockets failed.
const PAUSE: Duration = Duration::from_secs(5);

/// Probes of all peers, shared between the task that sends them and those who show what they found.
#[derive(Clone)]
pub(crate) struct Probes(Arc<Mutex<ProbesState>>);

struct ProbesState {
    table: Table,
    mode: ProbeMode,
    lines: Lines,
}

/// What was logged of late.
struct Lines {
    since: Instant,
    written: u32,
    left_out: u32,
}

impl Probes {
    /// Each peer is probed once in `interval`, if they are few; none is if it is zero.
    pub(crate) fn new(interval: Duration) -> Self {
        let mode = if interval.is_zero() { ProbeMode::Off } else { ProbeMode::On };
        let table = Table::new(interval, Instant::now(), backends::random::id());
        Self(Arc::new(Mutex::new(ProbesState {
            table,
            mode,
            lines: Lines { since: Instant::now(), written: 0, left_out: 0 },
        })))
    }

    fn state(&self) -> MutexGuard<'_, ProbesState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What they found until now.
    pub(crate) fn report(&self) -> Report {
        let state = self.state();
        state.table.report(state.mode.clone(), Instant::now())
    }

    /// The same without words about each peer.
    pub(crate) fn brief(&self) -> Report {
        let state = self.state();
        state.table.brief(state.mode.clone())
    }

    /// Whether the operator has not switched them off.
    pub(crate) fn is_on(&self) -> bool {
        self.state().mode != ProbeMode::Off
    }

    /// Probes the peers that are told, for as long as they are. Changed verdicts are logged and handed to `heard`.
    pub(crate) async fn run(self, mut targets: watch::Receiver<Targets>, heard: impl Fn(&VerdictChange)) {
        if !self.is_on() {
            return;
        }
        let sockets = match Sockets::open() {
            Ok(sockets) => sockets,
            Err(why) => {
                tracing::warn!(
                    "peers are not probed: {why}; add the capability NET_RAW, or switch probes off with --probe-interval=0"
                );
                self.state().mode = ProbeMode::Impossible(why);
                return;
            }
        };
        loop {
            let wake = self.state().table.wake();
            tokio::select! {
                changed = targets.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let targets = targets.borrow_and_update();
                    self.state().table.set(&targets, Instant::now(), &mut backends::random::id);
                }
                () = sockets.readable() => {}
                () = sleep_until(wake.unwrap_or_else(|| Instant::now() + IDLE).into()) => {}
            }
            self.turn(&sockets, &heard);
        }
    }

    /// Reads what is there, then judges what is not, then sends.
    fn turn(&self, sockets: &Sockets, heard: &impl Fn(&VerdictChange)) {
        let mut state = self.state();
        let now = Instant::now();
        sockets.receive(&mut state.table, now);
        state.table.expire(now);
        for probe in state.table.due(now, &mut backends::random::token) {
            if sockets.send(probe.to, probe.sequence, &probe.token, probe.packet).is_err() {
                state.table.refused(now, probe.sequence);
            }
        }
        let news = state.table.news(now);
        state.lines.log(&news, now);
        drop(state);
        news.iter().for_each(heard);
    }
}

/// A raw socket for each family that the host has.
struct Sockets(Vec<EchoSocket>);

impl Sockets {
    fn open() -> Result<Self, String> {
        let (mut sockets, mut why) = (Vec::new(), String::new());
        for family in Family::BOTH {
            match EchoSocket::open(family) {
                Ok(socket) => sockets.push(socket),
                Err(error) => why = format!("no raw socket for ICMP of {family} can be opened: {error}"),
            }
        }
        if sockets.is_empty() { Err(why) } else { Ok(Self(sockets)) }
    }

    fn of(&self, addr: IpAddr) -> Option<&EchoSocket> {
        self.0.iter().find(|socket| socket.family() == Family::of(addr))
    }

    fn send(&self, to: IpAddr, sequence: u16, token: &Token, packet: u16) -> io::Result<()> {
        self.of(to).ok_or(io::ErrorKind::Unsupported)?.send(to, sequence, token, packet)
    }

    /// Waits for an answer of either family.
    async fn readable(&self) {
        let wait = async |socket: Option<&EchoSocket>| match socket {
            Some(socket) => {
                if socket.readable().await.is_err() {
                    tokio::time::sleep(PAUSE).await;
                }
            }
            None => std::future::pending().await,
        };
        tokio::select! {
            () = wait(self.0.first()) => {}
            () = wait(self.0.get(1)) => {}
        }
    }

    /// Takes the answers that are there.
    fn receive(&self, table: &mut Table, now: Instant) {
        for socket in &self.0 {
            for _ in 0..BATCH {
                match socket.receive() {
                    Ok(Some(arrival)) => table.answered(now, &arrival),
                    Ok(None) => break,
                    Err(error) => {
                        tracing::debug!(%error, "an answer to a probe can't be received");
                        break;
                    }
                }
            }
        }
    }
}

impl Lines {
    fn log(&mut self, news: &[VerdictChange], now: Instant) {
        if now.saturating_duration_since(self.since) >= LINES_TIME && !news.is_empty() {
            if self.left_out > 0 {
                let more = self.left_out;
                tracing::warn!(
                    "the ways to {more} more peers have changed since: flanneld status --peers lists all"
                );
            }
            *self = Self { since: now, written: 0, left_out: 0 };
        }
        for VerdictChange { subnet, underlay, verdict, cause, remedy } in news {
            if self.written == MAX_LINES {
                self.left_out += 1;
                continue;
            }
            self.written += 1;
            match (verdict.is_trouble(), cause, remedy) {
                (true, Some(cause), Some(remedy)) => tracing::warn!("{cause}: {remedy}"),
                _ => tracing::info!(peer = %subnet, "{underlay} is reachable again"),
            }
        }
    }
}
