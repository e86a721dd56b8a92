//! `bandwidth` of this program, beside Debian's.

use std::process::Command;

use serde_json::{Value, json};

use crate::chain::{assert_within, client, rate_by, shipped};
use crate::runtime::List;
use crate::support::{Namespace, Node, PLUGINS, Pod, V4};

/// `tc` on the links of the host, without the names.
fn queues(node: &Node) -> String {
    let mut shown = String::new();
    for link in node.host().links() {
        for about in [&["qdisc"][..], &["filter", "show", "ingress"]] {
            let mut arguments = vec![about[0]];
            arguments.extend(if about.len() == 1 { &["show"][..] } else { &["show"] });
            arguments.extend(["dev", &link]);
            arguments.extend(if about.len() == 1 { &[][..] } else { &["ingress"] });
            let output =
                Command::new("tc").args(["-n", node.host().name()]).args(&arguments).output().unwrap();
            let kind = link.trim_end_matches(|c: char| c.is_ascii_hexdigit());
            let text = String::from_utf8(output.stdout).unwrap();
            // Go's library adds a second redirection behind the first, which takes everything.
            let telling = |line: &&str| {
                ["tbf", "ingress", "mirred"].iter().any(|word| line.contains(word))
                    && !line.contains("action order 2")
            };
            for line in text.lines().filter(telling) {
                let line = line.replace(&link, kind);
                let words =
                    line.split_whitespace().map(|word| if word.starts_with("bwp") { "ifb" } else { word });
                shown += &format!("{kind}: {}\n", words.collect::<Vec<_>>().join(" "));
            }
        }
    }
    shown
}

fn limits(megabits: u64) -> Value {
    json!({"bandwidth": {
        "ingressRate": megabits * 1_000_000, "ingressBurst": 400_000,
        "egressRate": megabits * 1_000_000, "egressBurst": 400_000,
    }})
}

/// The list without ports.
fn list<'a>(node: &'a Node, directory: &str) -> List<'a> {
    let mut conflist = shipped(node);
    conflist["cniVersion"] = "1.0.0".into();
    conflist["plugins"].as_array_mut().unwrap().remove(1);
    List::new(node, conflist).with_plugins(directory)
}

#[test]
fn queues_and_results_are_those_of_the_original_and_each_takes_down_the_others() {
    let shown = [true, false].map(|ours_adds| {
        let node = Node::with_namespace(V4);
        let (ours, gos) = (list(&node, &node.own_plugins()), list(&node, PLUGINS));
        let [adding, deleting] = if ours_adds { [&ours, &gos] } else { [&gos, &ours] };
        let namespace = Namespace::new();
        let path = namespace.path();
        let pod = Pod { container: "c1", ifname: "eth0", netns: &path };
        let attached = adding.add(pod, limits(10));
        let queues = queues(&node);
        assert!(queues.contains("tbf") && queues.contains("mirred"), "{queues}");
        for list in [&ours, &gos] {
            assert_eq!(list.check(&attached), Ok(()), "ours adds: {ours_adds}");
        }
        let ifb = attached.result["interfaces"][3]["name"].clone();
        deleting.del(&attached);
        assert_eq!(node.host().links(), ["lo", "cni0"]);
        (queues, ifb)
    });
    assert_eq!(shown[0], shown[1]);
}

/// Another rate, burst and queue for a link's `tbf`.
fn change(node: &Node, link: &str, [rate, burst, queue]: [&str; 3]) {
    let words = ["qdisc", "change", "dev", link, "root", "handle", "1:", "tbf", "rate", rate, "burst", burst];
    let status =
        Command::new("tc").args(["-n", node.host().name()]).args(words).args(["limit", queue]).status();
    assert!(status.unwrap().success(), "{words:?}");
}

/// What kubelet hands over for an annotation: the rate, and as burst what fits into 31 bits.
fn of_kubelet(rate: u64) -> Value {
    json!({"bandwidth": {
        "ingressRate": rate, "ingressBurst": i32::MAX, "egressRate": rate, "egressBurst": i32::MAX,
    }})
}

#[test]
fn what_add_sets_for_a_limit_of_kubelet_is_what_check_finds_and_a_change_is_noticed() {
    let node = Node::with_namespace(V4);
    let (ours, gos) = (list(&node, &node.own_plugins()), list(&node, PLUGINS));
    for rate in [1000, 500_000, 1_000_000, 5_000_000, 7_000_000, 8_000_000, 1_000_000_000] {
        for adding in [&ours, &gos] {
            let namespace = Namespace::new();
            let path = namespace.path();
            let pod = Pod { container: "c1", ifname: "eth0", netns: &path };
            let attached = adding.add(pod, of_kubelet(rate));
            assert_eq!(ours.check(&attached), Ok(()), "{rate}: {}", queues(&node));
            let links = attached.result["interfaces"].as_array().unwrap();
            let (port, ifb) = (links[1]["name"].as_str().unwrap(), links[3]["name"].as_str().unwrap());
            let bytes = u64::from(i32::MAX.unsigned_abs()) / 8;
            let queue = (bytes + rate / 8 / 40).to_string();
            // Each is noticed before the one that was made before it.
            for (link, rate, burst, queue, expected) in [
                (ifb, rate, bytes, "1000000", "Limit doesn't match"),
                (port, rate, bytes / 2, queue.as_str(), "Buffer doesn't match"),
                (port, rate * 2, bytes, queue.as_str(), "Rate doesn't match"),
            ] {
                change(&node, link, [&format!("{rate}bit"), &burst.to_string(), queue]);
                let (_, message) = ours.check(&attached).unwrap_err();
                assert!(message.contains(expected) && message.contains(link), "{rate}: {message}");
            }
            ours.del(&attached);
        }
    }
}

#[test]
fn traffic_is_as_fast_as_the_limit_says() {
    let node = Node::with_namespace(V4);
    let client = client(&node);
    client.ip(&["route", "add", "10.1.17.0/24", "via", "192.0.2.1"]);
    let list = list(&node, &node.own_plugins());
    let namespace = Namespace::new();
    let path = namespace.path();
    let pod = Pod { container: "c1", ifname: "eth0", netns: &path };
    // More than the limit, so that the queue is what counts; 1400 of the 1442 bytes of each frame are iperf3's.
    for (limit, bitrate, range) in [(20, "30M", 19.0..=21.0), (1, "2M", 0.95..=1.05)] {
        let attached = list.add(pod, limits(limit));
        let address = attached.result["ips"][0]["address"].as_str().unwrap().trim_end_matches("/24");
        for direction in [&[][..], &["--reverse"]] {
            let options = [&["--udp", "--bitrate", bitrate, "--length", "1400"], direction].concat();
            println!("{limit} {direction:?}");
            assert_within(range.clone(), || {
                let arrived = rate_by(&namespace, &client, address, 5201, &options)?;
                Ok(arrived * 1442.0 / 1400.0)
            });
        }
        list.del(&attached);
    }
}

#[test]
fn the_limits_of_a_pod_that_runs_are_replaced() {
    let node = Node::with_namespace(V4);
    let list = list(&node, &node.own_plugins());
    let namespace = Namespace::new();
    let path = namespace.path();
    let pod = Pod { container: "c1", ifname: "eth0", netns: &path };
    let mut config = json!({"name": "cbr0", "cniVersion": "1.0.0", "type": "bandwidth", "runtimeConfig": limits(10),
        "prevResult": list.add(pod, json!({})).result});
    let program = format!("{}/bandwidth", node.own_plugins());
    let call = |verb: &str, config: &Value| node.call_plugin(&program, verb, pod, &config.to_string(), &[]);
    call("ADD", &config).result();
    assert_eq!(queues(&node).matches("rate 10Mbit").count(), 2, "{}", queues(&node));
    config["runtimeConfig"] = limits(30);
    assert!(call("CHECK", &config).error().1.contains("Rate doesn't match"));
    call("ADD", &config).result();
    call("CHECK", &config).result();
    let shown = queues(&node);
    assert_eq!((shown.matches("rate 30Mbit").count(), shown.matches("mirred").count()), (2, 1), "{shown}");
    for number in 1..=9 {
        crate::killed::at(&node, &program, "ADD", pod, &config, "sendto", number);
        call("DEL", &config).result();
        assert!(!node.host().links().iter().any(|link| link.starts_with("bwp")), "{number}");
    }
    for (limit, expected) in [
        (json!({"ingressRate": 0, "ingressBurst": 8}), "if burst is set, rate must also be set"),
        (json!({"ingressRate": 1, "ingressBurst": 8}), "ingressRate 1 is less than a byte a second"),
        (json!({"ingressRate": 8000, "ingressBurst": 1u64 << 40}), "burst cannot be more than 4GB"),
    ] {
        config["runtimeConfig"] = json!({"bandwidth": limit});
        let (code, msg) = call("ADD", &config).error();
        assert!(code == 999 && msg.contains(expected), "{msg}");
    }
    config["runtimeConfig"] = json!({"bandwidth": {"ingressRate": 1u64 << 40, "ingressBurst": 8_000_000}});
    call("ADD", &config).result();
    call("CHECK", &config).result();
}

#[test]
fn gc_removes_the_ifbs_of_pods_that_are_gone_and_no_others() {
    let node = Node::with_namespace(V4);
    let list = list(&node, &node.own_plugins());
    let namespaces = [Namespace::new(), Namespace::new(), Namespace::new()];
    let paths = namespaces.each_ref().map(Namespace::path);
    let pod =
        |number: usize| Pod { container: ["c1", "c2", "c3"][number], ifname: "eth0", netns: &paths[number] };
    let ifb = |result: &Value| result["interfaces"][3]["name"].as_str().unwrap().to_owned();
    let first = ifb(&list.add(pod(0), limits(10)).result);
    let second = ifb(&list.add(pod(1), limits(10)).result);
    // Another network, whose name begins with that of the first, and an ifb of Go's plugin.
    let program = format!("{}/bandwidth", node.own_plugins());
    let other = json!({"name": "cbr0.other", "cniVersion": "1.0.0", "type": "bandwidth", "runtimeConfig": limits(10),
        "prevResult": list.add(pod(2), json!({})).result});
    let third = ifb(&node.call_plugin(&program, "ADD", pod(2), &other.to_string(), &[]).result());
    node.host().ip(&["link", "add", "bwp123456789abc", "type", "ifb"]);
    let gc = |valid: Value| {
        let config = json!({"name": "cbr0", "cniVersion": "1.1.0", "type": "bandwidth", "cni.dev/valid-attachments": valid});
        let nobody = Pod { container: "", ifname: "", netns: "" };
        node.call_plugin(&program, "GC", nobody, &config.to_string(), &[]).result();
        let mut links = node.host().links();
        links.retain(|link| link.starts_with("bwp"));
        links.into_iter().collect::<std::collections::BTreeSet<_>>()
    };
    let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    let (kept, gos) = (json!([{"containerID": "c2", "ifname": "eth0"}]), "bwp123456789abc");
    assert_eq!(
        gc(json!([{"containerID": "c1", "ifname": "eth0"}, kept[0]])),
        set(&[&first, &second, &third, gos])
    );
    assert_eq!(gc(kept), set(&[&second, &third, gos]));
    assert_eq!(gc(json!([])), set(&[&third, gos]));
}

/// Whether the bridge answers an echo request that leaves by this interface.
fn reaches(namespace: &Namespace, ifname: &str) -> bool {
    let mut ping = namespace.command("ping");
    ping.args(["-n", "-q", "-c1", "-w10", "-i0.2", "-I", ifname, "10.1.17.1"]);
    ping.output().expect("install the package iputils-ping").status.success()
}

/// Takes the queues of a port away.
fn clear(node: &Node, port: &str) {
    for place in ["root", "ingress"] {
        let words = ["-n", node.host().name(), "qdisc", "del", "dev", port, place];
        let _ = Command::new("tc").args(words).output().unwrap();
    }
}

#[test]
fn an_interface_never_takes_the_ifb_of_another_one_of_its_pod() {
    let node = Node::with_namespace(V4);
    let list = list(&node, &node.own_plugins());
    let namespace = Namespace::new();
    let path = namespace.path();
    let [eth0, net1] = ["eth0", "net1"].map(|ifname| Pod { container: "c1", ifname, netns: &path });
    let results = [eth0, net1].map(|pod| list.add(pod, json!({})).result);
    let config = |result: usize, limits: Value| {
        json!({"name": "cbr0", "cniVersion": "1.0.0", "type": "bandwidth", "runtimeConfig": limits,
            "prevResult": results[result]})
    };
    let ours = format!("{}/bandwidth", node.own_plugins());
    let call = |program: &str, verb: &str, pod: Pod<'_>, config: &Value| {
        node.call_plugin(program, verb, pod, &config.to_string(), &[])
    };
    let ifbs = || node.host().links().into_iter().filter(|link| link.starts_with("bwp")).collect::<Vec<_>>();
    for first in [&ours, &format!("{PLUGINS}/bandwidth")] {
        call(first, "ADD", eth0, &config(0, limits(10))).result();
        let (before, ifb) = (queues(&node), ifbs());
        let (code, msg) = call(&ours, "ADD", net1, &config(1, limits(20))).error();
        for part in [
            ifb[0].as_str(),
            "\"c1\"",
            "\"eth0\"",
            "\"net1\"",
            "leave egressRate and egressBurst out",
            "\"cbr0\"",
        ] {
            assert!(code == 999 && msg.contains(part), "{msg}");
        }
        assert_eq!((queues(&node), ifbs()), (before.clone(), ifb.clone()));
        // What comes to it can be limited.
        let mut one_way = limits(20);
        one_way["bandwidth"].as_object_mut().unwrap().retain(|name, _| name.starts_with("ingress"));
        call(&ours, "ADD", net1, &config(1, one_way)).result();
        assert_eq!(queues(&node).matches("rate 20Mbit").count(), 1);
        call(&ours, "CHECK", eth0, &config(0, limits(10))).result();
        call(&ours, "DEL", net1, &config(1, limits(20))).result();
        assert!(reaches(&namespace, "eth0") && ifbs() == ifb);
        // The same interface gets other limits, and after its DEL the other one can be limited.
        call(&ours, "ADD", eth0, &config(0, limits(30))).result();
        assert_eq!(queues(&node).matches("rate 30Mbit").count(), 2);
        call(&ours, "DEL", eth0, &config(0, limits(30))).result();
        assert_eq!(ifbs(), [""; 0]);
        call(&ours, "ADD", net1, &config(1, limits(20))).result();
        assert!(reaches(&namespace, "net1"));
        call(&ours, "DEL", net1, &config(1, limits(20))).result();
        assert_eq!(ifbs(), [""; 0]);
        for port in results.each_ref().map(|result| result["interfaces"][1]["name"].as_str().unwrap()) {
            clear(&node, port);
        }
    }
}
