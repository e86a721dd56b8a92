//! Configurations that change while the agent runs.

use backends::state::LinkIdentity;

use crate::extension::ExtensionUse;

use super::*;

const HOST_GW: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"host-gw"}}"#;
const UDP: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"udp"}}"#;
const FALLBACK: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","Fallback":"udp"}}"#;

fn own(bed: &Bed) -> Lease {
    let all = bed.cluster.leases().leases;
    all.into_values().find(|lease| lease.public.v4 == Some([192, 0, 2, 1].into())).unwrap()
}

fn devices(bed: &Bed) -> Vec<String> {
    bed.kernel.lock().state.links.keys().map(ToString::to_string).collect()
}

fn via(bed: &Bed, subnet: &str) -> String {
    bed.kernel.lock().state.routes.get(&subnet.parse().unwrap()).map(ToString::to_string).unwrap_or_default()
}

fn announce(bed: &Bed, number: u8, attachment: Attachment) {
    bed.peer(number);
    bed.cluster.edit(|all| {
        let mut leases = all.leases.values_mut();
        let lease = leases.find(|lease| lease.public.v4 == Some([192, 0, 2, number].into())).unwrap();
        lease.attachment = attachment;
    });
}

#[tokio::test(start_paused = true)]
async fn each_peer_is_reached_as_it_announces_and_the_old_way_stays_for_a_while_after_the_last() {
    let bed = Bed::new(CONFIG);
    bed.peer(77);
    bed.peer(78);
    bed.ready().await;
    bed.cluster.configure(HOST_GW);
    bed.until("the new announcement", |bed| own(bed).attachment == Attachment::HostGw).await;
    assert!(via(&bed, "10.244.77.0/24").contains("dev flannel.1"), "it hasn't moved yet");
    announce(&bed, 77, Attachment::HostGw);
    bed.until("the peer's new way", |bed| via(bed, "10.244.77.0/24").contains("via 192.0.2.77 dev eth0"))
        .await;
    assert!(via(&bed, "10.244.78.0/24").contains("dev flannel.1"));
    sleep(Duration::from_secs(600)).await;
    assert_eq!(devices(&bed), ["flannel.1"], "one peer needs it");
    announce(&bed, 78, Attachment::HostGw);
    bed.until("the last peer's way", |bed| via(bed, "10.244.78.0/24").contains("dev eth0")).await;
    sleep(Duration::from_secs(29)).await;
    assert_eq!(devices(&bed), ["flannel.1"]);
    sleep(Duration::from_secs(2)).await;
    assert!(devices(&bed).is_empty());
    assert!(bed.health.ready().is_ok(), "{}", bed.reasons());
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_knows_the_configuration_earlier_is_reached_as_before() {
    let bed = Bed::new(CONFIG);
    bed.peer(77);
    bed.ready().await;
    let before = via(&bed, "10.244.77.0/24");
    announce(&bed, 77, Attachment::HostGw);
    announce(&bed, 79, Attachment::HostGw);
    sleep(Duration::from_secs(120)).await;
    assert_eq!(via(&bed, "10.244.77.0/24"), before);
    assert_eq!(via(&bed, "10.244.79.0/24"), "", "nobody knows how to reach it");
    bed.cluster.configure(HOST_GW);
    bed.until("both peers' ways", |bed| {
        via(bed, "10.244.77.0/24").contains("dev eth0") && via(bed, "10.244.79.0/24").contains("dev eth0")
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_configuration_that_cannot_be_used_is_refused_and_the_old_one_stays() {
    let bed = Bed::new(CONFIG);
    bed.peer(77);
    bed.ready().await;
    let (before, lease) = (bed.kernel.lock().state.clone(), own(&bed));
    for (config, part) in [
        ("nonsense", "not a JSON object"),
        (r#"{"Network":"10.244.0.0/16","Backend":{"Type":"ipsec"}}"#, "ipsec"),
        (r#"{"Network":"10.244.0.0/16","SubnetLen":26,"Backend":{"Type":"vxlan"}}"#, "SubnetLen"),
        (
            r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48","Backend":{"Type":"vxlan"}}"#,
            "IPv6",
        ),
    ] {
        bed.cluster.configure(config);
        bed.until(part, |bed| bed.health.all().1.iter().any(|note| note.contains(part))).await;
        sleep(Duration::from_secs(120)).await;
        assert_eq!(bed.kernel.lock().state, before, "{config}");
        assert_eq!(own(&bed), lease);
        assert!(bed.health.ready().is_ok(), "{config}: {}", bed.reasons());
    }
    bed.cluster.configure(CONFIG);
    bed.until("no complaint", |bed| bed.health.all().1.is_empty()).await;
}

#[tokio::test(start_paused = true)]
async fn a_node_stays_ready_while_a_configuration_is_tried_that_the_kernel_refuses() {
    let bed = Bed::new(HOST_GW);
    bed.ready().await;
    bed.kernel.lock().failing.insert("vxlan", 95);
    let health = bed.health.clone();
    let unready = tokio::spawn(async move {
        while health.ready().is_ok() {
            tokio::task::yield_now().await;
        }
        health.ready()
    });
    bed.cluster.configure(CONFIG);
    let refused = |bed: &Bed| bed.health.all().1.iter().any(|note| note.contains("link add flannel.1"));
    while !refused(&bed) {
        tokio::time::advance(Duration::from_millis(10)).await;
    }
    assert!(!unready.is_finished(), "{:?}", unready.await);
    unready.abort();
    assert!(bed.health.ready().is_ok(), "{}", bed.reasons());
}

#[tokio::test(start_paused = true)]
async fn what_the_kernel_refuses_is_undone_before_anybody_hears_of_it() {
    let bed = Bed::new(HOST_GW);
    announce(&bed, 77, Attachment::HostGw);
    bed.ready().await;
    let (before, lease) = (bed.kernel.lock().state.clone(), own(&bed));
    bed.kernel.lock().failing.insert("vxlan", 95);
    bed.cluster.configure(CONFIG);
    bed.until("the reason", |bed| bed.health.all().1.iter().any(|note| note.contains("link add flannel.1")))
        .await;
    sleep(Duration::from_secs(120)).await;
    assert_eq!(bed.kernel.lock().state, before);
    assert_eq!(own(&bed), lease);
    assert!(bed.health.ready().is_ok(), "{}", bed.reasons());
    bed.kernel.lock().failing.clear();
    bed.cluster.configure(&CONFIG.replace("vxlan\"", "vxlan\",\"VNI\":7"));
    bed.until("the next configuration", |bed| devices(bed) == ["flannel.7"]).await;
    bed.until("its announcement", |bed| {
        own(bed).attachment.vtep(Family::V4).is_some_and(|vtep| vtep.vni == 7)
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_wrong_backend_is_corrected_without_a_restart() {
    let cluster = Cluster::new(CONFIG);
    let kernel = FakeKernel { host: host(1500, "192.0.2.1/24"), ..FakeKernel::default() };
    let bed = Bed::with(cluster, kernel);
    bed.kernel.lock().failing.insert("vxlan", 95);
    bed.until("the refusal in readiness", |bed| bed.reasons().contains("link add flannel.1")).await;
    bed.cluster.configure(HOST_GW);
    bed.ready().await;
    assert_eq!(own(&bed).attachment, Attachment::HostGw);
}

#[tokio::test(start_paused = true)]
async fn a_kernel_without_vxlan_falls_back_to_udp_if_that_is_allowed_and_says_so() {
    let cluster = Cluster::new(FALLBACK);
    let kernel = FakeKernel { host: host(1500, "192.0.2.1/24"), ..FakeKernel::default() };
    let bed = Bed::with(cluster, kernel);
    bed.kernel.lock().failing.insert("vxlan", 95);
    bed.peer(77);
    bed.ready().await;
    bed.until("the announcement", |bed| own(bed).attachment == Attachment::Udp).await;
    assert_eq!(devices(&bed), ["flannel0"]);
    let peers = bed.kernel.lock().state.forwarding.values().next().unwrap().peers.len();
    assert_eq!(peers, 1, "peers with VXLAN are reached by udp");
    let (_, notes) = bed.health.all();
    assert!(notes.iter().any(|note| note.contains("udp") && note.contains("Fallback")), "{notes:?}");

    // Another node of the same cluster, whose kernel has VXLAN.
    let bed = Bed::new(FALLBACK);
    bed.peer(77);
    bed.ready().await;
    assert_eq!(devices(&bed), ["flannel.1"]);
    announce(&bed, 78, Attachment::Udp);
    bed.until("a way to the node that has fallen back", |bed| devices(bed) == ["flannel.1", "flannel0"])
        .await;
    assert!(via(&bed, "10.244.77.0/24").contains("dev flannel.1"));
    assert!(via(&bed, "10.244.0.0/16").contains("dev flannel0"));
    bed.cluster.edit(|all| all.leases.retain(|_, lease| lease.public.v4 != Some([192, 0, 2, 78].into())));
    bed.until("the end of it", |bed| devices(bed) == ["flannel.1"]).await;
    announce(&bed, 78, Attachment::Udp);
    bed.until("a way again", |bed| devices(bed) == ["flannel.1", "flannel0"]).await;
}

#[tokio::test(start_paused = true)]
async fn a_kernel_without_ipip_falls_back_to_udp_if_that_is_allowed_and_says_so() {
    const IPIP: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"ipip","Fallback":"udp"}}"#;
    let kernel = FakeKernel { host: host(1500, "192.0.2.1/24"), ..FakeKernel::default() };
    let bed = Bed::with(Cluster::new(IPIP), kernel);
    bed.kernel.lock().failing.insert("ipip", 95);
    announce(&bed, 77, Attachment::Ipip);
    bed.ready().await;
    bed.until("the announcement", |bed| own(bed).attachment == Attachment::Udp).await;
    assert_eq!(devices(&bed), ["flannel0"]);
    let peers = bed.kernel.lock().state.forwarding.values().next().unwrap().peers.len();
    assert_eq!(peers, 1, "peers with ipip are reached by udp");
    let (_, notes) = bed.health.all();
    assert!(notes.iter().any(|note| note.contains("udp") && note.contains("Fallback")), "{notes:?}");

    let bed = Bed::new(IPIP);
    announce(&bed, 77, Attachment::Ipip);
    bed.ready().await;
    assert_eq!(devices(&bed), ["flannel.ipip"]);
    assert!(via(&bed, "10.244.77.0/24").contains("via 192.0.2.77 dev flannel.ipip onlink"));
    announce(&bed, 78, Attachment::Udp);
    let both = |bed: &Bed| devices(bed) == ["flannel.ipip", "flannel0"];
    bed.until("a way to the node that has fallen back", both).await;
}

#[tokio::test(start_paused = true)]
async fn from_vxlan_to_ipip_and_back_each_peer_is_reached_as_it_announces() {
    let bed = Bed::new(CONFIG);
    bed.peer(77);
    bed.ready().await;
    let all = bed.cluster.leases().leases;
    let peer = all.into_values().find(|lease| lease.public.v4 != own(&bed).public.v4);
    let vxlan = peer.unwrap().attachment;
    bed.cluster.configure(&CONFIG.replace("vxlan", "ipip"));
    bed.until("the announcement", |bed| own(bed).attachment == Attachment::Ipip).await;
    assert_eq!(devices(&bed), ["flannel.1", "flannel.ipip"]);
    assert!(via(&bed, "10.244.77.0/24").contains("dev flannel.1"));
    announce(&bed, 77, Attachment::Ipip);
    bed.until("ipip alone", |bed| devices(bed) == ["flannel.ipip"]).await;
    assert!(via(&bed, "10.244.77.0/24").contains("dev flannel.ipip"));
    bed.cluster.configure(CONFIG);
    bed.until("the announcement", |bed| matches!(own(bed).attachment, Attachment::Vxlan { .. })).await;
    assert!(via(&bed, "10.244.77.0/24").contains("dev flannel.ipip"));
    announce(&bed, 77, vxlan);
    bed.until("vxlan alone", |bed| devices(bed) == ["flannel.1"]).await;
}

#[tokio::test(start_paused = true)]
async fn commands_are_told_of_the_peers_that_have_them_until_the_last_has_left() {
    let bed = Bed::new(&CONFIG.replace("vxlan", "extension"));
    let text = |text: &str| Attachment::Extension(Some(text.into()));
    announce(&bed, 77, text("hello"));
    bed.peer(78);
    bed.ready().await;
    assert_eq!(own(&bed).attachment, Attachment::Extension(None));
    let peers = |bed: &Bed| match &*bed.hooks.told.borrow() {
        ExtensionUse::Facts(facts) => {
            Some(facts.peers.iter().map(|(net, peer)| format!("{net} {}", peer.data)).collect::<Vec<_>>())
        }
        ExtensionUse::Nothing | ExtensionUse::Other => None,
    };
    bed.until("the peer", |bed| peers(bed).is_some_and(|all| all == ["10.244.77.0/24 hello"])).await;
    announce(&bed, 79, text("you"));
    bed.until("one more", |bed| peers(bed).is_some_and(|all| all.len() == 2)).await;
    bed.cluster.configure(HOST_GW);
    bed.until("the announcement", |bed| own(bed).attachment == Attachment::HostGw).await;
    announce(&bed, 77, Attachment::HostGw);
    bed.until("those that stay", |bed| peers(bed).is_some_and(|all| all == ["10.244.79.0/24 you"])).await;
    announce(&bed, 79, Attachment::HostGw);
    bed.until("the end", |bed| *bed.hooks.told.borrow() == ExtensionUse::Other).await;
    assert!(bed.health.ready().is_ok(), "{}", bed.reasons());
    assert!(!bed.health.all().0.contains_key(crate::extension::CONDITION));
}

#[tokio::test(start_paused = true)]
async fn alloc_has_a_lease_and_rules_and_no_peers() {
    let bed = Bed::new(&CONFIG.replace("vxlan", "alloc"));
    bed.peer(77);
    announce(&bed, 78, Attachment::Udp);
    bed.ready().await;
    assert_eq!(own(&bed).attachment, Attachment::Udp);
    assert_eq!(devices(&bed), [""; 0]);
    let kernel = bed.kernel.lock();
    assert!(kernel.state.routes.is_empty() && kernel.state.blackholes.len() == 1, "{:?}", kernel.state);
}

#[tokio::test(start_paused = true)]
async fn a_fallback_carries_both_families() {
    let config =
        FALLBACK.replace("\"Backend\"", "\"EnableIPv6\":true,\"IPv6Network\":\"fd00::/48\",\"Backend\"");
    let mut host = host(1500, "192.0.2.1/24");
    let link = host.links.get_mut(&2).unwrap();
    let v6 = "2001:db8::1/64".parse().unwrap();
    link.addresses.push(HostAddr { net: v6, ..link.addresses[0] });
    host.defaults.push(DefaultRoute { family: Family::V6, ..host.defaults[0] });
    let bed = Bed::with(Cluster::new(&config), FakeKernel { host, ..FakeKernel::default() });
    bed.kernel.lock().failing.insert("vxlan", 95);
    bed.ready().await;
    bed.until("the datapath", |bed| devices(bed) == ["flannel0"]).await;
    let kernel = bed.kernel.lock();
    let forwarding = kernel.state.forwarding.values().next().unwrap();
    assert_eq!((forwarding.local.v6, forwarding.mtu), (Some("2001:db8::1".parse().unwrap()), 1452));
    assert!(kernel.state.routes.contains_key(&"fd00::/48".parse().unwrap()));
}

#[tokio::test(start_paused = true)]
async fn after_a_restart_with_another_configuration_peers_with_the_old_one_are_reached() {
    let bed = Bed::new(UDP);
    announce(&bed, 77, Attachment::Udp);
    bed.ready().await;
    bed.until("what is known on disk", |bed| bed.directory.path().join("state.json").exists()).await;
    bed.agent.abort();
    bed.cluster.configure(HOST_GW);
    let bed = bed.restarted();
    bed.ready().await;
    bed.until("the old way", |bed| devices(bed) == ["flannel0"]).await;
    assert_eq!(own(&bed).attachment, Attachment::HostGw);
    announce(&bed, 77, Attachment::HostGw);
    bed.until("its end", |bed| devices(bed).is_empty()).await;
}

/// The VXLAN port by which a subnet is reached.
fn port_to(bed: &Bed, subnet: &str) -> Option<u16> {
    let kernel = bed.kernel.lock();
    let dev = kernel.state.routes.get(&subnet.parse().unwrap())?.dev?;
    match &kernel.state.links.get(&dev)?.identity {
        LinkIdentity::Vxlan(identity) => identity.port.or(Some(8472)),
        _ => None,
    }
}

#[tokio::test(start_paused = true)]
async fn a_port_that_changes_back_leaves_peers_where_they_are() {
    const MOVED: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","Port":4789}}"#;
    let bed = Bed::new(CONFIG);
    bed.peer(77);
    bed.peer(78);
    bed.ready().await;
    bed.cluster.configure(MOVED);
    bed.until("two devices", |bed| devices(bed).len() == 2).await;
    let says = |number: u8, port| {
        let mut attachment = own(&bed).attachment;
        let Attachment::Vxlan { v4: Some(vtep), .. } = &mut attachment else { panic!("{attachment:?}") };
        *vtep = Vtep { mac: Mac([2, 0, 0, 0, 0, number]), port, ..*vtep };
        announce(&bed, number, attachment);
    };
    says(78, Some(4789));
    bed.until("the new port", |bed| port_to(bed, "10.244.78.0/24") == Some(4789)).await;
    assert_eq!(port_to(&bed, "10.244.77.0/24"), Some(8472), "this one has not heard of it");
    bed.cluster.configure(CONFIG);
    bed.until("the own port again", |bed| says_port(bed) == Some(8472)).await;
    sleep(Duration::from_secs(5)).await;
    assert_eq!(port_to(&bed, "10.244.77.0/24"), Some(8472), "it has never left");
    assert_eq!(port_to(&bed, "10.244.78.0/24"), Some(4789));
    says(78, None);
    sleep(Duration::from_secs(5)).await;
    assert_eq!(port_to(&bed, "10.244.78.0/24"), Some(4789), "where it said last that it is");
    says(78, Some(8472));
    bed.until("the old port", |bed| port_to(bed, "10.244.78.0/24") == Some(8472)).await;
    bed.until("the end of it", |bed| devices(bed) == ["flannel.1"]).await;
    assert_eq!(port_to(&bed, "10.244.77.0/24"), Some(8472));
}

/// The port that this node says it has.
fn says_port(bed: &Bed) -> Option<u16> {
    own(bed).attachment.vtep(Family::V4)?.port
}

#[tokio::test(start_paused = true)]
async fn the_network_grows_and_the_lease_stays() {
    let bed = Bed::new(CONFIG);
    bed.peer(77);
    bed.ready().await;
    let lease = own(&bed);
    bed.cluster.configure(&CONFIG.replace("10.244.0.0/16", "10.240.0.0/12"));
    bed.until("the file", |bed| std::fs::read_to_string(bed.file()).unwrap().contains("10.240.0.0/12")).await;
    assert_eq!(own(&bed), lease);
    assert_eq!(bed.firewall.0.lock().unwrap()[0].network.to_string(), "10.240.0.0/12");
    assert_eq!(bed.routes(), 1);
}

#[tokio::test(start_paused = true)]
async fn the_network_moves_and_both_are_routed_until_the_pods_of_the_old_one_are_gone() {
    let bed = Bed::new(CONFIG);
    bed.peer(77);
    bed.ready().await;
    let old = own(&bed).subnets.get(Family::V4).unwrap();
    let bridge = |kernel: &mut FakeKernel| {
        let net = ipnet::IpNet::new(subnet::env_file::gateway(old), 24).unwrap();
        let address = HostAddr { net, deprecated: false, permanent: true, temporary: false };
        let link = kernel.host.links[&2].clone();
        let bridge = HostLink {
            index: 3,
            name: "cni0".parse().unwrap(),
            bridge: true,
            addresses: vec![address],
            ..link
        };
        let port = HostLink {
            index: 4,
            name: "pod1".parse().unwrap(),
            controller: Some(3),
            addresses: Vec::new(),
            ..bridge.clone()
        };
        kernel.host.links.extend([(3, bridge), (4, HostLink { bridge: false, ..port })]);
    };
    bridge(&mut bed.kernel.lock());
    bed.cluster.configure(&CONFIG.replace("10.244", "10.99"));
    bed.until("a subnet of the new network", |bed| {
        std::fs::read_to_string(bed.file()).unwrap().contains("FLANNEL_SUBNET=10.99.")
    })
    .await;
    assert_eq!(bed.cluster.leases().leases.len(), 3, "the old lease stays");
    assert!(via(&bed, "10.244.77.0/24").contains("flannel.1"), "and so do peers in the old network");
    bed.until("rules for both", |bed| {
        let others = bed.firewall.0.lock().unwrap()[0].others.clone();
        others == [("10.244.0.0/16".parse().unwrap(), Some(old))]
    })
    .await;
    assert!(bed.health.all().1.iter().any(|note| note.contains("drain this node")));
    assert!(bed.health.ready().is_ok(), "{}", bed.reasons());
    bed.kernel.lock().host.links.retain(|index, _| *index == 2);
    bed.bell.notify_one();
    bed.until("nothing left to say", |bed| bed.health.all().1.is_empty()).await;
}

#[tokio::test(start_paused = true)]
async fn a_way_that_only_others_need_and_that_cannot_be_made_does_not_make_this_node_unready() {
    let bed = Bed::new(FALLBACK);
    bed.peer(77);
    bed.ready().await;
    bed.kernel.lock().failing.insert("forwarding", 2);
    announce(&bed, 78, Attachment::Udp);
    bed.until("the device", |bed| devices(bed).contains(&"flannel0".to_owned())).await;
    sleep(Duration::from_secs(120)).await;
    assert!(bed.health.ready().is_ok(), "{}", bed.reasons());
    assert!(via(&bed, "10.244.77.0/24").contains("dev flannel.1"));
    bed.kernel.lock().failing.clear();
    bed.until("the datapath", |bed| bed.kernel.lock().state.forwarding.len() == 1).await;
}
