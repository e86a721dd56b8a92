//! Who may ask for what is said about the cluster: this host, and the nodes of the cluster.

use std::net::IpAddr;

use subnet::SharedSet;

/// The addresses of nodes, by family.
#[derive(Clone, Default)]
pub(crate) struct Sources {
    /// Peers' public addresses.
    pub(crate) peers: [SharedSet<IpAddr>; 2],
    /// This node's own.
    pub(crate) own: Vec<IpAddr>,
}

impl Sources {
    /// Whether a client with this address may ask.
    pub(crate) fn admit(&self, client: IpAddr) -> bool {
        let client = client.to_canonical();
        client.is_loopback()
            || self.own.contains(&client)
            || self.peers.iter().any(|peers| peers.contains_key(&client))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_and_peers_may_ask_and_nobody_else() {
        let addr = |text: &str| text.parse::<IpAddr>().unwrap();
        let sources = Sources {
            peers: [
                [(addr("192.0.2.2"), ()), (addr("192.0.2.9"), ())].into(),
                [(addr("2001:db8::2"), ())].into(),
            ],
            own: vec![addr("192.0.2.1")],
        };
        for (client, admitted) in [
            ("127.0.0.1", true),
            ("127.5.0.1", true),
            ("::1", true),
            ("::ffff:127.0.0.1", true),
            ("192.0.2.1", true),
            ("192.0.2.9", true),
            ("::ffff:192.0.2.2", true),
            ("2001:db8::2", true),
            ("192.0.2.3", false),
            ("10.244.1.7", false),
            ("2001:db8::3", false),
        ] {
            assert_eq!(sources.admit(addr(client)), admitted, "{client}");
        }
        assert!(!Sources::default().admit(addr("192.0.2.2")));
    }
}
