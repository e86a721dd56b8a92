//! iperf3 from one end to another, with what both of its ends say.

use std::io::{self, Read};
use std::net::IpAddr;
use std::process::{ChildStdout, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, anyhow, ensure};
use backends::testing::{Namespace, Pod, Process, wait_for};
use serde_json::Value;

/// Where a measurement begins or ends.
#[derive(Clone, Copy)]
pub struct End<'a> {
    /// Where programs run.
    pub namespace: &'a Namespace,
    /// By which address they are reached.
    pub address: IpAddr,
}

impl<'a> End<'a> {
    /// A pod.
    pub fn of(pod: &'a Pod) -> Self {
        Self { namespace: pod.namespace(), address: pod.address() }
    }
}

/// Where the server listens: iperf3's own, in the kernel's hexadecimal notation and ours.
const PORT: (&str, u16) = (":1451", 5201);

/// How long beyond its time a test may take to connect, to tell results and to end.
const AROUND: Duration = Duration::from_secs(15);

/// What both ends reported.
pub struct Report {
    client: Value,
    server: Value,
}

/// What a direction of a TCP test moved.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stream {
    /// What arrived.
    pub bytes: u64,
    /// Gbit/s that arrived.
    pub rate: f64,
    /// Segments sent again.
    pub again: u64,
}

/// What a UDP test moved.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Datagrams {
    /// Datagrams a second that the client handed to the kernel.
    pub offered: f64,
    /// Datagrams a second that the server got.
    pub received: f64,
    /// Bytes that the server got.
    pub bytes: u64,
    /// How many of them after one that was sent later.
    pub disordered: u64,
}

/// Runs a test with these arguments of the client. Both ends have been waited for when it returns.
pub fn run(ends: [End<'_>; 2], time: Duration, args: &[&str]) -> anyhow::Result<Report> {
    let mut server = Server::start(ends[1])?;
    let [from, to] = ends.map(|end| end.address.to_string());
    let seconds = time.as_secs_f64().to_string();
    let mut client = ends[0]
        .namespace
        .command("iperf3")
        .args(["-J", "-i0", "--connect-timeout=3000", "-c", &to, "-B", &from, "-t", &seconds])
        .args(args)
        .stdout(Stdio::piped())
        .spawn()?;
    let said = listen(client.take_stdout().context("iperf3 has no output")?);
    client.wait(time + AROUND)?;
    let client = report("client", said)?;
    let server = server.finish()?;
    Ok(Report { client, server })
}

/// A TCP stream that takes all it can get until it is stopped, for those who only want the load.
pub struct Load {
    client: Process,
    _server: Server,
}

impl Load {
    /// Starts it; it ends by itself after `time`.
    pub fn start(ends: [End<'_>; 2], time: Duration) -> anyhow::Result<Self> {
        let server = Server::start(ends[1])?;
        let [from, to] = ends.map(|end| end.address.to_string());
        let seconds = time.as_secs_f64().to_string();
        let command = ends[0].namespace.command("iperf3");
        let client = command.args(["-c", &to, "-B", &from, "-t", &seconds]).spawn()?;
        Ok(Self { client, _server: server })
    }

    /// An error if it ended before.
    pub fn still_runs(&mut self) -> anyhow::Result<()> {
        let ended = self.client.ended()?;
        ensure!(ended.is_none(), "the load ended early");
        Ok(())
    }
}

/// A server for one test.
struct Server {
    process: Process,
    said: Option<thread::JoinHandle<io::Result<String>>>,
}

impl Server {
    fn start(end: End<'_>) -> anyhow::Result<Self> {
        // Answers to datagrams have the address that was asked, which is not the first one of a node.
        let address = end.address.to_string();
        let command = end.namespace.command("iperf3").args(["-s", "-1", "-J", "-i0", "-B", &address]);
        let mut process = command.args(["-p", &PORT.1.to_string()]).stdout(Stdio::piped()).spawn()?;
        let said = Some(listen(process.take_stdout().context("iperf3 has no output")?));
        wait_for("iperf3 to listen", AROUND, || end.namespace.run(listens).unwrap_or(false))?;
        Ok(Self { process, said })
    }

    fn finish(&mut self) -> anyhow::Result<Value> {
        self.process.wait(AROUND)?;
        report("server", self.said.take().context("its report was read before")?)
    }
}

/// Whether somebody listens on iperf3's port in the namespace of this thread.
fn listens() -> io::Result<bool> {
    let text = std::fs::read_to_string("/proc/thread-self/net/tcp")?
        + &std::fs::read_to_string("/proc/thread-self/net/tcp6")?;
    Ok(text.lines().any(|line| {
        let mut fields = line.split_whitespace().skip(1);
        fields.next().is_some_and(|local| local.ends_with(PORT.0)) && fields.nth(1) == Some("0A")
    }))
}

/// Reads while it runs: who doesn't read lets it wait.
fn listen(mut output: ChildStdout) -> thread::JoinHandle<io::Result<String>> {
    thread::spawn(move || {
        let mut text = String::new();
        output.read_to_string(&mut text)?;
        Ok(text)
    })
}

fn report(who: &str, said: thread::JoinHandle<io::Result<String>>) -> anyhow::Result<Value> {
    let text = said.join().map_err(|_| anyhow!("the reader panicked"))??;
    let value: Value = serde_json::from_str(&text)
        .with_context(|| format!("the report of iperf3's {who} is no JSON: {text:?}"))?;
    ensure!(value["error"].is_null(), "iperf3's {who}: {}", value["error"]);
    Ok(value)
}

impl Report {
    /// What went from the client to the server.
    pub fn forward(&self) -> anyhow::Result<Stream> {
        self.stream("sum_sent", "sum_received", &self.server["end"]["sum_received"])
    }

    /// What went from the server to the client in a test of both directions.
    pub fn backward(&self) -> anyhow::Result<Stream> {
        // Of this direction the server sees what it sent, and the client what it got.
        let sent = &self.client["end"]["sum_sent_bidir_reverse"];
        self.stream("sum_sent_bidir_reverse", "sum_received_bidir_reverse", sent)
    }

    /// A direction, by the names that the client has for it; `witness` must agree with what it says.
    fn stream(&self, sent: &str, received: &str, witness: &Value) -> anyhow::Result<Stream> {
        let (sent, received) = (&self.client["end"][sent], &self.client["end"][received]);
        let [sent_bytes, bytes, seen] = [sent, received, witness].map(|sum| number(sum, "bytes"));
        let (sent_bytes, bytes, seen) = (sent_bytes?, bytes?, seen?);
        ensure!(bytes > 0.0, "nothing arrived");
        ensure!(bytes <= sent_bytes, "{bytes} bytes arrived of {sent_bytes}");
        // What is still under way at the end counts as sent only.
        let apart = (bytes - seen).abs();
        ensure!(apart <= 0.001 * bytes + 64e6, "the client says {bytes} bytes, the server {seen}");
        Ok(Stream {
            bytes: bytes as u64,
            rate: number(received, "bits_per_second")? / 1e9,
            again: number(sent, "retransmits")? as u64,
        })
    }

    /// What a UDP test moved; its datagrams have `size` bytes.
    pub fn datagrams(&self, size: u64) -> anyhow::Result<Datagrams> {
        let (sent, received) = (&self.client["end"]["sum_sent"], &self.client["end"]["sum_received"]);
        let seen = &self.server["end"]["sum_received"];
        let bytes = number(seen, "bytes")?;
        let [claimed, packets, lost] =
            [number(received, "bytes")?, number(received, "packets")?, number(received, "lost_packets")?];
        ensure!(claimed == bytes, "the client says that {claimed} bytes arrived, the server {bytes}");
        ensure!(bytes > 0.0, "nothing arrived");
        let count = bytes / size as f64;
        // A server counts what it missed up to the last datagram that it got.
        ensure!(count <= packets && lost <= packets, "{count} datagrams arrived of {packets}");
        let streams = self.server["end"]["streams"].as_array().into_iter().flatten();
        let disordered = streams.filter_map(|stream| stream["udp"]["out_of_order"].as_u64()).sum();
        Ok(Datagrams {
            offered: number(sent, "packets")? / number(sent, "seconds")?,
            received: count / number(seen, "seconds")?,
            bytes: bytes as u64,
            disordered,
        })
    }
}

fn number(sum: &Value, key: &str) -> anyhow::Result<f64> {
    sum[key].as_f64().with_context(|| format!("no {key} in iperf3's report: {sum}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn tcp(claimed: u64, seen: u64) -> Report {
        let client = json!({"end": {
            "sum_sent": {"bytes": 5_000_000_000u64, "retransmits": 3},
            "sum_received": {"bytes": claimed, "bits_per_second": 8e9},
        }});
        Report { client, server: json!({"end": {"sum_received": {"bytes": seen}}}) }
    }

    #[test]
    fn a_server_that_saw_something_else_than_the_client_claims_is_an_error() {
        let stream = tcp(4_999_000_000, 4_999_000_000).forward().unwrap();
        assert_eq!(stream, Stream { bytes: 4_999_000_000, rate: 8.0, again: 3 });
        assert!(
            tcp(4_999_000_000, 4_000_000_000)
                .forward()
                .unwrap_err()
                .to_string()
                .contains("the server 4000000000")
        );
        assert!(tcp(6_000_000_000, 6_000_000_000).forward().is_err(), "more than was sent");
        assert!(tcp(0, 0).forward().is_err());
    }

    #[test]
    fn datagrams_are_counted_where_they_arrive() {
        let client = json!({"end": {
            "sum_sent": {"packets": 1000, "seconds": 2.0},
            "sum_received": {"bytes": 6400, "packets": 1000, "lost_packets": 900},
        }});
        let server = json!({"end": {
            "sum_received": {"bytes": 6400, "seconds": 2.0},
            "streams": [{"udp": {"out_of_order": 1}}],
        }});
        let moved = Report { client, server }.datagrams(64).unwrap();
        assert_eq!(moved, Datagrams { offered: 500.0, received: 50.0, bytes: 6400, disordered: 1 });
    }
}
