//! A peer as commands see it, and what is noted of it on disk; pure but for reading and writing the file.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use subnet::env_file::write_atomically;
use subnet::lease::{format_key, parse_key};
use subnet::{PublicAddrs, Subnets};

use super::words::Variables;

/// What commands are told of a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Where it is reached.
    pub(crate) public: PublicAddrs,
    /// What its `PreStartupCommand` printed.
    pub(crate) data: String,
}

/// The peers by their subnets.
pub(crate) type Entries = BTreeMap<Subnets, Entry>;

/// What is known of a peer for which `SubnetAddCommand` ran.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Noted {
    pub(super) entry: Entry,
    /// The command that succeeded; none while one runs or has failed.
    pub(super) by: Option<String>,
}

/// What is on disk: for which peers commands have made something.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Memory {
    pub(super) peers: BTreeMap<Subnets, Noted>,
    /// The `SubnetRemoveCommand` of the configuration in which they were added.
    pub(super) remove: String,
}

/// Where an agent with this subnet file notes it.
pub(crate) fn file(state_file: &Path) -> PathBuf {
    let name = state_file.file_name().unwrap_or_default().to_string_lossy();
    let name = name.strip_suffix(".state.json").unwrap_or(&name).to_owned();
    state_file.with_file_name(format!("{name}.extension.json"))
}

const VERSION: u64 = 1;

impl Memory {
    /// Reads the file; empty if there is none.
    ///
    /// # Errors
    /// In words why there is a file that can't be used.
    pub(super) fn read(path: &Path) -> Result<Self, String> {
        match subnet::regular::read(path) {
            Ok(bytes) => Self::parse(&bytes).ok_or_else(|| format!("{}: it is damaged", path.display())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(format!("{}: {error}", path.display())),
        }
    }

    /// Writes the file in one step, or removes it if there is nothing to note.
    ///
    /// # Errors
    /// The I/O error, with the path in its text.
    pub(super) fn write(&self, path: &Path) -> io::Result<()> {
        if self.peers.is_empty() {
            return match std::fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            };
        }
        let peer = |(subnets, noted): (&Subnets, &Noted)| {
            let PublicAddrs { v4, v6 } = noted.entry.public;
            json!([format_key(subnets), v4, v6, noted.entry.data, noted.by])
        };
        let peers: Vec<Value> = self.peers.iter().map(peer).collect();
        let file = json!({ "version": VERSION, "remove": self.remove, "peers": peers });
        write_atomically(path, file.to_string().as_bytes(), 0o600)
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let file: Value =
            serde_json::from_slice(bytes).ok().filter(|file: &Value| file["version"] == VERSION)?;
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let peer = |value: &Value| {
            let address = |value: &Value| match value {
                Value::Null => Some(None),
                value => value.as_str().map(str::to_owned).map(Some),
            };
            let public = PublicAddrs {
                v4: address(&value[1])?.map(|text| text.parse()).transpose().ok()?,
                v6: address(&value[2])?.map(|text| text.parse()).transpose().ok()?,
            };
            let by = if value[4].is_null() { None } else { Some(text(&value[4])?) };
            Some((
                parse_key(value[0].as_str()?)?,
                Noted { entry: Entry { public, data: text(&value[3])? }, by },
            ))
        };
        let peers = file["peers"].as_array()?.iter().map(peer).collect::<Option<_>>()?;
        Some(Self { peers, remove: text(&file["remove"])? })
    }
}

/// The variables that a command about these subnets and addresses gets, with Go's words for what is not there.
pub(super) fn variables(subnets: &Subnets, public: &PublicAddrs) -> Variables {
    let or = |value: Option<String>, none: &str| value.unwrap_or_else(|| none.to_owned());
    let pairs = [
        ("SUBNET", or(subnets.v4.map(|net| net.to_string()), "0.0.0.0/0")),
        ("IPV6SUBNET", or(subnets.v6.map(|net| net.to_string()), "::/0")),
        ("PUBLIC_IP", or(public.v4.map(|addr| addr.to_string()), "0.0.0.0")),
        ("PUBLIC_IPV6", or(public.v6.map(|addr| addr.to_string()), "<nil>")),
    ];
    pairs.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

/// Something to be done about a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum EntryChange {
    /// It is new, or nothing is known of its command's success.
    Add(Entry),
    /// It is gone, or was another one.
    Remove(Entry),
}

impl EntryChange {
    /// The key of the command that does it.
    pub(super) fn hook(&self) -> &'static str {
        match self {
            Self::Add(_) => "SubnetAddCommand",
            Self::Remove(_) => "SubnetRemoveCommand",
        }
    }
}

/// What has to be done next so that commands have run for exactly the peers of the desired state.
pub(super) fn due(
    wanted: &Entries,
    command: &str,
    noted: &BTreeMap<Subnets, Noted>,
) -> Vec<(Subnets, EntryChange)> {
    let stale = noted.iter().filter_map(|(subnets, noted)| match wanted.get(subnets) {
        Some(entry) if *entry == noted.entry => {
            (noted.by.as_deref() != Some(command)).then(|| (*subnets, EntryChange::Add(entry.clone())))
        }
        // What it was goes before what it is comes.
        _ => Some((*subnets, EntryChange::Remove(noted.entry.clone()))),
    });
    let new = wanted.iter().filter(|(subnets, _)| !noted.contains_key(subnets));
    stale.chain(new.map(|(subnets, entry)| (*subnets, EntryChange::Add(entry.clone())))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subnets(number: u8) -> Subnets {
        [format!("10.244.{number}.0/24").parse().unwrap()].into_iter().collect()
    }

    fn entry(last: u8, data: &str) -> Entry {
        let public = PublicAddrs { v4: Some([192, 0, 2, last].into()), v6: None };
        Entry { public, data: data.to_owned() }
    }

    fn noted(last: u8, by: Option<&str>) -> Noted {
        Noted { entry: entry(last, ""), by: by.map(str::to_owned) }
    }

    #[test]
    fn commands_run_for_what_differs_from_what_they_have_made() {
        let wanted: Entries = [1, 2, 3, 4].map(|number| (subnets(number), entry(number, ""))).into();
        let known = BTreeMap::from([
            (subnets(1), noted(1, Some("add"))),
            (subnets(2), noted(9, Some("add"))),
            (subnets(3), noted(3, None)),
            (subnets(5), noted(5, None)),
        ]);
        assert_eq!(
            due(&wanted, "add", &known),
            [
                (subnets(2), EntryChange::Remove(entry(9, ""))),
                (subnets(3), EntryChange::Add(entry(3, ""))),
                (subnets(5), EntryChange::Remove(entry(5, ""))),
                (subnets(4), EntryChange::Add(entry(4, ""))),
            ]
        );
        assert_eq!(due(&wanted, "another", &known)[0], (subnets(1), EntryChange::Add(entry(1, ""))));
        assert_eq!(due(&Entries::new(), "", &BTreeMap::new()), []);
    }

    #[test]
    fn what_is_noted_is_read_back_and_damage_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = file(&directory.path().join("x.state.json"));
        assert!(path.ends_with("x.extension.json"));
        assert_eq!(Memory::read(&path), Ok(Memory::default()));
        let mut memory =
            Memory { peers: [(subnets(1), noted(1, Some("a b")))].into(), remove: "r $SUBNET".into() };
        memory.peers.insert(subnets(2), Noted { entry: entry(2, "x \"y\" $(z)\0\n"), by: None });
        memory.write(&path).unwrap();
        assert_eq!(Memory::read(&path), Ok(memory.clone()));
        let text = std::fs::read_to_string(&path).unwrap();
        for damage in
            ["", "{", "[]", &text.replace("\"version\":1", "\"version\":9"), &text.replace("192.0.2.1", "x")]
        {
            std::fs::write(&path, damage).unwrap();
            let why = Memory::read(&path).unwrap_err();
            assert!(why.contains("x.extension.json"), "{why}");
        }
        memory.peers.clear();
        memory.write(&path).unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn variables_have_gos_words_for_what_is_not_there() {
        let none = variables(&Subnets::default(), &PublicAddrs::default());
        let text: Vec<String> = none.iter().map(|(name, value)| format!("{name}={value}")).collect();
        assert_eq!(text, ["IPV6SUBNET=::/0", "PUBLIC_IP=0.0.0.0", "PUBLIC_IPV6=<nil>", "SUBNET=0.0.0.0/0"]);
    }
}
