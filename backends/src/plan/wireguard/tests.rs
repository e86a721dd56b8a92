use super::*;
use crate::plan::backend::BackendId;
use crate::state::diff::diff;
use subnet::{BackendConfig, NetworkConfig, Subnets};

const V4: &str = "10.244.0.0/16";
const V6: &str = "fd00::/48";

fn addrs(texts: &[&str]) -> PublicAddrs {
    texts.iter().map(|text| text.parse::<IpAddr>().unwrap()).collect()
}

fn node(mtu: u32) -> Node {
    let public = addrs(&["192.0.2.1", "2001:db8::1"]);
    let underlay = Underlay { index: 7, name: "eth0".parse().unwrap(), mtu };
    Node { underlay, public, local: public, source: public, direct: Default::default() }
}

fn key(number: u8) -> PublicKey {
    PublicKey::new([number + 2; 32]).unwrap()
}

fn wireguard(networks: &[&str], keys: &str) -> Result<Wireguard, BackendError> {
    let json = format!(r#"{{"Network":"10.244.0.0/16","Backend":{{"Type":"wireguard"{keys}}}}}"#);
    let BackendConfig::Wireguard(config) = NetworkConfig::parse(&json).unwrap().backend else { panic!() };
    let networks = networks.iter().map(|text| text.parse().unwrap()).collect();
    Wireguard::new(config, Arc::new(Identity::generate().unwrap()), networks)
}

/// A peer with both families.
fn peers(number: u8, public: &[&str], ports: (u16, u16)) -> Vec<Peer> {
    let public = addrs(public);
    let subnets = [format!("10.244.{number}.0/24"), format!("fd00:0:0:{number}::/64")];
    let of = |subnet: &String| {
        let subnet: IpNet = subnet.parse().unwrap();
        let family = Family::of(subnet.addr());
        let port = Some(if family == Family::V4 { ports.0 } else { ports.1 });
        let data = WireguardPeer {
            key: key(number),
            port,
            main_port: Some(ports.0),
            public,
            opening: Opening::Either,
        };
        let at = public.get(family)?;
        let (mac, backend) = (Mac([0; 6]), BackendId::default());
        Some(Peer { subnet, public: at, mac, wireguard: Some(data), backend })
    };
    subnets.iter().filter_map(of).collect()
}

fn plan(networks: &[&str], keys: &str, peers: &[Peer]) -> KernelState {
    let own: Subnets =
        ["10.244.1.0/24", "fd00:0:0:1::/64"].iter().map(|net| net.parse::<IpNet>().unwrap()).collect();
    let (node, macs) = (node(1500), Macs::default());
    let keys = format!(r#","Userspace":"always"{keys}"#);
    wireguard(networks, &keys).unwrap().plan(PlanInput {
        node: &node,
        own: &own,
        macs: &macs,
        peers,
        all: peers,
    })
}

fn words(state: &KernelState) -> Vec<String> {
    let all = diff(state, &KernelState::default());
    all.iter().map(|change| change.to_string().split(" key ").next().unwrap().to_owned()).collect()
}

/// Each peer of a device: its number, where it is, and how many subnets it has.
fn reached(state: &KernelState, device: &str) -> Vec<(u8, String, usize)> {
    let settings = state.forwarding[&device.parse().unwrap()].wireguard.clone().unwrap();
    let of = |peer: &PeerSettings| (peer.key.bytes()[0] - 2, peer.endpoint.to_string(), peer.allowed.len());
    settings.peers.iter().map(of).collect()
}

#[test]
fn each_family_has_a_tunnel_of_its_own() {
    let peers = peers(2, &["192.0.2.2", "2001:db8::2"], (51820, 51821));
    let state = plan(&[V4, V6], "", &peers);
    assert_eq!(
        words(&state),
        [
            "link add flannel-wg type tun mtu 1420",
            "link add flannel-wg-v6 type tun mtu 1420",
            "address add 10.244.1.0/32 dev flannel-wg",
            "address add fd00:0:0:1::/128 dev flannel-wg-v6",
            "forwarding set flannel-wg local 192.0.2.1:51820 mtu 1420 peers 1",
            "forwarding set flannel-wg-v6 local [2001:db8::1]:51821 mtu 1420 peers 1",
            "route replace 10.244.0.0/16 dev flannel-wg proto 70",
            "route replace fd00::/48 dev flannel-wg-v6 proto 70",
        ]
    );
    assert_eq!(reached(&state, "flannel-wg"), [(2, "192.0.2.2:51820".to_owned(), 1)]);
    assert_eq!(reached(&state, "flannel-wg-v6"), [(2, "[2001:db8::2]:51821".to_owned(), 1)]);
    let found = known(&state);
    assert_eq!((found.len(), found[&peers[0].subnet].key), (2, key(2)));
    assert_eq!(words(&plan(&[V6], "", &peers)).len(), 4);
}

#[test]
fn one_tunnel_for_both_families_has_each_node_once_and_leads_where_the_mode_says() {
    let public = |v4: &'static str, v6: &'static str| [v4, v6];
    let far = peers(2, &public("198.51.100.2", "2001:db8::2"), (7, 8));
    let private = peers(3, &public("10.9.9.3", "2001:db8::3"), (7, 8));
    let local = peers(4, &public("10.9.9.4", "fd77::4"), (7, 8));
    let v4_alone = peers(5, &["198.51.100.5"], (7, 8));
    let all: Vec<Peer> = [far, private, local, v4_alone].concat();
    for (mode, expected) in [
        ("auto", ["198.51.100.2:7", "[2001:db8::3]:7", "10.9.9.4:7", "198.51.100.5:7"].as_slice()),
        ("ipv4", &["198.51.100.2:7", "10.9.9.3:7", "10.9.9.4:7", "198.51.100.5:7"]),
        ("ipv6", &["[2001:db8::2]:7", "[2001:db8::3]:7", "[fd77::4]:7"]),
    ] {
        let state = plan(&[V4, V6], &format!(r#","Mode":"{mode}""#), &all);
        let reached = reached(&state, "flannel-wg");
        assert_eq!(reached.iter().map(|(_, at, _)| at.as_str()).collect::<Vec<_>>(), expected, "{mode}");
        assert!(reached.iter().all(|(number, _, nets)| *nets == if *number == 5 { 1 } else { 2 }), "{mode}");
        assert_eq!(state.links.len(), 1);
        let words = words(&state).join("\n");
        let sockets = match mode {
            "auto" => "local 192.0.2.1:51820 and [2001:db8::1]:51820",
            "ipv4" => "local 192.0.2.1:51820 mtu",
            _ => "local [2001:db8::1]:51820 mtu",
        };
        assert!(words.contains(sockets), "{words}");
    }
}

#[test]
fn what_is_announced_is_where_it_is_listened() {
    let ports = |networks: &[&str], keys: &str| {
        let backend = wireguard(networks, keys).unwrap();
        let attachment = backend.attachment(&Macs::default());
        let all = Family::BOTH.map(|family| attachment.wireguard(family).map(|data| data.port.unwrap()));
        let listened = Family::BOTH.map(|family| backend.tunnel_port(family).map(|port| port.number));
        assert_eq!(all, listened);
        all
    };
    assert_eq!(ports(&[V4, V6], ""), [Some(51820), Some(51821)]);
    assert_eq!(ports(&[V4, V6], r#","Mode":"auto""#), [Some(51820), Some(51820)]);
    assert_eq!(ports(&[V4], r#","ListenPort":5"#), [Some(5), None]);
    assert_eq!(ports(&[V6], r#","ListenPortV6":6"#), [None, Some(6)]);
}

#[test]
fn what_contradicts_itself_or_the_node_is_refused_with_the_remedy() {
    for (networks, keys, part) in [
        (&[V4, V6][..], r#","ListenPort":51821"#, "are both 51821"),
        (&[V4], r#","Mode":"ipv6""#, "needs IPv6"),
        (&[V6], r#","Mode":"ipv4""#, "needs IPv4"),
    ] {
        let error = wireguard(networks, keys).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    assert!(wireguard(&[V4], r#","ListenPort":51821"#).is_ok());
    let both = wireguard(&[V4, V6], "").unwrap();
    assert!(both.check(&node(1360)).is_ok());
    let error = both.check(&node(1359)).unwrap_err().to_string();
    assert!(error.contains("1279 of the 1359 of eth0") && error.contains("1360"), "{error}");
    let mut bare = node(1500);
    bare.source.v6 = None;
    assert!(both.check(&bare).unwrap_err().to_string().contains("an IPv6 address and eth0 has none"));
    assert!(wireguard(&[V4, V6], r#","Mode":"ipv4""#).unwrap().check(&bare).is_ok());
    let mtu = |keys| wireguard(&[V4], keys).unwrap().mtu(1500);
    assert_eq!((mtu(""), mtu(r#","MTU":1400"#), mtu(r#","MTU":9000"#)), (1420, 1320, 1420));
}

#[test]
fn the_kernel_gets_the_same_peers_and_this_process_takes_its_place_where_that_is_allowed() {
    let peers = peers(2, &["192.0.2.2", "2001:db8::2"], (51820, 51821));
    let own: Subnets = ["10.244.1.0/24".parse::<IpNet>().unwrap()].into_iter().collect();
    let (node, macs) = (node(1500), Macs::default());
    let input = PlanInput { node: &node, own: &own, macs: &macs, peers: &peers, all: &peers };
    let auto = wireguard(&[V4], r#","Userspace":"auto""#).unwrap();
    let state = auto.plan(input);
    let named = words(&state);
    assert_eq!(named[0], "link add flannel-wg type wireguard mtu 1420");
    assert_eq!(named[2], "wireguard set flannel-wg listen-port 51820");
    assert_eq!(named[3], format!("wireguard peers flannel-wg: {} endpoint 192.0.2.2:51820", key(2)));
    assert_eq!(known(&state)[&peers[0].subnet].key, key(2));
    assert!(auto.previous_mac(&state, peers[0].subnet).is_some());
    let instead = auto.in_process().unwrap();
    assert_eq!(reached(&instead.plan(input), "flannel-wg"), [(2, "192.0.2.2:51820".to_owned(), 1)]);
    assert!(instead.in_process().is_none());
    assert!(auto.stands_in().is_none());
    assert!(instead.stands_in().unwrap().contains("modprobe wireguard"));
    assert!(wireguard(&[V4], r#","Userspace":"always""#).unwrap().stands_in().is_none());
    assert!(wireguard(&[V4], r#","Userspace":"never""#).unwrap().in_process().is_none());
}

#[test]
fn peers_inside_the_network_or_without_a_key_are_not_sent_to() {
    let mut all = [peers(2, &["10.244.200.5"], (7, 8)), peers(3, &["192.0.2.3"], (7, 8))].concat();
    all[1].wireguard = None;
    let state = plan(&[V4], "", &all);
    assert_eq!(reached(&state, "flannel-wg"), []);
    assert!(!format!("{state:?}").is_empty());
}
