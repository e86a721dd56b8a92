//! Agents that keep their leases in Kubernetes, with a scripted API server in place of a real one.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use backends::testing::Fabric;
use subnet::testing::{ApiServer, node};

use crate::bed::{LIMIT, Member, VXLAN};

/// A fabric with an API server that all nodes reach.
pub(crate) struct Kubernetes {
    fabric: Fabric,
    pub(crate) api: ApiServer,
    files: tempfile::TempDir,
}

impl Kubernetes {
    pub(crate) fn new() -> Self {
        let fabric = Fabric::new().unwrap();
        let at = (fabric.address(), 0);
        let listener = fabric.switch().run(|| TcpListener::bind(at).unwrap());
        let files = tempfile::tempdir().unwrap();
        std::fs::write(files.path().join("net-conf.json"), VXLAN).unwrap();
        std::fs::write(files.path().join("cni-conf.json"), "{\"name\":\"cbr0\"}").unwrap();
        Self { fabric, api: ApiServer::start(listener).unwrap(), files }
    }

    /// An agent that was only just started, for the node object called as the node.
    fn start(&self) -> Member {
        self.start_with(&[])
    }

    fn start_with(&self, more: &[&str]) -> Member {
        let node = self.fabric.node().unwrap();
        let files = self.files.path().display();
        let conflist = node.dir().join("net.d/10-flannel.conflist");
        // Go finds the node's name in the environment or through its pod; here it is through the pod.
        self.api.put_pod("kube-flannel", &node.name(), &node.name());
        let mut args = vec![
            "--kube-subnet-mgr".to_owned(),
            format!("--kube-api-url={}", self.api.url()),
            format!("--net-config-path={files}/net-conf.json"),
            format!("--cni-conf={files}/cni-conf.json:{}", conflist.display()),
            "--ip-masq".to_owned(),
        ];
        args.extend(more.iter().map(|arg| (*arg).to_owned()));
        let name = node.name();
        Member::start_with_env(node, &args, &[("POD_NAMESPACE", "kube-flannel"), ("POD_NAME", &name)])
    }

    fn join(&self, cidr: &str) -> Member {
        self.join_with(cidr, &[])
    }

    /// An agent that is ready, with these arguments besides.
    pub(crate) fn join_with(&self, cidr: &str, more: &[&str]) -> Member {
        let mut member = self.start_with(more);
        self.api.put_node(node(&member.node.name(), &[cidr]));
        member.agent.wait_ready(LIMIT).unwrap();
        member
    }

    fn annotation(&self, member: &Member, key: &str) -> Option<String> {
        let node = self.api.node(&member.node.name())?;
        let key = format!("flannel.alpha.coreos.com/{key}");
        node["metadata"]["annotations"][&key].as_str().map(str::to_owned)
    }
}

#[test]
fn nodes_with_nothing_but_an_api_server_carry_their_pods_packets() {
    let cluster = Kubernetes::new();
    let (a, b) = (cluster.join("10.244.1.0/24"), cluster.join("10.244.2.0/24"));
    assert_eq!(
        (a.subnet().to_string(), b.subnet().to_string()),
        ("10.244.1.0/24".into(), "10.244.2.0/24".into())
    );
    let (pod_a, pod_b) = (a.pod(), b.pod());
    a.wait("echoes between pods", || pod_a.namespace().reaches(pod_b.address()).unwrap());
    assert_eq!(cluster.annotation(&a, "kube-subnet-manager").as_deref(), Some("true"));
    assert_eq!(cluster.annotation(&a, "public-ip"), Some(a.node.address().to_string()));
    let data = cluster.annotation(&a, "backend-data").unwrap();
    let mac = a.show("ip -o link show flannel.1");
    let mac = mac.split("link/ether ").nth(1).unwrap()[..17].to_owned();
    assert_eq!(data, format!("{{\"VNI\":1,\"VtepMAC\":\"{mac}\"}}"));
    a.wait("the node's condition", || {
        let node = cluster.api.node(&a.node.name()).unwrap();
        let conditions = node["status"]["conditions"].as_array().cloned().unwrap_or_default();
        conditions.iter().any(|one| one["type"] == "NetworkUnavailable" && one["status"] == "False")
    });
    assert!(a.node.dir().join("net.d/10-flannel.conflist").exists());

    // A node that leaves is gone everywhere, and one whose public address is overwritten is followed.
    cluster.api.annotate(&b.node.name(), "flannel.alpha.coreos.com/public-ip-overwrite", Some("172.31.0.77"));
    a.wait("the overwritten address", || a.show("bridge fdb show dev flannel.1").contains("172.31.0.77"));
    cluster.api.delete_node(&b.node.name());
    a.wait("the end of the peer", || !a.node.has_route(b.subnet()).unwrap());
}

#[test]
fn an_address_that_the_api_server_was_reached_from_may_go() {
    /// Less than a request waits for an answer, and than a watch may be silent.
    const SOON: Duration = Duration::from_secs(10);
    let cluster = Kubernetes::new();
    let (a, b) = (cluster.join("10.244.1.0/24"), cluster.join("10.244.2.0/24"));
    let fdb = |member: &Member| member.show("bridge fdb show dev flannel.1");
    for (changed, other, last) in [(&a, &b, 77), (&b, &a, 78)] {
        other.wait("the peer", || fdb(other).contains(&format!("dst {} ", changed.node.address())));
        let start = Instant::now();
        changed.node.readdress([172, 31, 0, last].into(), changed.node.address_v6()).unwrap();
        other.wait("the new address", || fdb(other).contains(&format!("dst 172.31.0.{last} ")));
        // The second time it is heard of by the node that was the first to change.
        assert!(start.elapsed() < SOON, "{:?}: {}", start.elapsed(), changed.agent.log());
    }
}

#[test]
fn a_node_without_a_subnet_waits_says_so_and_starts_when_it_has_one() {
    let cluster = Kubernetes::new();
    let mut a = cluster.start();
    cluster.api.put_node(node(&a.node.name(), &[]));
    a.wait("the remedy in readiness", || {
        a.agent.get("/readyz").is_ok_and(|(code, body)| code == 503 && body.contains("allocate-node-cidrs"))
    });
    assert!(!a.node.dir().join("net.d").exists(), "no conflist before an ADD can succeed");
    cluster.api.put_node(node(&a.node.name(), &["10.244.5.0/24"]));
    a.agent.wait_ready(LIMIT).unwrap();
    assert_eq!(a.subnet().to_string(), "10.244.5.0/24");
}

#[test]
fn a_restart_without_the_api_server_brings_the_data_path_up_from_what_was_kept() {
    let cluster = Kubernetes::new();
    let (mut a, b) = (cluster.join("10.244.1.0/24"), cluster.join("10.244.2.0/24"));
    let (pod_a, pod_b) = (a.pod(), b.pod());
    a.wait("echoes between pods", || pod_a.namespace().reaches(pod_b.address()).unwrap());
    let state = std::fs::read_dir(a.node.dir()).unwrap().map(|entry| entry.unwrap().path());
    let state = state.into_iter().find(|path| path.to_string_lossy().ends_with(".state.json")).unwrap();
    a.wait("the peer in what is kept", || std::fs::read_to_string(&state).unwrap().contains("10.244.2.0/24"));
    cluster.api.behave(|behaviour| behaviour.down = true);
    cluster.api.disconnect();
    a.agent.kill().unwrap();
    a.ip("link del flannel.1");
    a.start_again();
    a.wait("echoes between pods", || pod_a.namespace().reaches(pod_b.address()).unwrap());
    assert!(a.agent.get("/readyz?verbose").unwrap().1.contains("as they were saved"));
    cluster.api.behave(|behaviour| behaviour.down = false);
    let c = cluster.join("10.244.3.0/24");
    a.wait("the new peer", || a.node.has_route(c.subnet()).unwrap());
}
