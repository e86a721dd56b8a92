//! Network policies with real agents and real packets: pods of one node and of two.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use backends::testing::{Pod, wait_for};
use serde_json::{Value, json};
use subnet::testing::{Refusal, node};

use crate::bed::{LIMIT, Member, flanneld};
use crate::kubernetes::Kubernetes;

const PORT: u16 = 8080;
/// Longer than an answer takes, even if the first SYN is lost.
const ANSWER: Duration = Duration::from_millis(1500);
/// For connections of which many are tried.
const HASTY: Duration = Duration::from_millis(50);

/// Two nodes; on the first the pods `web` and `near`, on the second `far`.
struct Shop {
    cluster: Kubernetes,
    a: Member,
    b: Member,
    web: Pod,
    near: Pod,
    far: Pod,
    listener: TcpListener,
}

fn pod_at(member: &Member, last: u8) -> Pod {
    let subnet = member.subnet().to_string();
    let address = subnet.replace(".0/24", &format!(".{last}/24")).parse().unwrap();
    Pod::wired(&member.node, address).unwrap()
}

fn policy(from: &[&str]) -> Value {
    let peers: Vec<Value> =
        from.iter().map(|app| json!({"podSelector": {"matchLabels": {"app": app}}})).collect();
    let ingress = if peers.is_empty() { json!([]) } else { json!([{"from": peers}]) };
    json!({"podSelector": {"matchLabels": {"app": "web"}}, "policyTypes": ["Ingress"], "ingress": ingress})
}

impl Shop {
    /// Only the first node's agent enforces policies.
    fn new(mode: &str) -> Self {
        Self::with(&[mode], &[])
    }

    fn with(args_a: &[&str], args_b: &[&str]) -> Self {
        let cluster = Kubernetes::new();
        cluster.api.put_namespace("shop", &[]);
        let a = cluster.join_with("10.244.1.0/24", args_a);
        let b = cluster.join_with("10.244.2.0/24", args_b);
        let (web, near, far) = (pod_at(&a, 2), pod_at(&a, 3), pod_at(&b, 2));
        let listener = web.namespace().run(|| TcpListener::bind(("0.0.0.0", PORT)).unwrap());
        let shop = Self { cluster, a, b, web, near, far, listener };
        for (name, member, pod) in
            [("web", &shop.a, &shop.web), ("near", &shop.a, &shop.near), ("far", &shop.b, &shop.far)]
        {
            shop.cluster.api.put_pod_object(json!({
                "metadata": {"namespace": "shop", "name": name, "uid": name, "labels": {"app": name}},
                "spec": {"nodeName": member.node.name()},
                "status": {"phase": "Running", "podIP": pod.address().to_string()},
            }));
        }
        shop.a.wait("pods reach each other", || shop.connects(&shop.near) && shop.connects(&shop.far));
        shop
    }

    fn put(&self, name: &str, spec: Value) {
        self.cluster.api.put_policy("shop", name, spec);
    }

    fn server(&self) -> SocketAddr {
        (self.web.address(), PORT).into()
    }

    /// Whether a connection is answered soon, for what is waited for and for what is refused.
    fn connects(&self, from: &Pod) -> bool {
        self.dial(from, ANSWER).is_some()
    }

    /// Whether a connection is answered, on however busy a machine.
    fn is_let_in(&self, from: &Pod) -> bool {
        self.dial(from, LIMIT).is_some()
    }

    fn dial(&self, from: &Pod, within: Duration) -> Option<TcpStream> {
        dial(from, self.server(), within)
    }

    /// Whether a datagram from a port that was not used before comes to `web` soon.
    fn hears(&self, web: &UdpSocket, from: &Pod) -> bool {
        self.hears_within(web, from, ANSWER)
    }

    fn hears_within(&self, web: &UdpSocket, from: &Pod, within: Duration) -> bool {
        let sender = from.namespace().run(|| UdpSocket::bind(("0.0.0.0", 0)).unwrap());
        sender.send_to(b"?", self.server()).unwrap();
        let expected = SocketAddr::from((from.address(), sender.local_addr().unwrap().port()));
        let deadline = Instant::now() + within;
        while let Some(left) = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
        {
            web.set_read_timeout(Some(left)).unwrap();
            // A timeout, or a signal: the deadline decides.
            if web.recv_from(&mut [0]).is_ok_and(|(_, sender)| sender == expected) {
                return true;
            }
        }
        false
    }

    /// A connection with its server's end.
    fn connection(&self, from: &Pod) -> (TcpStream, TcpStream) {
        let client = self.dial(from, LIMIT).expect("the connection is allowed");
        let own = client.local_addr().unwrap();
        loop {
            let (server, peer) = self.listener.accept().unwrap();
            if peer == own {
                return (client, server);
            }
        }
    }

    fn ruleset(&self) -> String {
        self.a.show("nft list ruleset")
    }

    fn figure(&self, name: &str) -> u64 {
        let (_, text) = self.a.agent.get("/metrics").unwrap();
        let line =
            text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ').map(str::to_owned));
        line.unwrap_or_else(|| panic!("no {name} in\n{text}")).parse().unwrap()
    }
}

fn dial(from: &Pod, server: SocketAddr, within: Duration) -> Option<TcpStream> {
    from.namespace().run(|| TcpStream::connect_timeout(&server, within)).ok()
}

/// Sends a byte and waits for it at the other end.
fn carries(from: &mut TcpStream, to: &mut TcpStream, within: Duration) -> bool {
    to.set_read_timeout(Some(within)).unwrap();
    let mut byte = [0];
    from.write_all(b"x").is_ok() && to.read_exact(&mut byte).is_ok()
}

#[test]
fn a_policy_is_applied_changed_and_removed_between_pods_of_one_node_and_of_two() {
    let shop = Shop::new("--network-policy=on");
    assert!(!shop.ruleset().contains("flannel-policy"), "without policies there are no tables");
    shop.put("web", policy(&[]));
    shop.a.wait("nobody is let in", || !shop.connects(&shop.near) && !shop.connects(&shop.far));
    assert!(shop.a.node.namespace().reaches(shop.web.address()).unwrap(), "the own node always is");
    shop.put("web", policy(&["far"]));
    shop.a.wait("the other node's pod is let in", || shop.connects(&shop.far));
    assert!(!shop.connects(&shop.near));
    shop.put("more", policy(&["near"]));
    shop.a.wait("the own node's pod is let in", || shop.connects(&shop.near));
    shop.cluster.api.delete_policy("shop", "more");
    shop.a.wait("it no longer is", || !shop.connects(&shop.near));
    assert!(shop.is_let_in(&shop.far));
    shop.cluster.api.delete_policy("shop", "web");
    shop.a.wait("all are let in", || shop.connects(&shop.near) && shop.connects(&shop.far));
    shop.a.wait("the end of the tables", || !shop.ruleset().contains("flannel-policy"));
}

#[test]
fn what_goes_from_one_node_to_another_has_to_be_allowed_by_the_policies_of_both_ends() {
    let on = ["--network-policy=on"];
    let shop = Shop::with(&on, &on);
    let web = shop.web.namespace().run(|| UdpSocket::bind(("0.0.0.0", PORT)).unwrap());
    let leaving = |to: Value| json!({"podSelector": {"matchLabels": {"app": "far"}}, "policyTypes": ["Egress"], "egress": to});
    let to_web = json!({"podSelector": {"matchLabels": {"app": "web"}}});

    // The sender's node alone refuses: the receiver has no policy.
    shop.put("far", leaving(json!([])));
    shop.b.wait("nothing leaves", || !shop.connects(&shop.far));
    assert!(
        !shop.hears(&web, &shop.far)
            && shop.hears_within(&web, &shop.near, LIMIT)
            && shop.is_let_in(&shop.near)
    );
    let tcp = json!([{"to": [to_web], "ports": [{"protocol": "TCP", "port": PORT}]}]);
    shop.put("far", leaving(tcp));
    shop.b.wait("TCP leaves", || shop.connects(&shop.far));
    assert!(!shop.hears(&web, &shop.far), "UDP was not allowed");
    shop.put("far", leaving(json!([{"to": [to_web]}])));
    shop.b.wait("UDP leaves", || shop.hears(&web, &shop.far));

    // The receiver's node alone refuses.
    shop.put("web", policy(&["near"]));
    shop.a.wait("the other node's pod is kept out", || !shop.connects(&shop.far));
    assert!(
        !shop.hears(&web, &shop.far)
            && shop.hears_within(&web, &shop.near, LIMIT)
            && shop.is_let_in(&shop.near)
    );
    shop.put("web", policy(&["far"]));
    shop.a.wait("the other node's pod is let in", || shop.connects(&shop.far) && shop.hears(&web, &shop.far));
    assert!(!shop.hears(&web, &shop.near) && !shop.connects(&shop.near));

    // Through a Service of the sender's node. Policies see the endpoint's address, and never the Service's.
    let service: SocketAddr = ([10, 96, 0, 10], 80).into();
    let kube_proxy = format!(
        "table ip services {{\nchain prerouting {{\ntype nat hook prerouting priority dstnat\nip daddr {} tcp dport 80 dnat to \
         {}\n}}\n}}\n",
        service.ip(),
        shop.server()
    );
    shop.b.node.namespace().command("nft").args(["-f", "-"]).input(kube_proxy.as_str()).ok().unwrap();
    assert!(dial(&shop.far, service, LIMIT).is_some());
    shop.put("far", leaving(json!([{"to": [{"ipBlock": {"cidr": "10.96.0.0/12"}}]}])));
    shop.b.wait("nothing leaves", || dial(&shop.far, service, ANSWER).is_none());
    shop.put("far", leaving(json!([{"to": [to_web]}])));
    shop.b.wait("TCP leaves", || dial(&shop.far, service, ANSWER).is_some());

    // Both agents judge at once, and both are gone with the policies.
    shop.cluster.api.delete_policy("shop", "far");
    shop.cluster.api.delete_policy("shop", "web");
    for member in [&shop.a, &shop.b] {
        member.wait("the end of the tables", || !member.show("nft list ruleset").contains("flannel-policy"));
    }
    assert!(shop.is_let_in(&shop.near) && shop.is_let_in(&shop.far));
}

#[test]
fn a_connection_that_a_policy_forbids_ends_and_one_that_it_allows_goes_on() {
    let shop = Shop::new("--network-policy=on");
    shop.put("web", policy(&["near", "far"]));
    shop.a.wait("the policy", || shop.ruleset().contains("chain in-"));
    let mut near = shop.connection(&shop.near);
    let mut far = shop.connection(&shop.far);
    let mut silent = shop.connection(&shop.near);
    assert!(carries(&mut near.0, &mut near.1, LIMIT) && carries(&mut far.0, &mut far.1, LIMIT));
    shop.put("web", policy(&["far"]));
    let begun = Instant::now();
    shop.a.wait("the end of the connection", || !carries(&mut near.0, &mut near.1, ANSWER));
    eprintln!("a forbidden connection ended after {:?}", begun.elapsed().saturating_sub(ANSWER));
    // Only the server speaks on this one.
    let ended = wait_for("the end of the silent connection", 3 * LIMIT, || {
        !carries(&mut silent.1, &mut silent.0, ANSWER)
    });
    ended.unwrap();
    eprintln!("one on which only the server speaks after {:?}", begun.elapsed().saturating_sub(ANSWER));
    assert!(carries(&mut far.0, &mut far.1, LIMIT) && carries(&mut far.1, &mut far.0, LIMIT));
}

#[test]
fn an_agent_that_is_killed_loses_no_connection_and_opens_none() {
    const KILLS: usize = 20;
    let mut shop = Shop::new("--network-policy=on");
    shop.put("web", policy(&["far"]));
    shop.a.wait("the policy", || !shop.connects(&shop.near));
    let (mut client, mut server) = shop.connection(&shop.far);
    let (over, sent, opened) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let (address, near) = (shop.server(), shop.near.namespace());
    let a = &mut shop.a;
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) && carries(&mut client, &mut server, LIMIT) {
                sent.fetch_add(1, Ordering::Relaxed);
                thread::sleep(Duration::from_millis(1));
            }
        });
        scope.spawn(|| {
            near.run(|| {
                while !over.load(Ordering::Relaxed) {
                    let open = TcpStream::connect_timeout(&address, HASTY).is_ok();
                    opened.fetch_add(u64::from(open), Ordering::Relaxed);
                }
            });
        });
        for kill in 0..KILLS {
            let before = sent.load(Ordering::Relaxed);
            a.agent.kill().unwrap();
            a.start_again();
            // A change of what is allowed, with each second one.
            let from: &[&str] = if kill % 2 == 0 { &["far", "other"] } else { &["far"] };
            shop.cluster.api.put_policy("shop", "web", policy(from));
            a.wait("traffic goes on", || sent.load(Ordering::Relaxed) > before + 10);
        }
        over.store(true, Ordering::Relaxed);
    });
    assert_eq!(opened.load(Ordering::Relaxed), 0, "forbidden connections were let through");
    assert!(carries(&mut client, &mut server, LIMIT));
}

#[test]
fn tables_that_another_program_flushes_are_put_back_counted_and_said() {
    let shop = Shop::new("--network-policy=on");
    shop.put("web", policy(&[]));
    shop.a.wait("the policy", || !shop.connects(&shop.near));
    shop.a.show("nft flush ruleset");
    let begun = Instant::now();
    shop.a.wait("the table", || shop.a.show("nft list tables").contains("inet flannel-policy"));
    eprintln!("the table was back after {:?}, nft's own time included", begun.elapsed());
    shop.a.wait_for_log("another program removed or changed the table of network policies");
    shop.a.wait("the repair in the figures", || shop.figure("flannel_policy_repairs_total") >= 1);
    assert!(!shop.connects(&shop.near) && !shop.connects(&shop.far));
}

#[test]
fn switched_off_and_cleaned_up_nothing_is_left() {
    let mut shop = Shop::new("--network-policy=on");
    shop.put("web", policy(&[]));
    shop.a.wait("the policy", || !shop.connects(&shop.near));
    let kept = format!("{}.policy", shop.a.node.subnet_file().display());
    assert!(std::path::Path::new(&kept).is_dir());
    shop.a.agent.terminate(LIMIT).unwrap();
    assert!(shop.ruleset().contains("flannel-policy"), "an agent that stops leaves what it enforces");
    shop.a.start_again_with(&["--network-policy=off"]);
    assert!(!shop.ruleset().contains("flannel-policy"), "{}", shop.ruleset());
    assert!(shop.is_let_in(&shop.near) && shop.is_let_in(&shop.far));
    assert!(!std::path::Path::new(&kept).exists());

    shop.a.agent.terminate(LIMIT).unwrap();
    shop.a.start_again_with(&["--network-policy=on"]);
    shop.a.wait("the policy", || !shop.connects(&shop.near));
    shop.a.agent.terminate(LIMIT).unwrap();
    let subnet_file = format!("--subnet-file={}", shop.a.node.subnet_file().display());
    let cleanup = |more: &[&str]| {
        let command = shop.a.node.namespace().command(flanneld());
        command.args(["cleanup", &subnet_file]).args(more).ok().unwrap()
    };
    let preview = cleanup(&["--dry-run"]);
    assert!(preview.contains("tables of network policies") && preview.contains(&kept), "{preview}");
    assert!(shop.ruleset().contains("flannel-policy"));
    let removed = cleanup(&[]);
    assert!(removed.contains("removed: tables of network policies"), "{removed}");
    assert!(!shop.ruleset().contains("flannel-policy"));
}

#[test]
fn a_bridge_that_is_made_anew_and_br_netfilter_are_followed() {
    let shop = Shop::new("--network-policy=on");
    shop.put("web", policy(&[]));
    shop.a.wait("the policy", || !shop.connects(&shop.near));
    let steered = || shop.ruleset().contains("table bridge flannel-policy");
    let switch = "/proc/sys/net/bridge/bridge-nf-call-iptables";
    let set = |value: &str| shop.a.node.namespace().run(|| std::fs::write(switch, value)).is_ok();
    if set("0") {
        shop.a.wait("steering", steered);
        assert!(!shop.connects(&shop.near));
        assert!(set("1"));
        shop.a.wait("the end of steering", || !shop.ruleset().contains("ether type ip "));
        assert!(!shop.connects(&shop.near));
        assert!(set("0"));
    }
    shop.a.wait("steering", steered);
    // The host routes what it gets from a pod for its neighbour, and would tell the pod of a shorter way each time.
    let far_end: SocketAddr = (shop.near.address(), PORT).into();
    let listener = shop.near.namespace().run(|| TcpListener::bind(("0.0.0.0", PORT)).unwrap());
    assert!(shop.web.namespace().run(|| TcpStream::connect_timeout(&far_end, LIMIT)).is_ok());
    drop(listener);
    let redirects = |snmp: String, what: &str| -> u64 {
        let lines: Vec<Vec<&str>> = snmp
            .lines()
            .filter(|line| line.starts_with("Icmp: "))
            .map(|line| line.split(' ').collect())
            .collect();
        let place = lines[0].iter().position(|name| *name == what).unwrap();
        lines[1][place].parse().unwrap()
    };
    let of_pod =
        |pod: &Pod| redirects(pod.command("cat").args(["/proc/net/snmp"]).ok().unwrap(), "InRedirects");
    assert!(redirects(shop.a.show("cat /proc/net/snmp"), "OutRedirects") > 0, "nothing is kept from pods");
    assert_eq!((of_pod(&shop.web), of_pod(&shop.near)), (0, 0));
    let other = "02:00:00:00:77:01";
    shop.a.ip(&format!("link set cni0 address {other}"));
    shop.a.wait("the bridge's new address", || shop.ruleset().contains(other));
    shop.a.wait("nobody is let in", || !shop.connects(&shop.near));
}

#[test]
fn a_node_is_announced_as_soon_as_its_policies_are_in_force_and_not_before() {
    let cluster = Kubernetes::new();
    let forbidden = Refusal {
        method: "GET",
        path: "/networkpolicies".into(),
        status: 403,
        message: "networkpolicies.networking.k8s.io is forbidden".into(),
    };
    cluster.api.behave(|behaviour| behaviour.refusals.push(forbidden));
    let a = cluster.start_with(&["--network-policy=on"]);
    let name = a.node.name();
    cluster.api.put_node(node(&name, &["10.244.1.0/24"]));
    a.wait("the reason, and nothing else, in readiness", || {
        a.agent.get("/readyz").is_ok_and(|(code, body)| {
            code == 503
                && body.matches("\"condition\"").count() == 1
                && body.contains("\"network-policy\"")
                && body.contains("kube-flannel-network-policy.yml")
        })
    });
    let announced = || {
        let node = cluster.api.node(&name).unwrap();
        let conditions = node["status"]["conditions"].as_array().cloned().unwrap_or_default();
        conditions.iter().any(|one| one["type"] == "NetworkUnavailable" && one["status"] == "False")
    };
    assert!(!announced(), "pods would be scheduled on a node that enforces nothing");
    cluster.api.behave(|behaviour| behaviour.refusals.clear());
    a.wait("the node's condition", announced);
}
