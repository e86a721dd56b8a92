//! `flanneld cleanup` finds everything that an agent makes, and nothing else.

use crate::bed::{Cluster, HOST_GW, LIMIT, Member, VXLAN, flanneld};

fn cleanup(member: &Member, more: &[&str]) -> String {
    let file = format!("--subnet-file={}", member.node.subnet_file().display());
    member.node.namespace().command(flanneld()).args(["cleanup", &file]).args(more).ok().unwrap()
}

fn everything(member: &Member) -> String {
    let links = member.show("ip -o link show");
    let mut links: Vec<&str> = links.lines().filter_map(|line| line.split(": ").nth(1)).collect();
    links.sort_unstable();
    format!(
        "{}\n{}\n{}",
        links.join("\n"),
        member.show("ip -4 route show"),
        member.show("ip -o -4 address show")
    )
}

#[test]
fn after_cleanup_a_node_is_as_it_was_before_the_agent() {
    for config in [VXLAN, HOST_GW] {
        let cluster = Cluster::new(config);
        let (mut a, b) = (cluster.join(), cluster.join());
        a.wait("the peer's route", || a.node.has_route(b.subnet()).unwrap());
        a.ip(
            "route add 10.244.250.0/25 via 172.31.0.254\nroute add 192.168.7.0/24 via 172.31.0.254 proto 70",
        );
        a.agent.terminate(LIMIT).unwrap();
        let installed = everything(&a);
        let told = cleanup(&a, &["--dry-run"]);
        assert!(told.contains("would remove") && told.contains("subnet.env"), "{told}");
        assert_eq!(everything(&a), installed, "a dry run changes nothing");
        assert!(a.node.subnet_file().exists());

        let told = cleanup(&a, &[]);
        assert!(told.contains("removed"), "{told}");
        let clean = everything(&a);
        assert!(!clean.contains("flannel") && !clean.contains(&b.subnet().to_string()), "{clean}");
        assert!(clean.contains("10.244.250.0/25") && clean.contains("192.168.7.0/24"), "{clean}");
        assert!(!a.node.subnet_file().exists());
    }
}

#[test]
fn cleanup_works_without_a_subnet_file_and_says_when_there_is_nothing() {
    let cluster = Cluster::new(VXLAN);
    let (mut a, b) = (cluster.join(), cluster.join());
    a.wait("the peer's route", || a.node.has_route(b.subnet()).unwrap());
    a.agent.kill().unwrap();
    std::fs::remove_file(a.node.subnet_file()).unwrap();
    assert!(cleanup(&a, &[]).contains("link flannel.1"));
    assert_eq!(cleanup(&a, &[]), "nothing to remove\n");
}
