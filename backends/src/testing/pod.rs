//! Pods: namespaces behind a node, attached by the CNI plugins or by hand.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, ensure};
use ipnet::IpNet;
use serde_json::{Value, json};
use subnet::Family;
use subnet::env_file::gateway;
use tempfile::TempDir;

use super::fabric::Node;
use super::namespace::Namespace;
use super::process::{NsCommand, require};

/// Where the distribution keeps the CNI plugins that ours delegates to.
const DELEGATES: &str = "/usr/lib/cni";

/// A namespace with `eth0` behind a node; it is detached on drop.
pub struct Pod {
    namespace: Namespace,
    addresses: Vec<IpNet>,
    attached: Option<Cni>,
    // What the pod hangs on lives as long as the pod.
    _node: (Arc<Namespace>, Arc<TempDir>),
}

/// What the container runtime would remember for DEL.
struct Cni {
    plugin: PathBuf,
    container: String,
    config: String,
}

impl Pod {
    /// A pod attached as a container runtime would: ADD of the CNI plugin `plugin`, which reads the node's
    /// `subnet.env`, with the shipped configuration (contract §8.2) and state below the node's directory.
    pub fn cni(node: &Node, plugin: &Path) -> anyhow::Result<Self> {
        let delegate = json!({ "hairpinMode": true, "isDefaultGateway": true, "ipMasq": false });
        Self::cni_with(node, plugin, &delegate)
    }

    /// The same with another `delegate`.
    pub fn cni_with(node: &Node, plugin: &Path, delegate: &Value) -> anyhow::Result<Self> {
        require(plugin)?;
        for delegate in ["bridge", "host-local"] {
            let path = Path::new(DELEGATES).join(delegate);
            ensure!(path.exists(), "no {}: apt-get install containernetworking-plugins", path.display());
        }
        let config = json!({
            "cniVersion": "1.0.0",
            "name": "cbr0",
            "type": "flannel",
            "subnetFile": node.subnet_file(),
            "dataDir": node.dir().join("cni"),
            "delegate": delegate,
            "ipam": { "dataDir": node.dir().join("ipam") },
        });
        let attachment = Cni {
            plugin: plugin.to_owned(),
            container: format!("pod-{}-{}", process::id(), next_number()),
            config: config.to_string(),
        };
        let mut pod = Self {
            namespace: Namespace::new()?,
            addresses: Vec::new(),
            attached: None,
            _node: node.shared(),
        };
        let attachment = pod.attached.insert(attachment);
        let answer = attachment.command("ADD", node.namespace(), &pod.namespace).ok()?;
        pod.addresses = addresses(&answer)?;
        Ok(pod)
    }

    /// A pod with the address `address`, attached to the bridge `cni0` of its node without any CNI plugin.
    ///
    /// The bridge is made with the first pod and has the first address of the pod's subnet, which is the
    /// pod's default gateway. The MTU is 1450, what VXLAN leaves of 1500.
    pub fn wired(node: &Node, address: IpNet) -> anyhow::Result<Self> {
        Self::wired_with(node, &[address])
    }

    /// The same with one address of either family, or of both.
    pub fn wired_with(node: &Node, addresses: &[IpNet]) -> anyhow::Result<Self> {
        let families: BTreeSet<Family> = addresses.iter().map(|net| Family::of(net.addr())).collect();
        ensure!(
            !addresses.is_empty() && families.len() == addresses.len(),
            "a pod can't be wired with {addresses:?}: give one address, or one of each family"
        );
        let namespace = Namespace::new()?;
        let port = format!("pod{}", next_number());
        let host = node.namespace();
        if !host.command("ip").args(["link", "show", "cni0"]).output()?.status.success() {
            host.ip("link add cni0 mtu 1450 type bridge mcast_snooping 0\nlink set cni0 up")?;
        }
        let (mut outside, mut inside) = (String::new(), String::new());
        for address in addresses {
            let gateway = gateway(*address);
            let (nodad, all) = match address {
                IpNet::V4(_) => ("", "0.0.0.0/0"),
                IpNet::V6(_) => (" nodad", "::/0"),
            };
            outside += &format!("addr replace {gateway}/{} dev cni0{nodad}\n", address.prefix_len());
            inside += &format!("addr add {address} dev eth0{nodad}\nroute add {all} via {gateway}\n");
        }
        host.ip(&format!(
            "{outside}\
             link add {port} mtu 1450 type veth peer name eth0 mtu 1450 netns {}\n\
             link set {port} master cni0 up",
            namespace.path().display()
        ))?;
        namespace.sysctl("ipv6/conf/all/accept_dad", "0")?;
        namespace.sysctl("ipv6/conf/eth0/accept_dad", "0")?;
        namespace.ip(&format!("link set eth0 up\n{inside}"))?;
        host.wait_for_port(&port)?;
        Ok(Self { namespace, addresses: addresses.to_vec(), attached: None, _node: node.shared() })
    }

    /// The pod's first address.
    pub fn address(&self) -> IpAddr {
        self.addresses[0].addr()
    }

    /// All its addresses with their prefix lengths.
    pub fn addresses(&self) -> &[IpNet] {
        &self.addresses
    }

    /// Its namespace.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// A program to be run in the pod.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> NsCommand<'_> {
        self.namespace.command(program)
    }

    /// Detaches the pod as a container runtime would (DEL); again does nothing.
    pub fn detach(&mut self) -> anyhow::Result<()> {
        match self.attached.take() {
            Some(cni) => cni.command("DEL", &self._node.0, &self.namespace).ok().map(drop),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for Pod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pod").field("addresses", &self.addresses).finish_non_exhaustive()
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        if let Err(error) = self.detach() {
            eprintln!("detaching {self:?}: {error:#}");
        }
    }
}

impl Cni {
    fn command<'ns>(&self, verb: &str, node: &'ns Namespace, pod: &Namespace) -> NsCommand<'ns> {
        let home = self.plugin.parent().unwrap_or(Path::new("."));
        node.command(&self.plugin)
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", &self.container)
            .env("CNI_NETNS", pod.path())
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", format!("{}:{DELEGATES}", home.display()))
            .input(self.config.as_str())
    }
}

/// The `ips` of a CNI result.
fn addresses(answer: &str) -> anyhow::Result<Vec<IpNet>> {
    let result: Value =
        serde_json::from_str(answer).with_context(|| format!("the CNI result {answer:?} is not JSON"))?;
    let found: Vec<IpNet> = result["ips"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|ip| ip["address"].as_str()?.parse().ok())
        .collect();
    ensure!(!found.is_empty(), "the CNI result has no addresses: {answer}");
    Ok(found)
}

fn next_number() -> u32 {
    static NUMBER: AtomicU32 = AtomicU32::new(1);
    NUMBER.fetch_add(1, Ordering::Relaxed)
}
