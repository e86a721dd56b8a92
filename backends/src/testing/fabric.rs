//! Nodes on a common link, or behind a router: a switch in a namespace, and node namespaces plugged into it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use anyhow::{Context, ensure};
use ipnet::IpNet;
use tempfile::TempDir;

use super::namespace::Namespace;

/// The switch's own number on each of its links.
const SWITCH: u8 = 254;

/// The underlay: 172.31.0.0/24 and fd31::/64, where the switch itself is 172.31.0.254 and fd31::fe.
///
/// With the first remote node comes a second link, 172.31.1.0/24 and fd31:0:0:1::/64, with the switch as the
/// router between both.
pub struct Fabric {
    switch: Arc<Namespace>,
    nodes: AtomicU8,
    /// Whether the second link is there.
    routes: Mutex<bool>,
}

/// A link of the fabric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Segment {
    Near = 0,
    Remote = 1,
}

/// A node of a cluster: a namespace with `eth0` on the fabric, its default routes and forwarding.
pub struct Node {
    number: u8,
    segment: Segment,
    /// Those of `eth0` now.
    addresses: Mutex<(Ipv4Addr, Ipv6Addr)>,
    mtu: u32,
    /// Whether the cable is in its port.
    plugged: Mutex<bool>,
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
        Segment::Near.lay(&switch)?;
        Ok(Self { switch, nodes: AtomicU8::new(0), routes: Mutex::new(false) })
    }

    /// A node with the next free address: 172.31.0.1, 172.31.0.2, …
    pub fn node(&self) -> anyhow::Result<Node> {
        self.node_with(NodeOptions::default())
    }

    /// A node that differs from the ordinary.
    pub fn node_with(&self, options: NodeOptions) -> anyhow::Result<Node> {
        self.plugged(Segment::Near, options)
    }

    /// A node on the other side of a router: 172.31.1.3 and fd31:0:0:1::3 if it is the third of all nodes.
    ///
    /// The router passes 1500 bytes.
    pub fn remote_node(&self) -> anyhow::Result<Node> {
        let mut routes = lock(&self.routes);
        if !*routes {
            self.switch.sysctl("ipv4/ip_forward", "1")?;
            self.switch.sysctl("ipv6/conf/all/forwarding", "1")?;
            Segment::Remote.lay(&self.switch)?;
            *routes = true;
        }
        drop(routes);
        self.plugged(Segment::Remote, NodeOptions::default())
    }

    fn plugged(&self, segment: Segment, options: NodeOptions) -> anyhow::Result<Node> {
        let number = self.nodes.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        ensure!(number < 254, "a fabric has room for 253 nodes");
        let namespace = Arc::new(Namespace::new()?);
        for (key, value) in [
            ("ipv4/ip_forward", "1"),
            ("ipv4/conf/all/rp_filter", "2"),
            ("ipv4/conf/default/rp_filter", "2"),
            // As systemd has it: with the first of several addresses, the others don't go.
            ("ipv4/conf/all/promote_secondaries", "1"),
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
        self.switch.ip(&format!("link set port{number} master {} up", segment.bridge()))?;
        let dir = Arc::new(
            tempfile::Builder::new()
                .prefix("flannel-node-")
                .tempdir()
                .context("no temporary directory for a node")?,
        );
        let node = Node {
            number,
            segment,
            addresses: Mutex::new((segment.v4(number), segment.v6(number))),
            mtu: options.mtu,
            plugged: Mutex::new(true),
            namespace,
            switch: Arc::clone(&self.switch),
            dir,
        };
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
        Segment::Near.v4(SWITCH)
    }
}

impl Segment {
    fn bridge(self) -> String {
        format!("br{}", self as u8)
    }

    fn v4(self, host: u8) -> Ipv4Addr {
        Ipv4Addr::new(172, 31, self as u8, host)
    }

    fn v6(self, host: u8) -> Ipv6Addr {
        Ipv6Addr::new(0xfd31, 0, 0, self as u16, 0, 0, 0, host.into())
    }

    /// Makes the link's bridge, with the switch's own addresses on it.
    fn lay(self, switch: &Namespace) -> anyhow::Result<()> {
        // Without a hardware address of its own it has that of one of its ports, and another one when nodes
        // come and go: a neighbour that knows the old one can't reach it for half a minute.
        // Set again after creation, the MTU is no longer derived from the ports'.
        switch.ip(&format!(
            "link add {bridge} address 02:00:ac:1f:{:02x}:fe mtu 1500 type bridge mcast_snooping 0\n\
             addr add {}/24 dev {bridge}\n\
             addr add {}/64 dev {bridge} nodad\n\
             link set {bridge} up\n\
             link set {bridge} mtu 1500",
            self as u8,
            self.v4(SWITCH),
            self.v6(SWITCH),
            bridge = self.bridge()
        ))
    }

    /// Lines of `ip` that make the switch a node's router.
    fn default_routes(self) -> String {
        format!("route replace default via {}\nroute replace ::/0 via {}\n", self.v4(SWITCH), self.v6(SWITCH))
    }
}

impl Node {
    /// Its name, `node1` for the first.
    pub fn name(&self) -> String {
        format!("node{}", self.number)
    }

    /// Its address on the fabric.
    pub fn address(&self) -> Ipv4Addr {
        lock(&self.addresses).0
    }

    /// Its IPv6 address on the fabric.
    pub fn address_v6(&self) -> Ipv6Addr {
        lock(&self.addresses).1
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

    /// Sets `eth0` up, with its addresses and default routes.
    pub fn link_up(&self) -> anyhow::Result<()> {
        self.namespace.ip(&format!(
            "addr replace {}/24 dev eth0\n\
             link set eth0 up\n\
             addr replace {}/64 dev eth0 nodad\n\
             {}",
            self.address(),
            self.address_v6(),
            self.segment.default_routes()
        ))?;
        if *lock(&self.plugged) { self.switch.wait_for_port(&format!("port{}", self.number)) } else { Ok(()) }
    }

    /// Gives `eth0` other addresses of the same link, as a DHCP server might: first the new ones come, then
    /// the old ones go, and the default routes stay. An address that is the old one stays.
    pub fn readdress(&self, v4: Ipv4Addr, v6: Ipv6Addr) -> anyhow::Result<()> {
        let (bridge, router) = (self.segment.bridge(), (self.segment.v4(SWITCH), self.segment.v6(SWITCH)));
        ensure!(
            v4.octets()[..3] == router.0.octets()[..3] && v6.segments()[..4] == router.1.segments()[..4],
            "{} is on {bridge}: give it addresses of {}/24 and {}/64, not {v4} and {v6}",
            self.name(),
            self.segment.v4(0),
            self.segment.v6(0)
        );
        let mut addresses = lock(&self.addresses);
        let (mut come, mut go) = (String::new(), String::new());
        if addresses.0 != v4 {
            come += &format!("addr add {v4}/24 dev eth0\n");
            go += &format!("addr del {}/24 dev eth0\n", addresses.0);
        }
        if addresses.1 != v6 {
            come += &format!("addr add {v6}/64 dev eth0 nodad\n");
            go += &format!("addr del {}/64 dev eth0\n", addresses.1);
        }
        self.namespace.ip(&format!("{come}{go}{}", self.segment.default_routes()))?;
        *addresses = (v4, v6);
        Ok(())
    }

    /// Sets the MTU of `eth0`.
    pub fn set_mtu(&self, mtu: u32) -> anyhow::Result<()> {
        self.namespace.ip(&format!("link set eth0 mtu {mtu}"))
    }

    /// Pulls the cable: `eth0` stays up but has no carrier.
    pub fn unplug(&self) -> anyhow::Result<()> {
        *lock(&self.plugged) = false;
        self.switch.ip(&format!("link set port{} down", self.number))
    }

    /// Puts the cable back.
    pub fn plug(&self) -> anyhow::Result<()> {
        *lock(&self.plugged) = true;
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

fn lock<T>(value: &Mutex<T>) -> MutexGuard<'_, T> {
    value.lock().expect("no holder of this lock panics")
}
