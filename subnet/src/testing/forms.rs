//! The forms in which the scripted API server writes the events of a watch: whole objects, or their metadata in JSON or protobuf.

use hyper::body::Bytes;
use serde_json::{Value, json};

/// How the events of a watch are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// Whole objects in JSON.
    Whole,
    /// Metadata in JSON.
    Json,
    /// Metadata in protobuf.
    Protobuf,
}

const PARTIAL: &str = "as=PartialObjectMetadata";

impl Form {
    /// The first of `accept` that the server has.
    pub(super) fn of(accept: &str, has_metadata: bool, has_protobuf: bool) -> Self {
        let form = accept.split(',').find_map(|form| match form.trim() {
            form if form.starts_with("application/vnd.kubernetes.protobuf") => {
                (form.contains(PARTIAL) && has_metadata && has_protobuf).then_some(Self::Protobuf)
            }
            form if form.contains(PARTIAL) => has_metadata.then_some(Self::Json),
            _ => Some(Self::Whole),
        });
        form.unwrap_or(Self::Whole)
    }

    pub(super) fn content_type(self) -> &'static str {
        match self {
            Self::Whole | Self::Json => "application/json",
            Self::Protobuf => "application/vnd.kubernetes.protobuf;stream=watch",
        }
    }

    /// An event of this object.
    pub(super) fn event(self, kind: &str, object: &str) -> Bytes {
        let parsed = || serde_json::from_str::<Value>(object).unwrap_or_default();
        match self {
            Self::Whole => json_event(kind, object),
            Self::Json => {
                let metadata = &parsed()["metadata"];
                let partial = json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": metadata});
                json_event(kind, &partial.to_string())
            }
            Self::Protobuf => {
                let metadata = message(&[(1, object_meta(&parsed()["metadata"]))]);
                frame(kind, ("meta.k8s.io/v1", "PartialObjectMetadata"), metadata)
            }
        }
    }

    /// The event that ends a watch.
    pub(super) fn error(self, text: &str, reason: &str, code: u16) -> Bytes {
        match self {
            Self::Whole | Self::Json => {
                let status = json!({"kind": "Status", "status": "Failure", "message": text, "reason": reason, "code": code});
                json_event("ERROR", &status.to_string())
            }
            Self::Protobuf => {
                let parts = [(1, Vec::new()), (2, "Failure".into()), (3, text.into()), (4, reason.into())];
                frame("ERROR", ("v1", "Status"), message(&parts))
            }
        }
    }
}

fn json_event(kind: &str, object: &str) -> Bytes {
    format!("{{\"type\":\"{kind}\",\"object\":{object}}}\n").into()
}

/// A field that has a length: text, bytes or another message.
type Field = (u8, Vec<u8>);

/// A message of such fields, all of which have numbers up to 31.
fn message(fields: &[Field]) -> Vec<u8> {
    let mut message = Vec::new();
    for (number, content) in fields {
        put_number(&mut message, u64::from(*number) << 3 | 2);
        put_number(&mut message, content.len() as u64);
        message.extend_from_slice(content);
    }
    message
}

/// A number of variable length, seven bits in each byte.
fn put_number(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number.to_le_bytes()[0] | 0x80);
        number >>= 7;
    }
    out.push(number.to_le_bytes()[0]);
}

fn frame(kind: &str, (version, type_name): (&str, &str), object: Vec<u8>) -> Bytes {
    let type_meta = message(&[(1, version.into()), (2, type_name.into())]);
    let unknown = message(&[(1, type_meta), (2, object), (3, Vec::new()), (4, Vec::new())]);
    let object = message(&[(1, [b"k8s\0", &unknown[..]].concat())]);
    let event = message(&[(1, kind.into()), (2, object)]);
    let length = u32::try_from(event.len()).unwrap_or(u32::MAX).to_be_bytes();
    [&length[..], &event].concat().into()
}

fn object_meta(metadata: &Value) -> Vec<u8> {
    let text = |value: &Value| value.as_str().unwrap_or_default().as_bytes().to_vec();
    let member = |name: &str| text(&metadata[name]);
    let mut fields = vec![(1, member("name")), (5, member("uid")), (6, member("resourceVersion"))];
    fields.push((8, time(&metadata["creationTimestamp"])));
    for (number, name) in [(11, "labels"), (12, "annotations")] {
        let pairs = metadata[name].as_object().into_iter().flatten();
        fields.extend(
            pairs.map(|(key, value)| (number, message(&[(1, key.as_str().into()), (2, text(value))]))),
        );
    }
    for entry in metadata["managedFields"].as_array().into_iter().flatten() {
        let mut parts: Vec<Field> = [(1, "manager"), (2, "operation"), (3, "apiVersion")]
            .map(|(number, name)| (number, text(&entry[name])))
            .into();
        parts.extend([(4, time(&entry["time"])), (6, text(&entry["fieldsType"]))]);
        if let Some(fields) = entry.get("fieldsV1") {
            parts.push((7, message(&[(1, fields.to_string().into_bytes())])));
        }
        fields.push((17, message(&parts)));
    }
    message(&fields)
}

/// A time in seconds since 1970.
fn time(text: &Value) -> Vec<u8> {
    let numbers: Vec<i64> = text
        .as_str()
        .unwrap_or_default()
        .split(['-', 'T', ':', 'Z'])
        .map_while(|part| part.parse().ok())
        .collect();
    let [year, month, day, hour, minute, second] = numbers[..] else { return Vec::new() };
    // Days since 1 March of year 0, so that a leap day is the last one of a year.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = year * 365 + year / 4 - year / 100 + year / 400 + (month * 153 + 2) / 5 + day - 1 - 719_468;
    let seconds = days * 86_400 + hour * 3600 + minute * 60 + second;
    let mut time = vec![1 << 3];
    put_number(&mut time, seconds.unsigned_abs());
    time
}
