//! A node object, of which only the few members are decoded that say something about leases.

mod members;

use std::borrow::Cow;

use ipnet::IpNet;
use serde::Deserialize;

pub(super) use self::members::Metadata;
use self::members::Spec;
use super::annotations::{Annotations, CHANGING, MANAGED, Names, Prefix, TYPE, address};
use crate::gojson::{Object, shortened};
use crate::lease::{Attachment, Lease, Malformed, Vtep, WireguardEnds};
use crate::net::{Family, PublicAddrs, Subnets};
use crate::wireguard::WireguardData;

/// The kind of an object that is the metadata of another one.
const PARTIAL: &str = "PartialObjectMetadata";

/// A node as the API server writes it; everything else is skipped unread.
#[derive(Debug, Deserialize)]
pub(super) struct Node<'a> {
    #[serde(borrow, default)]
    kind: Cow<'a, str>,
    #[serde(borrow)]
    pub(super) metadata: Metadata<'a>,
    #[serde(borrow, default)]
    spec: Spec<'a>,
    #[serde(skip)]
    given: Option<Given>,
}

/// The pod subnets of a node without its spec.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Given {
    pub(super) subnets: Subnets,
    /// Whether it may have one of a family that was not in force when they were read.
    pub(super) narrowed: bool,
}

impl Given {
    /// All that the node has.
    pub(super) fn whole(subnets: Subnets) -> Self {
        Self { subnets, narrowed: false }
    }
}

impl<'a> Node<'a> {
    /// A node of which the metadata alone is known.
    pub(super) fn partial(metadata: Metadata<'a>) -> Self {
        Self { kind: Cow::Borrowed(PARTIAL), metadata, spec: Spec::default(), given: None }
    }

    /// Whether this is the metadata alone, so that nothing is said about the spec.
    pub(super) fn is_partial(&self) -> bool {
        self.kind == PARTIAL
    }

    /// Whether Flannel manages it.
    pub(super) fn is_managed(&self, prefix: &Prefix) -> bool {
        self.annotation(prefix, MANAGED) == Some("true")
    }

    /// These are its pod subnets.
    pub(super) fn give(&mut self, subnets: Given) {
        self.given = Some(subnets);
    }

    /// The pod subnets; of two of one family the first, as Go's peers read them.
    ///
    /// # Errors
    /// A sentence naming the member and its value.
    pub(super) fn subnets(&self) -> Result<Subnets, String> {
        if let Some(given) = self.given {
            return Ok(given.subnets);
        }
        let list: Vec<&str> = match self.spec.pod_cidrs.as_deref() {
            Some(list) if !list.is_empty() => list.iter().map(|text| text.0.as_ref()).collect(),
            _ => self.spec.pod_cidr.as_deref().filter(|text| !text.is_empty()).into_iter().collect(),
        };
        if list.len() > 2 {
            return Err(format!(
                "spec.podCIDRs has {} entries: at most one of each family is possible",
                list.len()
            ));
        }
        let mut subnets = Subnets::default();
        for text in list {
            let net: IpNet =
                text.parse().map_err(|_| format!("spec.podCIDRs: {:?} is not a prefix", shortened(text)))?;
            if subnets.get(Family::of(net.addr())).is_none() {
                subnets.set(net);
            }
        }
        Ok(subnets)
    }

    /// When the node was created, in seconds since 1970; 0 if it doesn't say.
    pub(super) fn created(&self) -> u64 {
        self.metadata.created
    }

    fn annotation(&self, prefix: &Prefix, name: &str) -> Option<&str> {
        let pairs = self.metadata.annotations.as_ref()?;
        let found = pairs.0.iter().find(|(key, _)| prefix.strip(&key.0) == Some(name))?;
        Some(found.1.0.as_ref())
    }

    /// What the node says about itself as a peer; `None` if Flannel doesn't manage it.
    pub(super) fn entry(&self, prefix: &Prefix, families: &[Family]) -> Option<Seen> {
        if !self.is_managed(prefix) {
            return None;
        }
        let kind = self.annotation(prefix, TYPE).unwrap_or_default();
        let entry = self.examine(kind, prefix, families);
        Some(if kind == CHANGING { Seen::Changing(entry) } else { Seen::Settled(entry) })
    }

    fn examine(&self, kind: &str, prefix: &Prefix, families: &[Family]) -> Entry {
        let all = match self.subnets() {
            Ok(all) => all,
            Err(why) => return Entry::malformed(why, None),
        };
        let subnets: Subnets = families.iter().filter_map(|family| all.get(*family)).collect();
        if subnets.is_empty() {
            let wanted: Vec<String> = families.iter().map(ToString::to_string).collect();
            return Entry::malformed(
                format!("spec.podCIDRs has no {} subnet", wanted.join(" and no ")),
                None,
            );
        }
        let mut wrong = Vec::new();
        let mut public = PublicAddrs::default();
        let (mut vteps, mut keys) = ([None, None], [None, None]);
        for ((family, vtep), key) in Family::BOTH.into_iter().zip(&mut vteps).zip(&mut keys) {
            if subnets.get(family).is_none() {
                continue;
            }
            let names = Names::of(family);
            match self.annotation(prefix, names.public).map(|text| address(text, family)) {
                Some(Ok(addr)) if !addr.is_unspecified() => match addr {
                    std::net::IpAddr::V4(v4) => public.v4 = Some(v4),
                    std::net::IpAddr::V6(v6) => public.v6 = Some(v6),
                },
                Some(Err(why)) => wrong.push(format!("annotation {}: {why}", names.public)),
                Some(Ok(_)) | None => {}
            }
            let data = self.annotation(prefix, names.data).filter(|text| !matches!(*text, "" | "null"));
            let read = data.map_or(Ok((None, None)), |text| read_data(kind, text));
            let read = read.map(|read| (*vtep, *key) = read);
            if let Err(why) = read {
                wrong.push(format!("annotation {}: {why}", names.data));
            }
        }
        let attachment = self.attachment(kind, prefix, (vteps, keys));
        let ends = WireguardEnds { v4: keys[0], v6: keys[1] };
        let attachment = attachment.map(|attachment| attachment.preparing(ends)).unwrap_or_else(|why| {
            wrong.push(why);
            Attachment::Foreign(kind.into())
        });
        if public == PublicAddrs::default() {
            if wrong.is_empty() {
                wrong.push("it has no public address (annotation public-ip)".to_owned());
            }
            return Entry::malformed(wrong.join("; "), Some(subnets));
        }
        let created = self.created();
        Entry {
            lease: Some(Lease { subnets, public, attachment, created, written: created }),
            wrong: (!wrong.is_empty())
                .then(|| Box::new(Malformed { why: wrong.join("; "), subnets: None, lease: Some(subnets) })),
            narrowed: subnets != all || self.given.is_some_and(|given| given.narrowed),
        }
    }

    /// What the node announces, given its tunnel endpoints and keys.
    fn attachment(
        &self,
        kind: &str,
        prefix: &Prefix,
        (vteps, keys): ([Option<Vtep>; 2], [Option<WireguardData>; 2]),
    ) -> Result<Attachment, String> {
        Ok(match kind {
            "vxlan" => Attachment::Vxlan { v4: vteps[0], v6: vteps[1] },
            "wireguard" => Attachment::of_wireguard(keys[0], keys[1]),
            // The type is away for a moment only, and its data tells which one it was.
            CHANGING if vteps.iter().any(Option::is_some) => Attachment::Vxlan { v4: vteps[0], v6: vteps[1] },
            CHANGING if keys.iter().any(Option::is_some) => Attachment::of_wireguard(keys[0], keys[1]),
            "extension" => {
                let name = Names::of(Family::V4).data;
                let text = self.annotation(prefix, name).map_or(Ok(None), read_text);
                Attachment::Extension(text.map_err(|why| format!("annotation {name}: {why}"))?)
            }
            _ => Attachment::of_type(kind),
        })
    }
}

/// `backend-data` of a node of this type.
fn read_data(kind: &str, text: &str) -> Result<(Option<Vtep>, Option<WireguardData>), String> {
    // The type is away for a moment only: which one it was tells the data.
    let has_key = || text.to_ascii_lowercase().contains("\"publickey\"");
    match kind {
        "wireguard" => Ok((None, Some(read_key(text)?))),
        CHANGING if has_key() => Ok((None, Some(read_key(text)?))),
        "vxlan" | CHANGING => Ok((Some(read_vtep(text)?), read_prepared(text))),
        _ => Ok((None, read_prepared(text))),
    }
}

/// `backend-data` of a wireguard node.
fn read_key(text: &str) -> Result<WireguardData, String> {
    WireguardData::read(&Object::parse(text)?, "")
}

/// What a node tells in advance that announces another backend.
fn read_prepared(text: &str) -> Option<WireguardData> {
    WireguardData::read_prepared(&Object::parse(text).ok()?)
}

/// `backend-data` of a vxlan node.
fn read_vtep(text: &str) -> Result<Vtep, String> {
    let data = Object::parse(text)?;
    let vni = data.get::<u32>("VNI")?.unwrap_or(0);
    let mac = data.get::<String>("VtepMAC")?.ok_or("it has no VtepMAC")?;
    let mac = mac.parse().map_err(|error| format!("VtepMAC: {error}"))?;
    let port = data.get::<u16>("Port")?.filter(|port| *port != 0);
    Ok(Vtep { vni, mac, port })
}

/// `backend-data` of an extension node.
fn read_text(text: &str) -> Result<Option<Box<str>>, String> {
    if text.is_empty() {
        return Ok(None);
    }
    serde_json::from_str(text).map_err(|_| format!("{:?} is not a text in JSON", shortened(text)))
}

/// What is kept of a node that Flannel manages: about 150 bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// What can be used of it.
    pub(super) lease: Option<Lease>,
    /// What can't.
    pub(super) wrong: Option<Box<Malformed>>,
    /// It has a subnet of a family that was not in force.
    pub(super) narrowed: bool,
}

impl Entry {
    fn malformed(why: String, subnets: Option<Subnets>) -> Self {
        Self { lease: None, wrong: Some(Box::new(Malformed { why, subnets, lease: None })), narrowed: false }
    }
}

/// What is seen of a node that Flannel manages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Seen {
    /// This holds until further notice.
    Settled(Entry),
    /// This is the first of two patches: what was known before holds until the second.
    Changing(Entry),
}

/// This node's own object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Own {
    pub(super) uid: String,
    pub(super) created: u64,
    pub(super) subnets: Result<Subnets, String>,
    /// Those under the prefix.
    pub(super) annotations: Annotations,
    /// The condition `NetworkUnavailable`, if there is one: its status, and since when it has it.
    pub(super) unavailable: Option<(String, String)>,
}

impl Own {
    pub(super) fn decode(json: &[u8], prefix: &Prefix) -> serde_json::Result<Self> {
        #[derive(Deserialize)]
        struct Conditioned {
            #[serde(default)]
            status: Status,
        }
        #[derive(Default, Deserialize)]
        struct Status {
            #[serde(default)]
            conditions: Option<Vec<Condition>>,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Condition {
            #[serde(rename = "type", default)]
            kind: String,
            #[serde(default)]
            status: String,
            #[serde(default)]
            last_transition_time: Option<String>,
        }
        let node: Node<'_> = serde_json::from_slice(json)?;
        let conditions = serde_json::from_slice::<Conditioned>(json)?.status.conditions.unwrap_or_default();
        let pairs = node.metadata.annotations.as_ref().map_or(&[][..], |pairs| &pairs.0);
        let ours = pairs.iter().filter_map(|(key, value)| {
            Some((prefix.strip(&key.0)?.to_owned(), value.0.clone().into_owned()))
        });
        Ok(Self {
            created: node.created(),
            subnets: node.subnets(),
            annotations: ours.collect(),
            unavailable: conditions
                .into_iter()
                .find(|condition| condition.kind == "NetworkUnavailable")
                .map(|found| (found.status, found.last_transition_time.unwrap_or_default())),
            uid: node.metadata.uid.into_owned(),
        })
    }

    /// The lease that the node announces already, if it does.
    pub(super) fn announced(json: &[u8], prefix: &Prefix, families: &[Family]) -> Option<Lease> {
        let node: Node<'_> = serde_json::from_slice(json).ok()?;
        match node.entry(prefix, families)? {
            Seen::Settled(entry) | Seen::Changing(entry) => entry.lease,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn node(cidrs: &str, annotations: &str) -> String {
        format!(
            r#"{{"kind":"Node","metadata":{{"name":"n1","uid":"u","resourceVersion":"7","creationTimestamp":"1970-01-01T00:01:00Z",
               "managedFields":[{{"x":1}}],"annotations":{{"other":"{{\"a\":1}}",{annotations}}}}},
               "spec":{{"podCIDR":"10.244.1.0/24","podCIDRs":[{cidrs}]}},"status":{{"images":[{{"names":["a"]}}]}}}}"#
        )
    }

    fn entry(json: &str, families: &[Family]) -> Option<Entry> {
        let prefix = Prefix::parse("f.io").unwrap();
        let node: Node<'_> = serde_json::from_str(json).unwrap();
        node.entry(&prefix, families).map(|seen| match seen {
            Seen::Settled(entry) | Seen::Changing(entry) => entry,
        })
    }

    const BOTH: &str = r#""10.244.1.0/24","fd00:1::/64""#;
    const VXLAN: &str = r#""f.io/kube-subnet-manager":"true","f.io/backend-type":"vxlan","f.io/public-ip":"192.0.2.1",
        "f.io/backend-data":"{\"VNI\":1,\"VtepMAC\":\"12:c6:65:89:b4:e3\"}""#;

    #[test]
    fn a_peer_is_read_from_its_annotations_and_its_pod_cidrs() {
        let entry = entry(&node(r#""10.244.1.0/24""#, VXLAN), &Family::BOTH).unwrap();
        let lease = entry.lease.unwrap();
        assert_eq!(entry.wrong, None);
        assert_eq!(lease.to_string(), "10.244.1.0/24 of 192.0.2.1 (vxlan)");
        assert_eq!(lease.created, 60);
        assert_eq!(lease.attachment.vtep(Family::V4).unwrap().mac.to_string(), "12:c6:65:89:b4:e3");
    }

    #[test]
    fn a_key_that_is_told_in_advance_is_read_beside_any_backend() {
        let key = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=";
        let member = format!(r#"\"Wireguard\":[\"{key}\",51820]"#);
        let vxlan = VXLAN.replace(r#"{\"VNI\":1"#, &format!(r#"{{\"VNI\":1,{member}"#));
        let host_gw = format!(
            r#""f.io/kube-subnet-manager":"true","f.io/backend-type":"host-gw","f.io/public-ip":"192.0.2.1","f.io/backend-data":"{{{member}}}""#
        );
        for (annotations, name, vteps) in [(vxlan, "vxlan", 1), (host_gw, "host-gw", 0)] {
            let entry = entry(&node(r#""10.244.1.0/24""#, &annotations), &Family::BOTH).unwrap();
            assert_eq!(entry.wrong, None);
            let attachment = entry.lease.unwrap().attachment;
            assert_eq!(attachment.type_name(), name);
            assert_eq!(attachment.prepared(Family::V4).unwrap().key.to_string(), key);
            assert_eq!(Family::BOTH.iter().filter_map(|family| attachment.vtep(*family)).count(), vteps);
            assert_eq!(attachment.wireguard(Family::V4), None, "it is not announced yet");
        }
    }

    #[test]
    fn each_family_stands_for_itself() {
        let lease = |annotations: &str, families: &[Family]| {
            entry(&node(BOTH, &format!("{VXLAN}{annotations}")), families).unwrap()
        };
        let v4_only = lease("", &Family::BOTH);
        let subnets = v4_only.lease.as_ref().unwrap().subnets;
        assert_eq!(subnets.to_string(), "10.244.1.0/24 and fd00:1::/64");
        assert_eq!(v4_only.wrong, None);
        assert_eq!(lease("", &[Family::V4]).lease.unwrap().subnets.to_string(), "10.244.1.0/24");

        let bad_v6 = lease(r#","f.io/public-ipv6":"x","f.io/backend-v6-data":"{}""#, &Family::BOTH);
        assert_eq!(bad_v6.lease.unwrap().public.to_string(), "192.0.2.1");
        let why = bad_v6.wrong.unwrap().why;
        assert!(why.contains("public-ipv6") && why.contains("backend-v6-data: it has no VtepMAC"), "{why}");
        assert_eq!(
            lease(r#","f.io/public-ipv6":"x""#, &[Family::V4]).wrong,
            None,
            "IPv6 is nobody's concern"
        );
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        let managed = r#""f.io/kube-subnet-manager":"true","f.io/public-ip":"192.0.2.1""#;
        let one = r#""10.244.1.0/24""#;
        for (cidrs, annotations, part) in [
            (r#""10.0.0.0/24","10.0.1.0/24","10.0.2.0/24""#, managed, "spec.podCIDRs has 3 entries"),
            (r#""10.0.0.300/24""#, managed, "10.0.0.300/24"),
            (r#""fd00::/64""#, managed, "no IPv4 subnet"),
            (one, r#""f.io/kube-subnet-manager":"true""#, "no public address"),
            (one, r#""f.io/kube-subnet-manager":"true","f.io/public-ip":"0.0.0.0""#, "no public address"),
            (
                one,
                r#""f.io/kube-subnet-manager":"true","f.io/public-ip":"node1""#,
                "\"node1\" is not an IPv4 address",
            ),
        ] {
            let entry = entry(&node(cidrs, annotations), &[Family::V4]).unwrap();
            assert_eq!(entry.lease, None);
            let why = entry.wrong.unwrap().why;
            assert!(why.contains(part), "{why}");
        }
        assert_eq!(entry(&node(one, r#""f.io/kube-subnet-manager":"false""#), &Family::BOTH), None);
        assert_eq!(entry(r#"{"metadata":{"name":"n1","annotations":null},"spec":{}}"#, &Family::BOTH), None);
    }

    #[test]
    fn the_own_node_is_read_with_its_condition() {
        let json = r#"{"metadata":{"name":"n1","uid":"u1","annotations":{"f.io/x":"1","g.io/x":"2"}},"spec":{},
            "status":{"conditions":[{"type":"Ready","status":"True"},
            {"type":"NetworkUnavailable","status":"True","lastTransitionTime":"2026-01-01T00:00:00Z"}]}}"#;
        let own = Own::decode(json.as_bytes(), &Prefix::parse("f.io").unwrap()).unwrap();
        assert_eq!(own.annotations, Annotations::from([("x".into(), "1".into())]));
        assert_eq!(own.unavailable, Some(("True".into(), "2026-01-01T00:00:00Z".into())));
        assert_eq!(own.subnets, Ok(Subnets::default()));
    }

    proptest! {
        #[test]
        fn arbitrary_annotations_never_panic(data in ".{0,40}", public in ".{0,20}", kind in "(vxlan|host-gw|.{0,5})", cidr in ".{0,12}") {
            let json = serde_json::json!({"metadata": {"name": "n", "annotations": {
                "f.io/kube-subnet-manager": "true", "f.io/backend-data": data, "f.io/backend-v6-data": data,
                "f.io/backend-type": kind, "f.io/public-ip": public, "f.io/public-ipv6": public}},
                "spec": {"podCIDRs": ["10.0.0.0/24", cidr]}}).to_string();
            prop_assert!(entry(&json, &Family::BOTH).is_some());
        }
    }
}
