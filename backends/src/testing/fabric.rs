//! Nodes on a common link: a switch in a namespace, and node namespaces plugged into it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use anyhow::{Context, ensure};
use ipnet::IpNet;
use tempfile::TempDir;

use super::namespace::Namespace;

/// The underlay: 172.31.0.0/24 and fd31::/64, where the switch itself is 172.31.0.254 and fd31::fe.
pub struct Fabric {
    switch: Arc<Namespace>,
    nodes: AtomicU8,
}

/// A node of a cluster: a namespace with `eth0` on the fabric, its default routes and forwarding.
pub struct Node {
    number: u8,
    mtu: u32,
    namespace: Arc<Namespace>,
    switch: Arc<Namespace>,
    dir: Arc<TempDir>,
}

/// What may differ from node to node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeOptions {
    /// MTU of `eth0`; the switch passes up to 9000 bytes.
    pub mtu: u32,
}

impl Default for NodeOptions {
    fn default() -> Self {
        Self { mtu: 1500 }
    }
}

impl Fabric {
    /// A switch without nodes.
    pub fn new() -> anyhow::Result<Self> {
        let switch = Arc::new(Namespace::new()?);
        switch.sysctl("ipv6/conf/default/accept_dad", "0")?;
        // Without an address of its own it has that of one of its ports, and another one when nodes come and
        // go: whoever knows the old one can't reach it for half a minute.
        switch.ip("link add br0 address 02:00:ac:1f:00:fe mtu 1500 type bridge mcast_snooping 0\n\
                   addr add 172.31.0.254/24 dev br0\n\
                   addr add fd31::fe/64 dev br0 nodad\n\
                   link set br0 up")?;
        // Set again after creation, the MTU is no longer derived from the ports'.
        switch.ip("link set br0 mtu 1500")?;
        Ok(Self { switch, nodes: AtomicU8::new(0) })
    }

    /// A node with the next free address: 172.31.0.1, 172.31.0.2, …
    pub fn node(&self) -> anyhow::Result<Node> {
        self.node_with(NodeOptions::default())
    }

    /// A node that differs from the ordinary.
    pub fn node_with(&self, options: NodeOptions) -> anyhow::Result<Node> {
        let number = self.nodes.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        ensure!(number < 254, "a fabric has room for 253 nodes");
        let namespace = Arc::new(Namespace::new()?);
        for (key, value) in [
            ("ipv4/ip_forward", "1"),
            ("ipv4/conf/all/rp_filter", "2"),
            ("ipv4/conf/default/rp_filter", "2"),
            ("ipv6/conf/all/forwarding", "1"),
            ("ipv6/conf/default/forwarding", "1"),
            ("ipv6/conf/default/accept_dad", "0"),
        ] {
            namespace.sysctl(key, value)?;
        }
        namespace.ip(&format!(
            "link add eth0 mtu {} type veth peer name port{number} mtu 9000 netns {}",
            options.mtu,
            self.switch.path().display()
        ))?;
        self.switch.ip(&format!("link set port{number} master br0 up"))?;
        let dir = Arc::new(
            tempfile::Builder::new()
                .prefix("flannel-node-")
                .tempdir()
                .context("no temporary directory for a node")?,
        );
        let node = Node { number, mtu: options.mtu, namespace, switch: Arc::clone(&self.switch), dir };
        node.link_up()?;
        Ok(node)
    }

    /// The namespace of the switch, for a server that all nodes reach or for looking at their traffic.
    pub fn switch(&self) -> &Namespace {
        &self.switch
    }

    pub(super) fn shared(&self) -> Arc<Namespace> {
        Arc::clone(&self.switch)
    }

    /// The switch's own address.
    pub fn address(&self) -> Ipv4Addr {
        Ipv4Addr::new(172, 31, 0, 254)
    }
}

impl Node {
    /// Its name, `node1` for the first.
    pub fn name(&self) -> String {
        format!("node{}", self.number)
    }

    /// Its address on the fabric.
    pub fn address(&self) -> Ipv4Addr {
        Ipv4Addr::new(172, 31, 0, self.number)
    }

    /// Its IPv6 address on the fabric.
    pub fn address_v6(&self) -> Ipv6Addr {
        Ipv6Addr::new(0xfd31, 0, 0, 0, 0, 0, 0, self.number.into())
    }

    /// MTU of `eth0` when the node was made.
    pub fn mtu(&self) -> u32 {
        self.mtu
    }

    /// Its namespace.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Where the node's agent writes `subnet.env` for the CNI plugin.
    pub fn subnet_file(&self) -> PathBuf {
        self.dir().join("subnet.env")
    }

    /// A directory for the node's files; it goes with the node and its pods.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Sets `eth0` down: its routes are lost.
    pub fn link_down(&self) -> anyhow::Result<()> {
        self.namespace.ip("link set eth0 down")
    }

    /// Sets `eth0` up, with the addresses and default routes that it had in the beginning.
    pub fn link_up(&self) -> anyhow::Result<()> {
        self.namespace.ip(&format!(
            "addr replace {}/24 dev eth0\n\
             link set eth0 up\n\
             addr replace {}/64 dev eth0 nodad\n\
             route replace default via 172.31.0.254\n\
             route replace ::/0 via fd31::fe",
            self.address(),
            self.address_v6()
        ))
    }

    /// Sets the MTU of `eth0`.
    pub fn set_mtu(&self, mtu: u32) -> anyhow::Result<()> {
        self.namespace.ip(&format!("link set eth0 mtu {mtu}"))
    }

    /// Pulls the cable: `eth0` stays up but has no carrier.
    pub fn unplug(&self) -> anyhow::Result<()> {
        self.switch.ip(&format!("link set port{} down", self.number))
    }

    /// Puts the cable back.
    pub fn plug(&self) -> anyhow::Result<()> {
        self.switch.ip(&format!("link set port{} up", self.number))
    }

    /// Whether the node's main table has a route to exactly `destination`.
    pub fn has_route(&self, destination: IpNet) -> anyhow::Result<bool> {
        let family = if matches!(destination.addr(), IpAddr::V4(_)) { "-4" } else { "-6" };
        let exact = destination.to_string();
        let routes = self.namespace.command("ip").args([family, "route", "show", "exact", &exact]).ok()?;
        Ok(!routes.trim().is_empty())
    }

    pub(super) fn shared(&self) -> (Arc<Namespace>, Arc<TempDir>) {
        (Arc::clone(&self.namespace), Arc::clone(&self.dir))
    }
}
