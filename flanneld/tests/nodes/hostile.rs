//! Leases that somebody with access to the store writes: each is skipped with its reason, and no packet between
//! good nodes is lost.

use backends::testing::Pinger;

use crate::bed::Cluster;

/// Public addresses: nothing, loopback, multicast, reserved, broadcast, the LAN's ends, pods, the node itself.
const PUBLIC: &[&str] = &[
    "0.0.0.0",
    "0.0.0.1",
    "0.255.255.255",
    "127.0.0.1",
    "127.0.0.2",
    "127.255.255.255",
    "224.0.0.1",
    "224.0.0.251",
    "239.255.255.255",
    "232.1.1.1",
    "240.0.0.1",
    "250.1.2.3",
    "254.255.255.255",
    "255.255.255.254",
    "255.255.255.255",
    "10.244.0.0",
    "10.244.0.1",
    "10.244.255.255",
    "10.244.200.5",
];

/// Subnets: outside, everything, the whole network, too long keys, host bits, other spellings.
const KEYS: &[&str] = &[
    "0.0.0.0-0",
    "10.0.0.0-8",
    "10.244.0.0-16",
    "10.243.0.0-24",
    "10.245.0.0-24",
    "127.0.0.0-24",
    "224.0.0.0-24",
    "169.254.0.0-16",
    "192.168.0.0-16",
    "172.31.0.0-24",
    "172.31.0.0-16",
    "255.255.255.0-24",
    "10.244.160.1-24",
    "10.244.160.255-24",
    "10.244.160.0-33",
    "10.244.160.0-",
    "10.244.160.0",
    "-24",
    "&",
    "10.244.160.0-24&",
    "10.244.160.0-24x",
    "x",
    "..",
    "10.244.160.0-24/10",
    "010.244.160.0-24",
    "10.244.160.0-024",
    "10.244.160-24",
    "0.0.0.0-0&fd00::-64",
];

/// Values that are no leases.
const VALUES: &[&str] = &[
    "",
    "{",
    "}",
    "null",
    "true",
    "7",
    "[]",
    "\"\"",
    "nonsense",
    "{}}",
    "{\"PublicIP\":7}",
    "{\"PublicIP\":null}",
    "{\"PublicIP\":\"x\"}",
    "{\"PublicIP\":\"\"}",
    "{\"PublicIP\":\"300.1.1.1\"}",
    "{\"PublicIP\":\"172.31.0.1.2\"}",
    "{\"PublicIP\":[\"172.31.0.1\"]}",
    "{\"PublicIP\":{}}",
    "{\"PublicIP\":\"fd00::1\"}",
    "{\"PublicIP\":\"172.31.0.200\",\"BackendType\":7}",
    "{\"PublicIP\":\"172.31.0.200\",\"BackendType\":\"ipip\"}",
    "{\"PublicIP\":\"172.31.0.200\",\"BackendType\":\"\\u0000\"}",
];

/// Keys and public addresses that no node can have, with good values for the rest.
fn hostile(backend: &str) -> Vec<(String, String)> {
    let value = |public: &str, mac: &str| match backend {
        "vxlan" => format!(
            r#"{{"PublicIP":"{public}","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{mac}"}}}}"#
        ),
        "host-gw" => format!(r#"{{"PublicIP":"{public}","BackendType":"host-gw"}}"#),
        _ => format!(r#"{{"PublicIP":"{public}"}}"#),
    };
    let good = "02:00:00:00:00:c8";
    let mut all = Vec::new();
    let of_pods = (120..150).map(|number| format!("10.244.{number}.7"));
    for (number, public) in (101..).zip(PUBLIC.iter().map(ToString::to_string).chain(of_pods)) {
        all.push((format!("10.244.{number}.0-24"), value(&public, good)));
    }
    for key in KEYS {
        all.push(((*key).to_owned(), value("172.31.0.200", good)));
    }
    // The IPv4 half of such a key is good in itself; its address is not.
    all.push(("10.244.161.0-24&::-0".to_owned(), value("224.0.0.9", good)));
    let deep = "[".repeat(5000);
    let long = "a".repeat(60_000);
    let values = VALUES.iter().copied().chain([&*deep, &*long]);
    all.extend(
        (170..).zip(values).map(|(number, value)| (format!("10.244.{number}.0-24"), value.to_owned())),
    );
    if backend == "vxlan" {
        let macs =
            ["", "zz", "00:00:00:00:00:00", "ff:ff:ff:ff:ff:ff", "01:00:5e:00:00:01", "33:33:00:00:00:01"];
        all.extend(
            (210..)
                .zip(macs)
                .map(|(number, mac)| (format!("10.244.{number}.0-24"), value("172.31.0.200", mac))),
        );
    }
    all
}

#[test]
fn no_hostile_lease_costs_a_packet_between_good_nodes() {
    for backend in ["vxlan", "host-gw", "udp"] {
        // Nodes take the lowest subnets; the table begins behind them.
        let config = format!(
            r#"{{"Network":"10.244.0.0/16","SubnetMax":"10.244.20.0","Backend":{{"Type":"{backend}"}}}}"#
        );
        let cluster = Cluster::new(&config);
        let (mut a, b) = (cluster.join(), cluster.join());
        let (pod_a, pod_b) = (a.pod(), b.pod());
        a.wait("the first echo", || pod_a.namespace().reaches(pod_b.address()).unwrap());
        let routes = a.show("ip -4 route show");
        let pinger = Pinger::start(pod_a.namespace(), pod_b.address()).unwrap();
        pinger.wait_for_reply(crate::bed::LIMIT).unwrap();
        let table = hostile(backend);
        assert!(table.len() >= 100, "{}", table.len());
        for (key, value) in &table {
            cluster.put(&format!("/coreos.com/network/subnets/{key}"), value);
        }
        // One more that is known to be heard after all the others; what is heard at once is told in another order.
        cluster.put("/coreos.com/network/subnets/last", "{}");
        a.wait_for_log("key=\"last\"");
        for (key, _) in &table {
            a.wait_for_log(&format!("key=\"{key}\""));
        }
        assert_eq!(a.show("ip -4 route show"), routes, "{backend}");
        let pings = pinger.finish().unwrap();
        assert_eq!(pings.lost, 0, "{backend}: {pings:?}\n{}", a.agent.log());
        assert_eq!(a.agent.get("/readyz").unwrap().0, 200);
        // A start among all of them is like any other.
        a.agent.kill().unwrap();
        a.start_again();
        a.wait("an echo after a restart", || pod_a.namespace().reaches(pod_b.address()).unwrap());
        assert_eq!(a.show("ip -4 route show"), routes, "{backend}");
    }
}
