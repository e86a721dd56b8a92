//! A kernel whose module `ipip` can't be loaded (`bench/vm/boot --without ipip`).

use std::fs;

use crate::bed::Cluster;
use crate::without_vxlan::BLOCKED;

#[test]
fn the_missing_module_is_named_with_its_package_and_the_node_is_not_ready() {
    assert!(
        fs::read_to_string(BLOCKED).is_ok_and(|text| text.contains("install ipip ")),
        "this test needs a kernel without ipip: run make test-vm"
    );
    let cluster = Cluster::new(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"ipip"}}"#);
    let member = cluster.start(cluster.fabric.node().unwrap(), &[]);
    member.wait("the reason in /readyz", || {
        member.agent.get("/readyz").is_ok_and(|(code, text)| {
            code == 503 && text.contains("modprobe ipip") && text.contains("kernel-modules-extra")
        })
    });
    assert!(member.agent.subnet_env().is_err(), "no pod may start before its network can work");
}
