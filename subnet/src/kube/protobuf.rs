//! Events of a watch of metadata in the API server's protobuf encoding: a tenth smaller than JSON, and what is not needed of an
//! object is passed over by its length.
//!
//! The messages are those of `k8s.io/apimachinery` (`generated.proto` of `meta/v1` and `runtime`), with the fields that are read.
//! Text is taken as bytes, because Go's encoder lets any bytes into it: one annotation that is no UTF-8 must not make an event unreadable.

use std::borrow::Cow;

use prost::Message;
use prost::bytes::Bytes;

use super::collection::Kind;
use super::node::{Metadata, Node};

/// What every object begins with, wherever it stands.
const MAGIC: &[u8] = b"k8s\0";

/// An event of a watch (`meta/v1.WatchEvent`).
#[derive(Clone, PartialEq, Message)]
struct WatchEvent {
    #[prost(bytes = "bytes", tag = "1")]
    kind: Bytes,
    #[prost(message, optional, tag = "2")]
    object: Option<RawExtension>,
}

#[derive(Clone, PartialEq, Message)]
struct RawExtension {
    #[prost(bytes = "bytes", tag = "1")]
    raw: Bytes,
}

/// An object of any kind, after [`MAGIC`] (`runtime.Unknown`).
#[derive(Clone, PartialEq, Message)]
struct Unknown {
    #[prost(message, optional, tag = "1")]
    type_meta: Option<TypeMeta>,
    #[prost(bytes = "bytes", tag = "2")]
    raw: Bytes,
}

#[derive(Clone, PartialEq, Message)]
struct TypeMeta {
    #[prost(bytes = "bytes", tag = "2")]
    kind: Bytes,
}

#[derive(Clone, PartialEq, Message)]
struct PartialObjectMetadata {
    #[prost(message, optional, tag = "1")]
    metadata: Option<ObjectMeta>,
}

#[derive(Clone, PartialEq, Message)]
struct ObjectMeta {
    #[prost(bytes = "bytes", tag = "1")]
    name: Bytes,
    #[prost(bytes = "bytes", tag = "5")]
    uid: Bytes,
    #[prost(bytes = "bytes", tag = "6")]
    resource_version: Bytes,
    #[prost(message, optional, tag = "8")]
    creation_timestamp: Option<Time>,
    #[prost(message, repeated, tag = "12")]
    annotations: Vec<Pair>,
    /// Decoded only for new nodes.
    #[prost(bytes = "bytes", repeated, tag = "17")]
    managed_fields: Vec<Bytes>,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct Time {
    #[prost(int64, tag = "1")]
    seconds: i64,
}

/// An entry of a map.
#[derive(Clone, PartialEq, Message)]
struct Pair {
    #[prost(bytes = "bytes", tag = "1")]
    key: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    value: Bytes,
}

#[derive(Clone, PartialEq, Message)]
struct ManagedFieldsEntry {
    #[prost(message, optional, tag = "7")]
    fields: Option<FieldsV1>,
}

#[derive(Clone, PartialEq, Message)]
struct FieldsV1 {
    #[prost(bytes = "bytes", tag = "1")]
    raw: Bytes,
}

#[derive(Clone, PartialEq, Message)]
struct WatchStatus {
    #[prost(bytes = "bytes", tag = "3")]
    message: Bytes,
}

/// An event of a watch of metadata.
#[derive(Debug)]
pub(super) enum MetadataEvent {
    /// Of an object.
    Object { kind: Kind, metadata: DecodedMetadata },
    /// The watch ends for this reason.
    Error(String),
}

/// The metadata of an object.
#[derive(Debug)]
pub(super) struct DecodedMetadata(ObjectMeta);

impl MetadataEvent {
    /// Decodes one event.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn decode(frame: Vec<u8>) -> Result<Self, String> {
        let event = WatchEvent::decode(Bytes::from(frame)).map_err(|error| error.to_string())?;
        let mut object = event.object.unwrap_or_default().raw;
        if !object.starts_with(MAGIC) {
            return Err("its object does not begin with \"k8s\" and a zero".into());
        }
        let object = Unknown::decode(object.split_off(MAGIC.len())).map_err(|error| error.to_string())?;
        let kind = Kind::of(&text(&event.kind));
        let type_name = object.type_meta.unwrap_or_default().kind;
        match (kind, &*type_name) {
            (Kind::Error, b"Status") => {
                let status = WatchStatus::decode(object.raw).map_err(|error| error.to_string())?;
                Ok(Self::Error(text(&status.message).into_owned()))
            }
            (Kind::Error, _) => Ok(Self::Error(format!("an object of kind {:?}", text(&type_name)))),
            (_, b"PartialObjectMetadata") => {
                let object = PartialObjectMetadata::decode(object.raw).map_err(|error| error.to_string())?;
                Ok(Self::Object { kind, metadata: DecodedMetadata(object.metadata.unwrap_or_default()) })
            }
            _ => Err(format!("its object is of kind {:?}", text(&type_name))),
        }
    }
}

impl DecodedMetadata {
    /// A node with this metadata, of which nothing else is known.
    pub(super) fn node(&self) -> Node<'_> {
        let meta = &self.0;
        let created = meta.creation_timestamp.map_or(0, |at| at.seconds.max(0).unsigned_abs());
        let annotations = meta.annotations.iter().map(|pair| (text(&pair.key), text(&pair.value)));
        let names = [text(&meta.name), text(&meta.uid), text(&meta.resource_version)];
        Node::partial(Metadata::new(names, created, annotations))
    }

    /// The JSON of each entry of `managedFields`.
    pub(super) fn managed_fields(&self) -> impl Iterator<Item = Bytes> {
        let entries = self.0.managed_fields.iter().cloned();
        entries.filter_map(|entry| Some(ManagedFieldsEntry::decode(entry).ok()?.fields?.raw))
    }
}

/// Text, with replacement characters where it is no UTF-8, as in the server's JSON.
fn text(bytes: &Bytes) -> Cow<'_, str> {
    String::from_utf8_lossy(bytes)
}

#[cfg(test)]
mod tests {
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD;
    use proptest::prelude::*;

    use super::super::annotations::Prefix;
    use super::*;
    use crate::kube::managed;
    use crate::net::Family;

    /// Events as kube-apiserver 1.20 has sent them, without their lengths.
    const ADDED: &str = "\
        CgVBRERFRBKIAgqFAms4cwAKJwoObWV0YS5rOHMuaW8vdjESFVBhcnRpYWxPYmplY3RNZXRhZGF0YRLRAQrOAQoGbm9kZS0xEgAaACIAKiRhNTU1ZDI0MS\
        1jOGJkLTQ1MzgtYmRkMS03ZjI2ODEwYjk4NTYyAzQzOTgAQggIjru02AYQAFoZChBrdWJlcm5ldGVzLmlvL29zEgVsaW51eHoAigFpCgdrdWJlbGV0EgZV\
        cGRhdGUaAnYxIggIjru02AYQADIIRmllbGRzVjE6Pgo8eyJmOm1ldGFkYXRhIjp7ImY6bGFiZWxzIjp7Ii4iOnt9LCJmOmt1YmVybmV0ZXMuaW8vb3MiOn\
        t9fX19GgAiAA==";
    const MODIFIED: &str = "\
        CghNT0RJRklFRBL4BQr1BWs4cwAKJwoObWV0YS5rOHMuaW8vdjESFVBhcnRpYWxPYmplY3RNZXRhZGF0YRLBBQq+BQoGbm9kZS0xEgAaACIAKiRhNTU1ZD\
        I0MS1jOGJkLTQ1MzgtYmRkMS03ZjI2ODEwYjk4NTYyAzQ0MTgAQggIjru02AYQAFoZChBrdWJlcm5ldGVzLmlvL29zEgVsaW51eGI8ChFmLmlvL2JhY2tl\
        bmQtZGF0YRIneyJWTkkiOjEsIlZ0ZXBNQUMiOiIxMjpjNjo2NTo4OTpiNDplMyJ9YhoKEWYuaW8vYmFja2VuZC10eXBlEgV2eGxhbmIgChhmLmlvL2t1Ym\
        Utc3VibmV0LW1hbmFnZXISBHRydWViGwoOZi5pby9wdWJsaWMtaXASCTE5Mi4wLjIuMXoAigHBAQoIZmxhbm5lbGQSBlVwZGF0ZRoCdjEiCAiOu7TYBhAA\
        MghGaWVsZHNWMTqUAQqRAXsiZjptZXRhZGF0YSI6eyJmOmFubm90YXRpb25zIjp7Ii4iOnt9LCJmOmYuaW8vYmFja2VuZC1kYXRhIjp7fSwiZjpmLmlvL2\
        JhY2tlbmQtdHlwZSI6e30sImY6Zi5pby9rdWJlLXN1Ym5ldC1tYW5hZ2VyIjp7fSwiZjpmLmlvL3B1YmxpYy1pcCI6e319fX2KAY4BCgNrY20SBlVwZGF0\
        ZRoCdjEiCAiOu7TYBhAAMghGaWVsZHNWMTpnCmV7ImY6c3BlYyI6eyJmOnBvZENJRFIiOnt9LCJmOnBvZENJRFJzIjp7Ii4iOnt9LCJ2OlwiMTAuMjQ0Lj\
        EuMC8yNFwiIjp7fSwidjpcImZkMDA6MjQ0OjE6Oi82NFwiIjp7fX19fYoBaQoHa3ViZWxldBIGVXBkYXRlGgJ2MSIICI67tNgGEAAyCEZpZWxkc1YxOj4K\
        PHsiZjptZXRhZGF0YSI6eyJmOmxhYmVscyI6eyIuIjp7fSwiZjprdWJlcm5ldGVzLmlvL29zIjp7fX19fRoAIgA=";
    const DELETED: &str = "\
        CgdERUxFVEVEEvgFCvUFazhzAAonCg5tZXRhLms4cy5pby92MRIVUGFydGlhbE9iamVjdE1ldGFkYXRhEsEFCr4FCgZub2RlLTESABoAIgAqJGE1NTVkMj\
        QxLWM4YmQtNDUzOC1iZGQxLTdmMjY4MTBiOTg1NjIDNDQ5OABCCAiOu7TYBhAAWhkKEGt1YmVybmV0ZXMuaW8vb3MSBWxpbnV4YjwKEWYuaW8vYmFja2Vu\
        ZC1kYXRhEid7IlZOSSI6MSwiVnRlcE1BQyI6IjEyOmM2OjY1Ojg5OmI0OmUzIn1iGgoRZi5pby9iYWNrZW5kLXR5cGUSBXZ4bGFuYiAKGGYuaW8va3ViZS\
        1zdWJuZXQtbWFuYWdlchIEdHJ1ZWIbCg5mLmlvL3B1YmxpYy1pcBIJMTkyLjAuMi4xegCKAcEBCghmbGFubmVsZBIGVXBkYXRlGgJ2MSIICI67tNgGEAAy\
        CEZpZWxkc1YxOpQBCpEBeyJmOm1ldGFkYXRhIjp7ImY6YW5ub3RhdGlvbnMiOnsiLiI6e30sImY6Zi5pby9iYWNrZW5kLWRhdGEiOnt9LCJmOmYuaW8vYm\
        Fja2VuZC10eXBlIjp7fSwiZjpmLmlvL2t1YmUtc3VibmV0LW1hbmFnZXIiOnt9LCJmOmYuaW8vcHVibGljLWlwIjp7fX19fYoBjgEKA2tjbRIGVXBkYXRl\
        GgJ2MSIICI67tNgGEAAyCEZpZWxkc1YxOmcKZXsiZjpzcGVjIjp7ImY6cG9kQ0lEUiI6e30sImY6cG9kQ0lEUnMiOnsiLiI6e30sInY6XCIxMC4yNDQuMS\
        4wLzI0XCIiOnt9LCJ2OlwiZmQwMDoyNDQ6MTo6LzY0XCIiOnt9fX19igFpCgdrdWJlbGV0EgZVcGRhdGUaAnYxIggIjru02AYQADIIRmllbGRzVjE6Pgo8\
        eyJmOm1ldGFkYXRhIjp7ImY6bGFiZWxzIjp7Ii4iOnt9LCJmOmt1YmVybmV0ZXMuaW8vb3MiOnt9fX19GgAiAA==";
    const BOOKMARK: &str = "\
        CghCT09LTUFSSxJMCkprOHMACicKDm1ldGEuazhzLmlvL3YxEhVQYXJ0aWFsT2JqZWN0TWV0YWRhdGESFwoVCgASABoAIgAqADIDNDQxOABCAHoAGgAiAA\
        ==";
    const ERROR: &str = "\
        CgVFUlJPUhJZCldrOHMACgwKAnYxEgZTdGF0dXMSPwoGCgASABoAEgdGYWlsdXJlGiB0b28gb2xkIHJlc291cmNlIHZlcnNpb246IDEgKDg3KSIHRXhwaX\
        JlZDCaAxoAIgA=";

    fn bytes(event: &str) -> Vec<u8> {
        STANDARD.decode(event).unwrap()
    }

    fn object(event: Vec<u8>) -> (Kind, DecodedMetadata) {
        match MetadataEvent::decode(event).unwrap() {
            MetadataEvent::Object { kind, metadata } => (kind, metadata),
            MetadataEvent::Error(why) => panic!("{why}"),
        }
    }

    #[test]
    fn events_of_a_real_server_are_read() {
        let (kind, metadata) = object(bytes(MODIFIED));
        assert_eq!(kind, Kind::Put);
        let node = metadata.node();
        assert!(node.is_partial() && node.is_managed(&Prefix::parse("f.io").unwrap()));
        let names = [&node.metadata.name, &node.metadata.uid, &node.metadata.resource_version];
        assert_eq!(names.map(AsRef::as_ref), ["node-1", "a555d241-c8bd-4538-bdd1-7f26810b9856", "441"]);
        assert_eq!(node.created(), 1_796_021_646);
        let subnets = managed::subnets_of_entries(metadata.managed_fields()).unwrap();
        assert_eq!(subnets.to_string(), "10.244.1.0/24 and fd00:244:1::/64");

        let (kind, added) = object(bytes(ADDED));
        assert_eq!((kind, added.node().metadata.name.as_ref()), (Kind::Put, "node-1"));
        assert_eq!(managed::subnets_of_entries(added.managed_fields()), None, "it has no subnets yet");
        let (kind, deleted) = object(bytes(DELETED));
        assert_eq!((kind, deleted.node().metadata.uid.as_ref()), (Kind::Deleted, names[1].as_ref()));
        let (kind, bookmark) = object(bytes(BOOKMARK));
        assert_eq!(kind, Kind::Other);
        let version = bookmark.node().metadata.resource_version.parse::<u64>().unwrap();
        assert!(version >= names[2].parse().unwrap());
        match MetadataEvent::decode(bytes(ERROR)).unwrap() {
            MetadataEvent::Error(why) => assert!(why.contains("too old resource version"), "{why}"),
            event => panic!("{event:?}"),
        }
    }

    #[test]
    fn the_entry_of_a_peer_is_the_same_as_from_json() {
        let (_, metadata) = object(bytes(MODIFIED));
        let mut node = metadata.node();
        let subnets = managed::subnets_of_entries(metadata.managed_fields()).unwrap();
        node.give(super::super::node::Given::whole(subnets));
        let prefix = Prefix::parse("f.io").unwrap();
        let json = r#"{"metadata": {"name": "node-1", "creationTimestamp": "2026-11-30T06:54:06Z", "annotations": {
            "f.io/kube-subnet-manager": "true", "f.io/backend-type": "vxlan", "f.io/public-ip": "192.0.2.1",
            "f.io/backend-data": "{\"VNI\":1,\"VtepMAC\":\"12:c6:65:89:b4:e3\"}"}},
            "spec": {"podCIDRs": ["10.244.1.0/24", "fd00:244:1::/64"]}}"#;
        let same: Node<'_> = serde_json::from_str(json).unwrap();
        assert!(node.entry(&prefix, &Family::BOTH).is_some());
        assert_eq!(node.entry(&prefix, &Family::BOTH), same.entry(&prefix, &Family::BOTH));
    }

    #[test]
    fn an_annotation_that_is_no_utf_8_is_read_with_replacement_characters() {
        let mut event = bytes(MODIFIED);
        let at = event.windows(5).position(|part| part == b"vxlan").unwrap();
        event[at] = 0xff;
        let (_, metadata) = object(event);
        let seen = metadata.node().entry(&Prefix::parse("f.io").unwrap(), &[Family::V4]);
        assert!(seen.is_some(), "it is a node that Flannel manages, of a backend that nobody knows");
    }

    #[test]
    fn what_is_no_event_of_metadata_is_named() {
        let named = |event: Vec<u8>| MetadataEvent::decode(event).unwrap_err();
        assert!(named(Vec::new()).contains("\"k8s\""));
        let mut other = bytes(MODIFIED);
        let at = other.windows(7).position(|part| part == b"Partial").unwrap();
        other[at] = b'p';
        assert!(named(other).contains("partialObjectMetadata"));
        named(bytes(MODIFIED)[..100].to_vec());
    }

    proptest! {
        #[test]
        fn bytes_that_were_changed_or_cut_never_panic(
            changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
            length in any::<prop::sample::Index>(),
        ) {
            let mut event = bytes(MODIFIED);
            for (at, byte) in changes {
                let at = at.index(event.len());
                event[at] = byte;
            }
            event.truncate(length.index(event.len() + 1));
            if let Ok(MetadataEvent::Object { metadata, .. }) = MetadataEvent::decode(event) {
                let _ = managed::subnets_of_entries(metadata.managed_fields());
                let _ = metadata.node().entry(&Prefix::parse("f.io").unwrap(), &Family::BOTH);
            }
        }
    }
}
