//! How a node stands, as it says itself: `/status`, `/peers`, `flanneld status`; who may ask, and what slow and huge
//! requests can do.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use serde_json::Value;

use crate::bed::{Cluster, LIMIT, Member, VXLAN, flanneld};
use crate::site::{Kind, Site, config};

fn status(member: &Member, path: &str) -> Value {
    let (code, text) = member.agent.get(path).unwrap();
    assert_eq!(code, 200, "{text}");
    serde_json::from_str(&text).unwrap()
}

fn command(member: &Member, args: &[&str]) -> (Option<i32>, String) {
    let output = member.node.namespace().command(flanneld()).arg("status").args(args).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap();
    (output.status.code(), text)
}

#[test]
fn one_look_says_how_a_node_is_and_agrees_with_the_kernel() {
    let cluster = Cluster::new(VXLAN);
    // Once a peer is probed, that is what is said of it.
    let (a, b) = (cluster.join_with(&["--ip-masq", "--probe-interval=0"]), cluster.join());
    // What the loop did is published at the end of its turn, so a moment after the kernel has it.
    a.wait("the peer", || status(&a, "/status")["peers"]["programmed"] == 1);
    let seen = status(&a, "/status?look");
    assert_eq!(seen["schema"], 1);
    assert_eq!((&seen["ready"], &seen["alive"]), (&Value::from(true), &Value::from(true)), "{seen}");
    assert_eq!(seen["node"]["subnets"][0], a.subnet().to_string());
    assert_eq!(seen["node"]["backend"], "vxlan VNI 1 port 8472");
    assert_eq!(seen["node"]["public"][0], a.node.address().to_string());
    assert_eq!(seen["peers"]["programmed"], 1);
    assert_eq!(seen["rules"]["mode"], "nftables");
    assert!(seen["store"]["connected"].as_bool().unwrap(), "{seen}");
    let left = seen["store"]["lease_ends"].as_u64().unwrap() - seen["at"].as_u64().unwrap();
    assert!((80_000..=86_401).contains(&left), "{left}");
    assert_eq!(seen["kernel"]["differing"], serde_json::json!({}), "{seen}");
    assert_eq!(seen["kernel"]["desired"]["route"], 1);

    let list = status(&a, "/peers");
    let peer = &list["peers"][0];
    assert_eq!(peer["subnet"], b.subnet().to_string());
    assert_eq!(peer["public"], b.node.address().to_string());
    assert_eq!(
        (&peer["state"], &peer["way"]),
        (&"programmed".into(), &"vxlan VNI 1 port 8472".into()),
        "{list}"
    );

    // What another program undoes is put right, counted as a repair, and told.
    a.ip(&format!("route del {}", b.subnet()));
    a.wait("the repair", || status(&a, "/status")["counters"]["repairs"]["route"] == 1);
    a.wait("the repair in words", || command(&a, &[]).1.contains("kernel   as desired; last repair"));
    let (code, text) = command(&a, &[]);
    assert_eq!(code, Some(0), "{text}");
    for part in [
        &format!("{} · vxlan VNI 1 port 8472 · mtu 1450 · eth0 {}", a.subnet(), a.node.address()),
        "store    etcd",
        "peers    1 known, 1 programmed",
        "kernel   as desired; last repair",
        "rules    nftables, whole",
    ] {
        assert!(text.contains(part), "{part} in\n{text}");
    }
    let (_, table) = command(&a, &["--peers"]);
    assert!(table.starts_with("PEER") && table.contains(&b.subnet().to_string()), "{table}");
    let (code, _) = command(&a, &["--peers", "--all"]);
    assert_eq!(code, Some(2));
}

#[test]
fn all_nodes_are_asked_and_one_that_hangs_has_a_row() {
    let cluster = Cluster::new(VXLAN);
    let everywhere = ["--healthz-ip=0.0.0.0"];
    let (a, b) = (cluster.join_with(&everywhere), cluster.join_with(&everywhere));
    let mut hanging = cluster.join_with(&everywhere);
    a.wait("the peers", || status(&a, "/status")["peers"]["programmed"] == 2);
    b.wait("the peers", || status(&b, "/status")["peers"]["programmed"] == 2);
    hanging.agent.process().signal(backends::testing::Signal::STOP).unwrap();
    // A node that has 2 s to answer may be a moment too late, on a machine that does something else.
    a.wait("an answer of each that runs", || {
        command(&a, &["--all"]).1.lines().filter(|line| line.contains("no answer")).count() == 1
    });
    let (code, text) = command(&a, &["--all"]);
    assert_eq!(code, Some(0), "{text}");
    let row = |address: &str| {
        text.lines().find(|line| line.starts_with(address)).unwrap_or_else(|| panic!("{text}"))
    };
    assert!(row(&b.node.address().to_string()).contains("2/2"), "{text}");
    assert!(row(&hanging.node.address().to_string()).contains("no answer: no answer within 2 s"), "{text}");
    let (_, json) = command(&a, &["--all", "--json"]);
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["nodes"].as_array().unwrap().len(), 3);
    let page = a.node.namespace().command(flanneld()).arg("report").ok().unwrap();
    let silent = format!("<th scope=row>{}<td class=b>✘ no answer", hanging.node.address());
    assert!(page.contains(&silent) && page.contains("no answer within 2 s"), "{page}");
    let ready = format!("<th scope=row>{}<td class=g>✔ ", b.node.address());
    assert!(page.contains(&ready) && page.ends_with("</html>\n"), "{page}");
    hanging.agent.process().signal(backends::testing::Signal::CONT).unwrap();
}

#[test]
fn a_node_with_both_families_is_one_row_and_one_cell_with_the_worse_of_them() {
    let site = Site::new(Kind::Etcd, &config(&subnet::Family::BOTH, r#"{"Type":"vxlan"}"#));
    let args = ["--healthz-ip=::", "--probe-interval=1s"];
    let (a, b) = (site.join_with(&args), site.join_with(&args));
    let fine =
        |member: &Member| member.agent.get("/peers").unwrap().1.matches("\"verdict\":\"fine\"").count() == 2;
    a.wait("both families", || fine(&a) && fine(&b));
    let (_, text) = command(&a, &["--all"]);
    let rows: Vec<&str> = text.lines().skip(1).take_while(|line| !line.is_empty()).collect();
    assert!(rows.len() == 2 && rows[1].starts_with(&b.node.address().to_string()), "{text}");
    assert_eq!(text.matches('✘').count(), 1, "only the legend: {text}");

    let rules = format!(
        "table bridge faults {{ chain f {{ type filter hook forward priority 0; ip6 daddr {} udp dport 8472 drop; }}\n}}\n",
        b.node.address_v6()
    );
    site.fabric.switch().command("nft").args(["-f", "-"]).input(rules).ok().unwrap();
    let said = format!("{} answers, but its tunnel address", b.node.address_v6());
    a.wait("the trouble", || command(&a, &["--all"]).1.contains(&said));
    let (_, text) = command(&a, &["--all"]);
    let line = text.lines().find(|line| line.contains(&said)).unwrap();
    assert!(line.starts_with(&format!("✘ {}: ", a.node.address())), "{text}");
    assert!(line.contains("allow UDP port 8472 both ways"), "with its remedy: {text}");
    let cells: Vec<&str> = text.lines().filter(|line| line.contains('·')).collect();
    assert!(cells.len() == 2 && cells[0].ends_with('✘'), "{text}");
}

#[test]
fn colours_are_for_terminals_and_for_none_that_asks_for_none() {
    let cluster = Cluster::new(VXLAN);
    let a = cluster.join();
    // script(1) gives its command a terminal.
    let status = format!("{} status", flanneld().display());
    let on_terminal = |variables: &[(&str, &str)]| {
        let command =
            a.node.namespace().command("script").args(["-qec", &status, "/dev/null"]).env("NO_COLOR", "");
        let command = variables.iter().fold(command, |command, (name, value)| command.env(name, value));
        String::from_utf8(command.output().unwrap().stdout).unwrap()
    };
    let text = on_terminal(&[("TERM", "xterm")]);
    assert!(text.contains("\u{1b}[32mready"), "{text:?}");
    for variables in [&[("TERM", "xterm"), ("NO_COLOR", "1")][..], &[("TERM", "dumb")]] {
        let text = on_terminal(variables);
        assert!(text.contains("ready") && !text.contains('\u{1b}'), "{variables:?}: {text:?}");
    }
    let (_, piped) = command(&a, &[]);
    assert!(piped.contains("ready") && !piped.contains('\u{1b}'), "{piped:?}");
}

#[test]
fn only_this_host_and_nodes_of_the_cluster_may_ask() {
    let cluster = Cluster::new(VXLAN);
    let a = cluster.join_with(&["--healthz-ip=0.0.0.0"]);
    let b = cluster.join();
    a.wait("the peer", || status(&a, "/status")["peers"]["programmed"] == 1);
    let at = (a.node.address(), 8081).into();
    for path in ["/status", "/peers"] {
        assert_eq!(b.node.namespace().http_get(at, path).unwrap().0, 200, "a peer");
        assert_eq!(cluster.fabric.switch().http_get(at, path).unwrap().0, 403, "a stranger");
        assert_eq!(a.node.namespace().http_get(at, path).unwrap().0, 200, "the node itself");
    }
    assert_eq!(cluster.fabric.switch().http_get(at, "/metrics").unwrap().0, 200);
}

#[test]
fn nodes_have_their_names_where_the_store_has_them() {
    let site = Site::new(Kind::Kube, &config(&[subnet::Family::V4], r#"{"Type":"vxlan"}"#));
    let (a, b) = (site.join(), site.join());
    a.wait("the peer", || status(&a, "/status")["peers"]["programmed"] == 1);
    assert_eq!(status(&a, "/status")["node"]["name"], a.node.name());
    assert_eq!(status(&a, "/peers")["peers"][0]["name"], b.node.name());
}

#[test]
fn slow_and_huge_requests_keep_nobody_from_being_answered() {
    let cluster = Cluster::new(VXLAN);
    let a = cluster.join();
    let connect = || {
        let stream = TcpStream::connect(("127.0.0.1", 8081)).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream
    };
    a.node.namespace().run(|| {
        // 64 that read nothing of what they asked for, and 64 that never finish asking.
        let mut slow = Vec::new();
        for path in ["/metrics", "/status?look", "/peers", "/metrics"] {
            for _ in 0..32 {
                let mut stream = connect();
                let end = if slow.len() < 64 { "\r\n\r\n" } else { "\r\n" };
                stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: x{end}").as_bytes()).unwrap();
                slow.push(stream);
            }
        }
        assert_eq!(a.agent.get("/readyz").unwrap().0, 200);
        assert_eq!(a.agent.get("/metrics").unwrap().0, 200);
        let mut huge = connect();
        let head = format!("GET /metrics?{} HTTP/1.1\r\nhost: x\r\n\r\n", "x".repeat(1 << 20));
        // It is refused before all of it was sent.
        let _ = huge.write_all(head.as_bytes());
        let mut answer = Vec::new();
        let _ = huge.read_to_end(&mut answer);
        assert!(!answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
        assert_eq!(a.agent.get("/healthz").unwrap().0, 200);
    });
    std::thread::sleep(Duration::from_millis(10));
    assert_eq!(a.agent.get("/status").unwrap().0, 200);
}
