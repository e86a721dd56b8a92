//! What a node last knew of its cluster, kept on disk: so that an agent can start while the store is away.

use std::io;
use std::path::Path;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use crate::config::{BackendConfig, NetworkConfig};
use crate::env_file::write_atomically;
use crate::lease::{Lease, Leases, decode_value, encode_value};
use crate::mac::Mac;
use crate::net::Subnets;
use crate::text::shortened;

/// The last complete snapshot, with what it takes to make use of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saved {
    /// The network's configuration.
    pub network: NetworkConfig,
    /// Backends of earlier configurations that peers still announced.
    pub former: Vec<BackendConfig>,
    /// Networks of earlier configurations in which there were still leases.
    pub left: Vec<IpNet>,
    /// The subnets that this node held.
    pub own: Subnets,
    /// The hardware address of the external interface: a copy of the file on another machine says nothing about
    /// that one.
    pub hardware: Option<Mac>,
    /// The leases of all nodes, the own one included. Entries that were malformed are not kept.
    pub leases: Leases,
}

/// The file. A reader that doesn't know the version takes nothing from it.
#[derive(Serialize, Deserialize)]
struct File {
    version: u32,
    store: String,
    network: NetworkConfig,
    #[serde(default)]
    former: Vec<BackendConfig>,
    #[serde(default)]
    left: Vec<IpNet>,
    own: Key,
    #[serde(default)]
    hardware: Option<String>,
    leases: Vec<Entry>,
}

const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Key(Option<Ipv4Net>, Option<Ipv6Net>);

/// Subnets, the value as etcd has it, when it was created and when it was last written.
#[derive(Serialize, Deserialize)]
struct Entry(Key, String, u64, #[serde(default)] u64);

impl From<&Subnets> for Key {
    fn from(subnets: &Subnets) -> Self {
        Self(subnets.v4, subnets.v6)
    }
}

impl From<Key> for Subnets {
    fn from(Key(v4, v6): Key) -> Self {
        Self { v4, v6 }
    }
}

impl Saved {
    /// Writes the file in one step. `store` tells which cluster it is about.
    ///
    /// # Errors
    /// The I/O error, with the path in its text.
    pub fn write(&self, path: &Path, store: &str) -> io::Result<()> {
        let entry = |(subnets, lease): (&Subnets, &Lease)| {
            Entry(
                subnets.into(),
                encode_value(&lease.public, &lease.attachment),
                lease.created,
                lease.written,
            )
        };
        let file = File {
            version: VERSION,
            store: store.to_owned(),
            network: self.network.clone(),
            former: self.former.clone(),
            left: self.left.clone(),
            own: (&self.own).into(),
            hardware: self.hardware.map(|mac| mac.to_string()),
            leases: self.leases.leases.iter().map(entry).collect(),
        };
        write_atomically(path, &serde_json::to_vec(&file)?, 0o600)
    }

    /// Reads the file; `None` if there is none, or if it is about another store.
    ///
    /// # Errors
    /// In words why there is a file that can't be used. That is no failure, only nothing to start from.
    pub fn read(path: &Path, store: &str) -> Result<Option<Self>, String> {
        Ok(read_file(path)?.filter(|(of, _)| of == store).map(|(_, saved)| saved))
    }

    /// Reads the file, of any store.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn read_of_any_store(path: &Path) -> Result<Option<Self>, String> {
        Ok(read_file(path)?.map(|(_, saved)| saved))
    }

    /// The content of a file, with the store that it is about.
    fn parse(bytes: &[u8]) -> Result<(String, Self), String> {
        let file: File = serde_json::from_slice(bytes).map_err(|error| format!("it is damaged ({error})"))?;
        if file.version != VERSION {
            return Err(format!("it has version {}, and this program writes {VERSION}", file.version));
        }
        let mut leases = Leases::default();
        for Entry(key, value, created, written) in file.leases {
            let subnets: Subnets = key.into();
            let (public, attachment) = decode_value(value.as_bytes())
                .map_err(|error| format!("it is damaged (the lease of {subnets}: {error})"))?;
            leases.leases.insert(subnets, Lease { subnets, public, attachment, created, written });
        }
        let own: Subnets = file.own.into();
        if !leases.leases.contains_key(&own) {
            return Err("it is damaged (it lacks this node's own lease)".to_owned());
        }
        let hardware = file.hardware.and_then(|mac| mac.parse().ok());
        let File { store, network, former, left, .. } = file;
        Ok((store, Self { network, former, left, own, hardware, leases }))
    }
}

fn read_file(path: &Path) -> Result<Option<(String, Saved)>, String> {
    match crate::regular::read(path) {
        Ok(bytes) => {
            Saved::parse(&bytes).map(Some).map_err(|why| format!("{}: {}", path.display(), shortened(&why)))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(format!("{}: {error}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn saved() -> Saved {
        let mut leases = Leases::default();
        for (key, value) in [
            ("10.5.1.0-24", r#"{"PublicIP":"192.0.2.1","BackendType":"host-gw"}"#),
            (
                "10.5.2.0-24&fd00::-64",
                r#"{"PublicIP":"192.0.2.2","PublicIPv6":"2001:db8::2","BackendType":"host-gw"}"#,
            ),
        ] {
            leases.insert_entry(key, value.as_bytes(), 7);
        }
        let own = *leases.leases.keys().next().unwrap();
        let network =
            NetworkConfig::parse(r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#).unwrap();
        Saved {
            network,
            former: vec![BackendConfig::HostGw],
            left: vec!["10.3.0.0/16".parse().unwrap()],
            own,
            hardware: Some(Mac([2, 0, 0, 0, 0, 1])),
            leases,
        }
    }

    #[test]
    fn what_is_written_is_read_back_and_only_for_the_same_store() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.json");
        saved().write(&path, "etcd at a").unwrap();
        assert_eq!(Saved::read(&path, "etcd at a"), Ok(Some(saved())));
        assert_eq!(Saved::read(&path, "etcd at b"), Ok(None));
        assert_eq!(Saved::read_of_any_store(&path), Ok(Some(saved())));
        assert_eq!(Saved::read(&directory.path().join("other"), "etcd at a"), Ok(None));
    }

    #[test]
    fn a_file_that_can_not_be_used_is_named_with_the_reason() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.json");
        for (content, part) in [("", "damaged"), ("{\"version\":1", "damaged"), ("[]", "damaged")] {
            std::fs::write(&path, content).unwrap();
            let why = Saved::read(&path, "s").unwrap_err();
            assert!(why.contains("state.json") && why.contains(part), "{why}");
        }
        let why = Saved::read(directory.path(), "s").unwrap_err();
        assert!(why.contains("directory"), "{why}");
    }

    #[test]
    fn a_file_of_another_version_or_without_the_own_lease_is_not_used_and_says_why() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.json");
        saved().write(&path, "s").unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let why = |from: &str, to: &str| Saved::parse(text.replace(from, to).as_bytes()).unwrap_err();
        assert!(Saved::parse(text.as_bytes()).is_ok());
        assert!(why("\"version\":1", "\"version\":2").contains("version 2"));
        assert!(why("\"own\":[\"10.5.1.0/24\"", "\"own\":[\"10.5.9.0/24\"").contains("own lease"));
    }

    proptest! {
        #[test]
        fn a_damaged_file_is_nothing_and_never_a_panic(cut in 0usize..400, at in 0usize..400, byte: u8) {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("state.json");
            saved().write(&path, "s").unwrap();
            let mut bytes = std::fs::read(&path).unwrap();
            bytes.truncate(bytes.len().saturating_sub(cut).max(1));
            let index = at % bytes.len();
            bytes[index] = byte;
            let _ = Saved::parse(&bytes);
        }
    }
}
