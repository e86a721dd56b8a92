//! Ours and Go's plugins on one node: each takes over what the other made. Ours is `flannel` in one process; Go's is
//! `flannel` that runs Debian's `bridge` and `host-local`.

use std::collections::BTreeSet;
use std::process::{Command, Stdio};
use std::thread;

use serde_json::{Value, json};

use crate::pods::V6;
use crate::support::{Answer, Namespace, Node, Pod, V4};

/// Whose plugins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    Us,
    Go,
}

const BOTH: [By; 2] = [By::Us, By::Go];

fn call(by: By, node: &Node, verb: &str, pod: Pod<'_>, network: &Value) -> Answer {
    let exec = if by == By::Go { "1" } else { "0" };
    // In process nothing else is looked for.
    let path = if by == By::Go { crate::support::PLUGINS } else { "/nowhere" };
    node.call_with(verb, pod, &network.to_string(), &[("FLANNEL_CNI_EXEC", exec), ("CNI_PATH", path)])
}

fn families() -> [(&'static str, String); 3] {
    [("v4", V4.into()), ("v6", V6.into()), ("dual", format!("{V4}{V6}"))]
}

/// The shipped delegate.
fn shipped(node: &Node, version: &str) -> Value {
    node.network("cbr0", version, json!({"hairpinMode": true, "isDefaultGateway": true}))
}

/// A result without what is random in it.
fn masked(mut result: Value) -> Value {
    for (index, interface) in result["interfaces"].as_array_mut().into_iter().flatten().enumerate() {
        assert!(interface["mac"].as_str().unwrap().len() == 17, "{interface}");
        interface["mac"] = "mac".into();
        if index == 1 {
            let name = interface["name"].as_str().unwrap();
            assert!(name.starts_with("veth") && name.len() == 12, "{name}");
            interface["name"] = "veth".into();
        }
        if interface["sandbox"].is_string() {
            interface["sandbox"] = "netns".into();
        }
    }
    result
}

fn json_of(namespace: &Namespace, arguments: &[&str]) -> Vec<Value> {
    let shown = namespace.ip(&[&["-json", "-details"], arguments].concat());
    serde_json::from_str::<Value>(&shown).unwrap().as_array().unwrap().clone()
}

fn picked(value: &Value, keys: &[&str]) -> Value {
    keys.iter().map(|key| ((*key).to_owned(), value[*key].clone())).collect::<serde_json::Map<_, _>>().into()
}

/// Addresses of a link but those that the kernel makes of its MAC.
fn addresses(link: &Value) -> Vec<Value> {
    let all = link["addr_info"].as_array().unwrap().iter().filter(|one| one["scope"] != "link");
    all.map(|one| picked(one, &["family", "local", "prefixlen", "broadcast", "scope"])).collect()
}

/// What the kernel has of a pod and of the bridge, without what is random in it.
fn kernel(node: &Node, pod: &Namespace) -> Value {
    let eth0 = &json_of(pod, &["address", "show", "dev", "eth0"])[0];
    let routes = |family: &str| {
        let keys = ["dst", "gateway", "dev", "protocol", "scope", "prefsrc", "metric", "type"];
        json_of(pod, &[family, "route"]).iter().map(|route| picked(route, &keys)).collect::<Vec<_>>()
    };
    let bridge = &json_of(node.host(), &["address", "show", "dev", "cni0"])[0];
    let ports = json_of(node.host(), &["link", "show", "master", "cni0"]);
    let port = |port: &Value| {
        let slave = &port["linkinfo"]["info_slave_data"];
        json!([
            picked(port, &["mtu", "operstate", "flags", "promiscuity"]),
            picked(slave, &["state", "hairpin", "isolated", "guard", "learning", "flood"])
        ])
    };
    json!({
        "eth0": picked(eth0, &["mtu", "operstate", "flags"]), "eth0 addresses": addresses(eth0),
        "IPv4 routes": routes("-4"), "IPv6 routes": routes("-6"),
        "bridge": picked(bridge, &["mtu", "flags", "promiscuity"]), "bridge addresses": addresses(bridge),
        "ports": ports.iter().map(port).collect::<Vec<_>>(),
    })
}

#[test]
fn results_files_and_kernel_are_those_of_gos_plugins() {
    for (family, subnet_env) in families() {
        for version in ["0.2.0", "0.3.1", "0.4.0", "1.0.0"] {
            let [ours, gos] = BOTH.map(|by| {
                let node = Node::with_namespace(&subnet_env);
                let namespace = Namespace::new();
                let path = namespace.path();
                let pod = Pod { container: "c1", ifname: "eth0", netns: &path };
                let network = shipped(&node, version);
                let result = masked(call(by, &node, "ADD", pod, &network).result());
                let (files, kernel) = (node.reservations("cbr0"), kernel(&node, &namespace));
                let second = Namespace::new();
                let other = Pod { container: "c2", ifname: "eth0", netns: &second.path() };
                call(by, &node, "ADD", other, &network).result();
                call(by, &node, "DEL", pod, &network).result();
                (result, files, kernel, node.reservations("cbr0"), node.kept())
            });
            assert_eq!(ours, gos, "{family} {version}");
        }
    }
}

#[test]
fn each_checks_and_takes_down_what_the_other_made() {
    for (family, subnet_env) in families() {
        for (add, check, del) in BOTH
            .into_iter()
            .flat_map(|add| BOTH.into_iter().flat_map(move |check| BOTH.map(|del| (add, check, del))))
        {
            let what = format!("{family}: ADD by {add:?}, CHECK by {check:?}, DEL by {del:?}");
            let node = Node::with_namespace(&subnet_env);
            let namespace = Namespace::new();
            let path = namespace.path();
            let pod = Pod { container: "c1", ifname: "eth0", netns: &path };
            let mut network = shipped(&node, "1.0.0");
            let result = call(add, &node, "ADD", pod, &network).result();
            network["prevResult"] = result;
            let checked = call(check, &node, "CHECK", pod, &network);
            assert!(checked.success, "{what}: {checked:?}");
            namespace.ip(&["address", "flush", "dev", "eth0", "scope", "global"]);
            let (code, msg) = call(check, &node, "CHECK", pod, &network).error();
            assert!(code == 999 && msg.starts_with("Failed to match addr "), "{what}: {msg}");
            for _ in 0..2 {
                call(del, &node, "DEL", pod, &network).result();
                assert_eq!((node.kept(), node.reserved("cbr0")), (vec![], vec![]), "{what}");
                assert_eq!(namespace.links(), ["lo"], "{what}");
                assert_eq!(node.host().links(), ["lo", "cni0"], "{what}");
            }
        }
    }
}

#[test]
fn check_sees_each_damage_that_gos_plugin_sees() {
    for (damage, expected) in [
        (
            &["link", "set", "eth0", "address", "02:00:00:00:00:09"][..],
            "doesn't match container Mac: 02:00:00:00:00:09",
        ),
        (&["route", "del", "10.1.0.0/16"], "Expected Route "),
        (&["link", "del", "eth0"], "Interface name eth0 not found"),
    ] {
        for by in BOTH {
            let node = Node::with_namespace(V4);
            let namespace = Namespace::new();
            let path = namespace.path();
            let pod = Pod { container: "c1", ifname: "eth0", netns: &path };
            let mut network = shipped(&node, "1.0.0");
            network["prevResult"] = call(by, &node, "ADD", pod, &network).result();
            namespace.ip(damage);
            let (_, msg) = call(by, &node, "CHECK", pod, &network).error();
            assert!(msg.contains(expected), "{by:?} {damage:?}: {msg}");
        }
    }
}

#[test]
fn sixteen_adds_at_once_by_both_give_sixteen_addresses() {
    let node = Node::with_namespace(&format!("{V4}{V6}"));
    let network = shipped(&node, "1.0.0");
    let namespaces: Vec<_> = (0..16).map(|_| Namespace::new()).collect();
    let all = |verb: &'static str, first: By| -> Vec<Value> {
        let one = |number: usize, namespace: &Namespace| {
            let by = if number.is_multiple_of(2) == (first == By::Us) { By::Us } else { By::Go };
            let (container, path) = (format!("c{number}"), namespace.path());
            let pod = Pod { container: &container, ifname: "eth0", netns: &path };
            call(by, &node, verb, pod, &network).result()
        };
        let one = &one;
        thread::scope(|scope| {
            let numbered = namespaces.iter().enumerate();
            let threads: Vec<_> =
                numbered.map(|(number, namespace)| scope.spawn(move || one(number, namespace))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    };
    let results = all("ADD", By::Us);
    let addresses: BTreeSet<_> = results
        .iter()
        .flat_map(|result| result["ips"].as_array().unwrap())
        .map(|ip| ip["address"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!((addresses.len(), node.reserved("cbr0").len()), (32, 32));
    // What one made, the other takes down.
    all("DEL", By::Go);
    assert_eq!((node.kept(), node.reserved("cbr0")), (vec![], vec![]));
    assert_eq!(node.host().links(), ["lo", "cni0"]);
}

#[test]
fn a_swap_of_plugins_costs_pods_that_run_no_ping() {
    let node = Node::with_namespace(V4);
    let network = shipped(&node, "1.0.0");
    let namespaces = [Namespace::new(), Namespace::new(), Namespace::new()];
    let paths = namespaces.each_ref().map(Namespace::path);
    let pod =
        |number: usize| Pod { container: ["c0", "c1", "c2"][number], ifname: "eth0", netns: &paths[number] };
    for (number, by) in [(0, By::Go), (1, By::Go)] {
        call(by, &node, "ADD", pod(number), &network).result();
    }
    assert!(namespaces[0].reaches("10.1.17.3"));
    let mut ping = namespaces[0].command("ping");
    let ping = ping.args(["-n", "-i0.02", "-c150", "10.1.17.3"]).stdout(Stdio::piped()).spawn().unwrap();
    // Ours comes, takes over, and goes again, while others come and go.
    for by in [By::Us, By::Go, By::Us] {
        call(by, &node, "ADD", pod(2), &network).result();
        let last = if by == By::Us { By::Go } else { By::Us };
        call(last, &node, "DEL", pod(2), &network).result();
    }
    let output = ping.wait_with_output().unwrap();
    let told = String::from_utf8(output.stdout).unwrap();
    assert!(told.contains("150 packets transmitted, 150 received"), "{told}");
    for number in [0, 1] {
        call(By::Us, &node, "DEL", pod(number), &network).result();
    }
}

#[test]
fn the_lock_is_the_originals() {
    let node = Node::with_namespace(V4);
    let network = shipped(&node, "1.0.0");
    let namespace = Namespace::new();
    let path = namespace.path();
    let pod = Pod { container: "c1", ifname: "eth0", netns: &path };
    call(By::Go, &node, "ADD", pod, &network).result();
    call(By::Go, &node, "DEL", pod, &network).result();
    let lock = node.path("addresses/cbr0/lock");
    let mut held = Command::new("flock")
        .arg(&lock)
        .args(["sh", "-c", "echo held; read line"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut ready = [0; 5];
    std::io::Read::read_exact(held.stdout.as_mut().unwrap(), &mut ready).unwrap();
    thread::scope(|scope| {
        let adding = scope.spawn(|| call(By::Us, &node, "ADD", pod, &network).result());
        // It gets as far as the bridge, and no further.
        crate::killed::eventually("the configuration is kept", || !node.kept().is_empty());
        thread::sleep(std::time::Duration::from_millis(100));
        assert_eq!(namespace.links(), ["lo"]);
        assert!(!adding.is_finished());
        assert!(node.reserved("cbr0").is_empty());
        drop(held.stdin.take());
        adding.join().unwrap();
    });
    held.wait().unwrap();
    assert_eq!(node.reserved("cbr0"), ["10.1.17.3"]);
}
