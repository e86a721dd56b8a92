//! Measures pods' traffic between two nodes in the guest of `bench/vm/bench`, whose clock counts instructions.
//!
//! One thread sends and receives in turn, but for the TCP stream, so that nothing depends on the scheduler. Prints one line of JSON for
//! each figure: `{"name":"vxlan, fast path, UDP 64 B","value":41.2,"unit":"kpps"}`.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use backends::testing::{Pod, program, uninterrupted, wait_for};
use bench::bed::{Cluster, Member, TIMEOUT};
use clap::Parser;
use serde_json::json;
use subnet::Family;

const PORT: u16 = 7000;
const CHUNK: usize = 64 * 1024;

#[derive(Parser)]
#[command(name = "guest", about = "Measures pods' traffic in a guest that counts instructions")]
struct Args {
    /// Backends to measure
    #[arg(long, value_delimiter = ',', default_value = "vxlan,host-gw")]
    backends: Vec<String>,
    /// How much of everything is measured, in percent
    #[arg(long, default_value_t = 100)]
    amount: u64,
}

/// Two nodes with agents and a pod each.
struct Bed {
    pods: [Pod; 2],
    members: [Member; 2],
    _cluster: Cluster,
}

impl Bed {
    fn new(backend: &str, fast_path: bool) -> anyhow::Result<Self> {
        let config =
            json!({ "Network": "10.244.0.0/16", "FastPath": fast_path, "Backend": { "Type": backend } });
        let args = ["--ip-masq", "--probe-interval=0"];
        let cluster = Cluster::in_files(program("flanneld")?, &config.to_string(), &args)?;
        let mut members =
            [cluster.start_on(cluster.fabric.node()?)?, cluster.start_on(cluster.fabric.node()?)?];
        for member in &mut members {
            member.agent.wait_ready(TIMEOUT)?;
        }
        let pods = [members[0].pod(&[Family::V4])?, members[1].pod(&[Family::V4])?];
        wait_for("an echo between the pods", TIMEOUT, || {
            pods[0].namespace().reaches(pods[1].address()).unwrap_or(false)
        })?;
        for member in members.iter().filter(|_| fast_path) {
            member.wait("the table of the fast path", || {
                let tables = member.show("nft list ruleset").unwrap_or_default();
                tables.contains("table ip flannel-fast-path") && tables.contains("oifname")
            })?;
        }
        // What the kernel and the agents still do after that is over before anything is measured.
        thread::sleep(Duration::from_millis(500));
        Ok(Self { pods, members, _cluster: cluster })
    }

    /// Whether pods' devices are in the flowtables of both nodes, or in none.
    fn is_armed(&self) -> anyhow::Result<bool> {
        let armed = |member: &Member| -> anyhow::Result<bool> {
            let tables = member.show("nft list flowtables")?;
            Ok(tables.split("devices = {").nth(1).is_some_and(|devices| devices.contains("pod")))
        };
        let [a, b] = [armed(&self.members[0])?, armed(&self.members[1])?];
        ensure!(a == b, "one node has devices in its flowtable, the other one has none");
        Ok(a)
    }

    fn udp(&self) -> anyhow::Result<[UdpSocket; 2]> {
        let socket =
            |pod: &Pod| pod.namespace().run(|| UdpSocket::bind(SocketAddr::new(pod.address(), PORT)));
        let sockets = [socket(&self.pods[0])?, socket(&self.pods[1])?];
        for (index, socket) in sockets.iter().enumerate() {
            socket.connect(SocketAddr::new(self.pods[1 - index].address(), PORT))?;
            socket.set_read_timeout(Some(TIMEOUT))?;
        }
        Ok(sockets)
    }

    fn listen(&self) -> anyhow::Result<(TcpListener, SocketAddr)> {
        let at = SocketAddr::new(self.pods[1].address(), PORT);
        Ok((self.pods[1].namespace().run(|| TcpListener::bind(at))?, at))
    }
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("guest: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> anyhow::Result<()> {
    for backend in &args.backends {
        for (path, fast_path) in [("ordinary path", false), ("fast path", true)] {
            let put = |what: &str, value: f64, unit: &str| {
                let name = format!("{backend}, {path}, {what}");
                println!("{}", json!({ "name": name, "value": value, "unit": unit }));
            };
            let some = |amount: u64| (amount * args.amount / 100).max(1);
            let bed = Bed::new(backend, fast_path)?;
            // As on nodes where all connections are short.
            put("new TCP connections", connections(&bed, some(2_000))?, "per s");
            ensure!(!bed.is_armed()?, "short connections have armed the fast path");
            drop(bed);
            let bed = Bed::new(backend, fast_path)?;
            if fast_path {
                put("time until a stream has armed it", arm(&bed)?, "ms");
            }
            put("one TCP stream", stream(&bed, some(640))?, "Mbit/s");
            let [a, b] = bed.udp()?;
            put("round trip of 64 B", round_trips(&a, &b, some(2_000))?, "us");
            put("UDP 64 B", datagrams(&a, &b, some(160))?, "kpps");
            // Those before are still in the flowtable.
            put("new TCP connections beside long ones", connections(&bed, some(2_000))?, "per s");
            ensure!(bed.is_armed()? == fast_path, "long connections have not kept the fast path armed");
        }
    }
    Ok(())
}

/// Sends a TCP stream until the flowtables of both nodes have devices, and gives the milliseconds that it took, some of which `nft` takes.
fn arm(bed: &Bed) -> anyhow::Result<f64> {
    let (listener, at) = bed.listen()?;
    let mut sender = bed.pods[0].namespace().run(|| TcpStream::connect_timeout(&at, TIMEOUT))?;
    let (mut receiver, _) = listener.accept()?;
    let start = Instant::now();
    thread::scope(|scope| {
        scope.spawn(move || while receiver.read(&mut [0; CHUNK]).is_ok_and(|read| read > 0) {});
        while !matches!(bed.is_armed(), Ok(true)) {
            ensure!(start.elapsed() < TIMEOUT, "a stream has not armed the fast path");
            for _ in 0..16 {
                sender.write_all(&[7; CHUNK])?;
            }
        }
        let time = start.elapsed();
        drop(sender);
        Ok(time.as_secs_f64() * 1e3)
    })
}

/// One TCP stream of so many chunks, after a tenth of that to warm up, each of which is read before the next one is sent: Mbit/s. With two
/// threads it would depend on when the scheduler lets which of them run, and rounds would differ by some percent.
fn stream(bed: &Bed, chunks: u64) -> anyhow::Result<f64> {
    let (listener, at) = bed.listen()?;
    let mut sender = bed.pods[0].namespace().run(|| TcpStream::connect_timeout(&at, TIMEOUT))?;
    let (mut receiver, _) = listener.accept()?;
    let mut buffer = vec![7; CHUNK];
    let mut carry = |chunks: u64| -> anyhow::Result<()> {
        for _ in 0..chunks {
            sender.write_all(&buffer)?;
            receiver.read_exact(&mut buffer)?;
        }
        Ok(())
    };
    carry(chunks / 10 + 1)?;
    let start = Instant::now();
    carry(chunks)?;
    Ok((chunks * CHUNK as u64 * 8) as f64 / start.elapsed().as_secs_f64() / 1e6)
}

/// Datagrams of 64 bytes in bursts that fit into the receiver's buffer: thousands per second.
fn datagrams(a: &UdpSocket, b: &UdpSocket, bursts: u64) -> anyhow::Result<f64> {
    const BURST: u64 = 64;
    let mut buffer = [0; 128];
    let start = Instant::now();
    for _ in 0..bursts {
        for _ in 0..BURST {
            ensure!(a.send(&[7; 64])? == 64, "a datagram was cut");
        }
        for _ in 0..BURST {
            uninterrupted(|| b.recv(&mut buffer)).context("a datagram was lost")?;
        }
    }
    Ok((bursts * BURST) as f64 / start.elapsed().as_secs_f64() / 1e3)
}

/// 64 bytes there and back: microseconds.
fn round_trips(a: &UdpSocket, b: &UdpSocket, count: u64) -> anyhow::Result<f64> {
    let mut buffer = [0; 128];
    let mut trip = || -> anyhow::Result<()> {
        a.send(&[7; 64])?;
        uninterrupted(|| b.recv(&mut buffer))?;
        b.send(&[7; 64])?;
        uninterrupted(|| a.recv(&mut buffer))?;
        Ok(())
    };
    for _ in 0..50 {
        trip()?;
    }
    let start = Instant::now();
    for _ in 0..count {
        trip()?;
    }
    Ok(start.elapsed().as_secs_f64() * 1e6 / count as f64)
}

/// Connections with one request and one answer of 64 bytes, one after the other: so many per second.
fn connections(bed: &Bed, count: u64) -> anyhow::Result<f64> {
    let (listener, at) = bed.listen()?;
    let mut buffer = [0; 64];
    bed.pods[0].namespace().run(|| {
        let mut one = || -> anyhow::Result<()> {
            let mut client = TcpStream::connect_timeout(&at, TIMEOUT)?;
            let (mut server, _) = listener.accept()?;
            client.write_all(&[7; 64])?;
            server.read_exact(&mut buffer)?;
            server.write_all(&[7; 64])?;
            client.read_exact(&mut buffer)?;
            Ok(())
        };
        for _ in 0..20 {
            one()?;
        }
        let start = Instant::now();
        for _ in 0..count {
            one()?;
        }
        Ok(count as f64 / start.elapsed().as_secs_f64())
    })
}
