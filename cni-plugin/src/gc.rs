//! GC: drops what belongs to none of the attachments that the runtime lists as valid.
//!
//! A kept configuration whose attachment is not listed is taken down by a DEL. Its file tells the container,
//! but in Go's form of the name not the interface, without which no address is given back; `host-local` noted
//! both for each address it holds. Addresses that it holds for no pod, because what was kept for them was
//! lost, are given back too, as its own GC would. The delegate's own GC follows if it has one.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::Value;
use subnet::gojson;

use crate::conf::{Delegate, Network};
use crate::delegate;
use crate::env::{Attachment, Call, Verb, check_interface, is_identifier};
use crate::error::{self, CniError};
use crate::host_local::store::{DEFAULT_DATA_DIR, Holder, Reservation, Store};
use crate::way::ResolvedRoute;
use crate::{node, note, policy, saved};

/// What was kept, by the names of the files.
type Kept = BTreeMap<String, (PathBuf, Delegate)>;

/// Drops all it can, and then says what it could not.
///
/// # Errors
/// Code 7 when the valid attachments are not known; else the first failure, and further ones as its details.
pub(crate) fn collect(call: &Call, network: &Network) -> Result<(), CniError> {
    let valid = network.valid_attachments()?;
    let mut failures = Vec::new();
    let broken = |file: &Path, why: &str| {
        note(&format!("{}: {why}: left for the DEL of its pod, or to be removed by hand", file.display()));
    };
    let kept = saved::of_network(&network.data_dir, &network.name, broken).unwrap_or_else(|error| {
        failures.push(error);
        Kept::new()
    });
    let node = node::read(&network.subnet_file).ok();
    let known = node.is_some();
    let agent = Agent(node.as_ref().and_then(|node| node.policy_socket.clone()));
    let anew = network.delegate_for_del(node);

    let (held, tried) = (Held::default(), valid.clone());
    let mut run = Collector { call, network, valid, held, tried, agent, failures };
    run.collect_kept(&kept);
    let added = kept.into_values().map(|(_, delegate)| delegate).find(|_| !known);
    if let Err(error) = anew.and_then(|anew| run.collect_rest(anew, added)) {
        run.failures.push(error);
    }
    saved::sweep(&network.data_dir);
    summary(run.failures)
}

/// One GC, as far as it has come.
struct Collector<'a> {
    call: &'a Call,
    network: &'a Network,
    valid: BTreeSet<Attachment>,
    held: Held,
    /// Those that are valid, or were dropped already.
    tried: BTreeSet<Attachment>,
    agent: Agent,
    failures: Vec<CniError>,
}

impl Collector<'_> {
    /// Takes down by its kept configuration what is not valid.
    fn collect_kept(&mut self, kept: &Kept) {
        for name in stale(kept, &self.valid) {
            let Some((file, delegate)) = kept.get(name) else { continue };
            let gone: Vec<_> = whose(name, self.held.by(delegate)).difference(&self.valid).cloned().collect();
            let mut remains = gone.is_empty();
            for attachment in gone {
                match del(self.call, self.network, delegate, &attachment) {
                    Ok(()) => self.agent.forgets(&attachment),
                    Err(error) => {
                        self.failures.push(error);
                        remains = true;
                    }
                }
                self.tried.insert(attachment);
            }
            if !remains && let Err(error) = saved::remove(file) {
                note(&error);
            }
        }
    }

    /// Gives back what is held without a kept configuration, and has the delegate collect. `added` is a delegate that
    /// was kept, for a node whose subnet is not known.
    fn collect_rest(&mut self, anew: Delegate, added: Option<Delegate>) -> Result<(), CniError> {
        let network = self.network;
        let way = ResolvedRoute::of(self.call, network, &anew, Verb::Gc)?;
        let modern = match &way {
            ResolvedRoute::InProcess(_) => true,
            ResolvedRoute::Program(program) => delegate::speaks(program, network.version())?,
        };
        // DEL is the same in all versions, but one that the delegate does not know would be refused.
        let usable = if modern { anew.clone() } else { anew.clone().in_version("1.0.0") };
        for attachment in self.held.by(&anew).difference(&self.tried) {
            match way.del_gone(&usable, attachment) {
                Ok(()) => self.agent.forgets(attachment),
                Err(failure) => self.failures.push(failure.into()),
            }
        }
        self.failures.extend(release_leftovers(&anew, &self.valid));
        match way {
            ResolvedRoute::Program(program) if modern => {
                delegate::run(&program, Verb::Gc, &network.for_gc(added.unwrap_or(anew)).text)?;
            }
            ResolvedRoute::Program(_) | ResolvedRoute::InProcess(_) => {}
        }
        Ok(())
    }
}

/// Where the agent is told about attachments that are gone, until it can't be told.
struct Agent(Option<PathBuf>);

impl Agent {
    fn forgets(&mut self, attachment: &Attachment) {
        if self.0.as_deref().is_some_and(|socket| !policy::release(socket, attachment, "")) {
            self.0 = None;
        }
    }
}

fn del(call: &Call, network: &Network, delegate: &Delegate, attachment: &Attachment) -> Result<(), CniError> {
    Ok(ResolvedRoute::of(call, network, delegate, Verb::Del)?.del_gone(delegate, attachment)?)
}

/// The files of no valid attachment. The plain name is that of a valid one that has no file of its own.
fn stale<'a>(kept: &'a Kept, valid: &BTreeSet<Attachment>) -> Vec<&'a str> {
    let mut wanted = BTreeSet::new();
    for Attachment { container, ifname } in valid {
        let own = format!("{container}-{ifname}");
        wanted.insert(if kept.contains_key(&own) { own } else { container.clone() });
    }
    kept.keys().filter(|name| !wanted.contains(*name)).map(String::as_str).collect()
}

/// The attachments that a file may be for: those that hold addresses, else all that its name can mean. A DEL
/// too many does nothing, one too few loses an address.
fn whose(name: &str, held: &BTreeSet<Attachment>) -> BTreeSet<Attachment> {
    let attachment = |container: &str, ifname: &str| Attachment {
        container: container.to_owned(),
        ifname: ifname.to_owned(),
    };
    let dashes = name.match_indices('-').map(|(at, _)| (&name[..at], &name[at + 1..]));
    let named =
        dashes.filter(|(container, ifname)| is_identifier(container) && check_interface(ifname).is_ok());
    let mut possible: BTreeSet<_> = named.map(|(container, ifname)| attachment(container, ifname)).collect();
    let known: BTreeSet<_> =
        held.iter().filter(|one| one.container == name || possible.contains(one)).cloned().collect();
    if !known.is_empty() {
        return known;
    }
    if is_identifier(name) {
        possible.insert(attachment(name, "eth0"));
    }
    possible
}

/// For whom `host-local` holds addresses, by its directories; each is read once, before anything is dropped
/// from it.
#[derive(Default)]
struct Held(BTreeMap<PathBuf, BTreeSet<Attachment>>);

impl Held {
    /// Those of the network and the directory in a delegate's configuration.
    fn by(&mut self, delegate: &Delegate) -> &BTreeSet<Attachment> {
        let directory = data_dir(delegate).unwrap_or_default();
        self.0
            .entry(directory.join(&delegate.network))
            .or_insert_with(|| holders(&directory, &delegate.network))
    }
}

/// Where `host-local` keeps the reservations of all networks.
fn data_dir(delegate: &Delegate) -> Option<PathBuf> {
    let config: Value = serde_json::from_str(&delegate.text).ok()?;
    let ipam = config.get("ipam")?;
    ipam.get("type").filter(|kind| *kind == "host-local")?;
    let root = ipam.get("dataDir").and_then(Value::as_str).filter(|root| !root.is_empty());
    Some(root.unwrap_or(DEFAULT_DATA_DIR).into())
}

/// Who holds addresses of a network.
fn holders(data_dir: &Path, network: &str) -> BTreeSet<Attachment> {
    let store = Store::existing(data_dir, network).unwrap_or_else(|error| {
        note(&error);
        None
    });
    let reservations = store.map(|store| store.reservations()).unwrap_or(Ok(Vec::new()));
    let reservations = reservations.unwrap_or_else(|error| {
        note(&error);
        Vec::new()
    });
    let holder = |holder: Holder| match holder {
        Holder::Attachment(attachment) => Some(attachment),
        Holder::Container(_) | Holder::Nobody | Holder::Unknown(_) => None,
    };
    reservations.into_iter().filter_map(|one| holder(one.holder)).collect()
}

/// Whether no address is reserved for the container in a delegate's network. `false` where that is not known: the addresses
/// are not those of `host-local`, or the reservations can't be read.
pub(crate) fn holds_nothing(delegate: &Delegate, container: &str) -> bool {
    let Some(data_dir) = data_dir(delegate) else { return false };
    let of_container = |one: &Reservation| match &one.holder {
        Holder::Attachment(attachment) => attachment.container == container,
        Holder::Container(holder) => holder == container,
        Holder::Nobody | Holder::Unknown(_) => false,
    };
    match Store::existing(&data_dir, &delegate.network) {
        Ok(Some(store)) => store.reservations().is_ok_and(|all| !all.iter().any(of_container)),
        Ok(None) => true,
        Err(_) => false,
    }
}

/// Gives back the addresses that no DEL can name: those of files that a full disk or a power cut has left without
/// a holder, and those that an old version of `host-local` noted for containers that are gone.
fn release_leftovers(delegate: &Delegate, valid: &BTreeSet<Attachment>) -> Vec<CniError> {
    let Some(data_dir) = data_dir(delegate) else { return Vec::new() };
    let failed = |msg: String| CniError::new(error::OTHER, msg);
    let store = match Store::existing(&data_dir, &delegate.network) {
        Ok(Some(store)) => store,
        Ok(None) => return Vec::new(),
        Err(error) => return vec![failed(error)],
    };
    // Those of attachments that are known by name were taken down by a DEL.
    let unnamed = |holder: &Holder| !matches!(holder, Holder::Attachment(_));
    let (released, failures) = store.release_if(|holder, _| unnamed(holder) && holder.is_garbage(valid));
    for one in &released {
        note(&format!("{}: reserved for no container: given back", one.path.display()));
    }
    failures.into_iter().map(failed).collect()
}

/// One error of many: the first, and the others that differ from it as details.
fn summary(failures: Vec<CniError>) -> Result<(), CniError> {
    let count = failures.len();
    let mut messages = BTreeSet::new();
    let further = failures.iter().skip(1).map(|error| error.msg.as_str());
    messages.extend(further.filter(|msg| failures.first().is_some_and(|first| first.msg != *msg)));
    let others: Vec<_> = messages.into_iter().take(5).map(gojson::shortened).collect();
    let Some(first) = failures.into_iter().next() else { return Ok(()) };
    if count == 1 {
        return Err(first);
    }
    let mut details = format!("{count} failures");
    if !first.details.is_empty() {
        details = format!("{}; {details}", first.details);
    }
    if !others.is_empty() {
        details = format!("{details}; others: {}", others.join("; "));
    }
    Err(CniError { details, ..first })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn attachments(pairs: &[(&str, &str)]) -> BTreeSet<Attachment> {
        let one = |(container, ifname): &(&str, &str)| Attachment {
            container: (*container).to_owned(),
            ifname: (*ifname).to_owned(),
        };
        pairs.iter().map(one).collect()
    }

    fn kept(names: &[&str]) -> Kept {
        let delegate = Delegate::from_kept(br#"{"name":"n","type":"bridge"}"#).unwrap();
        names.iter().map(|name| ((*name).to_owned(), (PathBuf::from(name), delegate.clone()))).collect()
    }

    #[test]
    fn a_file_is_stale_when_no_valid_attachment_can_have_written_it() {
        let files = kept(&["c1", "c1-net1", "c2", "c-3"]);
        let stale = |valid: &[(&str, &str)]| stale(&files, &attachments(valid)).join(" ");
        assert_eq!(stale(&[]), "c-3 c1 c1-net1 c2");
        assert_eq!(stale(&[("c1", "eth0"), ("c1", "net1"), ("c2", "eth0"), ("c-3", "eth0")]), "");
        assert_eq!(stale(&[("c1", "eth0"), ("c2", "net7")]), "c-3 c1-net1");
        assert_eq!(stale(&[("c1", "net1"), ("c", "3")]), "c1 c2");
        assert_eq!(stale(&[("c9", "eth0")]), "c-3 c1 c1-net1 c2");
    }

    #[test]
    fn a_files_attachments_are_those_that_hold_addresses_or_all_that_its_name_can_mean() {
        let held = attachments(&[("c1", "net1"), ("a", "b-c"), ("other", "eth0")]);
        assert_eq!(whose("c1", &held), attachments(&[("c1", "net1")]));
        assert_eq!(whose("c1-net1", &held), attachments(&[("c1", "net1")]));
        assert_eq!(whose("a-b-c", &held), attachments(&[("a", "b-c")]));
        assert_eq!(whose("c2", &held), attachments(&[("c2", "eth0")]));
        assert_eq!(
            whose("a-b-c", &BTreeSet::new()),
            attachments(&[("a-b-c", "eth0"), ("a", "b-c"), ("a-b", "c")])
        );
        assert_eq!(whose("a-", &held), attachments(&[("a-", "eth0")]));
    }

    #[test]
    fn where_host_local_keeps_its_reservations_is_in_the_configuration() {
        let place = |ipam: &str| {
            let text = format!(r#"{{"ipam":{ipam},"name":"n","type":"bridge"}}"#);
            data_dir(&Delegate::from_kept(text.as_bytes()).unwrap())
        };
        assert_eq!(place(r#"{"type":"host-local"}"#), Some("/var/lib/cni/networks".into()));
        assert_eq!(place(r#"{"type":"host-local","dataDir":"/x"}"#), Some("/x".into()));
        assert_eq!(place(r#"{"type":"dhcp"}"#), None);
        assert_eq!(place("7"), None);
    }

    #[test]
    fn one_error_speaks_for_all() {
        let error = |msg: &str| CniError::new(999, msg);
        assert_eq!(summary(vec![]), Ok(()));
        assert_eq!(summary(vec![error("a")]), Err(error("a")));
        let both = CniError { details: "3 failures; others: b".into(), ..error("a") };
        assert_eq!(summary(vec![error("a"), error("b"), error("a")]), Err(both));
    }

    proptest! {
        #[test]
        fn no_file_of_a_valid_attachment_is_stale(
            pairs in prop::collection::btree_set(("[ab-]{1,3}", "[ab-]{1,3}"), 0..6),
            own in prop::collection::vec(any::<bool>(), 6),
        ) {
            let valid: BTreeSet<_> =
                pairs.iter().map(|(container, ifname)| Attachment { container: container.clone(), ifname: ifname.clone() }).collect();
            let names: Vec<_> = valid
                .iter()
                .zip(&own)
                .map(|(one, own)| if *own { format!("{}-{}", one.container, one.ifname) } else { one.container.clone() })
                .collect();
            let names: Vec<_> = names.iter().map(String::as_str).collect();
            // A file under the second name counts for its attachment, so the plain one may seem superfluous:
            // only when both are there.
            let files = kept(&names);
            for name in stale(&files, &valid) {
                prop_assert!(valid.iter().any(|one| one.container == name && files.contains_key(&format!("{name}-{}", one.ifname))), "{}", name);
            }
        }

        #[test]
        fn arbitrary_names_never_panic(name in ".{0,12}") {
            let _ = whose(&name, &BTreeSet::new());
        }
    }
}
