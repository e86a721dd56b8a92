//! A pod is announced while the plugin makes its link: what the agent has of it when the rest of the ADD goes wrong.

use std::net::IpAddr;
use std::thread;

use backends::testing::Signal;
use serde_json::{Value, json};

use crate::bed::{LIMIT, Member};
use crate::handshake::{ResolvedRoute, Site, Started, links};

/// The addresses of pods that the kernel isolates.
fn isolated(member: &Member) -> String {
    member.show("nft list set inet flannel-policy pol4")
}

/// The addresses that the agent has of a container, on disk.
fn kept(member: &Member, pod: &str) -> Option<Vec<IpAddr>> {
    let mut directory = member.node.subnet_file().into_os_string();
    directory.push(".policy");
    let file = std::path::Path::new(&directory).join(format!("pod-c-{pod}"));
    let json: Value = serde_json::from_slice(&std::fs::read(file).ok()?).unwrap();
    Some(serde_json::from_value(json["ips"].clone()).unwrap())
}

/// The process of the plugin that is called for this pod.
fn plugin_of(pod: &Started<'_>) -> Option<u32> {
    let own = format!("CNI_NETNS={}", pod.namespace.path().display());
    let is_own = |pid: &u32| {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|variable| variable == own.as_bytes())
    };
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).find(is_own)
}

fn signal(member: &Member, pid: u32, signal: &str) {
    member.show(&format!("kill -{signal} {pid}"));
}

#[test]
fn of_an_add_that_fails_after_the_announcement_nothing_is_left_in_the_agent() {
    let site = Site::new();
    let member = site.join();
    for name in ["new-1", "new-2"] {
        site.put_pod(&member, name, "new");
    }
    let failing = Started::new(&member, "new-1", ResolvedRoute::InProcess);
    failing.namespace.ip("link add eth0 type veth peer name other").unwrap();
    let error = failing.call("ADD").unwrap_err();
    assert_eq!(error["msg"], "container veth name provided (eth0) already exists");
    // It was announced, and taken back.
    assert_eq!(kept(&member, "new-1"), Some(vec![]), "{}", member.agent.log());
    assert!(!isolated(&member).contains("10.244.1."), "{}", isolated(&member));
    // The next pod has the agent and the addresses for itself.
    let pod = Started::new(&member, "new-2", ResolvedRoute::InProcess);
    let address = pod.add();
    assert!(isolated(&member).contains(&address.to_string()));
    assert_eq!(kept(&member, "new-2"), Some(vec![address]));
    pod.del();
}

#[test]
fn an_agent_that_dies_between_the_announcement_and_its_answer_has_a_successor_that_answers() {
    let site = Site::new();
    let mut member = site.join();
    site.put_pod(&member, "new-1", "new");
    member.agent.terminate(LIMIT).unwrap();
    let mut agent = member.second(&[]);
    agent.wait_ready(LIMIT).unwrap();
    let pod = Started::new(&member, "new-1", ResolvedRoute::InProcess);
    // It takes connections and does not answer.
    agent.process().signal(Signal::STOP).unwrap();
    let (address, successor) = thread::scope(|scope| {
        let adding = scope.spawn(|| pod.add());
        member.wait("the link of the pod", || links(&pod.namespace).contains(&"eth0".to_owned()));
        assert!(!adding.is_finished(), "a pod starts without the agent's word");
        agent.kill().unwrap();
        let mut successor = member.second(&[]);
        successor.wait_ready(LIMIT).unwrap();
        (adding.join().unwrap(), successor)
    });
    assert!(isolated(&member).contains(&address.to_string()), "{}", successor.log());
    assert_eq!(kept(&member, "new-1"), Some(vec![address]));
    pod.del();
    assert_eq!(kept(&member, "new-1"), Some(vec![]));
}

#[test]
fn a_plugin_that_is_killed_before_the_answer_leaves_what_its_del_takes_back() {
    let site = Site::new();
    let mut member = site.join();
    site.put_pod(&member, "new-1", "new");
    let agent = member.pid();
    let pod = Started::new(&member, "new-1", ResolvedRoute::InProcess);
    signal(&member, agent, "STOP");
    thread::scope(|scope| {
        let adding = scope.spawn(|| pod.call("ADD"));
        member.wait("the address of the pod", || {
            let shown = pod.namespace.command("ip").args(["-4", "route"]).ok().unwrap();
            shown.contains("default")
        });
        let plugin = plugin_of(&pod).expect("it waits for the agent");
        signal(&member, plugin, "KILL");
        assert_eq!(adding.join().unwrap().unwrap_err(), json!(null));
    });
    signal(&member, agent, "CONT");
    // The agent has read the announcement, whose plugin is gone.
    member.wait("the announcement", || kept(&member, "new-1").is_some_and(|ips| !ips.is_empty()));
    pod.del();
    assert_eq!(kept(&member, "new-1"), Some(vec![]));
    assert!(!isolated(&member).contains("10.244.1."), "{}", isolated(&member));
    assert_eq!(links(&pod.namespace), ["lo"]);
}
