//! Clusters that are made for measuring: settings, pods and policies.

use std::net::Ipv4Addr;
use std::time::Instant;

use backends::policy::{Enforcer, Engine, Settings};
use ipnet::{IpNet, Ipv4Net};
use subnet::policy::{
    Isolation, Labels, NamespaceScope, NetworkPolicy, ObjectName, Peer, Peers, Pod, Port, PortMatch, Ports,
    Protocol, Requirement, Rule, Selector, Uid,
};

pub(super) const SHIFT: u32 = 24;
const LOCAL_PODS: u32 = 100;

pub(super) fn settings() -> Settings {
    let net = |text: &str| text.parse::<IpNet>().into_iter().collect::<Vec<_>>();
    let nodes = (0..255).flat_map(|node| [0, 1].map(|last| Ipv4Addr::new(10, 244, node, last).into()));
    Settings {
        networks: net("10.244.0.0/16"),
        subnets: net("10.244.1.0/24"),
        nodes: nodes.collect(),
        strict: false,
        ipvs: false,
        log_group: None,
    }
}

/// Isolates the pod 10.244.1.2 by so many policies, the last of which allows all that the pod 10.244.2.2 sends.
pub(super) fn isolate(policies: u32) -> anyhow::Result<()> {
    let mut engine = Engine::new(settings(), SHIFT, 42);
    engine.cluster.set_namespace("shop", &Labels::new());
    engine.cluster.set_pod(&pod(1, 0, "10.244.1.0", 2, true));
    engine.cluster.set_pod(&pod(2, 1, "10.244.2.0", 2, false));
    for number in 0..policies {
        let mut one = policy(number * 100, "shop");
        one.name = ObjectName::new("shop", format!("policy-{number}"));
        engine.cluster.set_policy(one);
    }
    let sender = Selector::new([Requirement::equals("app", "app-1")]);
    let peers = Peers::Of([Peer::Pods { namespaces: NamespaceScope::Own, pods: sender }].into());
    let all = Rule { peers, ports: Ports::Any };
    let one = policy(0, "shop");
    let name = ObjectName::new("shop", "allowing");
    engine.cluster.set_policy(NetworkPolicy { name, ingress: Isolation::Isolated([all].into()), ..one });
    Enforcer::open(engine)?.converge(Instant::now())?;
    Ok(())
}

/// The cluster of the measurement that the design was chosen by: 20,000 pods, 300 selectors of 20 to 100 addresses and 3
/// of 10,000, 1,000 policies, each on one to three of 100 pods. With `both`, egress is isolated in the same way as ingress.
pub(super) fn natural(both: bool) -> Engine {
    let mut engine = Engine::new(settings(), SHIFT, 42);
    let cluster = &mut engine.cluster;
    cluster.set_namespace("shop", &Labels::new());
    for number in 0..20_000 {
        cluster.set_pod(&pod(number, number % 300, "10.244.2.0", number, false));
    }
    for number in 0..LOCAL_PODS {
        cluster.set_pod(&pod(500_000 + number, number, "10.244.1.0", 2 + number, true));
    }
    for number in 0..1_000 {
        let one = policy(number, "shop");
        let egress = if both { one.ingress.clone() } else { Isolation::Unspecified };
        cluster.set_policy(NetworkPolicy { egress, ..one });
    }
    engine
}

pub(super) fn pod(number: u32, app: u32, base: &str, offset: u32, local: bool) -> Pod {
    let base: Ipv4Addr = base.parse().expect("an address");
    let labels = [
        ("app", format!("app-{app}")),
        ("third", format!("{}", number % 2)),
        ("own", if local { format!("{}", app % 100) } else { String::new() }),
    ];
    Pod {
        uid: Uid(u128::from(number) + 1),
        name: ObjectName::new("shop", format!("pod-{number}")),
        labels: labels.into_iter().map(|(key, value)| (key.to_owned(), value)).collect(),
        addresses: vec![Ipv4Addr::from_bits(base.to_bits() + offset).into()],
        ports: Vec::new(),
        created: 0,
        local,
    }
}

pub(super) fn policy(number: u32, namespace: &str) -> NetworkPolicy {
    let peer =
        |requirement| Peer::Pods { namespaces: NamespaceScope::Own, pods: Selector::new([requirement]) };
    let ports = |first: u16| Port { protocol: Protocol::Tcp, port: PortMatch::Range(first..=first) };
    let large = Requirement::equals("third", format!("{}", number % 2));
    let small = Requirement::equals("app", format!("app-{}", number % 300));
    let peers = if number.is_multiple_of(100) { vec![peer(large)] } else { vec![peer(small)] };
    NetworkPolicy {
        name: ObjectName::new(namespace, format!("policy-{number}")),
        pods: Selector::new([Requirement::equals("own", format!("{}", number % 100))]),
        ingress: Isolation::Isolated(
            [Rule {
                peers: Peers::Of(peers.into()),
                ports: Ports::Of([ports(80 + (number % 7) as u16), ports(443)].into()),
            }]
            .into(),
        ),
        egress: Isolation::Unspecified,
    }
}

pub(super) fn namespace_labels(number: u32) -> Labels {
    let name = format!("team-{number}");
    [("kubernetes.io/metadata.name".to_owned(), name.clone()), ("team".to_owned(), name)].into()
}

/// 60 % of Deployments, 25 % of StatefulSets and 15 % of Jobs, with the labels that these give.
pub(super) fn realistic(number: u32) -> Pod {
    let namespace = number % 2_000;
    let app = format!("app-{}", number % 9_000);
    let mut labels: Labels = [
        ("app.kubernetes.io/name".to_owned(), app.clone()),
        ("app.kubernetes.io/instance".to_owned(), format!("{app}-prod")),
        ("app.kubernetes.io/part-of".to_owned(), format!("team-{namespace}")),
    ]
    .into();
    let extra = match number % 100 {
        0..60 => [("pod-template-hash", format!("{:010x}", number % 9_000)), ("tier", "backend".to_owned())],
        60..85 => [
            ("statefulset.kubernetes.io/pod-name", format!("{app}-{number}")),
            ("apps.kubernetes.io/pod-index", format!("{}", number % 50)),
        ],
        _ => [
            ("batch.kubernetes.io/job-name", format!("{app}-{number}")),
            ("batch.kubernetes.io/controller-uid", format!("{number:08x}-0000-4000-8000-000000000000")),
        ],
    };
    labels.extend(extra.map(|(key, value)| (key.to_owned(), value)));
    let net = Ipv4Net::new_assert(Ipv4Addr::new(10, 0, 0, 0), 8);
    Pod {
        uid: Uid(u128::from(number) << 64 | 0x4000_8000),
        name: ObjectName::new(format!("team-{namespace}"), format!("{app}-{number}")),
        labels,
        addresses: vec![Ipv4Addr::from_bits(net.addr().to_bits() + 0x10_0000 + number).into()],
        ports: Vec::new(),
        created: 0,
        local: false,
    }
}
