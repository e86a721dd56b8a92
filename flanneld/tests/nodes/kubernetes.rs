//! A cluster whose agents keep their leases in Kubernetes, with a scripted API server in place of a real one.

use std::net::TcpListener;

use backends::testing::{Fabric, Node};
use subnet::testing::{ApiServer, node};

use crate::bed::{LIMIT, Member, VXLAN};

/// A fabric with an API server that all nodes reach.
pub(crate) struct Kubernetes {
    pub(crate) fabric: Fabric,
    pub(crate) api: ApiServer,
    files: tempfile::TempDir,
}

impl Kubernetes {
    pub(crate) fn new() -> Self {
        Self::with(VXLAN)
    }

    /// With this network configuration.
    pub(crate) fn with(config: &str) -> Self {
        let fabric = Fabric::new().unwrap();
        let at = (fabric.address(), 0);
        let listener = fabric.switch().run(|| TcpListener::bind(at).unwrap());
        let files = tempfile::tempdir().unwrap();
        std::fs::write(files.path().join("net-conf.json"), config).unwrap();
        std::fs::write(files.path().join("cni-conf.json"), "{\"name\":\"cbr0\"}").unwrap();
        Self { fabric, api: ApiServer::start(listener).unwrap(), files }
    }

    /// An agent that was only just started, for the node object called as the node.
    pub(crate) fn start(&self) -> Member {
        self.start_with(&[])
    }

    pub(crate) fn start_with(&self, more: &[&str]) -> Member {
        let node = self.fabric.node().unwrap();
        let name = node.name();
        self.start_as(node, &name, more)
    }

    /// The same for a node object of another name.
    pub(crate) fn start_as(&self, node: Node, object: &str, more: &[&str]) -> Member {
        let files = self.files.path().display();
        let conflist = node.dir().join("net.d/10-flannel.conflist");
        // Go finds the node's name in the environment or through its pod; here it is through the pod.
        self.api.put_pod("kube-flannel", &node.name(), object);
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

    pub(crate) fn join(&self, cidr: &str) -> Member {
        self.join_with(cidr, &[])
    }

    /// An agent that is ready, with these arguments besides.
    pub(crate) fn join_with(&self, cidr: &str, more: &[&str]) -> Member {
        let mut member = self.start_with(more);
        self.api.put_node(node(&member.node.name(), &[cidr]));
        member.agent.wait_ready(LIMIT).unwrap();
        member
    }

    pub(crate) fn annotation(&self, member: &Member, key: &str) -> Option<String> {
        self.annotation_of(&member.node.name(), key)
    }

    pub(crate) fn annotation_of(&self, name: &str, key: &str) -> Option<String> {
        let node = self.api.node(name)?;
        let key = format!("flannel.alpha.coreos.com/{key}");
        node["metadata"]["annotations"][&key].as_str().map(str::to_owned)
    }
}
