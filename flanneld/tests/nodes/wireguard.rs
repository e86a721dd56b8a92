//! WireGuard in real agents: keys, changes under traffic, and leases that can't be used.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use backends::testing::{Pod, Signal, wait_for};
use subnet::Family;

use crate::bed::{LIMIT, Member};
use crate::site::{Kind, Site, answered, config, lost, pings};

const V4: &[Family] = &[Family::V4];
const WIREGUARD: &str = r#"{"Type":"wireguard"}"#;

struct Setup {
    site: Site,
    members: [Member; 2],
    pods: [Pod; 2],
}

impl Setup {
    fn new(kind: Kind, config: &str) -> Self {
        let site = Site::new(kind, config);
        let members = [site.join(), site.join()];
        let pods = members.each_ref().map(Member::pod_of_all_families);
        Self { site, members, pods }
    }

    fn wait(&self, what: &str, condition: impl Fn(&Member) -> bool) {
        self.members.iter().for_each(|member| member.wait(what, || condition(member)));
    }

    fn reaches(&self) -> bool {
        self.pods[0].namespace().reaches(self.pods[1].address()).unwrap()
    }
}

fn key_file(member: &Member) -> PathBuf {
    member.node.dir().join("wgkey")
}

/// The keys that all nodes announce.
fn keys(site: &Site) -> Vec<String> {
    let key = |line: &String| line.split("\"PublicKey\":\"").nth(1).map(|rest| rest[..44].to_owned());
    let mut keys: Vec<String> = site.announced().iter().filter_map(key).collect();
    keys.sort();
    keys
}

/// Frames on the underlay of a node that contain what its pods say.
fn clear_frames(setup: &Setup, member: &Member) -> usize {
    let seen = member.node.dir().join("seen.pcap");
    let capture = ["-i", "eth0", "-U", "-w", &seen.display().to_string()].map(str::to_owned);
    let mut capture =
        member.node.namespace().command("tcpdump").args(capture).stderr(Stdio::null()).spawn().unwrap();
    let size = || fs::metadata(&seen).map_or(0, |file| file.len());
    member.wait("tcpdump", || size() > 0);
    for (from, to) in [(0, 1), (1, 0)] {
        let target = setup.pods[to].address().to_string();
        let args = ["-n", "-c", "20", "-i", "0.01", "-s", "500", "-p", "feedc0de", &target];
        setup.pods[from].command("ping").args(args).ok().unwrap();
    }
    member.wait("what was sent", || size() > 40 * 500);
    capture.signal(Signal::TERM).unwrap();
    capture.wait(LIMIT).unwrap();
    let bytes = fs::read(&seen).unwrap();
    let pattern = [0xfe, 0xed, 0xc0, 0xde].repeat(4);
    bytes.windows(pattern.len()).filter(|window| *window == pattern).count()
}

#[test]
fn a_cluster_encrypts_from_one_moment_to_the_next_and_loses_nothing() {
    for (families, before, device) in
        [(V4, r#"{"Type":"vxlan"}"#, "flannel.1"), (V4, r#"{"Type":"udp"}"#, "flannel0")]
    {
        let setup = Setup::new(Kind::Etcd, &config(families, before));
        let pings = pings(&setup.pods.each_ref());
        assert!(clear_frames(&setup, &setup.members[0]) > 0, "the pattern is found where it is readable");
        setup.site.configure(&config(families, WIREGUARD));
        wait_for("both announcements", LIMIT, || keys(&setup.site).len() == 2).unwrap();
        for (me, other) in [(0, 1), (1, 0)] {
            let (member, target) = (&setup.members[me], setup.pods[other].address().to_string());
            member.wait("the way through the tunnel", || {
                member.try_show(&format!("ip route get {target}")).contains("dev flannel-wg")
            });
        }
        answered(&pings);
        for member in &setup.members {
            assert_eq!(clear_frames(&setup, member), 0, "{before}: {}", member.node.name());
        }
        answered(&pings);
        let lost = lost(pings);
        assert!(lost.iter().all(|lost| *lost == 0), "{before}: {lost:?}\n{}", setup.members[0].agent.log());
        // What was used before goes half a minute later.
        setup.wait("the end of the old device", |member| {
            member.try_show(&format!("ip link show {device}")).is_empty()
        });
        assert!(setup.reaches());
        let log = setup.members[0].agent.log();
        let private = fs::read_to_string(key_file(&setup.members[0])).unwrap();
        assert!(!log.contains(&private), "the private key is in the log");
    }
}

#[test]
fn a_restart_keeps_the_key_and_connections_go_on() {
    let mut setup = Setup::new(Kind::Etcd, &config(V4, WIREGUARD));
    let (pings, before) = (pings(&setup.pods.each_ref()), keys(&setup.site));
    assert_eq!(before.len(), 2);
    for kill in [false, true] {
        let agent = &mut setup.members[0].agent;
        if kill {
            agent.kill().unwrap();
        } else {
            assert!(agent.terminate(LIMIT).unwrap().success());
        }
        setup.members[0].start_again();
        answered(&pings);
        assert_eq!(keys(&setup.site), before);
    }
    // In both directions: also where only the other node has something to send by a session that is gone.
    for pinger in pings {
        let seen = pinger.finish().unwrap();
        // Less than the 15 s after which the other node would notice by itself.
        assert!(seen.longest_gap < Duration::from_secs(13), "{seen:?}");
    }
    let mode = fs::metadata(key_file(&setup.members[0])).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o400);
    setup.members[1].wait_for_log("encrypted by flanneld");
}

#[test]
fn a_key_file_that_others_can_read_is_refused_with_the_remedy_and_taken_once_it_is_right() {
    let site = Site::new(Kind::Etcd, &config(V4, WIREGUARD));
    let node = site.fabric.node().unwrap();
    let file = node.dir().join("wgkey");
    let good = "dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo=";
    fs::write(&file, good).unwrap();
    fs::set_permissions(&file, Permissions::from_mode(0o644)).unwrap();
    let mut member = site.start(node, &[]);
    member.wait_for_log("can be read by others (mode 0644): chmod 0400");
    assert!(keys(&site).is_empty() && !member.is_ready());
    fs::set_permissions(&file, Permissions::from_mode(0o400)).unwrap();
    member.agent.wait_ready(LIMIT).unwrap();
    assert_eq!(keys(&site), ["hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo="]);
    assert!(!member.agent.log().contains(&good[..20]));
}

#[test]
fn another_key_file_is_taken_at_a_hangup_and_peers_follow_while_pods_talk() {
    let mut setup = Setup::new(Kind::Etcd, &config(V4, WIREGUARD));
    let (pings, before) = (pings(&setup.pods.each_ref()), keys(&setup.site));
    let pid = setup.members[0].agent.process().id().to_string();
    let [member, other] = &setup.members;
    let private = || fs::read_to_string(key_file(member)).unwrap();
    let hang_up = || member.node.namespace().command("kill").args(["-HUP", &pid]).ok().unwrap();
    let first = private();

    // What can't be used changes nothing.
    fs::set_permissions(key_file(member), Permissions::from_mode(0o644)).unwrap();
    hang_up();
    member.wait_for_log("the WireGuard key stays what it was");
    answered(&pings);
    assert!(member.is_ready() && keys(&setup.site) == before);

    fs::remove_file(key_file(member)).unwrap();
    hang_up();
    let kept = |now: &[String]| now.iter().filter(|key| before.contains(key)).count();
    let changed = || {
        let now = keys(&setup.site);
        now.len() == 2 && kept(&now) == 1
    };
    member.wait("another key in the lease", changed);
    answered(&pings);
    let second = private();
    assert_ne!(first, second);
    assert_eq!(fs::metadata(key_file(member)).unwrap().permissions().mode() & 0o777, 0o400);
    let now = keys(&setup.site);

    // Without another key there is nothing to announce.
    hang_up();
    let looks = || member.agent.log().matches("SIGHUP: looking").count();
    member.wait("the last look", || looks() == 3);
    answered(&pings);
    assert_eq!(keys(&setup.site), now);
    for log in [member.agent.log(), other.agent.log()] {
        assert!(log.matches("the WireGuard key has changed").count() <= 1, "{log}");
        assert!(!log.contains(&first) && !log.contains(&second), "a private key is in the log");
    }
    setup.wait("readiness", Member::is_ready);
}

#[test]
fn of_two_nodes_with_one_key_the_younger_one_takes_another_if_it_may() {
    let site = Site::new(Kind::Etcd, &config(V4, WIREGUARD));
    let old = site.join();
    let copied = fs::read_to_string(key_file(&old)).unwrap();
    let node = site.fabric.node().unwrap();
    let file = node.dir().join("wgkey");
    fs::write(&file, &copied).unwrap();
    fs::set_permissions(&file, Permissions::from_mode(0o400)).unwrap();
    let before = keys(&site);
    let young = site.start(node, &["--wireguard-new-key"]);
    let settled = || {
        let now = keys(&site);
        now.len() == 2 && now[0] != now[1] && now.contains(&before[0])
    };
    young.wait("two keys", settled);
    for member in [&old, &young] {
        member.wait("readiness", || member.is_ready());
        assert!(!member.agent.log().contains(&copied), "the private key is in the log");
    }
    assert_eq!(fs::read_to_string(key_file(&old)).unwrap(), copied);
    assert_ne!(fs::read_to_string(&file).unwrap(), copied);
    young.wait_for_log("this node takes another WireGuard key");
    let pods = [&old, &young].map(Member::pod_of_all_families);
    let reached = || pods[0].namespace().reaches(pods[1].address()).unwrap();
    young.wait("an echo", reached);
}

#[test]
fn leases_that_cannot_be_used_are_named_and_harm_nobody() {
    let setup = Setup::new(Kind::Etcd, &config(V4, WIREGUARD));
    let pings = pings(&setup.pods.each_ref());
    let own = keys(&setup.site);
    let far = "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=";
    let zero = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
    let leases = [
        (150, format!(r#""BackendData":{{"PublicKey":"{far}","Port":0}}"#), ""),
        (151, format!(r#""BackendData":{{"PublicKey":"{zero}","Port":51820}}"#), "low order"),
        (152, r#""BackendData":{"PublicKey":"short","Port":51820}"#.to_owned(), "44 characters"),
        (153, format!(r#""BackendData":{{"PublicKey":"{far}","Port":70000}}"#), "Port: 70000"),
        (154, r#""BackendData":null"#.to_owned(), "no public key"),
        (155, format!(r#""BackendData":{{"PublicKey":"{far}","Port":1}}"#), "whose lease was written later"),
    ];
    for (number, data, _) in &leases {
        let key = format!("/coreos.com/network/subnets/10.244.{number}.0-24");
        let value = format!(
            r#"{{"PublicIP":"172.31.0.{number}","PublicIPv6":null,"BackendType":"wireguard",{data}}}"#
        );
        setup.site.etcdctl(&["put", &key, &value]);
    }
    for (number, _, part) in leases.iter().filter(|(_, _, part)| !part.is_empty()) {
        // Of two leases with one key the earlier one is told.
        let number = if part.contains("later") { &150 } else { number };
        let told = |member: &Member| {
            let log = member.agent.log();
            log.lines().any(|line| line.contains(&format!("10.244.{number}.0")) && line.contains(part))
        };
        setup.wait(&format!("a word about {number}: {part}"), told);
    }
    answered(&pings);
    // A node with this node's key: a copied disk.
    let value = format!(
        r#"{{"PublicIP":"172.31.0.160","PublicIPv6":null,"BackendType":"wireguard","BackendData":{{"PublicKey":"{}","Port":51820}}}}"#,
        own[0]
    );
    setup.site.etcdctl(&["put", "/coreos.com/network/subnets/10.244.160.0-24", &value]);
    let told = |member: &Member| member.verbose().contains("announces this node's WireGuard key");
    wait_for("a word about the copied key", LIMIT, || setup.members.iter().any(told)).unwrap();
    wait_for("a node that is not ready", LIMIT, || setup.members.iter().any(|member| !member.is_ready()))
        .unwrap();
    setup.site.etcdctl(&["del", "/coreos.com/network/subnets/10.244.160.0-24"]);
    setup.wait("readiness again", Member::is_ready);
}

/// The value of a series.
fn series(member: &Member, name: &str) -> Option<u64> {
    let (_, text) = member.agent.get("/metrics").unwrap();
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
}

#[test]
fn the_last_handshake_and_the_bytes_of_each_peer_are_told_by_metrics_and_status() {
    let setup = Setup::new(Kind::Etcd, &config(V4, WIREGUARD));
    let [a, b] = &setup.members;
    a.wait("an echo", || setup.reaches());
    let peer = format!("{{peer=\"{}\"}}", b.subnet());
    let at = || series(a, &format!("flannel_peer_handshake_timestamp_seconds{peer}"));
    a.wait("the handshake", || at().is_some());
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let handshake = at().unwrap();
    assert!((now - 180..=now).contains(&handshake), "{handshake} {now}");
    assert_eq!(series(a, "flannel_wireguard_peers{session=\"current\"}"), Some(1));
    assert_eq!(series(a, "flannel_wireguard_peers{session=\"failing\"}"), Some(0));
    let completed = |role: &str| {
        let name = format!("flannel_wireguard_handshakes_total{{role=\"{role}\",result=\"completed\"}}");
        series(a, &name).unwrap()
    };
    assert!(completed("initiator") + completed("responder") >= 1);

    // 100 packets of 1000 bytes, with 8 of ICMP, 20 of IP, padding and 32 of WireGuard.
    let sent = || series(a, &format!("flannel_peer_transmit_bytes_total{peer}")).unwrap();
    let before = sent();
    let target = setup.pods[1].address().to_string();
    setup.pods[0].command("ping").args(["-c", "100", "-i", "0.01", "-s", "1000", &target]).ok().unwrap();
    let counted = sent() - before;
    assert!((100 * 1060..100 * 1200).contains(&counted), "{counted}");
    assert!(series(a, &format!("flannel_peer_receive_bytes_total{peer}")).unwrap() >= 100 * 1060);

    let flanneld = crate::bed::flanneld();
    let text = a.node.namespace().command(flanneld).args(["status", "--peers"]).ok().unwrap();
    let [head, row] = text.lines().collect::<Vec<_>>()[..] else { panic!("{text}") };
    assert!(head.contains("HANDSHAKE") && row.contains(" ago "), "{text}");
    let (_, list) = a.agent.get("/peers").unwrap();
    let list: serde_json::Value = serde_json::from_str(&list).unwrap();
    assert!(list["peers"][0]["handshake"].as_u64().unwrap() >= handshake, "{list}");

    // Of more peers than may have series, the sum is still told.
    let Setup { site: _site, members: [mut member, _other], pods: _pods } = setup;
    assert!(member.agent.terminate(LIMIT).unwrap().success());
    member.start_again_with(&["--metrics-peers=0"]);
    let current = || series(&member, "flannel_wireguard_peers{session=\"current\"}");
    member.wait("a session again", || current() == Some(1));
    assert!(!member.agent.get("/metrics").unwrap().1.contains("{peer="));
}

#[test]
fn a_peer_with_another_preshared_key_is_told_from_a_port_that_is_blocked() {
    let with = |group: &str| {
        let key = format!("{}{}=", group.repeat(10), &group[..3]);
        config(V4, &format!(r#"{{"Type":"wireguard","PSK":"{key}"}}"#))
    };
    let site = Site::new(Kind::Kube, &with("AQEB"));
    let other = site.fabric.node().unwrap();
    site.configure_one(&other.name(), &with("AgIC"));
    let args = ["--probe-interval=1s"];
    let members = [site.join_with(&args), site.ready(other, &args)];
    for member in &members {
        let cause = || {
            let (_, text) = member.agent.get("/peers").unwrap();
            let list: serde_json::Value = serde_json::from_str(&text).unwrap();
            list["peers"][0]["cause"].as_str().unwrap_or_default().to_owned()
        };
        member.wait("the cause", || cause().contains("another preshared key: PSK differs"));
        let failing = || series(member, "flannel_wireguard_peers{session=\"failing\"}");
        member.wait("a failing session", || failing() == Some(1));
    }
    // Once it is the same, there is a session.
    site.configure_one(&members[1].node.name(), &with("AQEB"));
    for member in &members {
        let current = || series(member, "flannel_wireguard_peers{session=\"current\"}");
        member.wait("a session", || current() == Some(1));
    }
}

#[test]
fn a_node_tells_its_key_announces_the_former_backend_until_peers_with_keys_answer_and_takes_it_back_with_the_change()
 {
    for (kind, former) in [(Kind::Etcd, r#"{"Type":"host-gw"}"#), (Kind::Kube, r#"{"Type":"vxlan"}"#)] {
        let setup = Setup::new(kind, &config(V4, former));
        let pings = pings(&setup.pods.each_ref());
        // One of the nodes has not changed: it reads leases with a key as if there were none.
        let names = setup.members.each_ref().map(|member| member.node.name());
        let told = |site: &Site| site.announced().iter().filter(|lease| lease.contains("Wireguard")).count();
        let wireguard = config(V4, WIREGUARD);
        if kind == Kind::Kube {
            setup.site.configure_one(&names[0], &wireguard);
            setup.members[0].wait_for_log("prepared while vxlan");
            wait_for("the announcement", LIMIT, || keys(&setup.site).len() == 1).unwrap();
            assert_eq!(told(&setup.site), 0);
            setup.site.configure_one(&names[1], &wireguard);
        } else {
            setup.site.configure(&wireguard);
            setup.wait("its preparation", |member| member.agent.log().contains("prepared while host-gw"));
            setup.site.configure(&config(V4, former));
            wait_for("no keys", LIMIT, || told(&setup.site) == 0 && keys(&setup.site).is_empty()).unwrap();
            answered(&pings);
            setup.site.configure(&wireguard);
        }
        wait_for("both announcements", LIMIT, || keys(&setup.site).len() == 2).unwrap();
        for member in &setup.members {
            member.wait_for_log("wireguard is announced: there are sessions with all peers");
        }
        answered(&pings);
        assert!(setup.reaches());
        let lost = lost(pings);
        assert!(lost.iter().all(|lost| *lost == 0), "{former}: {lost:?}\n{}", setup.members[0].agent.log());
    }
}
