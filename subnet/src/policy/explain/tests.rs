use super::super::{NamedPort, Requirement, Uid};
use super::super::{NamespaceScope, Peer, Peers, Port, PortMatch, Ports, Rule, Selector};
use super::*;

fn selector(pairs: &[(&str, &str)]) -> Selector {
    Selector::new(pairs.iter().map(|(key, value)| Requirement::equals(*key, *value)))
}

fn labels_of(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn pod(namespace: &str, name: &str, labels: &[(&str, &str)], address: &str, node: &str) -> End {
    let pod = Pod {
        uid: Uid(name.len() as u128),
        name: ObjectName::new(namespace, name),
        labels: labels_of(labels),
        addresses: address.parse().into_iter().collect(),
        ports: vec![NamedPort { name: "pg".into(), protocol: Protocol::Tcp, port: 5432 }],
        created: 1,
        local: node == "a1",
    };
    End { address: pod.addresses.first().copied(), party: Party::Pod(Box::new(pod)), node: Some(node.into()) }
}

fn web() -> End {
    pod("shop", "web-7d9f-x2v9q", &[("app", "web"), ("pod-template-hash", "7d9f")], "10.244.1.7", "a1")
}

fn db() -> End {
    pod("shop", "db-0", &[("app", "db")], "10.244.3.4", "a3")
}

fn end(party: Party, address: &str, node: Option<&str>) -> End {
    End { party, address: address.parse().ok(), node: node.map(str::to_owned) }
}

fn ports(protocol: Protocol, port: PortMatch) -> Ports {
    Ports::Of([Port { protocol, port }].into())
}

fn number(port: u16) -> PortMatch {
    PortMatch::Range(port..=port)
}

fn own(pairs: &[(&str, &str)]) -> Peer {
    Peer::Pods { namespaces: NamespaceScope::Own, pods: selector(pairs) }
}

fn block(cidr: &str, except: &[&str]) -> Peer {
    Peer::Block {
        cidr: cidr.parse().unwrap(),
        except: except.iter().map(|net| net.parse().unwrap()).collect(),
    }
}

fn rule(peers: Vec<Peer>, ports: Ports) -> Rule {
    let peers = if peers.is_empty() { Peers::Any } else { Peers::Of(peers.into()) };
    Rule { peers, ports }
}

fn policy(name: &str, pods: &[(&str, &str)], ingress: Isolation, egress: Isolation) -> NetworkPolicy {
    NetworkPolicy { name: ObjectName::new("shop", name), pods: selector(pods), ingress, egress }
}

fn only(rules: Vec<Rule>) -> Isolation {
    Isolation::Isolated(rules.into())
}

fn context(policies: Vec<NetworkPolicy>) -> PolicyContext {
    PolicyContext {
        policies: policies.into_iter().map(Arc::new).collect(),
        namespaces: [("shop".to_owned(), labels_of(&[("team", "a")])), ("other".to_owned(), Labels::new())]
            .into(),
        networks: vec!["10.244.0.0/16".parse().unwrap()],
        nodes: ["10.244.1.0", "10.244.1.1", "10.244.2.0", "10.244.2.1"].map(|ip| ip.parse().unwrap()).into(),
    }
}

fn ask(context: &PolicyContext, source: End, destination: End, port: u16) -> Explanation {
    explain(context, &Question { source, destination, protocol: Protocol::Tcp, port })
}

#[test]
fn a_denied_connection_is_explained_with_what_isolates_what_comes_near_and_what_to_write() {
    let context = context(vec![
        policy("default-deny", &[], Isolation::Unspecified, only(vec![])),
        policy(
            "allow-dns",
            &[],
            Isolation::Unspecified,
            only(vec![rule(vec![], ports(Protocol::Udp, number(53)))]),
        ),
        policy(
            "db",
            &[("app", "db")],
            only(vec![rule(
                vec![own(&[("app", "admin")]), own(&[("app", "web")])],
                ports(Protocol::Tcp, PortMatch::Named("pg".into())),
            )]),
            Isolation::Unspecified,
        ),
    ]);
    let explained = ask(&context, web(), db(), 5432);
    let expected = "\
shop/web-7d9f-x2v9q (10.244.1.7, node a1) → shop/db-0 (10.244.3.4, node a3) TCP 5432
  egress   isolated by shop/default-deny, shop/allow-dns
           shop/allow-dns egress[0]: peers match, ports don't (UDP 53)
           → DENIED: no rule allows it
  ingress  allowed by shop/db ingress[0].from[1] (podSelector app=web), port \"pg\" = 5432 on db-0
  remedy   allow TCP 5432 to app=db in a policy of namespace shop that selects app=web
  verdict  DENIED
";
    assert_eq!((explained.allowed, &*explained.text), (false, expected));
}

#[test]
fn what_no_policy_is_about_is_said_by_name() {
    let closed = context(vec![policy("deny", &[], only(vec![]), only(vec![]))]);
    let job = || end(Party::Finished(ObjectName::new("shop", "job-1")), "10.244.2.9", Some("a2"));
    let host =
        |node| end(Party::HostNetwork(ObjectName::new("kube-system", "proxy")), "192.0.2.2", Some(node));
    let node = |node| end(Party::Node, "10.244.2.0", Some(node));
    for (source, destination, allowed, part) in [
        (web(), web(), true, "a pod always reaches itself"),
        (web(), host("a1"), true, "a pod and its own node always reach each other"),
        (node("a3"), db(), true, "a pod and its own node always reach each other"),
        (node("a2"), db(), false, "another node is an address like any from outside"),
        (
            host("a2"),
            db(),
            false,
            "kube-system/proxy is on its host's network: it is judged as an address of its node",
        ),
        (web(), job(), false, "shop/job-1 has ended: another pod may have its address by now"),
        (job(), host("a1"), true, "shop/job-1 has ended: no policy is about it"),
        (host("a2"), host("a1"), true, "kube-system/proxy is on its host's network: no policy is about it"),
        (end(Party::Address, "192.0.2.7", None), db(), false, "allow TCP 80 from an ipBlock with 192.0.2.7"),
    ] {
        let explained = ask(&closed, source.clone(), destination.clone(), 80);
        assert!(explained.text.contains(part), "{part} in\n{}", explained.text);
        assert_eq!(explained.allowed, allowed, "{}", explained.text);
    }
    let open = ask(&context(vec![]), web(), db(), 80);
    assert!(open.allowed && open.text.contains("no policy isolates shop/db-0 for ingress"), "{}", open.text);
}

/// A connection of web to this destination is refused by a policy with one rule, and this part of the text says why.
fn assert_in_the_way(destination: End, peers: Vec<Peer>, ports: Ports, part: &str) {
    let context =
        context(vec![policy("p", &[("app", "web")], Isolation::Unspecified, only(vec![rule(peers, ports)]))]);
    let explained = ask(&context, web(), destination, 80);
    assert!(!explained.allowed && explained.text.contains(part), "{part} in\n{}", explained.text);
}

#[test]
fn what_stands_in_the_way_of_a_rule_is_said_by_name() {
    let service = || end(Party::Service(ObjectName::new("shop", "db")), "10.96.0.10", None);
    let host = || end(Party::HostNetwork(ObjectName::new("shop", "agent")), "192.0.2.2", Some("a2"));
    let other = || pod("other", "web", &[("app", "web")], "10.244.2.7", "a2");
    let elsewhere = |labels: &[(&str, &str)], pods: &[(&str, &str)]| Peer::Pods {
        namespaces: NamespaceScope::Matching(selector(labels)),
        pods: selector(pods),
    };
    // Egress of web: the destination, the rule, and what is said.
    for (destination, peers, part) in [
        (service(), vec![block("10.96.0.0/12", &[])], "a Service's address never matches an ipBlock"),
        (service(), vec![own(&[("app", "db")])], "its endpoints are what selectors match"),
        (host(), vec![own(&[])], "shop/agent is on its host's network, and so an address of its node"),
        (host(), vec![elsewhere(&[], &[])], "no selector matches it"),
        (other(), vec![own(&[("app", "web")])], "only pods of shop, as there is no namespaceSelector"),
        (other(), vec![elsewhere(&[("team", "a")], &[])], "its namespace other doesn't match"),
        (other(), vec![elsewhere(&[("team", "z")], &[])], "namespaceSelector team=z matches no namespace"),
        (db(), vec![block("10.244.0.0/16", &["10.244.3.0/24"])], "is in its exception 10.244.3.0/24"),
    ] {
        assert_in_the_way(destination, peers, Ports::Any, part);
    }
}

#[test]
fn ports_that_stand_in_the_way_of_a_rule_are_named() {
    let service = || end(Party::Service(ObjectName::new("shop", "db")), "10.96.0.10", None);
    for (destination, ports, part) in [
        (
            db(),
            ports(Protocol::Tcp, PortMatch::Named("http".into())),
            "no container of shop/db-0 has a port named \"http\"",
        ),
        (
            db(),
            ports(Protocol::Udp, PortMatch::Named("pg".into())),
            "port \"pg\" of shop/db-0 is TCP, not UDP",
        ),
        (db(), ports(Protocol::Tcp, PortMatch::Named("pg".into())), "TCP \"pg\" = 5432 on db-0"),
        (
            service(),
            ports(Protocol::Tcp, PortMatch::Named("pg".into())),
            "port name \"pg\", which only pods have",
        ),
        (db(), ports(Protocol::Tcp, PortMatch::Range(1..=79)), "ports don't (TCP 1-79)"),
        (db(), ports(Protocol::Sctp, PortMatch::All), "ports don't (all of SCTP)"),
        (db(), Ports::Of([].into()), "no port that is understood"),
    ] {
        assert_in_the_way(destination, vec![], ports, part);
    }
}

#[test]
fn rules_that_allow_are_named_with_the_peer_and_the_port() {
    let everyone = Peer::Pods { namespaces: NamespaceScope::Matching(selector(&[])), pods: selector(&[]) };
    let unknown = || end(Party::Address, "10.244.9.9", None);
    for (source, peers, ports, part) in [
        (web(), vec![], Ports::Any, "allowed by shop/p ingress[0]\n"),
        (
            web(),
            vec![everyone.clone()],
            Ports::Any,
            "allowed by shop/p ingress[0].from[0] (namespaceSelector all)\n",
        ),
        (unknown(), vec![everyone], Ports::Any, "(namespaceSelector all)"),
        (
            web(),
            vec![block("10.244.1.0/24", &["10.244.1.9/32"])],
            ports(Protocol::Tcp, PortMatch::All),
            "from[0] (ipBlock 10.244.1.0/24 except 10.244.1.9/32), all of TCP",
        ),
    ] {
        let context = context(vec![policy(
            "p",
            &[("app", "db")],
            only(vec![rule(peers, ports)]),
            Isolation::Unspecified,
        )]);
        let explained = ask(&context, source, db(), 80);
        assert!(explained.allowed && explained.text.contains(part), "{part} in\n{}", explained.text);
    }
}

#[test]
fn many_rules_that_do_not_match_are_counted() {
    let rules = (1..=30).map(|port| rule(vec![], ports(Protocol::Tcp, number(port)))).collect();
    let context = context(vec![policy("p", &[], only(rules), Isolation::Unspecified)]);
    let explained = ask(&context, web(), db(), 80);
    assert!(explained.text.contains("22 other rules don't match"), "{}", explained.text);
    assert!(explained.text.lines().count() < 20);
}

#[test]
fn pods_are_listed_with_the_policies_that_isolate_them() {
    let policies = [
        policy("a", &[("app", "db")], only(vec![]), Isolation::Unspecified),
        policy("b", &[], only(vec![]), Isolation::Unspecified),
    ];
    let policies: Vec<_> = policies.into_iter().map(Arc::new).collect();
    let pods = [db(), web(), pod("other", "x", &[], "", "a1")].map(|end| match end.party {
        Party::Pod(pod) => *pod,
        _ => unreachable!(),
    });
    let expected = "\
shop/db-0 (10.244.3.4)
  egress   open: no policy isolates it
  ingress  isolated by shop/a, shop/b
shop/web-7d9f-x2v9q (10.244.1.7)
  egress   open: no policy isolates it
  ingress  isolated by shop/b
other/x (no address yet)
  egress   open: no policy isolates it
  ingress  open: no policy isolates it
";
    assert_eq!(list(&policies, &pods), expected);
}
