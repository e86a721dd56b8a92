//! Services by IPVS, as kube-proxy's mode `ipvs` and kube-router have them, with network policies and with the fast path.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::time::Duration;

use backends::testing::{Namespace, Pod};
use ipnet::IpNet;
use serde_json::{Value, json};

use crate::bed::{Cluster, Member, VXLAN};
use crate::exchange::Exchange;
use crate::kubernetes::Kubernetes;
use crate::require_kernel;

/// The address and port of the Service, and the port of the pods behind it.
const SERVICE: &str = "10.96.0.10:80";
const PORT: u16 = 8080;
/// Longer than an answer takes, even if the first SYN is lost, which is sent again after a second.
const ANSWER: Duration = Duration::from_secs(2);

fn load_ipvs() {
    require_kernel("6.");
    let modules = ["-d", "/run/modules", "-a", "ip_vs", "ip_vs_rr"];
    assert!(Command::new("/sbin/modprobe").args(modules).status().unwrap().success());
}

/// Has the node send what comes for `service` to this pod, as kube-proxy does.
fn serve(member: &Member, service: &str, pod: SocketAddr) {
    let namespace = member.node.namespace();
    namespace.sysctl("ipv4/vs/conntrack", "1").unwrap();
    let (address, _) = service.split_once(':').unwrap();
    if address.starts_with("10.96.") {
        member.ip(&format!("addr replace {address}/32 dev lo"));
    }
    member.show(&format!("ipvsadm -A -t {service} -s rr"));
    member.show(&format!("ipvsadm -a -t {service} -r {pod} -m"));
}

fn pod_at(member: &Member, last: u8) -> Pod {
    let subnet = member.subnet().to_string();
    let address: IpNet = subnet.replace(".0/24", &format!(".{last}/24")).parse().unwrap();
    Pod::wired(&member.node, address).unwrap()
}

fn connects(from: &Namespace, to: SocketAddr) -> bool {
    from.run(|| TcpStream::connect_timeout(&to, ANSWER)).is_ok()
}

/// Two nodes with policies; on the first `client` and `near`, on the second `far`. Clients reach them by the Service of the first.
struct Shop {
    cluster: Kubernetes,
    a: Member,
    b: Member,
    client: Pod,
    near: Pod,
    far: Pod,
    _listeners: [TcpListener; 2],
}

impl Shop {
    fn new() -> Self {
        let cluster = Kubernetes::new();
        cluster.api.put_namespace("shop", &[]);
        let on = ["--network-policy=on"];
        let (a, b) = (cluster.join_with("10.244.1.0/24", &on), cluster.join_with("10.244.2.0/24", &on));
        let (client, near, far) = (pod_at(&a, 2), pod_at(&a, 3), pod_at(&b, 2));
        let listeners =
            [&near, &far].map(|pod| pod.namespace().run(|| TcpListener::bind(("0.0.0.0", PORT)).unwrap()));
        for (name, member, pod) in [("client", &a, &client), ("near", &a, &near), ("far", &b, &far)] {
            cluster.api.put_pod_object(json!({
                "metadata": {"namespace": "shop", "name": name, "uid": name, "labels": {"app": name}},
                "spec": {"nodeName": member.node.name()},
                "status": {"phase": "Running", "podIP": pod.address().to_string()},
            }));
        }
        Self { cluster, a, b, client, near, far, _listeners: listeners }
    }

    fn served(&self) -> bool {
        connects(self.client.namespace(), SERVICE.parse().unwrap())
    }

    fn put(&self, name: &str, spec: Value) {
        self.cluster.api.put_policy("shop", name, spec);
    }
}

fn pods(app: &str) -> Value {
    json!({"podSelector": {"matchLabels": {"app": app}}})
}

/// What `app` may send to, or be sent by.
fn policy(app: &str, direction: &str, peers: &[Value]) -> Value {
    let (key, peer) = if direction == "Egress" { ("egress", "to") } else { ("ingress", "from") };
    let rules = if peers.is_empty() { json!([]) } else { json!([{peer: peers}]) };
    json!({"podSelector": {"matchLabels": {"app": app}}, "policyTypes": [direction], key: rules})
}

#[test]
fn policies_judge_the_pod_behind_the_service_in_both_directions_and_for_clients_outside() {
    load_ipvs();
    let shop = Shop::new();
    let (a, b) = (&shop.a, &shop.b);
    let target = |pod: &Pod| SocketAddr::new(pod.address(), PORT);
    serve(a, SERVICE, target(&shop.far));
    a.wait("the Service leads to the other node's pod", || shop.served());

    // The client's node judges what the client sends, by the pod that IPVS chose.
    shop.put("client", policy("client", "Egress", &[]));
    a.wait("nothing leaves", || !shop.served());
    shop.put("client", policy("client", "Egress", &[pods("far")]));
    a.wait("what goes to the pod leaves", || shop.served());
    shop.put("client", policy("client", "Egress", &[json!({"ipBlock": {"cidr": "10.96.0.0/12"}})]));
    a.wait("a Service's address allows nothing", || !shop.served());
    shop.cluster.api.delete_policy("shop", "client");
    a.wait("what nobody isolates leaves", || shop.served());

    // The pod's node judges what the pod is sent, by the client.
    shop.put("far", policy("far", "Ingress", &[pods("near")]));
    b.wait("another pod is kept out", || !shop.served());
    shop.put("far", policy("far", "Ingress", &[pods("client")]));
    b.wait("the client is let in", || shop.served());

    // A pod of this node, behind a Service and behind a port of the node.
    let port = format!("{}:30080", a.node.address());
    a.show(&format!("ipvsadm -d -t {SERVICE} -r {}", target(&shop.far)));
    a.show(&format!("ipvsadm -a -t {SERVICE} -r {} -m", target(&shop.near)));
    serve(a, &port, target(&shop.near));
    let outside = shop.cluster.fabric.node().unwrap();
    let from_outside = || connects(outside.namespace(), port.parse().unwrap());
    a.wait("the Services lead to this node's pod", || shop.served() && from_outside());
    shop.put("near", policy("near", "Ingress", &[]));
    a.wait("nobody is let in", || !shop.served() && !from_outside());
    assert!(connects(a.node.namespace(), target(&shop.near)), "the own node always is");
    shop.put("near", policy("near", "Ingress", &[pods("client")]));
    a.wait("the client is let in", || shop.served());
    assert!(!from_outside());
    let block = json!({"ipBlock": {"cidr": format!("{}/32", outside.address())}});
    shop.put("near", policy("near", "Ingress", &[block]));
    a.wait("the client outside is let in", from_outside);
    assert!(!shop.served());
}

#[test]
fn a_connection_to_a_service_goes_on_with_the_fast_path() {
    load_ipvs();
    let cluster = Cluster::new(&VXLAN.replace("\"Backend\"", "\"FastPath\":true,\"Backend\""));
    let members = [cluster.join(), cluster.join()];
    let pods = members.each_ref().map(Member::pod);
    serve(&members[0], SERVICE, SocketAddr::new(pods[1].address(), PORT));
    let exchange = Exchange::start(pods[0].namespace(), pods[1].namespace(), SERVICE.parse().unwrap(), PORT);
    for _ in 0..20 {
        exchange.goes_on(&members[0], "what was sent before");
    }
    exchange.finish();
    let flows = members[1].node.namespace().show("nft list table ip flannel-fast-path").unwrap();
    assert!(flows.contains("flow add @pods"), "{flows}");
}
