//! The reservations on disk, in the form of the original: in `<dataDir>/<network>` a file per address, and the lock.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::env::{Attachment, check_interface, is_identifier};
use crate::files;

/// The directory of directories, unless the configuration has a `dataDir`.
pub(crate) const DEFAULT_DATA_DIR: &str = "/var/lib/cni/networks";

/// The file whose lock protects the reservations.
const LOCK: &str = "lock";

/// For a file system that takes no changes.
const REMEDY: &str =
    "make room, or make it writable, or set \"dataDir\" of \"ipam\" to a directory that can be written";

/// The reservations of one network. While the value lives, no other process changes them.
pub(crate) struct Store {
    directory: PathBuf,
    _lock: File,
}

/// One reserved address.
#[derive(Debug)]
pub(crate) struct Reservation {
    /// The address, which is the file's name.
    pub(crate) address: IpAddr,
    /// The file.
    pub(crate) path: PathBuf,
    /// For whom it is reserved.
    pub(crate) holder: Holder,
}

impl Reservation {
    /// Reads a file; of one that can't be read the holder is unknown.
    fn read(address: IpAddr, path: PathBuf) -> Self {
        let holder = match files::read(&path) {
            Ok(content) => Holder::parse(&content),
            Err(error) => Holder::Unknown(error.to_string()),
        };
        Self { address, path, holder }
    }

    /// Gives the address back.
    fn remove(&self) -> Result<(), String> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                let path = self.path.display();
                Err(format!("{path} can't be removed: {error}: the address stays reserved; {REMEDY}"))
            }
            _ => Ok(()),
        }
    }
}

/// For whom an address is reserved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Holder {
    /// An attachment.
    Attachment(Attachment),
    /// A container, by a version of `host-local` that did not write interfaces.
    Container(String),
    /// None: the file is empty, as after a full disk or a power cut, or holds what is no container.
    Nobody,
    /// The file can't be read.
    Unknown(String),
}

impl Holder {
    /// What a file's content says.
    fn parse(content: &[u8]) -> Self {
        let Ok(text) = std::str::from_utf8(content) else { return Self::Nobody };
        match text.trim().split_once("\r\n") {
            Some((container, ifname)) if is_identifier(container) && check_interface(ifname).is_ok() => {
                Self::Attachment(Attachment { container: container.to_owned(), ifname: ifname.to_owned() })
            }
            None if is_identifier(text.trim()) => Self::Container(text.trim().to_owned()),
            _ => Self::Nobody,
        }
    }

    /// Who it is, for messages.
    pub(crate) fn text(&self) -> String {
        match self {
            Self::Attachment(Attachment { container, ifname }) => {
                format!("{ifname} of container {container}")
            }
            Self::Container(container) => format!("container {container}"),
            Self::Nobody => "no container".into(),
            Self::Unknown(why) => format!("somebody ({why})"),
        }
    }

    /// Whether it is none of the valid attachments of the network.
    pub(crate) fn is_garbage(&self, valid: &BTreeSet<Attachment>) -> bool {
        match self {
            Self::Nobody => true,
            Self::Container(container) => valid.iter().all(|one| one.container != *container),
            Self::Attachment(attachment) => !valid.contains(attachment),
            Self::Unknown(_) => false,
        }
    }

    /// Whether a DEL of the attachment gives the address back.
    pub(crate) fn is(&self, attachment: &Attachment) -> bool {
        match self {
            Self::Attachment(holder) => holder == attachment,
            Self::Container(container) => *container == attachment.container,
            Self::Nobody | Self::Unknown(_) => false,
        }
    }
}

impl Store {
    /// Opens the network's directory, makes it if it is missing, and waits for the lock.
    ///
    /// # Errors
    /// The system's, with the path.
    pub(crate) fn open(data_dir: &Path, network: &str) -> Result<Self, String> {
        let directory = data_dir.join(network);
        match lock(&directory) {
            Err(error) if is_missing(&error) => {
                let made = DirBuilder::new().recursive(true).mode(0o755).create(&directory);
                made.map_err(|error| format!("mkdir {}: {error}", directory.display()))?;
                Self::locked(lock(&directory), directory)
            }
            outcome => Self::locked(outcome, directory),
        }
    }

    /// Like [`open`](Self::open), but makes nothing: without a directory there are no reservations.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub(crate) fn existing(data_dir: &Path, network: &str) -> Result<Option<Self>, String> {
        let directory = data_dir.join(network);
        match lock(&directory) {
            Err(error) if is_missing(&error) => Ok(None),
            outcome => Self::locked(outcome, directory).map(Some),
        }
    }

    fn locked(lock: io::Result<File>, directory: PathBuf) -> Result<Self, String> {
        let lock = lock.map_err(|error| format!("lock {}: {error}", directory.join(LOCK).display()))?;
        Ok(Self { directory, _lock: lock })
    }

    /// Writes and removes a file, which shows what a lock does not: whether the file system takes a reservation.
    ///
    /// # Errors
    /// The system's, with the directory and the remedy.
    pub(crate) fn check_writable(&self) -> Result<(), String> {
        files::check_writable(&self.temporary()).map_err(|error| {
            let directory = self.directory.display();
            format!("no address can be reserved in {directory}: {error}: {REMEDY}")
        })
    }

    /// The names of the files of reserved addresses, sorted by these.
    ///
    /// # Errors
    /// The system's, with the directory: an address that is not seen would be lost, or given away twice.
    fn files(&self) -> Result<Vec<(IpAddr, OsString)>, String> {
        let named = |name: OsString| Some((name.to_str()?.parse().ok()?, name));
        let list = || {
            let mut files = Vec::new();
            for entry in fs::read_dir(&self.directory)? {
                files.extend(named(entry?.file_name()));
            }
            Ok(files)
        };
        let mut files =
            list().map_err(|error: io::Error| format!("reading {}: {error}", self.directory.display()))?;
        files.sort();
        Ok(files)
    }

    /// All reserved addresses, sorted. No file is opened for it.
    ///
    /// # Errors
    /// The system's, with the directory.
    pub(crate) fn addresses(&self) -> Result<Vec<IpAddr>, String> {
        Ok(self.files()?.into_iter().map(|(address, _)| address).collect())
    }

    /// All reservations, in the order of their addresses.
    ///
    /// # Errors
    /// The system's, with the directory; of a file that can't be read only the holder is unknown.
    pub(crate) fn reservations(&self) -> Result<Vec<Reservation>, String> {
        let read = |(address, name)| Reservation::read(address, self.directory.join::<OsString>(name));
        Ok(self.files()?.into_iter().map(read).collect())
    }

    fn path(&self, address: IpAddr) -> PathBuf {
        self.directory.join(address.to_string())
    }

    /// The addresses that are reserved for the attachment.
    ///
    /// # Errors
    /// The system's, with the directory.
    pub(crate) fn addresses_of(&self, attachment: &Attachment) -> Result<Vec<IpAddr>, String> {
        let all = self.reservations()?.into_iter();
        Ok(all.filter(|one| one.holder.is(attachment)).map(|one| one.address).collect())
    }

    /// Reserves an address for the attachment, and notes it as the last one of the range set number `set`.
    /// `false` if it is reserved already.
    ///
    /// # Errors
    /// The system's; the address is not reserved then.
    pub(crate) fn reserve(
        &self,
        address: IpAddr,
        attachment: &Attachment,
        set: usize,
    ) -> Result<bool, String> {
        let path = self.path(address);
        // No other process makes one while the lock is held.
        if fs::symlink_metadata(&path).is_ok() {
            return Ok(false);
        }
        let Attachment { container, ifname } = attachment;
        let reserved = self.write(&path, &format!("{container}\r\n{ifname}"));
        let noted = reserved.and_then(|()| self.note_last(address, set));
        noted.map(|()| true).map_err(|error| {
            let _ = fs::remove_file(&path);
            format!("reserving {}: {error}", path.display())
        })
    }

    /// Notes the address as the last one of the range set number `set`. The file is cut only where it was longer: giving
    /// back its block and taking another one costs more than all else that a reservation writes.
    fn note_last(&self, address: IpAddr, set: usize) -> io::Result<()> {
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false).mode(0o644).custom_flags(libc::O_NOFOLLOW);
        let mut file = options.open(self.last_reserved_path(set))?;
        let text = address.to_string();
        file.write_all(text.as_bytes())?;
        let length = text.len() as u64;
        if file.metadata()?.len() > length { file.set_len(length) } else { Ok(()) }
    }

    /// Writes a file in one step: a process that is killed leaves no file without a holder, which no DEL would find.
    fn write(&self, path: &Path, content: &str) -> io::Result<()> {
        let temporary = self.temporary();
        let open = || OpenOptions::new().write(true).create_new(true).mode(0o644).open(&temporary);
        let mut file = match open() {
            // Of a process that was killed.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                fs::remove_file(&temporary)?;
                open()?
            }
            outcome => outcome?,
        };
        let written = file.write_all(content.as_bytes()).and_then(|()| fs::rename(&temporary, path));
        if written.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        written
    }

    /// There is one at most, since there is one holder of the lock.
    fn temporary(&self) -> PathBuf {
        self.directory.join(".reserving")
    }

    /// The address that was reserved last in the range set number `set`.
    pub(crate) fn last_reserved(&self, set: usize) -> Option<IpAddr> {
        let content = files::read(&self.last_reserved_path(set)).ok()?;
        std::str::from_utf8(&content).ok()?.parse().ok()
    }

    /// Gives back the addresses of the attachment; those that are noted for its container alone only if there
    /// are no others, as the original does.
    ///
    /// All reservations are read, unless it is known how many addresses the attachment has, and the pod had been `seen` with as
    /// many that are reserved for it.
    ///
    /// # Errors
    /// The addresses that could not be given back, with their files. The others are free.
    pub(crate) fn release(
        &self,
        attachment: &Attachment,
        count: Option<usize>,
        seen: &[IpAddr],
    ) -> Result<(), String> {
        let _ = fs::remove_file(self.temporary());
        let exact =
            |one: &Reservation| matches!(&one.holder, Holder::Attachment(holder) if holder == attachment);
        let seen = seen.iter().collect::<BTreeSet<_>>().into_iter().filter(|_| count.is_some());
        let read = |address: &IpAddr| Reservation::read(*address, self.path(*address));
        let mut own: Vec<_> = seen.map(read).filter(exact).collect();
        if own.is_empty() || Some(own.len()) != count {
            own = self.reservations()?;
            own.retain(|one| one.holder.is(attachment));
            if own.iter().any(exact) {
                own.retain(exact);
            }
        }
        let failures: Vec<_> = own.iter().filter_map(|one| one.remove().err()).collect();
        if failures.is_empty() { Ok(()) } else { Err(failures.join("; ")) }
    }

    /// Gives back one address if it is reserved for the attachment.
    pub(crate) fn give_back(&self, address: IpAddr, attachment: &Attachment) {
        let one = Reservation::read(address, self.path(address));
        if matches!(&one.holder, Holder::Attachment(holder) if holder == attachment) {
            let _ = one.remove();
        }
    }

    /// Gives back every address whose holder `is_gone`; gives what was given back.
    ///
    /// # Errors
    /// Those that could not be given back, as sentences.
    pub(crate) fn release_if(
        &self,
        mut is_gone: impl FnMut(&Holder, &Path) -> bool,
    ) -> (Vec<Reservation>, Vec<String>) {
        let (mut released, mut failures) = (Vec::new(), Vec::new());
        let reservations = self.reservations().unwrap_or_else(|error| {
            failures.push(error);
            Vec::new()
        });
        for one in reservations.into_iter().filter(|one| is_gone(&one.holder, &one.path)) {
            match one.remove() {
                Ok(()) => released.push(one),
                Err(error) => failures.push(error),
            }
        }
        (released, failures)
    }

    fn last_reserved_path(&self, set: usize) -> PathBuf {
        self.directory.join(format!("last_reserved_ip.{set}"))
    }
}

/// Waits for the lock of a directory.
fn lock(directory: &Path) -> io::Result<File> {
    // Reading is enough for the lock. O_NOFOLLOW: what a link leads to is not to be made.
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(libc::O_CREAT | libc::O_NOFOLLOW | libc::O_NONBLOCK).mode(0o750);
    let lock = options.open(directory.join(LOCK))?;
    lock.lock()?;
    Ok(lock)
}

/// Whether there is no such directory.
fn is_missing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn attachment(container: &str, ifname: &str) -> Attachment {
        Attachment { container: container.to_owned(), ifname: ifname.to_owned() }
    }

    #[test]
    fn the_content_of_a_file_tells_whose_the_address_is() {
        for (content, holder) in [
            (&b"c1\r\neth0"[..], Holder::Attachment(attachment("c1", "eth0"))),
            (b"c2\r\nnet1\n", Holder::Attachment(attachment("c2", "net1"))),
            (b"only-the-container", Holder::Container("only-the-container".into())),
            (b"", Holder::Nobody),
            (b"\0\0\0\0\0\0\0\0", Holder::Nobody),
            (b"../x\r\neth0", Holder::Nobody),
            (b"c5\r\n", Holder::Container("c5".into())),
            (b"\xff\xfe", Holder::Nobody),
        ] {
            assert_eq!(Holder::parse(content), holder, "{}", String::from_utf8_lossy(content));
        }
    }

    #[test]
    fn only_files_named_by_addresses_are_reservations() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path(), "n").unwrap();
        assert_eq!(store.reserve("10.1.17.2".parse().unwrap(), &attachment("c1", "eth0"), 0), Ok(true));
        assert_eq!(store.reserve("10.1.17.2".parse().unwrap(), &attachment("c2", "eth0"), 0), Ok(false));
        assert_eq!(store.reserve("fc00::2".parse().unwrap(), &attachment("c1", "eth0"), 1), Ok(true));
        fs::write(directory.path().join("n/strange"), "c1\r\neth0").unwrap();
        fs::create_dir(directory.path().join("n/10.1.17.3")).unwrap();
        let found = store.reservations().unwrap();
        assert_eq!(found.len(), 3);
        assert!(matches!(found[1].holder, Holder::Unknown(_)));
        assert_eq!(store.last_reserved(1), Some("fc00::2".parse().unwrap()));
        store.release(&attachment("c1", "eth0"), None, &[]).unwrap();
        assert_eq!(store.reservations().unwrap().len(), 1);
    }

    #[test]
    fn all_addresses_of_an_attachment_are_given_back_and_no_others() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path(), "n").unwrap();
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        let (one, two) = (attachment("c1", "eth0"), attachment("c1", "net1"));
        for (text, holder) in
            [("10.1.17.2", &one), ("fc00::2", &one), ("10.1.17.3", &two), ("10.2.0.2", &one)]
        {
            store.reserve(address(text), holder, 0).unwrap();
        }
        fs::write(directory.path().join("n/10.1.17.4"), "c1").unwrap();
        let of_others = ["10.1.17.3", "10.1.17.4"].map(address);
        store.give_back(of_others[0], &one);
        store.give_back(of_others[1], &one);
        assert_eq!(store.release(&one, None, &[]), Ok(()));
        assert_eq!(store.addresses().unwrap(), of_others);
        // Of a version that did not write interfaces, once there is no other.
        assert_eq!(store.release(&one, None, &[]), Ok(()));
        assert_eq!(store.addresses().unwrap(), of_others[..1]);
        store.give_back(of_others[0], &two);
        assert!(store.addresses().unwrap().is_empty());
    }

    #[test]
    fn other_reservations_are_read_unless_the_pod_had_as_many_addresses_as_it_has_to_have() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path(), "n").unwrap();
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        let (one, two) = (attachment("c1", "eth0"), attachment("c2", "eth0"));
        for (text, holder, set) in
            [("10.1.17.2", &one, 0), ("fc00::2", &one, 1), ("10.1.17.3", &two, 0), ("10.2.0.2", &one, 2)]
        {
            store.reserve(address(text), holder, set).unwrap();
        }
        let left = |count: Option<usize>, seen: &[&str]| {
            let seen: Vec<_> = seen.iter().map(|text| address(text)).collect();
            store.release(&one, count, &seen).unwrap();
            store.addresses().unwrap()
        };
        // Two of two: what else there is was not looked for.
        let twice = ["10.1.17.2", "fc00::2", "fc00::2", "127.0.0.1", "10.1.17.3"];
        assert_eq!(left(Some(2), &twice), [address("10.1.17.3"), address("10.2.0.2")]);
        // One of two, one that is another pod's, and an unknown number.
        for (count, seen) in
            [(Some(2), &["10.1.17.2", "10.1.17.2", "10.1.17.3"][..]), (None, &["10.1.17.2"]), (Some(1), &[])]
        {
            store.reserve(address("10.1.17.2"), &one, 0).unwrap();
            store.reserve(address("10.2.0.2"), &one, 2).unwrap();
            assert_eq!(left(count, seen), [address("10.1.17.3")]);
        }
    }

    #[test]
    fn reservations_that_can_not_be_listed_are_an_error_and_not_none() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path(), "n").unwrap();
        fs::remove_dir_all(directory.path()).unwrap();
        let error = store.release(&attachment("c1", "eth0"), None, &[]).unwrap_err();
        assert!(error.starts_with(&format!("reading {}/n: ", directory.path().display())), "{error}");
        assert_eq!(store.addresses().unwrap_err(), error);
        assert_eq!(store.release_if(|_, _| true).1, [error]);
        assert!(store.check_writable().unwrap_err().contains("no address can be reserved in "));
    }

    #[test]
    fn the_address_that_was_reserved_last_replaces_a_longer_one() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path(), "n").unwrap();
        for (text, container) in [("10.1.17.254", "c1"), ("10.1.17.2", "c2"), ("10.1.17.30", "c3")] {
            store.reserve(text.parse().unwrap(), &attachment(container, "eth0"), 0).unwrap();
            assert_eq!(fs::read_to_string(directory.path().join("n/last_reserved_ip.0")).unwrap(), text);
        }
    }

    #[test]
    fn where_there_is_no_directory_nothing_is_made_for_looking() {
        let directory = tempfile::tempdir().unwrap();
        assert!(Store::existing(directory.path(), "n").unwrap().is_none());
        assert!(fs::read_dir(directory.path()).unwrap().next().is_none());
    }

    proptest! {
        #[test]
        fn arbitrary_contents_never_panic(content: Vec<u8>) {
            let _ = Holder::parse(&content);
        }
    }
}
