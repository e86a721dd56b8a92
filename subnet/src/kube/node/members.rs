//! The members of a node object that are decoded, as the API server writes them in JSON.

use std::borrow::Cow;
use std::fmt;

use k8s_openapi::jiff::Timestamp;
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::kube) struct Metadata<'a> {
    #[serde(borrow, default)]
    pub(in crate::kube) name: Cow<'a, str>,
    #[serde(borrow, default)]
    pub(in crate::kube) uid: Cow<'a, str>,
    #[serde(borrow, default)]
    pub(in crate::kube) resource_version: Cow<'a, str>,
    /// In seconds since 1970; 0 if it doesn't say.
    #[serde(default, rename = "creationTimestamp", deserialize_with = "seconds")]
    pub(super) created: u64,
    #[serde(borrow, default)]
    pub(super) annotations: Option<Pairs<'a>>,
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct Spec<'a> {
    #[serde(borrow, default, rename = "podCIDR")]
    pub(super) pod_cidr: Option<Cow<'a, str>>,
    #[serde(borrow, default, rename = "podCIDRs")]
    pub(super) pod_cidrs: Option<Vec<Text<'a>>>,
}

/// Text that stays in the answer unless it is escaped there.
#[derive(Debug, Deserialize)]
#[serde(transparent)]
pub(super) struct Text<'a>(#[serde(borrow)] pub(super) Cow<'a, str>);

#[derive(Debug)]
pub(super) struct Pairs<'a>(pub(super) Vec<(Text<'a>, Text<'a>)>);

impl<'de: 'a, 'a> Deserialize<'de> for Pairs<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = Pairs<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("annotations")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(Members)
    }
}

/// A time as JSON has it, in seconds since 1970; 0 if it is none.
fn seconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let text = Option::<Text<'de>>::deserialize(deserializer)?;
    let at = text.and_then(|text| text.0.parse::<Timestamp>().ok());
    Ok(at.map_or(0, |at| at.as_second().max(0).unsigned_abs()))
}

impl<'a> Metadata<'a> {
    /// That of an object with this name, UID and version, created at this second.
    pub(in crate::kube) fn new(
        [name, uid, resource_version]: [Cow<'a, str>; 3],
        created: u64,
        annotations: impl Iterator<Item = (Cow<'a, str>, Cow<'a, str>)>,
    ) -> Self {
        let annotations = annotations.map(|(key, value)| (Text(key), Text(value))).collect();
        Self { name, uid, resource_version, created, annotations: Some(Pairs(annotations)) }
    }
}
