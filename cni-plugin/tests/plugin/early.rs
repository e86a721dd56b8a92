//! The announcement that the built-in bridge makes as soon as the pod has its address, and what becomes of it when the rest of the
//! ADD goes wrong.

use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use crate::killed::eventually;
use crate::policy::{ARGS, Case, Path};
use crate::support::flannel;

fn ok(stream: &mut UnixStream) {
    let _ = stream.write_all(b"{\"ok\":true}\n");
}

fn verbs(asked: &[Value]) -> Vec<&str> {
    asked.iter().map(|one| one["verb"].as_str().unwrap()).collect()
}

#[test]
fn an_add_that_fails_after_the_announcement_takes_it_back_before_the_address_is_free() {
    let no_gateway = json!({"ipam": {"routes": [{"dst": "10.9.0.0/16", "gw": "192.0.2.1"}]}});
    for (what, taken, more) in [
        ("container veth name provided (eth0) already exists", true, json!({})),
        ("failed to add route '10.9.0.0/16 via 192.0.2.1 dev eth0'", false, no_gateway),
    ] {
        let case = Arc::new(Case::new());
        let reserved: Arc<Mutex<Vec<Vec<String>>>> = Arc::default();
        let (seen, of_node) = (Arc::clone(&reserved), Arc::downgrade(&case));
        case.starts(move |_, stream| {
            if let Some(case) = of_node.upgrade() {
                seen.lock().unwrap().push(case.node.reserved("n"));
            }
            ok(stream);
        });
        if taken {
            case.pod.ip(&["link", "add", "eth0", "type", "veth", "peer", "name", "other"]);
        }
        let mut network = case.network(10);
        if let Some(routes) = more.get("ipam").and_then(|ipam| ipam.get("routes")) {
            network["ipam"]["routes"] = routes.clone();
        }
        let (code, msg) = case.call("ADD", Path::InProcess, &network).error();
        assert!(code == 999 && msg.starts_with(what), "{code} {msg}");
        let asked = case.asked();
        assert_eq!(verbs(&asked), ["add", "del"], "{what}: {asked:?}");
        assert_eq!(
            (&asked[0]["ips"], &asked[1]["container"]),
            (&json!(["10.1.17.2", "fc00::2"]), &json!("c1"))
        );
        let both = vec!["10.1.17.2".to_owned(), "fc00::2".to_owned()];
        assert_eq!(*reserved.lock().unwrap(), [both.clone(), both], "{what}");
        assert_eq!(case.node.reserved("n"), [""; 0], "{what}");
        assert_eq!(case.node.host().links(), ["lo", "cni0"], "{what}");
        assert_eq!(case.pod.links().len(), if taken { 3 } else { 1 }, "{what}");
    }
}

#[test]
fn an_add_that_fails_takes_nothing_back_from_an_agent_that_took_nothing() {
    let refuses = |_: &Value, stream: &mut UnixStream| drop(stream.write_all(b"{\"error\":\"no\"}\n"));
    for agent in [false, true] {
        let case = if agent { Case::with_agent(refuses) } else { Case::new() };
        case.pod.ip(&["link", "add", "eth0", "type", "veth", "peer", "name", "other"]);
        let answer = case.call("ADD", Path::InProcess, &case.network(10));
        assert_eq!(answer.error().1, "container veth name provided (eth0) already exists");
        assert_eq!(verbs(&case.asked()), if agent { &["add"][..] } else { &[] });
        assert_eq!(answer.stderr, "");
        assert_eq!(case.node.reserved("n"), [""; 0]);
    }
}

#[test]
fn an_add_that_fails_without_an_answer_to_its_announcement_takes_it_back_all_the_same() {
    // What an agent before this one did: it answers a release also while it has other work.
    let case = Case::with_agent(|question, stream| {
        if question["verb"] == "del" {
            return ok(stream);
        }
        let _ = std::io::Read::read(stream, &mut [0; 1]);
    });
    case.pod.ip(&["link", "add", "eth0", "type", "veth", "peer", "name", "other"]);
    let (_, msg) = case.call("ADD", Path::InProcess, &case.network(10)).error();
    assert_eq!(msg, "container veth name provided (eth0) already exists");
    assert_eq!(verbs(&case.asked()), ["add", "del"]);
    assert_eq!(case.node.reserved("n"), [""; 0]);
}

#[test]
fn an_agent_that_ends_between_the_announcement_and_its_answer_is_asked_again_by_the_same_add() {
    for wait in [0, 30] {
        let case = Case::new();
        let (pod, times) = (case.pod.name().to_owned(), Mutex::new(0));
        case.starts(move |question, stream| {
            let mut times = times.lock().unwrap();
            *times += 1;
            if question["verb"] == "add" && *times == 1 {
                // It ends when the pod has its link, and does not answer.
                eventually("the link", || crate::support::ip(&["-n", &pod, "-o", "link"]).contains("eth0"));
                return;
            }
            ok(stream);
        });
        let answer = case.call("ADD", Path::InProcess, &case.network(wait));
        let asked = case.asked();
        if wait == 0 {
            let (code, msg) = answer.error();
            assert!(code == 11 && msg.contains("closed the connection without an answer"), "{code} {msg}");
            assert_eq!(verbs(&asked), ["add"]);
            case.nothing_is_left("the agent has ended");
            continue;
        }
        let result = answer.result();
        assert_eq!(verbs(&asked), ["add", "add"]);
        // By then all is known.
        assert_eq!(asked[1]["mac"], result["interfaces"][2]["mac"]);
        assert_eq!((&asked[0]["hostIf"], &asked[0]["ips"]), (&asked[1]["hostIf"], &asked[1]["ips"]));
    }
}

#[test]
fn of_a_plugin_that_is_killed_while_it_waits_for_the_answer_a_del_and_a_gc_leave_nothing() {
    for verb in ["DEL", "GC"] {
        let case = Case::with_agent(|question, stream| {
            if question["verb"] == "del" {
                return ok(stream);
            }
            // Until the plugin is gone.
            let _ = std::io::Read::read(stream, &mut [0; 1]);
        });
        let mut network = case.network(30);
        network["cniVersion"] = json!("1.1.0");
        fs::write(case.node.path("stdin"), network.to_string()).unwrap();
        let mut plugin: Command = case.node.host().command(flannel());
        plugin.env("CNI_COMMAND", "ADD").env("CNI_CONTAINERID", "c1").env("CNI_IFNAME", "eth0");
        plugin.env("CNI_NETNS", case.pod.path()).env("CNI_PATH", "/nowhere").env("CNI_ARGS", ARGS);
        plugin.stdin(fs::File::open(case.node.path("stdin")).unwrap()).stdout(Stdio::piped());
        let mut plugin = plugin.spawn().unwrap();
        // The default route is the last thing but the answer that a pod gets.
        eventually("the pod is connected", || case.pod.ip(&["route"]).contains("default"));
        eventually("the question", || case.node.reserved("n").len() == 2);
        plugin.kill().unwrap();
        assert!(!plugin.wait().unwrap().success());
        assert_eq!(verbs(&case.asked()), ["add"]);
        if verb == "GC" {
            network["cni.dev/valid-attachments"] = json!([]);
            // The runtime removes a pod's namespace before.
            case.pod.ip(&["link", "del", "eth0"]);
        }
        case.call(verb, Path::InProcess, &network).result();
        assert_eq!(verbs(&case.asked()), ["del"], "{verb}");
        case.nothing_is_left(verb);
    }
}
