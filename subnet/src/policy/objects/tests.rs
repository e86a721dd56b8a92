//! Objects as API servers write them, and what becomes of members that mean nothing.

use proptest::prelude::*;

use super::*;

fn policy(spec: &str) -> ReadPolicy {
    let text = format!(r#"{{"metadata":{{"name":"p","namespace":"shop"}},"spec":{spec}}}"#);
    network_policy(text.as_bytes()).unwrap()
}

fn isolates(spec: &str) -> (bool, bool) {
    let policy = policy(spec).policy;
    (policy.ingress != Isolation::Unspecified, policy.egress != Isolation::Unspecified)
}

#[test]
fn without_types_ingress_is_isolated_and_egress_if_it_has_rules() {
    assert_eq!(isolates(r#"{"podSelector":{}}"#), (true, false));
    assert_eq!(isolates(r#"{"podSelector":{},"egress":[]}"#), (true, false));
    assert_eq!(isolates(r#"{"podSelector":{},"egress":[{}]}"#), (true, true));
    assert_eq!(isolates(r#"{"podSelector":{},"policyTypes":["Egress"],"ingress":[{}]}"#), (false, true));
    assert_eq!(isolates(r#"{"podSelector":{},"policyTypes":["Ingress"],"egress":[{}]}"#), (true, false));
}

#[test]
fn an_empty_list_means_anybody_but_a_list_of_unknown_things_nobody() {
    let rules = |rule: &str| policy(&format!(r#"{{"podSelector":{{}},"ingress":[{rule}]}}"#));
    let any = Rule { peers: Peers::Any, ports: Ports::Any };
    for rule in ["{}", r#"{"from":[],"ports":[]}"#, r#"{"from":null,"ports":null}"#] {
        assert_eq!(rules(rule).policy.ingress.rules(), std::slice::from_ref(&any), "{rule}");
    }
    let read = rules(r#"{"from":[{"fqdn":"example.org"}],"ports":[{"protocol":"QUIC","port":1}]}"#);
    let nobody = Rule { peers: Peers::Of([].into()), ports: Ports::Of([].into()) };
    assert_eq!(read.policy.ingress.rules(), [nobody]);
    assert_eq!(
        read.to_string(),
        "network policy shop/p: ingress[0].from[0] has no field that is known, so it matches nothing; \
         ingress[0].ports[0] names the protocol \"QUIC\", which is not known"
    );
}

#[test]
fn an_exception_that_cannot_be_read_widens_nothing() {
    let read = policy(
        r#"{"podSelector":{},"ingress":[{"from":[{"ipBlock":{"cidr":"10.0.0.0/8","except":["x"]}}]}]}"#,
    );
    assert_eq!(read.policy.ingress.rules()[0].peers, Peers::Of([].into()));
    assert_eq!(read.ignored, ["ingress[0].from[0] names \"x\", which is no block of addresses"]);
}

#[test]
fn ports_are_numbers_ranges_and_names() {
    let port = |text: &str| serde_json::from_str::<PortObject>(text).unwrap().read();
    let tcp = |port| Ok(Port { protocol: Protocol::Tcp, port });
    assert_eq!(port("{}"), tcp(PortMatch::All));
    assert_eq!(port(r#"{"port":80}"#), tcp(PortMatch::Range(80..=80)));
    assert_eq!(port(r#"{"port":80,"endPort":90}"#), tcp(PortMatch::Range(80..=90)));
    assert_eq!(port(r#"{"port":"web"}"#), tcp(PortMatch::Named("web".into())));
    for wrong in [
        r#"{"port":0}"#,
        r#"{"port":70000}"#,
        r#"{"port":90,"endPort":80}"#,
        r#"{"endPort":80}"#,
        r#"{"port":"web","endPort":80}"#,
    ] {
        assert!(port(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn a_pod_that_has_ended_or_is_on_its_hosts_network_has_no_address() {
    let read = |spec: &str, status: &str| {
        let text = format!(
            r#"{{"metadata":{{"name":"a","namespace":"shop","uid":"0000002a-0000-0000-0000-000000000000",
               "creationTimestamp":"1970-01-02T00:00:01Z","labels":{{"app":"web"}}}},
               "spec":{spec},"status":{status}}}"#
        );
        pod(text.as_bytes(), "n1").unwrap()
    };
    let spec = r#"{"nodeName":"n1","containers":[{"ports":[{"name":"web","containerPort":80},{"containerPort":81}]}],
        "initContainers":[{"ports":[{"name":"once","containerPort":1}]},
        {"restartPolicy":"Always","ports":[{"name":"side","protocol":"UDP","containerPort":2}]}]}"#;
    let status = r#"{"phase":"Running","podIP":"10.0.0.1","podIPs":[{"ip":"10.0.0.1"},{"ip":"fd00::1"}]}"#;
    let ReadPod::Own(own) = read(spec, status) else { panic!("a pod with addresses of its own") };
    assert_eq!(own.uid, Uid(0x2a << 96));
    assert_eq!((own.created, own.local), (86_401, true));
    assert_eq!(own.addresses, ["10.0.0.1", "fd00::1"].map(|text| text.parse::<std::net::IpAddr>().unwrap()));
    let ports: Vec<_> = own.ports.iter().map(|port| (&*port.name, port.protocol, port.port)).collect();
    assert_eq!(ports, [("web", Protocol::Tcp, 80), ("side", Protocol::Udp, 2)]);
    assert_eq!(read(spec, r#"{"phase":"Failed","podIP":"10.0.0.1"}"#), ReadPod::Without(own.uid));
    assert_eq!(read(r#"{"hostNetwork":true}"#, status), ReadPod::Without(own.uid));
}

#[test]
fn times_are_seconds_since_1970() {
    assert_eq!(seconds("1970-01-01T00:00:00Z"), Some(0));
    assert_eq!(seconds("2000-03-01T00:00:00Z"), Some(951_868_800));
    assert_eq!(seconds("2026-11-28T16:09:34Z"), Some(1_795_882_174));
    assert_eq!(seconds("never"), None);
}

fn json() -> impl Strategy<Value = serde_json::Value> {
    let leaf = prop_oneof![
        Just(serde_json::Value::Null),
        any::<bool>().prop_map(Into::into),
        any::<i64>().prop_map(Into::into),
        "[a-zA-Z0-9./:-]{0,12}".prop_map(Into::into),
    ];
    let key = proptest::sample::select(vec![
        "metadata",
        "spec",
        "status",
        "podSelector",
        "policyTypes",
        "ingress",
        "from",
        "ports",
        "port",
        "endPort",
        "protocol",
        "ipBlock",
        "cidr",
        "except",
        "matchLabels",
        "matchExpressions",
        "operator",
        "values",
        "key",
        "namespaceSelector",
        "containers",
        "podIPs",
        "ip",
        "name",
    ]);
    leaf.prop_recursive(6, 64, 6, move |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(serde_json::Value::from),
            proptest::collection::btree_map(key.clone().prop_map(str::to_owned), inner, 0..6)
                .prop_map(|map| serde_json::Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn arbitrary_objects_never_panic(value in json(), bytes: Vec<u8>) {
        for text in [value.to_string().into_bytes(), bytes] {
            drop((network_policy(&text), pod(&text, "n"), namespace(&text)));
        }
    }
}
