//! The fast path beside network policies: a flow that a policy no longer allows ends with the policy's transaction, although no chain sees
//! its packets, and is offloaded again once it is allowed.

use std::fs;
use std::net::UdpSocket;
use std::process::{Command, Stdio};
use std::time::Duration;

use backends::testing::{Pod, uninterrupted};
use serde_json::{Value, json};

use super::{VXLAN, WAITS, at, datagrams, is_offloaded};
use crate::bed::{LIMIT, Member};
use crate::kubernetes::Kubernetes;
use crate::require_kernel;

/// Of the flow.
const FLOW: u16 = 7087;
/// Of new flows that are judged as it is.
const OTHER: u16 = 7088;
/// Of a flow that is always allowed.
const ALLOWED: u16 = 7089;

/// Datagrams in a row; a socket has room for so many.
const MANY: usize = 100;

/// A client's socket and a server's.
struct Flow([UdpSocket; 2]);

impl Flow {
    fn new(client: &Pod, server: &Pod, port: u16) -> Self {
        let listens = server.namespace().run(|| UdpSocket::bind(at(server, port))).unwrap();
        let flow = Self([Self::client(client, server, port), listens]);
        flow.0[1].set_read_timeout(Some(LIMIT)).unwrap();
        flow
    }

    /// A socket of another source port.
    fn client(client: &Pod, server: &Pod, port: u16) -> UdpSocket {
        let socket = client.namespace().run(|| UdpSocket::bind(at(client, 0))).unwrap();
        socket.connect(at(server, port)).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        socket
    }

    /// Has it seen in both directions, so that it is established.
    fn answer(&self) {
        let [client, server] = &self.0;
        client.send(&[7; 64]).unwrap();
        let mut buffer = [0; 64];
        let (_, from) = uninterrupted(|| server.recv_from(&mut buffer)).unwrap();
        server.send_to(&[7; 64], from).unwrap();
        uninterrupted(|| client.recv(&mut buffer)).unwrap();
    }
}

/// Whether any of so many datagrams that `from` sends arrives at `to`. One that is always allowed is sent behind them on the same way, and once
/// that is there, they are there or lost.
fn any_arrives(from: &UdpSocket, to: &UdpSocket, count: usize, allowed: &Flow) -> bool {
    let mut buffer = [0; 64];
    (0..count).for_each(|_| assert_eq!(from.send(&[7; 64]).unwrap(), 64));
    datagrams(&allowed.0[0], &allowed.0[1], 1);
    to.set_nonblocking(true).unwrap();
    let arrived = std::iter::from_fn(|| to.recv(&mut buffer).ok()).count();
    to.set_nonblocking(false).unwrap();
    arrived > 0
}

/// Has this thread on one processor, so that what it sends passes the kernel's queues in its order.
fn stay_on_one_processor() {
    let thread = fs::read_link("/proc/thread-self").unwrap();
    let id = thread.file_name().unwrap();
    assert!(
        Command::new("taskset").args(["-cp", "0"]).arg(id).stdout(Stdio::null()).status().unwrap().success()
    );
}

/// Isolates the pod in one direction, but for these ports.
fn only(app: &str, direction: &str, ports: &[u16]) -> Value {
    let ports: Vec<Value> = ports.iter().map(|port| json!({"protocol": "UDP", "port": port})).collect();
    let key = if direction == "Egress" { "egress" } else { "ingress" };
    json!({"podSelector": {"matchLabels": {"app": app}}, "policyTypes": [direction], key: [{"ports": ports}]})
}

#[test]
fn a_policy_ends_an_offloaded_flow_at_once_and_what_is_allowed_again_is_offloaded_again() {
    require_kernel("6.");
    stay_on_one_processor();
    let cluster = Kubernetes::with(VXLAN);
    cluster.api.put_namespace("shop", &[]);
    let join = |cidr| cluster.join_with(cidr, &["--network-policy=on", "--v=1"]);
    let members = [join("10.244.1.0/24"), join("10.244.2.0/24")];
    let pods = members.each_ref().map(Member::pod);
    for (name, member, pod) in [("client", &members[0], &pods[0]), ("server", &members[1], &pods[1])] {
        cluster.api.put_pod_object(json!({
            "metadata": {"namespace": "shop", "name": name, "uid": name, "labels": {"app": name}},
            "spec": {"nodeName": member.node.name()},
            "status": {"phase": "Running", "podIP": pod.address().to_string()},
        }));
    }
    members[0].wait("the first echo", || pods[0].namespace().reaches(pods[1].address()).unwrap());
    let [flow, other, allowed] = [FLOW, OTHER, ALLOWED].map(|port| Flow::new(&pods[0], &pods[1], port));
    let waits = |member: &Member| member.show("nft list ruleset").contains(WAITS);
    let [from, to] = &flow.0;
    // The client's node judges what leaves the client, the server's what reaches the server.
    for (member, app, direction) in [(&members[0], "client", "Egress"), (&members[1], "server", "Ingress")] {
        flow.answer();
        member.wait("the flow in the flowtable", || {
            datagrams(from, to, MANY);
            is_offloaded(member, FLOW)
        });

        cluster.api.put_policy("shop", app, only(app, direction, &[ALLOWED]));
        member.wait("the policy judges a new flow", || {
            let new = Flow::client(&pods[0], &pods[1], OTHER);
            !any_arrives(&new, &other.0[1], 5, &allowed)
        });
        // The kernel's rules count before its commit of the transaction has ended, and with it the flowtable. The next transaction begins
        // after that.
        member.node.namespace().command("nft").args(["add", "table", "ip", "next"]).ok().unwrap();
        assert!(!any_arrives(from, to, MANY, &allowed), "{direction}: the offloaded flow was not ended");
        assert!(!is_offloaded(member, FLOW), "{direction}: what is not allowed is offloaded");
        // It may be armed already, by the flow that is allowed.
        member.wait("a table again", || waits(member) || !super::devices(member).is_empty());
        assert!(
            !any_arrives(from, to, MANY, &allowed),
            "{direction}: the table that was made again lets it pass"
        );
        assert!(!is_offloaded(member, FLOW), "{direction}: what is not allowed was offloaded again");

        cluster.api.put_policy("shop", app, only(app, direction, &[FLOW, ALLOWED]));
        member.wait("the flow is allowed", || any_arrives(from, to, 1, &allowed));
        flow.answer();
        member.wait("the flow in the flowtable again", || {
            datagrams(from, to, MANY);
            is_offloaded(member, FLOW)
        });
        cluster.api.delete_policy("shop", app);
    }
}
