//! One agent takes the place of another that runs, as in a roll-out in which the new pod starts before the old one ends.

use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use backends::testing::{Pinger, Signal};

use crate::bed::{Cluster, HOST_GW, LIMIT, Member, VXLAN};

const UDP: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"udp"}}"#;
const WORKERS: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"udp","Workers":2}}"#;
const WIREGUARD: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"wireguard","Userspace":"always"}}"#;

fn socket(member: &Member) -> PathBuf {
    let mut path = member.node.subnet_file().into_os_string();
    path.push(".take-over");
    path.into()
}

/// The number of the tunnel's device, which another device would not have.
fn tunnel(member: &Member) -> String {
    let links = member.show("ip -o link show");
    let tunnel = links.lines().find(|line| line.contains("flannel")).unwrap_or_default();
    tunnel.split(':').next().unwrap_or_default().to_owned()
}

#[test]
fn an_agent_takes_over_from_another_one_without_losing_a_packet() {
    for config in [UDP, WORKERS, VXLAN, HOST_GW] {
        let cluster = Cluster::new(config);
        let (mut a, b) = (cluster.join(), cluster.join());
        let (pod_a, pod_b) = (a.pod(), b.pod());
        a.wait("the first echo between pods", || pod_a.namespace().reaches(pod_b.address()).unwrap());
        let (device, subnet) = (tunnel(&a), a.subnet());
        let pinger = Pinger::start(pod_a.namespace(), pod_b.address()).unwrap();
        pinger.wait_for_reply(LIMIT).unwrap();
        for _ in 0..3 {
            let mut next = a.second(&["--take-over=true"]);
            a.wait_for_log("another agent has taken over");
            next.wait_ready(LIMIT).unwrap();
            assert!(a.agent.process().ended().unwrap().is_none(), "the former agent waits to be ended");
            assert!(a.agent.terminate(LIMIT).unwrap().success());
            a.agent = next;
            let received = pinger.received();
            a.wait("further echoes", || pinger.received() > received + 10);
        }
        let pings = pinger.finish().unwrap();
        assert_eq!(pings.lost, 0, "{config}: {pings:?}");
        assert_eq!((tunnel(&a), a.subnet()), (device, subnet), "{config}");
    }
}

#[test]
fn wireguard_in_process_is_taken_over_with_its_device_and_pods_reach_each_other_again() {
    let cluster = Cluster::new(WIREGUARD);
    let (mut a, b) = (cluster.join(), cluster.join());
    let (pod_a, pod_b) = (a.pod(), b.pod());
    a.wait("the first echo between pods", || pod_a.namespace().reaches(pod_b.address()).unwrap());
    let device = tunnel(&a);
    let mut next = a.second(&["--take-over=true"]);
    a.wait_for_log("another agent has taken over");
    next.wait_ready(LIMIT).unwrap();
    assert!(a.agent.terminate(LIMIT).unwrap().success());
    a.agent = next;
    a.wait("an echo", || pod_a.namespace().reaches(pod_b.address()).unwrap());
    b.wait("an echo the other way", || pod_b.namespace().reaches(pod_a.address()).unwrap());
    assert_eq!(tunnel(&a), device);
}

#[test]
fn an_agent_whose_successor_ends_too_early_starts_again() {
    let cluster = Cluster::new(UDP);
    let (mut a, b) = (cluster.join(), cluster.join());
    let (pod_a, pod_b) = (a.pod(), b.pod());
    a.wait("the first echo between pods", || pod_a.namespace().reaches(pod_b.address()).unwrap());
    let inode = || std::fs::metadata("/proc/thread-self/ns/net").unwrap().ino();
    let namespace = a.node.namespace().run(inode);
    let mut successor = UnixStream::connect(socket(&a)).unwrap();
    successor
        .write_all(format!("{{\"take_over\":1,\"network_namespace\":{namespace}}}\n").as_bytes())
        .unwrap();
    let mut answer = [0; 64];
    assert!(successor.read(&mut answer).unwrap() > 0);
    assert!(String::from_utf8_lossy(&answer).starts_with("{\"tunnels\":[{\"name\":\"flannel0\""));
    a.wait("packets while nobody has taken over", || pod_a.namespace().reaches(pod_b.address()).unwrap());
    drop(successor);
    a.wait_for_log("starting again");
    a.agent.wait_ready(LIMIT).unwrap();
    a.wait("an echo", || pod_a.namespace().reaches(pod_b.address()).unwrap());
    assert!(a.agent.terminate(LIMIT).unwrap().success());
}

#[test]
fn an_agent_is_not_taken_over_from_elsewhere_or_by_what_it_does_not_understand() {
    let cluster = Cluster::new(UDP);
    let mut a = cluster.join();
    assert_eq!(socket(&a).metadata().unwrap().mode() & 0o777, 0o600);
    let ask = |request: &str| {
        let mut socket = UnixStream::connect(socket(&a)).unwrap();
        socket.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        let _ = socket.read_to_string(&mut answer);
        answer
    };
    assert!(ask("{\"take_over\":1,\"network_namespace\":1}\n").contains("another network namespace"));
    assert!(ask("{\"take_over\":2,\"network_namespace\":1}\n").contains("asked for version 2"));
    for garbage in ["\n", "{}\n", "GET / HTTP/1.1\r\n\r\n", "{\"take_over\":-1}\n"] {
        assert_eq!(ask(garbage), "", "{garbage:?}");
    }
    let mut next = a.second(&[]);
    assert!(!next.process().wait(LIMIT).unwrap().success(), "nobody takes over who was not told to");
    assert!(next.log().contains("--take-over"), "{}", next.log());
    a.agent.wait_ready(LIMIT).unwrap();
    assert!(a.agent.terminate(LIMIT).unwrap().success());
    assert!(a.show(&format!("ls {}", a.node.dir().display())).contains("flanneld"));
}

#[test]
fn an_agent_that_is_stopped_and_continued_goes_on_with_a_request_that_it_has_half_read() {
    let cluster = Cluster::new(UDP);
    let mut a = cluster.join();
    let mut successor = UnixStream::connect(socket(&a)).unwrap();
    successor.write_all(b"{\"take_over\":1,").unwrap();
    // The kernel interrupts a wait with a time limit when the process goes on (signal(7)).
    let stat = format!("/proc/{}/stat", a.agent.process().id());
    for _ in 0..5 {
        a.agent.process().signal(Signal::STOP).unwrap();
        a.wait("all of its threads", || std::fs::read_to_string(&stat).unwrap().contains(") T "));
        a.agent.process().signal(Signal::CONT).unwrap();
        std::thread::sleep(Duration::from_millis(20));
    }
    successor.write_all(b"\"network_namespace\":1}\n").unwrap();
    let mut answer = String::new();
    successor.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("another network namespace"), "{answer:?}");
    assert!(a.agent.terminate(LIMIT).unwrap().success());
}

#[test]
fn an_agent_that_may_take_over_starts_as_usual_where_none_runs() {
    let cluster = Cluster::new(UDP);
    let mut a = cluster.join_with(&["--take-over=true"]);
    a.agent.kill().unwrap();
    a.start_again();
    assert!(a.agent.terminate(LIMIT).unwrap().success());
}
