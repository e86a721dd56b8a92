//! `flanneld policy denied`: packets that policies refuse, with the names of pods.

use std::collections::HashMap;
use std::io::{self, Write};
use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use backends::policy::{Refused, RefusedBy, RefusedPackets};
use serde_json::json;
use subnet::policy::Protocol;

use super::exchange::ask;

/// How long a name is believed: an address may pass to another pod.
const MAX_NAME_AGE: Duration = Duration::from_secs(10);
/// Names that are kept.
const MAX_NAMES: usize = 1000;

/// Prints packets until the reader is gone.
///
/// # Errors
/// A sentence, when the agent or the kernel does not tell.
pub(super) fn run(socket: &Path) -> anyhow::Result<()> {
    let group: u16 = ask(socket, &json!({"v": 1, "verb": "log-group"}))?.trim().parse()?;
    let mut packets = RefusedPackets::listen(group).with_context(|| {
        format!("NFLOG group {group} can't be listened to: it takes root or CAP_NET_ADMIN, and no other program that does so")
    })?;
    eprintln!(
        "listening to NFLOG group {group}: refused packets of this node's pods, at most 10 a second of each class"
    );
    let mut names = Names { socket, known: HashMap::new() };
    loop {
        for packet in packets.wait().context("NFLOG")? {
            let line = line(&packet, |address| names.of(address));
            // The reader may have seen enough.
            if writeln!(io::stdout(), "{line}").is_err() {
                return Ok(());
            }
        }
    }
}

/// A packet as it is printed.
fn line(packet: &Refused, mut name: impl FnMut(IpAddr) -> Option<String>) -> String {
    let mut end = |address: IpAddr| match name(address) {
        Some(name) => format!("{name} ({address})"),
        None => address.to_string(),
    };
    let (source, destination) = (end(packet.source), end(packet.destination));
    let by = match packet.by {
        RefusedBy::Egress => "egress ",
        RefusedBy::Ingress => "ingress",
        RefusedBy::Other => "other  ",
    };
    let known = Protocol::ALL.into_iter().find(|protocol| *protocol as u8 == packet.protocol);
    let protocol = match (known, packet.protocol) {
        (Some(protocol), _) => protocol.name().to_owned(),
        (None, 1 | 58) => "ICMP".to_owned(),
        (None, number) => format!("protocol {number}"),
    };
    let port = packet.ports.map(|(_, destination)| format!(" {destination}")).unwrap_or_default();
    format!("DENIED {by} {source} → {destination} {protocol}{port}")
}

/// Names of addresses, asked of the agent and believed for a while.
struct Names<'a> {
    socket: &'a Path,
    known: HashMap<IpAddr, (Instant, Option<String>)>,
}

impl Names<'_> {
    fn of(&mut self, address: IpAddr) -> Option<String> {
        if self.known.len() >= MAX_NAMES {
            self.known.clear();
        }
        let fresh = self.known.get(&address).filter(|(at, _)| at.elapsed() < MAX_NAME_AGE);
        if let Some((_, name)) = fresh {
            return name.clone();
        }
        // Without an answer the address has to do.
        let text = ask(self.socket, &json!({"v": 1, "verb": "names", "ips": [address]})).unwrap_or_default();
        let name = Some(text.trim().to_owned()).filter(|name| !name.is_empty());
        self.known.insert(address, (Instant::now(), name.clone()));
        name
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_names_both_ends_the_direction_and_the_port() {
        let packet = Refused {
            by: RefusedBy::Ingress,
            source: [10, 244, 1, 7].into(),
            destination: [10, 244, 3, 4].into(),
            protocol: 6,
            ports: Some((40000, 5432)),
        };
        let name = |address: IpAddr| (address == packet.source).then(|| "shop/web".to_owned());
        assert_eq!(line(&packet, name), "DENIED ingress shop/web (10.244.1.7) → 10.244.3.4 TCP 5432");
        let ping = Refused { by: RefusedBy::Egress, protocol: 1, ports: None, ..packet };
        assert_eq!(line(&ping, |_| None), "DENIED egress  10.244.1.7 → 10.244.3.4 ICMP");
    }
}
