//! The configuration changes on living nodes, with every store: what can be followed is, and what can't is
//! refused with the reason.

use std::thread;
use std::time::Duration;

use backends::testing::{Pinger, Pod};
use subnet::Family;

use crate::bed::{LIMIT, Member};
use crate::site::{Kind, Site, answered, config, logs, lost, pings, pings_of};

const V4: &[Family] = &[Family::V4];
const VXLAN: &str = r#"{"Type":"vxlan"}"#;
const VNI_2: &str = r#"{"Type":"vxlan","VNI":2}"#;
const PORT: &str = r#"{"Type":"vxlan","Port":4789}"#;
const MTU_1400: &str = r#"{"Type":"vxlan","MTU":1400}"#;
const HOST_GW: &str = r#"{"Type":"host-gw"}"#;
const UDP: &str = r#"{"Type":"udp"}"#;
const WIREGUARD: &str = r#"{"Type":"wireguard"}"#;

struct Setup {
    site: Site,
    members: [Member; 2],
    pods: [Pod; 2],
}

impl Setup {
    fn new(kind: Kind, config: &str, args: &[&str]) -> Self {
        let site = Site::new(kind, config);
        let members = [site.join_with(args), site.join_with(args)];
        let pods = members.each_ref().map(Member::pod_of_all_families);
        Self { site, members, pods }
    }

    fn pings(&self) -> Vec<Pinger> {
        pings(&self.pods.each_ref())
    }

    fn wait(&self, what: &str, condition: impl Fn(&Member) -> bool) {
        for member in &self.members {
            member.wait(what, || condition(member));
        }
    }

    fn wait_for_routes(&self, part: &str) {
        for (from, to) in [(0, 1), (1, 0)] {
            let subnet = self.members[to].subnet();
            self.members[from].wait(&format!("a route with {part}"), || {
                self.members[from].show(&format!("ip route show {subnet}")).contains(part)
            });
        }
    }

    fn logs(&self) -> String {
        logs(&self.members.each_ref())
    }

    /// Neither has ended, and neither has begun again.
    fn assert_same_processes(&mut self) {
        for member in &mut self.members {
            assert!(member.agent.process().ended().unwrap().is_none());
            assert_eq!(member.agent.log().matches("flanneld v").count(), 1);
        }
    }

    fn assert_nothing_lost(&self, pings: Vec<Pinger>, what: &str) {
        let lost = lost(pings);
        assert!(lost.iter().all(|lost| *lost == 0), "{what}: {lost:?}\n{}", self.logs());
    }
}

fn subnet_env(member: &Member) -> String {
    std::fs::read_to_string(member.node.subnet_file()).unwrap()
}

fn link(member: &Member, device: &str) -> String {
    member.try_show(&format!("ip -o link show {device}"))
}

/// Everything that can change, one after the other, while pods talk over IPv4.
fn follows(kind: Kind) {
    let mut setup = Setup::new(kind, &config(V4, VXLAN), &["--ip-masq", "--traffic-manager=nft"]);
    setup.wait_for_routes("dev flannel.1");
    let pings = setup.pings();

    setup.site.configure(&config(V4, HOST_GW));
    setup.wait_for_routes("dev eth0");
    setup.wait("the MTU of host-gw or still that of vxlan", |member| {
        let mtu = member.agent.subnet_env().unwrap().mtu;
        mtu == Some(1500) || mtu == Some(1450)
    });
    answered(&pings);

    setup.site.configure(&config(V4, VXLAN));
    setup.wait_for_routes("dev flannel.1");
    answered(&pings);

    setup.site.configure(&config(V4, VNI_2));
    setup.wait_for_routes("dev flannel.2");
    answered(&pings);

    setup.site.configure(&config(V4, MTU_1400));
    setup.wait_for_routes("dev flannel.1");
    setup.wait("the MTU", |member| {
        member.agent.subnet_env().unwrap().mtu == Some(1350)
            && link(member, "flannel.1").contains(" mtu 1350 ")
    });
    answered(&pings);

    follows_rules(&setup, &pings);
    follows_families(&setup, &pings);

    setup.assert_nothing_lost(pings, &format!("{kind:?}"));
    setup.assert_same_processes();
    assert!(setup.members.iter().all(Member::is_ready));
}

/// A larger network, and an exception from masquerading.
fn follows_rules(setup: &Setup, pings: &[Pinger]) {
    let grown = config(V4, VXLAN).replace("10.244.0.0/16", "10.240.0.0/12");
    setup.site.configure(&grown);
    setup.wait("the network in subnet.env", |member| {
        subnet_env(member).starts_with("FLANNEL_NETWORK=10.240.0.0/12\n")
    });
    setup
        .wait("the network in the rules", |member| member.show("nft list ruleset").contains("10.240.0.0/12"));
    answered(pings);

    let except = grown.replace("\"Backend\"", r#""MasqueradeExcept":["172.31.0.0/24"],"Backend""#);
    setup.site.configure(&except);
    setup.wait("the exception", |member| member.show("nft list ruleset").contains("172.31.0.0/24"));
    setup.site.configure(&grown);
    setup.wait("its end", |member| !member.show("nft list ruleset").contains("172.31.0.0/24"));
    answered(pings);
}

/// IPv6 comes and goes.
fn follows_families(setup: &Setup, pings: &[Pinger]) {
    let subnets = setup.members.each_ref().map(Member::subnet);
    setup.site.configure(&config(&Family::BOTH, VXLAN));
    setup.wait("both families", |member| member.subnets().len() == 2);
    setup.wait("the device of IPv6", |member| {
        link(member, "flannel-v6.1").contains(" mtu 1430 ")
            && member.agent.subnet_env().unwrap().mtu == Some(1430)
    });
    setup.wait("a route of IPv6", |member| member.show("ip -6 route show proto 70").contains("flannel-v6.1"));
    for (from, to) in [(0, 1), (1, 0)] {
        let far = setup.members[to].subnets().pop().unwrap().network();
        setup.members[from]
            .wait("an echo over IPv6", || setup.members[from].node.namespace().reaches(far).unwrap());
    }
    assert_eq!(setup.members.each_ref().map(Member::subnet), subnets);
    answered(pings);

    setup.site.configure(&config(V4, VXLAN));
    setup.wait("IPv4 alone", |member| !subnet_env(member).contains("IPV6"));
    setup.wait("the end of the device", |member| link(member, "flannel-v6.1").is_empty());
    setup.wait("the end of the rules", |member| !member.show("nft list ruleset").contains("flannel-ipv6"));
    assert_eq!(setup.members.each_ref().map(Member::subnet), subnets);
    assert_eq!(setup.site.announced().len(), 2, "{:?}", setup.site.announced());
    answered(pings);
}

#[test]
fn every_change_of_the_configuration_in_etcd_is_followed_without_a_restart_and_without_loss() {
    follows(Kind::Etcd);
}

#[test]
fn every_change_of_the_configuration_in_files_is_followed_without_a_restart_and_without_loss() {
    follows(Kind::Files);
}

#[test]
fn every_change_of_a_config_map_is_followed_without_a_restart_and_without_loss() {
    follows(Kind::Kube);
}

#[test]
fn a_configuration_that_is_renamed_into_place_is_followed() {
    let setup = Setup::new(Kind::Files, &config(V4, VXLAN), &[]);
    setup.site.configure_by_rename(&config(V4, VNI_2));
    setup.wait_for_routes("dev flannel.2");
    setup.site.configure_by_rename(&config(V4, VXLAN));
    setup.wait_for_routes("dev flannel.1");
}

/// What can't be followed: a reason that the operator is told, and nothing else changes.
fn refuses(kind: Kind) {
    let good = config(V4, VXLAN);
    let mut setup = Setup::new(kind, &good, &[]);
    setup.wait_for_routes("dev flannel.1");
    for member in &setup.members {
        // A host without IPv6.
        member.show("ip -6 addr flush dev eth0");
    }
    let pings = setup.pings();
    let mut bad = vec![
        (r#"{"Network":"#.to_owned(), "JSON"),
        (String::new(), "JSON"),
        (r#"{"Network":"10.244.0.0/33","Backend":{"Type":"vxlan"}}"#.to_owned(), "10.244.0.0/33"),
        (config(V4, r#"{"Type":"vxlann"}"#), "\\\"vxlann\\\" is no backend"),
        (config(V4, r#"{"Type":"ipsec"}"#), "backend of Go flannel"),
        (config(V4, r#"{"Type":"vxlan","VNI":"one"}"#), "VNI"),
        (config(V4, r#"{"Type":"vxlan","VNI":10000000}"#), "Backend.VNI: 10000000"),
        (config(&Family::BOTH, VXLAN), "IPv6"),
        (config(&[Family::V6], VXLAN), "IPv6"),
    ];
    if kind == Kind::Kube {
        bad.push((config(V4, VXLAN).replace("10.244.0.0/16", "10.99.0.0/16"), "10.99.0.0/16"));
    }
    if kind != Kind::Kube {
        // With Kubernetes somebody else divides the network.
        let len = |len: u8| good.replace("\"Backend\"", &format!("\"SubnetLen\":{len},\"Backend\""));
        bad.extend([(len(31), "SubnetLen"), (len(17), "SubnetLen"), (len(26), "drain")]);
    }
    let before = setup.members.each_ref().map(|member| (subnet_env(member), member.state()));
    for (round, (bad, reason)) in bad.iter().enumerate() {
        setup.site.configure(bad);
        setup.wait(&format!("the refusal of {bad}"), |member| {
            let notes = member.verbose();
            notes.contains("the new configuration is not in force") && notes.contains(reason)
        });
        for member in &setup.members {
            let log = member.agent.log();
            assert!(
                log.contains("can't be followed") && log.contains(&reason.replace('\\', "")),
                "{reason}: {log}"
            );
            assert!(member.is_ready(), "{bad}");
        }
        let now = setup.members.each_ref().map(|member| (subnet_env(member), member.state()));
        assert_eq!(now, before, "{bad}");
        // The next one counts, be it the old or another.
        if round % 2 == 0 {
            setup.site.configure(&config(V4, MTU_1400));
            setup.wait("the MTU", |member| member.agent.subnet_env().unwrap().mtu == Some(1350));
        }
        setup.site.configure(&good);
        setup.wait("the old MTU", |member| member.agent.subnet_env().unwrap().mtu == Some(1450));
        setup.wait("no note", |member| !member.verbose().contains("not in force"));
        answered(&pings);
    }
    setup.assert_nothing_lost(pings, &format!("{kind:?}"));
    setup.assert_same_processes();
}

#[test]
fn what_cannot_be_followed_in_etcd_is_refused_with_the_reason() {
    refuses(Kind::Etcd);
}

#[test]
fn what_cannot_be_followed_in_files_is_refused_with_the_reason() {
    refuses(Kind::Files);
}

#[test]
fn what_cannot_be_followed_in_a_config_map_is_refused_with_the_reason() {
    refuses(Kind::Kube);
}

/// From one configuration to the next, and what shows on a node that it is in force.
fn migrations() -> Vec<(String, String)> {
    let grown = config(V4, VXLAN).replace("10.244.0.0/16", "10.240.0.0/12");
    vec![
        (config(V4, VXLAN), config(V4, HOST_GW)),
        (config(V4, HOST_GW), config(V4, VXLAN)),
        (config(V4, VXLAN), config(V4, VNI_2)),
        (config(V4, VXLAN), config(V4, MTU_1400)),
        (config(V4, VXLAN), grown),
        (config(V4, VXLAN), config(&Family::BOTH, VXLAN)),
        (config(&Family::BOTH, VXLAN), config(&Family::BOTH, HOST_GW)),
        (config(&Family::BOTH, HOST_GW), config(&Family::BOTH, VNI_2)),
        (config(&Family::BOTH, VXLAN), config(V4, VXLAN)),
        (config(V4, VXLAN), config(V4, PORT)),
        (config(&Family::BOTH, PORT), config(&Family::BOTH, VXLAN)),
        (config(V4, VXLAN), config(V4, UDP)),
        (config(V4, UDP), config(V4, HOST_GW)),
        (config(&Family::BOTH, VXLAN), config(&Family::BOTH, UDP)),
        (config(&Family::BOTH, UDP), config(&Family::BOTH, HOST_GW)),
        (config(V4, VXLAN), config(V4, WIREGUARD)),
        (config(V4, UDP), config(V4, WIREGUARD)),
        (config(V4, WIREGUARD), config(V4, HOST_GW)),
        (config(&Family::BOTH, VXLAN), config(&Family::BOTH, WIREGUARD)),
        (config(&Family::BOTH, WIREGUARD), config(&Family::BOTH, UDP)),
        (config(V4, UDP), config(&Family::BOTH, UDP)),
        (config(&Family::BOTH, UDP), config(V4, UDP)),
    ]
}

/// Runs each on a thread of its own: most of their time they wait.
fn each_migration(work: impl Fn(&str, &str) + Sync) {
    thread::scope(|scope| {
        for (from, to) in migrations() {
            let (name, work) = (format!("{from} to {to}"), &work);
            let work = move || work(&from, &to);
            thread::Builder::new().name(name).spawn_scoped(scope, work).unwrap();
        }
    });
}

/// The families that are there before and after.
fn common(from: &str, to: &str) -> Vec<Family> {
    let both = [from, to].iter().all(|config| config.contains("IPv6Network"));
    if both { Family::BOTH.to_vec() } else { V4.to_vec() }
}

#[test]
fn nodes_that_see_another_configuration_three_seconds_apart_lose_nothing() {
    each_migration(|from, to| {
        let mut setup = Setup::new(Kind::Kube, from, &[]);
        let pings = pings_of(&setup.pods.each_ref(), &common(from, to));
        for member in &setup.members {
            setup.site.configure_one(&member.node.name(), to);
            member.wait_for_log("the configuration has changed");
            thread::sleep(Duration::from_secs(3));
            answered(&pings);
        }
        // Packets are not kept until a first session of WireGuard is agreed on, which takes longer than a ping here, where
        // fifteen clusters share two CPUs. `wireguard::a_cluster_encrypts…` counts on a quiet one.
        if [from, to].iter().any(|config| config.contains("wireguard")) {
            answered(&pings);
        } else {
            setup.assert_nothing_lost(pings, &format!("{from} to {to}"));
        }
        setup.assert_same_processes();
        assert!(setup.members.iter().all(Member::is_ready));
    });
}

#[test]
fn nodes_that_are_restarted_one_after_the_other_with_another_configuration_lose_nothing() {
    each_migration(|from, to| {
        // These backends carry packets in the process: then there is a gap, and an end of it.
        let in_process = ["udp", "wireguard"].iter().any(|name| from.contains(name) || to.contains(name));
        let mut setup = Setup::new(Kind::Kube, from, &[]);
        let pings = pings_of(&setup.pods.each_ref(), &common(from, to));
        for index in 0..2 {
            let name = setup.members[index].node.name();
            setup.members[index].agent.terminate(LIMIT).unwrap();
            setup.site.configure_one(&name, to);
            setup.members[index].start_again();
            thread::sleep(Duration::from_secs(1));
            answered(&pings);
        }
        if in_process {
            answered(&pings);
        } else {
            setup.assert_nothing_lost(pings, &format!("{from} to {to}"));
        }
    });
}

#[test]
fn a_node_that_cannot_run_any_more_as_before_its_restart_takes_the_new_configuration() {
    let mut setup = Setup::new(Kind::Kube, &config(&Family::BOTH, VXLAN), &[]);
    let pings = pings_of(&setup.pods.each_ref(), V4);
    let member = &mut setup.members[0];
    member.agent.terminate(LIMIT).unwrap();
    member.show("ip -6 addr flush dev eth0");
    setup.site.configure_one(&member.node.name(), &config(V4, VXLAN));
    member.start_again();
    member.wait("IPv4 alone", || !subnet_env(member).contains("IPV6"));
    assert!(member.is_ready());
    setup.assert_nothing_lost(pings, "IPv4");
}

/// What a pod of `member` has a route for on every other node.
fn routed(setup: &Setup, index: usize, subnet: &str) -> bool {
    let family = if subnet.contains(':') { "-6" } else { "-4" };
    !setup.members[1 - index].show(&format!("ip {family} route show {subnet}")).is_empty()
}

/// The network of one family moves, then that of the other, and then every agent is restarted, while pods that were
/// there before talk.
fn one_family_moves(kind: Kind, backend: &str) {
    let both = config(&Family::BOTH, backend);
    let mut setup = Setup::new(kind, &both, &["--ip-masq", "--traffic-manager=nft"]);
    let pings = setup.pings();
    let before = setup.members.each_ref().map(Member::subnets);

    let moved = both.replace("10.244.0.0/16", "10.99.0.0/16");
    setup.site.configure(&moved);
    setup.wait("an IPv4 subnet of the new network", |member| {
        member.subnet().to_string().starts_with("10.99.")
    });
    let after = setup.members.each_ref().map(Member::subnets);
    for index in 0..2 {
        assert_eq!(after[index][1], before[index][1], "the IPv6 subnet stays");
        setup.members[index].wait("the routes to both IPv4 subnets", || {
            let both = [before[1 - index][0], after[1 - index][0]];
            both.iter().all(|subnet| routed(&setup, 1 - index, &subnet.to_string()))
        });
    }
    answered(&pings);

    let again = moved.replace("fd00:244::/48", "fd00:99::/48");
    setup.site.configure(&again);
    setup.wait("an IPv6 subnet of the new network", |member| {
        member.subnets()[1].to_string().starts_with("fd00:99:")
    });
    let last = setup.members.each_ref().map(Member::subnets);
    for index in 0..2 {
        assert_eq!(last[index][0], after[index][0], "the IPv4 subnet stays");
    }
    answered(&pings);
    setup.wait("the state file with the networks that are left", |member| {
        let kept = member.kept();
        kept.contains("10.244.0.0/16") && kept.contains("fd00:244::/48") && kept.contains("\"own\":[\"10.99.")
    });

    for (index, before) in before.iter().enumerate() {
        setup.members[index].agent.terminate(LIMIT).unwrap();
        setup.members[index].start_again();
        answered(&pings);
        setup.members[index].wait("a note about the pods of the old networks", || {
            let notes = setup.members[index].verbose();
            before.iter().all(|subnet| notes.contains(&format!("{subnet} is of an earlier network")))
        });
    }
    let old = before.each_ref().map(|subnets| subnets.iter().map(ToString::to_string).collect::<Vec<_>>());
    for (index, subnet) in
        old.iter().enumerate().flat_map(|(index, all)| all.iter().map(move |one| (index, one)))
    {
        assert!(routed(&setup, index, subnet), "{subnet}");
    }
    for pod in &setup.pods {
        let announced = setup.site.announced().join("\n");
        for address in pod.addresses() {
            assert!(announced.contains(&format!("{}-", address.network())), "{address}: {announced}");
        }
    }
    setup.assert_nothing_lost(pings, &format!("{kind:?} {backend}"));
    assert!(setup.members.iter().all(Member::is_ready));
}

#[test]
fn the_network_of_one_family_moves_and_pods_of_both_lose_no_packet_not_even_at_a_restart() {
    thread::scope(|scope| {
        for (kind, backend) in [(Kind::Etcd, VXLAN), (Kind::Files, HOST_GW)] {
            scope.spawn(move || one_family_moves(kind, backend));
        }
    });
}
