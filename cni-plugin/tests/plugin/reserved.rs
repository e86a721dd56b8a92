//! Which addresses the built-in `host-local` gives back, and which it keeps.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use serde_json::{Value, json};

use crate::pods::V6;
use crate::support::{Answer, NO_NETNS, Namespace, Node, PLUGINS, Pod, V4, flannel};

/// A node with one pod, and what calls of it need.
struct Case {
    node: Node,
    pod: Namespace,
    network: Value,
}

impl Case {
    fn new(subnet_env: &str) -> Self {
        let node = Node::with_namespace(subnet_env);
        let network = node.network("n", "1.1.0", json!({"isDefaultGateway": true}));
        Self { node, pod: Namespace::new(), network }
    }

    fn call(&self, verb: &str, network: &Value) -> Answer {
        self.call_program(flannel(), verb, network)
    }

    fn call_program(&self, program: &str, verb: &str, network: &Value) -> Answer {
        let path = self.pod.path();
        let pod = Pod { container: "c1", ifname: "eth0", netns: &path };
        // In process nothing else is looked for.
        self.node.call_plugin(program, verb, pod, &network.to_string(), &[("CNI_PATH", "/nowhere")])
    }

    /// The network with an address that the runtime asks for.
    fn asking_for(&self, address: &str) -> Value {
        let mut network = self.network.clone();
        network["runtimeConfig"] = json!({"ips": [address]});
        network
    }

    fn bridge(&self) -> String {
        self.node.host().ip(&["-4", "-oneline", "address", "show", "dev", "cni0"])
    }
}

#[test]
fn an_add_of_a_pod_that_runs_fails_and_leaves_it_its_address() {
    for lost in [false, true] {
        let case = Case::new(V4);
        case.call("ADD", &case.asking_for("10.1.17.7")).result();
        let bridge = case.bridge();
        if lost {
            fs::remove_file(case.node.path("flannel/c1")).unwrap();
        }
        let taken = "container veth name provided (eth0) already exists";
        for network in [case.asking_for("10.1.17.8"), case.asking_for("10.1.17.7"), case.network.clone()] {
            assert_eq!(case.call("ADD", &network).error(), (999, taken.into()), "{lost}");
            assert_eq!(case.node.reserved("n"), ["10.1.17.7"], "{lost}");
        }
        // The node has another subnet meanwhile, whose gateway may take the place of the old one.
        fs::write(case.node.path("subnet.env"), V4.replace("10.1.17.1", "10.1.18.1")).unwrap();
        let mut forced = case.network.clone();
        forced["delegate"]["forceAddress"] = json!(true);
        assert_eq!(case.call("ADD", &forced).error(), (999, taken.into()), "{lost}");
        assert_eq!(case.node.reserved("n"), ["10.1.17.7"], "{lost}");
        assert_eq!(case.bridge(), bridge, "{lost}");
        assert!(case.pod.ip(&["address", "show", "dev", "eth0"]).contains("10.1.17.7/24"), "{lost}");
        case.call("DEL", &case.network).result();
        assert!(case.node.reserved("n").is_empty(), "{lost}");
    }
}

#[test]
fn del_gives_back_the_addresses_of_all_families_also_if_the_node_has_one_of_them_left() {
    for (kept, subnet_env) in [(None, V4), (Some(""), V4), (None, V6), (Some("{"), V6), (None, "")] {
        let case = Case::new(&format!("{V4}{V6}"));
        case.call("ADD", &case.network).result();
        assert_eq!(case.node.reserved("n").len(), 2);
        let file = case.node.path("flannel/c1");
        match kept {
            Some(damaged) => fs::write(file, damaged).unwrap(),
            None => fs::remove_file(file).unwrap(),
        }
        fs::write(case.node.path("subnet.env"), subnet_env).unwrap();
        case.call("DEL", &case.network).result();
        assert!(case.node.reserved("n").is_empty(), "{kept:?} {subnet_env:?}");
    }
}

/// An ADD of an attachment for which addresses are reserved, but nothing is kept, gets no further one, and its DEL gives back all.
fn gets_no_further_address(case: &Case, program: &str) {
    for (address, content) in
        [("10.1.17.9", "c1\r\neth0"), ("10.9.9.9", "c1\r\neth0"), ("10.1.17.10", "c1\r\nnet1")]
    {
        fs::write(case.node.path("addresses/n").join(address), content).unwrap();
    }
    let (code, msg) = case.call_program(program, "ADD", &case.network).error();
    let expected = "failed to allocate for range 0: 10.1.17.9 has been allocated to c1, duplicate allocation is not allowed";
    assert_eq!((code, &*msg), (999, expected));
    assert_eq!(case.node.reserved("n").len(), 3);
    case.call("DEL", &case.network).result();
    assert_eq!(case.node.reserved("n"), ["10.1.17.10"]);
}

#[test]
fn an_attachment_whose_kept_configuration_was_lost_with_its_directory_gets_no_further_address() {
    let case = Case::new(V4);
    fs::create_dir_all(case.node.path("addresses/n")).unwrap();
    gets_no_further_address(&case, flannel());
}

#[test]
fn an_attachment_that_the_runtime_knows_gets_no_further_address() {
    let case = Case::new(V4);
    for directory in ["addresses/n", "flannel"] {
        fs::create_dir_all(case.node.path(directory)).unwrap();
    }
    let record = "mount -t tmpfs none /var/lib\nmkdir -p /var/lib/cni/results\necho '{}' >/var/lib/cni/results/n-c1-eth0";
    let recorded = with_mounted(&case.node, "addresses", record);
    gets_no_further_address(&case, &recorded);
}

#[test]
fn del_gives_back_all_addresses_of_a_pod_that_got_another_one_because_it_was_asked_for() {
    let case = Case::new(V4);
    fs::create_dir_all(case.node.path("addresses/n")).unwrap();
    fs::write(case.node.path("addresses/n/10.1.17.9"), "c1\r\neth0").unwrap();
    case.call("ADD", &case.asking_for("10.1.17.7")).result();
    assert_eq!(case.node.reserved("n"), ["10.1.17.7", "10.1.17.9"]);
    case.call("DEL", &case.network).result();
    assert!(case.node.reserved("n").is_empty());
}

/// The plugin, for which a directory of the node is what `mount` makes of it.
fn with_mounted(node: &Node, directory: &str, mount: &str) -> String {
    let program = node.path("mounted");
    let script = format!(
        "#!/bin/sh\nset -e\ncd '{}'\n{mount}\nexec '{}'\n",
        node.path(directory).display(),
        flannel()
    );
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    program.to_str().unwrap().to_owned()
}

/// What is mounted in the namespace that `ip netns exec` makes goes away with the program.
const READ_ONLY: &str = "mount --bind . .\nmount -o remount,bind,ro \"$PWD\"";
const FULL: &str = "mount -t tmpfs -o size=4k none .\ncd \"$PWD\"\nhead -c 4096 /dev/zero >full";

#[test]
fn while_addresses_can_not_be_given_back_the_pod_is_kept_for_the_next_del() {
    let case = Case::new(V4);
    case.call("ADD", &case.network).result();
    let read_only = with_mounted(&case.node, "addresses", READ_ONLY);
    let mut gc = case.network.clone();
    gc["cni.dev/valid-attachments"] = json!([]);
    let file = case.node.path("addresses/n/10.1.17.2");
    for (verb, network) in [("DEL", &case.network), ("GC", &gc), ("DEL", &case.network)] {
        let (code, msg) = case.call_program(&read_only, verb, network).error();
        let expected = format!("{} can't be removed: Read-only file system", file.display());
        assert!(code == 999 && msg.starts_with(&expected) && msg.contains("dataDir"), "{verb}: {code} {msg}");
        assert_eq!(
            (case.node.reserved("n"), case.node.kept()),
            (vec!["10.1.17.2".into()], vec!["c1".into()]),
            "{verb}"
        );
    }
    case.call("GC", &gc).result();
    assert_eq!((case.node.reserved("n"), case.node.kept()), (vec![], vec![]));
    // There is nothing to give back.
    case.call_program(&read_only, "DEL", &case.network).result();
}

#[test]
fn status_says_whether_a_reservation_can_be_written() {
    let case = Case::new(V4);
    case.call("ADD", &case.network).result();
    case.call("STATUS", &case.network).result();
    for (mount, why) in [(READ_ONLY, "Read-only file system"), (FULL, "No space left on device")] {
        let program = with_mounted(&case.node, "addresses", mount);
        let (code, msg) = case.call_program(&program, "STATUS", &case.network).error();
        assert!(code == 50 && msg.contains("addresses/n: ") && msg.contains(why), "{code} {msg}");
    }
    let names: Vec<_> = case.node.reservations("n").into_keys().collect();
    assert_eq!(names, ["10.1.17.2", "last_reserved_ip.0", "lock"]);
}

#[test]
fn a_gateway_outside_of_the_subnet_is_taken_as_gos_host_local_takes_it() {
    let node = Node::new(V4);
    let ours = format!("{}/host-local", node.own_plugins());
    let gos = format!("{PLUGINS}/host-local");
    let pod = Pod { container: "c1", ifname: "eth0", netns: NO_NETNS };
    for gateway in ["169.254.1.1", "10.77.1.1"] {
        let config = json!({"name": "n", "cniVersion": "1.0.0", "type": "ptp", "ipam": {
            "type": "host-local", "subnet": "10.77.0.0/24", "gateway": gateway, "dataDir": node.path("addresses")}});
        let call = |program: &str, verb| node.call_plugin(program, verb, pod, &config.to_string(), &[]);
        let mut results = Vec::new();
        for (add, del) in [(&ours, &gos), (&gos, &ours), (&ours, &ours)] {
            let _ = fs::remove_dir_all(node.path("addresses"));
            results.push(call(add, "ADD").result());
            call(del, "DEL").result();
            assert!(node.reserved("n").is_empty(), "{gateway}: ADD by {add}, DEL by {del}");
        }
        assert_eq!(results[0], results[1], "{gateway}");
        assert_eq!(results[0]["ips"], json!([{"address": "10.77.0.1/24", "gateway": gateway}]));
    }
}

#[test]
fn one_del_removes_what_was_kept_for_two_adds_of_a_pod_and_nothing_of_its_other_interface() {
    let case = Case::new(V4);
    let path = case.pod.path();
    let pod = |ifname| Pod { container: "c1", ifname, netns: &path };
    case.call("ADD", &case.network).result();
    assert!(!case.call("ADD", &case.network).success);
    assert_eq!(case.node.kept(), ["c1", "c1-eth0"]);
    case.call("DEL", &case.network).result();
    assert_eq!((case.node.kept(), case.node.reserved("n")), (vec![], vec![]));

    let network = case.network.to_string();
    for ifname in ["eth0", "net1"] {
        case.node.call_with("ADD", pod(ifname), &network, &[]).result();
    }
    assert_eq!(case.node.kept(), ["c1", "c1-net1"]);
    case.node.call_with("DEL", pod("net1"), &network, &[]).result();
    assert_eq!((case.node.kept(), case.node.reserved("n").len()), (vec!["c1".into()], 1));
    case.call("DEL", &case.network).result();
    assert_eq!((case.node.kept(), case.node.reserved("n")), (vec![], vec![]));
}
