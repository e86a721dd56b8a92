//! What is read, refused and made of `net-conf.json`.

use super::*;
use proptest::prelude::*;

fn parse(json: &str) -> NetworkConfig {
    NetworkConfig::parse(json).unwrap()
}

fn error(json: &str) -> String {
    NetworkConfig::parse(json).unwrap_err().to_string()
}

#[test]
fn defaults_are_flannels_in_any_letter_case() {
    let config = parse(r#"{"network":"10.3.0.0/16"}"#);
    let range = config.range(Family::V4).unwrap();
    assert_eq!(range.subnet_len, 24);
    assert_eq!(range.min, "10.3.1.0".parse::<IpAddr>().unwrap());
    assert_eq!(range.max, "10.3.255.0".parse::<IpAddr>().unwrap());
    assert_eq!(config.backend, BackendConfig::Udp { port: 8285, check_sources: true, workers: 1 });
    assert_eq!(config.range(Family::V6), None);

    let config = parse(r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fc00::/48"}"#);
    let range = config.range(Family::V6).unwrap();
    assert_eq!(range.subnet_len, 64);
    assert_eq!(range.min, "fc00:0:0:1::".parse::<IpAddr>().unwrap());
    assert_eq!(range.max, "fc00:0:0:ffff::".parse::<IpAddr>().unwrap());
}

#[test]
fn given_bounds_are_kept() {
    let range =
        *parse(r#"{"Network":"10.3.0.0/16","SubnetMin":"10.3.5.0","SubnetMax":"10.3.8.0","SubnetLen":28}"#)
            .range(Family::V4)
            .unwrap();
    assert_eq!(
        (range.min.to_string(), range.max.to_string(), range.subnet_len),
        ("10.3.5.0".into(), "10.3.8.0".into(), 28)
    );
}

#[test]
fn small_networks_are_divided_by_four() {
    assert_eq!(parse(r#"{"Network":"10.3.0.0/24"}"#).range(Family::V4).unwrap().subnet_len, 26);
    assert_eq!(parse(r#"{"Network":"10.3.0.0/28"}"#).range(Family::V4).unwrap().subnet_len, 30);
    assert!(error(r#"{"Network":"10.3.0.0/29"}"#).contains("too small"));
}

#[test]
fn where_subnets_are_given_the_keys_about_them_are_ignored() {
    let json = r#"{"Network":"10.3.0.0/16","SubnetLen":7,"SubnetMin":"nonsense","IPv6SubnetLen":true}"#;
    let parse = |json, own: &[&str]| {
        let own = own.iter().map(|net| net.parse::<IpNet>().unwrap()).collect();
        *NetworkConfig::parse_given_subnets(json, &own).unwrap().range(Family::V4).unwrap()
    };
    let range = parse(json, &["10.3.4.0/26"]);
    assert_eq!(
        (range.subnet_len, range.min.to_string(), range.max.to_string()),
        (26, "10.3.0.0".into(), "10.3.255.192".into())
    );
    assert!(range.allows("10.3.0.0/26".parse().unwrap()));
    assert_eq!(parse(json, &["fd00::/64"]).subnet_len, 24);
    assert_eq!(parse(r#"{"Network":"10.3.0.0/31"}"#, &[]).subnet_len, 31);
    assert_eq!(parse(r#"{"Network":"10.3.0.0/24"}"#, &["10.3.0.0/24"]).min.to_string(), "10.3.0.0");
    let error = NetworkConfig::parse_given_subnets("{}", &Subnets::default()).unwrap_err().to_string();
    assert!(error.contains("Network is missing"), "{error}");
}

#[test]
fn host_bits_of_a_network_are_cut_off() {
    assert_eq!(parse(r#"{"Network":"10.5.3.7/16"}"#).networks().to_string(), "10.5.0.0/16");
}

#[test]
fn backends_are_read_in_any_letter_case() {
    let config =
        parse(r#"{"Network":"10.3.0.0/16","backend":{"type":"VXLAN","vni":7,"PORT":4789,"mtu":1400}}"#);
    let BackendConfig::Vxlan(vxlan) = config.backend else { panic!("{config:?}") };
    assert_eq!((vxlan.vni, vxlan.port, vxlan.mtu), (7, Some(4789), Some(1400)));
    let unknown = parse(r#"{"Network":"10.3.0.0/16","Backend":{"Type":"IPSec"}}"#).backend;
    assert_eq!(unknown, BackendConfig::Unknown("ipsec".into()));
}

#[test]
fn errors_name_key_value_and_remedy() {
    for (json, parts) in [
        (r#"{}"#, ["Network is missing", "10.244.0.0/16"]),
        (r#"{"Network":"fd00::/48"}"#, ["fd00::/48", "IPv4"]),
        (r#"{"Network":null}"#, ["Network", "null"]),
        (r#"{"Network":"10.3.0.0/16","SubnetLen":17}"#, ["SubnetLen: 17", "at least 18"]),
        (r#"{"Network":"10.3.0.0/16","SubnetLen":31}"#, ["SubnetLen: 31", "at most 30"]),
        (r#"{"Network":"10.3.0.0/16","SubnetMin":"10.4.0.0"}"#, ["SubnetMin", "outside 10.3.0.0/16"]),
        (r#"{"Network":"10.3.0.0/16","SubnetMax":"10.3.1.1"}"#, ["SubnetMax", "10.3.1.0 is"]),
        (r#"{"Network":"10.3.0.0/16","Backend":{}}"#, ["no Type", "vxlan"]),
        (r#"{"Network":"10.3.0.0/16","Backend":null}"#, ["no Type", "vxlan"]),
        (
            r#"{"Network":"10.3.0.0/16","Backend":{"Type":"vxlan","VNI":"1"}}"#,
            ["Backend.VNI: \"1\" is a text", "write a number: 1"],
        ),
        (r#"{"Network":"10.3.0.0/16","Backend":{"Type":"vxlan","VNI":16777215}}"#, ["16777215", "9999999"]),
        (r#"{"Network":"10.3.0.0/16","Backend":{"Type":"vxlan","Port":65536}}"#, ["65536", "65535"]),
        (
            r#"{"Network":"10.3.0.0/16","Backend":{"Type":"vxlan","ChecksumOffload":"never"}}"#,
            ["ChecksumOffload: \"never\"", "\"off\""],
        ),
        (
            r#"{"Network":"10.3.0.0/16","Backend":{"Type":"vxlan","Fallback":"ipip"}}"#,
            ["Fallback: \"ipip\"", "\"udp\""],
        ),
        (r#"{"Network":"10.3.0.0/16","Backend":{"Type":"udp","Workers":9}}"#, ["Workers: 9", "1 to 8"]),
        (r#"{"Network":"10.3.0.0/16","Backend":{"Type":"udp","Workers":0}}"#, ["Workers: 0", "1 to 8"]),
        (r#"{"EnableIPv4":false}"#, ["EnableIPv4", "at least one"]),
        (
            r#"{"Network":"10.3.0.0/16","MasqueradeExcept":["192.168.0.1"]}"#,
            ["\"192.168.0.1\"", "192.168.0.0/16"],
        ),
        (
            r#"{"Network":"10.3.0.0/16","MasqueradeExcept":"192.168.0.0/16"}"#,
            ["MasqueradeExcept", "192.168.0.0/16"],
        ),
        (r#"{"Network":"10.3.0.0/16","FastPath":"yes"}"#, ["FastPath", "yes"]),
        (r#"{"Network":"10.3.0.0/16","FastPath":1}"#, ["FastPath", "1"]),
        ("[]", ["not a JSON object", "[] is a list"]),
    ] {
        let text = error(json);
        assert!(parts.iter().all(|part| text.contains(part)), "{json}: {text}");
    }
}

#[test]
fn what_a_node_may_hold_depends_on_range_length_and_family() {
    let config = parse(r#"{"Network":"10.3.0.0/16","SubnetMin":"10.3.5.0","SubnetMax":"10.3.8.0"}"#);
    let allows = |text: &str| config.allows(&[text.parse::<IpNet>().unwrap()].into_iter().collect());
    assert!(allows("10.3.5.0/24") && allows("10.3.8.0/24"));
    assert!(
        !allows("10.3.4.0/24") && !allows("10.3.9.0/24") && !allows("10.3.6.0/25") && !allows("fd00::/24")
    );
    assert!(!config.allows(&Subnets::default()));
}

proptest! {
    #[test]
    fn arbitrary_documents_never_panic(
        network in "(10\\.[0-9.]{0,9}/[0-9]{1,2}|[0-9a-f:./]{0,20})",
        len in -2i64..140, vni in any::<i64>(), key in "[A-Za-z6]{0,12}", min in "[0-9.]{0,12}",
    ) {
        let json = format!(
            r#"{{"Network":"{network}","SubnetLen":{len},"{key}":{vni},"SubnetMin":"{min}",
                "Backend":{{"Type":"vxlan","VNI":{vni},"{key}":{len}}}}}"#
        );
        if let Ok(config) = NetworkConfig::parse(&json) {
            for range in config.ranges() {
                prop_assert!(range.network.contains(&range.min) && range.network.contains(&range.max));
            }
        }
    }
}

#[test]
fn networks_whose_addresses_pods_cannot_have_are_refused_with_the_reason() {
    for (network, part) in [
        ("127.0.0.0/8", "is the host's loopback"),
        ("127.5.0.0/16", "is the host's loopback"),
        ("0.0.0.0/0", "contains 0.0.0.0/8"),
        ("0.1.0.0/16", "this network"),
        ("224.0.0.0/4", "is multicast"),
        ("239.1.0.0/16", "is multicast"),
        ("240.0.0.0/4", "reserved"),
        ("128.0.0.0/1", "contains 169.254.0.0/16"),
        ("169.254.0.0/16", "is link-local"),
    ] {
        let error = NetworkConfig::parse(&format!(r#"{{"Network":"{network}"}}"#)).unwrap_err().to_string();
        assert!(
            error.contains(network) && error.contains(part) && error.contains("10.244.0.0/16"),
            "{error}"
        );
    }
    for (network, part) in [
        ("::/0", "the unspecified address"),
        ("::/64", "the unspecified address"),
        ("fe80::/10", "is link-local"),
        ("fe80:1::/48", "is link-local"),
        ("ff00::/8", "is multicast"),
        ("ff02::/64", "is multicast"),
        ("::ffff:0:0/96", "IPv4"),
    ] {
        let json = format!(r#"{{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"{network}"}}"#);
        for error in
            [NetworkConfig::parse(&json), NetworkConfig::parse_given_subnets(&json, &Subnets::default())]
        {
            let error = error.unwrap_err().to_string();
            assert!(error.contains("IPv6Network") && error.contains(part), "{network}: {error}");
        }
    }
}

#[test]
fn bounds_in_the_wrong_order_are_named() {
    let json = r#"{"Network":"10.3.0.0/16","SubnetMin":"10.3.9.0","SubnetMax":"10.3.5.0"}"#;
    let error = NetworkConfig::parse(json).unwrap_err().to_string();
    assert!(error.contains("SubnetMin: 10.3.9.0 lies above SubnetMax 10.3.5.0"), "{error}");
}

#[test]
fn the_fast_path_is_off_unless_the_key_says_so_and_a_change_of_it_is_named() {
    let (off, on) =
        (parse(r#"{"Network":"10.3.0.0/16"}"#), parse(r#"{"Network":"10.3.0.0/16","fastpath":true}"#));
    assert!(!off.fast_path && on.fast_path);
    assert!(on.warnings.0.is_empty(), "the key is known");
    assert_eq!(off.changes(&on), ["FastPath: false → true"]);
}
