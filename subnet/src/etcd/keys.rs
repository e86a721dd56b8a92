//! The names of our keys.

use crate::lease::format_key;
use crate::net::Subnets;
use crate::store::StoreError;

/// All keys of one network.
pub(super) struct Keys {
    prefix: String,
    config: String,
    subnets: String,
}

impl Keys {
    /// The keys under a prefix, which is cleaned as Go's `path.Join` does it.
    pub(super) fn new(prefix: &str) -> Self {
        let mut parts: Vec<&str> = Vec::new();
        for part in prefix.split('/') {
            match part {
                "" | "." => {}
                ".." if parts.last().is_some_and(|last| *last != "..") => {
                    parts.pop();
                }
                ".." if prefix.starts_with('/') => {}
                part => parts.push(part),
            }
        }
        let mut start = if prefix.starts_with('/') { "/".to_owned() } else { String::new() };
        for part in parts {
            start.push_str(part);
            start.push('/');
        }
        Self { config: format!("{start}config"), subnets: format!("{start}subnets/"), prefix: start }
    }

    /// The prefix without a slash at its end, for people.
    pub(super) fn prefix(&self) -> &str {
        let short = self.prefix.trim_end_matches('/');
        if short.is_empty() { &self.prefix } else { short }
    }

    /// Where the network's configuration is.
    pub(super) fn config(&self) -> &str {
        &self.config
    }

    /// The first key that a lease could have. Go matches without the slash, and so keys such as
    /// `subnetsX` too, which no agent writes.
    pub(super) fn first(&self) -> &str {
        &self.subnets
    }

    /// The first key behind those of all leases.
    pub(super) fn end(&self) -> String {
        format!("{}0", self.subnets.trim_end_matches('/')) // '0' follows '/'
    }

    /// The key of the lease of `subnets`.
    pub(super) fn lease(&self, subnets: &Subnets) -> Result<String, StoreError> {
        match format_key(subnets) {
            Some(key) => Ok(format!("{}{key}", self.subnets)),
            None => Err(StoreError::Unusable(format!(
                "etcd can't keep the lease of {subnets}: enable a family with EnableIPv4 or EnableIPv6"
            ))),
        }
    }

    /// What is left of a key of ours: the name of a lease.
    pub(super) fn name(&self, key: &[u8]) -> String {
        let name = key.strip_prefix(self.subnets.as_bytes()).unwrap_or(key);
        String::from_utf8_lossy(name).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_those_of_go_flannel_for_any_spelling_of_the_prefix() {
        for (prefix, config, first) in [
            ("/coreos.com/network", "/coreos.com/network/config", "/coreos.com/network/subnets/"),
            ("/coreos.com//network/", "/coreos.com/network/config", "/coreos.com/network/subnets/"),
            ("/a/./b/../c", "/a/c/config", "/a/c/subnets/"),
            ("/../a", "/a/config", "/a/subnets/"),
            ("net", "net/config", "net/subnets/"),
            ("../net", "../net/config", "../net/subnets/"),
            ("/", "/config", "/subnets/"),
            ("", "config", "subnets/"),
        ] {
            let keys = Keys::new(prefix);
            assert_eq!((keys.config(), keys.first()), (config, first), "{prefix}");
        }
    }

    #[test]
    fn the_range_holds_all_leases_and_nothing_else() {
        let keys = Keys::new("/n");
        let subnets = ["10.3.1.0/24".parse::<ipnet::IpNet>().unwrap()].into_iter().collect();
        let key = keys.lease(&subnets).unwrap();
        assert!(*key >= *keys.first() && *key < *keys.end());
        assert!("/n/subnets" < keys.first() && "/n/subnetsX" > keys.end().as_str());
        assert_eq!(keys.name(key.as_bytes()), key.strip_prefix("/n/subnets/").unwrap());
        let v6_only = ["fd00::/64".parse::<ipnet::IpNet>().unwrap()].into_iter().collect();
        assert_eq!(keys.lease(&v6_only).unwrap(), "/n/subnets/0.0.0.0-0&fd00::-64");
        assert!(keys.lease(&Subnets::default()).unwrap_err().to_string().contains("EnableIPv4"));
    }
}
