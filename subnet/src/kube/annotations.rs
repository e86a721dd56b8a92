//! The annotations of a node, byte for byte as Go flannel writes them (contract §3.2.2 to §3.2.4).

use std::collections::BTreeMap;

use serde::Serialize;

use crate::lease::Attachment;
use crate::net::{Family, PublicAddrs};
use crate::wireguard::WireguardData;

pub(super) const MANAGED: &str = "kube-subnet-manager";
pub(super) const TYPE: &str = "backend-type";

/// A type that no node has: what the first of two patches says (contract K6). Nodes of ours that read it
/// stay with what they know, Go's ignore it.
pub(super) const CHANGING: &str = "changing";

/// Names of one family's annotations.
#[derive(Clone, Copy, Debug)]
pub(super) struct Names {
    pub(super) data: &'static str,
    pub(super) public: &'static str,
    /// Written by the operator: what to announce instead of the public address.
    pub(super) overwrite: &'static str,
    /// Written by the operator: acts like `--public-ip`.
    pub(super) node_public: &'static str,
}

impl Names {
    pub(super) fn of(family: Family) -> Self {
        match family {
            Family::V4 => Self {
                data: "backend-data",
                public: "public-ip",
                overwrite: "public-ip-overwrite",
                node_public: "node-public-ip",
            },
            Family::V6 => Self {
                data: "backend-v6-data",
                public: "public-ipv6",
                overwrite: "public-ipv6-overwrite",
                node_public: "node-public-ipv6",
            },
        }
    }
}

/// What stands before the name of each annotation of ours: `flannel.alpha.coreos.com/`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Prefix(String);

impl Prefix {
    /// Completes the prefix as Flannel does.
    ///
    /// # Errors
    /// What is wrong with the prefix, and the form that it needs.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "{text:?} can't begin an annotation: give a domain name and at most one slash \
                 after it, in lower case, for example \"flannel.alpha.coreos.com\" or \"example.org/blue\""
            )
        };
        let (domain, name) = text.split_once('/').unwrap_or((text, ""));
        let plain = |part: &str| {
            let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_' || c == '-';
            !part.is_empty() && part.chars().all(allowed)
        };
        if domain.split('.').count() < 2 || !domain.split('.').all(plain) {
            return Err(wrong());
        }
        if name.is_empty() {
            return Ok(Self(format!("{domain}/")));
        }
        // Go completes "x" to "x-" and then wants something before the hyphen.
        let name = name.strip_suffix('-').unwrap_or(name);
        if plain(name) { Ok(Self(format!("{domain}/{name}-"))) } else { Err(wrong()) }
    }

    /// The annotation's name without this prefix, if it has it.
    pub(super) fn strip<'a>(&self, key: &'a str) -> Option<&'a str> {
        key.strip_prefix(self.0.as_str())
    }

    /// The whole name of an annotation.
    pub(super) fn key(&self, name: &str) -> String {
        format!("{}{name}", self.0)
    }
}

/// Annotations under the prefix, by name.
pub(super) type Annotations = BTreeMap<String, String>;

/// What a node has to say: a value for each name, or `None` where there must not be any.
pub(super) type Wanted = BTreeMap<&'static str, Option<String>>;

/// The annotations for this attachment. `enabled` says which families the network has, `current` holds
/// the operator's annotations.
///
/// # Errors
/// A sentence about an operator's annotation that can't be used.
pub(super) fn wanted(
    current: &Annotations,
    public: &PublicAddrs,
    attachment: &Attachment,
    enabled: impl Fn(Family) -> bool,
) -> Result<Wanted, String> {
    let mut wanted =
        Wanted::from([(MANAGED, Some("true".to_owned())), (TYPE, Some(attachment.type_name().to_owned()))]);
    for family in Family::BOTH {
        let names = Names::of(family);
        let data = data_of(attachment, public, family);
        let announced = match (overwritten(current, family)?, public.get(family), family) {
            (Some(overwrite), ..) => Some(overwrite),
            (None, Some(addr), _) => Some(addr.to_string()),
            (None, None, Family::V4) => Some("0.0.0.0".to_owned()),
            (None, None, Family::V6) => None,
        };
        match (data, announced) {
            (Some(data), Some(announced)) => {
                wanted.insert(names.data, Some(data));
                wanted.insert(names.public, Some(announced));
            }
            // Of a family that was enabled once.
            _ if !enabled(family) => {
                wanted.insert(names.data, None);
                wanted.insert(names.public, None);
            }
            _ => {}
        }
    }
    Ok(wanted)
}

/// What the annotation for the backend's data of a family says; `None` where there is nothing to say.
fn data_of(attachment: &Attachment, public: &PublicAddrs, family: Family) -> Option<String> {
    let prepared = attachment.prepared(family).map(WireguardData::prepared_to_json);
    match attachment.announced() {
        Attachment::Vxlan { .. } => attachment.vtep(family).map(|vtep| {
            let port = vtep.port.map_or_else(String::new, |port| format!("\"Port\":{port},"));
            let prepared = prepared.as_ref().map_or_else(String::new, |member| format!("{member},"));
            format!("{{\"VNI\":{},{port}{prepared}\"VtepMAC\":\"{}\"}}", vtep.vni, vtep.mac)
        }),
        Attachment::Wireguard(_) => match (attachment.wireguard(family), family) {
            (Some(data), _) => Some(data.to_json()),
            // Go writes these too where there is IPv6 alone.
            (None, Family::V4) => Some("null".to_owned()),
            (None, Family::V6) => None,
        },
        Attachment::Extension(Some(text)) if family == Family::V4 => Some(crate::gojson::to_string(text)),
        Attachment::HostGw | Attachment::Ipip | Attachment::Udp if prepared.is_some() => {
            prepared.map(|member| format!("{{{member}}}"))
        }
        // Go writes IPv4's also where there is no IPv4.
        Attachment::HostGw
        | Attachment::Ipip
        | Attachment::Extension(_)
        | Attachment::Udp
        | Attachment::Preparing(_)
        | Attachment::Foreign(_)
            if family == Family::V4 =>
        {
            Some("null".to_owned())
        }
        // Go's udp and alloc have no IPv6; ours announce it as host-gw does.
        Attachment::HostGw | Attachment::Extension(_) | Attachment::Udp => {
            public.v6.map(|_| "null".to_owned())
        }
        Attachment::Ipip | Attachment::Preparing(_) | Attachment::Foreign(_) => None,
    }
}

/// The address that the operator wants to be announced.
fn overwritten(current: &Annotations, family: Family) -> Result<Option<String>, String> {
    let name = Names::of(family).overwrite;
    let Some(text) = current.get(name).filter(|text| !text.is_empty()) else { return Ok(None) };
    address(text, family).map_err(|why| format!("annotation {name}: {why}"))?;
    Ok(Some(text.clone()))
}

/// An address of this family.
///
/// # Errors
/// A sentence with the text.
pub(super) fn address(text: &str, family: Family) -> Result<std::net::IpAddr, String> {
    let addr = text.parse().ok().filter(|addr| Family::of(*addr) == family);
    let short = crate::gojson::shortened(text);
    addr.ok_or_else(|| format!("{short:?} is not an {family} address: correct the annotation or remove it"))
}

/// The changes that turn `current` into the desired annotations.
pub(super) fn changes(current: &Annotations, wanted: &Wanted) -> Wanted {
    let differs = |(name, value): &(&&str, &Option<String>)| current.get(**name) != value.as_ref();
    wanted.iter().filter(differs).map(|(name, value)| (*name, value.clone())).collect()
}

/// Whether Go's nodes would overlook these changes (contract K6): with both families they only see a
/// change of both, or of the type.
pub(super) fn needs_two_steps(current: &Annotations, wanted: &Wanted, changes: &Wanted) -> bool {
    let announced = |family| wanted.get(Names::of(family).data).is_some_and(Option::is_some);
    let changed = |family| {
        let names = Names::of(family);
        changes.contains_key(names.data) || changes.contains_key(names.public)
    };
    current.get(MANAGED).is_some_and(|managed| managed == "true")
        && !changes.contains_key(TYPE)
        && Family::BOTH.into_iter().all(announced)
        && changed(Family::V4) != changed(Family::V6)
}

/// A strategic merge patch of annotations, its members in the order in which Go writes them.
pub(super) fn patch(prefix: &Prefix, changes: &Wanted) -> Vec<u8> {
    #[derive(Serialize)]
    struct Patch {
        metadata: Metadata,
    }
    #[derive(Serialize)]
    struct Metadata {
        annotations: BTreeMap<String, Option<String>>,
    }
    let annotations = changes.iter().map(|(name, value)| (prefix.key(name), value.clone())).collect();
    crate::gojson::to_string(&Patch { metadata: Metadata { annotations } }).into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::Vtep;
    use proptest::prelude::*;

    fn public(v4: Option<&str>, v6: Option<&str>) -> PublicAddrs {
        PublicAddrs { v4: v4.map(|v4| v4.parse().unwrap()), v6: v6.map(|v6| v6.parse().unwrap()) }
    }

    fn vxlan(v4: Option<&str>, v6: Option<&str>) -> Attachment {
        let vtep = |mac: &str| Vtep { vni: 1, mac: mac.parse().unwrap(), port: None };
        Attachment::Vxlan { v4: v4.map(vtep), v6: v6.map(vtep) }
    }

    fn annotations(pairs: &[(&str, &str)]) -> Annotations {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    fn text(current: &[(&str, &str)], public: &PublicAddrs, attachment: &Attachment, both: bool) -> String {
        let current = annotations(current);
        let wanted = wanted(&current, public, attachment, |family| both || family == Family::V4).unwrap();
        let prefix = Prefix::parse("flannel.alpha.coreos.com").unwrap();
        String::from_utf8(patch(&prefix, &changes(&current, &wanted)))
            .unwrap()
            .replace("flannel.alpha.coreos.com", "f")
    }

    const MAC: &str = "12:c6:65:89:b4:e3";

    #[test]
    fn annotations_of_wireguard_are_byte_for_byte_those_of_go_flannel() {
        let key = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=".parse().unwrap();
        let data = |port| Some(crate::wireguard::WireguardData { key, port: Some(port) });
        let two = public(Some("192.0.2.1"), Some("2001:db8::1"));
        let wanted =
            |attachment: &Attachment| wanted(&Annotations::new(), &two, attachment, |_| true).unwrap();
        let both = wanted(&Attachment::of_wireguard(data(51820), data(51821)));
        let quoted = |port| Some(format!(r#"{{"PublicKey":"{key}","Port":{port}}}"#));
        assert_eq!((&both["backend-data"], &both["backend-v6-data"]), (&quoted(51820), &quoted(51821)));
        assert_eq!(both["backend-type"].as_deref(), Some("wireguard"));
        let alone = wanted(&Attachment::of_wireguard(None, data(51821)));
        assert_eq!(
            (alone["backend-data"].as_deref(), &alone["backend-v6-data"]),
            (Some("null"), &quoted(51821))
        );
    }

    #[test]
    fn a_key_that_is_told_in_advance_is_one_more_member() {
        let key = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=";
        let data = |port| Some(WireguardData { key: key.parse().unwrap(), port: Some(port) });
        let ends = crate::lease::WireguardEnds { v4: data(51820), v6: data(51821) };
        let two = public(Some("192.0.2.1"), Some("2001:db8::1"));
        let said = |attachment: Attachment| {
            let wanted = wanted(&Annotations::new(), &two, &attachment.preparing(ends), |_| true).unwrap();
            ["backend-data", "backend-v6-data"].map(|name| wanted.get(name).cloned().flatten())
        };
        let member = |port: u16| format!(r#""Wireguard":["{key}",{port}]"#);
        let vtep = |port| Some(format!(r#"{{"VNI":1,{},"VtepMAC":"{MAC}"}}"#, member(port)));
        assert_eq!(said(vxlan(Some(MAC), Some(MAC))), [vtep(51820), vtep(51821)]);
        let alone = |port| Some(format!("{{{}}}", member(port)));
        for attachment in [Attachment::HostGw, Attachment::Udp, Attachment::Ipip] {
            assert_eq!(said(attachment), [alone(51820), alone(51821)]);
        }
    }

    #[test]
    fn prefixes_are_completed_and_refused_as_go_does() {
        for (text, full) in [
            ("flannel.alpha.coreos.com", "flannel.alpha.coreos.com/"),
            ("org.com", "org.com/"),
            ("org.com/", "org.com/"),
            ("org.com/9", "org.com/9-"),
            ("org.com/9-", "org.com/9-"),
            ("org.com/PREFIX", ""),
            ("org.com/a/b", ""),
            ("org.COM", ""),
            ("org", ""),
            ("org/x", ""),
            ("/x", ""),
            ("org..com", ""),
            ("org.com/-", ""),
            ("", ""),
        ] {
            match Prefix::parse(text) {
                Ok(prefix) => assert_eq!(prefix.0, full, "{text}"),
                Err(error) => {
                    assert!(full.is_empty() && error.contains(&format!("{text:?}")), "{text}: {error}")
                }
            }
        }
    }

    #[test]
    fn patches_are_byte_for_byte_those_of_go_flannel() {
        let (one, two) = (public(Some("192.0.2.1"), None), public(Some("192.0.2.1"), Some("2001:db8::1")));
        assert_eq!(
            text(&[], &one, &vxlan(Some(MAC), None), false),
            r#"{"metadata":{"annotations":{"f/backend-data":"{\"VNI\":1,\"VtepMAC\":\"12:c6:65:89:b4:e3\"}","f/backend-type":"vxlan","f/kube-subnet-manager":"true","f/public-ip":"192.0.2.1"}}}"#
        );
        assert_eq!(
            text(&[], &two, &vxlan(Some(MAC), Some(MAC)), true),
            r#"{"metadata":{"annotations":{"f/backend-data":"{\"VNI\":1,\"VtepMAC\":\"12:c6:65:89:b4:e3\"}","f/backend-type":"vxlan","f/backend-v6-data":"{\"VNI\":1,\"VtepMAC\":\"12:c6:65:89:b4:e3\"}","f/kube-subnet-manager":"true","f/public-ip":"192.0.2.1","f/public-ipv6":"2001:db8::1"}}}"#
        );
        assert_eq!(
            text(&[], &two, &Attachment::HostGw, true),
            r#"{"metadata":{"annotations":{"f/backend-data":"null","f/backend-type":"host-gw","f/backend-v6-data":"null","f/kube-subnet-manager":"true","f/public-ip":"192.0.2.1","f/public-ipv6":"2001:db8::1"}}}"#
        );
        assert_eq!(
            text(&[], &public(None, Some("2001:db8::1")), &Attachment::HostGw, true),
            r#"{"metadata":{"annotations":{"f/backend-data":"null","f/backend-type":"host-gw","f/backend-v6-data":"null","f/kube-subnet-manager":"true","f/public-ip":"0.0.0.0","f/public-ipv6":"2001:db8::1"}}}"#
        );
        assert_eq!(
            text(&[], &two, &Attachment::Udp, true),
            r#"{"metadata":{"annotations":{"f/backend-data":"null","f/backend-type":"","f/backend-v6-data":"null","f/kube-subnet-manager":"true","f/public-ip":"192.0.2.1","f/public-ipv6":"2001:db8::1"}}}"#
        );
        assert_eq!(
            text(&[], &one, &Attachment::Udp, false),
            r#"{"metadata":{"annotations":{"f/backend-data":"null","f/backend-type":"","f/kube-subnet-manager":"true","f/public-ip":"192.0.2.1"}}}"#
        );
        assert_eq!(
            text(&[], &public(None, Some("2001:db8::1")), &vxlan(None, Some(MAC)), true),
            r#"{"metadata":{"annotations":{"f/backend-type":"vxlan","f/backend-v6-data":"{\"VNI\":1,\"VtepMAC\":\"12:c6:65:89:b4:e3\"}","f/kube-subnet-manager":"true","f/public-ipv6":"2001:db8::1"}}}"#
        );
    }

    #[test]
    fn only_what_differs_is_patched_and_a_disabled_family_is_taken_back() {
        let current = [
            ("backend-data", "null"),
            ("backend-type", "host-gw"),
            ("kube-subnet-manager", "true"),
            ("public-ip", "192.0.2.9"),
            ("public-ipv6", "2001:db8::9"),
            ("node-public-ipv6", "2001:db8::9"),
        ];
        assert_eq!(
            text(&current, &public(Some("192.0.2.1"), None), &Attachment::HostGw, false),
            r#"{"metadata":{"annotations":{"f/public-ip":"192.0.2.1","f/public-ipv6":null}}}"#
        );
        // An address that is missing just now is no reason to take the family back.
        assert_eq!(
            text(&current, &public(Some("192.0.2.9"), None), &Attachment::HostGw, true),
            r#"{"metadata":{"annotations":{}}}"#
        );
    }

    #[test]
    fn the_operators_overwrite_is_announced_and_a_wrong_one_is_named() {
        let one = public(Some("192.0.2.1"), None);
        assert!(
            text(&[("public-ip-overwrite", "198.51.100.7")], &one, &Attachment::HostGw, false)
                .contains(r#""f/public-ip":"198.51.100.7""#)
        );
        assert!(
            text(&[("public-ip-overwrite", "")], &one, &Attachment::HostGw, false)
                .contains(r#""f/public-ip":"192.0.2.1""#)
        );
        let wrong = annotations(&[("public-ip-overwrite", "2001:db8::7")]);
        let error = wanted(&wrong, &one, &Attachment::HostGw, |_| true).unwrap_err();
        assert!(
            error.contains("public-ip-overwrite") && error.contains("2001:db8::7") && error.contains("IPv4"),
            "{error}"
        );
    }

    #[test]
    fn a_change_of_one_family_of_two_takes_two_steps() {
        let two = public(Some("192.0.2.1"), Some("2001:db8::1"));
        let steps = |current: &[(&str, &str)], public: &PublicAddrs, attachment: &Attachment| {
            let mut all = annotations(current);
            let wanted = wanted(&all, public, attachment, |_| true).unwrap();
            let changes = changes(&all, &wanted);
            let needed = needs_two_steps(&all, &wanted, &changes);
            all.extend(changes.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))));
            needed
        };
        let host_gw = [
            ("backend-data", "null"),
            ("backend-v6-data", "null"),
            ("backend-type", "host-gw"),
            ("kube-subnet-manager", "true"),
            ("public-ip", "192.0.2.1"),
            ("public-ipv6", "2001:db8::1"),
        ];
        assert!(!steps(&host_gw, &two, &Attachment::HostGw), "nothing changes");
        assert!(steps(
            &host_gw,
            &public(Some("192.0.2.2"), two.v6.map(|_| "2001:db8::1")),
            &Attachment::HostGw
        ));
        assert!(steps(&host_gw, &public(Some("192.0.2.1"), Some("2001:db8::2")), &Attachment::HostGw));
        assert!(!steps(&host_gw, &public(Some("192.0.2.2"), Some("2001:db8::2")), &Attachment::HostGw));
        assert!(!steps(&host_gw, &two, &vxlan(Some(MAC), Some(MAC))), "the type changes");
        assert!(!steps(&host_gw[..5], &public(Some("192.0.2.1"), None), &Attachment::HostGw), "IPv4 alone");
        assert!(steps(&host_gw[..5], &two, &Attachment::HostGw), "IPv6 is new");
        assert!(!steps(&[], &two, &Attachment::HostGw), "nobody knows the node yet");
    }

    proptest! {
        #[test]
        fn arbitrary_prefixes_never_panic(text in ".{0,20}", name in "[a-z./_-]{0,20}") {
            let _ = (Prefix::parse(&text), Prefix::parse(&name));
        }
    }
}
