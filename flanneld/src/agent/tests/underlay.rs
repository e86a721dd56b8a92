//! The external interface over time.

use super::*;

fn link(index: u32, name: &str, address: &str) -> HostLink {
    let eth0 = host(1500, address).links.remove(&2).unwrap();
    HostLink { index, name: name.parse().unwrap(), ..eth0 }
}

/// A VPN comes up, with a default route that is better than the one that there was.
fn vpn(bed: &Bed) {
    let mut kernel = bed.kernel.lock();
    kernel.host.links.insert(5, link(5, "tun0", "10.8.0.6/24"));
    kernel.host.defaults.iter_mut().for_each(|route| route.metric = 100);
    kernel
        .host
        .defaults
        .insert(0, DefaultRoute { family: Family::V4, link: Some(5), metric: 50, gateway: None });
}

fn announced(bed: &Bed) -> Option<std::net::Ipv4Addr> {
    bed.cluster.leases().leases.into_values().next().unwrap().public.v4
}

#[tokio::test(start_paused = true)]
async fn a_better_default_route_does_not_move_a_node_also_not_over_a_restart() {
    let bed = Bed::new(CONFIG);
    bed.ready().await;
    vpn(&bed);
    bed.bell.notify_one();
    sleep(Duration::from_secs(300)).await;
    assert_eq!(announced(&bed), Some([192, 0, 2, 1].into()));
    assert!(bed.health.ready().is_ok(), "{}", bed.reasons());
    assert!(bed.directory.path().join("state.json").exists());
    bed.agent.abort();
    let bed = bed.restarted();
    bed.ready().await;
    sleep(Duration::from_secs(300)).await;
    assert_eq!(announced(&bed), Some([192, 0, 2, 1].into()));
}

#[tokio::test(start_paused = true)]
async fn another_interface_is_taken_when_the_one_in_use_is_gone() {
    let bed = Bed::new(CONFIG);
    bed.ready().await;
    vpn(&bed);
    bed.kernel.lock().host.links.remove(&2);
    bed.bell.notify_one();
    let start = Instant::now();
    bed.until("the other interface", |bed| announced(bed) == Some([10, 8, 0, 6].into())).await;
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn an_interface_without_its_address_is_waited_for_before_another_one_is_taken() {
    let bed = Bed::new(CONFIG);
    bed.ready().await;
    vpn(&bed);
    // A DHCP client takes the address away for a moment.
    let taken = std::mem::take(&mut bed.kernel.lock().host.links.get_mut(&2).unwrap().addresses);
    bed.bell.notify_one();
    bed.until("the reason", |bed| bed.reasons().contains("eth0 is down or has lost 192.0.2.1")).await;
    sleep(Duration::from_secs(3)).await;
    bed.kernel.lock().host.links.get_mut(&2).unwrap().addresses = taken;
    bed.bell.notify_one();
    bed.ready().await;
    sleep(Duration::from_secs(300)).await;
    assert_eq!(announced(&bed), Some([192, 0, 2, 1].into()));
    // For good.
    bed.kernel.lock().host.links.get_mut(&2).unwrap().up = false;
    bed.bell.notify_one();
    let start = Instant::now();
    bed.until("the other interface", |bed| announced(bed) == Some([10, 8, 0, 6].into())).await;
    assert!(start.elapsed() >= Duration::from_secs(5), "{:?}", start.elapsed());
    assert!(start.elapsed() < Duration::from_secs(10), "without waiting for the next look");
}

#[tokio::test(start_paused = true)]
async fn a_device_of_flannel_with_a_default_route_does_not_become_its_own_underlay() {
    let bed = Bed::new(CONFIG);
    {
        let mut kernel = bed.kernel.lock();
        kernel.host.links.insert(10, link(10, "flannel.1", "172.30.5.125/24"));
        kernel
            .host
            .defaults
            .insert(0, DefaultRoute { family: Family::V4, link: Some(10), metric: 0, gateway: None });
    }
    bed.ready().await;
    assert_eq!(announced(&bed), Some([192, 0, 2, 1].into()));
}
