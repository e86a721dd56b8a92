//! What the kernel refuses or forgets: the reason has a name, and nothing of somebody else's is touched.

#![expect(clippy::unwrap_used, reason = "a test panics where something is not as it should be")]

use std::net::{Ipv4Addr, UdpSocket};

use backends::kernel::netlink::Netlink;
use backends::state::{Link, LinkIdentity, LinkSettings, Route, VxlanIdentity};
use backends::testing::{Fabric, Namespace, Node};
use backends::{Kernel, KernelChange, KernelState, Name, Scope, converge};
use subnet::{Family, Mac};

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

/// A node's tunnel device over `eth0`.
fn vxlan(machine: &Node, kernel: &mut Netlink) -> Link {
    let host = kernel.observe(&KernelState::default(), &Scope::default()).unwrap().host;
    let identity = VxlanIdentity { vni: 1, port: None, gbp: false, family: Family::V4, foreign_modes: false };
    let settings = LinkSettings {
        mac: Mac([2, 0, 0, 0, 0, 1]),
        lower: host.link("eth0").unwrap().index,
        local: machine.address().into(),
        accept_local: None,
        ..LinkSettings::plain(1450)
    };
    Link { identity: LinkIdentity::Vxlan(identity), settings }
}

fn open(machine: &Node) -> Netlink {
    machine.namespace().run(|| Netlink::open().unwrap())
}

/// What the kernel says to the making of the device, which is left down then.
fn refusal(machine: &Node) -> String {
    let mut kernel = open(machine);
    let link = vxlan(machine, &mut kernel);
    let changes = [KernelChange::AddLink(name("flannel.1"), link)];
    let failures = machine.namespace().run(|| kernel.apply(&changes));
    let text = failures[0].1.to_string();
    machine.namespace().ip("link del flannel.1").unwrap();
    text
}

#[test]
fn who_holds_the_port_of_the_tunnel_is_named() {
    let fabric = Fabric::new().unwrap();
    let machine = fabric.node().unwrap();
    let socket = machine.namespace().run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 8472)).unwrap());
    let text = refusal(&machine);
    let pid = format!("(pid {})", std::process::id());
    assert!(text.contains("Address already in use") && text.contains(&pid), "{text}");
    assert!(text.contains("UDP port 8472") && text.contains("Backend.Port"), "{text}");
    drop(socket);

    machine
        .namespace()
        .ip("link add cilium_vxlan type vxlan external dstport 8472\nlink set cilium_vxlan up")
        .unwrap();
    let text = refusal(&machine);
    assert!(text.contains("the VXLAN device cilium_vxlan has UDP port 8472"), "{text}");
}

#[test]
fn a_device_with_the_same_vni_and_port_is_named() {
    let fabric = Fabric::new().unwrap();
    let machine = fabric.node().unwrap();
    machine
        .namespace()
        .ip("link add other0 type vxlan id 1 dstport 8472 dev eth0\nlink set other0 up")
        .unwrap();
    let mut kernel = open(&machine);
    let link = vxlan(&machine, &mut kernel);
    let failures =
        machine.namespace().run(|| kernel.apply(&[KernelChange::AddLink(name("flannel.1"), link)]));
    let text = failures[0].1.to_string();
    assert!(text.contains("other0 has this VNI and port") && text.contains("Backend.VNI"), "{text}");
}

#[test]
fn a_tun_device_that_another_process_holds_gets_neither_address_nor_route() {
    let fabric = Fabric::new().unwrap();
    let machine = fabric.node().unwrap();
    let tun = || Link { identity: LinkIdentity::Tun, settings: LinkSettings::plain(1472) };
    let device = name("flannel0");
    // The holder: another opener of the device in this process is for the kernel another one.
    let mut holder = open(&machine);
    let changes = [
        KernelChange::AddLink(device, tun()),
        KernelChange::AddAddress(device, "10.244.1.0/32".parse().unwrap()),
    ];
    assert!(machine.namespace().run(|| holder.apply(&changes)).is_empty());

    let mut kernel = open(&machine);
    let net = "10.99.0.0/16".parse().unwrap();
    let desired = KernelState {
        links: [(device, tun())].into(),
        addresses: [(device, "10.99.1.0/32".parse().unwrap())].into(),
        routes: [(net, Route { dev: Some(device), ..Route::ours(net) })].into(),
        ..KernelState::default()
    };
    let scope = Scope { networks: vec![net], ..Scope::default() };
    let report = machine.namespace().run(|| converge(&mut kernel, &desired, &scope).unwrap());
    let failed: Vec<String> = report.failed.iter().map(ToString::to_string).collect();
    assert!(report.applied.is_empty() && failed.len() == 1, "{:?} {failed:?}", report.applied);
    let pid = format!("(pid {}) holds flannel0", std::process::id());
    assert!(failed[0].contains(&pid), "{failed:?}");
    let shown = machine.namespace().command("ip").args(["-4", "address", "show", "flannel0"]).ok().unwrap();
    assert!(shown.contains("10.244.1.0/32") && !shown.contains("10.99"), "{shown}");
}

#[test]
fn a_device_whose_mtu_was_too_small_for_ipv6_takes_no_router_advertisements_afterwards() {
    let fabric = Fabric::new().unwrap();
    let machine = fabric.node().unwrap();
    let mut kernel = open(&machine);
    let link = vxlan(&machine, &mut kernel);
    let desired = KernelState { links: [(name("flannel.1"), link)].into(), ..KernelState::default() };
    let mut settle = || {
        let report = machine.namespace().run(|| converge(&mut kernel, &desired, &Scope::default()).unwrap());
        assert!(report.settled && report.failed.is_empty(), "{:?}", report.failed);
    };
    let accept_ra = || {
        let path = "/proc/sys/net/ipv6/conf/flannel.1/accept_ra";
        machine.namespace().run(|| std::fs::read_to_string(path).unwrap().trim().to_owned())
    };
    settle();
    assert_eq!(accept_ra(), "0");
    machine.namespace().ip("link set flannel.1 mtu 1200").unwrap();
    settle();
    assert_eq!(accept_ra(), "0");
    // Somebody else makes it large again, or sets it.
    machine.namespace().ip("link set flannel.1 mtu 1200\nlink set flannel.1 mtu 1450").unwrap();
    assert_eq!(accept_ra(), "1", "the kernel has forgotten");
    settle();
    assert_eq!(accept_ra(), "0");
}

#[test]
fn a_namespace_without_routing_tables_has_no_routes() {
    let namespace = Namespace::new().unwrap();
    let observed = namespace.run(|| {
        // A new namespace inside, in which nothing was ever up.
        std::thread::spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            Netlink::open().unwrap().observe(&KernelState::default(), &Scope::default())
        })
        .join()
        .unwrap()
    });
    assert_eq!(observed.unwrap().host.defaults, []);
}
