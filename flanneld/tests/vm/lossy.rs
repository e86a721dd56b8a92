//! Delay, loss and reordering between the nodes (netem): what arrives is what was sent, with every backend.

use crate::bed::{Cluster, HOST_GW, Member, VXLAN};
use crate::{require_kernel, transfer};

const IPIP: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"ipip"}}"#;
const UDP: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"udp"}}"#;

fn carries(config: &str) {
    require_kernel("6.");
    let cluster = Cluster::new(config);
    let members = [cluster.join(), cluster.join()];
    let pods = members.each_ref().map(|member| member.pod());
    transfer::tcp(&pods[0], &pods[1], 16);
    for netem in ["delay 20ms 5ms", "loss 2%", "delay 10ms reorder 25% 50%", "duplicate 5%", "corrupt 0.5%"] {
        for member in &members {
            let command = format!("tc qdisc replace dev eth0 root netem {netem}");
            member.show(&command);
        }
        transfer::both_ways(&pods[0], &pods[1], 16);
    }
    let ready = |member: &Member| member.agent.get("/readyz").unwrap().0 == 200;
    assert!(members.iter().all(ready));
}

#[test]
fn vxlan_carries_transfers_unchanged_over_a_lossy_network() {
    carries(VXLAN);
}

#[test]
fn udp_carries_transfers_unchanged_over_a_lossy_network() {
    carries(UDP);
}

#[test]
fn wireguard_by_the_kernel_carries_transfers_unchanged_over_a_lossy_network() {
    carries(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"wireguard","Userspace":"never"}}"#);
}

#[test]
fn wireguard_in_process_carries_transfers_unchanged_over_a_lossy_network() {
    carries(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"wireguard","Userspace":"always"}}"#);
}

#[test]
fn ipip_carries_transfers_unchanged_over_a_lossy_network() {
    carries(IPIP);
}

#[test]
fn host_gw_carries_transfers_unchanged_over_a_lossy_network() {
    carries(HOST_GW);
}
