//! JSON objects read the way Go reads them, so that every document a Go flannel accepts is accepted here.
//!
//! Go matches object keys without regard to case, ignores unknown ones, lets the last duplicate win, and
//! takes `null` for "leave it as it is" (contract §0). serde's derive does none of this.

use std::fmt;

use serde::de::{DeserializeOwned, Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// A JSON object: its members in the order of the document, values not yet parsed.
#[derive(Debug)]
pub struct Object<'a>(Vec<(String, &'a RawValue)>);

impl<'a> Object<'a> {
    /// Reads one JSON object.
    ///
    /// # Errors
    /// A sentence saying where the text stops being a JSON object.
    pub fn parse(text: &'a str) -> Result<Self, String> {
        serde_json::from_str(text).map_err(|error| format!("not a JSON object: {error}"))
    }

    /// Every value given for `key`, in document order.
    fn all<'s>(&'s self, key: &'s str) -> impl Iterator<Item = &'a RawValue> + 's {
        self.0.iter().filter(|(name, _)| name.eq_ignore_ascii_case(key)).map(|(_, value)| *value)
    }

    /// The value of `key`, with `null` and absence alike giving `None`.
    ///
    /// # Errors
    /// A sentence naming the key and the value, when a value has the wrong type.
    pub fn get<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>, String> {
        let mut found = None;
        for raw in self.all(key) {
            let value: Option<T> = serde_json::from_str(raw.get())
                .map_err(|error| format!("{key}: {} is not acceptable: {error}", shortened(raw.get())))?;
            found = value.or(found);
        }
        Ok(found)
    }

    /// Like [`get`](Self::get), but `null` is an error: Go's own types for addresses and prefixes refuse it.
    ///
    /// # Errors
    /// A sentence naming the key and the value.
    pub fn get_non_null<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>, String> {
        if self.all(key).any(|raw| raw.get() == "null") {
            return Err(format!("{key}: null is not acceptable: give a value or leave the key out"));
        }
        self.get(key)
    }

    /// The nested object at `key`; the last one counts.
    ///
    /// # Errors
    /// A sentence naming the key, when the value is neither an object nor `null`.
    pub fn object(&self, key: &str) -> Result<Option<Self>, String> {
        match self.all(key).last() {
            None => Ok(None),
            Some(raw) if raw.get() == "null" => Ok(None),
            Some(raw) => Object::parse(raw.get()).map(Some).map_err(|error| format!("{key}: {error}")),
        }
    }

    /// Whether `key` is there at all, be it `null`.
    pub fn has(&self, key: &str) -> bool {
        self.all(key).next().is_some()
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Object<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = Vec<(String, &'de RawValue)>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(members)
            }
        }
        deserializer.deserialize_map(Members).map(Object)
    }
}

/// Writes `value` as Go's `encoding/json` does: compact, with `<`, `>` and `&` escaped.
pub fn to_string<T: Serialize>(value: &T) -> String {
    let plain = serde_json::to_string(value).unwrap_or_default();
    if !plain.contains(['<', '>', '&']) {
        return plain;
    }
    // These three can only stand inside strings, where the escape means the same character.
    plain.replace('<', "\\u003c").replace('>', "\\u003e").replace('&', "\\u0026")
}

/// At most 80 characters of foreign text, fit for one line of an error message.
pub fn shortened(text: &str) -> String {
    let mut short: String = text.chars().take(80).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn keys_match_in_any_case_and_the_last_one_wins() {
        let object = Object::parse(r#"{"VNI":1,"other":{},"vni":2,"Vni":null}"#).unwrap();
        assert_eq!(object.get::<u32>("vni"), Ok(Some(2)));
        assert_eq!(object.get::<u32>("port"), Ok(None));
        assert!(object.get_non_null::<u32>("VNI").unwrap_err().starts_with("VNI: null"));
    }

    #[test]
    fn a_wrong_type_is_named_with_its_value() {
        let object = Object::parse(r#"{"Port":"8472"}"#).unwrap();
        let error = object.get::<u16>("Port").unwrap_err();
        assert!(error.contains("Port") && error.contains("\"8472\""), "{error}");
    }

    #[test]
    fn markup_is_escaped_like_go_does() {
        assert_eq!(to_string(&"a<b>&c"), r#""a\u003cb\u003e\u0026c""#);
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in ".*", key in "[a-zA-Z]{1,3}") {
            if let Ok(object) = Object::parse(&text) {
                let _ = (object.get::<u32>(&key), object.get::<String>(&key), object.object(&key).is_ok());
            }
            let _ = shortened(&text);
        }
    }
}
