//! `managedFields` of a node, which name its pod subnets: `podCIDRs` is a set, of which the server notes who has set which
//! elements.

use std::collections::BTreeMap;

use ipnet::IpNet;
use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::net::{Family, Subnets};

/// Who manages which fields, as far as it says something about the pod subnets.
#[derive(Deserialize)]
struct Managed {
    #[serde(default, rename = "fieldsV1")]
    fields: Option<ManagedFields>,
}

#[derive(Deserialize)]
struct ManagedFields {
    #[serde(default, rename = "f:spec")]
    spec: Option<ManagedSpec>,
}

#[derive(Deserialize)]
struct ManagedSpec {
    #[serde(default, rename = "f:podCIDRs")]
    pod_cidrs: Option<BTreeMap<String, IgnoredAny>>,
}

/// The pod subnets that `managedFields` in JSON tells; `None` if the field was cleared, or is not understood.
pub(super) fn subnets(managed_fields: &[u8]) -> Option<Subnets> {
    let all: Vec<Managed> = serde_json::from_slice(managed_fields).ok()?;
    of_entries(all.into_iter().filter_map(|managed| managed.fields))
}

/// The same of the fields of each entry.
pub(super) fn subnets_of_entries(entries: impl Iterator<Item = impl AsRef<[u8]>>) -> Option<Subnets> {
    let fields: Vec<Option<ManagedFields>> =
        entries.map(|json| serde_json::from_slice(json.as_ref())).collect::<Result<_, _>>().ok()?;
    of_entries(fields.into_iter().flatten())
}

fn of_entries(entries: impl Iterator<Item = ManagedFields>) -> Option<Subnets> {
    let mut subnets = Subnets::default();
    for key in entries.filter_map(|fields| fields.spec?.pod_cidrs).flat_map(BTreeMap::into_keys) {
        let Some(element) = key.strip_prefix("v:") else { continue };
        let text: String = serde_json::from_str(element).ok()?;
        let net: IpNet = text.parse().ok()?;
        match subnets.get(Family::of(net.addr())) {
            None => subnets.set(net),
            Some(known) if known == net => {}
            // Which one is the first is not noted.
            Some(_) => return None,
        }
    }
    (!subnets.is_empty()).then_some(subnets)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noted(fields: &str) -> Option<Subnets> {
        subnets(fields.as_bytes())
    }

    #[test]
    fn the_subnets_of_a_node_without_a_spec_are_those_that_the_server_notes() {
        // As kube-apiserver writes it: other managers, other fields, and the list itself as ".".
        let of = |elements: &str| {
            format!(
                r#"[{{"manager":"kubelet","operation":"Update","fieldsType":"FieldsV1","fieldsV1":{{"f:metadata":{{}}}}}},
                    {{"manager":"kube-controller-manager","fieldsV1":{{"f:spec":{{"f:podCIDR":{{}},"f:podCIDRs":{{".":{{}}{elements}}}}}}}}},
                    {{"manager":"x"}}]"#
            )
        };
        let words = |fields: &str| noted(fields).map(|subnets| subnets.to_string());
        let (v4, v6) = (r#","v:\"10.244.1.0/24\"":{}"#, r#","v:\"fd00:1::/64\"":{}"#);
        assert_eq!(words(&of(v4)).as_deref(), Some("10.244.1.0/24"));
        assert_eq!(words(&of(&format!("{v6}{v4}"))).as_deref(), Some("10.244.1.0/24 and fd00:1::/64"));
        for unclear in ["", r#","v:\"10.244.1.0\"":{}"#, r#","v:10.244.1.0/24":{}"#, r#","k:{}":{}"#] {
            assert_eq!(words(&of(unclear)), None, "{unclear}");
        }
        let two = format!(r#"{v4},"v:\"10.244.2.0/24\"":{{}}"#);
        assert_eq!(words(&of(&two)), None, "of two the first can't be told");
        for cleared in ["", "null", "[]", "[{}]", "{}", "7", r#"[{"fieldsV1":null}]"#] {
            assert_eq!(words(cleared), None, "{cleared}");
        }
    }
}
