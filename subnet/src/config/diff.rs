//! What distinguishes two configurations, key by key, for the log.

use std::fmt::Display;

use super::{BackendConfig, ChecksumOffload, NetworkConfig, Range};
use crate::net::Family;
use crate::text::shortened;

impl NetworkConfig {
    /// Every key of which `next` has another value, as `Backend.VNI: 1 → 2`. Defaults count as values.
    pub fn changes(&self, next: &Self) -> Vec<String> {
        let (before, after) = (self.values(), next.values());
        let value = |values: &[(&'static str, String)], key: &str| {
            let found = values.iter().find(|(name, _)| *name == key);
            found.map_or("(none)".to_owned(), |(_, value)| value.clone())
        };
        let added = after.iter().filter(|(key, _)| before.iter().all(|(known, _)| known != key));
        let keys = before.iter().chain(added).map(|(key, _)| *key);
        keys.map(|key| (key, value(&before, key), value(&after, key)))
            .filter(|(_, old, new)| old != new)
            .map(|(key, old, new)| format!("{key}: {old} → {new}"))
            .collect()
    }

    /// Every key that is in force, with its value.
    fn values(&self) -> Vec<(&'static str, String)> {
        let mut values = Vec::new();
        for family in Family::BOTH {
            if let Some(range) = self.range(family) {
                values.extend(range_values(range, family));
            }
        }
        values.push(("EnableNFTables", self.nftables.to_string()));
        values.push(("Backend.Type", shortened(self.backend.name())));
        values.extend(backend_values(&self.backend));
        let except: Vec<String> = self.masquerade_except.iter().map(ToString::to_string).collect();
        values
            .push(("MasqueradeExcept", if except.is_empty() { "(none)".into() } else { except.join(", ") }));
        values.push(("FastPath", self.fast_path.to_string()));
        values
    }
}

fn range_values(range: &Range, family: Family) -> [(&'static str, String); 4] {
    let names = match family {
        Family::V4 => ["Network", "SubnetLen", "SubnetMin", "SubnetMax"],
        Family::V6 => ["IPv6Network", "IPv6SubnetLen", "IPv6SubnetMin", "IPv6SubnetMax"],
    };
    let Range { network, subnet_len, min, max } = range;
    let [a, b, c, d] = names;
    [(a, network.to_string()), (b, subnet_len.to_string()), (c, min.to_string()), (d, max.to_string())]
}

fn backend_values(backend: &BackendConfig) -> Vec<(&'static str, String)> {
    fn or<T: Display>(value: Option<T>, default: &str) -> String {
        value.map_or(default.to_owned(), |value| value.to_string())
    }
    match backend {
        BackendConfig::Vxlan(vxlan) => vec![
            ("Backend.VNI", vxlan.vni.to_string()),
            ("Backend.Port", or(vxlan.port, "8472")),
            ("Backend.MTU", or(vxlan.mtu, "(that of the interface)")),
            ("Backend.GBP", vxlan.gbp.to_string()),
            ("Backend.Learning", vxlan.learning.to_string()),
            ("Backend.DirectRouting", vxlan.direct_routing.to_string()),
            (
                "Backend.ChecksumOffload",
                match vxlan.checksum_offload {
                    ChecksumOffload::Auto => "auto".into(),
                    ChecksumOffload::On => "on".into(),
                    ChecksumOffload::Off => "off".into(),
                },
            ),
            ("Backend.Fallback", shown_fallback(vxlan.fallback)),
            ("Backend.CheckSources", vxlan.check_sources.to_string()),
        ],
        BackendConfig::Ipip(ipip) => vec![
            ("Backend.DirectRouting", ipip.direct_routing.to_string()),
            ("Backend.Fallback", shown_fallback(ipip.fallback)),
            ("Backend.CheckSources", ipip.check_sources.to_string()),
        ],
        BackendConfig::Udp { port, check_sources, workers } => vec![
            ("Backend.Port", port.to_string()),
            ("Backend.CheckSources", check_sources.to_string()),
            ("Backend.Workers", workers.to_string()),
        ],
        BackendConfig::Wireguard(wireguard) => wireguard.values(),
        // Arguments of commands may be secrets.
        BackendConfig::Extension(extension) => vec![
            ("Backend.PreStartupCommand", shown_command(&extension.pre_startup)),
            ("Backend.PostStartupCommand", shown_command(&extension.post_startup)),
            ("Backend.SubnetAddCommand", shown_command(&extension.subnet_add)),
            ("Backend.SubnetRemoveCommand", shown_command(&extension.subnet_remove)),
            ("Backend.AllowCommands", extension.allowed.to_string()),
        ],
        BackendConfig::HostGw | BackendConfig::Alloc | BackendConfig::Unknown(_) => Vec::new(),
    }
}

/// A command by its program and what tells it from another one with the same program.
fn shown_command(command: &str) -> String {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let Some(program) = command.split_whitespace().next() else { return "(none)".into() };
    let mut hasher = DefaultHasher::new();
    command.hash(&mut hasher);
    format!("{} … ({:08x})", shortened(program), hasher.finish() as u32)
}

fn shown_fallback(udp: bool) -> String {
    if udp { "udp" } else { "(none)" }.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changes(before: &str, after: &str) -> Vec<String> {
        let read = |json| NetworkConfig::parse(json).unwrap();
        read(before).changes(&read(after))
    }

    #[test]
    fn each_key_that_changes_is_told_with_both_values() {
        let before = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#;
        assert_eq!(changes(before, before), Vec::<String>::new());
        // Spelled otherwise, and the same.
        assert_eq!(
            changes(before, r#"{"network":"10.5.3.7/16","Backend":{"Type":"VXLAN","VNI":1,"Port":8472}}"#),
            Vec::<String>::new()
        );
        assert_eq!(
            changes(
                before,
                r#"{"Network":"10.5.0.0/16","EnableNFTables":true,"Backend":{"Type":"vxlan","VNI":2,"DirectRouting":true}}"#
            ),
            ["EnableNFTables: false → true", "Backend.VNI: 1 → 2", "Backend.DirectRouting: false → true"]
        );
        assert_eq!(
            changes(before, r#"{"Network":"10.6.0.0/16","SubnetLen":26,"Backend":{"Type":"vxlan"}}"#),
            [
                "Network: 10.5.0.0/16 → 10.6.0.0/16",
                "SubnetLen: 24 → 26",
                "SubnetMin: 10.5.1.0 → 10.6.0.64",
                "SubnetMax: 10.5.255.0 → 10.6.255.192"
            ]
        );
    }

    #[test]
    fn what_comes_or_goes_is_told_as_none() {
        let one = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"host-gw"}}"#;
        let two = r#"{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48","Backend":{"Type":"udp"}}"#;
        let there = changes(one, two);
        assert!(there.contains(&"IPv6Network: (none) → fd00::/48".to_owned()), "{there:?}");
        assert!(there.contains(&"Backend.Type: host-gw → udp".to_owned()), "{there:?}");
        assert!(there.contains(&"Backend.Port: (none) → 8285".to_owned()), "{there:?}");
        let back = changes(two, one);
        assert!(back.contains(&"IPv6Network: fd00::/48 → (none)".to_owned()), "{back:?}");
        assert_eq!(there.len(), back.len());
    }
}
