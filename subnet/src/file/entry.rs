//! The content of a lease's file.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::gojson::Object;
use crate::lease::{Lease, encode_value};

/// One file as it was read: the lease's value, the two members that etcd keeps beside it, and who wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LeaseFile {
    pub(super) text: String,
    pub(super) created: Option<u64>,
    pub(super) expires: Option<SystemTime>,
    /// Which process wrote it; entries by hand and by earlier versions don't say.
    pub(super) owner: Option<String>,
}

impl LeaseFile {
    /// Reads the members besides the lease's. The rest is left to the reader of leases.
    ///
    /// # Errors
    /// A sentence naming the member and its value.
    pub(super) fn parse(text: String) -> Result<Self, String> {
        let object = Object::parse(&text)?;
        let created = object.get("Created")?;
        let owner = object.get("Owner")?;
        let expires: Option<u64> = object.get("Expires")?;
        let expires = match expires.map(|at| UNIX_EPOCH.checked_add(Duration::from_secs(at))) {
            Some(None) => return Err("Expires: it is too far away".into()),
            Some(at) => at,
            None => None,
        };
        Ok(Self { text, created, expires, owner })
    }

    pub(super) fn expired(&self, now: SystemTime) -> bool {
        self.expires.is_some_and(|expires| expires <= now)
    }

    /// The content for a lease that expires then, or never.
    pub(super) fn encode(lease: &Lease, expires: Option<SystemTime>, owner: &str) -> String {
        let mut text = encode_value(&lease.public, &lease.attachment);
        debug_assert!(text.ends_with('}'), "a value is an object and has members");
        text.pop();
        text.push_str(&format!(",\"Created\":{}", lease.created));
        if let Some(expires) = expires {
            text.push_str(&format!(",\"Expires\":{}", whole_seconds(expires)));
        }
        text.push_str(&format!(",\"Owner\":{owner:?}}}\n"));
        text
    }
}

/// A moment as a file has it: in seconds, none of them too early.
pub(super) fn whole_seconds(time: SystemTime) -> u64 {
    (time.duration_since(UNIX_EPOCH).unwrap_or_default() + Duration::from_millis(999)).as_secs()
}

/// A moment as [`Lease::created`]: microseconds, which even readers with floating point keep exactly.
pub(super) fn created_at(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::{Attachment, decode_value};
    use crate::net::PublicAddrs;

    #[test]
    fn an_entry_is_the_value_of_etcd_and_three_members() {
        let public = PublicAddrs { v4: Some("1.2.3.4".parse().unwrap()), v6: None };
        let subnets = ["10.3.1.0/24".parse::<ipnet::IpNet>().unwrap()].into_iter().collect();
        let lease = Lease { subnets, public, attachment: Attachment::HostGw, created: 17, written: 17 };
        let expires = UNIX_EPOCH + Duration::from_millis(1_000_001);
        let text = LeaseFile::encode(&lease, Some(expires), "a1");
        assert_eq!(
            text,
            "{\"PublicIP\":\"1.2.3.4\",\"PublicIPv6\":null,\"BackendType\":\"host-gw\",\"Created\":17,\"Expires\":1001,\"Owner\":\"a1\"}\n"
        );
        assert_eq!(decode_value(text.as_bytes()), Ok((public, Attachment::HostGw)));
        let entry = LeaseFile::parse(text).unwrap();
        assert_eq!(entry.owner.as_deref(), Some("a1"));
        assert_eq!((entry.created, entry.expires), (Some(17), Some(UNIX_EPOCH + Duration::from_secs(1001))));
        assert!(!entry.expired(UNIX_EPOCH + Duration::from_secs(1000)));
        assert!(entry.expired(UNIX_EPOCH + Duration::from_secs(1001)));

        let entry = LeaseFile::parse(LeaseFile::encode(&lease, None, "a1")).unwrap();
        assert!(entry.expires.is_none() && !entry.expired(SystemTime::now()));
    }

    #[test]
    fn wrong_members_are_named() {
        for (text, part) in [
            (r#"{"Expires":"soon"}"#, "Expires: \"soon\""),
            (r#"{"Expires":-1}"#, "Expires: -1"),
            (r#"{"Expires":18446744073709551615}"#, "too far"),
            (r#"{"Created":1.5}"#, "Created: 1.5"),
            ("", "not a JSON object"),
        ] {
            let error = LeaseFile::parse(text.to_owned()).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }
}
