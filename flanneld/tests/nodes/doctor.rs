//! `flanneld doctor` on the real kernel: each injected fault is named with its object and its remedy, and a healthy
//! node has no trouble.

use std::cell::RefCell;
use std::fs;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use backends::testing::{Process, wait_for_some};
use serde_json::{Value, json};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::bed::{Cluster, LIMIT, Member, VXLAN, flanneld};

/// A node asks etcd every 40 to 50 s whether it is still let in.
const A_MINUTE: Duration = Duration::from_secs(100);

/// A node whose CNI files are its own.
pub(crate) struct Patient {
    pub(crate) member: Member,
    /// How long each run took: told, not judged.
    times: RefCell<Vec<Duration>>,
}

impl Drop for Patient {
    fn drop(&mut self) {
        let mut times = self.times.take();
        times.sort_unstable();
        if let (Some(median), Some(longest)) = (times.get(times.len() / 2), times.last()) {
            let test = std::thread::current().name().unwrap_or_default().to_owned();
            println!("{test}: {} runs of doctor, median {median:.0?}, longest {longest:.0?}", times.len());
        }
    }
}

impl Patient {
    pub(crate) fn of(cluster: &Cluster, args: &[&str]) -> Self {
        let node = cluster.fabric.node().unwrap();
        let directory = node.dir().to_owned();
        for name in ["net.d", "bin", "ipam/cbr0"] {
            fs::create_dir_all(directory.join(name)).unwrap();
        }
        let conf = json!({
            "name": "cbr0",
            "cniVersion": "1.0.0",
            "plugins": [{ "type": "flannel", "ipam": { "dataDir": directory.join("ipam") } }, { "type": "portmap" }],
        });
        fs::write(directory.join("cni-conf.json"), conf.to_string()).unwrap();
        for plugin in ["flannel", "portmap"] {
            fs::write(directory.join("bin").join(plugin), "").unwrap();
        }
        let shown = directory.display();
        let copy = format!("--cni-conf={shown}/cni-conf.json:{shown}/net.d/10-flannel.conflist");
        let args: Vec<&str> = [copy.as_str()].into_iter().chain(args.iter().copied()).collect();
        let mut member = cluster.start(node, &args);
        member.agent.wait_ready(LIMIT).unwrap();
        Self { member, times: RefCell::default() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.member.node.dir().join(name)
    }

    /// Runs it: exit code, output, and how long it took.
    fn run(&self, args: &[&str]) -> (Option<i32>, String, Duration) {
        let node = &self.member.node;
        let begun = Instant::now();
        let output = node
            .namespace()
            .command(flanneld())
            .arg("doctor")
            .arg(format!("--subnet-file={}", node.subnet_file().display()))
            .arg(format!("--cni-conf-dir={}", self.path("net.d").display()))
            .arg(format!("--cni-bin-dirs={}", self.path("bin").display()))
            .args(args)
            .output()
            .unwrap();
        let took = begun.elapsed();
        self.times.borrow_mut().push(took);
        (output.status.code(), String::from_utf8(output.stdout).unwrap(), took)
    }

    /// The troubles; every run is quick and its exit code right.
    pub(crate) fn troubles(&self) -> Vec<Value> {
        let (code, text, took) = self.run(&["--json"]);
        let answer: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
        let all = answer["findings"].as_array().unwrap().iter();
        let troubles: Vec<Value> = all.filter(|finding| finding["state"] == "trouble").cloned().collect();
        assert_eq!(code, Some(i32::from(!troubles.is_empty())), "{text}");
        assert!(took < LIMIT, "{took:?}");
        troubles
    }

    fn healthy(&self) {
        assert_eq!(self.troubles(), [] as [Value; 0], "{}", self.member.agent.log());
    }

    /// Waits for a trouble with these parts of object, cause and remedy. The agent may have to hear of it first.
    pub(crate) fn is_told(&self, what: &str, parts: [&str; 3], limit: Duration) {
        let mut last = Vec::new();
        let named = wait_for_some(what, limit, || {
            last = self.troubles();
            let has = |finding: &Value, key: &str, part: &str| finding[key].as_str().unwrap().contains(part);
            let fits = |finding: &&Value| {
                has(finding, "object", parts[0])
                    && has(finding, "cause", parts[1])
                    && has(finding, "remedy", parts[2])
            };
            last.iter().find(fits).map(|_| ())
        });
        if let Err(error) = named {
            panic!("{error}: {last:#?}\n{}", self.member.agent.log());
        }
    }

    pub(crate) fn recovers(&self, what: &str) {
        self.is_over(what, LIMIT);
    }

    /// Waits until there is no trouble.
    pub(crate) fn is_over(&self, what: &str, limit: Duration) {
        let mut last = Vec::new();
        let over = wait_for_some(what, limit, || {
            last = self.troubles();
            last.is_empty().then_some(())
        });
        if let Err(error) = over {
            panic!("after {what}: {error}: {last:#?}\n{}", self.member.agent.log());
        }
    }

    fn nft(&self, text: &str) {
        self.member.node.namespace().command("nft").args(["-f", "-"]).input(text).ok().unwrap();
    }

    /// The MAC that leads to a peer.
    fn mac_of(&self, peer: &Member) -> String {
        let entries = self.member.show("bridge fdb show dev flannel.1");
        let address = peer.node.address().to_string();
        let line = entries.lines().find(|line| line.contains(&address)).unwrap();
        line.split(' ').next().unwrap().to_owned()
    }

    /// Another program that does this again and again.
    fn meddler(&self, command: &str) -> Process {
        let line = format!("while :; do {command} 2>/dev/null; sleep 0.05; done");
        self.member.node.namespace().command("sh").args(["-c", &line]).spawn().unwrap()
    }

    /// Reserves an address as host-local does, two minutes ago.
    fn reserve(&self, last: u8) {
        let base = self.member.subnet().network().to_string();
        let (prefix, _) = base.rsplit_once('.').unwrap();
        let path = self.path("ipam/cbr0").join(format!("{prefix}.{last}"));
        fs::write(&path, format!("container-{last}\r\neth0")).unwrap();
        let before = std::time::SystemTime::now() - Duration::from_secs(120);
        fs::File::options().write(true).open(path).unwrap().set_modified(before).unwrap();
    }
}

#[test]
fn a_healthy_pair_has_no_trouble_in_a_hundred_runs() {
    let cluster = Cluster::new(VXLAN);
    let (a, b) = (Patient::of(&cluster, &["--ip-masq"]), Patient::of(&cluster, &[]));
    let (pod, other) = (a.member.pod(), b.member.pod());
    a.reserve(2);
    a.recovers("the start");
    for _ in 0..100 {
        a.healthy();
    }
    b.recovers("the start");
    assert!(pod.namespace().reaches(other.address()).unwrap());
    let (code, text, _) = a.run(&[]);
    assert_eq!(code, Some(0), "{text}");
    assert!(text.lines().all(|line| line.starts_with('✔')) && !text.contains('\u{1b}'), "{text}");
}

#[test]
fn faults_of_the_host_are_named_with_object_and_remedy() {
    let cluster = Cluster::new(VXLAN);
    let (a, b) = (Patient::of(&cluster, &["--iface=eth0"]), cluster.join());
    let namespace = a.member.node.namespace();
    a.member.wait("the peer", || a.member.node.has_route(b.subnet()).unwrap());
    a.recovers("the start");

    namespace.sysctl("ipv4/ip_forward", "0").unwrap();
    a.is_told("forwarding", ["net.ipv4.ip_forward", "is 0", "sysctl -w net.ipv4.ip_forward=1"], LIMIT);
    namespace.sysctl("ipv4/ip_forward", "1").unwrap();
    a.recovers("forwarding");

    namespace.sysctl("ipv4/conf/all/rp_filter", "1").unwrap();
    namespace.sysctl("ipv4/conf/eth0/rp_filter", "1").unwrap();
    a.is_told("rp_filter", ["net.ipv4.conf.eth0.rp_filter", "strict (1) on eth0", "=2"], LIMIT);
    namespace.sysctl("ipv4/conf/all/rp_filter", "2").unwrap();
    a.recovers("rp_filter");

    a.nft("table ip fw { chain pods { type filter hook forward priority -10; ip daddr 10.244.0.0/16 counter drop; }; }");
    a.is_told(
        "a foreign drop",
        [
            "rule 1 of chain pods in table ip fw",
            "it drops what pods send to other nodes",
            "nft delete rule ip fw pods handle",
        ],
        LIMIT,
    );
    a.nft("delete table ip fw");
    a.recovers("a foreign drop");

    a.nft(
        "table inet fw { chain incoming { type filter hook input priority 10; policy drop; ct state established,related accept; \
         iif lo accept; icmp type echo-request accept; tcp dport { 22, 8081 } accept; }; }",
    );
    a.is_told(
        "a closed port",
        ["policy of chain incoming in table inet fw", "drops UDP 8472 from peers", "accept UDP 8472"],
        LIMIT,
    );
    a.nft("delete table inet fw");
    a.recovers("a closed port");

    a.member.node.unplug().unwrap();
    a.is_told("no carrier", ["eth0", "no carrier", "cable"], LIMIT);
    a.member.node.plug().unwrap();
    a.recovers("no carrier");

    a.member.node.link_down().unwrap();
    a.is_told("eth0 down", ["eth0", "set down", "ip link set eth0 up"], LIMIT);
    a.member.node.link_up().unwrap();
    a.recovers("eth0 down");
}

#[test]
fn what_another_program_undoes_is_named_with_its_device() {
    let cluster = Cluster::new(VXLAN);
    let (a, b) = (Patient::of(&cluster, &[]), cluster.join());
    a.member.wait("the peer", || a.member.node.has_route(b.subnet()).unwrap());
    let down = a.meddler("ip link set flannel.1 down");
    a.is_told(
        "a device that is set down",
        ["flannel.1", "flannel.1", "find the program that undoes it"],
        LIMIT,
    );
    drop(down);
}

#[test]
fn an_entry_that_another_program_redirects_is_named_with_its_device() {
    let cluster = Cluster::new(VXLAN);
    let (a, b) = (Patient::of(&cluster, &[]), cluster.join());
    a.member.wait("the peer", || a.member.node.has_route(b.subnet()).unwrap());
    let mac = a.mac_of(&b);
    let elsewhere =
        a.meddler(&format!("bridge fdb replace {mac} dev flannel.1 dst 172.31.0.99 self permanent"));
    a.is_told(
        "an entry that leads elsewhere",
        ["flannel.1", "fdb", "find the program that undoes it"],
        LIMIT,
    );
    drop(elsewhere);
}

#[test]
fn faults_of_cni_and_of_the_pool_are_named_with_the_file() {
    let cluster = Cluster::new(VXLAN);
    let a = Patient::of(&cluster, &[]);
    a.recovers("the start");

    let other = a.path("net.d/05-bridge.conf");
    fs::write(&other, r#"{"name":"other","type":"bridge"}"#).unwrap();
    fs::write(a.path("bin/bridge"), "").unwrap();
    a.is_told("the order", ["05-bridge.conf", "takes the first file by name", "remove"], LIMIT);
    fs::remove_file(&other).unwrap();
    a.recovers("the order");

    fs::remove_file(a.path("bin/portmap")).unwrap();
    a.is_told("a plugin that is missing", ["portmap", "not in", "install"], LIMIT);
    fs::write(a.path("bin/portmap"), "").unwrap();
    a.recovers("a plugin that is missing");

    let gateway = "10.244.99.1/24";
    a.member.ip(&format!("link add cni0 type bridge\naddr add {gateway} dev cni0\nlink set cni0 up"));
    a.is_told("a wrong gateway", ["cni0", gateway, "ip address del 10.244.99.1/24 dev cni0"], LIMIT);
    a.member.ip("link del cni0");
    a.recovers("a wrong gateway");

    let env = fs::read(a.member.node.subnet_file()).unwrap();
    fs::write(a.member.node.subnet_file(), "FLANNEL_NETWORK=nonsense\n").unwrap();
    a.is_told("a subnet file that is damaged", ["subnet.env", "can't use it", "remove it"], LIMIT);
    fs::write(a.member.node.subnet_file(), env).unwrap();
    a.recovers("a subnet file that is damaged");

    a.reserve(7);
    let subnet = a.member.subnet().to_string();
    a.is_told("a leak", [&subnet, "the pool leaks: 1 of 253 taken", "--fix leaked-addresses"], LIMIT);
    (2..=254).for_each(|last| a.reserve(last));
    a.is_told(
        "a full pool that leaks",
        [&subnet, "the pool is full: 253 of 253 taken, 253 are reserved", "--fix"],
        LIMIT,
    );

    // What living pods have stays for every caller.
    let pod = a.member.pod();
    let file = a.path("ipam/cbr0").join(pod.address().to_string());
    let (_, dry, _) = a.run(&["--fix=leaked-addresses", "--dry-run"]);
    assert_eq!(dry.lines().count(), 252, "{dry}");
    assert!(!dry.contains(&format!("{} ", file.display())), "{dry}");
    let (code, text, _) = a.run(&["--fix=leaked-addresses"]);
    assert_eq!((code, text.lines().count()), (Some(0), 252), "{text}");
    let left: Vec<_> =
        fs::read_dir(a.path("ipam/cbr0")).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(left.contains(&file) && left.len() == 2, "the pod's and the lock: {left:?}");
    a.recovers("a full pool that leaks");

    let (code, text, _) = a.run(&[&format!("--pod={}", pod.address())]);
    assert!(code == Some(0) && text.contains("is attached to this node"), "{text}");
    let (code, text, _) = a.run(&["--pod=container-9999"]);
    assert!(code == Some(1) && text.contains("no address is reserved for it"), "{text}");
}

#[test]
fn a_pool_that_is_really_full_is_told_from_one_that_leaks() {
    let cluster = Cluster::new(r#"{"Network":"10.244.0.0/16","SubnetLen":29,"Backend":{"Type":"vxlan"}}"#);
    let a = Patient::of(&cluster, &[]);
    let subnet = a.member.subnet();
    let pods: Vec<_> = subnet
        .hosts()
        .skip(1)
        .map(|address| {
            let net = ipnet::IpNet::new(address, subnet.prefix_len()).unwrap();
            backends::testing::Pod::wired(&a.member.node, net).unwrap()
        })
        .collect();
    for pod in &pods {
        let path = a.path("ipam/cbr0").join(pod.address().to_string());
        fs::write(&path, "x\r\neth0").unwrap();
        let before = std::time::SystemTime::now() - Duration::from_secs(120);
        fs::File::options().write(true).open(path).unwrap().set_modified(before).unwrap();
    }
    a.is_told(
        "a full pool",
        [&subnet.to_string(), "5 of 5 taken, all of them by living pods", "SubnetLen"],
        LIMIT,
    );
}

#[test]
fn faults_among_peers_are_named_with_the_peer() {
    let cluster = Cluster::new(VXLAN);
    let (a, b) = (Patient::of(&cluster, &[]), cluster.join());
    a.member.wait("the peer", || a.member.node.has_route(b.subnet()).unwrap());
    a.recovers("the start");
    let own = a.member.node.address();
    for (what, key, value, parts) in [
        (
            "another backend",
            "10.244.200.0-24",
            r#"{"PublicIP":"172.31.0.200","BackendType":"host-gw"}"#.to_owned(),
            ["10.244.200.0/24", "its backend is host-gw", "the same Backend"],
        ),
        (
            "a duplicate address",
            "10.244.201.0-24",
            format!(
                r#"{{"PublicIP":"{own}","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:00:00:00:00:c9"}}}}"#
            ),
            ["10.244.201.0/24", "is this node's own", "--public-ip"],
        ),
        (
            "a subnet outside",
            "10.9.0.0-24",
            r#"{"PublicIP":"172.31.0.202","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:ca"}}"#
                .to_owned(),
            ["10.9.0.0/24", "outside the network", "net-conf.json"],
        ),
    ] {
        let key = format!("/coreos.com/network/subnets/{key}");
        cluster.put(&key, &value);
        a.is_told(what, parts, LIMIT);
        cluster.etcdctl(&["del", &key]);
        a.recovers(what);
    }

    // Datagrams that a NIC has spoilt: the checksum is of nothing.
    let spoilt = a.member.node.address();
    let from = b.node.address();
    b.node.namespace().run(|| send_spoilt(from, spoilt, 20));
    a.is_told("checksums", ["UDP on eth0", "wrong checksum", "ChecksumOffload"], LIMIT);
}

/// Sends datagrams to the tunnel's port whose checksum is wrong.
fn send_spoilt(from: Ipv4Addr, to: Ipv4Addr, count: usize) {
    const RAW: i32 = 255;
    let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(RAW))).unwrap();
    let payload = [0u8; 16];
    let length = (8 + payload.len()) as u16;
    let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0];
    packet.extend(from.octets());
    packet.extend(to.octets());
    packet.extend([0xc0, 0x00]);
    packet.extend(8472u16.to_be_bytes());
    packet.extend(length.to_be_bytes());
    packet.extend([0xde, 0xad]);
    packet.extend(payload);
    let at = SockAddr::from(std::net::SocketAddr::from((to, 0)));
    for _ in 0..count {
        socket.send_to(&packet, &at).unwrap();
    }
}

#[test]
fn an_agent_on_the_wrong_interface_is_named_with_the_right_one() {
    let cluster = Cluster::new(VXLAN);
    let b = cluster.join();
    let mut a = Patient::of(&cluster, &[]);
    a.member.wait("the peer", || a.member.node.has_route(b.subnet()).unwrap());
    a.member.ip("link add storage0 type veth peer name storage1\nlink set storage1 up\naddr add 192.168.77.1/24 dev storage0\nlink set storage0 up");
    a.member.agent.terminate(LIMIT).unwrap();
    a.member.start_again_with(&["--iface=storage0"]);
    a.is_told(
        "the wrong interface",
        ["storage0", "reaches peers such as 172.31.0.1 by eth0", "--iface=eth0"],
        LIMIT,
    );
}

#[test]
fn an_agent_that_is_gone_or_hangs_is_a_finding_and_the_rest_is_still_looked_at() {
    let cluster = Cluster::new(VXLAN);
    let (mut a, b) = (Patient::of(&cluster, &[]), cluster.join());
    a.member.wait("the peer", || a.member.has_kept(b.subnet()));
    a.recovers("the start");
    a.member.agent.process().signal(backends::testing::Signal::STOP).unwrap();
    a.is_told("an agent that hangs", ["flanneld", "flanneld is running with pid", "--healthz-port"], LIMIT);
    a.member.agent.process().signal(backends::testing::Signal::CONT).unwrap();
    a.recovers("an agent that hangs");
    a.member.agent.kill().unwrap();
    a.is_told("an agent that is gone", ["flanneld", "it is not running", "start it"], LIMIT);
    let alone = a.troubles();
    assert_eq!(alone.len(), 1, "{alone:#?}");
    a.member.ip("link set flannel.1 down");
    a.is_told("a device beside it", ["flannel.1", "would be needed", "start flanneld"], LIMIT);
    a.member.ip("link set flannel.1 up");
    let mac = a.mac_of(&b);
    a.member.show(&format!("bridge fdb replace {mac} dev flannel.1 dst 172.31.0.99 self permanent"));
    a.is_told(
        "an entry beside it",
        ["flannel.1", &format!("fdb replace {mac} dst 172.31.0.2"), "start flanneld"],
        LIMIT,
    );
    a.is_told("a route beside it", [&b.subnet().to_string(), "route replace", "start flanneld"], LIMIT);
    a.reserve(9);
    a.is_told("a leak beside it", [&a.member.subnet().to_string(), "the pool leaks", "--fix"], LIMIT);
    a.member.node.namespace().sysctl("ipv4/ip_forward", "0").unwrap();
    a.is_told("forwarding beside it", ["net.ipv4.ip_forward", "is 0", "sysctl -w"], LIMIT);
    let (_, text, _) = a.run(&[]);
    assert!(text.contains("– peers: not checked"), "{text}");
}

#[test]
fn a_store_that_is_away_and_a_lease_that_ends_are_named() {
    let mut cluster = Cluster::new(VXLAN);
    let a = Patient::of(&cluster, &["--subnet-lease-renew-margin=1"]);
    cluster.etcd.kill();
    a.is_told("a store that is away", ["etcd", "it is away", "Look at --etcd-endpoints"], LIMIT);
    cluster.etcd.restart().unwrap();
    a.recovers("a store that is away");
    let (key, value) = cluster.leases().remove(0);
    let granted = cluster.etcdctl(&["lease", "grant", "3600"]);
    let id = granted.split(' ').nth(1).unwrap().to_owned();
    cluster.etcdctl(&["put", &format!("--lease={id}"), &key, &value]);
    backends::testing::wait_for("the end of the lease", A_MINUTE, || {
        let (_, text) = a.member.agent.get("/status").unwrap();
        let status: Value = serde_json::from_str(&text).unwrap();
        let left = status["store"]["lease_ends"]
            .as_u64()
            .unwrap_or(u64::MAX)
            .saturating_sub(status["at"].as_u64().unwrap());
        left <= 3600
    })
    .unwrap();
    a.recovers("a lease that is known to end sooner");
    cluster.etcd.kill();
    a.is_told("a lease that ends", ["etcd", "and can't be renewed", "peers drop the node"], LIMIT);
}

#[test]
fn a_store_that_begins_to_refuse_is_named_with_the_flag() {
    let cluster = Cluster::new(VXLAN);
    let a = Patient::of(&cluster, &[]);
    for words in ["user add root:rootpw", "user grant-role root root", "auth enable"] {
        cluster.etcdctl(&words.split(' ').collect::<Vec<_>>());
    }
    a.is_told("a store that refuses", ["etcd", "it refuses this node", "--etcd-username"], A_MINUTE);
}
