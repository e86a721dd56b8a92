//! The configuration is followed from the first moment, in every state.

use super::*;

const SMALL: &str = r#"{"Network":"10.244.0.0/16","SubnetMin":"10.244.9.0","SubnetMax":"10.244.9.0","Backend":{"Type":"vxlan"}}"#;

fn dual(config: &str) -> String {
    config.replace("\"Backend\"", "\"EnableIPv6\":true,\"IPv6Network\":\"fd00::/48\",\"Backend\"")
}

fn notes(bed: &Bed) -> String {
    bed.health.all().1.join("\n")
}

fn own(bed: &Bed) -> Option<Lease> {
    let all = bed.cluster.leases().leases;
    all.into_values().find(|lease| lease.public.v4 == Some([192, 0, 2, 1].into()))
}

/// A node that was ready with one peer, had its state kept, and was stopped.
async fn stopped() -> Bed {
    let bed = Bed::new(CONFIG);
    bed.peer(177);
    bed.ready().await;
    bed.until("what is known on disk", |bed| bed.directory.path().join("state.json").exists()).await;
    bed.agent.abort();
    bed
}

/// The node follows its peers and keeps its lease.
async fn follows(bed: &Bed, lease: &Lease, what: &str) {
    bed.ready().await;
    let before = bed.routes();
    bed.peer(199);
    bed.until(what, |bed| bed.routes() > before).await;
    bed.cluster.edit(|all| all.leases.retain(|subnets, _| !subnets.to_string().contains(".199.")));
    bed.until(what, |bed| bed.routes() == before).await;
    assert_eq!(own(bed).as_ref(), Some(lease), "{what}");
}

#[tokio::test(start_paused = true)]
async fn a_configuration_is_followed_while_a_lease_is_waited_for() {
    let bed = Bed::new(SMALL);
    bed.peer(9);
    bed.until("the reason", |bed| bed.reasons().contains("out of subnets")).await;
    assert!(bed.reasons().contains("SubnetMax 10.244.9.0"), "{}", bed.reasons());
    sleep(Duration::from_secs(600)).await;
    bed.cluster.configure(r#"{"Network":"10.244.0.0/16","SubnetMin"#);
    bed.until("the refusal", |bed| notes(bed).contains("not in force")).await;
    let start = Instant::now();
    bed.cluster.configure(CONFIG);
    bed.ready().await;
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert_eq!(notes(&bed), "");
}

#[tokio::test(start_paused = true)]
async fn a_configuration_is_followed_while_an_interface_is_waited_for() {
    let bed = Bed::new(&dual(CONFIG));
    bed.until("the reason", |bed| bed.reasons().contains("no IPv6 default route")).await;
    sleep(Duration::from_secs(600)).await;
    // Another one that can't work here is waited with all the same.
    bed.cluster.configure(
        r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00::/48","Backend":{"Type":"vxlan"}}"#,
    );
    sleep(Duration::from_secs(60)).await;
    assert!(bed.health.ready().is_err());
    let start = Instant::now();
    bed.cluster.configure(CONFIG);
    bed.ready().await;
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn after_a_restart_a_refused_configuration_leaves_the_saved_one_in_force() {
    for (config, part) in [
        ("nonsense".to_owned(), "not a JSON object"),
        (CONFIG.replace("vxlan", "ipsec"), "ipsec"),
        (dual(CONFIG), "IPv6"),
        (CONFIG.replace("\"Backend\"", "\"SubnetMin\":\"10.244.250.0\",\"Backend\""), "drain the node"),
    ] {
        let bed = stopped().await;
        let lease = own(&bed).unwrap();
        bed.kernel.lock().host.links.extend(pods(&lease));
        bed.cluster.configure(&config);
        let bed = bed.restarted();
        follows(&bed, &lease, &config).await;
        bed.until(part, |bed| notes(bed).contains(part)).await;
        assert!(notes(&bed).contains("not in force"), "{config}: {}", notes(&bed));
        sleep(Duration::from_secs(300)).await;
        follows(&bed, &lease, &config).await;
        bed.cluster.configure(CONFIG);
        bed.until("no complaint", |bed| notes(bed).is_empty()).await;
    }
}

/// A bridge with a pod on it.
fn pods(lease: &Lease) -> [(u32, HostLink); 2] {
    let subnet = lease.subnets.get(Family::V4).unwrap();
    let net = ipnet::IpNet::new(subnet::env_file::gateway(subnet), 24).unwrap();
    let eth0 = host(1500, &net.to_string()).links.remove(&2).unwrap();
    let cni0 = HostLink { index: 3, name: "cni0".parse().unwrap(), bridge: true, ..eth0 };
    let (name, addresses) = ("veth1".parse().unwrap(), Vec::new());
    let port = HostLink { index: 4, name, bridge: false, controller: Some(3), addresses, ..cni0.clone() };
    [(3, cni0), (4, port)]
}

#[tokio::test(start_paused = true)]
async fn a_node_that_was_drained_and_restarted_takes_a_subnet_of_the_new_length() {
    let bed = stopped().await;
    let lease = own(&bed).unwrap();
    bed.cluster.edit(|all| all.leases.retain(|subnets, _| *subnets == lease.subnets));
    bed.cluster.configure(&CONFIG.replace("\"Backend\"", "\"SubnetLen\":26,\"Backend\""));
    let bed = bed.restarted();
    bed.until("the new length", |bed| {
        std::fs::read_to_string(bed.file()).is_ok_and(|text| text.contains("/26"))
    })
    .await;
    bed.ready().await;
    assert_eq!(notes(&bed), "");
}

#[tokio::test(start_paused = true)]
async fn a_configuration_is_followed_by_a_node_that_runs_on_what_was_saved() {
    let bed = stopped().await;
    let lease = own(&bed).unwrap();
    bed.cluster.trouble(Some("no route to host"));
    bed.cluster.configure("nonsense");
    let bed = bed.restarted();
    bed.ready().await;
    assert!(notes(&bed).contains("as they were saved"), "{}", notes(&bed));
    bed.cluster.trouble(None);
    follows(&bed, &lease, "a refused configuration").await;
    bed.until("the refusal", |bed| notes(bed).contains("not a JSON object")).await;
    assert!(!notes(&bed).contains("as they were saved"), "{}", notes(&bed));
    bed.cluster.configure(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"host-gw"}}"#);
    bed.until("the new announcement", |bed| own(bed).unwrap().attachment == Attachment::HostGw).await;
    assert_eq!(notes(&bed), "");
}
