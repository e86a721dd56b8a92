//! Measures pods' traffic between two nodes in the guest of `bench/vm/bench`, whose clock counts instructions.
//!
//! One thread sends and receives in turn, but for the TCP stream, so that nothing depends on the scheduler. Prints one line of JSON for
//! each figure: `{"name":"vxlan, fast path, UDP 64 B","value":41.2,"unit":"kpps"}`.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use backends::testing::{Agent, Fabric, Node, Pod, program, uninterrupted, wait_for};
use clap::Parser;
use ipnet::IpNet;
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(120);
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
    _agents: [Agent; 2],
    nodes: [Node; 2],
    _fabric: Fabric,
}

impl Bed {
    fn new(backend: &str, fast_path: bool) -> anyhow::Result<Self> {
        let fabric = Fabric::new()?;
        let nodes = [fabric.node()?, fabric.node()?];
        let leases = nodes[0].dir().join("leases");
        fs::create_dir_all(&leases)?;
        let config =
            json!({ "Network": "10.244.0.0/16", "FastPath": fast_path, "Backend": { "Type": backend } });
        fs::write(leases.join("config.json"), config.to_string())?;
        let store = format!("--lease-store=file:{}", leases.display());
        let flanneld = program("flanneld")?;
        let start = |node| Agent::spawn(node, &flanneld, [&store[..], "--ip-masq", "--probe-interval=0"]);
        let mut agents = [start(&nodes[0])?, start(&nodes[1])?];
        for agent in &mut agents {
            agent.wait_ready(LIMIT)?;
        }
        let pod = |index: usize| -> anyhow::Result<Pod> {
            let subnet: IpNet = agents[index].subnet_env()?.subnets.v4.context("no subnet")?.into();
            let address = subnet.hosts().nth(1).context("a subnet without addresses")?;
            Pod::wired(&nodes[index], IpNet::new(address, subnet.prefix_len())?)
        };
        let bed = Self { pods: [pod(0)?, pod(1)?], _agents: agents, nodes, _fabric: fabric };
        wait_for("an echo between the pods", LIMIT, || {
            bed.pods[0].namespace().reaches(bed.pods[1].address()).unwrap_or(false)
        })?;
        for node in bed.nodes.iter().filter(|_| fast_path) {
            wait_for("pods' devices in the flowtable", LIMIT, || {
                let tables = node.namespace().command("nft").args(["list", "flowtables"]).ok();
                let tables = tables.unwrap_or_default();
                tables.split("devices = {").nth(1).is_some_and(|devices| devices.contains("pod"))
            })?;
        }
        // What the kernel and the agents still do after that is over before anything is measured.
        thread::sleep(Duration::from_millis(500));
        Ok(bed)
    }

    fn udp(&self) -> anyhow::Result<[UdpSocket; 2]> {
        let socket =
            |pod: &Pod| pod.namespace().run(|| UdpSocket::bind(SocketAddr::new(pod.address(), PORT)));
        let sockets = [socket(&self.pods[0])?, socket(&self.pods[1])?];
        for (index, socket) in sockets.iter().enumerate() {
            socket.connect(SocketAddr::new(self.pods[1 - index].address(), PORT))?;
            socket.set_read_timeout(Some(LIMIT))?;
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
            let bed = Bed::new(backend, fast_path)?;
            let put = |what: &str, value: f64, unit: &str| {
                let name = format!("{backend}, {path}, {what}");
                println!("{}", json!({ "name": name, "value": value, "unit": unit }));
            };
            let some = |amount: u64| (amount * args.amount / 100).max(1);
            put("one TCP stream", stream(&bed, some(640))?, "Mbit/s");
            let [a, b] = bed.udp()?;
            put("round trip of 64 B", round_trips(&a, &b, some(2_000))?, "us");
            put("UDP 64 B", datagrams(&a, &b, some(160))?, "kpps");
            put("new TCP connections", connections(&bed, some(400))?, "per s");
        }
    }
    Ok(())
}

/// One TCP stream of so many chunks, after a tenth of that to warm up: Mbit/s.
fn stream(bed: &Bed, chunks: u64) -> anyhow::Result<f64> {
    let (listener, at) = bed.listen()?;
    let mut sender = bed.pods[0].namespace().run(|| TcpStream::connect_timeout(&at, LIMIT))?;
    let (mut receiver, _) = listener.accept()?;
    let warm = chunks / 10 + 1;
    thread::scope(|scope| {
        let sending = scope.spawn(move || -> anyhow::Result<()> {
            let buffer = vec![7; CHUNK];
            for _ in 0..warm + chunks {
                sender.write_all(&buffer)?;
            }
            Ok(())
        });
        let mut buffer = vec![0; CHUNK];
        for _ in 0..warm {
            receiver.read_exact(&mut buffer)?;
        }
        let start = Instant::now();
        for _ in 0..chunks {
            receiver.read_exact(&mut buffer)?;
        }
        let time = start.elapsed();
        sending.join().expect("sending does not panic")?;
        Ok((chunks * CHUNK as u64 * 8) as f64 / time.as_secs_f64() / 1e6)
    })
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
            let mut client = TcpStream::connect_timeout(&at, LIMIT)?;
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
