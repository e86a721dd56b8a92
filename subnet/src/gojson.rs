//! JSON objects read the way Go reads them, so that every document a Go flannel accepts is accepted here.
//!
//! Go matches object keys without regard to case, ignores unknown ones, lets the last duplicate win, and
//! takes `null` for "leave it as it is" (contract §0). serde's derive does none of this.

mod surrogates;

use std::fmt;

use serde::de::{DeserializeOwned, Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// A JSON object: its members in the order of the document, values not yet parsed.
#[derive(Debug)]
pub struct Object<'a> {
    /// Where it is in the document, for messages: empty, or a key with a dot behind it.
    path: String,
    members: Vec<(String, &'a RawValue)>,
}

/// A type that the value of a key can have, in the words of JSON.
pub trait Typed: DeserializeOwned {
    /// What a value of another type is asked to be.
    const WANTED: Wanted;
}

/// See [`Typed`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// A string.
    Text,
    /// A whole number between two bounds.
    Number(i128, i128),
    /// `true` or `false`.
    Flag,
    /// A list of strings.
    Texts,
    /// A list of any values.
    List,
    /// An object.
    Object,
    /// Any value.
    Any,
}

macro_rules! numbers {
    ($($number:ty)*) => {
        $(impl Typed for $number {
            const WANTED: Wanted = Wanted::Number(<$number>::MIN as i128, <$number>::MAX as i128);
        })*
    };
}

numbers!(u8 u16 u32 u64 i64);

impl Typed for String {
    const WANTED: Wanted = Wanted::Text;
}

impl Typed for bool {
    const WANTED: Wanted = Wanted::Flag;
}

impl Typed for Vec<String> {
    const WANTED: Wanted = Wanted::Texts;
}

impl Typed for Vec<serde_json::Value> {
    const WANTED: Wanted = Wanted::List;
}

impl Typed for serde_json::Map<String, serde_json::Value> {
    const WANTED: Wanted = Wanted::Object;
}

impl Typed for serde_json::Value {
    const WANTED: Wanted = Wanted::Any;
}

/// Why a text is no JSON, with the remedy for what editors and shells do to it.
fn unreadable(text: &str, error: &serde_json::Error) -> String {
    let first_name = text.trim_start().strip_prefix('{').and_then(|rest| rest.trim_start().chars().next());
    if text.trim().is_empty() {
        "it is empty".to_owned()
    } else if text.starts_with('\u{feff}') {
        "it begins with a byte order mark: save it as UTF-8 without one".to_owned()
    } else if text.starts_with('\u{fffd}') || text.chars().take(4).any(|c| c == '\0') {
        "it is no UTF-8, but perhaps UTF-16: save it as UTF-8 without a byte order mark".to_owned()
    } else if first_name.is_some_and(|c| c == '\'' || c.is_alphabetic()) {
        format!(
            "{error}: names and texts need double quotes, and a shell removes those that are not inside of single quotes"
        )
    } else if !text.trim_start().starts_with('{') {
        format!("{error}: it has to begin with '{{'")
    } else {
        error.to_string()
    }
}

impl<'a> Object<'a> {
    /// Reads one JSON object.
    ///
    /// # Errors
    /// A sentence saying where the text stops being a JSON object.
    pub fn parse(text: &'a str) -> Result<Self, String> {
        serde_json::from_str(text).map_err(|error| {
            let Some(kind) = serde_json::from_str::<&RawValue>(text).ok().and_then(|raw| kind(raw.get()))
            else {
                return format!("not a JSON object: {}", unreadable(text, &error));
            };
            format!("not a JSON object: {} is {kind}", shortened(text.trim()))
        })
    }

    /// The names of all members, as they are spelled in the document.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.members.iter().map(|(name, _)| name.as_str())
    }

    /// Every value given for `key`, in document order.
    fn all<'s>(&'s self, key: &'s str) -> impl Iterator<Item = &'a RawValue> + 's {
        self.members.iter().filter(|(name, _)| name.eq_ignore_ascii_case(key)).map(|(_, value)| *value)
    }

    /// The value of `key`, with `null` and absence alike giving `None`.
    ///
    /// # Errors
    /// A sentence naming the key and the value, when a value has the wrong type.
    pub fn get<T: Typed>(&self, key: &str) -> Result<Option<T>, String> {
        let mut found = None;
        for raw in self.all(key) {
            let value: Option<T> = serde_json::from_str(raw.get())
                .or_else(|_| serde_json::from_str(&surrogates::replaced(raw.get())))
                .map_err(|_| format!("{}{key}: {}", self.path, mismatch(raw.get(), T::WANTED)))?;
            found = value.or(found);
        }
        Ok(found)
    }

    /// Like [`get`](Self::get), but `null` is an error: Go's own types for addresses and prefixes refuse it.
    ///
    /// # Errors
    /// A sentence naming the key and the value.
    pub fn get_non_null<T: Typed>(&self, key: &str) -> Result<Option<T>, String> {
        if self.all(key).any(|raw| raw.get() == "null") {
            return Err(format!("{}{key}: null can't be used: give a value or leave the key out", self.path));
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
            Some(raw) => match Object::parse(raw.get()) {
                Ok(object) => Ok(Some(Self { path: format!("{}{key}.", self.path), ..object })),
                Err(_) => {
                    let kind = kind(raw.get()).unwrap_or("no object");
                    Err(format!(
                        "{}{key}: {} is {kind}; write an object: {{…}}",
                        self.path,
                        shortened(raw.get())
                    ))
                }
            },
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
        deserializer.deserialize_map(Members).map(|members| Self { path: String::new(), members })
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

/// What kind of value a JSON text is, by its first character; `None` for an object.
fn kind(raw: &str) -> Option<&'static str> {
    match raw.trim_start().bytes().next()? {
        b'{' => None,
        b'"' => Some("a text"),
        b'[' => Some("a list"),
        b't' | b'f' => Some("a truth value"),
        b'n' => Some("null"),
        _ => Some("a number"),
    }
}

fn is_whole(number: &str) -> bool {
    number.bytes().all(|byte| byte.is_ascii_digit() || byte == b'-')
}

/// Why a value is of the wrong type, and how to write it.
fn mismatch(raw: &str, wanted: Wanted) -> String {
    let (shown, is) = (shortened(raw), kind(raw).unwrap_or("an object"));
    let text: Option<String> = serde_json::from_str(raw).ok();
    let text = text.as_deref().map(str::trim);
    match wanted {
        Wanted::Number(least, most) => {
            let fits =
                |text: &&str| text.parse::<i128>().is_ok_and(|number| (least..=most).contains(&number));
            let range = match most {
                ..=0xffff_ffff => format!("a whole number from {least} to {most}"),
                _ => "a whole number".to_owned(),
            };
            match text.filter(fits) {
                Some(number) => format!("{shown} is a text; write a number: {number}"),
                // Not all that JSON calls a number is whole, and not all that is whole fits.
                None if is == "a number" && most > 0xffff_ffff && is_whole(raw) => {
                    let wrong = if raw.starts_with('-') && least == 0 { "negative" } else { "out of bounds" };
                    format!("{shown} is {wrong}; write {range}")
                }
                None if is == "a number" => format!("{shown} is not {range}"),
                None => format!("{shown} is {is}; write {range}"),
            }
        }
        Wanted::Text if is == "a number" => format!("{shown} is a number; write a text: \"{shown}\""),
        Wanted::Text => format!("{shown} is {is}; write a text in quotes"),
        Wanted::Flag => match text.map(str::to_ascii_lowercase).as_deref() {
            Some(flag @ ("true" | "false")) => format!("{shown} is a text; write it without quotes: {flag}"),
            _ => format!("{shown} is {is}; write true or false"),
        },
        Wanted::Texts if is == "a text" => format!("{shown} is a text; write a list: [{shown}]"),
        Wanted::Texts if is == "a list" => {
            format!("{shown} has items that are no texts; write each in quotes")
        }
        Wanted::Texts => format!("{shown} is {is}; write a list of texts"),
        Wanted::List if is == "a list" => format!("{shown} is nested too deeply"),
        Wanted::Object if is == "an object" => format!("{shown} is nested too deeply"),
        Wanted::List => format!("{shown} is {is}; write a list: [{shown}]"),
        Wanted::Object => format!("{shown} is {is}; write an object: {{…}}"),
        Wanted::Any => format!("{shown} can't be read"),
    }
}

pub use crate::text::shortened;

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
    fn half_a_surrogate_pair_is_a_replacement_character_and_no_wrong_type() {
        let object =
            Object::parse(r#"{"a":{"b":["\ud800"]},"c":"x\uDC00y","d":"\ud83d\ude00","e":["\ud800"]}"#)
                .unwrap();
        let a = object.get::<serde_json::Map<String, serde_json::Value>>("a").unwrap().unwrap();
        assert_eq!(a["b"][0], "\u{fffd}");
        assert_eq!(object.get("c"), Ok(Some("x\u{fffd}y".to_owned())));
        assert_eq!(object.get("d"), Ok(Some("\u{1f600}".to_owned())));
        assert!(object.get::<u8>("e").unwrap_err().contains("is a list"));
    }

    #[test]
    fn a_wrong_type_is_named_with_its_value() {
        let object = Object::parse(r#"{"Port":"8472"}"#).unwrap();
        assert_eq!(object.get::<u16>("Port").unwrap_err(), r#"Port: "8472" is a text; write a number: 8472"#);
    }

    #[test]
    fn every_wrong_type_is_told_in_the_words_of_json_with_the_remedy() {
        fn said<T: Typed + fmt::Debug>(value: &str) -> String {
            let text = format!(r#"{{"B":{{"K":{value}}}}}"#);
            let object = Object::parse(&text).unwrap().object("B").unwrap().unwrap();
            object.get::<T>("K").unwrap_err()
        }
        assert_eq!(said::<i64>("\"1\""), r#"B.K: "1" is a text; write a number: 1"#);
        assert_eq!(said::<i64>("\"one\""), r#"B.K: "one" is a text; write a whole number"#);
        assert_eq!(said::<u16>("70000"), "B.K: 70000 is not a whole number from 0 to 65535");
        assert_eq!(said::<u64>("1.5"), "B.K: 1.5 is not a whole number");
        assert_eq!(said::<u64>("[1]"), "B.K: [1] is a list; write a whole number");
        assert_eq!(said::<u8>("{}"), "B.K: {} is an object; write a whole number from 0 to 255");
        assert_eq!(said::<bool>("\"True\""), r#"B.K: "True" is a text; write it without quotes: true"#);
        assert_eq!(said::<bool>("1"), "B.K: 1 is a number; write true or false");
        assert_eq!(said::<String>("7"), r#"B.K: 7 is a number; write a text: "7""#);
        assert_eq!(said::<String>("true"), "B.K: true is a truth value; write a text in quotes");
        assert_eq!(said::<Vec<String>>("\"a\""), r#"B.K: "a" is a text; write a list: ["a"]"#);
        assert_eq!(said::<Vec<String>>("[1]"), "B.K: [1] has items that are no texts; write each in quotes");
        let text = r#"{"Backend":"vxlan"}"#;
        let error = Object::parse(text).unwrap().object("Backend").unwrap_err();
        assert_eq!(error, r#"Backend: "vxlan" is a text; write an object: {…}"#);
        assert_eq!(Object::parse("[1]").unwrap_err(), "not a JSON object: [1] is a list");
    }

    #[test]
    fn what_editors_and_shells_do_to_a_text_is_named_with_the_remedy() {
        for (text, named) in [
            ("", "it is empty"),
            (" \n", "it is empty"),
            ("\u{feff}{}", "it begins with a byte order mark: save it as UTF-8 without one"),
            (
                "{Network:10.244.0.0/16}",
                "key must be a string at line 1 column 2: names and texts need double quotes",
            ),
            (
                "{ 'Network': 'x'}",
                "key must be a string at line 1 column 3: names and texts need double quotes",
            ),
        ] {
            let error = Object::parse(text).unwrap_err();
            assert!(error.starts_with(&format!("not a JSON object: {named}")), "{error}");
        }
        assert_eq!(
            Object::parse("{\"a\":1,}").unwrap_err(),
            "not a JSON object: trailing comma at line 1 column 8"
        );
    }

    #[test]
    fn a_long_value_never_gets_into_a_message_whole() {
        let long = "x".repeat(100_000);
        let texts =
            [format!("\"{long}\""), format!(r#"{{"K":"{long}"}}"#), format!(r#"{{"K":["{long}"]}}"#), long];
        for text in texts {
            let outcome = Object::parse(&text).and_then(|object| {
                object.get::<u8>("K")?;
                object.object("K").map(drop)
            });
            assert!(outcome.unwrap_err().len() < 300);
        }
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
