//! What the CNI plugin announced, on disk: an agent that is restarted goes on from it.
//!
//! The API names a pod's addresses some hundred milliseconds after its containers run, and goes on naming them after
//! they were given back. host-local's reservations know the addresses, but not whose they are. So each announcement
//! has a file of its own, written before the plugin is answered; it is in `/run`, which ends with the host's pods.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use subnet::policy::Pod;
use subnet::policy::objects::uid;

use super::announce::{Announcement, EndedSandbox};

/// The longest id of a container, and name of a file with it.
const MAX_CONTAINER: usize = 200;
const PREFIX: &str = "pod-";

/// The announcements in force.
pub(super) struct Kept {
    directory: PathBuf,
    /// By container.
    pods: BTreeMap<String, Announcement>,
}

/// Where an agent with this subnet file keeps what policies need.
pub(super) fn directory(subnet_file: &Path) -> PathBuf {
    let mut path = subnet_file.as_os_str().to_owned();
    path.push(".policy");
    path.into()
}

impl Kept {
    /// Reads what an earlier run kept, and makes the directory where there is none.
    ///
    /// # Errors
    /// The directory can't be made or read.
    pub(super) fn open(directory: PathBuf) -> io::Result<Self> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&directory)?;
        let mut pods = BTreeMap::new();
        for entry in fs::read_dir(&directory)? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let Some(container) = name.strip_prefix(PREFIX) else { continue };
            match fs::read(&path).ok().and_then(|json| decode(container, &json)) {
                Some(pod) => drop(pods.insert(container.to_owned(), pod)),
                None => {
                    tracing::warn!(file = %path.display(), "not an announcement of a pod: removed");
                    fs::remove_file(&path)?;
                }
            }
        }
        Ok(Self { directory, pods })
    }

    /// Keeps an announcement, and takes its addresses off all others: they were given to somebody else. Gives the
    /// other announcements that have changed.
    ///
    /// # Errors
    /// It can't be written.
    pub(super) fn put(&mut self, pod: &Announcement) -> io::Result<Vec<Announcement>> {
        self.write(pod)?;
        let replaced: Vec<String> = self.of_name(&pod.namespace, &pod.pod).map(str::to_owned).collect();
        for container in replaced.iter().filter(|container| **container != pod.container) {
            self.forget(container);
        }
        self.pods.insert(pod.container.clone(), pod.clone());
        let takes = |other: &Announcement| other.addresses.iter().any(|one| pod.addresses.contains(one));
        let robbed: Vec<Announcement> = self
            .pods
            .values()
            .filter(|other| other.container != pod.container && takes(other))
            .cloned()
            .collect();
        let mut changed = Vec::new();
        for mut other in robbed {
            other.addresses.retain(|address| !pod.addresses.contains(address));
            self.write(&other)?;
            self.pods.insert(other.container.clone(), other.clone());
            changed.push(other);
        }
        Ok(changed)
    }

    /// Takes the addresses of a sandbox back. The record stays until the pod's object is gone, which goes on naming
    /// them. Gives it, unless the pod has another sandbox.
    ///
    /// # Errors
    /// It can't be written.
    pub(super) fn release(&mut self, ended: &EndedSandbox) -> io::Result<Option<Announcement>> {
        let Some(pod) = self.pods.get(&ended.container) else { return Ok(None) };
        let pod = Announcement { addresses: Vec::new(), ..pod.clone() };
        self.write(&pod)?;
        self.pods.insert(ended.container.clone(), pod.clone());
        Ok(Some(pod))
    }

    /// The announcement of this pod.
    pub(super) fn of(&self, pod: &Pod) -> Option<&Announcement> {
        self.pods.values().find(|kept| is_about(kept, pod))
    }

    /// Forgets what was announced of all pods but those that `exists` knows.
    pub(super) fn retain(&mut self, exists: impl Fn(&Announcement) -> bool) {
        let gone: Vec<String> =
            self.pods.values().filter(|pod| !exists(pod)).map(|pod| pod.container.clone()).collect();
        gone.iter().for_each(|container| self.forget(container));
    }

    fn of_name<'a>(&'a self, namespace: &'a str, pod: &'a str) -> impl Iterator<Item = &'a str> {
        let named = move |kept: &&Announcement| (&*kept.namespace, &*kept.pod) == (namespace, pod);
        self.pods.values().filter(named).map(|kept| &*kept.container)
    }

    fn forget(&mut self, container: &str) {
        self.pods.remove(container);
        // One that stays is forgotten at the next start.
        let _ = fs::remove_file(self.path(container));
    }

    fn path(&self, container: &str) -> PathBuf {
        self.directory.join(format!("{PREFIX}{container}"))
    }

    /// Replaces the file as a whole; it need not survive the host.
    fn write(&self, pod: &Announcement) -> io::Result<()> {
        let new = self.directory.join("new");
        fs::write(&new, encode(pod))?;
        fs::rename(&new, self.path(&pod.container))
    }
}

/// Whether an announcement is about this pod: by its uid, where the runtime gave one.
pub(super) fn is_about(kept: &Announcement, pod: &Pod) -> bool {
    if kept.uid.is_empty() {
        (&*kept.namespace, &*kept.pod) == (&*pod.name.namespace, &*pod.name.name)
    } else {
        uid(&kept.uid) == pod.uid
    }
}

/// Whether the id of a container can be the name of a file.
pub(super) fn is_container(id: &str) -> bool {
    let first = id.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
    first
        && id.len() <= MAX_CONTAINER
        && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte))
}

fn encode(pod: &Announcement) -> Vec<u8> {
    let json = json!({
        "namespace": pod.namespace,
        "pod": pod.pod,
        "uid": pod.uid,
        "hostIf": pod.host_interface,
        "mac": pod.mac.map(|mac| mac.to_string()),
        "ips": pod.addresses.iter().map(IpAddr::to_string).collect::<Vec<_>>(),
    });
    json.to_string().into_bytes()
}

fn decode(container: &str, json: &[u8]) -> Option<Announcement> {
    let json: Value = serde_json::from_slice(json).ok()?;
    let text = |member: &str| json.get(member).and_then(Value::as_str).map(str::to_owned);
    let addresses = json.get("ips")?.as_array()?;
    Some(Announcement {
        namespace: text("namespace")?,
        pod: text("pod")?,
        uid: text("uid")?,
        container: is_container(container).then(|| container.to_owned())?,
        host_interface: text("hostIf")?,
        mac: text("mac").and_then(|mac| mac.parse().ok()),
        addresses: addresses.iter().map(|one| one.as_str()?.parse().ok()).collect::<Option<_>>()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn announced(pod: &str, container: &str, address: &str) -> Announcement {
        Announcement {
            namespace: "shop".into(),
            pod: pod.into(),
            uid: format!("uid-of-{pod}"),
            container: container.into(),
            host_interface: "veth0".into(),
            mac: "02:00:00:00:00:01".parse().ok(),
            addresses: vec![address.parse().unwrap(), "fd00::7".parse().unwrap()],
        }
    }

    fn ended(container: &str) -> EndedSandbox {
        EndedSandbox {
            namespace: "shop".into(),
            pod: "web".into(),
            uid: String::new(),
            container: container.into(),
        }
    }

    #[test]
    fn announcements_survive_a_restart_until_they_are_released() {
        let place = tempfile::tempdir().unwrap();
        let open = || Kept::open(place.path().join("policy")).unwrap();
        let (web, db) = (announced("web", "c1", "10.0.0.1"), announced("db", "c2", "10.0.0.2"));
        let mut kept = open();
        assert_eq!(kept.put(&web).unwrap(), []);
        // The second one was given an address that the first one had.
        let robbed = Announcement { addresses: vec!["10.0.0.1".parse().unwrap()], ..web.clone() };
        assert_eq!(kept.put(&db).unwrap(), std::slice::from_ref(&robbed));
        fs::write(place.path().join("policy/pod-c3"), "{}").unwrap();
        let mut kept = open();
        assert_eq!(kept.pods.values().cloned().collect::<Vec<_>>(), [robbed, db.clone()]);
        // A pod that gets another sandbox: the DEL of the first one comes late and means nothing.
        let again = announced("web", "c4", "10.0.0.9");
        kept.put(&Announcement { addresses: again.addresses[..1].to_vec(), ..again }).unwrap();
        assert_eq!(kept.release(&ended("c1")).unwrap(), None);
        let released = kept.release(&ended("c2")).unwrap().unwrap();
        assert_eq!((released.pod.as_str(), released.addresses.len()), ("db", 0));
        let mut kept = open();
        assert_eq!(kept.pods.keys().collect::<Vec<_>>(), ["c2", "c4"]);
        kept.retain(|pod| pod.pod == "web");
        assert_eq!(open().pods.keys().collect::<Vec<_>>(), ["c4"]);
    }

    #[test]
    fn a_container_is_no_path() {
        for id in ["", "..", "../x", "a/b", ".a", "-a", "a b", &"a".repeat(201)] {
            assert!(!is_container(id), "{id}");
        }
        assert!(is_container("0a1B_.-x") && is_container(&"a".repeat(64)));
    }
}
