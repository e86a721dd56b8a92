//! What nodes are in, printed when a test fails: a guest is gone afterwards.

use std::thread;

use crate::bed::{Cluster, Member};

/// What shows how the nodes reach each other. A node without a device answers with an error, which is evidence, too.
const COMMANDS: [&str; 11] = [
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
    "cat /proc/net/snmp",
];

/// Shows the nodes and their leases when it is dropped by a panic. Agents show their logs themselves.
pub(crate) struct Evidence<'a>(pub(crate) &'a Cluster, pub(crate) &'a [Member]);

impl Drop for Evidence<'_> {
    fn drop(&mut self) {
        if !thread::panicking() {
            return;
        }
        eprintln!("leases: {:#?}", self.0.leases());
        for member in self.1 {
            eprintln!("--- {}", member.node.name());
            for command in COMMANDS {
                let words: Vec<&str> = command.split(' ').collect();
                match member.node.namespace().command(words[0]).args(&words[1..]).output() {
                    Ok(output) => {
                        let text = [output.stdout, output.stderr].concat();
                        eprintln!("$ {command}\n{}", String::from_utf8_lossy(&text));
                    }
                    Err(error) => eprintln!("$ {command}\n{error}"),
                }
            }
            for path in ["/readyz?verbose", "/status?look", "/peers", "/metrics"] {
                match member.agent.get(path) {
                    Ok((code, body)) => eprintln!("GET {path}: {code}\n{body}"),
                    Err(error) => eprintln!("GET {path}: {error}"),
                }
            }
        }
    }
}
