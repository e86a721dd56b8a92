//! What nodes are in, printed when a test fails: a guest is gone afterwards.

use std::thread;

use backends::testing::{Namespace, Pod};

use crate::bed::{Cluster, Member};

/// What shows how the nodes reach each other. A node without a device answers with an error, which is evidence, too.
const COMMANDS: [&str; 13] = [
    "date +%T.%N",
    "ip -d -s link",
    "ip address",
    "ip route show table all",
    "ip neigh",
    "bridge fdb",
    "wg show all",
    "wg show all latest-handshakes",
    "ss -ulnp",
    "nft list ruleset",
    "nft list flowtables",
    "cat /proc/thread-self/net/nf_conntrack",
    "cat /proc/net/snmp",
];

/// The same of a pod: what its connections wait for, and which MTU it knows for which destination.
const POD_COMMANDS: [&str; 4] =
    ["ss -tinoea", "ip -s link", "ip route show cache", "cat /proc/thread-self/net/snmp"];

/// Shows the nodes and their leases when it is dropped by a panic. Agents show their logs themselves.
pub(crate) struct Evidence<'a>(pub(crate) &'a Cluster, pub(crate) &'a [Member]);

impl Drop for Evidence<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            show(self.0, self.1, &[]);
        }
    }
}

/// Shows the nodes, their leases and pods.
pub(crate) fn show(cluster: &Cluster, members: &[Member], pods: &[Pod]) {
    // The test fails already, so that an etcd that is gone must not end the process.
    match cluster.etcd.ctl(&["get", "--prefix", "/coreos.com/network/subnets/"], "") {
        Ok(leases) => eprintln!("leases:\n{leases}"),
        Err(error) => eprintln!("leases: {error:#}"),
    }
    for member in members {
        eprintln!("--- {}", member.node.name());
        show_commands(member.node.namespace(), &COMMANDS);
        for path in ["/readyz?verbose", "/status?look", "/peers", "/metrics"] {
            match member.agent.get(path) {
                Ok((code, body)) => eprintln!("GET {path}: {code}\n{body}"),
                Err(error) => eprintln!("GET {path}: {error}"),
            }
        }
    }
    for pod in pods {
        eprintln!("--- pod {}", pod.address());
        show_commands(pod.namespace(), &POD_COMMANDS);
    }
}

fn show_commands(namespace: &Namespace, commands: &[&str]) {
    for command in commands {
        let words: Vec<&str> = command.split(' ').collect();
        match namespace.command(words[0]).args(&words[1..]).output() {
            Ok(output) => {
                let text = [output.stdout, output.stderr].concat();
                eprintln!("$ {command}\n{}", String::from_utf8_lossy(&text));
            }
            Err(error) => eprintln!("$ {command}\n{error}"),
        }
    }
}
