//! Pods on a bridge: `host namespace [cni0] -- veth -- [eth0] pod namespace`.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

use serde_json::{Value, json};

use crate::support::{Namespace, Node, PLUGINS, Pod, V4};

pub(crate) const V6: &str =
    "FLANNEL_IPV6_NETWORK=fc00::/48\nFLANNEL_IPV6_SUBNET=fc00::1/64\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=true\n";

/// ADD, DEL and DEL again; `ranges` and `routes` are those of the delegate's configuration.
fn comes_and_goes(subnet_env: &str, ranges: &str, routes: &str, addresses: &[&str]) {
    let node = Node::with_namespace(subnet_env);
    let namespace = Namespace::new();
    let pod = Pod { container: "some-container", ifname: "eth0", netns: &namespace.path() };
    let network = node.network("cni-flannel", "1.0.0", json!({}));

    let result = node.call("ADD", pod, &network).result();
    let given: Vec<_> = result["ips"].as_array().unwrap().iter().map(|ip| ip["address"].clone()).collect();
    assert_eq!(given, addresses);
    assert_eq!(result["cniVersion"], "1.0.0");
    let shown = namespace.ip(&["addr", "show", "eth0"]);
    assert!(addresses.iter().all(|address| shown.contains(address)), "{shown}");
    assert!(shown.contains("mtu 1472"), "{shown}");

    let kept = node.path("flannel").join("some-container");
    let expected = format!(
        r#"{{"cniVersion":"1.0.0","ipMasq":false,"ipam":{{"dataDir":{},"ranges":{ranges},"routes":{routes},"type":"host-local"}},"isGateway":true,"mtu":1472,"name":"cni-flannel","type":"bridge"}}"#,
        json!(node.path("addresses"))
    );
    assert_eq!(fs::read_to_string(&kept).unwrap(), expected);
    assert_eq!(fs::metadata(&kept).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(fs::metadata(node.path("flannel")).unwrap().permissions().mode() & 0o777, 0o700);
    assert_eq!(node.reserved("cni-flannel").len(), addresses.len());

    // DEL must do without subnet.env.
    fs::remove_file(node.path("subnet.env")).unwrap();
    let again = node.call("DEL", pod, &network);
    assert_eq!(again.result(), Value::Null);
    assert_eq!((node.kept(), node.reserved("cni-flannel")), (vec![], vec![]));
    assert!(!namespace.ip(&["link"]).contains("eth0"));
    assert_eq!(node.call("DEL", pod, &network).result(), Value::Null);
    assert!(node.kept().is_empty());
}

#[test]
fn an_ipv4_pod_comes_and_goes() {
    comes_and_goes(V4, r#"[[{"subnet":"10.1.17.0/24"}]]"#, r#"[{"dst":"10.1.0.0/16"}]"#, &["10.1.17.2/24"]);
}

#[test]
fn a_pod_with_two_networks_has_a_route_to_each() {
    comes_and_goes(
        &V4.replace("10.1.0.0/16", "10.1.0.0/16,192.168.0.0/16"),
        r#"[[{"subnet":"10.1.17.0/24"}]]"#,
        r#"[{"dst":"10.1.0.0/16"},{"dst":"192.168.0.0/16"}]"#,
        &["10.1.17.2/24"],
    );
}

#[test]
fn an_ipv6_pod_comes_and_goes() {
    comes_and_goes(V6, r#"[[{"subnet":"fc00::/64"}]]"#, r#"[{"dst":"fc00::/48"}]"#, &["fc00::2/64"]);
}

#[test]
fn a_dual_stack_pod_has_an_address_of_each_family() {
    comes_and_goes(
        &format!("{V4}{V6}"),
        r#"[[{"subnet":"10.1.17.0/24"}],[{"subnet":"fc00::/64"}]]"#,
        r#"[{"dst":"10.1.0.0/16"},{"dst":"fc00::/48"}]"#,
        &["10.1.17.2/24", "fc00::2/64"],
    );
}

#[test]
fn check_notices_that_the_pod_has_lost_its_address() {
    let node = Node::with_namespace(V4);
    let namespace = Namespace::new();
    let pod = Pod { container: "c1", ifname: "eth0", netns: &namespace.path() };
    let mut network = node.network("n", "0.4.0", json!({"isDefaultGateway": true}));
    network["prevResult"] = node.call("ADD", pod, &network).result();
    assert_eq!(node.call("CHECK", pod, &network).result(), Value::Null);

    // The pod is judged, not what was kept of it.
    let kept = node.path("flannel").join("c1");
    let content = fs::read(&kept).unwrap();
    fs::remove_file(&kept).unwrap();
    assert_eq!(node.call("CHECK", pod, &network).result(), Value::Null);
    fs::write(&kept, content).unwrap();

    namespace.ip(&["addr", "flush", "dev", "eth0"]);
    let (_, msg) = node.call("CHECK", pod, &network).error();
    assert!(msg.contains("10.1.17.2"), "{msg}");
    node.call("DEL", pod, &network).result();
}

#[test]
fn what_was_kept_stays_until_the_delegate_has_succeeded() {
    let node = Node::with_namespace(V4);
    let namespace = Namespace::new();
    let pod = Pod { container: "c1", ifname: "eth0", netns: &namespace.path() };
    let network = node.network("n", "1.0.0", json!({}));
    node.call("ADD", pod, &network).result();

    // A bridge that finds no host-local fails before it has done anything.
    let lonely = node.path("bin");
    fs::create_dir(&lonely).unwrap();
    symlink(format!("{PLUGINS}/bridge"), lonely.join("bridge")).unwrap();
    let path = [("CNI_PATH", lonely.to_str().unwrap()), ("FLANNEL_CNI_EXEC", "1")];
    for _ in 0..2 {
        let (_, msg) = node.call_with("DEL", pod, &network.to_string(), &path).error();
        assert!(msg.contains("host-local"), "{msg}");
        assert_eq!((node.kept().len(), node.reserved("n").len()), (1, 1));
    }
    node.call("DEL", pod, &network).result();
    assert_eq!((node.kept().len(), node.reserved("n").len()), (0, 0));
}

#[test]
fn a_pod_whose_namespace_is_gone_still_gives_back_its_address() {
    let node = Node::with_namespace(V4);
    let namespace = Namespace::new();
    let path = namespace.path();
    let pod = Pod { container: "c1", ifname: "eth0", netns: &path };
    let network = node.network("n", "0.3.1", json!({}));
    node.call("ADD", pod, &network).result();
    drop(namespace);
    node.call("DEL", Pod { netns: "", ..pod }, &network).result();
    assert_eq!((node.kept().len(), node.reserved("n").len()), (0, 0));
}

#[test]
fn two_interfaces_of_one_container_are_taken_down_each_on_its_own() {
    let node = Node::with_namespace(V4);
    for (networks, first_gone) in [(["a", "b"], 0), (["a", "b"], 1), (["a", "a"], 0), (["a", "a"], 1)] {
        let namespace = Namespace::new();
        let path = namespace.path();
        let pods = ["eth0", "net1"].map(|ifname| Pod { container: "c1", ifname, netns: &path });
        let configs =
            networks.map(|name| node.network(name, "1.0.0", json!({"bridge": format!("br{name}")})));
        for (pod, config) in pods.iter().zip(&configs) {
            node.call("ADD", *pod, config).result();
        }
        assert_eq!(node.kept(), ["c1", "c1-net1"]);
        let reserved = || node.reserved("a").len() + node.reserved("b").len();
        assert_eq!(reserved(), 2);

        // A runtime may repeat a DEL; that must not touch the other interface.
        for _ in 0..2 {
            node.call("DEL", pods[first_gone], &configs[first_gone]).result();
            assert_eq!(reserved(), 1, "{networks:?}");
            let links = namespace.ip(&["link"]);
            assert!(!links.contains(pods[first_gone].ifname), "{links}");
            assert!(links.contains(pods[1 - first_gone].ifname), "{links}");
        }
        node.call("DEL", pods[1 - first_gone], &configs[1 - first_gone]).result();
        assert_eq!((reserved(), node.kept().len()), (0, 0), "{networks:?}");
    }
}
