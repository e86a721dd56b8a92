//! What a delegate's configuration can ask of a bridge, in one process.

use std::fs::File;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use crate::killed::{eventually, log_of};
use crate::pods::V6;
use crate::support::{Namespace, Node, Pod, V4};

/// One pod on a bridge that no other plugin makes.
struct One {
    node: Node,
    namespace: Namespace,
}

impl One {
    fn new(subnet_env: &str) -> Self {
        Self { node: Node::with_namespace(subnet_env), namespace: Namespace::new() }
    }

    fn call(&self, verb: &str, network: &Value, more: &[(&str, &str)]) -> crate::support::Answer {
        let path = self.namespace.path();
        let pod = Pod { container: "c1", ifname: "eth0", netns: &path };
        let nowhere = [&[("CNI_PATH", "/nowhere")], more].concat();
        self.node.call_with(verb, pod, &network.to_string(), &nowhere)
    }

    fn add(&self, delegate: Value) -> Value {
        self.call("ADD", &self.node.network("n", "1.0.0", delegate), &[]).result()
    }

    fn port(&self) -> Value {
        let shown = self.node.host().ip(&["-json", "-details", "link", "show", "master", "cni0"]);
        serde_json::from_str::<Value>(&shown).unwrap()[0].clone()
    }
}

#[test]
fn a_port_has_the_modes_that_are_asked_for() {
    for (delegate, hairpin, isolated) in [
        (json!({}), false, false),
        (json!({"hairpinMode": true}), true, false),
        (json!({"portIsolation": true}), false, true),
        (json!({"hairpinMode": true, "portIsolation": true}), true, true),
    ] {
        let one = One::new(V4);
        one.add(delegate.clone());
        let slave = &one.port()["linkinfo"]["info_slave_data"];
        assert_eq!(
            (&slave["hairpin"], &slave["isolated"]),
            (&json!(hairpin), &json!(isolated)),
            "{delegate}"
        );
    }
}

#[test]
fn a_port_has_one_queue_and_no_address_that_nobody_could_reach() {
    let one = One::new(&format!("{V4}{V6}"));
    one.add(json!({}));
    let port = one.port();
    let end = one.namespace.ip(&["-json", "-details", "link", "show", "eth0"]);
    let end = serde_json::from_str::<Value>(&end).unwrap()[0].clone();
    for link in [&port, &end] {
        assert_eq!((&link["num_tx_queues"], &link["num_rx_queues"]), (&json!(1), &json!(1)), "{link}");
    }
    let name = port["ifname"].as_str().unwrap();
    assert_eq!(one.node.host().ip(&["-6", "address", "show", "dev", name]), "");
    // That of the pod's end is the pod's.
    let shown = one.namespace.ip(&["-6", "address", "show", "dev", "eth0", "scope", "link"]);
    assert!(shown.contains("inet6 fe80::") && !shown.contains("tentative"), "{shown}");
}

#[test]
fn reservations_of_other_pods_are_neither_opened_nor_listed() {
    let one = One::new(&format!("{V4}{V6}"));
    let network = one.node.network("n", "1.0.0", json!({}));
    let others: Vec<_> = (0..3).map(|_| Namespace::new()).collect();
    for (number, namespace) in others.iter().enumerate() {
        let pod = Pod { container: &format!("other-{number}"), ifname: "eth0", netns: &namespace.path() };
        one.node.call("ADD", pod, &network).result();
    }
    let path = one.namespace.path();
    let pod = Pod { container: "c1", ifname: "eth0", netns: &path };
    let stdin = one.node.path("stdin");
    std::fs::write(&stdin, network.to_string()).unwrap();
    let directory = format!("{}/", one.node.path("addresses/n").display());
    for verb in ["ADD", "DEL"] {
        let log = log_of(&one.node, verb, pod, stdin.to_str().unwrap(), "trace=?open,openat");
        let opened = log.lines().filter_map(|line| line.split_once(&directory)?.1.split('"').next());
        let addresses: Vec<_> = opened.filter(|name| name.parse::<std::net::IpAddr>().is_ok()).collect();
        let own: &[&str] = if verb == "ADD" { &[] } else { &["10.1.17.5", "fc00::5"] };
        assert_eq!(addresses, own, "{verb}: {log}");
        assert!(!log.contains("O_DIRECTORY"), "{verb}: {log}");
    }
    assert_eq!(one.node.reserved("n").len(), 6);
}

#[test]
fn an_attachment_that_was_not_taken_down_gets_no_further_address() {
    let one = One::new(V4);
    let other = Namespace::new();
    let network = one.node.network("n", "1.0.0", json!({}));
    one.call("ADD", &network, &[]).result();
    let pod = Pod { container: "c1", ifname: "eth0", netns: &other.path() };
    let (code, msg) = one.node.call("ADD", pod, &network).error();
    let expected = "failed to allocate for range 0: 10.1.17.2 has been allocated to c1, duplicate allocation is not allowed";
    assert_eq!((code, msg.as_str()), (999, expected));
    assert_eq!(
        (one.node.reserved("n"), other.links()),
        (vec!["10.1.17.2".to_owned()], vec!["lo".to_owned()])
    );
    // Of the same pod the link that it has says more.
    let answer = one.call("ADD", &network, &[]);
    assert_eq!(answer.error().1, "container veth name provided (eth0) already exists");
    assert_eq!(one.node.reserved("n"), ["10.1.17.2"]);
}

#[test]
fn a_bridge_has_the_name_the_mtu_and_the_promiscuity_that_are_asked_for() {
    let one = One::new(V4);
    let result = one.add(json!({"bridge": "other0", "mtu": 1300, "promiscMode": true}));
    assert_eq!(result["interfaces"][0]["name"], "other0");
    let shown = one.node.host().ip(&["-details", "link", "show", "other0"]);
    assert!(shown.contains("PROMISC") && shown.contains("mtu 1300"), "{shown}");
    assert!(one.namespace.ip(&["link", "show", "eth0"]).contains("mtu 1300"));
    let mut network = one.node.network("n", "1.0.0", json!({"bridge": "other0", "promiscMode": true}));
    network["prevResult"] = result;
    one.call("CHECK", &network, &[]).result();
}

#[test]
fn a_bridge_with_another_address_is_refused_or_given_the_right_one() {
    let one = One::new(V4);
    one.node.host().ip(&["link", "add", "cni0", "type", "bridge"]);
    one.node.host().ip(&["address", "add", "10.1.99.1/24", "dev", "cni0"]);
    let network = one.node.network("n", "1.0.0", json!({}));
    let (code, msg) = one.call("ADD", &network, &[]).error();
    let expected =
        r#"failed to set bridge addr: "cni0" already has an IP address different from 10.1.17.1/24"#;
    assert_eq!((code, &*msg), (999, expected));
    // Nothing of the attempt is left.
    assert_eq!(
        (one.namespace.links(), one.node.host().links()),
        (vec!["lo".into()], vec!["lo".into(), "cni0".into()])
    );
    assert!(one.node.reserved("n").is_empty());
    one.add(json!({"forceAddress": true}));
    let shown = one.node.host().ip(&["address", "show", "cni0"]);
    assert!(shown.contains("10.1.17.1/24") && !shown.contains("10.1.99.1"), "{shown}");
    assert!(one.namespace.reaches("10.1.17.1"));
}

#[test]
fn an_address_and_a_mac_can_be_asked_for_by_the_variable_and_by_the_runtime() {
    let one = One::new(V4);
    let network = one.node.network("n", "1.0.0", json!({}));
    let args = [("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAME=p;IP=10.1.17.77;MAC=02:00:00:00:00:77")];
    let result = one.call("ADD", &network, &args).result();
    assert_eq!(result["ips"][0]["address"], "10.1.17.77/24");
    assert_eq!(result["interfaces"][2]["mac"], "02:00:00:00:00:77");
    one.call("DEL", &network, &args).result();
    assert!(one.node.reserved("n").is_empty());

    let mut network = network;
    network["runtimeConfig"] = json!({"ips": ["10.1.17.88/24"], "mac": "02:00:00:00:00:88"});
    let result = one.call("ADD", &network, &[]).result();
    assert_eq!(result["ips"][0]["address"], "10.1.17.88/24");
    assert_eq!(result["interfaces"][2]["mac"], "02:00:00:00:00:88");
    one.call("DEL", &network, &[]).result();
    // Two addresses of IPv4 can't be on the bridge.
    network["delegate"]["isGateway"] = json!(false);
    network["runtimeConfig"] = json!({"ipRanges": [[{"subnet": "10.1.200.0/24"}]]});
    let result = one.call("ADD", &network, &[]).result();
    assert_eq!(result["ips"][0]["address"], "10.1.200.2/24");
    assert_eq!(result["ips"][1]["address"], "10.1.17.2/24");
}

#[test]
fn an_address_of_ipv6_is_usable_at_once() {
    let one = One::new(V6);
    one.add(json!({"isDefaultGateway": true}));
    let shown = one.namespace.ip(&["-6", "address", "show", "dev", "eth0", "scope", "global"]);
    assert!(shown.contains("fc00::2/64") && !shown.contains("tentative"), "{shown}");
    let shown = one.node.host().ip(&["-6", "address", "show", "dev", "cni0", "scope", "global"]);
    assert!(shown.contains("fc00::1/64") && !shown.contains("tentative"), "{shown}");
    let mut ping = one.namespace.command("ping");
    let told = ping.args(["-n", "-c1", "-W2", "fc00::1"]).output().unwrap();
    assert!(told.status.success(), "{told:?}");
}

#[test]
fn neighbours_learn_the_mac_of_a_pod_that_gets_the_address_of_another() {
    let one = One::new(&format!("{V4}{V6}"));
    let old = Namespace::new();
    let new = Namespace::new();
    let addresses = ["10.1.17.50", "fc00::50"];
    let mut network = one.node.network("n", "1.0.0", json!({}));
    one.call("ADD", &network, &[]).result();
    network["runtimeConfig"] = json!({"ips": addresses});
    let call = |verb: &str, container: &str, namespace: &Namespace| {
        let pod = Pod { container, ifname: "eth0", netns: &namespace.path() };
        one.node.call(verb, pod, &network).result()
    };
    let neighbour = |address: &str| one.namespace.ip(&["neighbour", "show", address, "dev", "eth0"]);
    let mac = |result: &Value| result["interfaces"][2]["mac"].as_str().unwrap().to_owned();
    let first = mac(&call("ADD", "old", &old));
    for address in addresses {
        assert!(one.namespace.reaches(address));
        assert!(neighbour(address).contains(&first), "{}", neighbour(address));
    }
    call("DEL", "old", &old);
    // Known and unused: nothing but an announcement changes such an entry.
    for address in addresses {
        one.namespace.ip(&["neighbour", "replace", address, "lladdr", &first, "dev", "eth0", "nud", "stale"]);
    }
    let second = mac(&call("ADD", "new", &new));
    assert_ne!(first, second);
    for address in addresses {
        // No packet was sent to it: the announcement alone does it.
        eventually("the neighbour learns the MAC", || neighbour(address).contains(&second));
    }
}

#[test]
fn pods_on_isolated_ports_reach_the_node_and_not_each_other() {
    let node = Node::with_namespace(V4);
    let namespaces = [Namespace::new(), Namespace::new()];
    let network = node.network("n", "1.0.0", json!({"portIsolation": true}));
    for (container, namespace) in ["c1", "c2"].into_iter().zip(&namespaces) {
        node.call("ADD", Pod { container, ifname: "eth0", netns: &namespace.path() }, &network).result();
    }
    assert!(namespaces[0].reaches("10.1.17.1"));
    let mut ping = namespaces[0].command("ping");
    assert!(!ping.args(["-n", "-c2", "-i0.2", "-W1", "10.1.17.3"]).output().unwrap().status.success());
}

#[test]
fn the_configuration_can_ask_for_gos_plugins() {
    let one = One::new(V4);
    for forced in
        [json!({"inProcess": false}), json!({"delegate": {"vlan": 7}}), json!({"delegate": {"newer": 1}})]
    {
        let mut network = one.node.network("n", "1.0.0", json!({}));
        network.as_object_mut().unwrap().extend(forced.as_object().unwrap().clone());
        let (_, msg) = one.call("ADD", &network, &[]).error();
        assert!(msg.contains(r#"failed to find plugin "bridge" in path [/nowhere]"#), "{msg}");
    }
}

#[test]
fn a_version_that_debians_plugins_do_not_speak_works_in_one_process() {
    let one = One::new(V4);
    let mut network = one.node.network("n", "1.1.0", json!({"isDefaultGateway": true}));
    network["ipam"]["routes"] = json!([{"dst": "10.9.0.0/16", "mtu": 1400, "priority": 7}]);
    assert_eq!(one.call("STATUS", &network, &[]).result(), Value::Null);
    let result = one.call("ADD", &network, &[]).result();
    assert_eq!(result["cniVersion"], "1.1.0");
    assert_eq!(result["routes"][0], json!({"dst": "10.9.0.0/16", "mtu": 1400, "priority": 7}));
    let shown = one.namespace.ip(&["route", "show", "10.9.0.0/16"]);
    assert!(shown.contains("via 10.1.17.1") && shown.contains("metric 7 mtu 1400"), "{shown}");
    network["prevResult"] = result;
    one.call("CHECK", &network, &[]).result();
    network["cni.dev/valid-attachments"] = json!([]);
    one.call("GC", &network, &[]).result();
    assert_eq!((one.node.kept(), one.node.reserved("n")), (vec![], vec![]));
}

/// More than whose answers fit into a socket.
#[test]
fn a_pod_has_as_many_routes_as_it_is_told() {
    let one = One::new(V4);
    let mut network = one.node.network("n", "1.0.0", json!({"isDefaultGateway": true}));
    let routes: Vec<Value> =
        (0..3000).map(|n| json!({"dst": format!("10.{}.{}.0/24", 64 + n / 256, n % 256)})).collect();
    network["ipam"]["routes"] = json!(routes);
    one.call("ADD", &network, &[]).result();
    // Besides these the default route and that to the cluster's network.
    assert_eq!(one.namespace.ip(&["route", "show", "via", "10.1.17.1"]).lines().count(), 3000 + 2);
    one.call("DEL", &network, &[]).result();
}

#[test]
fn status_names_a_link_in_the_place_of_the_bridge() {
    let one = One::new(V4);
    one.node.host().ip(&["link", "add", "cni0", "type", "veth", "peer", "name", "other"]);
    let network = one.node.network("n", "1.1.0", json!({}));
    let (code, msg) = one.call("STATUS", &network, &[]).error();
    assert!(code == 50 && msg.starts_with(r#""cni0" already exists but is not a bridge"#), "{code} {msg}");
}

#[test]
fn a_full_pool_gives_addresses_of_pods_that_are_gone_to_new_ones() {
    // Five addresses for pods.
    let node = Node::with_namespace(&V4.replace("/24", "/29"));
    let network = node.network("n", "1.0.0", json!({}));
    let namespaces: Vec<_> = (0..6).map(|_| Namespace::new()).collect();
    let add = |number: usize| {
        let (container, path) = (format!("c{number}"), namespaces[number].path());
        node.call("ADD", Pod { container: &container, ifname: "eth0", netns: &path }, &network)
    };
    for number in 0..5 {
        add(number).result();
    }
    let (code, msg) = add(5).error();
    let go = "failed to allocate for range 0: no IP addresses available in range set: 10.1.17.1-10.1.17.6";
    assert_eq!((code, &*msg), (999, go));
    // As after a power cut: two reservations of the last boot, of which one lost its content.
    let reservation = |address: &str| node.path("addresses/n").join(address);
    std::fs::write(reservation("10.1.17.4"), "").unwrap();
    let file = File::options().write(true).open(reservation("10.1.17.5")).unwrap();
    file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1)).unwrap();
    let answer = add(5);
    assert_eq!(answer.result()["ips"][0]["address"], "10.1.17.4/29");
    assert!(
        answer
            .stderr
            .contains("10.1.17.5: no address is free, and this one is reserved for eth0 of container c3"),
        "{answer:?}"
    );
    assert_eq!(node.reserved("n"), ["10.1.17.2", "10.1.17.3", "10.1.17.4", "10.1.17.6"]);
}
