//! One agent in a restless cluster of twenty thousand nodes: they come and go and change, while the API server
//! breaks its watches and forgets its history. In the end the kernel has to have what the server has.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::Context;
use backends::testing::Numbers;
use bench::bed::{Member, SETTLE, TIMEOUT};
use bench::figure::{Limit, Row, ms};
use bench::peer::{Peer, differences, ensure_equal};
use bench::process::{cpu_time, resident_mib};
use subnet::testing::ApiServer;

use super::cluster;
use crate::Stage;

const PEERS: u16 = 20_000;
/// Things that happen in a round.
const STEPS: u32 = 10_000;
const MAX_ROUNDS: u32 = 3;

/// Measures what is wrong in the kernel after that, and memory.
pub(crate) fn measure(stage: &Stage) -> anyhow::Result<()> {
    stage.progress.step(&format!("churn-20000: making {PEERS} nodes"))?;
    let cluster = cluster(stage)?;
    let api = cluster.api()?;
    let mut crowd = Crowd::new();
    let rows: [Row<'_>; 6] = [
        ("exec to the subnet file", "ms", Limit::None),
        ("VmRSS 10 s later", "MiB", Limit::Each(40.0)),
        ("differences from the store in the end", "", Limit::Each(0.0)),
        ("VmRSS 10 s after the last change", "MiB", Limit::Each(40.0)),
        ("last change to kernel right", "ms", Limit::None),
        (&format!("CPU for {STEPS} things that happen"), "s", Limit::None),
    ];
    stage.measure("churn-20000", rows, MAX_ROUNDS, |_| {
        crowd.complete(api);
        let mut member = cluster.start()?;
        let pid = member.pid();
        let start = member.time_to_subnet_file()?;
        stage.progress.pause(SETTLE)?;
        ensure_equal(&member, crowd.peers())?;
        let (before, used) = (resident_mib(pid)?, cpu_time(pid)?);
        let happened = crowd.stir(stage, api)?;
        stage.progress.step(&format!("churn-20000: {happened:?}"))?;
        let (settled, wrong) = settle(&member, &crowd, Instant::now())?;
        stage.progress.pause(SETTLE)?;
        let cpu = (cpu_time(pid)? - used).as_secs_f64();
        let after = resident_mib(pid)?;
        cluster.remove(member)?;
        Ok([ms(start), before, wrong as f64, after, ms(settled), cpu])
    })
}

/// When the kernel had what the server has, or how much is wrong after a minute.
fn settle(member: &Member, crowd: &Crowd, end: Instant) -> anyhow::Result<(Duration, usize)> {
    loop {
        let wrong = differences(member, crowd.peers().map(Peer::entry))?;
        let elapsed = end.elapsed();
        if wrong.is_empty() || elapsed > TIMEOUT / 2 {
            wrong.iter().take(10).for_each(|line| eprintln!("          wrong: {line}"));
            return Ok((elapsed, wrong.len()));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// What the server has, known besides it.
struct Crowd {
    peers: BTreeMap<u16, Peer>,
    /// Numbers that no address or MAC was made of yet.
    unused: u32,
    random: Numbers,
}

/// How often what happened.
#[derive(Debug, Default)]
struct Happened {
    added: u32,
    removed: u32,
    changed: u32,
    heartbeats: u32,
    broken: u32,
    forgotten: u32,
}

impl Crowd {
    fn new() -> Self {
        Self { peers: BTreeMap::new(), unused: 0, random: Numbers(1) }
    }

    /// Lets all come that are not there: at first, and those who left.
    fn complete(&mut self, api: &ApiServer) {
        for number in 0..PEERS {
            if !self.peers.contains_key(&number) {
                self.add(api, number);
            }
        }
    }

    /// The name and the subnet may have been there before, but this is another machine.
    fn add(&mut self, api: &ApiServer, number: u16) {
        let peer = Peer { number, address: self.unused, mac: self.unused };
        self.unused += 1;
        api.put_node(peer.large());
        self.peers.insert(number, peer);
    }

    fn peers(&self) -> impl Iterator<Item = Peer> {
        self.peers.values().copied()
    }

    /// Lets things happen, about a thousand a second, half of them heartbeats.
    fn stir(&mut self, stage: &Stage, api: &ApiServer) -> anyhow::Result<Happened> {
        let mut happened = Happened::default();
        for step in 0..STEPS {
            if step % 1000 == 0 {
                stage.progress.check()?;
            }
            let number = u16::try_from(self.random.below(PEERS.into())).context("more peers than numbers")?;
            let known = self.peers.get(&number).copied();
            match (self.random.below(16), known) {
                (0..=1, Some(peer)) => {
                    api.delete_node(&peer.name());
                    self.peers.remove(&number);
                    happened.removed += 1;
                }
                (0..=7, None) => {
                    self.add(api, number);
                    happened.added += 1;
                }
                (2..=7, Some(mut peer)) => {
                    if step % 2 == 0 {
                        peer.address = self.unused;
                    } else {
                        peer.mac = self.unused;
                    }
                    self.unused += 1;
                    let key = |name: &str| format!("flannel.alpha.coreos.com/{name}");
                    let data = format!(r#"{{"VNI":1,"VtepMAC":"{}"}}"#, peer.mac());
                    api.annotate(&peer.name(), &key("public-ip"), Some(&peer.public().to_string()));
                    api.annotate(&peer.name(), &key("backend-data"), Some(&data));
                    self.peers.insert(number, peer);
                    happened.changed += 1;
                }
                (_, Some(peer)) => {
                    api.heartbeat(&peer.name());
                    happened.heartbeats += 1;
                }
                (_, None) => {}
            }
            if step % 700 == 699 {
                api.disconnect();
                happened.broken += 1;
            }
            if step % 3000 == 2999 {
                // What is under way can't go on: 410 Gone.
                api.compact();
                api.disconnect();
                happened.forgotten += 1;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(happened)
    }
}
