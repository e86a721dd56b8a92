use super::*;
use proptest::prelude::*;
use serde_json::json;

const SHIPPED: &str = r#"{"name":"cbr0","cniVersion":"0.3.1","type":"flannel","delegate":{"hairpinMode":true,"isDefaultGateway":true}}"#;
const V4: &str =
    "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";

fn golden(stdin: &str, env: &str, expected: &str) {
    let delegate = Network::parse(stdin.as_bytes()).unwrap().delegate(&Reading::parse(env).unwrap()).unwrap();
    assert_eq!(delegate.text, expected);
    assert_eq!(Delegate::from_kept(expected.as_bytes()), Some(delegate));
}

fn refused(stdin: &str) -> (u64, String) {
    let node = Reading::parse(V4).unwrap();
    let error = Network::parse(stdin.as_bytes()).and_then(|network| network.delegate(&node)).unwrap_err();
    (error.code, error.msg)
}

#[test]
fn half_a_surrogate_pair_in_the_delegate_is_the_replacement_character_of_go() {
    golden(
        r#"{"name":"n","type":"flannel","delegate":{"x":["\ud800","\ud83d\ude00"]}}"#,
        V4,
        "{\"ipMasq\":false,\"ipam\":{\"ranges\":[[{\"subnet\":\"10.244.1.0/24\"}]],\"routes\":[{\"dst\":\"10.244.0.0/16\"}],\
         \"type\":\"host-local\"},\"isGateway\":true,\"mtu\":1450,\"name\":\"n\",\"type\":\"bridge\",\"x\":[\"\u{fffd}\",\"\u{1f600}\"]}",
    );
}

#[test]
fn the_shipped_configuration_gives_the_bytes_of_the_go_plugin() {
    golden(
        SHIPPED,
        V4,
        r#"{"cniVersion":"0.3.1","hairpinMode":true,"ipMasq":false,"ipam":{"ranges":[[{"subnet":"10.244.1.0/24"}]],"routes":[{"dst":"10.244.0.0/16"}],"type":"host-local"},"isDefaultGateway":true,"isGateway":true,"mtu":1450,"name":"cbr0","type":"bridge"}"#,
    );
}

#[test]
fn add_waits_ten_seconds_unless_told_otherwise() {
    let wait = |more: &str| {
        let network = Network::parse(format!(r#"{{"name":"n","type":"flannel"{more}}}"#).as_bytes());
        network.map(|network| network.wait.as_secs()).map_err(|error| error.msg)
    };
    assert_eq!(wait(""), Ok(10));
    assert_eq!(wait(r#","waitSeconds":0"#), Ok(0));
    assert_eq!(wait(r#","waitSeconds":null"#), Ok(10));
    for (given, what) in
        [("256", "is not"), ("-1", "is not"), ("1.5", "is not"), ("true", "is a truth value")]
    {
        let error = wait(&format!(r#","waitSeconds":{given}"#)).unwrap_err();
        assert!(
            error.starts_with(&format!("failed to load netconf: waitSeconds: {given} {what}")),
            "{error}"
        );
    }
}

#[test]
fn two_families_give_two_range_sets_with_ipv4_first() {
    let env = "FLANNEL_IPV6_NETWORK=fc00::/48\nFLANNEL_IPV6_SUBNET=fc00::1/64\nFLANNEL_NETWORK=10.1.0.0/16\n\
               FLANNEL_SUBNET=10.1.17.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n";
    golden(
        r#"{"name":"cni-flannel","type":"flannel"}"#,
        env,
        r#"{"ipMasq":true,"ipam":{"ranges":[[{"subnet":"10.1.17.0/24"}],[{"subnet":"fc00::/64"}]],"routes":[{"dst":"10.1.0.0/16"},{"dst":"fc00::/48"}],"type":"host-local"},"isGateway":true,"mtu":1472,"name":"cni-flannel","type":"bridge"}"#,
    );
    let v6 = "FLANNEL_IPV6_NETWORK=fc00::/48\nFLANNEL_IPV6_SUBNET=fc00::1/64\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=true";
    golden(
        r#"{"name":"n","cniVersion":""}"#,
        v6,
        r#"{"ipMasq":false,"ipam":{"ranges":[[{"subnet":"fc00::/64"}]],"routes":[{"dst":"fc00::/48"}],"type":"host-local"},"isGateway":true,"mtu":1472,"name":"n","type":"bridge"}"#,
    );
}

#[test]
fn two_networks_give_two_routes() {
    golden(
        SHIPPED,
        &V4.replace("10.244.0.0/16", "10.244.0.0/16,10.245.0.0/16,10.244.0.0/16"),
        r#"{"cniVersion":"0.3.1","hairpinMode":true,"ipMasq":false,"ipam":{"ranges":[[{"subnet":"10.244.1.0/24"}]],"routes":[{"dst":"10.244.0.0/16"},{"dst":"10.245.0.0/16"}],"type":"host-local"},"isDefaultGateway":true,"isGateway":true,"mtu":1450,"name":"cbr0","type":"bridge"}"#,
    );
}

#[test]
fn another_delegate_is_no_gateway_but_gets_mtu_and_masquerading() {
    golden(
        r#"{"name":"n","cniVersion":"1.0.0","delegate":{"type":"macvlan","master":"eth1"},"runtimeConfig":{"mac":"02:00:00:00:00:01"},"prevResult":{"x":1},"dns":{"nameservers":[]},"args":{}}"#,
        V4,
        r#"{"cniVersion":"1.0.0","ipMasq":false,"ipam":{"ranges":[[{"subnet":"10.244.1.0/24"}]],"routes":[{"dst":"10.244.0.0/16"}],"type":"host-local"},"master":"eth1","mtu":1450,"name":"n","runtimeConfig":{"mac":"02:00:00:00:00:01"},"type":"macvlan"}"#,
    );
}

#[test]
fn ipvlan_in_both_modes_gets_the_members_it_needs() {
    for mode in ["l2", "l3"] {
        golden(
            &format!(
                r#"{{"name":"n","cniVersion":"1.0.0","delegate":{{"type":"ipvlan","master":"eth0","mode":"{mode}"}}}}"#
            ),
            V4,
            &format!(
                r#"{{"cniVersion":"1.0.0","ipMasq":false,"ipam":{{"ranges":[[{{"subnet":"10.244.1.0/24"}}]],"routes":[{{"dst":"10.244.0.0/16"}}],"type":"host-local"}},"master":"eth0","mode":"{mode}","mtu":1450,"name":"n","type":"ipvlan"}}"#
            ),
        );
    }
}

#[test]
fn what_the_delegate_says_itself_wins() {
    golden(
        r#"{"name":"n","delegate":{"ipMasq":true,"mtu":1300,"isGateway":false,"bridge":"<br&>","cniVersion":"0.2.0"}}"#,
        V4,
        r#"{"bridge":"\u003cbr\u0026\u003e","cniVersion":"0.2.0","ipMasq":true,"ipam":{"ranges":[[{"subnet":"10.244.1.0/24"}]],"routes":[{"dst":"10.244.0.0/16"}],"type":"host-local"},"isGateway":false,"mtu":1300,"name":"n","type":"bridge"}"#,
    );
}

#[test]
fn ipam_keeps_its_type_and_members_but_not_its_ranges_and_foreign_members_of_routes() {
    golden(
        r#"{"name":"n","ipam":{"type":"my-ipam","dataDir":"/x","ranges":"old","Routes":1,"routes":[{"dst":"10.96.0.0/12","via":"x","mtu":1400,"advmss":1300,"gw":"10.244.1.1"}]}}"#,
        V4,
        r#"{"ipMasq":false,"ipam":{"Routes":1,"dataDir":"/x","ranges":[[{"subnet":"10.244.1.0/24"}]],"routes":[{"dst":"10.96.0.0/12","gw":"10.244.1.1","mtu":1400,"advmss":1300},{"dst":"10.244.0.0/16"}],"type":"my-ipam"},"isGateway":true,"mtu":1450,"name":"n","type":"bridge"}"#,
    );
}

#[test]
fn keys_of_the_network_match_in_any_case_as_in_go() {
    let network = Network::parse(br#"{"NAME":"n","subnetfile":"/e","DATADIR":"","delegate":null}"#).unwrap();
    assert_eq!((network.subnet_file.as_str(), network.data_dir.as_str()), ("/e", ""));
    let network = Network::parse(br#"{"name":"n"}"#).unwrap();
    assert_eq!(network.subnet_file, "/run/flannel/subnet.env");
    assert_eq!(network.data_dir, "/var/lib/cni/flannel");
    assert_eq!(network.version(), "0.1.0");
}

#[test]
fn only_flannel_may_name_the_delegates_network_and_ipam() {
    let must_not =
        |key| (999, format!("'delegate' dictionary must not have '{key}' field, it'll be set by flannel"));
    assert_eq!(refused(r#"{"name":"n","delegate":{"name":"x"}}"#), must_not("name"));
    assert_eq!(refused(r#"{"name":"n","delegate":{"ipam":{}}}"#), must_not("ipam"));
    for kind in ["1", "null", "{}"] {
        assert_eq!(
            refused(&format!(r#"{{"name":"n","delegate":{{"type":{kind}}}}}"#)),
            (999, "'delegate' dictionary, if present, must have (string) 'type' field".into())
        );
    }
}

#[test]
fn input_that_is_no_network_is_refused_with_the_codes_of_the_framework() {
    for stdin in ["", "{", "null", "[]", "nonsense", r#"{"name":1}"#, r#"{"name":"n","cniVersion":1}"#] {
        assert_eq!(refused(stdin).0, 6, "{stdin}");
    }
    assert_eq!(refused("{}"), (7, "missing network name".into()));
    assert_eq!(refused(r#"{"name":"a/b"}"#), (7, "invalid characters found in network name".into()));
    for (members, named) in [
        (r#""dataDir":1"#, "dataDir"),
        (r#""delegate":[]"#, "delegate"),
        (r#""ipam":"x""#, "ipam"),
        (r#""runtimeConfig":[]"#, "runtimeConfig"),
        (r#""ipam":{"routes":{}}"#, "failed to parse ipam.routes"),
    ] {
        let (code, msg) = refused(&format!(r#"{{"name":"n",{members}}}"#));
        assert!(code == 999 && msg.contains(named), "{msg}");
    }
}

#[test]
fn a_del_without_subnet_env_still_has_a_range() {
    let network = Network::parse(br#"{"name":"n","ipam":{"dataDir":"/x"}}"#).unwrap();
    let text = network.delegate_for_del(None).unwrap().text;
    assert_eq!(
        text,
        r#"{"ipam":{"dataDir":"/x","ranges":[[{"subnet":"192.0.2.0/24"}]],"routes":[],"type":"host-local"},"isGateway":true,"name":"n","type":"bridge"}"#
    );
    assert_eq!(network.delegate_for_del(Some(Reading::default())).unwrap().text, text);
    let node = Reading::parse(V4).unwrap();
    assert_eq!(network.delegate_for_del(Some(node.clone())).unwrap(), network.delegate(&node).unwrap());
}

#[test]
fn check_gets_the_result_to_check_and_its_version() {
    let network = Network::parse(br#"{"name":"n","cniVersion":"0.4.0","prevResult":{"ips":[1]}}"#).unwrap();
    let kept = Delegate::from_kept(br#"{"cniVersion":"0.3.1","name":"n","type":"ptp"}"#).unwrap();
    let check = network.for_check(kept);
    assert_eq!(check.text, r#"{"cniVersion":"0.4.0","name":"n","prevResult":{"ips":[1]},"type":"ptp"}"#);
    assert_eq!(check.plugin, "ptp");
}

#[test]
fn no_part_of_a_kept_configuration_nor_one_with_a_zero_passes_for_a_whole_one() {
    let node = Reading::parse(V4).unwrap();
    let whole = Network::parse(SHIPPED.as_bytes()).unwrap().delegate(&node).unwrap();
    for end in 0..whole.text.len() {
        assert_eq!(Delegate::from_kept(&whole.text.as_bytes()[..end]), None, "{end}");
    }
    for at in 0..whole.text.len() {
        let mut zeroed = whole.text.clone().into_bytes();
        zeroed[at] = 0;
        assert_eq!(Delegate::from_kept(&zeroed), None, "{at}");
    }
    assert_eq!(Delegate::from_kept(whole.text.as_bytes()), Some(whole));
}

#[test]
fn gc_hands_on_the_list_under_both_keys_in_the_runtimes_version() {
    let stdin =
        r#"{"name":"n","cniVersion":"1.1.0","CNI.dev/attachments":[{"ifname":"eth0","containerID":"c1"}]}"#;
    let network = Network::parse(stdin.as_bytes()).unwrap();
    let kept = Delegate::from_kept(br#"{"cniVersion":"1.0.0","name":"n","type":"ptp"}"#).unwrap();
    let list = r#"[{"containerID":"c1","ifname":"eth0"}]"#;
    assert_eq!(
        network.for_gc(kept).text,
        format!(
            r#"{{"cni.dev/attachments":{list},"cni.dev/valid-attachments":{list},"cniVersion":"1.1.0","name":"n","type":"ptp"}}"#
        )
    );
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        ".{0,6}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(".{0,6}", inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
        let _ = Network::parse(&bytes).map(|network| network.delegate_for_del(None));
        let _ = Delegate::from_kept(&bytes);
    }

    #[test]
    fn arbitrary_members_never_panic(delegate in any_json(), ipam in any_json(), other in any_json()) {
        let stdin = json!({"name": "n", "delegate": delegate, "ipam": ipam, "runtimeConfig": other});
        let _ = Network::parse(stdin.to_string().as_bytes()).map(|network| network.delegate_for_del(None));
        let _ = Delegate::from_kept(delegate.to_string().as_bytes());
    }

    #[test]
    fn foreign_members_of_the_delegate_pass_through_unchanged(
        members in prop::collection::btree_map("[a-z]{1,3}", any_json(), 0..4),
    ) {
        let stdin = json!({"name": "n", "delegate": members});
        let network = Network::parse(stdin.to_string().as_bytes()).unwrap();
        let text = network.delegate(&Reading::parse(V4).unwrap()).unwrap().text;
        let made: Map<String, Value> = serde_json::from_str(&text).unwrap();
        for (key, value) in &members {
            prop_assert_eq!(made.get(key), Some(value));
        }
        prop_assert_eq!(made.len(), members.len() + 6);
    }
}
