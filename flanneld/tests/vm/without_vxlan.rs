//! A kernel whose module `vxlan` can't be loaded (`bench/vm/boot --without vxlan`).

use std::fs;
use std::process::Command;

use crate::bed::{Cluster, LIMIT, VXLAN};
use crate::transfer;

const FALLBACK: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","Fallback":"udp"}}"#;
/// What `bench/vm/boot --without` writes.
pub(crate) const BLOCKED: &str = "/etc/modprobe.d/without.conf";

fn require_no_vxlan() {
    assert!(
        fs::read_to_string(BLOCKED).is_ok_and(|text| text.contains("install vxlan ")),
        "this test needs a kernel without vxlan: run make test-vm"
    );
}

#[test]
fn a_the_missing_module_is_named_with_its_package_and_the_node_is_not_ready() {
    require_no_vxlan();
    let cluster = Cluster::new(VXLAN);
    let member = cluster.start(cluster.fabric.node().unwrap(), &[]);
    member.wait("the reason in /readyz", || {
        member.agent.get("/readyz").is_ok_and(|(code, text)| {
            code == 503 && text.contains("modprobe vxlan") && text.contains("linux-modules-extra-raspi")
        })
    });
    assert!(member.agent.subnet_env().is_err(), "no pod may start before its network can work");
}

#[test]
fn b_nodes_fall_back_to_udp_and_return_to_vxlan_once_the_module_is_there() {
    require_no_vxlan();
    let cluster = Cluster::new(FALLBACK);
    let mut members = [cluster.join(), cluster.join()];
    let pods = members.each_ref().map(|member| member.pod());
    for member in &members {
        assert!(member.show("ip -o link show type tun").contains("flannel0"));
        let notes = member.agent.get("/readyz?verbose").unwrap().1;
        assert!(notes.contains("runs on udp") && notes.contains("Fallback"), "{notes}");
    }
    transfer::tcp(&pods[0], &pods[1], 32);
    // The other test of this guest needs the rest of it.
    let others = fs::read_to_string(BLOCKED).unwrap().replace("install vxlan ", "# ");
    fs::write(BLOCKED, others).unwrap();
    assert!(Command::new("/sbin/modprobe").args(["-d", "/run/modules", "vxlan"]).status().unwrap().success());
    for member in &mut members {
        member.agent.terminate(LIMIT).unwrap();
        member.start_again();
    }
    for member in &members {
        member.wait("the route through VXLAN", || {
            member.show("ip route show proto 70").contains("dev flannel.1")
        });
    }
    transfer::tcp(&pods[1], &pods[0], 32);
}
