//! `flanneld connectivity-test`: packets of several lengths and a TCP connection to every peer, from this host.
//!
//! It needs nothing but the peers' kernels and agents: no pods, no images. The peers are those that the agent of this
//! node knows.

mod outcome;

use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Write};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::Context;
use backends::echo::{EchoSocket, MIN_PACKET, Token};
use subnet::Family;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

use crate::ask;
use crate::status::PeerList;
use outcome::{PeerOutcome, Series, Test, TestedPeer};

/// An answer that takes longer is lost.
const TIMEOUT: Duration = Duration::from_secs(1);
/// The same for a TCP connection.
const TCP_TIMEOUT: Duration = Duration::from_secs(2);
/// Time between two packets of one series.
const INTERVAL: Duration = Duration::from_millis(50);
/// Packets to all peers together, in a second.
const MAX_RATE: u32 = 2000;
/// TCP connections that are tried at the same time.
const MAX_CONNECTIONS: usize = 64;

/// What to test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ConnectivityOptions {
    /// Lengths of packets, in bytes; the usual ones if there are none.
    pub(crate) sizes: Vec<u16>,
    /// Packets of each length.
    pub(crate) count: u32,
    /// Where the health of agents is served.
    pub(crate) health: SocketAddr,
    /// JSON instead of text.
    pub(crate) json: bool,
}

/// Tests the way to every peer and prints what came of it.
///
/// # Errors
/// When the peers are not known, nothing can be sent, or there is trouble with one of them.
pub(crate) fn run(options: &ConnectivityOptions) -> anyhow::Result<()> {
    let list: PeerList = ask::value(options.health, "/peers").map_err(anyhow::Error::msg)?;
    let peers = outcome::peers(list)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let begun = std::time::Instant::now();
    let outcomes = runtime.block_on(test(peers, options))?;
    let mut out = crate::output::stdout();
    match options.json {
        true => writeln!(out, "{}", outcome::json(&outcomes, begun.elapsed())?)?,
        false => out.write_all(outcome::table(&outcomes, begun.elapsed()).as_bytes())?,
    }
    let troubled = outcomes.iter().filter(|outcome| outcome.trouble().is_some()).count();
    anyhow::ensure!(troubled == 0, "there is trouble with {troubled} of {}", outcome::ways(outcomes.len()));
    Ok(())
}

/// The series of one peer, and the address that each goes to.
fn series(peer: &TestedPeer, sizes: &[u16]) -> Vec<(Test, IpAddr, u16)> {
    let mut all = vec![(Test::Underlay, peer.underlay, MIN_PACKET)];
    let usual = [MIN_PACKET, peer.mtu, peer.mtu.saturating_add(1)];
    let sizes = if sizes.is_empty() { &usual[..] } else { sizes };
    // A bridge that has no pods yet does not exist, so there the host stands for it.
    let to = peer.tunnel.unwrap_or(peer.underlay);
    all.extend(sizes.iter().map(|size| (Test::Inside(*size), to, *size)));
    all
}

async fn test(peers: Vec<TestedPeer>, options: &ConnectivityOptions) -> anyhow::Result<Vec<PeerOutcome>> {
    let mut outcomes: Vec<PeerOutcome> = peers
        .into_iter()
        .map(|peer| {
            let series = series(&peer, &options.sizes);
            let series = series.into_iter().map(|(test, to, size)| Series::new(test, to, size)).collect();
            PeerOutcome { peer, series, tcp: None }
        })
        .collect();
    let connections =
        tokio::spawn(connect_all(outcomes.iter().map(PeerOutcome::health).collect(), options.health.port()));
    echo_all(&mut outcomes, options.count).await?;
    for (outcome, connected) in outcomes.iter_mut().zip(connections.await?) {
        outcome.tcp = Some(connected);
    }
    Ok(outcomes)
}

/// A request under way.
struct PendingEcho {
    peer: usize,
    series: usize,
    token: Token,
    sent: Instant,
}

/// Sends every series, packet by packet, and counts what comes back.
async fn echo_all(outcomes: &mut [PeerOutcome], count: u32) -> anyhow::Result<()> {
    let mut sockets = Vec::new();
    for family in Family::BOTH {
        if outcomes.iter().any(|outcome| Family::of(outcome.peer.underlay) == family) {
            let open = EchoSocket::open(family);
            sockets.push(open.context("no raw socket for ICMP: this takes root, or the capability NET_RAW")?);
        }
    }
    let packets = outcomes.iter().map(|outcome| outcome.series.len()).sum::<usize>() as u32;
    let interval = INTERVAL.max(Duration::from_secs(packets.into()) / MAX_RATE);
    let (mut number, mut requests) = (0u16, BTreeMap::new());
    let mut begin = Instant::now();
    for round in 1..=count {
        progress(round, count);
        for (peer, outcome) in outcomes.iter_mut().enumerate() {
            for (index, series) in outcome.series.iter_mut().enumerate() {
                let Some(socket) = sockets.iter().find(|socket| socket.family() == Family::of(series.to))
                else {
                    continue;
                };
                let token = backends::random::token();
                series.sent += 1;
                number = number.wrapping_add(1);
                match socket.send(series.to, number, &token, series.size) {
                    Ok(()) => {
                        requests
                            .insert(number, PendingEcho { peer, series: index, token, sent: Instant::now() });
                    }
                    Err(error) => series.refused(&error),
                }
            }
        }
        begin += interval;
        let until = if round == count { Instant::now() + TIMEOUT } else { begin };
        listen(&sockets, outcomes, &mut requests, until).await;
    }
    progress(0, count);
    Ok(())
}

/// Counts answers until a moment, or until none is missing.
async fn listen(
    sockets: &[EchoSocket],
    outcomes: &mut [PeerOutcome],
    requests: &mut BTreeMap<u16, PendingEcho>,
    until: Instant,
) {
    loop {
        for socket in sockets {
            while let Ok(Some(arrival)) = socket.receive() {
                let Some(request) = requests.get(&arrival.sequence) else { continue };
                let series = &mut outcomes[request.peer].series[request.series];
                let fits = arrival.token == request.token
                    && arrival.from == series.to
                    && arrival.packet == usize::from(series.size);
                let rtt = request.sent.elapsed().saturating_sub(arrival.age);
                if fits && rtt <= TIMEOUT {
                    series.answered(rtt);
                    requests.remove(&arrival.sequence);
                }
            }
        }
        if Instant::now() >= until || requests.is_empty() {
            return sleep_until(until.min(Instant::now())).await;
        }
        let ready = async |socket: Option<&EchoSocket>| match socket {
            Some(socket) => drop(socket.readable().await),
            None => std::future::pending().await,
        };
        tokio::select! {
            () = ready(sockets.first()) => {}
            () = ready(sockets.get(1)) => {}
            () = sleep_until(until) => return,
        }
    }
}

/// Connects to the agents of all peers; gives how long each took, or why it did not work.
async fn connect_all(addrs: Vec<IpAddr>, port: u16) -> Vec<Result<Duration, String>> {
    let (mut tasks, mut results) = (JoinSet::new(), vec![Err("not tried".to_owned()); addrs.len()]);
    let mut addrs = addrs.into_iter().enumerate();
    loop {
        while tasks.len() < MAX_CONNECTIONS {
            let Some((index, addr)) = addrs.next() else { break };
            tasks.spawn(async move { (index, connect(SocketAddr::new(addr, port)).await) });
        }
        match tasks.join_next().await {
            Some(Ok((index, result))) => results[index] = result,
            Some(Err(_)) => {}
            None => return results,
        }
    }
}

async fn connect(to: SocketAddr) -> Result<Duration, String> {
    let begun = Instant::now();
    match timeout(TCP_TIMEOUT, TcpStream::connect(to)).await {
        Ok(Ok(_)) => Ok(begun.elapsed()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer within {TCP_TIMEOUT:?}")),
    }
}

/// Shows how far the test is, where somebody sees it.
fn progress(round: u32, count: u32) {
    if io::stderr().is_terminal() {
        let text = if round == 0 { "\r\x1b[K".to_owned() } else { format!("\r{round} of {count} packets") };
        // Who doesn't see it lacks nothing.
        let _ = write!(io::stderr(), "{text}");
    }
}
