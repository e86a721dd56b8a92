//! A pod's start under network policies: the CNI plugin, the agent and the kernel, from ADD to the first packet.
//!
//! On one node run `friend` and `stranger`. Pods come one after another, of which policies say: only `friend` may be
//! asked, and only `friend` may ask. `stranger` sends to their addresses all the time, from before they have them.

use std::collections::BTreeSet;
use std::io::{self, BufRead, BufReader};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::thread;
use std::time::Duration;

use backends::testing::{Namespace, NsCommand, uninterrupted};
use serde_json::{Value, json};

use crate::bed::{LIMIT, Member, flanneld};
use crate::kubernetes::Kubernetes;

const PORT: u16 = 7777;
/// Starts for each way in which the delegate runs.
const STARTS: usize = 100;
/// How long something is waited for that must come.
const TIMEOUT: Duration = LIMIT;

/// A node with a policy for pods that are new, and an API server that it reads them from.
pub(crate) struct Site {
    pub(crate) cluster: Kubernetes,
}

impl Site {
    pub(crate) fn new() -> Self {
        let cluster = Kubernetes::new();
        cluster.api.put_namespace("shop", &[]);
        let friends = json!([{"podSelector": {"matchLabels": {"app": "friend"}}}]);
        let spec = json!({
            "podSelector": {"matchLabels": {"app": "new"}},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": friends}],
            "egress": [{"to": friends}],
        });
        cluster.api.put_policy("shop", "new", spec);
        Self { cluster }
    }

    pub(crate) fn join(&self) -> Member {
        self.cluster.join_with("10.244.1.0/24", &["--network-policy=on"])
    }

    pub(crate) fn put_pod(&self, member: &Member, name: &str, app: &str) {
        self.cluster.api.put_pod_object(json!({
            "metadata": {"namespace": "shop", "name": name, "uid": format!("uid-{name}"), "labels": {"app": app}},
            "spec": {"nodeName": member.node.name(), "containers": [{"name": "c"}]},
            "status": {"phase": "Pending"},
        }));
    }
}

/// The delegate's two ways.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum ResolvedRoute {
    InProcess,
    Program,
}

/// A pod that the plugin connects.
pub(crate) struct Started<'a> {
    member: &'a Member,
    name: String,
    way: ResolvedRoute,
    /// Whether the runtime says which pod it is.
    kubernetes: bool,
    /// How many seconds the plugin waits for the agent's word.
    patience: u8,
    pub(crate) namespace: Namespace,
}

/// The plugin under test, which is built beside flanneld.
fn plugin() -> PathBuf {
    let plugin = flanneld().with_file_name("flannel");
    assert!(plugin.exists(), "no {}: build the whole workspace", plugin.display());
    plugin
}

impl<'a> Started<'a> {
    pub(crate) fn new(member: &'a Member, name: &str, way: ResolvedRoute) -> Self {
        let namespace = Namespace::new().unwrap();
        namespace.ip("link set lo up").unwrap();
        Self { member, name: name.to_owned(), way, kubernetes: true, patience: 30, namespace }
    }

    /// Calls the plugin as a runtime of Kubernetes does; gives what it printed.
    pub(crate) fn call(&self, verb: &str) -> Result<Value, Value> {
        let output = self.command(verb).output().unwrap();
        let printed = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
        if output.status.success() { Ok(printed) } else { Err(printed) }
    }

    fn command(&self, verb: &str) -> NsCommand<'_> {
        let home = self.member.node.dir();
        let config = json!({
            "cniVersion": "1.0.0", "name": "cbr0", "type": "flannel",
            "subnetFile": self.member.node.subnet_file(), "dataDir": home.join("cni"), "policyWaitSeconds": self.patience,
            "delegate": {"hairpinMode": true, "isDefaultGateway": true, "ipMasq": false},
            "ipam": {"dataDir": home.join("ipam")},
        });
        let args = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME={name};K8S_POD_INFRA_CONTAINER_ID=c-{name};K8S_POD_UID=uid-{name}",
            name = self.name
        );
        let command = self.member.node.namespace().command(plugin());
        command
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", format!("c-{}", self.name))
            .env("CNI_NETNS", self.namespace.path())
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", "/usr/lib/cni")
            .env("CNI_ARGS", if self.kubernetes { args } else { String::new() })
            .env("FLANNEL_CNI_EXEC", if self.way == ResolvedRoute::Program { "1" } else { "0" })
            .input(config.to_string())
    }

    /// ADD that must succeed; gives the address.
    pub(crate) fn add(&self) -> IpAddr {
        let result = self.call("ADD").unwrap_or_else(|error| {
            panic!("ADD of {} ({:?}): {error}; log:\n{}", self.name, self.way, self.member.agent.log())
        });
        let address = result["ips"][0]["address"].as_str().unwrap();
        address.split('/').next().unwrap().parse().unwrap()
    }

    pub(crate) fn del(&self) {
        self.call("DEL").unwrap_or_else(|error| panic!("DEL of {}: {error}", self.name));
    }

    fn udp(&self, port: u16) -> UdpSocket {
        let socket = self.namespace.run(|| UdpSocket::bind(("0.0.0.0", port)).unwrap());
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        socket
    }
}

/// Who has sent something to this socket.
fn senders(socket: &UdpSocket) -> BTreeSet<IpAddr> {
    socket.set_nonblocking(true).unwrap();
    let mut senders = BTreeSet::new();
    let mut bytes = [0; 64];
    loop {
        match uninterrupted(|| socket.recv_from(&mut bytes)) {
            Ok((_, from)) => drop(senders.insert(from.ip())),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return senders,
            // ICMP errors about what was sent before.
            Err(_) => {}
        }
    }
}

/// Sends to the next addresses that pods will have, until it is told to stop.
fn flood(socket: &UdpSocket, next: &AtomicU8, over: &AtomicBool) {
    while !over.load(Ordering::Relaxed) {
        let octet = next.load(Ordering::Relaxed);
        for octet in octet..octet.saturating_add(3) {
            let _ = socket.send_to(b"stranger", SocketAddr::from(([10, 244, 1, octet], PORT)));
        }
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn of_new_pods_no_forbidden_packet_passes_and_no_allowed_one_is_lost() {
    let site = Site::new();
    let member = site.join();
    let [friend, stranger] = ["friend", "stranger"].map(|name| {
        site.put_pod(&member, name, name);
        Started::new(&member, name, ResolvedRoute::InProcess)
    });
    let (friends, strangers) = (friend.add(), stranger.add());
    let (friends_socket, strangers_socket) = (friend.udp(PORT), stranger.udp(PORT));
    let (next, over) = (AtomicU8::new(4), AtomicBool::new(false));
    thread::scope(|scope| {
        scope.spawn(|| flood(&strangers_socket, &next, &over));
        let _stop = Stop(&over);
        for (number, way) in [ResolvedRoute::InProcess, ResolvedRoute::Program]
            .into_iter()
            .cycle()
            .take(2 * STARTS)
            .enumerate()
        {
            let what = format!("start {number} ({way:?})");
            let name = format!("new-{number}");
            site.put_pod(&member, &name, "new");
            let pod = Started::new(&member, &name, way);
            let address = pod.add();
            let IpAddr::V4(octets) = address else { panic!("{address}") };
            // The flood is for this one and those that come after it.
            next.store(octets.octets()[3], Ordering::Relaxed);
            // From here on a container would run.
            let socket = pod.udp(PORT);
            socket.send_to(b"to stranger", (strangers, PORT)).unwrap();
            socket.send_to(b"to friend", (friends, PORT)).unwrap();
            let mut bytes = [0; 64];
            // The first packet is allowed, and so is its answer.
            let heard = uninterrupted(|| friends_socket.recv_from(&mut bytes)).map(|(_, from)| from.ip());
            assert_eq!(heard.ok(), Some(address), "{what}: the first packet to friend");
            friends_socket.send_to(b"answer", (address, PORT)).unwrap();
            let heard = uninterrupted(|| socket.recv_from(&mut bytes)).map(|(_, from)| from.ip());
            assert_eq!(
                heard.ok(),
                Some(friends),
                "{what}: the answer, and nothing of the stranger before it"
            );
            // A connection that friend begins.
            let asking = friend.udp(0);
            asking.send_to(b"question", (address, PORT)).unwrap();
            let heard = uninterrupted(|| socket.recv_from(&mut bytes)).map(|(_, from)| from.ip());
            assert_eq!(heard.ok(), Some(friends), "{what}: the first packet of friend");
            assert_eq!(senders(&socket), BTreeSet::new(), "{what}: from the stranger");
            pod.del();
        }
    });
    // The last of the flood may be on its way to itself.
    let heard = senders(&strangers_socket);
    assert!(heard.is_empty(), "the stranger heard {heard:?}");
}

/// Sets a flag when it goes away, also by a panic.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn an_add_waits_for_the_agent_and_fails_with_code_11_while_it_is_away() {
    let site = Site::new();
    let mut member = site.join();
    let socket = member.node.subnet_file().with_file_name("policy.sock");
    assert!(socket.exists());
    member.agent.kill().unwrap();
    site.put_pod(&member, "new-1", "new");
    for way in [ResolvedRoute::InProcess, ResolvedRoute::Program] {
        let pod = Started { patience: 5, ..Started::new(&member, "new-1", way) };
        let error = pod.call("ADD").unwrap_err();
        assert_eq!(error["code"], 11, "{error}");
        assert!(error["msg"].as_str().unwrap().contains(&*socket.to_string_lossy()), "{error}");
        assert_eq!(links(&pod.namespace), ["lo"]);
        // DEL never depends on the agent.
        pod.del();
    }
    member.start_again();
    for way in [ResolvedRoute::InProcess, ResolvedRoute::Program] {
        let pod = Started::new(&member, "new-1", way);
        pod.add();
        pod.del();
    }
}

pub(crate) fn links(namespace: &Namespace) -> Vec<String> {
    let shown = namespace.command("ip").args(["-json", "link"]).ok().unwrap();
    let links: Vec<Value> = serde_json::from_str(&shown).unwrap();
    links.iter().map(|link| link["ifname"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_pod_that_the_api_does_not_have_gets_no_network_and_a_container_that_is_no_pod_does() {
    let site = Site::new();
    let member = site.join();
    let pod = Started { patience: 5, ..Started::new(&member, "nobody", ResolvedRoute::InProcess) };
    let error = pod.call("ADD").unwrap_err();
    assert_eq!(error["code"], 11, "{error}");
    assert!(error["msg"].as_str().unwrap().contains("the API has no pod shop/nobody"), "{error}");
    pod.del();
    let container =
        Started { kubernetes: false, ..Started::new(&member, "container", ResolvedRoute::InProcess) };
    container.add();
    container.del();
}

/// What a command of flanneld prints on the node, and whether it succeeds.
fn flanneld_policy(member: &Member, args: &[&str]) -> (bool, String) {
    let command = member.node.namespace().command(flanneld()).arg("policy").args(args);
    let output =
        command.arg(format!("--subnet-file={}", member.node.subnet_file().display())).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(text).unwrap())
}

#[test]
fn a_connection_is_explained_and_pods_are_listed_by_the_agent() {
    let site = Site::new();
    let member = site.join();
    let [friend, stranger, new] =
        [("friend", "friend"), ("stranger", "stranger"), ("new-1", "new")].map(|(name, app)| {
            site.put_pod(&member, name, app);
            Started::new(&member, name, ResolvedRoute::InProcess)
        });
    let addresses = [&friend, &stranger, &new].map(Started::add);
    let explained = |from: &str, to: &str| {
        let (success, text) = flanneld_policy(&member, &["explain", from, to]);
        assert!(success, "{text}");
        text
    };
    let text = explained("shop/friend", "shop/new-1:80");
    assert!(text.contains("allowed by shop/new ingress[0].from[0] (podSelector app=friend)"), "{text}");
    assert!(text.contains(&format!("shop/new-1 ({}, node {})", addresses[2], member.node.name())), "{text}");
    assert!(text.contains("kernel   node") && text.contains("as computed"), "{text}");
    let by_address = explained(&addresses[0].to_string(), &format!("{}:80", addresses[2]));
    assert_eq!(by_address, text);
    let text = explained("shop/new-1", "shop/stranger:80");
    assert!(text.contains("isolated by shop/new") && text.contains("verdict  DENIED"), "{text}");
    assert!(
        text.contains(
            "remedy   allow TCP 80 to app=stranger in a policy of namespace shop that selects app=new"
        ),
        "{text}"
    );
    // A host's address, and one of somebody far away.
    let text = explained(&member.node.address().to_string(), "shop/new-1:80");
    assert!(text.contains("a pod and its own node always reach each other"), "{text}");
    let text = explained("192.0.2.77", "shop/new-1:80");
    assert!(text.contains("from an ipBlock with 192.0.2.77"), "{text}");
    let (_, text) = flanneld_policy(&member, &["list", "shop/new-1"]);
    assert_eq!(
        text,
        format!(
            "shop/new-1 ({})\n  egress   isolated by shop/new\n  ingress  isolated by shop/new\n",
            addresses[2]
        )
    );
    let (_, text) = flanneld_policy(&member, &["list"]);
    assert!(text.contains("shop/friend (") && text.contains("shop/stranger ("), "{text}");
    for (args, part) in [
        (&["explain", "shop/nobody", "shop/new-1:80"][..], "there is no pod shop/nobody"),
        (&["explain", "shop/friend", "shop/new-1"], "has no port: write"),
        (&["list", "shop/nobody"], "this node has no pod shop/nobody"),
        (&["denied"], "--network-policy-log=GROUP"),
    ] {
        let (success, text) = flanneld_policy(&member, args);
        assert!(!success && text.contains(part), "{args:?}: {text}");
    }
    [friend, stranger, new].iter().for_each(Started::del);
}

#[test]
fn a_service_and_a_pod_of_another_node_are_known_by_their_addresses() {
    let site = Site::new();
    let member = site.join();
    site.put_pod(&member, "new-1", "new");
    let new = Started::new(&member, "new-1", ResolvedRoute::InProcess);
    new.add();
    site.cluster.api.put_service("shop", "web", &["10.96.0.10"]);
    site.cluster.api.put_pod_object(json!({
        "metadata": {"namespace": "shop", "name": "remote", "uid": "remote", "labels": {"app": "friend"}},
        "spec": {"nodeName": "elsewhere"},
        "status": {"phase": "Running", "podIP": "10.244.9.7"},
    }));
    let explained = |to: &str| flanneld_policy(&member, &["explain", "shop/new-1", to]).1;
    let text = explained("10.96.0.10:80");
    assert!(text.contains("policies see the endpoint that shop/web leads to"), "{text}");
    let text = explained("10.244.9.7:80");
    assert!(text.contains("shop/remote (10.244.9.7, node elsewhere)"), "{text}");
    assert!(text.contains("verdict  allowed"), "{text}");
    new.del();
}

#[test]
fn policies_that_are_switched_off_leave_no_socket() {
    let site = Site::new();
    let mut member = site.join();
    let file = member.node.subnet_file();
    let named = |file: &Path| std::fs::read_to_string(file).unwrap().contains("FLANNEL_POLICY_SOCKET=");
    let socket = file.with_file_name("policy.sock");
    assert!(named(&file) && socket.exists());
    member.agent.terminate(LIMIT).unwrap();
    member.start_again_with(&["--network-policy=off"]);
    assert!(!named(&file) && !socket.exists());
    let pod = Started::new(&member, "any", ResolvedRoute::InProcess);
    pod.add();
    pod.del();
}

#[test]
fn refused_packets_are_shown_with_the_names_of_pods() {
    let site = Site::new();
    let member = site.cluster.join_with("10.244.1.0/24", &["--network-policy=on", "--network-policy-log=7"]);
    let [stranger, new] = [("stranger", "stranger"), ("new-1", "new")].map(|(name, app)| {
        site.put_pod(&member, name, app);
        Started::new(&member, name, ResolvedRoute::InProcess)
    });
    let (strangers, news) = (stranger.add(), new.add());
    let command = member.node.namespace().command(flanneld()).args(["policy", "denied"]);
    let command = command.arg(format!("--subnet-file={}", member.node.subnet_file().display()));
    let mut shown = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(shown.take_stdout().unwrap()).lines();
    let over = AtomicBool::new(false);
    let mut next = |part: &str| {
        let line = lines.find(|line| line.as_ref().is_ok_and(|line| line.contains(part)));
        line.expect("it goes on").unwrap()
    };
    thread::scope(|scope| {
        let _stop = Stop(&over);
        // Again and again: the listener doesn't tell when it listens.
        scope.spawn(|| {
            let (from, to) = (stranger.udp(0), new.udp(0));
            while !over.load(Ordering::Relaxed) {
                let _ = from.send_to(b"in", (news, PORT));
                let _ = to.send_to(b"out", (strangers, PORT));
                thread::sleep(Duration::from_millis(50));
            }
        });
        let (stranger, new) = (format!("shop/stranger ({strangers})"), format!("shop/new-1 ({news})"));
        assert_eq!(next("ingress"), format!("DENIED ingress {stranger} → {new} UDP {PORT}"));
        assert_eq!(next("egress"), format!("DENIED egress  {new} → {stranger} UDP {PORT}"));
    });
    [stranger, new].iter().for_each(Started::del);
}
