//! The commands that look: explain, trace, connectivity-test and diags, on real nodes with real faults.

use std::process::Output;

use backends::testing::{Signal, wait_for};
use serde_json::Value;

use crate::bed::{Cluster, HOST_GW, LIMIT, Member, VXLAN, flanneld};

/// Runs a command of flanneld on the node; gives its code, and what it printed.
pub(crate) fn run(member: &Member, args: &[&str]) -> (i32, String, String) {
    let file = format!("--subnet-file={}", member.node.subnet_file().display());
    let mut command = member.node.namespace().command(flanneld()).args(args);
    if matches!(args[0], "explain" | "diags") {
        command = command.arg(file);
    }
    let Output { status, stdout, stderr } = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code().unwrap(), text(stdout), text(stderr))
}

#[test]
fn explain_follows_a_packet_through_route_neighbour_and_forwarding_entry() {
    let cluster = Cluster::new(VXLAN);
    let (a, b) = (cluster.join(), cluster.join());
    let (pod_a, pod_b) = (a.pod(), b.pod());
    let (from, to) = (pod_a.address().to_string(), pod_b.address().to_string());
    a.wait("the way", || run(&a, &["explain", &from, &to]).0 == 0);
    let (code, text, _) = run(&a, &["explain", &from, &to]);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(code, 0, "{text}");
    let network = b.subnet().network();
    assert!(lines[0].starts_with(&format!("pod {from}")), "{text}");
    assert_eq!(lines[1], format!("→ route {} via {network} dev flannel.1 (flannel's)", b.subnet()));
    assert!(lines[2].starts_with(&format!("→ neighbour {network} = ")), "{text}");
    assert!(lines[3].ends_with(&format!("dst {}", b.node.address())), "{text}");
    assert_eq!(lines[4], format!("→ eth0 to {}, UDP 8472, VNI 1, mtu 1450 inside", b.node.address()));
    assert_eq!(lines[5], format!("→ source stays {from}: from pod to pod"));

    let (code, json, _) = run(&a, &["explain", &from, &to, "--json"]);
    let value: Value = serde_json::from_str(&json).unwrap();
    assert!(code == 0 && value["schema"] == 1 && value["way"]["trouble"].is_null(), "{json}");
    assert_eq!(value["way"]["steps"][3]["object"], "fdb");

    // The other end of the same way.
    let (code, text, _) = run(&b, &["explain", &from, &to]);
    assert!(
        code == 0 && text.contains("come in by flannel.1") && text.contains(&format!("pod {to}: ")),
        "{text}"
    );

    // Out of the network, and to a subnet without a lease.
    let (code, text, _) = run(&a, &["explain", &from, "203.0.113.9"]);
    assert!(code == 0 && text.contains("since flanneld runs without --ip-masq"), "{text}");
    let (code, text, stderr) = run(&a, &["explain", &from, "10.244.251.9"]);
    assert!(code == 1 && text.contains("no route of flannel leads there"), "{text}");
    assert!(stderr.contains("does not arrive"), "{stderr}");
}

#[test]
fn explain_names_the_link_of_the_chain_that_is_missing() {
    let cluster = Cluster::new(VXLAN);
    let (mut a, b) = (cluster.join(), cluster.join());
    let (pod_a, pod_b) = (a.pod(), b.pod());
    let (from, to) = (pod_a.address().to_string(), pod_b.address().to_string());
    a.wait("the way", || run(&a, &["explain", &from, &to]).0 == 0);
    // What comes now is not repaired.
    a.agent.process().signal(Signal::STOP).unwrap();
    let network = b.subnet().network();
    for (damage, expected) in [
        (format!("neigh del {network} dev flannel.1"), format!("no neighbour entry for {network}")),
        (format!("route del {}", b.subnet()), "no route of flannel leads there".to_owned()),
        (format!("route add blackhole {}", b.subnet()), "it ends in a blackhole route".to_owned()),
    ] {
        a.ip(&damage);
        let (code, text, _) = run(&a, &["explain", &from, &to]);
        assert!(code == 1 && text.contains(&expected), "{damage}: {text}");
    }
    a.agent.process().signal(Signal::CONT).unwrap();
}

#[test]
fn explain_without_a_tunnel_names_the_next_hop() {
    let cluster = Cluster::new(HOST_GW);
    let (a, b) = (cluster.join(), cluster.join());
    let (pod_a, pod_b) = (a.pod(), b.pod());
    let (from, to) = (pod_a.address().to_string(), pod_b.address().to_string());
    a.wait("the route", || a.node.has_route(b.subnet()).unwrap());
    let (code, text, _) = run(&a, &["explain", &from, &to]);
    let via = format!("→ route {} via {} dev eth0 (flannel's)", b.subnet(), b.node.address());
    assert!(code == 0 && text.contains(&via), "{text}");
}

#[test]
fn explain_asks_the_agent_where_no_entry_of_the_kernel_names_the_node() {
    for backend in [r#"{"Type":"udp"}"#, r#"{"Type":"wireguard","Userspace":"always"}"#] {
        let cluster = Cluster::new(&format!(r#"{{"Network":"10.244.0.0/16","Backend":{backend}}}"#));
        let (mut a, b) = (cluster.join(), cluster.join());
        let (pod_a, pod_b) = (a.pod(), b.pod());
        let (from, to) = (pod_a.address().to_string(), pod_b.address().to_string());
        a.wait("the way", || run(&a, &["explain", &from, &to]).0 == 0);
        let (code, text, _) = run(&a, &["explain", &from, &to]);
        let expected = format!("the agent's own datapath sends it to {} in UDP", b.node.address());
        assert!(code == 0 && text.contains(&expected), "{text}");
        let (code, text, _) = run(&a, &["explain", &from, "10.244.251.9"]);
        assert!(code == 1 && text.contains("no node has leased a subnet with it"), "{text}");
        a.agent.process().signal(Signal::STOP).unwrap();
        let (code, text, _) = run(&a, &["explain", &from, &to]);
        assert!(code == 0 && text.contains("to which node is not known"), "{text}");
        a.agent.process().signal(Signal::CONT).unwrap();
    }
}

fn tables(member: &Member) -> String {
    member.show("nft list tables")
}

/// Follows packets from one pod to another while it pings.
fn trace(
    member: &Member,
    pods: (&backends::testing::Pod, &backends::testing::Pod),
    args: &[&str],
) -> (i32, String, String) {
    let (from, to) = (pods.0.address().to_string(), pods.1.address().to_string());
    let mut ping = pods.0.namespace().command("ping").args(["-i", "0.2", &to]).spawn().unwrap();
    let mut all = vec!["trace", &from, &to, "--proto=icmp"];
    all.extend(args);
    let outcome = run(member, &all);
    ping.signal(Signal::KILL).unwrap();
    outcome
}

#[test]
fn trace_follows_packets_to_the_device_and_names_the_rule_that_drops_them() {
    let cluster = Cluster::new(VXLAN);
    let (a, b) = (cluster.join(), cluster.join());
    let (pod_a, pod_b) = (a.pod(), b.pod());
    a.wait("the way", || pod_a.namespace().reaches(pod_b.address()).unwrap_or(false));
    let (code, text, stderr) = trace(&a, (&pod_a, &pod_b), &["--live=20s"]);
    assert!(code == 0 && text.contains("✔ left by flannel.1"), "{text}{stderr}");
    assert!(text.contains("answer icmp echo reply") && text.contains("icmp echo request"), "{text}");
    assert!(!tables(&a).contains("flannel-trace"), "{}", tables(&a));

    let rules = "table ip site { chain fw { type filter hook forward priority 5; ip saddr 192.0.2.1 accept; ip protocol icmp \
                 drop comment \"no pings\"; }\n}\n";
    a.node.namespace().command("nft").args(["-f", "-"]).input(rules).ok().unwrap();
    let (code, text, _) = trace(&a, (&pod_a, &pod_b), &["--live=20s"]);
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("dropped here by table ip site, chain fw, rule 2 (handle "), "{text}");
    assert!(text.contains("\"no pings\"") && text.contains("not flannel's"), "{text}");

    let (code, json, _) = trace(&a, (&pod_a, &pod_b), &["--live=20s", "--json"]);
    let first: Value = serde_json::from_str(json.lines().next().unwrap()).unwrap();
    assert!(code == 1 && first["fate"]["is"] == "dropped", "{json}");
    let last = first["decisions"].as_array().unwrap().last().unwrap();
    assert_eq!((&last["chain"], &last["rule"], &last["verdict"]), (&"fw".into(), &2.into(), &"drop".into()));
    a.node.namespace().command("nft").args(["delete", "table", "ip", "site"]).ok().unwrap();

    // Routing drops without a rule.
    a.ip(&format!("route add blackhole {}/32", pod_b.address()));
    let (code, text, _) = trace(&a, (&pod_a, &pod_b), &["--live=20s"]);
    assert!(code == 1 && text.contains("routing dropped it"), "{text}");
}

#[test]
fn trace_says_when_nothing_comes_and_never_leaves_its_table() {
    let cluster = Cluster::new(VXLAN);
    let mut a = cluster.join();
    let (code, _, stderr) = run(&a, &["trace", "10.244.1.7", "10.244.7.3", "--live=1s"]);
    assert!(code == 1 && stderr.contains("no packet 10.244.1.7 → 10.244.7.3 came by"), "{stderr}");
    let long = ["trace", "10.244.1.7", "10.244.7.3", "--live=60s"];
    let spawn = || a.node.namespace().command(flanneld()).args(long).spawn().unwrap();
    let mut tracers = [spawn(), spawn()];
    wait_for("two tables", LIMIT, || tables(&a).matches("flannel-trace").count() == 2).unwrap();
    let before = a.agent.log();
    for tracer in &mut tracers {
        tracer.signal(Signal::KILL).unwrap();
        tracer.wait(LIMIT).unwrap();
    }
    wait_for("no table", LIMIT, || !tables(&a).contains("flannel-trace")).unwrap();
    let after = a.agent.log();
    assert!(!after[before.len()..].contains("WARN"), "{after}");

    // What a kernel that knows no owners would leave: it goes at the agent's start, and by cleanup.
    let left = |id: u32| format!("table inet flannel-trace-{id} {{ }}\n");
    let leave =
        |a: &Member| a.node.namespace().command("nft").args(["-f", "-"]).input(left(4_194_305)).ok().unwrap();
    leave(&a);
    a.agent.terminate(LIMIT).unwrap();
    a.start_again();
    wait_for("no table", LIMIT, || !tables(&a).contains("flannel-trace")).unwrap();
    leave(&a);
    a.agent.terminate(LIMIT).unwrap();
    let file = format!("--subnet-file={}", a.node.subnet_file().display());
    a.node.namespace().command(flanneld()).args(["cleanup", &file]).ok().unwrap();
    assert!(!tables(&a).contains("flannel-trace"), "{}", tables(&a));
}

#[test]
fn the_connectivity_test_finds_a_tunnel_that_is_cut_or_too_narrow() {
    let cluster = Cluster::new(VXLAN);
    let quick: &[&str] = &["--probe-interval=1s", "--healthz-ip=0.0.0.0"];
    let (a, b) = (cluster.join_with(quick), cluster.join_with(quick));
    let (_pod_a, pod_b) = (a.pod(), b.pod());
    let reaches = || a.node.namespace().reaches(pod_b.address()).unwrap_or(false);
    a.wait("the way", reaches);
    let args = ["connectivity-test", "--count=5"];
    let (code, text, stderr) = run(&a, &args);
    assert!(code == 0 && text.contains("1 way: 1 ok"), "{text}{stderr}");
    assert!(
        text.contains("1450: 5/5") && text.contains("1451: too long") && text.contains("node 5/5"),
        "{text}"
    );
    for (rule, part) in [
        ("udp dport 8472 drop", "the tunnel's port is dropped between the nodes"),
        ("ip length > 1400 drop", "packets of 1450 bytes are lost, shorter ones arrive"),
    ] {
        let rules = format!(
            "table bridge faults {{ chain f {{ type filter hook forward priority 0; {rule}; }}\n}}\n"
        );
        cluster.fabric.switch().command("nft").args(["-f", "-"]).input(rules).ok().unwrap();
        let (code, text, _) = run(&a, &args);
        assert!(code == 1 && text.contains(part), "{rule}: {text}");
        cluster.fabric.switch().command("nft").args(["delete", "table", "bridge", "faults"]).ok().unwrap();
    }
    let (code, json, _) = run(&a, &["connectivity-test", "--count=3", "--size=64,100", "--json"]);
    let value: Value = serde_json::from_str(&json).unwrap();
    assert!(code == 0 && value["peers"][0]["series"].as_array().unwrap().len() == 3, "{json}");
    assert!(value["peers"][0]["tcp_seconds"].is_number(), "{json}");
}

#[test]
fn diags_is_one_archive_without_secrets() {
    let cluster = Cluster::new(VXLAN);
    let a = cluster.join_with(&["--etcd-password=hunter2"]);
    let archive = a.node.dir().join("node.tar");
    let (code, text, stderr) = run(&a, &["diags", archive.to_str().unwrap()]);
    assert!(code == 0 && text.contains("without passwords"), "{text}{stderr}");
    let unpacked = a.node.dir().join("unpacked");
    std::fs::create_dir(&unpacked).unwrap();
    let tar = |args: &[&str]| a.node.namespace().command("tar").args(args).ok().unwrap();
    tar(&["-xf", archive.to_str().unwrap(), "-C", unpacked.to_str().unwrap()]);
    let read = |name: &str| std::fs::read_to_string(unpacked.join("flannel-diags").join(name)).unwrap();
    assert!(read("agent/processes.txt").contains("--etcd-password=***"), "{}", read("agent/processes.txt"));
    assert!(read("kernel/own.txt").contains("link add flannel.1 type vxlan"), "{}", read("kernel/own.txt"));
    assert!(read("kernel/nftables.txt").contains("table ip flannel-ipv4"), "{}", read("kernel/nftables.txt"));
    assert!(read("kernel/sysctls.txt").contains("net.ipv4.ip_forward = 1"));
    assert!(serde_json::from_str::<Value>(&read("agent/status.json")).unwrap()["ready"] == true);
    assert!(read("programs/ip-address-show.txt").contains("flannel.1"));
    let found = a.node.namespace().command("grep").args(["-r", "hunter2"]).arg(&unpacked).output().unwrap();
    assert!(found.stdout.is_empty(), "{}", String::from_utf8_lossy(&found.stdout));
    let (code, _, stderr) = run(&a, &["diags", archive.to_str().unwrap()]);
    assert!(code == 1 && stderr.contains("can't be written"), "an archive that is there stays: {stderr}");
}
