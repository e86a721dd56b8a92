//! What the agent says of itself: exit codes, `/healthz`, `/readyz`, the service manager, secrets.

use std::os::unix::net::UnixDatagram;

use backends::testing::uninterrupted;

use crate::bed::{Cluster, LIMIT, VXLAN, flanneld};

#[test]
fn health_is_served_from_the_first_moment_and_tells_the_truth() {
    let cluster = Cluster::unconfigured();
    let mut a = cluster.start(cluster.fabric.node().unwrap(), &[]);
    a.wait("an answer", || a.agent.get("/healthz").is_ok());
    assert_eq!(a.agent.get("/healthz").unwrap(), (200, "flanneld is running".to_owned()));
    a.wait("the reason", || a.agent.get("/readyz").unwrap().1.contains("/coreos.com/network/config"));
    assert_eq!(a.agent.get("/readyz").unwrap().0, 503);
    assert_eq!(a.agent.get("/nothing").unwrap().0, 404);

    cluster.put("/coreos.com/network/config", r#"{"Network":"10.244.0.0/16","Backend":{"Type":"ipsec"}}"#);
    a.wait_for_log("\"ipsec\" is a backend of Go flannel that this release doesn't have");
    cluster.put("/coreos.com/network/config", r#"{"Network":"10.244.0.0/16","Backend":{"Type":"udpp"}}"#);
    a.wait_for_log("\"udpp\" is no backend");
    cluster.put("/coreos.com/network/config", VXLAN);
    a.agent.wait_ready(LIMIT).unwrap();
    assert_eq!(a.agent.get("/readyz").unwrap(), (200, "flanneld is ready".to_owned()));
    let env = std::fs::read_to_string(a.node.subnet_file()).unwrap();
    let subnet = a.subnet();
    let gateway = subnet.hosts().next().unwrap();
    assert_eq!(
        env,
        format!(
            "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET={gateway}/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n"
        )
    );
    assert!(a.agent.terminate(LIMIT).unwrap().success());
}

#[test]
fn a_subnet_file_that_cannot_be_written_keeps_the_node_unready() {
    let cluster = Cluster::new(VXLAN);
    let a = cluster.start(cluster.fabric.node().unwrap(), &["--subnet-file=/proc/nowhere/subnet.env"]);
    a.wait_for_log("no pod can be connected");
    a.wait("the reason", || {
        let (code, body) = a.agent.get("/readyz").unwrap();
        code == 503 && body.contains("subnet-file") && body.contains("/proc/nowhere")
    });
}

#[test]
fn the_service_manager_hears_when_the_agent_is_ready_and_when_it_stops() {
    let cluster = Cluster::new(VXLAN);
    let node = cluster.fabric.node().unwrap();
    let path = node.dir().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    let endpoint = format!("--etcd-endpoints={}", cluster.etcd.endpoint());
    let file = format!("--subnet-file={}", node.subnet_file().display());
    let mut process = node
        .namespace()
        .command(flanneld())
        .args([&endpoint, &file])
        .env("NOTIFY_SOCKET", &path)
        .spawn()
        .unwrap();
    let heard = || {
        let mut buffer = [0; 256];
        let length = uninterrupted(|| socket.recv(&mut buffer)).unwrap();
        String::from_utf8_lossy(&buffer[..length]).trim().to_owned()
    };
    assert_eq!(heard(), "READY=1");
    assert!(node.subnet_file().exists());
    process.signal(backends::testing::Signal::TERM).unwrap();
    assert_eq!(heard(), "STOPPING=1");
    assert!(process.wait(LIMIT).unwrap().success());
}

#[test]
fn wrong_flags_end_with_code_2_and_no_secret_is_ever_logged() {
    let cluster = Cluster::new(VXLAN);
    let node = cluster.fabric.node().unwrap();
    for (args, part) in [
        (vec!["--ifce=eth0"], "--iface"),
        (vec!["--cni-conf=/etc/a"], "cni-conf"),
        (vec!["--subnet-file=/dev/null"], "--subnet-file=/dev/null: it is a directory, a device"),
        (vec!["--public-ip=127.0.0.1"], "other nodes can send to"),
        (vec!["--subnet-lease-renew-margin=1440"], "1440"),
        (vec!["--kube-subnet-mgr", "--kube-annotation-prefix=org"], "--kube-annotation-prefix: \"org\""),
        (vec!["--kube-subnet-mgr", "--kube-api-url=https://a:sesame@b"], "--kube-api-url: \"b\""),
        (vec!["--kube-subnet-mgr", "--kubeconfig-file=/nonexistent"], "--kubeconfig-file /nonexistent"),
        (vec!["--kube-subnet-mgr", "--kubeconfig-file=/proc/version"], "--kubeconfig-file /proc/version"),
        (vec!["--kube-subnet-mgr"], "give --kubeconfig-file or --kube-api-url"),
    ] {
        let command = node.namespace().command(flanneld()).env("NODE_NAME", "n1").args(args);
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(text.contains(part) && !text.contains("sesame"), "{text}");
    }
    let a = cluster.start(node, &["--etcd-username=root", "--etcd-password=open-sesame", "-v=10"]);
    a.wait_for_log("configuration read");
    assert!(!a.agent.log().contains("sesame"), "{}", a.agent.log());
}

#[test]
fn a_second_node_with_the_same_public_address_is_noticed() {
    let cluster = Cluster::new(VXLAN);
    let a = cluster.join_with(&["--iface=eth0", "--public-ip=172.31.0.100"]);
    let _b = cluster.start(cluster.fabric.node().unwrap(), &["--iface=eth0", "--public-ip=172.31.0.100"]);
    a.wait_for_log("it has the same public address 172.31.0.100");
    a.wait("not ready", || {
        a.agent.get("/readyz").is_ok_and(|(code, body)| code == 503 && body.contains("172.31.0.100"))
    });
    assert!(a.show("ip link show flannel.1").contains("UP"), "the data path stays");
}

#[test]
fn a_node_whose_subnet_was_given_away_takes_another_and_waits_for_its_pods_to_go() {
    let cluster = Cluster::new(VXLAN);
    let a = cluster.join();
    let old = a.subnet();
    let pod = a.pod();
    let key = format!("/coreos.com/network/subnets/{}-24", old.network());
    cluster.put(&key, r#"{"PublicIP":"172.31.0.200","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:c8"}}"#);
    a.wait_for_log("this node has another subnet than before");
    a.wait("the new subnet", || a.subnet() != old);
    a.wait("the reason", || {
        let (code, body) = a.agent.get("/readyz").unwrap();
        code == 503 && body.contains(&old.to_string()) && body.contains("cni0")
    });
    assert!(a.show("ip route show").contains(&format!("{old} dev cni0")), "the route to its pods stays");
    drop(pod);
    assert!(
        cluster.leases().iter().any(|(found, value)| *found == key && value.contains("172.31.0.200")),
        "not overwritten"
    );
}

#[test]
fn a_capability_that_is_missing_is_told_once_with_the_remedy() {
    let cluster = Cluster::new(VXLAN);
    let node = cluster.fabric.node().unwrap();
    let store = format!("--etcd-endpoints={}", cluster.etcd.endpoint());
    let file = format!("--subnet-file={}", node.subnet_file().display());
    let command =
        node.namespace().command("setpriv").arg("--bounding-set=-net_admin").arg("--").arg(flanneld());
    let output = command.args([&store, &file]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let log = String::from_utf8(output.stderr).unwrap();
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("CAP_NET_ADMIN")).collect();
    assert_eq!(lines.len(), 1, "{log}");
    assert!(lines[0].contains("run it as root or add the capability"), "{log}");
}
