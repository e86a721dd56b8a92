//! Pods that a delegate other than `bridge` attaches: `ipvlan`, whose kernel module test machines may lack.

use backends::testing::Pod;
use serde_json::json;

use crate::bed::{Cluster, HOST_GW, flanneld};
use crate::{require_kernel, transfer};

#[test]
fn pods_of_an_ipvlan_delegate_reach_each_other_across_nodes() {
    require_kernel("6.");
    let cluster = Cluster::new(HOST_GW);
    let members = [cluster.join(), cluster.join()];
    // In this mode the host routes what pods send, and leaves by the device that carries them.
    let delegate = json!({ "type": "ipvlan", "master": "eth0", "mode": "l3" });
    let plugin = flanneld().with_file_name("flannel");
    let pods = members.each_ref().map(|member| Pod::cni_with(&member.node, &plugin, &delegate).unwrap());
    for (member, pod) in members.iter().zip(&pods) {
        assert!(member.subnet().contains(&pod.address()), "{pod:?}");
        assert!(!member.show("ip -o link show").contains("cni0"), "no bridge is made");
    }
    let [a, b] = &pods;
    members[0].wait("echoes both ways", || {
        a.namespace().reaches(b.address()).unwrap() && b.namespace().reaches(a.address()).unwrap()
    });
    transfer::tcp(a, b, 16);
    for mut pod in pods {
        pod.detach().unwrap();
    }
}
