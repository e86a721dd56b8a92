//! A host that lacks what an agent needs: room on a disk, a name server that answers, programs that end.

use std::fs;
use std::path::{Path, PathBuf};

use backends::testing::{Agent, Fabric, Node, wait_for};

use crate::bed::{Cluster, LIMIT, VXLAN, flanneld};

/// A script, as one that an administrator would write.
fn script(path: &Path, text: &str) -> PathBuf {
    subnet::testing::write_program(path, &format!("#!/bin/sh\n{text}\n")).unwrap();
    path.to_owned()
}

/// An agent in a mount namespace of its own that was prepared by these lines.
fn confined(node: &Node, prepare: &str, args: &[String]) -> Agent {
    let inner =
        script(&node.dir().join("inner"), &format!("{prepare}\nexec {} \"$@\"", flanneld().display()));
    let outer = script(&node.dir().join("outer"), &format!("exec unshare -m {} \"$@\"", inner.display()));
    Agent::spawn(node, &outer, args).unwrap()
}

/// Runs a line of shell in the mount namespace of an agent.
fn inside(agent: &mut Agent, node: &Node, line: &str) -> String {
    let pid = agent.process().id().to_string();
    node.namespace().command("nsenter").args(["-t", &pid, "-m", "sh", "-c", line]).ok().unwrap()
}

fn verbose(agent: &Agent) -> String {
    agent.get("/readyz?verbose").map(|(_, body)| body).unwrap_or_default()
}

fn wait(agent: &Agent, what: &str, condition: impl FnMut() -> bool) {
    if let Err(error) = wait_for(what, LIMIT, condition) {
        panic!("{error}: {}\n{}", verbose(agent), agent.log());
    }
}

fn lines(agent: &Agent, part: &str) -> usize {
    agent.log().lines().filter(|line| line.contains(part)).count()
}

/// A file system of 8 KB at this directory, filled up.
fn full(at: &Path) -> String {
    let at = at.display();
    format!(
        "mkdir -p {at}\nmount -t tmpfs -o size=8k,nr_inodes=40 tmpfs {at}\nhead -c 8192 /dev/zero > {at}/ballast"
    )
}

#[test]
fn files_on_a_full_disk_are_named_and_written_as_soon_as_there_is_room() {
    let cluster = Cluster::new(VXLAN);
    let node = cluster.fabric.node().unwrap();
    let disk = node.dir().join("disk");
    let conf = node.dir().join("cni.json");
    fs::write(&conf, r#"{"name":"cbr0"}"#).unwrap();
    let args = [
        format!("--etcd-endpoints={}", cluster.etcd.endpoint()),
        format!("--subnet-file={}/subnet.env", disk.display()),
        format!("--cni-conf={}:{}/net.d/10-flannel.conflist", conf.display(), disk.display()),
    ];
    let mut agent = confined(&node, &full(&disk), &args);
    wait(&agent, "the reason", || verbose(&agent).contains("subnet.env: No space left on device"));
    wait(&agent, "the remedy", || agent.log().contains("make room on its file system"));
    wait(&agent, "a word about the saved state", || {
        agent.log().contains("a start without the store won't be possible")
    });
    assert_eq!(agent.get("/readyz").unwrap().0, 503);
    let list = format!("ls {}", disk.display());
    let found = inside(&mut agent, &node, &list);
    assert!(!found.contains("10-flannel") && !found.contains("subnet.env\n"), "no half a file: {found}");

    inside(&mut agent, &node, &format!("rm {}/ballast", disk.display()));
    // A turn of the whole would come only after a minute.
    agent.wait_ready(LIMIT).unwrap();
    let text = inside(
        &mut agent,
        &node,
        &format!("cat {0}/subnet.env {0}/net.d/10-flannel.conflist", disk.display()),
    );
    assert!(text.contains("FLANNEL_SUBNET=") && text.contains("cbr0"), "{text}");
    assert_eq!(lines(&agent, "the subnet file can't be written"), 1, "{}", agent.log());
}

#[test]
fn a_directory_of_leases_on_a_full_disk_is_named_by_one_line_and_tried_again() {
    let fabric = Fabric::new().unwrap();
    let node = fabric.node().unwrap();
    let disk = node.dir().join("disk");
    let prepare = format!(
        "mkdir -p {0}\nmount -t tmpfs -o size=16k tmpfs {0}\necho '{VXLAN}' > {0}/config.json\nhead -c 16384 /dev/zero > {0}/ballast || true",
        disk.display()
    );
    let mut agent = confined(&node, &prepare, &[format!("--lease-store=file:{}", disk.display())]);
    wait(&agent, "the reason", || verbose(&agent).contains("its file system is full: make room on it"));
    // Several attempts, each for another subnet.
    std::thread::sleep(std::time::Duration::from_secs(5));
    assert_eq!(lines(&agent, "file system is full"), 1, "{}", agent.log());
    inside(&mut agent, &node, &format!("rm {}/ballast", disk.display()));
    agent.wait_ready(LIMIT).unwrap();
}

#[test]
fn a_name_server_that_keeps_silent_is_named_and_keeps_neither_health_nor_sigterm_waiting() {
    let fabric = Fabric::new().unwrap();
    let rules = "table ip silence { chain in { type filter hook input priority 0; udp dport 53 drop; }; }";
    fabric.switch().command("nft").args(["-f", "-"]).input(rules).ok().unwrap();
    let node = fabric.node().unwrap();
    let resolv = node.dir().join("resolv.conf");
    fs::write(&resolv, format!("nameserver {}\n", fabric.address())).unwrap();
    let prepare = format!("mount --bind {} /etc/resolv.conf", resolv.display());
    let config = node.dir().join("net-conf.json");
    fs::write(&config, VXLAN).unwrap();
    let kubernetes = [
        "--kube-subnet-mgr".to_owned(),
        "--kube-api-url=http://api.example:8080".to_owned(),
        format!("--net-config-path={}", config.display()),
    ];
    for (args, soon, later) in [
        (
            &["--etcd-endpoints=http://etcd.example:2379".to_owned()][..],
            "no answer yet",
            "no name server answers",
        ),
        (&kubernetes[..], "no answer yet", ""),
    ] {
        let mut agent = confined(&node, &format!("export NODE_NAME=n1\n{prepare}"), args);
        wait(&agent, "a first word", || agent.log().contains(soon));
        assert_eq!(agent.get("/healthz").unwrap().0, 200);
        wait(&agent, "the reason", || verbose(&agent).contains(later));
        assert!(agent.terminate(LIMIT).unwrap().success());
    }
}

/// The programs of iptables, of which each hangs that `hangs` names, and the others do nothing.
fn programs(node: &Node, hangs: &[&str]) -> PathBuf {
    let bin = node.dir().join("bin");
    fs::create_dir_all(&bin).unwrap();
    for family in ["iptables", "ip6tables"] {
        for verb in ["", "-save", "-restore"] {
            let name = format!("{family}{verb}");
            let text = if hangs.contains(&verb) { "exec sleep 98765" } else { "exit 0" };
            script(&bin.join(&name), text);
        }
    }
    bin
}

/// How many of the programs hang, in the namespace of this node.
fn hanging(node: &Node) -> usize {
    let own = fs::read_dir("/proc").unwrap().flatten().filter(|process| {
        let line = fs::read(process.path().join("cmdline")).unwrap_or_default();
        let namespace = fs::read_link(process.path().join("ns/net")).ok();
        line.split(|byte| *byte == 0).any(|word| word == b"98765")
            && namespace == fs::read_link(node.namespace().path()).ok()
    });
    own.count()
}

#[test]
fn a_program_of_iptables_that_hangs_keeps_neither_health_nor_sigterm_waiting() {
    let cluster = Cluster::new(VXLAN);
    for hangs in [&["", "-save", "-restore"][..], &["-save"], &["-restore"]] {
        let node = cluster.fabric.node().unwrap();
        let path = format!("{}:{}", programs(&node, hangs).display(), std::env::var("PATH").unwrap());
        let args = [
            format!("--etcd-endpoints={}", cluster.etcd.endpoint()),
            "--traffic-manager=iptables".to_owned(),
            "--ip-masq".to_owned(),
        ];
        let mut agent = Agent::spawn_with(&node, flanneld(), args, &[("PATH".to_owned(), path)]).unwrap();
        wait(&agent, "a program that hangs", || hanging(&node) > 0);
        assert_eq!(agent.get("/healthz").unwrap().0, 200, "{hangs:?}");
        assert_eq!(agent.get("/readyz").unwrap().0, 503, "{hangs:?}");
        assert!(agent.terminate(LIMIT).unwrap().success(), "{hangs:?}");
        wait(&agent, "the end of the program as well", || hanging(&node) == 0);
    }
}

#[test]
fn the_same_unit_started_twice_ends_at_once_and_names_the_first() {
    let cluster = Cluster::new(VXLAN);
    let mut a = cluster.join();
    let pid = a.agent.process().id();
    let before = a.state();
    let args = [format!("--etcd-endpoints={}", cluster.etcd.endpoint()), "--healthz-port=8082".to_owned()];
    let mut second = Agent::spawn(&a.node, flanneld(), args).unwrap();
    assert_eq!(second.process().wait(LIMIT).unwrap().code(), Some(1));
    let log = second.log();
    assert!(
        log.contains(&format!("flanneld is running with pid {pid}")) && log.contains("stop it first"),
        "{log}"
    );
    assert_eq!(a.state(), before);
    assert_eq!(a.agent.get("/readyz").unwrap().0, 200);
}

#[test]
fn a_pipe_in_the_place_of_a_file_is_named_and_keeps_neither_health_nor_sigterm_waiting() {
    let cluster = Cluster::new(VXLAN);
    let store = format!("--etcd-endpoints={}", cluster.etcd.endpoint());
    let node = cluster.fabric.node().unwrap();
    let dir = node.dir().display().to_string();
    let pipe = format!("{dir}/config.json");
    node.namespace().command("mkfifo").arg(&pipe).ok().unwrap();
    let config = format!("{dir}/net-conf.json");
    fs::write(&config, VXLAN).unwrap();
    let kubernetes = ["--kube-subnet-mgr".to_owned(), "--kube-api-url=http://127.0.0.1:1".to_owned()];
    let with = |first: &[String], last: String| [first, &[last]].concat();
    for (args, ends) in [
        (with(&[store], format!("--cni-conf={pipe}:{dir}/10-flannel.conflist")), None),
        (with(&kubernetes, format!("--net-config-path={pipe}")), None),
        (vec![format!("--lease-store=file:{dir}")], None),
        (vec!["--etcd-endpoints=https://127.0.0.1:1".to_owned(), format!("--etcd-cafile={pipe}")], Some(1)),
        (
            vec![
                "--kube-subnet-mgr".to_owned(),
                format!("--net-config-path={config}"),
                format!("--kubeconfig-file={pipe}"),
            ],
            Some(2),
        ),
    ] {
        let environment = [("NODE_NAME".to_owned(), "n1".to_owned())];
        let mut agent = Agent::spawn_with(&node, flanneld(), &args, &environment).unwrap();
        match ends {
            Some(code) => assert_eq!(agent.process().wait(LIMIT).unwrap().code(), Some(code), "{args:?}"),
            None => {
                wait(&agent, "the reason", || verbose(&agent).contains("it is a pipe"));
                assert_eq!(agent.get("/healthz").unwrap().0, 200, "{args:?}");
                assert!(agent.terminate(LIMIT).unwrap().success(), "{args:?}");
            }
        }
        let log = agent.log();
        assert!(log.contains("name a file") && log.contains(&pipe), "{args:?}: {log}");
    }
}

/// As in a container without privileges: settings of devices are the runtime's business there (contract K17).
#[test]
fn where_settings_are_read_only_neither_status_nor_doctor_expects_them_to_be_set() {
    let cluster = Cluster::new(VXLAN);
    let node = cluster.fabric.node().unwrap();
    let args = [
        format!("--etcd-endpoints={}", cluster.etcd.endpoint()),
        format!("--subnet-file={}", node.subnet_file().display()),
    ];
    let read_only = "mount --bind /proc/sys /proc/sys\nmount -o remount,bind,ro /proc/sys";
    let mut agent = confined(&node, read_only, &args);
    agent.wait_ready(LIMIT).unwrap();
    let accept_ra = inside(&mut agent, &node, "cat /proc/sys/net/ipv6/conf/flannel.1/accept_ra");
    assert_eq!(accept_ra.trim(), "1", "the agent can't set it, or this test tests nothing");
    let doctor =
        format!("{} doctor --json --subnet-file={}", flanneld().display(), node.subnet_file().display());
    let found = inside(&mut agent, &node, &format!("{doctor} || true"));
    assert!(found.contains(r#""check":"kernel""#) && !found.contains("accept_ra"), "{found}");
    let status = agent.get("/status").unwrap().1;
    assert!(!status.contains("accept_ra"), "{status}");
}
