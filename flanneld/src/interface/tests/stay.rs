//! What is never a candidate, and what is in use stays.

use super::*;

fn pods() -> PodPrefixes {
    PodPrefixes {
        networks: vec!["10.244.0.0/16".parse().unwrap(), "fd44::/48".parse().unwrap()],
        own: vec!["10.244.7.0/24".parse().unwrap(), "10.99.7.0/24".parse().unwrap()],
    }
}

fn ask(
    args: &[&str],
    view: &HostView,
    in_use: Option<&External>,
    families: &[Family],
) -> Result<External, String> {
    let way = |_| Ok(ResolvedRoute { link: 11, source: None, gateway: None });
    choose(&selectors(args), &pods(), view, in_use, way, families).map_err(|error| error.to_string())
}

/// The usual host with everything that two agents and their pods put on it.
fn busy() -> HostView {
    let mut view = usual();
    let bridge = |index, name, addresses: &[&str]| HostLink { bridge: true, ..link(index, name, addresses) };
    let more = [
        link(10, "flannel.1", &["10.244.7.0/32", "172.30.5.125/24"]),
        link(11, "flannel-v6.4096", &["fd00:5::1/64"]),
        link(12, "flannel0", &["172.30.5.126/24"]),
        link(13, "flannel-wg", &["172.30.5.127/24"]),
        link(14, "flannel.ipip", &["172.30.5.128/24"]),
        link(15, "flo.1.2118", &["172.30.5.129/24"]),
        bridge(16, "cni0", &["172.30.5.130/24", "fe80::16/64"]),
        bridge(17, "br-pods", &["10.244.7.1/24", "172.30.5.131/24"]),
        bridge(18, "br-old", &["10.99.7.1/24", "fe80::18/64"]),
        HostLink { controller: Some(16), ..link(19, "veth1", &["fe80::19/64"]) },
        link(20, "vethptp", &["10.244.7.1/32", "fe80::20/64"]),
    ];
    view.links.extend(more.into_iter().map(|link| (link.index, link)));
    view
}

#[test]
fn what_serves_pods_is_no_candidate_and_is_never_offered() {
    let view = busy();
    let error = ask(&["--iface=eth9"], &view, None, V4).unwrap_err();
    assert!(
        error.ends_with(
            "this host has eth0 (10.0.2.15, fd00:2::15, fe80::2), eth1 (192.168.3.7, 192.168.3.8, fd00:3::7, \
             fe80::3), eth2 (172.16.4.1): name one of them with --iface"
        ),
        "{error}"
    );
    for (args, part) in [
        ("--iface=flannel.1", "flannel.1 is a device of flannel itself"),
        ("--iface=172.30.5.125", "flannel.1 is a device of flannel itself"),
        ("--iface=fd00:5::1", "flannel-v6.4096 is a device of flannel itself"),
        ("--public-ip=172.30.5.126", "flannel0 is a device of flannel itself"),
        ("--iface=flannel-wg", "flannel-wg is a device of flannel itself"),
        ("--iface-regex=ipip", "flannel.ipip is a device of flannel itself"),
        ("--iface=flo.1.2118", "flo.1.2118 is a device of flannel itself"),
        ("--iface-can-reach=192.0.2.7", "flannel-v6.4096 is a device of flannel itself"),
        ("--iface=cni0", "cni0 is a bridge of pods"),
        ("--iface=172.30.5.131", "br-pods is a bridge of pods"),
        ("--iface=br-old", "br-old is a bridge of pods"),
        ("--iface=veth1", "veth1 is a port of cni0, a bridge of pods"),
        ("--iface=vethptp", "vethptp has the gateway address of this node's pods"),
    ] {
        let error = ask(&[args], &view, None, V4).unwrap_err();
        assert!(error.contains(part), "{args}: {error}");
    }
}

#[test]
fn a_default_route_by_a_device_of_flannel_does_not_count() {
    let mut view = busy();
    for metric in [0, 200] {
        view.defaults.insert(0, DefaultRoute { family: Family::V4, link: Some(10), metric, gateway: None });
    }
    view.defaults[2].metric = 300;
    assert_eq!(summary(&ask(&[], &view, None, V4).unwrap()), "eth0: 10.0.2.15");
    view.defaults.retain(|route| route.link == Some(10));
    let error = ask(&[], &view, None, V4).unwrap_err();
    assert!(error.contains("no IPv4 default route but by what can't be used: flannel.1 is"), "{error}");
}

#[test]
fn an_address_inside_the_network_is_no_nodes_and_the_network_is_named() {
    let view = host([link(2, "eth0", &["10.244.3.9/16", "fd44::9/64"])], &[(Family::V4, Some(2))]);
    for args in [&[][..], &["--iface=eth0"], &["--iface=10.244.3.9"], &["--public-ip=10.244.3.9"]] {
        let error = ask(args, &view, None, V4).unwrap_err();
        assert!(error.contains("10.244.3.9 of eth0 lies inside the pod network 10.244.0.0/16"), "{error}");
    }
    let view = host([link(2, "eth0", &["10.244.3.9/16", "192.0.2.9/24"])], &[(Family::V4, Some(2))]);
    assert_eq!(summary(&ask(&[], &view, None, V4).unwrap()), "eth0: 192.0.2.9", "another one is used");
    // IPv6 likewise: the link-local address that every interface has is no way around that.
    let view =
        host([link(2, "eth0", &["192.0.2.9/24", "fd44::9/64", "fe80::9/64"])], &[(Family::V6, Some(2))]);
    for args in [&[][..], &["--iface=eth0"]] {
        let error = ask(args, &view, None, V6).unwrap_err();
        assert!(error.contains("fd44::9 of eth0 lies inside the pod network"), "{error}");
        assert!(error.contains("give IPv6Network a prefix"), "{error}");
    }
}

#[test]
fn a_record_of_an_earlier_network_does_not_exclude_the_link_that_leads_out_of_the_host() {
    let with = |text: &str| {
        let mut view = usual();
        let eth0 = view.links.get_mut(&2).unwrap();
        eth0.addresses[0] = addr(text);
        view
    };
    // Of a network that was given up, as in a subnet.env of another machine; br-old of that network leads nowhere.
    let found = ask(&[], &with("10.99.7.1/24"), None, V4).unwrap();
    assert_eq!((found.name.as_str(), found.addr.v4), ("eth0", Some([10, 99, 7, 1].into())));
    let error = ask(&[], &with("10.244.7.1/24"), None, V4).unwrap_err();
    assert!(error.contains("gateway address"), "{error}");
}

#[test]
fn a_bridge_of_the_hosts_own_network_is_a_candidate() {
    let br0 = HostLink { bridge: true, ..link(2, "br0", &["192.0.2.9/24"]) };
    let view = host([br0], &[(Family::V4, Some(2))]);
    assert_eq!(summary(&ask(&[], &view, None, V4).unwrap()), "br0: 192.0.2.9");
}

#[test]
fn what_is_in_use_stays_while_interface_and_address_are_there() {
    for (families, more) in
        [(V4, vec![]), (V6, vec![]), (DUAL, vec![]), (V4, vec!["--iface=eth0", "--iface=eth1"])]
    {
        let args: Vec<&str> = more;
        let before = ask(&args, &usual(), None, families).unwrap();
        assert_eq!(before.name.as_str(), "eth0");
        let mut view = usual();
        view.links.insert(5, link(5, "tun0", &["10.8.0.6/24", "fd08::6/64"]));
        let vpn =
            Family::BOTH.map(|family| DefaultRoute { family, link: Some(5), metric: 50, gateway: None });
        view.defaults.iter_mut().for_each(|route| route.metric = 100);
        view.defaults.splice(0..0, vpn);
        let eth0 = view.links.get_mut(&2).unwrap();
        eth0.addresses.splice(0..0, [addr("10.0.2.1/24"), addr("fd00:2::1/64")]);
        assert_eq!(ask(&args, &view, Some(&before), families), Ok(before.clone()), "{families:?}");
        // An address on its own, without any route, too.
        view.defaults.clear();
        assert_eq!(ask(&args, &view, Some(&before), families), Ok(before.clone()));
        // Its other properties are followed.
        view.links.get_mut(&2).unwrap().mtu = 1400;
        assert_eq!(ask(&args, &view, Some(&before), families), Ok(External { mtu: 1400, ..before }));
    }
}

#[test]
fn the_choice_is_made_again_when_interface_or_address_are_gone() {
    let before = ask(&[], &usual(), None, V4).unwrap();
    let with = |change: &dyn Fn(&mut HostView), args: &[&str]| {
        let mut view = usual();
        view.defaults
            .insert(0, DefaultRoute { family: Family::V4, link: Some(3), metric: 50, gateway: None });
        view.defaults[1].metric = 100;
        change(&mut view);
        ask(args, &view, Some(&before), V4).map(|external| summary(&external))
    };
    let moved = Ok("eth1: 192.168.3.7".to_owned());
    assert_eq!(with(&|_| {}, &[]), Ok("eth0: 10.0.2.15".to_owned()));
    assert_eq!(with(&|view| drop(view.links.remove(&2)), &[]), moved);
    assert_eq!(with(&|view| view.links.get_mut(&2).unwrap().name = "gone0".parse().unwrap(), &[]), moved);
    assert_eq!(with(&|view| view.links.get_mut(&2).unwrap().up = false, &[]), moved);
    let readdress = |view: &mut HostView| view.links.get_mut(&2).unwrap().addresses[0] = addr("10.0.2.77/24");
    assert_eq!(with(&readdress, &[]), Ok("eth0: 10.0.2.77".to_owned()), "the same interface comes first");
    let deprecate = |view: &mut HostView| view.links.get_mut(&2).unwrap().addresses[0].deprecated = true;
    assert_eq!(with(&deprecate, &[]), moved, "an address that ends is gone");
    assert!(with(&readdress, &["--iface=10.0.2.15"]).is_err(), "flags are obeyed when the choice is made");
    assert_eq!(with(&readdress, &["--iface=10.0.2.15", "--iface=eth1"]), moved);
}

#[test]
fn a_link_local_address_gives_way_to_a_global_one() {
    let view = |addresses: &[&str]| {
        host([link(2, "eth0", addresses)], &[(Family::V6, Some(2)), (Family::V4, Some(2))])
    };
    let before = ask(&[], &view(&["fe80::2/64", "169.254.0.9/16"]), None, DUAL).unwrap();
    let now = view(&["fe80::2/64", "169.254.0.9/16", "2001:db8::2/64", "192.0.2.9/24"]);
    let after = ask(&[], &now, Some(&before), DUAL).unwrap();
    assert_eq!(summary(&after), "eth0: 192.0.2.9 and 2001:db8::2");
}

#[test]
fn a_family_that_comes_is_found_on_the_interface_in_use() {
    let before = ask(&["--iface=eth1"], &usual(), None, V4).unwrap();
    let after = ask(&[], &usual(), Some(&before), DUAL).unwrap();
    assert_eq!(summary(&after), "eth1: 192.168.3.7 and fd00:3::7");
}

#[test]
fn what_was_announced_before_a_restart_wins_unless_flags_name_another() {
    let mut view = usual();
    view.links.insert(5, link(5, "tun0", &["10.8.0.6/24"]));
    view.defaults[0].metric = 100;
    view.defaults.insert(0, DefaultRoute { family: Family::V4, link: Some(5), metric: 50, gateway: None });
    let start = |args: &[&str], before: &[&str], families| {
        let prefer: PublicAddrs = before.iter().map(|text| ip(text)).collect();
        let selectors = Selectors { prefer, ..selectors(args) };
        let chosen = choose(&selectors, &pods(), &view, None, no_route, families);
        chosen.map(|external| summary(&external)).map_err(|error| error.to_string())
    };
    assert_eq!(start(&[], &[], V4).as_deref(), Ok("tun0: 10.8.0.6"), "the default route, as Flannel has it");
    assert_eq!(start(&[], &["10.0.2.15"], V4).as_deref(), Ok("eth0: 10.0.2.15"));
    assert_eq!(start(&[], &["fd00:3::7"], V6).as_deref(), Ok("eth1: fd00:3::7"));
    assert_eq!(start(&[], &["10.0.2.99"], V4).as_deref(), Ok("tun0: 10.8.0.6"), "it is gone");
    assert_eq!(start(&["--iface=eth1"], &["10.0.2.15"], V4).as_deref(), Ok("eth1: 192.168.3.7"));
    assert_eq!(start(&["--iface=eth1"], &["192.168.3.8"], V4).as_deref(), Ok("eth1: 192.168.3.8"));
    assert_eq!(start(&["--public-ip=10.8.0.6"], &["10.0.2.15"], V4).as_deref(), Ok("tun0: 10.8.0.6"));
    assert_eq!(start(&["--iface-regex=tun"], &["10.0.2.15"], V4).as_deref(), Ok("tun0: 10.8.0.6"));
}

#[test]
fn an_address_that_comes_besides_is_no_reason_to_move() {
    let view = |addresses: &[HostAddr]| {
        let mut eth0 = link(2, "eth0", &["10.0.2.15/24"]);
        eth0.addresses.extend_from_slice(addresses);
        host([eth0], &[(Family::V4, Some(2)), (Family::V6, Some(2))])
    };
    let stay = |before: &str, addresses: &[HostAddr]| {
        let prefer = before.parse().into_iter().collect();
        let selectors = Selectors { prefer, iface: vec!["eth0".to_owned()], ..Selectors::default() };
        let chosen = choose(&selectors, &pods(), &view(addresses), None, no_route, DUAL);
        chosen.unwrap().addr.v6.unwrap().to_string()
    };
    let (new, old) = (addr("fd00::99/64"), addr("fd00::1/64"));
    assert_eq!(stay("", &[new, old]), "fd00::99", "the kernel's order, as Flannel has it");
    assert_eq!(stay("fd00::1", &[new, old]), "fd00::1");
    assert_eq!(stay("fd00::1", &[new]), "fd00::99", "it is gone");
    assert_eq!(stay("fd00::1", &[new, HostAddr { deprecated: true, ..old }]), "fd00::99");
    assert_eq!(
        stay("fd00::1", &[new, HostAddr { permanent: false, ..old }]),
        "fd00::1",
        "a lifetime counts not"
    );
    assert_eq!(stay("fe80::1", &[addr("fe80::1/64"), new]), "fd00::99", "a larger scope does");
}

#[test]
fn tunnels_send_from_the_public_address_only_where_the_host_has_it() {
    for (args, source) in [
        (&["--iface=eth1"][..], "192.168.3.7"),
        (&["--iface=eth0", "--public-ip=192.168.3.8"], "192.168.3.8"),
        (&["--public-ip=192.168.3.8"], "192.168.3.8"),
        (&["--iface=eth0", "--public-ip=203.0.113.9"], "10.0.2.15"),
    ] {
        let external = ask(args, &usual(), None, V4).unwrap();
        assert_eq!(external.source.v4.unwrap().to_string(), source, "{args:?}");
    }
}
