//! The backends without a datapath of their own: `extension`, whose commands make real routes here, and `alloc`.

use std::fs;
use std::path::Path;

use backends::testing::Pod;

use crate::bed::{Cluster, LIMIT, Member, flanneld};

const ALLOWED: &str = "--allow-extension-commands";

/// A script of a test; `DIR` in it stands for its directory.
fn script(directory: &Path, name: &str, text: &str) -> String {
    let path = directory.join(name);
    let text = text.replace("DIR", &directory.display().to_string());
    subnet::testing::write_program(&path, &format!("#!/bin/sh\n{text}\n")).unwrap();
    path.display().to_string()
}

/// A configuration whose commands make routes as `host-gw` does and write down what they are told. Each node has a log
/// of its own, named after its address.
fn config(directory: &Path) -> String {
    let log = "LOG=DIR/$(ip -4 -o address show dev eth0 | sed 's/.*inet \\([0-9.]*\\).*/\\1/'); data=$(cat)";
    let pre = script(directory, "pre", &format!("{log}; echo pre >>$LOG; echo 'it is \"me\" & $(you)'"));
    let post = script(
        directory,
        "post",
        &format!(
            "{log}; echo post $NETWORK $SUBNET $IPV6SUBNET $PUBLIC_IP $PUBLIC_IPV6 \"[$data]\" >>$LOG; env >$LOG.env"
        ),
    );
    let add = script(
        directory,
        "add",
        &format!(
            "{log}; [ -e DIR/hang ] && echo hangs >>$LOG && exec sleep 600\nip route replace \"$1\" via \"$2\" && echo \"add $1 $2 [$data]\" >>$LOG"
        ),
    );
    let remove = script(
        directory,
        "remove",
        &format!("{log}; ip route del \"$1\" via \"$2\"; echo \"remove $1 $2\" >>$LOG"),
    );
    format!(
        r#"{{"Network":"10.244.0.0/16","Backend":{{"Type":"extension","PreStartupCommand":"{pre}","PostStartupCommand":"{post}","SubnetAddCommand":"{add} $SUBNET $PUBLIC_IP","SubnetRemoveCommand":"{remove} $SUBNET $PUBLIC_IP"}}}}"#
    )
}

fn log_of(directory: &Path, member: &Member) -> Vec<String> {
    let text = fs::read_to_string(directory.join(member.node.address().to_string())).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

fn pods_reach_each_other(members: &[Member; 2], pods: &[Pod; 2]) {
    let [a, b] = pods;
    members[0].wait("echoes both ways", || {
        a.namespace().reaches(b.address()).unwrap() && b.namespace().reaches(a.address()).unwrap()
    });
}

#[test]
fn commands_connect_nodes_and_follow_their_peers_over_restarts() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    let cluster = Cluster::new(&config(at));
    let environment =
        [("FLANNELD_ETCD_PASSWORD", "secret"), ("ACCESS_KEY_SECRET", "secret"), ("CLOUD", "mine")];
    let args = [format!("--etcd-endpoints={}", cluster.etcd.endpoint()), ALLOWED.to_owned()];
    let join = || {
        let mut member = Member::start_with_env(cluster.fabric.node().unwrap(), &args, &environment);
        member.agent.wait_ready(LIMIT).unwrap();
        member
    };
    let mut members = [join(), join()];
    let pods = members.each_ref().map(|member| member.pod());
    pods_reach_each_other(&members, &pods);
    let said = r#""BackendType":"extension","BackendData":"it is \"me\" \u0026 $(you)"}"#;
    for (key, value) in cluster.leases() {
        assert!(value.ends_with(said), "{key}: {value}");
    }
    let [a, b] = &members;
    let (own, peer, public) = (a.subnet().trunc(), b.subnet().trunc(), b.node.address());
    let post = format!("post 10.244.0.0/16 {own} ::/0 {} <nil> []", a.node.address());
    let add = format!("add {peer} {public} [it is \"me\" & $(you)]");
    // A command makes the route first, and writes down then that it did.
    a.wait("the commands in the log", || log_of(at, a).len() >= 3);
    assert_eq!(log_of(at, a), ["pre".to_owned(), post.clone(), add.clone()]);
    let env = fs::read_to_string(at.join(format!("{}.env", a.node.address()))).unwrap();
    assert!(env.contains("CLOUD=mine") && !env.contains("secret"), "{env}");
    assert!(!a.agent.log().contains("it is"), "data is not logged:\n{}", a.agent.log());

    // Killed between the command and the note of its success, and the peer leaves meanwhile.
    let [a, b] = &mut members;
    fs::write(at.join("hang"), "").unwrap();
    let key = "/coreos.com/network/subnets/10.244.200.0-24";
    cluster.put(key, r#"{"PublicIP":"172.31.0.200","BackendType":"extension"}"#);
    a.wait("the command", || log_of(at, a).last().is_some_and(|line| line == "hangs"));
    a.agent.kill().unwrap();
    b.agent.terminate(LIMIT).unwrap();
    cluster.etcdctl(&["del", key]);
    fs::remove_file(at.join("hang")).unwrap();
    a.start_again();
    a.wait("the removal", || {
        log_of(at, a).last().is_some_and(|line| line == "remove 10.244.200.0/24 172.31.0.200")
    });
    assert_eq!(log_of(at, a).iter().filter(|line| **line == add).count(), 1, "{:?}", log_of(at, a));
    b.start_again();
    pods_reach_each_other(&members, &pods);
}

#[test]
fn commands_of_the_store_run_only_where_the_operator_of_the_node_allows_it() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    let cluster = Cluster::new(&config(at));
    let member = cluster.start(cluster.fabric.node().unwrap(), &[]);
    member.wait("the reason", || {
        member.agent.get("/readyz").is_ok_and(|(code, text)| code == 503 && text.contains(ALLOWED))
    });
    assert!(cluster.leases().is_empty() && log_of(at, &member).is_empty());
    // Another configuration needs no permission, and a change to this one is refused.
    let vxlan = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;
    cluster.put("/coreos.com/network/config", vxlan);
    member.wait("readiness", || member.agent.get("/readyz").is_ok_and(|(code, _)| code == 200));
    cluster.put("/coreos.com/network/config", &config(at));
    member.wait("the refusal", || {
        let (code, text) = member.agent.get("/readyz?verbose").unwrap();
        code == 200 && text.contains("not in force") && text.contains(ALLOWED)
    });
    assert!(log_of(at, &member).is_empty());
}

#[test]
fn cleanup_names_what_commands_made_and_removes_the_note_of_it() {
    let directory = tempfile::tempdir().unwrap();
    let cluster = Cluster::new(&config(directory.path()));
    let (mut a, b) = (cluster.join_with(&[ALLOWED]), cluster.join_with(&[ALLOWED]));
    a.wait("the peer's route", || a.node.has_route(b.subnet().trunc()).unwrap());
    a.agent.terminate(LIMIT).unwrap();
    let file = format!("--subnet-file={}", a.node.subnet_file().display());
    let output = a.node.namespace().command(flanneld()).args(["cleanup", &file]).output().unwrap();
    let (told, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && told.contains("extension.json"), "{told}{errors}");
    assert!(
        errors.contains("SubnetAddCommand ran for") && errors.contains(&b.subnet().trunc().to_string()),
        "{errors}"
    );
    let left = fs::read_dir(a.node.subnet_file().parent().unwrap()).unwrap();
    assert!(left.into_iter().all(|entry| !entry.unwrap().path().to_string_lossy().contains("extension")));
}

#[test]
fn alloc_leases_a_subnet_and_leaves_routes_to_others() {
    let cluster = Cluster::new(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"alloc"}}"#);
    let members = [cluster.join_with(&["--ip-masq"]), cluster.join_with(&["--ip-masq"])];
    for member in &members {
        let key =
            format!("/coreos.com/network/subnets/{}", member.subnet().trunc().to_string().replace('/', "-"));
        let value = format!(r#"{{"PublicIP":"{}","PublicIPv6":null}}"#, member.node.address());
        assert!(cluster.leases().contains(&(key, value)), "{:?}", cluster.leases());
        assert_eq!(member.agent.subnet_env().unwrap().mtu, Some(1500));
        assert!(member.show("nft list table ip flannel-ipv4").contains("masquerade"));
        let routes = member.show("ip route show proto 70");
        assert!(routes.trim_end().lines().all(|line| line.starts_with("blackhole ")), "{routes}");
    }
    // As a router's administrator, or a boot script, makes them.
    let [a, b] = &members;
    for (from, to) in [(a, b), (b, a)] {
        from.ip(&format!("route add {} via {}", to.subnet().trunc(), to.node.address()));
    }
    let pods = members.each_ref().map(|member| member.pod());
    pods_reach_each_other(&members, &pods);
    let mut members = members;
    let [a, b] = &mut members;
    a.agent.kill().unwrap();
    a.start_again();
    assert!(a.node.has_route(b.subnet().trunc()).unwrap(), "a restart leaves it alone");
    assert!(a.agent.get("/readyz?verbose").unwrap().1.contains("\"notes\":[]"));
}
