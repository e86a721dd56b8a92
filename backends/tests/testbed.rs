//! The test bed keeps its promises: what it makes works, and nothing of it is left behind.

use std::io::{BufRead, BufReader};
use std::net::IpAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;
use std::{env, fs, thread};

use backends::testing::{
    Etcd, Fabric, Namespace, Node, NodeOptions, PingOptions, Pinger, Pod, Process, Signal, wait_for,
};

const TIMEOUT: Duration = Duration::from_secs(20);

/// No process is left under this process id, or only what its parent hasn't collected yet.
fn is_gone(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().is_none_or(|rest| rest.is_empty() || rest.starts_with('Z'))
}

/// A program that runs until it is killed.
fn sleeper(namespace: &Namespace) -> anyhow::Result<Process> {
    namespace.command("sleep").arg("1000").spawn()
}

#[test]
fn a_namespace_starts_with_nothing_but_a_working_loopback() {
    let namespace = Namespace::new().unwrap();
    let links = namespace.command("ip").args(["-o", "link", "show", "up"]).ok().unwrap();
    assert_eq!(links.lines().count(), 1, "{links}");
    assert!(links.contains("lo:"), "{links}");
    assert!(namespace.reaches("127.0.0.1".parse().unwrap()).unwrap());
}

#[test]
fn a_panic_inside_a_namespace_reaches_the_caller_and_the_namespace_still_works() {
    let namespace = Namespace::new().unwrap();
    let caught = catch_unwind(AssertUnwindSafe(|| namespace.run(|| panic!("inside"))));
    assert_eq!(caught.unwrap_err().downcast_ref::<&str>(), Some(&"inside"));
    assert_eq!(namespace.run(|| 7), 7);
}

#[test]
fn a_namespace_and_its_programs_vanish_when_their_owner_panics() {
    let (told, tell) = std::sync::mpsc::channel();
    let owner = thread::spawn(move || {
        let namespace = Namespace::new().unwrap();
        let sleeper = sleeper(&namespace).unwrap();
        told.send((namespace.path().to_owned(), sleeper.id())).unwrap();
        panic!("expected by the test");
    });
    let (path, pid): (PathBuf, u32) = tell.recv().unwrap();
    assert!(owner.join().is_err());
    wait_for("the namespace to vanish", TIMEOUT, || !path.exists()).unwrap();
    wait_for("the program to end", TIMEOUT, || is_gone(pid)).unwrap();
}

#[test]
fn programs_die_with_their_namespace_even_if_nobody_kills_them() {
    let namespace = Namespace::new().unwrap();
    let mut sleeper = sleeper(&namespace).unwrap();
    drop(namespace);
    let status = sleeper.wait(TIMEOUT).unwrap();
    assert!(status.to_string().contains("SIGKILL"), "{status}");
}

#[test]
fn nothing_survives_the_death_of_the_process() {
    const HOLD: &str = "TESTBED_HOLD_A_NAMESPACE";
    if env::var_os(HOLD).is_some() {
        // The second process, which the first one kills.
        let namespace = Namespace::new().unwrap();
        let mut sleeper = sleeper(&namespace).unwrap();
        println!("\nsleeper {}", sleeper.id());
        sleeper.wait(Duration::from_secs(900)).unwrap();
    }
    let mut holder = Command::new(env::current_exe().unwrap())
        .args(["--exact", "nothing_survives_the_death_of_the_process", "--nocapture"])
        .env(HOLD, "1")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(holder.stdout.take().unwrap()).lines();
    let pid = lines.map_while(Result::ok).find_map(|line| line.strip_prefix("sleeper ")?.parse().ok());
    holder.kill().unwrap();
    holder.wait().unwrap();
    let pid = pid.expect("the holder starts a program");
    wait_for("the program to end", TIMEOUT, || is_gone(pid)).unwrap();
}

#[test]
fn a_failing_command_tells_its_arguments_and_what_it_said() {
    let namespace = Namespace::new().unwrap();
    let error = namespace.command("ip").args(["link", "show", "nosuch0"]).ok().unwrap_err().to_string();
    assert!(error.contains("ip link show nosuch0") && error.contains("does not exist"), "{error}");
    let error = namespace.command("no-such-program").ok().unwrap_err().to_string();
    assert!(error.contains("no-such-program"), "{error}");
}

#[test]
fn a_signal_ends_a_program() {
    let namespace = Namespace::new().unwrap();
    let mut sleeper = sleeper(&namespace).unwrap();
    assert!(sleeper.ended().unwrap().is_none());
    sleeper.signal(Signal::TERM).unwrap();
    let status = sleeper.wait(TIMEOUT).unwrap();
    assert!(status.to_string().contains("SIGTERM"), "{status}");
    sleeper.signal(Signal::TERM).unwrap();
}

#[test]
fn nodes_on_a_fabric_reach_each_other_in_both_families() {
    let fabric = Fabric::new().unwrap();
    let (one, two) = (fabric.node().unwrap(), fabric.node().unwrap());
    for target in [IpAddr::from(two.address()), two.address_v6().into(), fabric.address().into()] {
        assert!(one.namespace().reaches(target).unwrap(), "{target}");
    }
    assert!(!one.namespace().reaches("172.31.0.77".parse().unwrap()).unwrap());
}

#[test]
fn a_node_has_default_routes_and_gets_them_back_with_its_link() {
    let fabric = Fabric::new().unwrap();
    let node = fabric.node().unwrap();
    let (v4, v6) = ("0.0.0.0/0".parse().unwrap(), "::/0".parse().unwrap());
    assert!(node.has_route(v4).unwrap() && node.has_route(v6).unwrap());
    node.link_down().unwrap();
    assert!(!node.has_route(v4).unwrap() && !node.has_route(v6).unwrap());
    node.link_up().unwrap();
    assert!(node.has_route(v4).unwrap() && node.has_route(v6).unwrap());
    assert!(node.namespace().reaches(fabric.address().into()).unwrap());
}

#[test]
fn a_readdressed_node_is_reached_at_its_new_addresses_only_and_keeps_its_default_routes() {
    let fabric = Fabric::new().unwrap();
    let (one, two) = (fabric.node().unwrap(), fabric.node().unwrap());
    let old = [IpAddr::from(two.address()), two.address_v6().into()];
    let (v4, v6) = ("172.31.0.77".parse().unwrap(), "fd31::77".parse().unwrap());
    two.readdress(v4, v6).unwrap();
    assert_eq!((two.address(), two.address_v6()), (v4, v6));
    let check = || {
        for (old, new) in old.into_iter().zip([IpAddr::from(v4), v6.into()]) {
            assert!(one.namespace().reaches(new).unwrap(), "{new}");
            assert!(!one.namespace().reaches(old).unwrap(), "{old}");
        }
        for default in ["0.0.0.0/0", "::/0"] {
            assert!(two.has_route(default.parse().unwrap()).unwrap(), "{default}");
        }
        let addresses = two.namespace().command("ip").args(["-o", "address", "show", "dev", "eth0"]).ok();
        assert_eq!(addresses.unwrap().matches(" scope global ").count(), 2);
    };
    check();
    // It can lose and regain them, and one family can stay as it is.
    two.link_down().unwrap();
    two.link_up().unwrap();
    two.readdress("172.31.0.78".parse().unwrap(), v6).unwrap();
    two.readdress(v4, v6).unwrap();
    check();
    let error = two.readdress("172.31.1.77".parse().unwrap(), v6).unwrap_err().to_string();
    assert!(error.contains("172.31.0.0/24"), "{error}");
}

#[test]
fn a_remote_node_is_reached_through_a_router_and_is_no_next_hop() {
    let fabric = Fabric::new().unwrap();
    let near = fabric.node().unwrap();
    let (remote, other) = (fabric.remote_node().unwrap(), fabric.remote_node().unwrap());
    assert_eq!(remote.address().to_string(), "172.31.1.2");
    assert_eq!(other.address_v6().to_string(), "fd31:0:0:1::3");
    for from in [&near, &other] {
        for target in [IpAddr::from(remote.address()), remote.address_v6().into(), fabric.address().into()] {
            assert!(from.namespace().reaches(target).unwrap(), "{} to {target}", from.name());
        }
    }
    let way = |from: &Node, to: IpAddr| {
        from.namespace().command("ip").args(["route", "get", &to.to_string()]).ok().unwrap()
    };
    assert!(way(&near, remote.address().into()).contains(" via 172.31.0.254 "));
    assert!(way(&near, remote.address_v6().into()).contains(" via fd31::fe "));
    assert!(way(&remote, near.address().into()).contains(" via 172.31.1.254 "));
    assert!(!way(&remote, other.address().into()).contains(" via "));
    for (subnet, hop) in
        [("10.244.2.0/24", IpAddr::from(remote.address())), ("fd00:2::/64", remote.address_v6().into())]
    {
        let route = format!("route add {subnet} via {hop}");
        assert!(near.namespace().ip(&route).is_err(), "{route}");
        assert!(other.namespace().ip(&route).is_ok(), "{route}");
    }
    remote.readdress("172.31.1.77".parse().unwrap(), "fd31:0:0:1::77".parse().unwrap()).unwrap();
    assert!(near.namespace().reaches(remote.address().into()).unwrap());
}

#[test]
fn packets_up_to_the_mtu_pass_between_nodes() {
    let fabric = Fabric::new().unwrap();
    let jumbo = NodeOptions { mtu: 9000 };
    let (one, two) = (fabric.node_with(jumbo).unwrap(), fabric.node_with(jumbo).unwrap());
    let ping = |payload: u32| {
        let (size, target) = (payload.to_string(), two.address().to_string());
        // What is too long for the first link is refused at once.
        let args = ["-n", "-c1", "-W10", "-Mdo", "-s", &size, &target];
        one.namespace().command("ping").args(args).output().unwrap().status.success()
    };
    assert!(ping(9000 - 28));
    assert!(!ping(9000 - 27));
    one.set_mtu(1400).unwrap();
    assert!(ping(1400 - 28) && !ping(1400 - 27));
}

#[test]
fn wired_pods_reach_each_other_on_a_node_and_across_nodes_with_routes() {
    let fabric = Fabric::new().unwrap();
    let (one, two) = (fabric.node().unwrap(), fabric.node().unwrap());
    let a = Pod::wired(&one, "10.244.1.2/24".parse().unwrap()).unwrap();
    let b = Pod::wired(&one, "10.244.1.3/24".parse().unwrap()).unwrap();
    let c = Pod::wired(&two, "10.244.2.2/24".parse().unwrap()).unwrap();
    let d = Pod::wired(&two, "fd00:2::2/64".parse().unwrap()).unwrap();
    assert!(a.namespace().reaches(b.address()).unwrap());
    assert!(two.namespace().reaches(d.address()).unwrap());
    one.namespace().ip(&format!("route add 10.244.2.0/24 via {}", two.address())).unwrap();
    two.namespace().ip(&format!("route add 10.244.1.0/24 via {}", one.address())).unwrap();
    assert!(a.namespace().reaches(c.address()).unwrap());
}

#[test]
fn pods_wired_with_both_families_reach_each_other_and_the_world_in_both() {
    let fabric = Fabric::new().unwrap();
    let node = fabric.node().unwrap();
    let nets = |v4: &str, v6: &str| [v4.parse().unwrap(), v6.parse().unwrap()];
    let a = Pod::wired_with(&node, &nets("10.244.1.2/24", "fd00:1::2/64")).unwrap();
    let b = Pod::wired_with(&node, &nets("10.244.1.3/24", "fd00:1::3/64")).unwrap();
    for (from, to) in [(&a, &b), (&b, &a)] {
        for net in to.addresses() {
            assert!(from.namespace().reaches(net.addr()).unwrap(), "{net}");
        }
        for target in [IpAddr::from(node.address()), node.address_v6().into()] {
            assert!(from.namespace().reaches(target).unwrap(), "{target}");
        }
    }
    let only_v6 = Pod::wired_with(&node, &["fd00:1::4/64".parse().unwrap()]).unwrap();
    assert!(only_v6.namespace().reaches(a.addresses()[1].addr()).unwrap());
    assert!(!only_v6.namespace().reaches(a.address()).unwrap());
}

#[test]
fn a_pod_is_not_wired_with_no_address_or_two_of_a_family() {
    let fabric = Fabric::new().unwrap();
    let node = fabric.node().unwrap();
    let two = ["10.244.1.2/24".parse().unwrap(), "10.244.1.3/24".parse().unwrap()];
    for addresses in [&two[..], &[]] {
        let error = Pod::wired_with(&node, addresses).unwrap_err().to_string();
        assert!(error.contains("one of each family"), "{error}");
    }
}

#[test]
fn pings_that_may_not_be_divided_pass_up_to_the_mtu_and_get_lost_beyond_it() {
    let fabric = Fabric::new().unwrap();
    let (one, two) = (fabric.node().unwrap(), fabric.node().unwrap());
    for (target, headers) in [(IpAddr::from(two.address()), 28), (two.address_v6().into(), 48)] {
        let start = |size, dont_fragment| {
            Pinger::start_with(
                one.namespace(),
                target,
                PingOptions { size, dont_fragment, ..PingOptions::default() },
            )
            .unwrap()
        };
        for (size, dont_fragment) in [(1500 - headers, true), (1501 - headers, false), (16, false)] {
            let pinger = start(size, dont_fragment);
            wait_for("ten answers", TIMEOUT, || pinger.received() >= 10).unwrap();
            let pings = pinger.finish().unwrap();
            assert_eq!(pings.lost, 0, "{target}, {size} bytes: {pings:?}");
        }
        let pinger = start(1501 - headers, true);
        pinger.wait_for_loss(TIMEOUT).unwrap();
        let pings = pinger.finish().unwrap();
        assert!(pings.received == 0 && pings.lost > 0 && pings.sent == pings.lost, "{target}: {pings:?}");
    }
    assert!(
        Pinger::start_with(
            one.namespace(),
            two.address().into(),
            PingOptions { size: 8, ..PingOptions::default() }
        )
        .is_err()
    );
}

#[test]
fn a_pinger_counts_what_an_outage_loses_and_measures_it() {
    let fabric = Fabric::new().unwrap();
    let (one, two) = (fabric.node().unwrap(), fabric.node().unwrap());
    let pinger = Pinger::start(one.namespace(), two.address().into()).unwrap();
    pinger.wait_for_reply(TIMEOUT).unwrap();
    two.unplug().unwrap();
    let outage = Duration::from_millis(300);
    pinger.wait_for_silence(outage, TIMEOUT).unwrap();
    two.plug().unwrap();
    pinger.wait_for_reply(TIMEOUT).unwrap();
    let pings = pinger.finish().unwrap();
    assert!(pings.lost > 0 && pings.received > 1, "{pings:?}");
    assert_eq!(pings.sent, pings.received + pings.lost);
    assert!(pings.longest_gap >= outage, "{pings:?}");
}

#[test]
fn a_quiet_link_loses_no_ping() {
    let fabric = Fabric::new().unwrap();
    let node = fabric.node().unwrap();
    let pinger = Pinger::start(node.namespace(), fabric.address().into()).unwrap();
    wait_for("fifty answers", TIMEOUT, || pinger.received() >= 50).unwrap();
    let pings = pinger.finish().unwrap();
    assert_eq!(pings.lost, 0, "{pings:?}");
}

#[test]
fn etcd_on_a_fabric_serves_every_node_and_comes_back_after_a_crash() {
    let fabric = Fabric::new().unwrap();
    let node = fabric.node().unwrap();
    let mut etcd = Etcd::on(&fabric).unwrap();
    let address = etcd.endpoint().strip_prefix("http://").unwrap().parse().unwrap();
    let version = || node.namespace().http_get(address, "/version").map(|(code, _)| code);
    assert_eq!(version().unwrap(), 200);
    etcd.kill();
    assert!(version().is_err());
    etcd.restart().unwrap();
    assert_eq!(version().unwrap(), 200);
}

#[test]
fn etcd_on_the_loopback_address_serves_this_process() {
    let etcd = Etcd::start().unwrap();
    let address: std::net::SocketAddr = etcd.endpoint().strip_prefix("http://").unwrap().parse().unwrap();
    assert!(std::net::TcpStream::connect(address).is_ok());
}
