//! The device of WireGuard in process while no agent runs, and who takes it over.

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;

use backends::testing::{Pod, Signal, wait_for_some};
use subnet::Family;

use crate::bed::{LIMIT, Member, flanneld};
use crate::site::{Kind, Site, config};

const V4: &[Family] = &[Family::V4];
const WIREGUARD: &str = r#"{"Type":"wireguard"}"#;
const DEVICE: &str = "flannel-wg";

/// The kernel's number of the device; `None` without one.
fn index(member: &Member) -> Option<String> {
    let shown = member.try_show(&format!("ip -o link show {DEVICE}"));
    shown.split_once(':').map(|(index, _)| index.to_owned())
}

fn reaches(from: &Pod, to: &Pod) -> bool {
    from.namespace().reaches(to.address()).unwrap()
}

/// Packets of pods that leave a node in clear while one pod speaks to another.
fn readable(member: &Member, from: &Pod, to: &Pod) -> bool {
    let file = member.node.dir().join("clear.pcap");
    let arguments = format!("-i eth0 -n -U --immediate-mode -w {} net 10.244.0.0/16", file.display());
    let command = member.node.namespace().command("tcpdump").args(arguments.split(' '));
    let mut capture = command.stderr(Stdio::null()).spawn().unwrap();
    let size = || fs::metadata(&file).map_or(0, |file| file.len());
    // The header of the file.
    member.wait("tcpdump", || size() >= 24);
    for _ in 0..3 {
        assert!(!reaches(from, to), "no agent runs");
    }
    capture.signal(Signal::TERM).unwrap();
    capture.wait(LIMIT).unwrap();
    let readable = size() > 24;
    fs::remove_file(&file).unwrap();
    readable
}

fn saved_state(member: &Member) -> PathBuf {
    let file = || {
        let entries = fs::read_dir(member.node.dir()).unwrap();
        let mut paths = entries.flatten().map(|entry| entry.path());
        paths.find(|path| path.to_string_lossy().ends_with(".state.json"))
    };
    wait_for_some("the saved state", LIMIT, file).unwrap()
}

#[test]
fn while_no_agent_runs_nothing_leaves_in_clear_and_the_next_one_takes_the_device_over() {
    let site = Site::new(Kind::Etcd, &config(V4, WIREGUARD));
    let mut members = [site.join(), site.join()];
    let pods = members.each_ref().map(Member::pod_of_all_families);
    members[0].wait("the first echo", || reaches(&pods[0], &pods[1]));
    let device = index(&members[0]);
    assert!(device.is_some());
    for kill in [false, true] {
        if kill {
            members[0].agent.kill().unwrap();
        } else {
            assert!(members[0].agent.terminate(LIMIT).unwrap().success());
        }
        assert_eq!(index(&members[0]), device, "it stays");
        assert!(!readable(&members[0], &pods[0], &pods[1]), "kill: {kill}");
        members[0].start_again();
        members[0].wait("echoes again", || reaches(&pods[0], &pods[1]) && reaches(&pods[1], &pods[0]));
        assert_eq!(index(&members[0]), device, "it is the same");
    }
    // What the device is good for: the capture sees what leaves without it.
    members[0].agent.kill().unwrap();
    members[0].ip(&format!("link del {DEVICE}"));
    assert!(readable(&members[0], &pods[0], &pods[1]));
    members[0].start_again();
    members[0].wait("echoes by another device", || reaches(&pods[0], &pods[1]));
    assert_ne!(index(&members[0]), device);
}

#[test]
fn a_device_that_was_left_goes_with_cleanup_and_with_another_backend() {
    let site = Site::new(Kind::Etcd, &config(V4, WIREGUARD));
    let mut member = site.join();
    assert!(member.agent.terminate(LIMIT).unwrap().success());
    assert!(index(&member).is_some());
    let file = format!("--subnet-file={}", member.node.subnet_file().display());
    let cleaned = member.node.namespace().command(flanneld()).args(["cleanup", &file]).ok().unwrap();
    assert!(cleaned.contains(&format!("link {DEVICE}")), "{cleaned}");
    assert_eq!(index(&member), None);

    member.start_again();
    let device = index(&member);
    assert!(device.is_some());
    // Another configuration, with what was in force before at first.
    member.agent.kill().unwrap();
    site.configure(&config(V4, r#"{"Type":"host-gw"}"#));
    member.start_again();
    assert_eq!(index(&member), device);
    member.agent.kill().unwrap();
    site.configure(&config(V4, r#"{"Type":"vxlan"}"#));
    // As what was in force before, it would stay for half a minute.
    fs::remove_file(saved_state(&member)).unwrap();
    member.start_again();
    member.wait("the end of the device", || index(&member).is_none());
    assert!(!member.agent.log().contains("Operation not supported"), "{}", member.agent.log());
}

#[test]
fn a_device_of_the_name_is_taken_over_unless_it_is_for_somebody_else() {
    let site = Site::new(Kind::Etcd, &config(V4, WIREGUARD));
    let far = site.join();
    let mut member = site.join();
    let (near_pod, far_pod) = (member.pod_of_all_families(), far.pod_of_all_families());
    for (made, is_taken) in [
        // As an agent leaves it, but for what was set of it.
        ("multi_queue", true),
        ("multi_queue vnet_hdr", true),
        ("vnet_hdr", true),
        ("", true),
        ("multi_queue user 1000", false),
        ("multi_queue group 1000", false),
    ] {
        member.agent.kill().unwrap();
        member.ip(&format!("link del {DEVICE}\ntuntap add {DEVICE} mode tun {made}"));
        let device = index(&member);
        let mut agent = member.second(&[]);
        if !is_taken {
            let why =
                "somebody has made flannel-wg for a user or a group: remove it (ip link del flannel-wg)";
            let told = || agent.get("/readyz").is_ok_and(|(code, body)| code == 503 && body.contains(why));
            member.wait(&format!("a word about: {made}"), told);
            assert_eq!(index(&member), device, "it is left alone");
            member.ip(&format!("link del {DEVICE}"));
        }
        agent.wait_ready(LIMIT).unwrap();
        member.wait(&format!("echoes: {made}"), || reaches(&near_pod, &far_pod));
        assert_eq!(index(&member) == device, is_taken, "{made}");
        member.agent = agent;
    }
}
