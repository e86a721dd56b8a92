//! The udp backend in real agents, whose leases are files in a common directory.

use std::fs;
use std::path::Path;

use backends::testing::{Fabric, Signal, wait_for};
use tempfile::TempDir;

use crate::bed::{LIMIT, Member, flanneld};

const UDP: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"udp"}}"#;

/// A fabric with a directory of leases for all its nodes.
struct Cluster {
    fabric: Fabric,
    store: TempDir,
}

impl Cluster {
    fn new(config: &str) -> Self {
        let cluster = Self { fabric: Fabric::new().unwrap(), store: tempfile::tempdir().unwrap() };
        cluster.configure(config);
        cluster
    }

    fn configure(&self, config: &str) {
        fs::write(self.store.path().join("config.json"), config).unwrap();
    }

    fn leases(&self) -> usize {
        let Ok(entries) = fs::read_dir(self.store.path().join("subnets")) else { return 0 };
        // A lease that is just being written has a hidden name until then.
        entries.flatten().filter(|entry| !entry.file_name().to_string_lossy().starts_with('.')).count()
    }

    fn lease(&self, subnet: &str, public: &str) {
        let path = self.store.path().join("subnets").join(subnet);
        fs::write(path, format!(r#"{{"PublicIP":"{public}"}}"#)).unwrap();
    }

    fn start(&self) -> Member {
        Member::start_with_env(self.fabric.node().unwrap(), &[store(self.store.path())], &[])
    }

    fn join(&self) -> Member {
        let mut member = self.start();
        member.agent.wait_ready(LIMIT).unwrap();
        member
    }
}

fn store(directory: &Path) -> String {
    format!("--lease-store=file:{}", directory.display())
}

/// What there is of the tunnel, without the number of its device.
fn state(member: &Member) -> String {
    let show = |command: &str| member.node.namespace().show(command).unwrap_or_default();
    let tail = |text: String| text.split_once(':').map(|(_, rest)| rest.to_owned()).unwrap_or_default();
    let (link, address) =
        (tail(show("ip -o link show flannel0")), tail(show("ip -o -4 address show dev flannel0")));
    format!("{link}\n{address}\n{}", show("ip -4 route show proto 70"))
}

#[test]
fn what_is_done_to_a_tunnel_heals_by_itself_and_pods_go_on_talking() {
    let cluster = Cluster::new(UDP);
    let (a, b) = (cluster.join(), cluster.join());
    let (pod_a, pod_b) = (a.pod(), b.pod());
    let reaches = || {
        pod_a.namespace().reaches(pod_b.address()).unwrap()
            && pod_b.namespace().reaches(pod_a.address()).unwrap()
    };
    a.wait("the first echo between pods", reaches);
    let healthy = state(&a);
    assert!(healthy.contains("mtu 1472") && healthy.contains("10.244.0.0/16 dev flannel0"), "{healthy}");
    for damage in [
        "link del flannel0",
        "link set flannel0 down",
        "address flush dev flannel0",
        "route del 10.244.0.0/16",
        "route replace 10.244.0.0/16 via 172.31.0.254",
        "link set flannel0 mtu 1280",
        "link del flannel0\nlink add flannel0 type bridge",
        "tuntap del flannel0 mode tun",
    ] {
        // Taking away what belongs to a process may be refused; then there is nothing to heal.
        if a.node.namespace().ip(damage).is_ok() {
            a.wait(&format!("the repair of: {damage}"), || state(&a) == healthy);
        }
        a.wait(&format!("echoes after: {damage}"), reaches);
    }
    a.node.link_down().unwrap();
    a.wait("silence", || !pod_a.namespace().reaches(pod_b.address()).unwrap());
    a.node.link_up().unwrap();
    a.wait("echoes after the link came up", reaches);
    for mtu in [1400, 1500] {
        for member in [&a, &b] {
            member.node.set_mtu(mtu).unwrap();
            member.wait("the MTU", || {
                member.agent.subnet_env().unwrap().mtu == Some(mtu - 28)
                    && member.show("ip link show flannel0").contains(&format!("mtu {} ", mtu - 28))
            });
        }
        a.wait("echoes with another MTU", reaches);
    }
    assert_eq!(cluster.leases(), 2);
}

#[test]
fn a_stopped_agent_takes_its_tunnel_along_and_the_next_one_makes_it_anew() {
    let cluster = Cluster::new(UDP);
    let (mut a, b) = (cluster.join(), cluster.join());
    let (pod_a, pod_b) = (a.pod(), b.pod());
    let reaches = || pod_a.namespace().reaches(pod_b.address()).unwrap();
    a.wait("the first echo between pods", reaches);
    let (healthy, subnet) = (state(&a), a.subnet());
    assert!(a.agent.terminate(LIMIT).unwrap().success());
    a.wait("the end of the device", || !state(&a).contains("flannel0"));
    for _ in 0..2 {
        a.start_again();
        a.wait("the tunnel as before", || state(&a) == healthy);
        assert_eq!(a.subnet(), subnet);
        a.wait("echoes again", || pod_b.namespace().reaches(pod_a.address()).unwrap());
        a.agent.kill().unwrap();
        a.wait("the end of the device", || !state(&a).contains("flannel0"));
    }
}

#[test]
fn two_agents_with_two_ports_share_the_hosts() {
    let (first, second) = (
        Cluster::new(UDP),
        Cluster::new(r#"{"Network":"10.99.0.0/16","Backend":{"Type":"udp","Port":8286}}"#),
    );
    let (mut a, b) = (first.join(), first.join());
    let beside = |member: &Member| {
        let args = [
            store(second.store.path()),
            format!("--subnet-file={}", member.node.dir().join("second.env").display()),
            "--healthz-port=8082".to_owned(),
        ];
        let mut agent = backends::testing::Agent::spawn(&member.node, flanneld(), args).unwrap();
        agent.wait_ready(LIMIT).unwrap();
        agent
    };
    let (second_a, second_b) = (beside(&a), beside(&b));
    let (pod_a, pod_b) = (a.pod(), b.pod());
    a.wait("the first network", || pod_a.namespace().reaches(pod_b.address()).unwrap());
    let far = second_b.subnet_env().unwrap().subnets.v4.unwrap().network();
    a.wait("the second network", || a.node.namespace().reaches(far.into()).unwrap());
    let links = |member: &Member| member.show("ip -o link show");
    assert!(links(&a).contains("flannel8286") && links(&a).contains("flannel0"));
    a.agent.terminate(LIMIT).unwrap();
    a.wait("the end of the device", || !links(&a).contains("flannel0"));
    assert!(links(&a).contains("flannel8286"));
    assert!(a.node.namespace().reaches(far.into()).unwrap());
    a.start_again();
    drop(second_a);
    a.wait("the first network without the second", || pod_a.namespace().reaches(pod_b.address()).unwrap());
}

#[test]
fn a_second_agent_for_the_same_network_is_told_who_has_the_tunnel_and_harms_nobody() {
    let cluster = Cluster::new(UDP);
    let (mut a, b) = (cluster.join(), cluster.join());
    let (pod_a, pod_b) = (a.pod(), b.pod());
    let reaches = || pod_a.namespace().reaches(pod_b.address()).unwrap();
    a.wait("the first echo between pods", reaches);
    let healthy = state(&a);
    // The node b has a flannel0 too, in another namespace.
    let holder = format!("(pid {}) holds flannel0: stop it", a.agent.process().id());
    let args = [
        store(cluster.store.path()),
        format!("--subnet-file={}", a.node.dir().join("second.env").display()),
        "--healthz-port=8082".to_owned(),
    ];
    let second = backends::testing::Agent::spawn(&a.node, flanneld(), args).unwrap();
    let told = || second.get("/readyz").is_ok_and(|(code, body)| code == 503 && body.contains(&holder));
    if let Err(error) = wait_for("a word about the tunnel", LIMIT, told) {
        panic!("{error}: {:?}\n{}", second.get("/readyz"), second.log());
    }
    assert!(reaches() && pod_b.namespace().reaches(pod_a.address()).unwrap());
    drop(second);
    a.wait("the tunnel as it was", || state(&a) == healthy);
    assert!(reaches());
}

#[test]
fn a_host_without_tun_devices_is_told_what_to_do() {
    let cluster = Cluster::new(UDP);
    let node = cluster.fabric.node().unwrap();
    let script = node.dir().join("without-tun");
    let lines = format!(
        "#!/bin/sh\nexec unshare --mount sh -c 'mount -t tmpfs none /dev/net && exec {} \"$@\"' sh \"$@\"\n",
        flanneld().display()
    );
    subnet::testing::write_program(&script, &lines).unwrap();
    let agent = backends::testing::Agent::spawn(&node, &script, [store(cluster.store.path())]).unwrap();
    let remedy = "there is no /dev/net/tun: load the module tun, and mount /dev/net/tun into the container";
    let told = || agent.get("/readyz").is_ok_and(|(code, body)| code == 503 && body.contains(remedy));
    if let Err(error) = wait_for("a word about /dev/net/tun", LIMIT, told) {
        panic!("{error}: {:?}\n{}", agent.get("/readyz"), agent.log());
    }
}

#[test]
fn a_signal_asks_for_the_counters() {
    let cluster = Cluster::new(UDP);
    let (mut a, b) = (cluster.join(), cluster.join());
    let pod = b.pod();
    a.wait("an echo", || a.node.namespace().reaches(pod.address()).unwrap());
    a.agent.process().signal(Signal::USR1).unwrap();
    a.wait_for_log("udp: sent_packets=");
    let log = a.agent.log();
    let number = |name: &str| -> u64 {
        let rest = log.split(&format!(" {name}=")).nth(1).unwrap();
        rest.split([' ', '\n']).next().unwrap().parse().unwrap()
    };
    assert!(number("received_packets") > 0 && number("sent_bytes") > 0, "{log}");
    assert!(a.agent.process().ended().unwrap().is_none());
}

#[test]
fn values_that_make_no_sense_are_refused_by_name_and_a_good_one_is_taken_up() {
    let cluster = Cluster::new(UDP);
    let backend = |part: &str| format!(r#"{{"Network":"10.244.0.0/16","Backend":{{"Type":"udp",{part}}}}}"#);
    for (part, name) in [
        (r#""Port":70000"#, "Backend.Port: 70000"),
        (r#""Port":-1"#, "Backend.Port: -1"),
        (r#""Port":"x""#, "Port"),
        (r#""CheckSources":"x""#, "CheckSources"),
    ] {
        cluster.configure(&backend(part));
        let mut a = cluster.start();
        a.wait_for_log(name);
        assert!(!state(&a).contains("flannel"), "{part}: {}", state(&a));
        assert!(a.agent.process().ended().unwrap().is_none());
        // No port at all is the usual one.
        cluster.configure(&backend(r#""Port":0"#));
        a.agent.wait_ready(LIMIT).unwrap();
        assert!(a.show("ss -uln").contains(":8285 "), "{}", a.show("ss -uln"));
    }
}

#[test]
fn thousands_of_leases_and_odd_ones_among_them_leave_the_good_ones_working() {
    let cluster = Cluster::new(r#"{"Network":"10.0.0.0/8","Backend":{"Type":"udp"}}"#);
    let (a, b) = (cluster.join(), cluster.join());
    let (pod_a, pod_b) = (a.pod(), b.pod());
    let reaches = || pod_a.namespace().reaches(pod_b.address()).unwrap();
    a.wait("the first echo between pods", reaches);
    let taken: Vec<String> = [&a, &b].map(|member| member.subnet().network().to_string()).to_vec();
    for number in 0..3000u32 {
        let subnet = format!("10.{}.{}.0", 100 + number / 250, number % 250);
        if !taken.contains(&subnet) {
            let public = match number % 1000 {
                // Those of this host, the unspecified one, and broadcast.
                7 => a.node.address().to_string(),
                8 => "0.0.0.0".to_owned(),
                9 => "255.255.255.255".to_owned(),
                10 => "127.0.0.1".to_owned(),
                _ => format!("172.30.{}.{}", number / 250, number % 250),
            };
            cluster.lease(&format!("{subnet}-24"), &public);
        }
    }
    a.wait("the leases", || {
        let stranger: std::net::IpAddr = "10.105.1.1".parse().unwrap();
        // Not answered by the tunnel any more: it has a peer for it.
        let args = ["-n", "-c1", "-W1", &stranger.to_string()];
        let output = pod_a.command("ping").args(args).output().unwrap();
        !String::from_utf8_lossy(&output.stdout).contains("Net Unreachable")
    });
    assert!(reaches());
    // Into a loop through this host, until the hops are over.
    let odd = ["10.100.7.5", "10.100.8.5", "10.100.9.5", "10.100.10.5"];
    for address in odd {
        assert!(!pod_a.namespace().reaches(address.parse().unwrap()).unwrap(), "{address}");
    }
    assert!(reaches() && pod_b.namespace().reaches(pod_a.address()).unwrap());
}
