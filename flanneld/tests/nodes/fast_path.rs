//! The fast path on this machine's own kernel, with or without flowtables: `flanneld/tests/vm` has what it does where there are flowtables.

use backends::testing::Namespace;

use crate::bed::{Cluster, LIMIT, Member, VXLAN};

const CONFIG: &str = "/coreos.com/network/config";
const TABLE: &str = "flannel-fast-path";

fn with_fast_path() -> String {
    VXLAN.replace("\"Backend\"", "\"FastPath\":true,\"Backend\"")
}

/// Whether this kernel has flowtables, by the program `nft`.
fn has_flowtables() -> bool {
    let namespace = Namespace::new().unwrap();
    let words =
        "add table ip witness; add flowtable ip witness f { hook ingress priority 0; devices = { lo }; }";
    namespace.command("nft").arg(words).output().unwrap().status.success()
}

fn told(member: &Member) -> bool {
    member.agent.get("/readyz?verbose").unwrap().1.contains("has no nftables flowtables")
}

fn has_table(member: &Member) -> bool {
    member.show("nft list ruleset").contains(TABLE)
}

#[test]
fn a_kernel_without_flowtables_is_named_in_one_sentence_and_pods_take_the_ordinary_path() {
    let has = has_flowtables();
    let cluster = Cluster::new(&with_fast_path());
    let members = [cluster.join(), cluster.join_with(&["--fast-path=off"])];
    let pods = members.each_ref().map(|member| member.pod());
    members[0].wait("the fast path or the sentence", || {
        if has { has_table(&members[0]) } else { told(&members[0]) }
    });
    members[0].wait("echoes", || pods[0].namespace().reaches(pods[1].address()).unwrap());
    // One chain at the forward hook for another.
    let accepts = |member: &Member| member.rules().contains("comment \"chain to accept flannel traffic\"");
    assert_eq!([&members[0], &members[1]].map(accepts), [false, true]);
    // Neither pods that come nor other configurations repeat it.
    let third = backends::testing::Pod::wired(&members[0].node, "10.244.1.77/24".parse().unwrap());
    drop(third);
    cluster.put(CONFIG, &with_fast_path().replace("vxlan\"", "vxlan\",\"MTU\":1400"));
    members[0].wait("the other MTU", || members[0].show("ip link show flannel.1").contains("mtu 1350"));
    let log = members[0].agent.log();
    assert_eq!(log.matches("has no nftables flowtables").count(), usize::from(!has), "{log}");
    assert!(!told(&members[1]) && !has_table(&members[1]), "the flag overrides the configuration");

    // Off again: nothing is said any more, and nothing is left.
    cluster.put(CONFIG, VXLAN);
    members[0].wait("the end", || !told(&members[0]) && !has_table(&members[0]));
    members[0].wait("the chain that accepts", || accepts(&members[0]));
    assert_eq!(members[0].agent.get("/readyz").unwrap().0, 200);
}

#[test]
fn the_flag_asks_for_a_fast_path_without_the_configuration() {
    let has = has_flowtables();
    let cluster = Cluster::new(VXLAN);
    let mut member = cluster.start(cluster.fabric.node().unwrap(), &["--fast-path=on"]);
    member.agent.wait_ready(LIMIT).unwrap();
    member.wait("the fast path or the sentence", || if has { has_table(&member) } else { told(&member) });
}
