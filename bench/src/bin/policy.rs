//! Measures network policies: compiled, and applied to the real kernel in a namespace of its own; what one pod's arrival
//! costs, and what a large cluster takes of memory. With `--pairs`, compares random packets with the evaluator instead.

use std::collections::BTreeSet;
use std::fs;
use std::net::Ipv4Addr;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use backends::policy::{Cluster, Enforcer, Engine, Settings};
use backends::testing::Namespace;
use backends::testing::policy::{Connection, Interpreter, Outcome, Random};
use bench::figure::ms;
use bench::process::resident_mib;
use clap::Parser;
use ipnet::{IpNet, Ipv4Net};
use subnet::policy::{
    Isolation, Labels, NamespaceScope, NetworkPolicy, ObjectName, Peer, Peers, Pod, Port, PortMatch, Ports,
    Protocol, Requirement, Rule, Selector, Uid,
};

const SHIFT: u32 = 24;
const LOCAL_PODS: u32 = 100;
const ARRIVALS: u32 = 200;

#[derive(Parser)]
#[command(name = "policy", about = "Measures network policies, or compares them with an evaluator")]
struct Args {
    /// Compares so many random packets with the evaluator instead.
    #[arg(long)]
    pairs: Option<u64>,
    /// Applies so many policies on one pod in this network namespace instead, for `bench/policy-cost.sh`.
    #[arg(long)]
    apply: Option<u32>,
    /// The number that random clusters follow from.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How often everything is made from nothing.
    #[arg(long, default_value_t = 5)]
    rounds: u32,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let done = match (args.pairs, args.apply) {
        (Some(pairs), _) => compare(args.seed, pairs),
        (None, Some(policies)) => isolate(policies),
        (None, None) => measure(args.rounds),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Worlds from this number on, each changed several times.
fn compare(first: u64, pairs: u64) -> anyhow::Result<()> {
    let (mut compared, mut dropped) = (0u64, 0u64);
    let mut seed = first;
    while compared < pairs {
        let mut random = Random::new(seed);
        let mut world = random.world();
        let mut engine = Engine::new(world.settings.clone(), SHIFT, 42);
        world.tell(&mut engine.cluster);
        let mut now = Instant::now();
        engine.adopt(None, now);
        for _ in 0..6 {
            let table = engine.table();
            let interpreter = table.as_ref().map(Interpreter::new);
            for _ in 0..100 {
                let packet = random.packet(&world);
                let passes = interpreter
                    .as_ref()
                    .is_none_or(|run| run.run("forward", &packet, Connection::NEW) != Outcome::Dropped);
                ensure!(passes == world.allows(&packet), "--seed {seed}: {packet:?} in {world:#?}");
                compared += 1;
                dropped += u64::from(!passes);
            }
            random.change(&mut world, &mut engine.cluster);
            now += Duration::from_secs(2);
            engine.plan(now).context("the kernel is known")?;
        }
        seed += 1;
    }
    println!(
        "{compared} packets compared in {} clusters, {dropped} of them forbidden: no difference",
        seed - first
    );
    Ok(())
}

fn measure(rounds: u32) -> anyhow::Result<()> {
    match listeners()? {
        0 => {}
        some => println!(
            "{some} sockets hear of changes to nftables, in this or another network namespace, such as those of agents: the \
             kernel writes a notification of each element then, and what is made from nothing takes twice as long"
        ),
    }
    for (both, what) in [(false, "1,000 policies"), (true, "1,000 policies for both directions")] {
        // Another namespace each time, all of which stay: the kernel would be busy with the end of the one before.
        let mut made = Vec::new();
        let (mut compile, mut apply) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            let mut engine = natural(both);
            let start = Instant::now();
            let plan = engine.adopt(None, Instant::now());
            compile.push(start.elapsed());
            println!("{what}: {} edits, {:?}", plan.edits.len(), engine.summary());
            let namespace = Namespace::new()?;
            let engine = natural(both);
            let mut enforcer = namespace.run(|| Enforcer::open(engine))?;
            let start = Instant::now();
            enforcer.converge(Instant::now())?;
            apply.push(start.elapsed());
            made.push((namespace, enforcer));
        }
        report(&format!("{what}, 100 pods: compiled"), &mut compile);
        report(&format!("{what}, 100 pods: compiled and applied from nothing"), &mut apply);
        let (namespace, enforcer) = made.last_mut().context("at least one round")?;
        namespace.command("nft").args(["list", "ruleset"]).ok().context("nft can print it")?;
        arrivals(enforcer)?;
        let mut nothing = Vec::new();
        for _ in 0..ARRIVALS {
            nothing.push(converge(enforcer, true)?);
        }
        report("nothing changed, 0 changes", &mut nothing);
        let mut engine = Engine::new(settings(), SHIFT, 42);
        std::mem::swap(&mut engine, &mut enforcer.engine);
        enforcer.engine.cluster = engine.cluster;
        let mut restart = vec![converge(enforcer, true)?];
        report("restart: read, compared, 0 changes", &mut restart);
    }
    memory()
}

/// How many sockets hear of changes to nftables, in the network namespaces of all processes.
fn listeners() -> anyhow::Result<usize> {
    let mut sockets = BTreeSet::new();
    for entry in fs::read_dir("/proc").context("can't read /proc")?.flatten() {
        // Most entries are no processes, and some of those have ended.
        let text = fs::read_to_string(entry.path().join("net/netlink")).unwrap_or_default();
        sockets.extend(text.lines().filter_map(listener));
    }
    Ok(sockets.len())
}

/// The number of a socket of /proc/PID/net/netlink, if it is one of `NETLINK_NETFILTER` in the group `NFNLGRP_NFTABLES`.
fn listener(line: &str) -> Option<u64> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let [_, "12", _, groups, .., socket] = fields[..] else { return None };
    let groups = u32::from_str_radix(groups, 16).ok()?;
    socket.parse().ok().filter(|_| groups & 1 << 6 != 0)
}

fn arrivals(enforcer: &mut Enforcer) -> anyhow::Result<()> {
    let mut arrivals = Vec::new();
    for number in 0..ARRIVALS {
        let one = pod(1_000_000 + number, number % 300, "10.244.200.0", number, false);
        enforcer.engine.cluster.set_pod(&one);
        arrivals.push(converge(enforcer, false)?);
    }
    report("a pod of another node arrives", &mut arrivals);
    let mut arrivals = Vec::new();
    for number in 0..ARRIVALS / 2 {
        let one = pod(2_000_000 + number, number % 100, "10.244.1.0", 110 + number, true);
        enforcer.engine.cluster.announce_pod(&one);
        arrivals.push(converge(enforcer, false)?);
    }
    report("a pod of this node arrives", &mut arrivals);
    Ok(())
}

fn converge(enforcer: &mut Enforcer, unchanged: bool) -> anyhow::Result<Duration> {
    let start = Instant::now();
    let done = enforcer.converge(Instant::now())?;
    ensure!(!unchanged || done.changes == 0, "{done:?}");
    ensure!(unchanged || done.changes > 0, "{done:?}");
    Ok(start.elapsed())
}

fn memory() -> anyhow::Result<()> {
    let resident = || resident_mib(std::process::id());
    let before = resident()?;
    let mut cluster = Cluster::default();
    for namespace in 0..2_000 {
        cluster.set_namespace(&format!("team-{namespace}"), &namespace_labels(namespace));
    }
    for number in 0..150_000 {
        cluster.set_pod(&realistic(number));
    }
    let pods = resident()?;
    for number in 0..10_000 {
        cluster.set_policy(policy(number, &format!("team-{}", number % 2_000)));
    }
    let mut engine = Engine::new(settings(), SHIFT, 42);
    let local = pod(9_000_000, 3, "10.244.1.0", 9, true);
    cluster.set_pod(&Pod { name: ObjectName::new("team-7", "local"), ..local });
    engine.cluster = cluster;
    engine.adopt(None, Instant::now());
    let all = resident()?;
    println!(
        "150,000 pods: {:.1} MiB, {:.0} bytes each; with 10,000 policies and tables: {:.1} MiB ({:?})",
        pods - before,
        (pods - before) * f64::from(1 << 20) / 150_000.0,
        all - before,
        engine.summary()
    );
    Ok(())
}

fn report(what: &str, times: &mut [Duration]) {
    times.sort_unstable();
    let at = |share: usize| ms(times[(times.len() * share / 100).min(times.len() - 1)]);
    let [least, median, most] = [0, 50, 99].map(at);
    println!("{what}: least {least:.2} ms, median {median:.2} ms, p99 {most:.2} ms of {}", times.len());
}

fn settings() -> Settings {
    let net = |text: &str| text.parse::<IpNet>().into_iter().collect::<Vec<_>>();
    let nodes = (0..255).flat_map(|node| [0, 1].map(|last| Ipv4Addr::new(10, 244, node, last).into()));
    Settings {
        networks: net("10.244.0.0/16"),
        subnets: net("10.244.1.0/24"),
        nodes: nodes.collect(),
        strict: false,
        ipvs: false,
        log_group: None,
    }
}

/// Isolates the pod 10.244.1.2 by so many policies, the last of which allows all that the pod 10.244.2.2 sends.
fn isolate(policies: u32) -> anyhow::Result<()> {
    let mut engine = Engine::new(settings(), SHIFT, 42);
    engine.cluster.set_namespace("shop", &Labels::new());
    engine.cluster.set_pod(&pod(1, 0, "10.244.1.0", 2, true));
    engine.cluster.set_pod(&pod(2, 1, "10.244.2.0", 2, false));
    for number in 0..policies {
        let mut one = policy(number * 100, "shop");
        one.name = ObjectName::new("shop", format!("policy-{number}"));
        engine.cluster.set_policy(one);
    }
    let sender = Selector::new([Requirement::equals("app", "app-1")]);
    let peers = Peers::Of([Peer::Pods { namespaces: NamespaceScope::Own, pods: sender }].into());
    let all = Rule { peers, ports: Ports::Any };
    let one = policy(0, "shop");
    let name = ObjectName::new("shop", "allowing");
    engine.cluster.set_policy(NetworkPolicy { name, ingress: Isolation::Isolated([all].into()), ..one });
    Enforcer::open(engine)?.converge(Instant::now())?;
    Ok(())
}

/// The cluster of the measurement that the design was chosen by: 20,000 pods, 300 selectors of 20 to 100 addresses and 3
/// of 10,000, 1,000 policies, each on one to three of 100 pods. With `both`, egress is isolated in the same way as ingress.
fn natural(both: bool) -> Engine {
    let mut engine = Engine::new(settings(), SHIFT, 42);
    let cluster = &mut engine.cluster;
    cluster.set_namespace("shop", &Labels::new());
    for number in 0..20_000 {
        cluster.set_pod(&pod(number, number % 300, "10.244.2.0", number, false));
    }
    for number in 0..LOCAL_PODS {
        cluster.set_pod(&pod(500_000 + number, number, "10.244.1.0", 2 + number, true));
    }
    for number in 0..1_000 {
        let one = policy(number, "shop");
        let egress = if both { one.ingress.clone() } else { Isolation::Unspecified };
        cluster.set_policy(NetworkPolicy { egress, ..one });
    }
    engine
}

fn pod(number: u32, app: u32, base: &str, offset: u32, local: bool) -> Pod {
    let base: Ipv4Addr = base.parse().expect("an address");
    let labels = [
        ("app", format!("app-{app}")),
        ("third", format!("{}", number % 2)),
        ("own", if local { format!("{}", app % 100) } else { String::new() }),
    ];
    Pod {
        uid: Uid(u128::from(number) + 1),
        name: ObjectName::new("shop", format!("pod-{number}")),
        labels: labels.into_iter().map(|(key, value)| (key.to_owned(), value)).collect(),
        addresses: vec![Ipv4Addr::from_bits(base.to_bits() + offset).into()],
        ports: Vec::new(),
        created: 0,
        local,
    }
}

fn policy(number: u32, namespace: &str) -> NetworkPolicy {
    let peer =
        |requirement| Peer::Pods { namespaces: NamespaceScope::Own, pods: Selector::new([requirement]) };
    let ports = |first: u16| Port { protocol: Protocol::Tcp, port: PortMatch::Range(first..=first) };
    let large = Requirement::equals("third", format!("{}", number % 2));
    let small = Requirement::equals("app", format!("app-{}", number % 300));
    let peers = if number.is_multiple_of(100) { vec![peer(large)] } else { vec![peer(small)] };
    NetworkPolicy {
        name: ObjectName::new(namespace, format!("policy-{number}")),
        pods: Selector::new([Requirement::equals("own", format!("{}", number % 100))]),
        ingress: Isolation::Isolated(
            [Rule {
                peers: Peers::Of(peers.into()),
                ports: Ports::Of([ports(80 + (number % 7) as u16), ports(443)].into()),
            }]
            .into(),
        ),
        egress: Isolation::Unspecified,
    }
}

fn namespace_labels(number: u32) -> Labels {
    let name = format!("team-{number}");
    [("kubernetes.io/metadata.name".to_owned(), name.clone()), ("team".to_owned(), name)].into()
}

/// 60 % of Deployments, 25 % of StatefulSets and 15 % of Jobs, with the labels that these give.
fn realistic(number: u32) -> Pod {
    let namespace = number % 2_000;
    let app = format!("app-{}", number % 9_000);
    let mut labels: Labels = [
        ("app.kubernetes.io/name".to_owned(), app.clone()),
        ("app.kubernetes.io/instance".to_owned(), format!("{app}-prod")),
        ("app.kubernetes.io/part-of".to_owned(), format!("team-{namespace}")),
    ]
    .into();
    let extra = match number % 100 {
        0..60 => [("pod-template-hash", format!("{:010x}", number % 9_000)), ("tier", "backend".to_owned())],
        60..85 => [
            ("statefulset.kubernetes.io/pod-name", format!("{app}-{number}")),
            ("apps.kubernetes.io/pod-index", format!("{}", number % 50)),
        ],
        _ => [
            ("batch.kubernetes.io/job-name", format!("{app}-{number}")),
            ("batch.kubernetes.io/controller-uid", format!("{number:08x}-0000-4000-8000-000000000000")),
        ],
    };
    labels.extend(extra.map(|(key, value)| (key.to_owned(), value)));
    let net = Ipv4Net::new_assert(Ipv4Addr::new(10, 0, 0, 0), 8);
    Pod {
        uid: Uid(u128::from(number) << 64 | 0x4000_8000),
        name: ObjectName::new(format!("team-{namespace}"), format!("{app}-{number}")),
        labels,
        addresses: vec![Ipv4Addr::from_bits(net.addr().to_bits() + 0x10_0000 + number).into()],
        ports: Vec::new(),
        created: 0,
        local: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_hears_of_nftables_is_found_among_all_that_speak_netlink() {
        let line =
            |protocol, groups| format!("0000000000000000 {protocol} 2688545038 {groups} 0 0 0 2 0 4711");
        assert_eq!(listener(&line("12", "00000040")), Some(4711));
        assert_eq!(listener(&line("12", "00000043")), Some(4711));
        for other in [line("12", "00000000"), line("12", "00000001"), line("0", "00000040")] {
            assert_eq!(listener(&other), None);
        }
        assert_eq!(listener("sk Eth Pid Groups Rmem Wmem Dump Locks Drops Inode"), None);
    }
}
