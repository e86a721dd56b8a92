//! `/metrics` as Debian's Prometheus scrapes it, and as the kernel counts.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};

use serde_json::Value;

use crate::bed::{Cluster, Member, VXLAN};

/// The counters of a device by `ip`: bytes, packets, errors, dropped, in both directions.
fn counters(member: &Member, device: &str) -> Vec<(String, u64)> {
    let text = member.show(&format!("ip -s -j link show {device}"));
    let all: Value = serde_json::from_str(&text).unwrap();
    let stats = &all[0]["stats64"];
    let mut found = Vec::new();
    for (short, long) in [("rx", "receive"), ("tx", "transmit")] {
        for what in ["bytes", "packets", "errors", "dropped"] {
            found.push((format!("flannel_device_{long}_{what}_total"), stats[short][what].as_u64().unwrap()));
        }
    }
    found
}

/// What Prometheus knows of a series, if anything yet.
fn query(member: &Member, expression: &str) -> Option<f64> {
    let encoded: String = expression.bytes().map(|byte| format!("%{byte:02x}")).collect();
    let at = SocketAddr::from((Ipv4Addr::LOCALHOST, 9090));
    let (_, text) = member.node.namespace().http_get(at, &format!("/api/v1/query?query={encoded}")).ok()?;
    let body = &text[text.find('{')?..=text.rfind('}')?];
    let answer: Value = serde_json::from_str(body).ok()?;
    answer["data"]["result"][0]["value"][1].as_str()?.parse().ok()
}

#[test]
fn prometheus_scrapes_what_the_kernel_counts() {
    let cluster = Cluster::new(VXLAN);
    let (a, b) = (cluster.join_with(&["--ip-masq"]), cluster.join());
    let (pod, other) = (a.pod(), b.pod());
    a.wait("an echo", || pod.namespace().reaches(other.address()).unwrap());
    let directory = a.node.dir().join("prometheus");
    fs::create_dir(&directory).unwrap();
    let config = "global: {scrape_interval: 1s}\nscrape_configs:\n- job_name: flannel\n  static_configs:\n  \
                  - targets: ['127.0.0.1:8081']\n";
    fs::write(directory.join("prometheus.yml"), config).unwrap();
    let before = counters(&a, "flannel.1");
    let _prometheus = a
        .node
        .namespace()
        .command("prometheus")
        .arg(format!("--config.file={}/prometheus.yml", directory.display()))
        .arg(format!("--storage.tsdb.path={}/data", directory.display()))
        .args(["--web.listen-address=127.0.0.1:9090", "--log.level=error"])
        .spawn()
        .unwrap();
    a.wait("the first scrape", || query(&a, "up{job=\"flannel\"}") == Some(1.0));
    a.wait("a value", || query(&a, "flannel_ready") == Some(1.0));
    for (name, least) in before {
        let scraped =
            query(&a, &format!("{name}{{device=\"flannel.1\"}}")).unwrap_or_else(|| panic!("no {name}"));
        let most = counters(&a, "flannel.1").into_iter().find(|(other, _)| *other == name).unwrap().1;
        assert!((least as f64..=most as f64).contains(&scraped), "{name}: {least} {scraped} {most}");
    }
    assert!(query(&a, "flannel_device_receive_packets_total{device=\"flannel.1\"}").unwrap() >= 1.0);
    let snmp = a.show("cat /proc/net/snmp");
    let udp: Vec<Vec<&str>> = snmp
        .lines()
        .filter_map(|line| line.strip_prefix("Udp:"))
        .map(|line| line.split_whitespace().collect())
        .collect();
    let column = udp[0].iter().position(|name| *name == "InCsumErrors").unwrap();
    let errors: f64 = udp[1][column].parse().unwrap();
    assert_eq!(query(&a, "flannel_udp_checksum_errors_total"), Some(errors));
    for (expression, value) in [
        ("flannel_peers{state=\"known\"}", 1.0),
        ("flannel_peers{state=\"programmed\"}", 1.0),
        ("flannel_store_connected", 1.0),
        ("flannel_rules_info{mode=\"nftables\"}", 1.0),
        ("flannel_foreign_chains_dropping", 0.0),
        ("flannel_netlink_overruns_total", 0.0),
        ("sum(flannel_condition) / count(flannel_condition)", 1.0),
        ("count(flannel_build_info)", 1.0),
        ("count(flannel_node_info{family=\"ipv4\"})", 1.0),
    ] {
        assert_eq!(query(&a, expression), Some(value), "{expression}");
    }
    let resident = query(&a, "process_resident_memory_bytes").unwrap();
    assert!(resident > 1e6 && resident < 1e9, "{resident}");
    // What is repaired is counted in the next scrape.
    a.ip(&format!("route del {}", b.subnet()));
    a.wait("the repair", || query(&a, "flannel_repairs_total{object=\"route\"}") == Some(1.0));
    let changes = query(&a, "flannel_changes_total{object=\"route\",action=\"set\",result=\"done\"}");
    assert!(changes.is_some_and(|changes| changes >= 2.0), "{changes:?}");
}

#[test]
fn an_exposition_is_small_whole_and_of_its_media_type() {
    let cluster = Cluster::new(VXLAN);
    let a = cluster.join();
    let (code, text) = a.agent.get("/metrics").unwrap();
    assert_eq!(code, 200);
    assert!(text.ends_with("# EOF\n"), "{text}");
    let series = text.lines().filter(|line| !line.starts_with('#')).count();
    assert!(series < 350 && text.len() < 60_000, "{series} series in {} bytes", text.len());
}
