//! The rows of contract §1.5, one by one, and what holds for any host.

use backends::host::DefaultRoute;
use proptest::prelude::*;
use subnet::Mac;

use super::*;

mod stay;

const V4: &[Family] = &[Family::V4];
const V6: &[Family] = &[Family::V6];
const DUAL: &[Family] = &Family::BOTH;

fn addr(text: &str) -> HostAddr {
    HostAddr { net: text.parse().unwrap(), deprecated: false, permanent: true, temporary: false }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn link(index: u32, name: &str, addresses: &[&str]) -> HostLink {
    let addresses = addresses.iter().map(|text| addr(text)).collect();
    HostLink {
        index,
        name: name.parse().unwrap(),
        altnames: Vec::new(),
        mtu: 1500,
        up: true,
        carrier: true,
        bridge: false,
        controller: None,
        mac: Mac([2, 0, 0, 0, 1, 1]),
        addresses,
    }
}

fn host(links: impl IntoIterator<Item = HostLink>, defaults: &[(Family, Option<u32>)]) -> HostView {
    HostView {
        links: links.into_iter().map(|link| (link.index, link)).collect(),
        defaults: defaults
            .iter()
            .map(|&(family, link)| DefaultRoute { family, link, metric: 0, gateway: None })
            .collect(),
        ..HostView::default()
    }
}

/// Loopback, a dual-stack eth0 with the default routes, a dual-stack eth1, an IPv4-only eth2.
fn usual() -> HostView {
    host(
        [
            link(1, "lo", &["127.0.0.1/8", "::1/128"]),
            link(2, "eth0", &["10.0.2.15/24", "fe80::2/64", "fd00:2::15/64"]),
            link(3, "eth1", &["fe80::3/64", "192.168.3.7/24", "fd00:3::7/64", "192.168.3.8/24"]),
            link(4, "eth2", &["172.16.4.1/16"]),
        ],
        &[(Family::V4, Some(2)), (Family::V6, Some(2))],
    )
}

fn selectors(args: &[&str]) -> Selectors {
    let args = args.iter().map(std::ffi::OsString::from);
    match crate::cli::parse(args, |_| None) {
        Ok(crate::cli::Command::Run(options)) => options.selectors,
        other => panic!("{other:?}"),
    }
}

fn no_route(to: IpAddr) -> Result<ResolvedRoute, String> {
    Err(format!("the kernel has no route to {to}"))
}

fn chosen(args: &[&str], view: &HostView, families: &[Family]) -> Result<External, String> {
    choose(&selectors(args), &PodPrefixes::default(), view, None, no_route, families)
        .map_err(|error| error.to_string())
}

/// Interface, its addresses and the announced ones.
fn summary(external: &External) -> String {
    let public =
        if external.public == external.addr { String::new() } else { format!(" as {}", external.public) };
    format!("{}: {}{public}", external.name, external.addr)
}

/// The summary of a choice on the usual host.
fn on_usual(args: &[&str], families: &[Family]) -> Result<String, String> {
    chosen(args, &usual(), families).map(|external| summary(&external))
}

#[test]
fn every_row_of_the_table_leads_to_its_interface() {
    let eth1_v6 = "--public-ipv6=fd00:3::7";
    for (args, families, wanted) in [
        // A literal address.
        (&["--iface=192.168.3.8"][..], V4, "eth1: 192.168.3.8"),
        (&["--iface=fd00:3::7"], V6, "eth1: fd00:3::7"),
        (&["--iface=fe80::3"], V6, "eth1: fe80::3"),
        (&["--iface=192.168.3.8"], DUAL, "eth1: 192.168.3.8 and fd00:3::7"),
        (&["--iface=192.168.3.8", eth1_v6], DUAL, "eth1: 192.168.3.8 and fd00:3::7"),
        (&["--iface=192.168.3.8", "--public-ipv6=fe80::3"], DUAL, "eth1: 192.168.3.8 and fe80::3"),
        (&["--iface=fd00:3::7", eth1_v6], DUAL, "eth1: 192.168.3.7 and fd00:3::7"),
        (&["--iface=fd00:3::7"], DUAL, "eth1: 192.168.3.7 and fd00:3::7"),
        (&["--iface=fd00:3::7"], V4, "eth1: 192.168.3.7"),
        // A name.
        (&["--iface=eth1"], V4, "eth1: 192.168.3.7"),
        (&["--iface=eth1"], V6, "eth1: fd00:3::7"),
        (&["--iface=eth1"], DUAL, "eth1: 192.168.3.7 and fd00:3::7"),
        (&["--iface=eth2"], V4, "eth2: 172.16.4.1"),
        // A pattern: addresses of all interfaces before names, unanchored.
        (&[r"--iface-regex=168\.3\.8"], V4, "eth1: 192.168.3.8"),
        (&["--iface-regex=eth1"], V4, "eth1: 192.168.3.7"),
        (&["--iface-regex=^(lo|eth1)$"], V4, "eth1: 192.168.3.7"),
        (&["--iface-regex=fd00:3"], V6, "eth1: fd00:3::7"),
        (&["--iface-regex=fe80::3"], V6, "eth1: fe80::3"),
        (&["--iface-regex=7$"], DUAL, "eth1: 192.168.3.7 and fd00:3::7"),
        (&["--iface-regex=2.+15|^eth1$"], DUAL, "eth0: 10.0.2.15 and fd00:2::15"),
        // Only the IPv4 address of eth0 matches, which is no match; the name of eth1 does.
        (&["--iface-regex=^10.0|^eth1$"], DUAL, "eth1: 192.168.3.7 and fd00:3::7"),
        // The default route.
        (&[], V4, "eth0: 10.0.2.15"),
        (&[], V6, "eth0: fd00:2::15"),
        (&[], DUAL, "eth0: 10.0.2.15 and fd00:2::15"),
        (&["--iface="], V4, "eth0: 10.0.2.15"),
        // A public address alone has to be local; with a selector it may be any.
        (&["--public-ip=192.168.3.8"], V4, "eth1: 192.168.3.8"),
        (&["--public-ipv6=fd00:3::7"], V6, "eth1: fd00:3::7"),
        (&["--public-ip=192.168.3.8", eth1_v6], DUAL, "eth1: 192.168.3.8 and fd00:3::7"),
        (&[eth1_v6], DUAL, "eth1: 192.168.3.7 and fd00:3::7"),
        (&["--public-ip=192.168.3.8"], V6, "eth0: fd00:2::15"),
        (&[eth1_v6], V4, "eth0: 10.0.2.15"),
        (&["--iface=eth1", "--public-ip=198.51.100.1"], V4, "eth1: 192.168.3.7 as 198.51.100.1"),
        (
            &["--iface=eth1", "--public-ip=198.51.100.1", "--public-ipv6=2001:db8::1"],
            DUAL,
            "eth1: 192.168.3.7 and fd00:3::7 as 198.51.100.1 and 2001:db8::1",
        ),
        (&["--iface=192.168.3.8", "--public-ip=198.51.100.1"], V4, "eth1: 192.168.3.8 as 198.51.100.1"),
        // The order: every --iface, then every --iface-regex; the first success decides.
        (&["--iface-regex=eth2", "--iface=eth9", "--iface=eth1"], V4, "eth1: 192.168.3.7"),
        (&["--iface=eth2", "--iface-regex=eth1"], DUAL, "eth1: 192.168.3.7 and fd00:3::7"),
        (&["--iface-regex=eth9", "--iface-regex=eth2"], V4, "eth2: 172.16.4.1"),
    ] {
        assert_eq!(on_usual(args, families).as_deref(), Ok(wanted), "{args:?} {families:?}");
    }
}

#[test]
fn an_interface_is_found_by_a_further_name_and_goes_by_its_own() {
    let mut view = usual();
    view.links.get_mut(&3).unwrap().altnames = vec!["enp0s31f6-of-the-second-slot".to_owned()];
    let name = view.links[&3].name;
    let found = chosen(&["--iface=enp0s31f6-of-the-second-slot"], &view, V4).unwrap();
    assert_eq!((found.index, found.name), (3, name));
}

#[test]
fn an_mtu_for_which_the_kernel_removes_ipv6_addresses_is_named_as_the_cause() {
    let small = |mtu| {
        let eth0 = HostLink { mtu, ..link(2, "eth0", &["10.0.2.15/24"]) };
        host([eth0], &[(Family::V4, Some(2))])
    };
    for (args, without) in
        [(&["--iface=eth0"][..], "eth0 has no usable IPv6 address"), (&[], "there is no IPv6 default route")]
    {
        let error = chosen(args, &small(1279), DUAL).unwrap_err();
        for part in [without, "below 1280", "eth0 is 1279", "ip link set eth0 mtu 1500"] {
            assert!(error.contains(part), "{part}: {error}");
        }
        let error = chosen(args, &small(1280), DUAL).unwrap_err();
        assert!(error.contains(without) && !error.contains("mtu"), "{error}");
        assert!(chosen(args, &small(1279), V4).is_ok());
    }
}

#[test]
fn what_does_not_fit_is_named_with_all_reasons_and_the_remedy() {
    for (args, families, part) in [
        (&["--iface=10.9.9.9"][..], V4, "--iface=10.9.9.9: no interface of this host has this address"),
        (&["--iface=fd00::9"], DUAL, "--iface=fd00::9: no interface of this host has this address"),
        (
            &["--iface=192.168.3.7", "--public-ipv6=fd00:2::15"],
            DUAL,
            "eth1, which does not have --public-ipv6=fd00:2::15",
        ),
        (&["--iface=192.168.3.7", "--public-ipv6=2001:db8::1"], DUAL, "--iface=eth1, to announce"),
        (&["--iface=eth9"], V4, "--iface=eth9: this host has no such interface"),
        (&["--iface=eth2"], DUAL, "--iface=eth2: eth2 has no usable IPv6 address"),
        (&["--iface=lo"], V4, "--iface=lo: lo is the loopback device"),
        (&["--iface=127.0.0.1"], V4, "--iface=127.0.0.1: lo is the loopback device"),
        (&["--iface-regex=^lo$"], V4, "--iface-regex=^lo$: lo is the loopback device"),
        (&["--iface-regex=wlan"], V4, "--iface-regex=wlan: it matches neither"),
        (&["--iface-regex=fd00"], V4, "--iface-regex=fd00: it matches neither"),
        (
            &["--iface-can-reach=192.0.2.1"],
            V4,
            "--iface-can-reach=192.0.2.1: the kernel has no route to 192.0.2.1",
        ),
        (&["--public-ip=198.51.100.1"], V4, "--public-ip=198.51.100.1: no interface of this host has it"),
        (&["--public-ip=198.51.100.1"], V4, "give the interface too, with --iface=NAME"),
        (&["--public-ipv6=2001:db8::1"], DUAL, "--public-ipv6=2001:db8::1: no interface"),
        (&[], &[], "neither IPv4 nor IPv6 is enabled"),
    ] {
        let error = on_usual(args, families).unwrap_err();
        assert!(error.contains(part), "{args:?}: {error}");
        let remedy = "this host has eth0 (10.0.2.15, fd00:2::15, fe80::2), eth1 (192.168.3.7, 192.168.3.8, \
                      fd00:3::7, fe80::3), eth2 (172.16.4.1): name one of them with --iface";
        assert!(error.ends_with(remedy), "{error}");
    }
    let error =
        on_usual(&["--iface=eth9", "--iface-regex=wlan", "--iface-can-reach=192.0.2.1"], V4).unwrap_err();
    assert!(
        error.contains("eth9: this") && error.contains("wlan: it") && error.contains("192.0.2.1: the"),
        "{error}"
    );
}

#[test]
fn a_default_route_has_to_lead_to_one_interface_in_each_family() {
    let with = |defaults: &[(Family, Option<u32>)], families| {
        let view = HostView { defaults: host([], defaults).defaults, ..usual() };
        chosen(&[], &view, families).map(|external| summary(&external))
    };
    for (defaults, families, part) in [
        (&[][..], V4, "default route: there is no IPv4 default route"),
        (&[(Family::V4, Some(2))], V6, "there is no IPv6 default route"),
        (&[(Family::V4, Some(2))], DUAL, "there is no IPv6 default route"),
        (&[(Family::V4, None)], V4, "the IPv4 default route has several next hops"),
        (&[(Family::V4, Some(2)), (Family::V6, None)], DUAL, "the IPv6 default route has several next hops"),
        (
            &[(Family::V4, Some(2)), (Family::V6, Some(3))],
            DUAL,
            "IPv4 default route leaves by eth0, but that of IPv6 by eth1",
        ),
        (&[(Family::V4, Some(77))], V4, "interface 77 is gone"),
    ] {
        let error = with(defaults, families).unwrap_err();
        assert!(error.contains(part), "{error}");
    }
    let two = &[(Family::V4, Some(3)), (Family::V4, Some(2)), (Family::V4, None)];
    assert_eq!(with(two, V4).as_deref(), Ok("eth1: 192.168.3.7"), "the first of equals");
    let mut view = HostView { defaults: host([], two).defaults, ..usual() };
    view.defaults[0].metric = 100;
    assert_eq!(summary(&chosen(&[], &view, V4).unwrap()), "eth0: 10.0.2.15", "a lower metric");
}

#[test]
fn the_way_to_an_address_gives_the_interface_and_the_ipv4_source() {
    let reach = |to: &str, way: ResolvedRoute, families| {
        let selectors = selectors(&[&format!("--iface-can-reach={to}")]);
        choose(
            &selectors,
            &PodPrefixes::default(),
            &usual(),
            None,
            |asked| if asked == ip(to) { Ok(way) } else { no_route(asked) },
            families,
        )
        .map(|external| summary(&external))
        .map_err(|error| error.to_string())
    };
    let way = |link, source: Option<&str>| ResolvedRoute { link, source: source.map(ip), gateway: None };
    let to_v4 = way(3, Some("192.168.3.8"));
    assert_eq!(reach("192.0.2.1", to_v4, V4).as_deref(), Ok("eth1: 192.168.3.8"));
    assert_eq!(reach("192.0.2.1", to_v4, DUAL).as_deref(), Ok("eth1: 192.168.3.8 and fd00:3::7"));
    assert_eq!(reach("192.0.2.1", way(3, None), V4).as_deref(), Ok("eth1: 192.168.3.7"));
    let to_v6 = way(3, Some("fd00:3::dead"));
    assert_eq!(reach("2001:db8::1", to_v6, V6).as_deref(), Ok("eth1: fd00:3::7"));
    assert_eq!(reach("2001:db8::1", to_v6, DUAL).as_deref(), Ok("eth1: 192.168.3.7 and fd00:3::7"));
    assert!(reach("192.0.2.1", way(4, None), DUAL).unwrap_err().contains("eth2 has no usable IPv6 address"));
    assert!(reach("192.0.2.1", way(77, None), V4).unwrap_err().contains("interface 77 is gone"));
    let own = reach("192.168.3.7", way(1, Some("192.168.3.7")), V4).unwrap_err();
    assert!(own.contains("use --iface=192.168.3.7 instead"), "{own}");
}

#[test]
fn addresses_are_ranked_by_scope_then_lifetime_then_privacy() {
    let addr = |text: &str, permanent, temporary, deprecated| HostAddr {
        permanent,
        temporary,
        deprecated,
        ..addr(text)
    };
    let mut link = link(2, "eth0", &[]);
    link.addresses = vec![
        addr("127.0.0.2/8", true, false, false),
        addr("169.254.1.1/16", true, false, false),
        addr("224.0.0.5/32", true, false, false),
        addr("10.0.0.1/24", true, false, true),
        addr("10.0.0.2/24", false, true, false),
        addr("10.0.0.3/24", false, false, false),
        addr("10.0.0.4/24", true, true, false),
        addr("10.0.0.5/24", true, false, false),
        addr("10.0.0.6/24", true, false, false),
    ];
    let ranked: Vec<String> = usable(&link, Family::V4).iter().map(ToString::to_string).collect();
    assert_eq!(ranked, ["10.0.0.5", "10.0.0.6", "10.0.0.4", "10.0.0.3", "10.0.0.2", "169.254.1.1"]);
    assert!(usable(&link, Family::V6).is_empty());
}

#[test]
fn an_interface_without_mtu_is_refused_and_the_log_learns_why_one_is_chosen() {
    let mut view = usual();
    view.links.get_mut(&2).unwrap().mtu = 0;
    assert!(chosen(&[], &view, V4).unwrap_err().contains("the MTU of eth0 is 0"));
    for (args, why) in [
        (&["--iface=eth1"][..], "--iface=eth1 names it"),
        (&["--iface=192.168.3.7"], "--iface=192.168.3.7 is its address"),
        (&["--iface-regex=168.3.8"], "--iface-regex=168.3.8 matches its address 192.168.3.8"),
        (&["--iface-regex=h1"], "--iface-regex=h1 matches its name"),
        (&["--public-ip=192.168.3.7"], "--public-ip=192.168.3.7 is its address"),
        (&[], "the default route leaves by it"),
    ] {
        assert_eq!(chosen(args, &usual(), V4).unwrap().why, why);
    }
}

#[test]
fn a_host_without_addresses_and_one_with_hundreds_are_both_described_shortly() {
    let error = chosen(&[], &host([link(1, "lo", &["127.0.0.1/8"])], &[]), V4).unwrap_err();
    assert!(error.ends_with("no interface of this host has a usable address: configure one"), "{error}");
    let many = (1..=300).map(|i| link(i, &format!("veth{i}"), &["fe80::1/64"]));
    let error = chosen(&[], &host(many, &[]), V4).unwrap_err();
    assert!(error.len() < 600 && error.contains("and 284 more"), "{error}");
}

fn any_addr() -> impl Strategy<Value = HostAddr> {
    let net = prop_oneof![
        Just("127.0.0.1/8"),
        Just("::1/128"),
        Just("169.254.0.9/16"),
        Just("fe80::9/64"),
        Just("10.0.0.1/24"),
        Just("10.0.0.2/32"),
        Just("192.168.0.1/16"),
        Just("fd00::1/64"),
        Just("2001:db8::1/128"),
        Just("0.0.0.0/0"),
        Just("224.0.0.1/4"),
        Just("ff02::1/16"),
        Just("255.255.255.255/32"),
    ];
    (net, any::<[bool; 3]>()).prop_map(|(net, [deprecated, permanent, temporary])| HostAddr {
        deprecated,
        permanent,
        temporary,
        ..addr(net)
    })
}

fn any_host() -> impl Strategy<Value = HostView> {
    let link = (
        0u32..6,
        "(lo|eth[0-3])",
        prop_oneof![Just(0u32), Just(1500)],
        prop::collection::vec(any_addr(), 0..5),
    )
        .prop_map(|(index, name, mtu, addresses)| HostLink { mtu, addresses, ..link(index, &name, &[]) });
    let family = prop_oneof![Just(Family::V4), Just(Family::V6)];
    let default = (family, prop::option::of(0u32..6), 0u32..3)
        .prop_map(|(family, link, metric)| DefaultRoute { family, link, metric, gateway: None });
    (prop::collection::btree_map(0u32..6, link, 0..5), prop::collection::vec(default, 0..4)).prop_map(
        |(mut links, defaults)| {
            links.iter_mut().for_each(|(index, link)| link.index = *index);
            HostView { links, defaults, ..HostView::default() }
        },
    )
}

fn any_args() -> impl Strategy<Value = Vec<String>> {
    prop::collection::vec(
        "--iface=(eth[0-4]|lo|10\\.0\\.0\\.[12]|fd00::1|fe80::9)?|--iface-regex=(10|fd|eth[12]|lo|\\.1)|\
         --iface-can-reach=(192\\.0\\.2\\.1|10\\.0\\.0\\.1|2001:db8::9)|--public-ip=(10\\.0\\.0\\.1|192\\.0\\.2\\.9)|\
         --public-ipv6=(fd00::1|2001:db8::9)",
        0..4,
    )
}

proptest! {
    #[test]
    fn any_host_gives_the_same_complete_answer_twice(
        host in any_host(),
        args in any_args(),
        way in (0u32..6, prop::option::of(prop_oneof![Just("10.0.0.2"), Just("fd00::1"), Just("0.0.0.0")])),
        families in prop_oneof![Just(V4), Just(V6), Just(DUAL)],
    ) {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let selectors = selectors(&args);
        let way = ResolvedRoute { link: way.0, source: way.1.map(ip), gateway: None };
        let ask = |in_use: Option<&External>| {
            choose(&selectors, &PodPrefixes::default(), &host, in_use, |_| Ok(way), families)
        };
        let answer = ask(None);
        prop_assert_eq!(&answer, &ask(None));
        match answer {
            Ok(external) => {
                prop_assert_eq!(&ask(Some(&external)), &Ok(external.clone()), "what is in use stays");
                prop_assert!(external.mtu > 0 && !external.why.is_empty());
                for family in Family::BOTH {
                    let enabled = families.contains(&family);
                    prop_assert_eq!(external.addr.get(family).is_some(), enabled);
                    let public = selectors.public.get(family).or(external.addr.get(family));
                    prop_assert_eq!(external.public.get(family), public.filter(|_| enabled));
                }
                prop_assert!(external.name.as_str() != "lo");
            }
            Err(error) => prop_assert!(!error.to_string().is_empty()),
        }
    }
}
