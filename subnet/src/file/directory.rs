//! Reading and writing the directory, under its lock.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use std::{fs, io};

use tokio::time::{Instant, sleep};

use super::entry::{LeaseFile, created_at};
use crate::env_file::write_atomically;
use crate::lease::{Leases, Malformed, format_key, parse_key};
use crate::net::Subnets;
use crate::store::{StoreError, random_below};
use crate::text::shortened;
use crate::watched::Watched;

/// The holder of the lock needs milliseconds; after this long something is wrong.
const LOCK_WITHIN: Duration = Duration::from_secs(10);
/// No lease is as long as this many bytes.
const LONGEST: u64 = 64 << 10;

/// The directory that the operator named.
#[derive(Debug)]
pub(super) struct Directory {
    root: PathBuf,
    pub(super) config: Watched,
}

/// Access to the leases while the lock is held.
pub(super) struct Locked<'a> {
    directory: &'a Directory,
    /// Unlocked when dropped.
    _lock: File,
}

/// All leases at one moment.
#[derive(Debug, Default)]
pub(super) struct Table {
    pub(super) leases: Leases,
    /// When the next lease expires.
    pub(super) next_expiry: Option<SystemTime>,
    /// Files that are to be removed: expired ones.
    expired: Vec<String>,
    /// Files that an interrupted writing left behind.
    stale: Vec<String>,
}

impl Directory {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { config: Watched::new(path.join("config.json")), root: path }
    }

    pub(super) fn described(&self) -> String {
        format!("the directory {}", self.root.display())
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn leases(&self) -> PathBuf {
        self.root.join("subnets")
    }

    /// The configuration, and where it is.
    pub(super) fn read_config(&self) -> Result<(String, String), StoreError> {
        let path = self.config.path();
        let at = path.display().to_string();
        match self.config.read() {
            Ok(json) => Ok((at, String::from_utf8_lossy(&json).into_owned())),
            Err(error) if error.kind() == ErrorKind::NotFound => match self.root.is_dir() {
                true => Err(StoreError::NoConfig { at }),
                false => Err(self.absent()),
            },
            Err(error) => Err(self.failed(path, &error)),
        }
    }

    /// Makes sure that the directory of leases is there. It is created beside a configuration only: an
    /// empty directory is more likely a mount point without its file system.
    pub(super) fn prepare(&self) -> Result<(), StoreError> {
        let leases = self.leases();
        if leases.is_dir() {
            return Ok(());
        }
        if !self.config.path().exists() {
            return Err(self.absent());
        }
        match fs::create_dir(&leases) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => Err(self.failed(&leases, &error)),
            _ => Ok(()),
        }
    }

    /// Does something while no other process lists or writes.
    pub(super) async fn alone<T>(
        &self,
        work: impl FnOnce(&Locked<'_>) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        self.locked(File::try_lock, work).await
    }

    /// Does something while no other process writes.
    pub(super) async fn together<T>(
        &self,
        work: impl FnOnce(&Locked<'_>) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        self.locked(File::try_lock_shared, work).await
    }

    /// The lock is tried again and again: waiting for it would block the thread, which may be the very
    /// one that other nodes of a test run on, or a process that has to end.
    async fn locked<T>(
        &self,
        attempt: fn(&File) -> Result<(), TryLockError>,
        work: impl FnOnce(&Locked<'_>) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let path = self.root.join(".lock");
        let deadline = Instant::now() + LOCK_WITHIN;
        loop {
            self.prepare()?;
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).mode(0o644);
            let lock = options.open(&path).map_err(|error| self.failed(&path, &error))?;
            match attempt(&lock) {
                // Somebody may have deleted the file, and others lock another one now.
                Ok(()) if is_same(&lock, &path) => return work(&Locked { directory: self, _lock: lock }),
                Ok(()) | Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(error)) => return Err(self.failed(&path, &error)),
            }
            if Instant::now() >= deadline {
                let seconds = LOCK_WITHIN.as_secs();
                return Err(self.unreachable(format!(
                    "another process has locked {} for {seconds} s: see which with `lslocks`",
                    path.display()
                )));
            }
            sleep(Duration::from_millis(1 + random_below(10) as u64)).await;
        }
    }

    fn absent(&self) -> StoreError {
        self.unreachable(if self.root.is_dir() {
            "it has neither config.json nor subnets: write the configuration, or mount its file system".into()
        } else {
            "it does not exist: create it, or mount its file system".into()
        })
    }

    pub(super) fn failed(&self, path: &Path, error: &io::Error) -> StoreError {
        let text = error.to_string();
        let path = path.display().to_string();
        let why = if text.contains(&path) { text } else { format!("{path}: {text}") };
        match error.kind() {
            ErrorKind::PermissionDenied => StoreError::Denied {
                store: self.described(),
                why: format!("{why}: give flanneld the right to read and write there"),
            },
            ErrorKind::ReadOnlyFilesystem => StoreError::Denied {
                store: self.described(),
                why: format!("{why}: mount its file system so that it can be written"),
            },
            // Whichever file it is that finds no room: the text is the same at each attempt.
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
                self.unreachable(format!("its file system is full: make room on it ({})", error.kind()))
            }
            _ => self.unreachable(why),
        }
    }

    pub(super) fn unreachable(&self, why: String) -> StoreError {
        StoreError::Unreachable { store: self.described(), why }
    }
}

fn is_same(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::metadata(path)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}

/// Whether [`write_atomically`] makes such names, a dot before them, for leases.
fn is_temporary(hidden: &str) -> bool {
    hidden.rsplit_once('.').is_some_and(|(key, pid)| parse_key(key).is_some() && pid.parse::<u32>().is_ok())
}

impl Locked<'_> {
    /// The file name of a lease.
    pub(super) fn key(&self, subnets: &Subnets) -> Result<String, StoreError> {
        format_key(subnets).ok_or_else(|| {
            StoreError::Unusable(format!(
                "the file store can't keep the lease of {subnets}: enable a family with EnableIPv4 or EnableIPv6"
            ))
        })
    }

    /// Every lease that has not expired.
    pub(super) fn list(&self) -> Result<Table, StoreError> {
        let leases = self.directory.leases();
        let failed = |error: io::Error| self.directory.failed(&leases, &error);
        let (mut table, now) = (Table::default(), SystemTime::now());
        for file in fs::read_dir(&leases).map_err(failed)? {
            let name = file.map_err(failed)?.file_name().to_string_lossy().into_owned();
            if let Some(hidden) = name.strip_prefix('.') {
                if is_temporary(hidden) {
                    table.stale.push(name);
                }
                continue;
            }
            match self.open(&name) {
                Ok(None) => {}
                Ok(Some((entry, _))) if entry.expired(now) => table.expired.push(name),
                Ok(Some((entry, changed))) => {
                    let written = created_at(changed);
                    let created = entry.created.unwrap_or(written);
                    table.leases.insert_written(&name, entry.text.as_bytes(), created, written);
                    table.next_expiry = table.next_expiry.into_iter().chain(entry.expires).min();
                }
                Err(why) => {
                    let subnets = parse_key(&name);
                    table.leases.malformed.insert(shortened(&name), Malformed { why, subnets, lease: None });
                }
            }
        }
        Ok(table)
    }

    /// The same, and removes what has expired and what an interrupted writing left: no other process writes.
    pub(super) fn list_and_sweep(&self) -> Result<Table, StoreError> {
        let mut table = self.list()?;
        for name in table.expired.drain(..).chain(table.stale.drain(..)) {
            self.remove(&name)?;
        }
        Ok(table)
    }

    /// One entry. One that can't be read has its text, so that it isn't taken for absent.
    pub(super) fn read(&self, key: &str) -> Result<Option<LeaseFile>, StoreError> {
        match self.open(key) {
            Ok(found) => Ok(found.map(|(entry, _)| entry)),
            Err(text) => Ok(Some(LeaseFile { text, created: None, expires: None, owner: None })),
        }
    }

    /// An entry and when it was changed last; `None` if there is none.
    fn open(&self, name: &str) -> Result<Option<(LeaseFile, SystemTime)>, String> {
        let path = self.directory.leases().join(name);
        let read = || -> io::Result<(Vec<u8>, SystemTime)> {
            // A pipe would never end, and be it only to open it.
            if !fs::metadata(&path)?.is_file() {
                return Err(io::Error::other("it is not a file"));
            }
            let file = File::open(&path)?;
            let changed = file.metadata()?.modified()?;
            let mut bytes = Vec::new();
            file.take(LONGEST + 1).read_to_end(&mut bytes)?;
            Ok((bytes, changed))
        };
        match read() {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(format!("it can't be read: {error}")),
            Ok((bytes, _)) if bytes.len() as u64 > LONGEST => Err("it is too long for a lease".into()),
            Ok((bytes, changed)) => match String::from_utf8(bytes) {
                Ok(text) => LeaseFile::parse(text).map(|entry| Some((entry, changed))),
                Err(error) => Err(format!("not UTF-8: {error}")),
            },
        }
    }

    pub(super) fn write(&self, key: &str, text: &str) -> Result<(), StoreError> {
        let path = self.directory.leases().join(key);
        write_atomically(&path, text.as_bytes(), 0o644).map_err(|error| self.directory.failed(&path, &error))
    }

    pub(super) fn remove(&self, key: &str) -> Result<(), StoreError> {
        let path = self.directory.leases().join(key);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(self.directory.failed(&path, &error)),
            _ => Ok(()),
        }
    }
}

impl Table {
    /// The age of a lease that is made now: younger than all there are, independent of their nodes' clocks.
    pub(super) fn next_created(&self, now: SystemTime) -> u64 {
        let youngest = self.leases.leases.values().map(|lease| lease.created).max().unwrap_or(0);
        created_at(now).max(youngest.saturating_add(1))
    }

    pub(super) fn has_expired(&self) -> bool {
        !self.expired.is_empty()
    }
}
