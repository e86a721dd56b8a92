//! Bad input and bad surroundings of the bridge in one process: each has its error, and nothing is left behind.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

use serde_json::{Value, json};

use crate::support::{Answer, Namespace, Node, Pod, V4};

struct Case {
    node: Node,
    namespace: Namespace,
}

impl Case {
    fn new() -> Self {
        Self { node: Node::with_namespace(V4), namespace: Namespace::new() }
    }

    fn add(&self, change: impl FnOnce(&mut Value)) -> Answer {
        self.add_to(&self.namespace.path(), "c1", change)
    }

    fn add_to(&self, netns: &str, container: &str, change: impl FnOnce(&mut Value)) -> Answer {
        let mut network = self.node.network("n", "1.0.0", json!({}));
        change(&mut network);
        let pod = Pod { container, ifname: "eth0", netns };
        self.node.call_with("ADD", pod, &network.to_string(), &[("CNI_PATH", "/nowhere")])
    }

    /// The error of an ADD that leaves nothing behind.
    #[track_caller]
    fn refused(&self, change: impl FnOnce(&mut Value)) -> String {
        let before = self.node.reserved("n");
        let (code, msg) = self.add(change).error();
        assert_eq!(code, 999, "{msg}");
        let ports = self.node.host().links().iter().filter(|link| link.starts_with("veth")).count();
        assert_eq!(ports, 0, "{msg}");
        assert_eq!(self.node.reserved("n"), before, "{msg}");
        msg
    }
}

#[test]
fn ranges_of_the_runtime_that_make_no_sense_are_named() {
    let case = Case::new();
    for (ranges, expected) in [
        (json!([[{"subnet": "10.1.17.0/25"}]]), "range set 0 overlaps with 1"),
        (
            json!([[{"subnet": "10.2.0.0/24", "rangeStart": "10.2.0.9", "rangeEnd": "10.2.0.8"}]]),
            "RangeStart 10.2.0.9 is behind RangeEnd 10.2.0.8",
        ),
        (
            json!([[{"subnet": "fd00::/64", "gateway": "10.2.0.1"}]]),
            "gateway \"10.2.0.1\" can't be that of fd00::1/64: give one of the same family",
        ),
        (json!([[{"subnet": "10.2.0.0/31"}]]), "Network 10.2.0.0/31 too small to allocate from"),
        (json!([[{"subnet": "10.2.0.0/32"}]]), "Network 10.2.0.0/32 too small to allocate from"),
        (json!([[{"subnet": "fd00::/127"}]]), "Network fd00::/127 too small to allocate from"),
        (json!([[]]), "empty range set"),
        (json!([[{"subnet": "10.2.0.0/24"}, {"subnet": "fd00::/64"}]]), "mixed address families"),
        (json!([7]), "7 is not a list of ranges"),
        (json!("x"), "ipRanges"),
    ] {
        let msg = case.refused(|network| network["runtimeConfig"] = json!({"ipRanges": ranges}));
        assert!(msg.contains(expected), "{msg}");
    }
}

#[test]
fn a_vlan_that_does_not_exist_is_refused_and_its_pod_can_be_removed() {
    let case = Case::new();
    let network = case.node.network("n", "1.0.0", json!({"vlan": 9999}));
    let netns = case.namespace.path();
    let pod = Pod { container: "c1", ifname: "eth0", netns: &netns };
    let (_, msg) = case.node.call("ADD", pod, &network).error();
    assert_eq!(msg, "invalid VLAN ID 9999 (must be between 0 and 4094)");
    assert!(case.node.kept().is_empty());
    assert_eq!(case.node.call("DEL", pod, &network).result(), Value::Null);
}

#[test]
fn a_wish_that_can_not_be_granted_is_named() {
    let case = Case::new();
    for (wish, expected) in [
        (
            json!({"ips": ["10.1.17.1"]}),
            "failed to allocate for range 0: requested ip 10.1.17.1 is subnet's gateway",
        ),
        (json!({"ips": ["10.7.0.1"]}), "failed to allocate all requested IPs: 10.7.0.1"),
        (json!({"ips": ["home"]}), "invalid IP address: home"),
        (json!({"mac": "02:00"}), "failed to make veth pair: address 02:00: invalid MAC address"),
        (json!({"mac": "ff:ff:ff:ff:ff:ff"}), "failed to make veth pair: "),
    ] {
        let msg = case.refused(|network| network["runtimeConfig"] = wish);
        assert!(msg.starts_with(expected), "{msg}");
    }
    case.add(|network| network["runtimeConfig"] = json!({"ips": ["10.1.17.9"]})).result();
    let second = Namespace::new();
    let wish = |network: &mut Value| network["runtimeConfig"] = json!({"ips": ["10.1.17.9"]});
    let (_, msg) = case.add_to(&second.path(), "c2", wish).error();
    let expected = "failed to allocate for range 0: requested IP address 10.1.17.9 is not available in range set 10.1.17.1-10.1.17.254";
    assert_eq!(msg, expected);
    let (_, msg) = case.add_to(&second.path(), "c1", |_| {}).error();
    let expected = "failed to allocate for range 0: 10.1.17.9 has been allocated to c1, duplicate allocation is not allowed";
    assert_eq!(msg, expected);
    assert_eq!(case.node.reserved("n"), ["10.1.17.9"]);
}

#[test]
fn strange_things_among_the_reservations_are_passed_by() {
    let case = Case::new();
    let directory = case.node.path("addresses/n");
    let secret = case.node.path("secret");
    fs::create_dir_all(&directory).unwrap();
    fs::write(&secret, "kept").unwrap();
    fs::write(directory.join("10.1.17.2"), "garbage \u{1}\n\n").unwrap();
    fs::create_dir(directory.join("10.1.17.3")).unwrap();
    symlink(&secret, directory.join("10.1.17.4")).unwrap();
    fs::write(directory.join("10.1.17.5"), "").unwrap();
    let fifo = std::process::Command::new("mkfifo").arg(directory.join("10.1.17.6")).status().unwrap();
    assert!(fifo.success());
    for (last, expected) in [
        ("10.7.0.1", "10.1.17.7/24"),
        ("nonsense", "10.1.17.7/24"),
        ("10.1.17.254", "10.1.17.7/24"),
        ("10.1.17.30", "10.1.17.31/24"),
    ] {
        fs::write(directory.join("last_reserved_ip.0"), last).unwrap();
        let result = case.add(|_| {}).result();
        assert_eq!(result["ips"][0]["address"], expected, "{last}");
        let path = case.namespace.path();
        let pod = Pod { container: "c1", ifname: "eth0", netns: &path };
        case.node.call("DEL", pod, &case.node.network("n", "1.0.0", json!({}))).result();
    }
    assert_eq!(fs::read_to_string(&secret).unwrap(), "kept");
    // What is written is not written through a link either.
    fs::remove_file(directory.join("last_reserved_ip.0")).unwrap();
    symlink(&secret, directory.join("last_reserved_ip.0")).unwrap();
    let msg = case.refused(|_| {});
    assert!(msg.contains("reserving"), "{msg}");
    assert_eq!(fs::read_to_string(&secret).unwrap(), "kept");
}

#[test]
fn a_full_disk_is_named_and_reserves_nothing() {
    let case = Case::new();
    // One block, which the directories take.
    let mounted = case.node.path("small");
    fs::create_dir(&mounted).unwrap();
    let mounted = mounted.to_str().unwrap().to_owned();
    let run = |program: &str, arguments: &[&str]| {
        assert!(
            std::process::Command::new(program).args(arguments).status().unwrap().success(),
            "{arguments:?}"
        );
    };
    run("mount", &["-t", "tmpfs", "-o", "size=4k", "tmpfs", &mounted]);
    fs::write(format!("{mounted}/filler"), vec![b'x'; 4096]).unwrap();
    let answer = case.add(|network| network["ipam"]["dataDir"] = json!(mounted));
    let left = fs::read_dir(format!("{mounted}/n"))
        .map(|entries| entries.flatten().filter(|entry| entry.file_name() != "lock").count());
    run("umount", &[&mounted]);
    let (code, msg) = answer.error();
    assert!(code == 999 && msg.contains("No space left on device") && msg.contains("10.1.17.2"), "{msg}");
    assert_eq!(left.unwrap(), 0);
    assert_eq!(case.namespace.links(), ["lo"]);
}

#[test]
fn what_is_in_the_way_is_named() {
    let case = Case::new();
    case.node.host().ip(&["link", "add", "taken0", "type", "veth", "peer", "name", "taken1"]);
    let delegate = |delegate: Value| move |network: &mut Value| network["delegate"] = delegate;
    let msg = case.refused(delegate(json!({"bridge": "taken0"})));
    assert_eq!(msg, r#"failed to create bridge "taken0": "taken0" already exists but is not a bridge"#);
    let msg = case.refused(delegate(json!({"bridge": "averyverylongname"})));
    assert!(msg.contains(r#"bridge: "averyverylongname" can't be the name of a device"#), "{msg}");
    let msg = case.refused(delegate(json!({"mtu": 99_999_999})));
    assert_eq!(
        msg,
        r#"failed to create bridge "cni0": could not add "cni0": invalid argument (MTU 99999999)"#
    );
    case.namespace.ip(&["link", "add", "eth0", "type", "veth", "peer", "name", "other"]);
    let msg = case.refused(|_| {});
    assert_eq!(msg, "container veth name provided (eth0) already exists");
    assert_eq!(case.namespace.links().len(), 3);
}

#[test]
fn a_namespace_that_is_none_is_named_by_add_and_a_gone_one_satisfies_del() {
    let case = Case::new();
    let file = case.node.path("file");
    fs::write(&file, "").unwrap();
    let network = case.node.network("n", "1.0.0", json!({}));
    for (netns, expected) in [
        ("/nowhere/netns", "no such file or directory"),
        ("/proc/4194305/ns/net", "no such file or directory"),
        (file.to_str().unwrap(), "is no network namespace"),
        ("/proc/self/ns/uts", "is no network namespace"),
    ] {
        let (code, msg) = case.add_to(netns, "c1", |_| {}).error();
        let start = format!("failed to open netns {netns:?}: ");
        assert!(code == 999 && msg.starts_with(&start) && msg.contains(expected), "{msg}");
        case.node.call("DEL", Pod { container: "c1", ifname: "eth0", netns }, &network).result();
    }
    assert_eq!((case.node.kept(), case.node.reserved("n")), (vec![], vec![]));
}

#[test]
fn a_container_id_that_is_too_long_for_a_file_is_refused_and_leaves_nothing() {
    let case = Case::new();
    let long = "x".repeat(300);
    let (code, msg) = case.add_to(&case.namespace.path(), &long, |_| {}).error();
    // Each C library has its own words.
    let why = ["File name too long", "Filename too long"];
    assert!(code == 999 && why.iter().any(|why| msg.contains(why)), "{code} {msg}");
    assert_eq!((case.node.kept(), case.node.reserved("n")), (vec![], vec![]));
    let path = case.namespace.path();
    let pod = Pod { container: &long, ifname: "eth0", netns: &path };
    case.node.call("DEL", pod, &case.node.network("n", "1.0.0", json!({}))).result();
}

#[test]
fn a_directory_of_reservations_that_is_a_file_is_named() {
    let case = Case::new();
    fs::write(case.node.path("addresses"), "").unwrap();
    fs::set_permissions(case.node.path("addresses"), fs::Permissions::from_mode(0o600)).unwrap();
    let msg = case.refused(|_| {});
    assert!(msg.starts_with("mkdir ") && msg.contains("addresses/n"), "{msg}");
}
