//! What a node last knew of its cluster, kept on disk: so that an agent can start while the store is away.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use crate::config::{BackendConfig, NetworkConfig};
use crate::env_file::write_atomically;
use crate::lease::{Lease, Leases, decode_value, encode_value};
use crate::mac::Mac;
use crate::net::Subnets;
use crate::shared_map::SharedMap;
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

/// The first line of the file. A reader that doesn't know the version takes nothing from it.
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
    leases: Vec<SavedLease>,
}

/// Each further line: what was different at a later moment.
#[derive(Serialize, Deserialize)]
struct Later {
    set: Vec<SavedLease>,
    gone: Vec<Key>,
}

const VERSION: u32 = 1;

/// The file is written as a whole again once what was appended is longer than half of the first line, and longer than this.
const MIN_APPENDED: u64 = 64 * 1024;

#[derive(Serialize, Deserialize)]
struct Key(Option<Ipv4Net>, Option<Ipv6Net>);

/// Subnets, the value as etcd has it, when it was created and when it was last written.
#[derive(Serialize, Deserialize)]
struct SavedLease(Key, String, u64, #[serde(default)] u64);

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

impl From<&Lease> for SavedLease {
    fn from(lease: &Lease) -> Self {
        let value = encode_value(&lease.public, &lease.attachment);
        Self((&lease.subnets).into(), value, lease.created, lease.written)
    }
}

impl SavedLease {
    fn lease(self) -> Result<Lease, String> {
        let Self(key, value, created, written) = self;
        let subnets: Subnets = key.into();
        let (public, attachment) = decode_value(value.as_bytes())
            .map_err(|error| format!("it is damaged (the lease of {subnets}: {error})"))?;
        Ok(Lease { subnets, public, attachment, created, written })
    }
}

/// What a file says that was written, for appending to it.
#[derive(Debug)]
pub struct Written {
    /// All but the leases.
    besides: Vec<u8>,
    leases: SharedMap<Subnets, Lease>,
    /// Bytes of the first line, and of all.
    first: u64,
    len: u64,
}

impl Written {
    /// Whether nothing was appended yet.
    pub fn is_whole(&self) -> bool {
        self.len == self.first
    }
}

impl Saved {
    /// Makes the file say this. `store` tells which cluster it is about. What is different from `before`, if that is what the file
    /// says, is appended to it as a line; else it is written in one step.
    ///
    /// # Errors
    /// The I/O error, with the path in its text. What the file says then is unknown.
    pub fn write(&self, path: &Path, store: &str, before: Option<Written>) -> io::Result<Written> {
        let besides = serde_json::to_vec(&self.file(store, Vec::new()))?;
        if let Some(before) = before.filter(|before| before.besides == besides)
            && let Some(written) = self.append(path, before)?
        {
            return Ok(written);
        }
        let leases = self.leases.leases.clone();
        let mut text =
            serde_json::to_vec(&self.file(store, leases.values().map(SavedLease::from).collect()))?;
        text.push(b'\n');
        write_atomically(path, &text, 0o600)?;
        let len = text.len() as u64;
        Ok(Written { besides, leases, first: len, len })
    }

    fn file(&self, store: &str, leases: Vec<SavedLease>) -> File {
        File {
            version: VERSION,
            store: store.to_owned(),
            network: self.network.clone(),
            former: self.former.clone(),
            left: self.left.clone(),
            own: (&self.own).into(),
            hardware: self.hardware.map(|mac| mac.to_string()),
            leases,
        }
    }

    /// Appends what is different, unless the file is another one than `before` or grows too long.
    fn append(&self, path: &Path, before: Written) -> io::Result<Option<Written>> {
        let mut later = Later { set: Vec::new(), gone: Vec::new() };
        for (subnets, _, now) in self.leases.leases.changes(&before.leases) {
            match now {
                Some(lease) => later.set.push(lease.into()),
                None => later.gone.push(subnets.into()),
            }
        }
        let mut line = serde_json::to_vec(&later)?;
        line.push(b'\n');
        let len = before.len + line.len() as u64;
        if len - before.first > MIN_APPENDED.max(before.first / 2) {
            return Ok(None);
        }
        if !fs::symlink_metadata(path).is_ok_and(|about| about.is_file() && about.len() == before.len) {
            return Ok(None);
        }
        let Ok(mut file) = OpenOptions::new().append(true).open(path) else { return Ok(None) };
        let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        file.write_all(&line).and_then(|()| file.sync_data()).map_err(named)?;
        Ok(Some(Written { leases: self.leases.leases.clone(), len, ..before }))
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

    /// The content of a file, with the store that it is about. A last line that was not written to its end does not count.
    fn parse(bytes: &[u8]) -> Result<(String, Self), String> {
        let damaged = |error: serde_json::Error| format!("it is damaged ({error})");
        let mut lines = bytes.split_inclusive(|byte| *byte == b'\n');
        let file: File = serde_json::from_slice(lines.next().unwrap_or_default()).map_err(damaged)?;
        if file.version != VERSION {
            return Err(format!("it has version {}, and this program writes {VERSION}", file.version));
        }
        let mut leases = Leases::default();
        for entry in file.leases {
            let lease = entry.lease()?;
            leases.leases.insert(lease.subnets, lease);
        }
        for line in lines.filter(|line| line.ends_with(b"\n")) {
            let later: Later = serde_json::from_slice(line).map_err(damaged)?;
            for entry in later.set {
                let lease = entry.lease()?;
                leases.leases.insert(lease.subnets, lease);
            }
            for key in later.gone {
                leases.leases.remove(&key.into());
            }
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
        saved().write(&path, "etcd at a", None).unwrap();
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
        saved().write(&path, "s", None).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let why = |from: &str, to: &str| Saved::parse(text.replace(from, to).as_bytes()).unwrap_err();
        assert!(Saved::parse(text.as_bytes()).is_ok());
        assert!(why("\"version\":1", "\"version\":2").contains("version 2"));
        assert!(why("\"own\":[\"10.5.1.0/24\"", "\"own\":[\"10.5.9.0/24\"").contains("own lease"));
    }

    fn lease(number: u8, address: u8) -> Lease {
        let mut all = Leases::default();
        let value = format!(r#"{{"PublicIP":"192.0.2.{address}","BackendType":"host-gw"}}"#);
        all.insert_entry(&format!("10.5.{number}.0-24"), value.as_bytes(), number.into());
        all.leases.values().next().unwrap().clone()
    }

    #[test]
    fn what_is_different_is_appended_until_that_is_too_much() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.json");
        let mut now = saved();
        let (mut written, mut appended) = (None, 0);
        for round in 0..1500u32 {
            let lease = lease(9, (round % 200) as u8);
            now.leases.leases.insert(lease.subnets, lease);
            let before = written.take().map_or(0, |before: Written| {
                let len = before.len;
                written = Some(before);
                len
            });
            let next = now.write(&path, "s", written.take()).unwrap();
            appended += u32::from(next.len > next.first && next.len > before);
            written = Some(next);
            if round % 100 == 0 {
                assert_eq!(Saved::read(&path, "s"), Ok(Some(now.clone())));
            }
        }
        let len = std::fs::metadata(&path).unwrap().len();
        assert!((1400..1500).contains(&appended) && len < 2 * MIN_APPENDED, "{appended} of {len} bytes");
    }

    #[test]
    fn a_file_that_somebody_changed_or_that_is_about_something_else_is_written_as_a_whole() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.json");
        for change in 0..4 {
            let mut now = saved();
            let written = now.write(&path, "s", None).unwrap();
            match change {
                0 => std::fs::write(&path, "nonsense").unwrap(),
                1 => std::fs::remove_file(&path).unwrap(),
                2 => now.left.clear(),
                _ => now.hardware = None,
            }
            now.leases.leases.insert(lease(9, 9).subnets, lease(9, 9));
            let next = now.write(&path, "s", Some(written)).unwrap();
            assert_eq!((next.first, Saved::read(&path, "s")), (next.len, Ok(Some(now))), "{change}");
        }
    }

    proptest! {
        #[test]
        fn a_file_that_was_cut_off_says_what_was_so_before_or_nothing(
            steps in prop::collection::vec((3u8..9, 1u8..200, any::<bool>()), 1..8), cut in 0usize..2000,
        ) {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("state.json");
            let mut now = saved();
            let mut written = now.write(&path, "s", None).unwrap();
            let mut ends = vec![(written.len as usize, now.clone())];
            for (number, address, gone) in steps {
                let lease = lease(number, address);
                if gone {
                    now.leases.leases.remove(&lease.subnets);
                } else {
                    now.leases.leases.insert(lease.subnets, lease);
                }
                written = now.write(&path, "s", Some(written)).unwrap();
                ends.push((written.len as usize, now.clone()));
            }
            let bytes = std::fs::read(&path).unwrap();
            let whole = Saved::parse(&bytes);
            prop_assert_eq!(whole, Ok(("s".to_owned(), now)));
            let left = bytes.len().saturating_sub(cut);
            let expected = ends.iter().rev().find(|(end, _)| *end <= left).map(|(_, saved)| saved.clone());
            let found = Saved::parse(&bytes[..left]).ok().map(|(_, saved)| saved);
            // Without its end, the first line is whole all the same.
            prop_assert!(found == expected || left + 1 == ends[0].0, "{left} of {ends:?}");
        }

        #[test]
        fn a_damaged_file_is_nothing_and_never_a_panic(cut in 0usize..400, at in 0usize..400, byte: u8) {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("state.json");
            saved().write(&path, "s", None).unwrap();
            let mut bytes = std::fs::read(&path).unwrap();
            bytes.truncate(bytes.len().saturating_sub(cut).max(1));
            let index = at % bytes.len();
            bytes[index] = byte;
            let _ = Saved::parse(&bytes);
        }
    }
}
