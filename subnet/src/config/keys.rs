//! Keys of `net-conf.json` that have no effect: misspelled, at the wrong place, or of another backend.
//!
//! Go flannel ignores unknown keys, so they are no errors. But a misspelled key leaves a default in force that
//! the operator did not choose, and so each is named.

use std::collections::BTreeMap;

use super::Origin;
use crate::gojson::Object;
use crate::text::{distance, shortened};

/// What a configuration says without effect. Two configurations that differ only in this are equal.
#[derive(Clone, Debug, Default)]
pub struct Warnings(pub Vec<String>);

impl PartialEq for Warnings {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Warnings {}

const TOP: [&str; 14] = [
    "EnableIPv4",
    "EnableIPv6",
    "EnableNFTables",
    "Network",
    "IPv6Network",
    "SubnetLen",
    "SubnetMin",
    "SubnetMax",
    "IPv6SubnetLen",
    "IPv6SubnetMin",
    "IPv6SubnetMax",
    "Backend",
    "MasqueradeExcept",
    "FastPath",
];
/// With those that Go flannel reads on Windows only.
const VXLAN: [&str; 12] = [
    "Type",
    "VNI",
    "Port",
    "MTU",
    "GBP",
    "Learning",
    "DirectRouting",
    "ChecksumOffload",
    "Fallback",
    "CheckSources",
    "MacPrefix",
    "Name",
];
const HOST_GW: [&str; 3] = ["Type", "Name", "DNSServerList"];
const IPIP: [&str; 4] = ["Type", "DirectRouting", "Fallback", "CheckSources"];
const ALLOC: [&str; 1] = ["Type"];
const EXTENSION: [&str; 6] = [
    "Type",
    "PreStartupCommand",
    "PostStartupCommand",
    "SubnetAddCommand",
    "SubnetRemoveCommand",
    "AllowCommands",
];
const UDP: [&str; 4] = ["Type", "Port", "CheckSources", "Workers"];
const WIREGUARD: [&str; 10] = [
    "Type",
    "ListenPort",
    "ListenPortV6",
    "MTU",
    "PSK",
    "PersistentKeepaliveInterval",
    "Mode",
    "Userspace",
    "Workers",
    "Name",
];
/// The keys in `Backend` of each backend.
const BACKENDS: [(&str, &[&str]); 7] = [
    ("vxlan", &VXLAN),
    ("host-gw", &HOST_GW),
    ("wireguard", &WIREGUARD),
    ("ipip", &IPIP),
    ("udp", &UDP),
    ("alloc", &ALLOC),
    ("extension", &EXTENSION),
];
/// More messages than this about one document are no help.
const MAX_SAID: usize = 10;

/// All keys that are read, for a document that lists them: those outside of `Backend`, and those of each backend.
#[cfg(feature = "testing")]
pub fn all() -> impl Iterator<Item = (&'static str, &'static [&'static str])> {
    std::iter::once(("", &TOP[..])).chain(BACKENDS)
}

/// The keys of a configuration that have no effect, each with what to do.
pub(super) fn without_effect(object: &Object<'_>, backend: &str, origin: Origin) -> Warnings {
    // Of a backend that is not among them, the keys are not known here.
    let known = BACKENDS.into_iter().find(|(name, _)| *name == backend);
    let of_backend = known.map_or(&[][..], |(_, keys)| keys);
    let inner = object.object("Backend").ok().flatten();
    let inside = inner.iter().filter(|_| !of_backend.is_empty()).flat_map(Object::names);
    let outer = object.names().filter_map(|name| {
        let elsewhere = find(name, of_backend).filter(|key| *key != "Type" || inner.is_none());
        unknown(name, &TOP, "").map(|text| match elsewhere {
            Some(key) => format!("{name} has no effect here: move it into Backend, as Backend.{key}"),
            None => text,
        })
    });
    let inside = inside.filter_map(|name| {
        if let Some(text) = of_commands(name, backend, origin) {
            return Some(text);
        }
        let elsewhere =
            [&VXLAN[..], &UDP, &EXTENSION, &WIREGUARD].into_iter().find_map(|keys| find(name, keys));
        unknown(name, of_backend, "Backend.").map(|text| match (elsewhere, find(name, &TOP)) {
            (Some(key), _) => format!("Backend.{key} has no effect with the backend {backend}: remove it"),
            (None, Some(key)) => format!("Backend.{key} has no effect here: move it out of Backend"),
            (None, None) => text,
        })
    });
    let twice = twice(object, "").chain(inner.iter().flat_map(|inner| twice(inner, "Backend.")));
    Warnings(outer.chain(inside).chain(twice).chain(switched_off(object)).take(MAX_SAID).collect())
}

/// Keys that are there more than once, in any spelling.
fn twice<'o>(object: &'o Object<'_>, path: &'o str) -> impl Iterator<Item = String> + 'o {
    let mut times: BTreeMap<String, u32> = BTreeMap::new();
    object.names().filter_map(move |name| {
        let times = times.entry(name.to_ascii_lowercase()).or_default();
        *times += 1;
        let shown = shortened(name);
        (*times == 2)
            .then(|| format!("{path}{shown} is there more than once: the last one counts, remove the others"))
    })
}

/// A network of IPv6 that was given, while nothing says whether IPv6 is to be used.
fn switched_off(object: &Object<'_>) -> Option<String> {
    (object.has("IPv6Network") && !object.has("EnableIPv6"))
        .then(|| "IPv6Network has no effect without \"EnableIPv6\": true: add that, or remove it".to_owned())
}

/// What is to be said about a key of commands that has no effect although `extension` has it, here or in samples.
fn of_commands(name: &str, backend: &str, origin: Origin) -> Option<String> {
    let is = |key: &str| backend == "extension" && name.eq_ignore_ascii_case(key);
    if is("ShutdownCommand") {
        return Some(
            "Backend.ShutdownCommand has no effect, as in Go flannel: what commands made stays when flanneld ends"
                .to_owned(),
        );
    }
    (is("AllowCommands") && origin == Origin::Store).then(|| {
        "Backend.AllowCommands has no effect in a store, where others may write it: start flanneld with \
         --allow-extension-commands"
            .to_owned()
    })
}

/// The key that a name means, if it is one of these: without regard to case, as in Go.
fn find<'k>(name: &str, keys: &[&'k str]) -> Option<&'k str> {
    keys.iter().copied().find(|key| key.eq_ignore_ascii_case(name))
}

fn unknown(name: &str, keys: &[&str], path: &str) -> Option<String> {
    if find(name, keys).is_some() {
        return None;
    }
    let shown = shortened(name);
    let lower = name.to_ascii_lowercase();
    let near = keys.iter().map(|key| (distance(&lower, &key.to_ascii_lowercase()), *key)).min();
    Some(match near {
        // A key with some letters more, as in SubnetLenght, is as near as one with a few wrong ones.
        Some((distance, key))
            if distance <= (key.len() / 4).max(1)
                || distance <= key.len() / 3 && lower.starts_with(&key.to_ascii_lowercase()) =>
        {
            format!("{path}{shown} is not known and has no effect: did you mean {path}{key}?")
        }
        _ => format!("{path}{shown} is not known and has no effect"),
    })
}

#[cfg(test)]
mod tests {
    use crate::config::NetworkConfig;

    fn warnings(top: &str, backend: &str) -> Vec<String> {
        let json = format!(r#"{{"Network":"10.5.0.0/16"{top},"Backend":{{{backend}}}}}"#);
        let both =
            [NetworkConfig::parse(&json), NetworkConfig::parse_given_subnets(&json, &Default::default())];
        let [one, other] = both.map(|config| config.unwrap().warnings.0);
        assert_eq!(one, other);
        one
    }

    #[test]
    fn misspelled_keys_are_named_with_what_they_may_mean() {
        for (top, backend, warning) in [
            (
                r#","SubnetLenght":26"#,
                r#""Type":"vxlan""#,
                "SubnetLenght is not known and has no effect: did you mean SubnetLen?",
            ),
            (
                r#","EnableIPV":true"#,
                r#""Type":"vxlan""#,
                "EnableIPV is not known and has no effect: did you mean EnableIPv4?",
            ),
            (
                "",
                r#""Type":"vxlan","DirectRoutin":true"#,
                "Backend.DirectRoutin is not known and has no effect: did you mean Backend.DirectRouting?",
            ),
            (
                "",
                r#""Type":"vxlan","Prot":1"#,
                "Backend.Prot is not known and has no effect: did you mean Backend.Port?",
            ),
            (
                "",
                r#""Type":"host-gw","MTU":1400"#,
                "Backend.MTU has no effect with the backend host-gw: remove it",
            ),
            ("", r#""Type":"udp","vni":1"#, "Backend.VNI has no effect with the backend udp: remove it"),
            (
                r#","VNI":7"#,
                r#""Type":"vxlan""#,
                "VNI has no effect here: move it into Backend, as Backend.VNI",
            ),
            (
                "",
                r#""Type":"vxlan","SubnetLen":26"#,
                "Backend.SubnetLen has no effect here: move it out of Backend",
            ),
            (r#","Remark":"\n""#, r#""Type":"vxlan""#, "Remark is not known and has no effect"),
            (
                r#","IPv6Network":"fd00:5::/48""#,
                r#""Type":"vxlan""#,
                "IPv6Network has no effect without \"EnableIPv6\": true: add that, or remove it",
            ),
            (
                r#","network":"10.6.0.0/16","NETWORK":"10.7.0.0/16""#,
                r#""Type":"vxlan""#,
                "network is there more than once: the last one counts, remove the others",
            ),
            (
                "",
                r#""Type":"vxlan","MTU":1400,"Mtu":1300"#,
                "Backend.Mtu is there more than once: the last one counts, remove the others",
            ),
        ] {
            assert_eq!(warnings(top, backend), [warning], "{top} {backend}");
        }
    }

    #[test]
    fn known_keys_in_any_spelling_warn_about_nothing() {
        for backend in [
            r#""type":"vxlan","vni":1,"PORT":1,"Mtu":1400,"GBP":true,"learning":false,"DirectRouting":true"#,
            r#""Type":"vxlan","MacPrefix":"0E-2A","Name":"x","ChecksumOffload":"off","Fallback":"udp""#,
            r#""Type":"host-gw","Name":"cbr0""#,
            r#""Type":"vxlan","CheckSources":false"#,
            r#""Type":"udp","Port":1,"CheckSources":false,"Workers":2"#,
            r#""Type":"wireguard","ListenPort":1,"psk":"","Mode":"auto","Userspace":"never""#,
            r#""Type":"ipip","DirectRouting":true,"Fallback":"udp","CheckSources":false"#,
            r#""Type":"alloc""#,
            r#""Type":"extension","PreStartupCommand":"a","postStartupCommand":"b","SubnetAddCommand":"c""#,
        ] {
            let top = r#","enableipv4":true,"EnableNFTables":true,"SubnetLen":24,"IPv6SubnetLen":64,"EnableIPv6":false,"IPv6Network":"::/0""#;
            assert_eq!(warnings(top, backend), [""; 0], "{backend}");
        }
        assert_eq!(NetworkConfig::parse(r#"{"Network":"10.5.0.0/16"}"#).unwrap().warnings.0, [""; 0]);
    }

    #[test]
    fn commands_are_allowed_by_a_file_of_this_node_and_by_nothing_in_a_store() {
        let json = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"extension","AllowCommands":true,"ShutdownCommand":"x"}}"#;
        let [store, file] = [
            NetworkConfig::parse(json).unwrap(),
            NetworkConfig::parse_given_subnets(json, &Default::default()).unwrap(),
        ];
        let allowed = |config: &NetworkConfig| match &config.backend {
            crate::BackendConfig::Extension(extension) => extension.allowed,
            other => panic!("{other:?}"),
        };
        assert_eq!((allowed(&store), allowed(&file)), (false, true));
        let [said, shutdown] = &store.warnings.0[..] else { panic!("{:?}", store.warnings) };
        assert!(said.contains("--allow-extension-commands"), "{said}");
        assert!(shutdown.contains("ShutdownCommand has no effect, as in Go flannel"), "{shutdown}");
        assert_eq!(file.warnings.0, std::slice::from_ref(shutdown));
    }

    #[test]
    fn a_document_full_of_nonsense_is_told_in_few_words() {
        let keys: String = (0..1000).map(|n| format!(r#","{}{n}":1"#, "x".repeat(500))).collect();
        let said = warnings(&keys, r#""Type":"vxlan""#);
        assert!(said.len() <= 10 && said.iter().all(|text| text.len() < 200), "{said:?}");
    }
}
