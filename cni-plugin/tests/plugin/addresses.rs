//! Addresses are given back also when the kept configuration is lost or damaged. The delegate is `host-local`
//! itself, which needs no namespace.

use std::fs;

use serde_json::{Value, json};

use crate::support::{NO_NETNS, Node, Pod, V4};

const POD: Pod<'_> = Pod { container: "c1", ifname: "eth0", netns: NO_NETNS };

fn network(node: &Node) -> Value {
    node.network("n", "1.0.0", json!({"type": "host-local"}))
}

/// Ends an ADD by a DEL after its kept configuration was damaged at each place, with and without subnet.env.
fn released_whatever_the_damage(damage: impl Fn(&mut Vec<u8>, usize)) {
    for subnet_env in [true, false] {
        let node = Node::new(V4);
        let network = network(&node);
        node.call("ADD", POD, &network).result();
        let kept = node.path("flannel/c1");
        let reservation = node.path("addresses/n/10.1.17.2");
        let (whole, reserved) = (fs::read(&kept).unwrap(), fs::read(&reservation).unwrap());
        if !subnet_env {
            fs::remove_file(node.path("subnet.env")).unwrap();
        }
        for at in 0..=whole.len() {
            let mut damaged = whole.clone();
            damage(&mut damaged, at);
            fs::write(&kept, &damaged).unwrap();
            fs::write(&reservation, &reserved).unwrap();
            let answer = node.call("DEL", POD, &network);
            assert!(answer.success, "{at}: {answer:?}");
            assert_eq!((node.reserved("n").len(), node.kept().len()), (0, 0), "{at}");
            assert_eq!(answer.stderr.is_empty(), damaged == whole, "{at}: {answer:?}");
        }
    }
}

#[test]
fn a_kept_configuration_cut_short_anywhere_loses_no_address() {
    released_whatever_the_damage(|content, at| content.truncate(at));
}

#[test]
fn a_kept_configuration_zeroed_from_anywhere_on_loses_no_address() {
    released_whatever_the_damage(|content, at| content[at..].fill(0));
}

#[test]
fn a_kept_configuration_zeroed_up_to_anywhere_loses_no_address() {
    released_whatever_the_damage(|content, at| content[..at].fill(0));
}

#[test]
fn a_lost_kept_configuration_loses_no_address() {
    for subnet_env in [V4, "", "FLANNEL_SUBNET\n", "FLANNEL_MTU=x\n"] {
        let node = Node::new(V4);
        let network = network(&node);
        node.call("ADD", POD, &network).result();
        fs::remove_dir_all(node.path("flannel")).unwrap();
        fs::write(node.path("subnet.env"), subnet_env).unwrap();
        node.call("DEL", POD, &network).result();
        assert!(node.reserved("n").is_empty(), "{subnet_env:?}");
    }
}

#[test]
fn other_containers_keep_their_addresses() {
    let node = Node::new(V4);
    let network = network(&node);
    let pods = ["c1", "c2", "c3"].map(|container| Pod { container, ..POD });
    for pod in pods {
        node.call("ADD", pod, &network).result();
    }
    fs::write(node.path("flannel/c2"), "").unwrap();
    node.call("DEL", pods[1], &network).result();
    assert_eq!(node.reserved("n"), ["10.1.17.2", "10.1.17.4"]);
    assert_eq!(node.kept(), ["c1", "c3"]);
}

#[test]
fn a_failed_add_is_undone_by_del_and_its_error_is_the_delegates() {
    // One address for a pod.
    let node = Node::new(&V4.replace("/24", "/30"));
    let network = network(&node);
    node.call("ADD", POD, &network).result();
    let second = Pod { container: "c2", ..POD };
    let (_, msg) = node.call("ADD", second, &network).error();
    assert!(msg.contains("no IP addresses available"), "{msg}");
    assert_eq!(node.kept(), ["c1", "c2"]);
    node.call("DEL", second, &network).result();
    assert_eq!((node.kept(), node.reserved("n")), (vec!["c1".into()], vec!["10.1.17.2".into()]));
}

#[test]
fn a_broken_file_stays_while_its_pod_can_not_be_taken_down() {
    let node = Node::new(V4);
    let network = network(&node);
    node.call("ADD", POD, &network).result();
    fs::write(node.path("flannel/c1"), "{").unwrap();
    let (code, msg) = node.call_with("DEL", POD, &network.to_string(), &[("CNI_PATH", "/nowhere")]).error();
    assert!(code == 999 && msg.contains("failed to delegate del: failed to find plugin"), "{msg}");
    assert_eq!((node.kept().len(), node.reserved("n").len()), (1, 1));
}

#[test]
fn a_del_of_what_never_was_succeeds() {
    let node = Node::new("");
    for delegate in [json!({}), json!({"type": "no-such-plugin"}), json!({"name": "forbidden"})] {
        let network = node.network("n", "1.0.0", delegate);
        assert_eq!(node.call("DEL", POD, &network).result(), Value::Null);
    }
    // Debian's host-local does not speak this version, so that it can't have added anything.
    let network = node.network("n", "1.1.0", json!({"type": "host-local"}));
    assert_eq!(node.call("DEL", POD, &network).result(), Value::Null);
    assert!(node.kept().is_empty());
}
