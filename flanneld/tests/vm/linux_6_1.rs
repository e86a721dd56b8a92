//! What Linux 6.1 can't do, and how it is said: devices that are up keep their names, TUN has no UDP segmentation.

use std::time::Duration;

use backends::testing::PingOptions;
use backends::testing::Pinger;

use crate::bed::{Cluster, VXLAN};
use crate::{require_kernel, transfer};

const CONFIG: &str = "/coreos.com/network/config";

#[test]
fn a_port_change_is_refused_with_the_remedy_and_no_packet_is_lost() {
    require_kernel("6.1.");
    let cluster = Cluster::new(VXLAN);
    let members = [cluster.join(), cluster.join()];
    let pods = members.each_ref().map(|member| member.pod());
    let pinger = Pinger::start(pods[0].namespace(), pods[1].address()).unwrap();
    pinger.wait_for_reply(Duration::from_secs(20)).unwrap();
    cluster.put(CONFIG, &VXLAN.replace("vxlan\"", "vxlan\",\"Port\":4789"));
    for member in &members {
        member.wait("the refusal with its remedy", || {
            let notes = member.agent.get("/readyz?verbose").unwrap().1;
            notes.contains("Linux 6.2") && notes.contains("restart flanneld on all nodes")
        });
        assert!(member.show("ip -d link show flannel.1").contains("dstport 8472"));
    }
    assert_eq!(pinger.finish().unwrap().lost, 0);
    transfer::tcp(&pods[0], &pods[1], 16);
}

#[test]
fn udp_carries_streams_and_large_datagrams_without_uso() {
    require_kernel("6.1.");
    let cluster = Cluster::new(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"udp"}}"#);
    let members = [cluster.join(), cluster.join()];
    let pods = members.each_ref().map(|member| member.pod());
    transfer::both_ways(&pods[0], &pods[1], 32);
    let pings = PingOptions { size: 8000, ..PingOptions::default() };
    let pinger = Pinger::start_with(pods[0].namespace(), pods[1].address(), pings).unwrap();
    pinger.wait_for_reply(Duration::from_secs(20)).unwrap();
}
